"""The course as a book: its order, its figures, its exercises, and that its text is the package's where it says so."""

from __future__ import annotations

import ast
import base64
import importlib
import importlib.util
import inspect
import math
import os
import re
import shutil
import textwrap
from pathlib import Path
from types import ModuleType

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
    row = r"^\| !\[.{10,}?\]\((\S+)\) \| \[(\d\d · [^\]]+)\]\((\S+)\) \| .{20,} \| (\d+) \| (\d+) \|$"
    rows = re.findall(row, readme, flags=re.MULTILINE)
    titles = [cells(path)[0].source.split("\n")[0].removeprefix("# ") for path in ORDER]
    assert rows == [
        (
            f"notebooks/thumbnails/{path.stem[:2]}.jpg",
            title,
            f"notebooks/{path.name}",
            str(study_minutes(path)),
            str(minutes(path)),
        )
        for path, title in zip(ORDER, titles)
    ]
    assert all((FOLDER.parent / thumbnail).is_file() for thumbnail, *_ in rows)


@pytest.fixture(scope="module")
def build(tmp_path_factory) -> ModuleType:
    """``book/build.py``, writing to a temporary folder."""
    spec = importlib.util.spec_from_file_location("build", FOLDER.parent / "book" / "build.py")
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    build.BUILD = tmp_path_factory.mktemp("book")
    build.SOURCE = build.BUILD / "source"
    return build


@pytest.fixture(scope="module")
def book(build: ModuleType) -> Path:
    """The whole book, built from the stored notebooks."""
    assert build.main() == 0, "Sphinx warned: what it said stands above"
    return build.BUILD / "html"


def test_glossary_is_in_alphabetical_order_and_links_chapters():
    text = (FOLDER.parent / "book" / "docs" / "glossary.md").read_text("utf-8")
    rows = re.findall(r"^\| (.+?) \| (.{10,}) \| (\[\d\d\]\(.+\)) \|$", text, flags=re.MULTILINE)
    assert len(rows) == text.count("\n| ") - 2 >= 80, "each row: term, meaning, chapters"
    terms = [re.sub(r"[^a-z0-9, ]", "", term.lower()) for term, *_ in rows]
    assert terms == sorted(terms)
    assert len(terms) == len(set(terms))


def test_bold_terms_are_linked_once_to_the_glossary(build: ModuleType):
    glossary = (
        "| term | meaning | chapter |\n| region of interest (RoI) | a box | [10](a) |\n| key, query | x | [01](a) |\n"
    )
    text = "A **key**, **keys** and the **query**;\n**RoIs**, **region of\ninterest**, **other**, [**query**](b), roi"
    notebook = {"cells": [{"cell_type": "markdown", "source": text}, {"cell_type": "code", "source": "**key**"}]}
    build.link_terms(notebook, glossary)
    key, region = (
        f'<a href="../book/docs/glossary.html#term-{name}">' for name in ("key-query", "region-of-interest-roi")
    )
    linked = text.replace("**key**", f"{key}**key**</a>").replace("**RoIs**", f"{region}**RoIs**</a>")
    assert [cell["source"] for cell in notebook["cells"]] == [linked, "**key**"]
    assert build.TERM.sub(build.anchored, glossary).count('<span id="term-') == 2


class TestSlides:
    def test_a_figure_is_the_stored_one(self, build: ModuleType):
        path, kind, data, alt = build.figure("05", 4, "cost matrix")
        [(cell, caption)] = [
            (cell, after)
            for cell, after in zip(cells(path), cells(path)[1:])
            if after.source.startswith("**Figure 5.4.**")
        ]
        [(stored, output)] = images(cell)
        assert kind == stored
        assert data == base64.b64decode(output.data[stored])
        assert alt == output.metadata[stored]["alt"]

    @pytest.mark.parametrize(("chapter", "number"), [("05", 99), ("99", 1)])
    def test_a_missing_figure_is_named(self, build: ModuleType, chapter: str, number: int):
        with pytest.raises(LookupError, match=f"figure:{chapter}:{number} .*Figure {int(chapter)}.{number}"):
            build.figure(chapter, number, "")

    def test_another_figure_of_that_number_is_named(self, build: ModuleType):
        with pytest.raises(LookupError, match="figure:05:4 .*no 'giraffes' in its caption of Figure 5.4"):
            build.figure("05", 4, "giraffes")

    def test_an_alternative_text_of_the_slide_comes_first(self, build: ModuleType, tmp_path: Path):
        text = "# Title\n\n![Seen on the slide](FIGURE)\n\n![](FIGURE)\n\n[x](../notebooks/05_a.ipynb)\n"
        text = text.replace("FIGURE", 'figure:05:4 "three parts"')
        (tmp_path / "book").mkdir()
        for name in ("slides_conf.py", "slides.css"):
            shutil.copy(FOLDER.parent / "book" / name, tmp_path / "book")
        (tmp_path / "book" / "slides.md").write_text(text, "utf-8")
        (tmp_path / "notebooks").mkdir()
        shutil.copy(FOLDER / "05_hungarian_matching.ipynb", tmp_path / "notebooks")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(build, "ROOT", tmp_path)
            build.gather_slides(tmp_path / "slides")
        written = (tmp_path / "slides" / "index.md").read_text("utf-8")
        assert re.findall(r":alt: (\S+)", written) == ["Seen", "Four"]
        assert written.count('<a href="../notebooks/05_hungarian_matching.html">Figure 5.4</a>') == 2
        assert '<a href="../notebooks/05_a.html">x</a>' in written


OUTSIDE = """() => {
  const slide = Reveal.getCurrentSlide(), found = [];
  for (const element of slide.querySelectorAll(":scope > :not(aside)")) {
    const box = element.getBoundingClientRect();
    if (box.left < 0 || box.top < 0 || box.right > 1280 || box.bottom > 720) found.push(element.outerHTML);
    if (element.tagName === "IMG" && (!element.naturalWidth || box.height < 200)) found.push(element.outerHTML);
  }
  return found;
}"""
"""What of a slide lies outside of it, or is an image that is broken or too small to be seen."""


@pytest.mark.slow
class TestBookSite:
    @both
    def test_has_every_notebook_with_its_figures_and_their_texts(self, book: Path, path: Path):
        page = (book / "notebooks" / path.relative_to(FOLDER).with_suffix(".html")).read_text("utf-8")
        described = re.findall(r'<img alt="([^"]*)" [^>]*src="(?:\.\./)+_images/', page)
        assert len(described) == sum(len(images(cell)) for cell in cells(path, "code"))
        assert all(len(alt) > 20 for alt in described)

    def test_terms_link_to_the_glossary(self, book: Path):
        glossary = (book / "book" / "docs" / "glossary.html").read_text("utf-8")
        entries = re.findall(r'<span id="(term-[^"]+)"', glossary)
        assert len(entries) == len(set(entries)) >= 80
        linked = []
        for path in CHAPTERS:
            page = (book / "notebooks" / path.with_suffix(".html").name).read_text("utf-8")
            found = re.findall(r'<a href="\.\./book/docs/glossary\.html#([^"]+)"><strong>', page)
            assert len(found) == len(set(found)), path
            linked += found
        assert len(linked) > 100 and set(linked) <= set(entries)

    def test_has_the_reproduction_study_with_its_figures(self, book: Path):
        page = (book / "book" / "reproduction.html").read_text("utf-8")
        shown = re.findall(r'<img alt="([^"]{20,})"[^>]* src="([^"]+)"', page)
        assert len(shown) == 2 and all((book / "book" / file).resolve().is_file() for _, file in shown)
        assert "book/reproduction.html" in (book / "index.html").read_text("utf-8")

    def test_needs_no_network(self, book: Path):
        for page in book.rglob("*.html"):
            loaded = re.findall(
                r'<(?:script|img|link)\b[^>]*\b(?:src|href)="(https?:)?//[^"]*"', page.read_text("utf-8")
            )
            assert not loaded, page
        assert (book / "_static" / "tex-svg.js").is_file(), "MathJax"
        assert (book / "slides" / "_static" / "tex-svg.js").is_file(), "MathJax of the slides"

    @both
    def test_notebooks_can_be_downloaded(self, book: Path, path: Path):
        page = book / "notebooks" / path.relative_to(FOLDER).with_suffix(".html")
        [target] = re.findall(r'<a class="reference download[^>]* href="([^"]+)"', page.read_text("utf-8"))
        assert (page.parent / target).read_bytes() == path.read_bytes()

    def test_has_slides_with_figures_notes_and_links_that_resolve(self, book: Path):
        deck = (book / "slides" / "index.html").read_text("utf-8")
        slides = re.findall(r"<h[12]>.*?</h[12]>.*?</section>", deck, flags=re.DOTALL)
        assert len(slides) >= 18
        assert all('<aside class="notes">' in slide for slide in slides)
        shown = re.findall(r'<img alt="([^"]*)"[^>]* src="([^"]+)"', deck)
        assert len(shown) == (FOLDER.parent / "book" / "slides.md").read_text("utf-8").count("](figure:") >= 15
        assert all(len(alt) > 20 and (book / "slides" / file).is_file() for alt, file in shown)
        linked = [target for target in re.findall(r'<a [^>]*href="([^"]+)"', deck) if not target.startswith("#")]
        assert linked
        assert not [target for target in linked if not (book / "slides" / target).is_file()]
        assert 'href="slides/index.html"' in (book / "index.html").read_text("utf-8")

    def test_every_slide_fits_and_loads_its_own_files_only(self, book: Path):
        names = ("chromium", "chromium-browser", "google-chrome")
        chromium = next(filter(None, map(shutil.which, names)), None)
        if chromium is None:  # in continuous integration a browser test that is not run is a failure
            (pytest.fail if os.environ.get("CI") else pytest.skip)("no Chromium here")
        playwright = pytest.importorskip("playwright.sync_api")
        with playwright.sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
            page = browser.new_page(viewport={"width": 1280, "height": 720})
            asked, failed = [], []
            page.on("request", lambda request: asked.append(request.url))
            page.on("requestfailed", lambda request: failed.append(request.url))
            page.on("pageerror", lambda error: failed.append(str(error)))
            page.goto((book / "slides" / "index.html").as_uri())
            page.wait_for_function("Reveal.isReady() && document.querySelector('mjx-container')", timeout=60_000)
            for number in range(page.evaluate("Reveal.getTotalSlides()")):
                page.evaluate(f"Reveal.slide({number})")
                outside = page.evaluate(OUTSIDE)
                assert not outside, f"slide {number + 1}"
            browser.close()
        assert not failed
        assert not [url for url in asked if not url.startswith(("file:", "data:", "blob:"))]

    def test_has_a_live_page_of_the_front_pages_photograph(self, book: Path):
        page = book / "explain" / "two_cats.html"
        text = page.read_text("utf-8")
        assert len(text) < 1_000_000 and '"book": "../notebooks/"' in text
        chapters = re.findall(r'data-chapter="(\w+)"', text)
        assert chapters and all((book / "notebooks" / f"{name}.html").is_file() for name in chapters)
        for name in ("index.html", "notebooks/13_look_inside.html", "book/docs/looking-inside.html"):
            [link] = re.findall(r'href="([./]*explain/two_cats\.html)"', (book / name).read_text("utf-8"))
            assert ((book / name).parent / link).resolve() == page.resolve()

    def test_can_be_searched_and_shows_the_package(self, book: Path):
        assert "glimps" in (book / "searchindex.js").read_text("utf-8")
        page = (book / "package" / "models" / "rego.html").read_text("utf-8")
        assert 'id="regolite.models.rego.Rego"' in page, "the reference of a class, by its docstring"
        assert 'notebooks/11_recurrent_decoder.html"' in page, "and the chapter that builds it"
        assert "cut_glimpses" in page, "and its source"
        assert 'href="glimpse.html"' in page and 'href="../losses.html"' in page and "plots/drawing.html" not in page, (
            "the sidebar has the modules of this room and those of none, not those of other rooms"
        )
        listed = (book / "package" / "index.html").read_text("utf-8").partition("<article")[2]
        for module in FOLDER.parent.glob("regolite/**/*.py"):
            place = module.relative_to(FOLDER.parent / "regolite").with_suffix(".html").as_posix()
            assert f'href="{place}"' in listed or module.name == "__main__.py", place
        assert "glossary.html" in (book / "index.html").read_text("utf-8")
        assert 'href="notebooks/solutions/index.html"' in (book / "index.html").read_text("utf-8")
