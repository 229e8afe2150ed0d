"""Make the book: the executed course, its solutions and the package's pages as a static site.

``make book`` calls this. Sources are gathered in ``build/book``: notebooks as they are stored, but for what Sphinx has
to be told (a figure's alternative text, where a module's page is); then Sphinx writes ``build/book/html``.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "book"
SOURCE = BUILD / "source"

LIST = """# {title}

{text}

```{{toctree}}
:maxdepth: 1

{pages}
```
"""

PAGE = """# `{name}`

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
    chapters, solutions = [], []
    for path in sorted((ROOT / "notebooks").rglob("[0-9]*.ipynb")):
        if ".ipynb_checkpoints" in path.parts:
            continue
        name = path.relative_to(ROOT)
        notebook = prepared(json.loads(path.read_text("utf-8")))
        write(name, json.dumps(notebook))
        linked |= links(notebook, name.parent)
        (solutions if path.parent.name == "solutions" else chapters).append("/" + name.with_suffix("").as_posix())
    for name in linked:
        if (ROOT / name).is_file() and not (SOURCE / name).exists():
            (SOURCE / name).parent.mkdir(parents=True, exist_ok=True)
            for file in [ROOT / name, *((ROOT / name).parent.glob("*.png") if name.suffix == ".md" else ())]:
                shutil.copy(file, (SOURCE / name).parent)
    text = "Each exercise once more, why its answer is the answer, and what people get wrong."
    write("notebooks/solutions/index.md", LIST.format(title="Solutions", text=text, pages="\n".join(solutions)))
    modules = sorted(path.relative_to(ROOT) for path in (ROOT / "regolite").rglob("*.py") if path.name != "__main__.py")
    for module in modules:
        write(page_of(module), PAGE.format(name=module.as_posix(), code=(ROOT / module).read_text("utf-8")))
    text = "The chapters build these modules; each one is a page to be read from top to end."
    pages = "\n".join("/" + page_of(module).removesuffix(".md") for module in modules)
    write("package/index.md", LIST.format(title="The package", text=text, pages=pages))
    index = (ROOT / "book" / "index.md").read_text("utf-8")
    write("index.md", index.replace("CHAPTERS", "\n".join(chapters)))


def course_table() -> str:
    """The table of the course, from the README."""
    readme = (ROOT / "README.md").read_text("utf-8")
    table = re.search(r"^## The course\n(.*?)^## ", readme, flags=re.MULTILINE | re.DOTALL)[1]
    return table.replace("](notebooks/solutions)", "](notebooks/solutions/index.md)")


def page_of(module: Path) -> str:
    """The page of a module: ``package/plots/detections.md`` for ``regolite/plots/detections.py``."""
    return "package/" + module.relative_to("regolite").with_suffix(".md").as_posix()


def prepared(notebook: dict) -> dict:
    """A notebook as Sphinx shall read it."""
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            text = "".join(cell["source"])
            text = re.sub(r"\]\((\.\./(?:\.\./)?)regolite/([\w/]+)\.py\)", r"](\1package/\2.md)", text)
            text = re.sub(r"\]\((\.\./(?:\.\./)?)README\.md(#[\w-]+)?\)", r"](\1index.md)", text)
            cell["source"] = text
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


def links(notebook: dict, folder: Path) -> set[Path]:
    """The files that a notebook in a folder links to, relative to the repository's root."""
    text = "\n".join(cell["source"] for cell in notebook["cells"] if cell["cell_type"] == "markdown")
    found = (target for target in re.findall(r"\]\(([^)\s#]+)", text) if not re.match(r"[a-z]+:", target))
    return {(ROOT / folder / target).resolve().relative_to(ROOT) for target in found}


def write(name: str | Path, text: str) -> None:
    """Write a source of the book."""
    path = SOURCE / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def main() -> int:
    """Gather the sources and run Sphinx on them, its warnings being errors."""
    gather()
    words = ["-m", "sphinx", "-b", "html", "-q", "-W", "--keep-going", "-d", BUILD / "doctrees", SOURCE, BUILD / "html"]
    return subprocess.call([sys.executable, *map(str, words)])


if __name__ == "__main__":
    sys.exit(main())
