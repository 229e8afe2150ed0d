"""Make the book: the executed course, its solutions, the package's pages and the slides as a static site.

``make book`` calls this. Sources are gathered in ``build/book``: notebooks as they are stored, but for what Sphinx has
to be told (a figure's alternative text, where a module's page is); then Sphinx writes ``build/book/html``, and from
``book/slides.md`` the slides in its folder ``slides``. :func:`regolite.explain` makes the page of one photograph,
``explain/two_cats.html``; ``book/explainer`` makes the page in which the detectors run, ``explainer/index.html``.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import regolite

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "book"
SOURCE = BUILD / "source"

FIGURE = re.compile(r'^!\[(.*)\]\(figure:(\d\d):(\d+) "(.+)"\)$', flags=re.MULTILINE)
"""A figure of a chapter in the slides: ``![alternative text](figure:05:3 "words of its caption")`` is Figure 5.3."""

TERM = re.compile(r"^\| (?=.+ \| \[\d\d\]\()([^|]+) \|", flags=re.MULTILINE)
"""The first cell of a row of the glossary."""

BOLD = re.compile(r"(?<!\[)\*\*(?=\S)(.+?)(?<=\S)\*\*", flags=re.DOTALL)

SLIDE_FIGURE = """```{{image}} {file}
:alt: {alt}
```

<p class="source"><a href="../notebooks/{chapter}.html">Figure {number}</a></p>"""

EXPLAINED = "000000555705.jpg"
"""The photograph of the front page; the detector was not trained on it."""

CREDIT = "COCO image 555705, CC BY-SA 2.0, http://farm6.staticflickr.com/5266/5808419943_81314ba194_z.jpg"

LIVE = """**Without a kernel.** <a href="../explain/two_cats.html">The two cats of the front page</a>, live in your
browser: stages, sampling points, glimpses, relations, and the path of every box. In
<a href="../explainer/index.html">REGO Explainer</a> the detector itself runs in your browser, on your own photographs
and on <a href="../explainer/index.html#scenes">scenes that you change</a>."""
"""What the book says after a viewer, which needs a kernel."""

LIST = """# {title}

{text}

```{{toctree}}
:maxdepth: 2
:includehidden:
:titlesonly:

{pages}
```
"""

INSIDE = """```{{toctree}}
:hidden:

{pages}
```"""

PAGE = """# `{module}`

{inside}

{chapters}

```{{eval-rst}}
.. automodule:: {module}
   :members:
   :ignore-module-all:
   :member-order: bysource
```

## Source

~~~~{{code-block}} python
:linenos:

{code}
~~~~
"""


def gather() -> None:
    """Write all sources of the book to ``build/book/source``."""
    shutil.rmtree(BUILD, ignore_errors=True)  # the pages of a notebook that is gone are to go too
    SOURCE.mkdir(parents=True)
    shutil.copy(ROOT / "book" / "conf.py", SOURCE)
    shutil.copytree(ROOT / "book" / "_static", SOURCE / "_static")
    shutil.copytree(ROOT / "notebooks" / "thumbnails", SOURCE / "notebooks" / "thumbnails")
    write("course.md", course_table())
    linked: set[Path] = set()
    glossary = (ROOT / "book" / "docs" / "glossary.md").read_text("utf-8")
    chapters, solutions = [], []
    for path in sorted((ROOT / "notebooks").rglob("[0-9]*.ipynb")):
        if ".ipynb_checkpoints" in path.parts:
            continue
        name = path.relative_to(ROOT)
        notebook = prepared(json.loads(path.read_text("utf-8")), name)
        if path.parent.name != "solutions":
            link_terms(notebook, glossary)
        write(name, json.dumps(notebook))
        write("downloads" / name, path.read_text("utf-8"))
        linked |= links(notebook, name.parent)
        (solutions if path.parent.name == "solutions" else chapters).append("/" + name.with_suffix("").as_posix())
    guides = []
    for path in sorted((ROOT / "book" / "docs").glob("*.md")):
        name = path.relative_to(ROOT)
        text = path.read_text("utf-8")
        write(name, linked_pages(TERM.sub(anchored, text) if text == glossary else text))
        linked |= targets(text, name.parent)
        guides.append("/" + name.with_suffix("").as_posix())
    from book.reproduction import render

    report = render(SOURCE / "book")
    write("book/reproduction.md", linked_pages(report))
    linked |= targets(report, Path("book"))
    for name in linked:
        if (ROOT / name).is_file() and not (SOURCE / name).exists():
            (SOURCE / name).parent.mkdir(parents=True, exist_ok=True)
            for file in [ROOT / name, *((ROOT / name).parent.glob("*.png") if name.suffix == ".md" else ())]:
                shutil.copy(file, (SOURCE / name).parent)
    text = "Each exercise once more, why its answer is the answer, and what people get wrong."
    write("notebooks/solutions/index.md", LIST.format(title="Solutions", text=text, pages="\n".join(solutions)))
    modules = sorted(path.relative_to(ROOT) for path in (ROOT / "regolite").rglob("*.py") if path.name != "__main__.py")
    for module in modules:
        name = ".".join(module.with_suffix("").parts).removesuffix(".__init__")
        code = (ROOT / module).read_text("utf-8")
        below = [] if in_room(module) else [m for m in modules if in_room(m) and m.parent == module.parent]
        inside = INSIDE.format(pages=toctree(below)) if below else ""
        page = PAGE.format(module=name, inside=inside, chapters=chapters_of(module, name), code=code)
        write(page_of(module), page)
    text = "The reference of the package: what each module offers, the chapters that build it, and its source."
    pages = toctree([module for module in modules if not in_room(module)])
    write("package/index.md", LIST.format(title="API reference", text=text, pages=pages))
    index = (ROOT / "book" / "index.md").read_text("utf-8")
    image = SOURCE / "data" / "checkpoints" / "everyday_stages.png"
    image.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "data" / "checkpoints" / "everyday_stages.png", image)
    write("index.md", index.replace("CHAPTERS", "\n".join(chapters)).replace("GUIDES", "\n".join(guides)))


def gather_slides(folder: Path) -> None:
    """Write the sources of the slides, with their figures taken out of the stored notebooks, to a folder."""
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "book" / "slides_conf.py", folder / "conf.py")
    shutil.copy(ROOT / "book" / "slides.css", folder)

    def placed(match: re.Match) -> str:
        alt, chapter, number, words = match.groups()
        notebook, kind, data, described = figure(chapter, int(number), words)
        file = folder / f"{chapter}_{number}.{kind.removeprefix('image/')}"
        file.write_bytes(data)
        label = f"{int(chapter)}.{number}"
        return SLIDE_FIGURE.format(file=file.name, alt=alt or described, chapter=notebook.stem, number=label)

    def linked(match: re.Match) -> str:
        page = Path(os.path.normpath(f"book/{match[2]}")).with_suffix(".html").as_posix()
        return f'<a href="../{"index.html" if page == "book/index.html" else page}">{match[1]}</a>'

    text = (ROOT / "book" / "slides.md").read_text("utf-8")
    text = re.sub(r"\[([^\]]+)\]\(([\w./-]+\.(?:md|ipynb))\)", linked, text)
    (folder / "index.md").write_text(FIGURE.sub(placed, text), encoding="utf-8")


def figure(chapter: str, number: int, words: str) -> tuple[Path, str, bytes, str]:
    """A figure of a stored notebook, found by its caption.

    Args:
        chapter: the first two digits of the notebook's name, such as ``"05"``.
        number: of the figure in the chapter; 3 is Figure 5.3 in chapter 05.
        words: of the caption: figures that are renumbered are noticed.

    Returns:
        The notebook, the media type of the image, the image, and its alternative text.

    Raises:
        LookupError: no cell of the chapter shows an image above the caption of that number, or the caption is another.
    """
    caption = f"**Figure {int(chapter)}.{number}.**"
    place = f"figure:{chapter}:{number} of book/slides.md: chapter {chapter}"
    for path in sorted((ROOT / "notebooks").glob(f"{chapter}_*.ipynb")):
        cells = json.loads(path.read_text("utf-8"))["cells"]
        for cell, after in zip(cells, cells[1:]):
            said = " ".join("".join(after["source"]).split())
            if not said.startswith(caption):
                continue
            if words not in said:
                raise LookupError(f"{place} has no {words!r} in its caption of {caption.strip('*')}")
            for output in cell.get("outputs", []):
                for kind in {"image/png", "image/jpeg"} & output.get("data", {}).keys():
                    data = base64.b64decode("".join(output["data"][kind]))
                    return path, kind, data, output["metadata"].get(kind, {}).get("alt", "")
    raise LookupError(f"{place} shows no {caption.strip('*')}")


def course_table() -> str:
    """The table of the course, from the README."""
    readme = (ROOT / "README.md").read_text("utf-8")
    table = re.search(r"^## The course\n(.*?)^## ", readme, flags=re.MULTILINE | re.DOTALL)[1]
    return table.replace("](notebooks/solutions)", "](notebooks/solutions/index.md)")


def page_of(module: Path) -> str:
    """The page of a module: ``package/plots/detections.md`` for ``regolite/plots/detections.py``."""
    return "package/" + module.relative_to("regolite").with_suffix(".md").as_posix()


def in_room(module: Path) -> bool:
    """Whether the page of a module stands below that of its package: ``regolite/plots/detections.py``."""
    return module.name != "__init__.py" and len(module.parts) > 2


def toctree(modules: list[Path]) -> str:
    """The pages of modules, as a table of contents lists them."""
    return "\n".join("/" + page_of(module).removesuffix(".md") for module in modules)


def prepared(notebook: dict, name: Path) -> dict:
    """A notebook as Sphinx reads it: with links to run it, links to the book's pages, and texts of figures."""
    title, _, rest = "".join(notebook["cells"][0]["source"]).partition("\n")
    notebook["cells"][0]["source"] = f"{title}\n\n{launch_links(name)}\n{rest}"
    viewers = [number for number, cell in enumerate(notebook["cells"]) if shows_viewer(cell)]
    for number in reversed(viewers):
        live = {"cell_type": "markdown", "id": f"live-{number}", "metadata": {}, "source": LIVE}
        notebook["cells"].insert(number + 1, live)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = linked_pages("".join(cell["source"]))
            continue
        described = [
            output["metadata"][kind]["alt"]
            for output in cell["outputs"]
            for kind in output.get("data", {})
            if kind.startswith("image/") and "alt" in output["metadata"].get(kind, {})
        ]
        if described:
            cell["metadata"]["mystnb"] = {"image": {"alt": " ".join(described)}}
    return notebook


def shows_viewer(cell: dict) -> bool:
    """Whether a cell shows an Explorer, of which a stored notebook has a line of text."""
    said = ("".join(output.get("data", {}).get("text/plain", "")) for output in cell.get("outputs", []))
    return any(text.startswith("Explorer of ") for text in said)


def names(term: str) -> list[str]:
    """The names in a row of the glossary or in bold words: two in "region of interest (RoI)" and in "key, query"."""
    plain = re.sub(r'[`"]', "", " ".join(term.split())).lower()
    found = (re.fullmatch(r"(.+?)(?: \((.+)\))?", part) for part in plain.split(", "))
    return [name for match in found if match for name in match.groups() if name]


def anchor(term: str) -> str:
    """The id of a row of the glossary: ``term-region-of-interest-roi``."""
    return "term-" + re.sub(r"[^a-z0-9]+", "-", term.lower()).strip("-")


def anchored(row: re.Match) -> str:
    """The first cell of a row of the glossary, with an id to link to."""
    return f'| <span id="{anchor(row[1])}"></span>{row[1]} |'


def link_terms(notebook: dict, glossary: str) -> None:
    """Link each term of the glossary, where a chapter first has it in bold, to its entry."""
    rows = {name: term for term in TERM.findall(glossary) for name in names(term)}
    linked = set()

    def link(bold: re.Match) -> str:
        forms = (name.removesuffix(end) for name in names(bold[1]) for end in ("", "s", "es"))
        term = next((rows[form] for form in forms if form in rows), None)
        if term is None or term in linked:
            return bold[0]
        linked.add(term)
        return f'<a href="../book/docs/glossary.html#{anchor(term)}">{bold[0]}</a>'

    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = BOLD.sub(link, cell["source"])


def launch_links(name: Path) -> str:
    """Links to download a notebook and, where the repository's place on GitHub is known, to run it there.

    The environment variable REGOLITE_REPOSITORY names that place: ``owner/name``.
    """
    found = [f"{{download}}`Download this notebook </downloads/{name.as_posix()}>`"]
    if repository := os.environ.get("REGOLITE_REPOSITORY"):
        colab = f"https://colab.research.google.com/github/{repository}/blob/main/{name.as_posix()}"
        binder = f"https://mybinder.org/v2/gh/{repository}/main?labpath={name.as_posix()}"
        found += [f"[Open in Colab]({colab})", f"[Open in Binder]({binder})"]
    return " · ".join(found)


def linked_pages(text: str) -> str:
    """Markdown whose links to modules, to the README and to headings (named as in JupyterLab) are those of the book."""
    text = re.sub(r"(\]\((?:[\w./]+\.ipynb)?)(#[\w-]+)\)", lambda link: f"{link[1]}{link[2].lower()})", text)
    text = re.sub(r"\]\((\.\./(?:\.\./)?)regolite/([\w/]+)\.py\)", r"](\1package/\2.md)", text)
    text = re.sub(r"\]\((\.\./(?:\.\./)?)regolite/(\w+)\)", r"](\1package/\2/__init__.md)", text)
    return re.sub(r"\]\((\.\./(?:\.\./)?)README\.md(#[\w-]+)?\)", r"](\1index.md)", text)


def chapters_of(module: Path, name: str) -> str:
    """The chapters that link to a module, or define what it defines, as links."""
    found = []
    for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")):
        text = path.read_text("utf-8")
        if f"](../{module.as_posix()})" in text or f'"same-as:{name}.' in text:
            up = "../" * (len(Path(page_of(module)).parts) - 1)
            found.append(f"[{path.stem[:2]}]({up}notebooks/{path.name})")
    return f"Built in chapter {', '.join(found)}." if found else ""


def links(notebook: dict, folder: Path) -> set[Path]:
    """The files that a notebook in a folder links to, relative to the repository's root."""
    text = "\n".join(cell["source"] for cell in notebook["cells"] if cell["cell_type"] == "markdown")
    return targets(text, folder)


def targets(text: str, folder: Path) -> set[Path]:
    """The files that Markdown in a folder links to, relative to the repository's root."""
    found = (target for target in re.findall(r"\]\(([^)\s#]+)", text) if not re.match(r"[a-z]+:", target))
    return {(ROOT / folder / target).resolve().relative_to(ROOT) for target in found}


def write(name: str | Path, text: str) -> None:
    """Write a source of the book."""
    path = SOURCE / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def main() -> int:
    """Gather the sources and run Sphinx on them, its warnings being errors."""
    sys.path.insert(0, str(ROOT))  # this file is run as a script, and imports its neighbors
    gather()
    gather_slides(BUILD / "slides")
    book = sphinx("html", SOURCE, BUILD / "html")
    photograph = ROOT / "data" / "coco_tiny" / "images" / EXPLAINED
    page = regolite.explain(regolite.load(), photograph, name="Two cats", credit=CREDIT, book="../notebooks/")
    page.save(BUILD / "html" / "explain" / "two_cats.html")
    explainer(BUILD / "html" / "explainer")
    return book or sphinx("revealjs", BUILD / "slides", BUILD / "html" / "slides")


def explainer(folder: Path) -> None:
    """Make REGO Explainer, which links to the chapters of the book around it."""
    from book.explainer.build import build

    build(folder, book="../notebooks/")


def sphinx(builder: str, source: Path, output: Path) -> int:
    """Run Sphinx and give its exit status."""
    doctrees = BUILD / "doctrees" / builder
    words = ["-m", "sphinx", "-b", builder, "-q", "-W", "--keep-going", "-d", doctrees, source, output]
    return subprocess.call([sys.executable, *map(str, words)])


if __name__ == "__main__":
    sys.exit(main())
