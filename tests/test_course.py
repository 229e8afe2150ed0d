"""The course as a book: its order, its figures, its exercises, and that its text is the package's where it says so."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import math
import re
import textwrap
from pathlib import Path

import nbformat
import pytest

from regolite import course

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
CHAPTERS = sorted(path for path in FOLDER.glob("[01]*.ipynb"))
SOLUTIONS = sorted((FOLDER / "solutions").glob("*.ipynb"))
ORDER = sorted(FOLDER.glob("[0-9]*.ipynb"))
LINES = 28  # the longest code cell, except parameters and central exercises
CENTRAL_LINES = 75
FOLDED_LINES = 12  # longer cells that draw a figure are folded, so that a reader meets ideas before plotting code
STALE = re.compile(
    r"what to see|\bthe mend\b|\bmends?\b|\banew\b|\bby heart\b|\bsurest\b|answers? an object|thousand million"
    r"|\bneeds not\b|\bwhere there is one\b",
    flags=re.IGNORECASE,
)
"""Phrases that are not the field's; CONTRIBUTING has the rules."""

by_stem = {"ids": lambda path: path.stem}
chapters = pytest.mark.parametrize("path", CHAPTERS, **by_stem)
solutions = pytest.mark.parametrize("path", SOLUTIONS, **by_stem)
both = pytest.mark.parametrize("path", CHAPTERS + SOLUTIONS, ids=lambda path: f"{path.parent.name}-{path.stem}")


def cells(path: Path, kind: str | None = None) -> list[nbformat.NotebookNode]:
    return [c for c in nbformat.read(path, as_version=4).cells if kind in (None, c.cell_type)]


def tags(cell: nbformat.NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def printed(cell: nbformat.NotebookNode) -> str:
    return "".join(o.text for o in cell.outputs if o.output_type == "stream" and o.name == "stdout")


def images(cell: nbformat.NotebookNode) -> list[tuple[str, nbformat.NotebookNode]]:
    """The images that a code cell shows: their kind and the output."""
    shown = (o for o in cell.get("outputs", []) if "data" in o)
    return [(kind, o) for o in shown for kind in o.data if kind.startswith("image/")]


def headings(path: Path) -> list[str]:
    """The numbers of the exercises of a notebook, by their headings."""
    text = "\n".join(cell.source for cell in cells(path, "markdown"))
    return re.findall(r"^### Exercise (\d+\.\d+) · \S", text, flags=re.MULTILINE)


def checked(path: Path) -> dict[str, str]:
    """What the notebook's output says to each exercise that it checks."""
    said = {}
    for cell in cells(path, "code"):
        for number in re.findall(r"\bcheck\(\"(\d+\.\d+)\"", cell.source):
            said[number] = printed(cell)
    return said


class TestBook:
    @chapters
    def test_first_cell_says_what_to_expect(self, path: Path):
        first = cells(path)[0].source
        assert re.match(rf"# {path.stem[:2]} · \S", first)
        for word in ("Goal", "In the paper", "Read first", "Time"):
            assert f"**{word}.**" in first, word
        took = re.search(
            r"\*\*Time\.\*\* ([\d.]+) (seconds|minutes)(?: and [\d.]+ GB of memory)? on one CPU core", first
        )
        assert took, "`make notebooks` writes the time"
        assert float(took[1]) <= (3 if took[2] == "minutes" else 180)
        assert study_minutes(path) >= 20

    @chapters
    def test_leads_to_the_chapters_before_and_after(self, path: Path):
        place = ORDER.index(path)
        first, last = cells(path)[0].source, cells(path)[-1].source
        if place:
            assert f"]({ORDER[place - 1].name})" in first
        assert f"]({ORDER[place + 1].name})" in first and f"]({ORDER[place + 1].name})" in last
        assert re.search(r"^\*\*Next\.\*\* ", last, flags=re.MULTILINE)

    @chapters
    def test_asks_for_predictions_and_cites_its_sources(self, path: Path):
        text = "\n".join(cell.source for cell in cells(path, "markdown"))
        assert "**Predict.**" in text
        references = text.split("\n## References\n")[1].split("\n## ")[0]
        entries = re.findall(r"^- .*(?:\n  .*)*", references, flags=re.MULTILINE)
        assert 3 <= len(entries) <= 6
        assert all(re.search(r"\b(?:19|20)\d\d\b", entry) and len(entry) > 80 for entry in entries), entries

    @both
    def test_uses_standard_language(self, path: Path):
        for cell in cells(path):
            assert not (found := STALE.search(cell.source)), f"{found[0]!r} in {cell.source}"

    @both
    def test_long_plotting_cells_are_folded(self, path: Path):
        """Folded in JupyterLab by ``source_hidden`` and in the book by ``hide-input``."""
        for cell in cells(path, "code"):
            draws = re.search(r"^\s*show\(", cell.source, flags=re.MULTILINE) and "exercise" not in tags(cell)
            if draws and len(cell.source.splitlines()) > FOLDED_LINES:
                assert "hide-input" in tags(cell) and cell.metadata.jupyter.source_hidden, cell.source

    @both
    def test_links_resolve(self, path: Path):
        for cell in cells(path, "markdown"):
            for target in re.findall(r"\]\(([^)\s#]+)[^)]*\)", cell.source):
                assert re.match(r"[a-z]+:", target) or (path.parent / target).exists(), target

    @both
    def test_cells_are_short(self, path: Path):
        for cell in cells(path, "code"):
            limit = CENTRAL_LINES if "exercise" in tags(cell) else LINES
            assert "parameters" in tags(cell) or len(cell.source.splitlines()) <= limit, cell.source

    @both
    def test_says_nothing_on_standard_error(self, path: Path):
        assert not [
            o.text for c in cells(path, "code") for o in c.outputs if o.output_type == "stream" and o.name == "stderr"
        ]

    @both
    def test_every_figure_is_described_and_explained(self, path: Path):
        """Alternative text for those who cannot see it, and a numbered caption that says what to see."""
        number = 0
        listed = cells(path)
        for cell, after in zip(listed, [*listed[1:], None]):
            shown = images(cell) if cell.cell_type == "code" else []
            for kind, output in shown:
                assert len(output.metadata.get(kind, {}).get("alt", "")) > 20, f"use show(figure, alt): {cell.source}"
            if shown and "exercise" not in tags(cell):
                number += 1
                name = f"**Figure {int(path.stem[:2])}.{number}.** "
                assert after is not None and after.cell_type == "markdown", f"no caption {name}below: {cell.source}"
                assert after.source.startswith(name), f"{after.source[:40]!r} should begin with {name!r}"


class TestExercises:
    @chapters
    def test_three_to_six_with_difficulty_and_minutes(self, path: Path):
        numbers = headings(path)
        assert numbers == [f"{int(path.stem[:2])}.{n}" for n in range(1, len(numbers) + 1)]
        assert 3 <= len(numbers) <= 6
        text = "\n".join(cell.source for cell in cells(path, "markdown"))
        stars = "(?:★☆☆|★★☆|★★★)"
        line = rf"^\*Difficulty {stars} · importance {stars} · \d+ minutes\*$"
        assert len(re.findall(line, text, flags=re.MULTILINE)) == len(numbers)

    @solutions
    def test_central_solutions_build_a_module(self, path: Path):
        """The solution of a central exercise has at least 20 lines of code, and its name is the reference's."""
        for cell in cells(path, "code"):
            for number, name in re.findall(r"\bcheck\(\"(\d+\.\d+)\", (\w+)\)", cell.source):
                if (reference := course.find(number).reference) is not None:
                    assert reference.endswith(f":{name}")
                    assert len([line for line in cell.source.splitlines() if line.strip()]) >= 20

    @chapters
    def test_stubs_run_and_fail_every_checker(self, path: Path):
        """What the notebook stores is what it says when run: nbval compares the two."""
        said = checked(path)
        assert sorted(said) == sorted(headings(path))
        for number, text in said.items():
            assert f"Exercise {number}: not yet." in text and "raised" not in text, text
        assert all("exercise" in tags(c) for c in cells(path, "code") if re.search(r"\bcheck\(\"", c.source))

    @chapters
    def test_has_solutions(self, path: Path):
        solved = FOLDER / "solutions" / path.name
        assert solved.is_file() and headings(solved) == headings(path)
        assert f"](solutions/{path.name})" in "\n".join(cell.source for cell in cells(path, "markdown"))

    @solutions
    def test_solutions_pass_every_checker(self, path: Path):
        said = checked(path)
        assert sorted(said) == sorted(headings(path))
        for number, text in said.items():
            assert f"Exercise {number}: solved." in text and "not yet" not in text, text
        assert cells(path)[0].source.startswith(f"# {path.stem[:2]} · ")
        assert f"](../{path.name})" in cells(path)[0].source

    @chapters
    def test_hints_lead_on(self, path: Path):
        for number in headings(path):
            assert all(len(text) > 15 for text in course.find(number).hints)


SAME = [
    (path, cell, tag.removeprefix("same-as:"))
    for path in CHAPTERS
    for cell in cells(path, "code")
    for tag in tags(cell)
    if tag.startswith("same-as:")
]


def bare(definition: ast.AST) -> str:
    """A function or class as its syntax tree, without docstrings and annotations."""
    for node in ast.walk(definition):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            if ast.get_docstring(node, clean=False) is not None:
                node.body = node.body[1:] or [ast.Pass()]
            if isinstance(node, ast.FunctionDef):
                node.returns = None
        if isinstance(node, ast.arg):
            node.annotation = None
    return ast.unparse(definition)


@pytest.mark.parametrize(("path", "cell", "name"), SAME, ids=[f"{path.stem[:2]}-{name}" for path, _, name in SAME])
def test_definition_is_the_packages_own(path: Path, cell: nbformat.NotebookNode, name: str):
    """A cell tagged ``same-as:regolite.boxes.enlarge`` defines the very function of the package."""
    module, _, attribute = name.rpartition(".")
    theirs = ast.parse(textwrap.dedent(inspect.getsource(getattr(importlib.import_module(module), attribute)))).body[0]
    ours = [node for node in ast.parse(cell.source).body if getattr(node, "name", None) == attribute]
    assert len(ours) == 1, f"the cell defines no {attribute}"
    assert bare(ours[0]) == bare(theirs)


def test_there_are_solutions_and_nothing_else_among_them():
    assert {path.name for path in SOLUTIONS} == {path.name for path in CHAPTERS}


def study_minutes(path: Path) -> int:
    """How long a chapter says that it takes a reader."""
    return int(re.search(r"\*\*Study time\.\*\* About (\d+) minutes", cells(path)[0].source)[1])


def minutes(path: Path) -> int:
    """What a notebook says that it takes, in whole minutes."""
    number, unit = re.search(r"\*\*Time\.\*\* ([\d.]+) (seconds|minutes)", cells(path)[0].source).groups()
    return math.ceil(float(number) / (60 if unit == "seconds" else 1))


def test_readme_lists_every_notebook_with_its_minutes_and_thumbnail():
    readme = (FOLDER.parent / "README.md").read_text("utf-8")
    row = r"^\| !\[.{10,}?\]\((\S+)\) \| \[(\d\d · [^\]]+)\]\((\S+)\) \| .{20,} \| (\d+|-) \| (\d+) \|$"
    rows = re.findall(row, readme, flags=re.MULTILINE)
    titles = [cells(path)[0].source.split("\n")[0].removeprefix("# ") for path in ORDER]
    assert rows == [
        (
            f"notebooks/thumbnails/{path.stem[:2]}.jpg",
            title,
            f"notebooks/{path.name}",
            str(study_minutes(path)) if path in CHAPTERS else "-",
            str(minutes(path)),
        )
        for path, title in zip(ORDER, titles)
    ]
    assert all((FOLDER.parent / thumbnail).is_file() for thumbnail, *_ in rows)


@pytest.fixture(scope="module")
def book(tmp_path_factory) -> Path:
    """The book, made anew."""
    spec = importlib.util.spec_from_file_location("build", FOLDER.parent / "book" / "build.py")
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    build.BUILD = tmp_path_factory.mktemp("book")
    build.SOURCE = build.BUILD / "source"
    assert build.main() == 0, "Sphinx warned: what it said stands above"
    return build.BUILD / "html"


@pytest.mark.slow
class TestBookSite:
    @both
    def test_has_every_notebook_with_its_figures_and_their_texts(self, book: Path, path: Path):
        page = (book / "notebooks" / path.relative_to(FOLDER).with_suffix(".html")).read_text("utf-8")
        described = re.findall(r'<img alt="([^"]*)" [^>]*src="(?:\.\./)+_images/', page)
        assert len(described) == sum(len(images(cell)) for cell in cells(path, "code"))
        assert all(len(alt) > 20 for alt in described)

    def test_needs_no_network(self, book: Path):
        for page in book.rglob("*.html"):
            loaded = re.findall(
                r'<(?:script|img|link)\b[^>]*\b(?:src|href)="(https?:)?//[^"]*"', page.read_text("utf-8")
            )
            assert not loaded, page
        assert (book / "_static" / "tex-svg.js").is_file(), "MathJax"

    def test_can_be_searched_and_shows_the_package(self, book: Path):
        assert "glimps" in (book / "searchindex.js").read_text("utf-8")
        page = (book / "package" / "models" / "rego.html").read_text("utf-8")
        assert 'id="regolite.models.rego.Rego"' in page, "the reference of a class, by its docstring"
        assert 'notebooks/11_recurrent_decoder.html"' in page, "and the chapter that builds it"
        assert "cut_glimpses" in page, "and its source"
        assert "glossary.html" in (book / "index.html").read_text("utf-8")
        assert 'href="notebooks/solutions/index.html"' in (book / "index.html").read_text("utf-8")
