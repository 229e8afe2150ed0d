"""A page of what a detector does to an image: one HTML file that opens from disk, without a server or a network.

::

    page = regolite.explain(regolite.load(), "photo.jpg")
    page.save("photo.html")

The page shows the photograph with the boxes of the base detector and of every stage, and for each object the sampling
points of its query, its glimpses, its related objects, and the path of its box; below, the equations with its numbers.
It takes one recorded forward pass (:func:`regolite.record`), whose numbers are quantized and stored in the page
(:mod:`regolite.explaining.packing`). Its scripts are plain modules beside this file, written into the page as they are:

===============  =======================================================================================================
``pack.js``      stored bytes to numbers
``look.js``      what the numbers say of a choice: pure functions
``state.js``     the choice, and how actions change it
``draw.js``      data and state on a canvas
``elements.js``  elements, kept by what they stand for
``view.js``      the page's elements
``motion.js``    boxes that move from stage to stage, and along their path
``main.js``      puts them together
===============  =======================================================================================================

Only ``pack.js`` and ``main.js`` know that the numbers come with the page. All but ``main.js``, and the parts of
``page.html``, also serve REGO Explainer (``book/explainer``), where a model in the browser gives the numbers.
"""

from __future__ import annotations

import base64
import html
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import nn

from regolite.data import read_image
from regolite.data.images import ImageSource, jpeg_of
from regolite.errors import UserError, not_writable
from regolite.explaining.packing import pack
from regolite.inference import check_stages, detect
from regolite.models.config import config_of
from regolite.models.detector import as_detector
from regolite.tracing.recorder import record
from regolite.tracing.trace import Trace
from regolite.utils.files import write_atomic
from regolite.utils.validation import share

__all__ = ["Page", "explain", "page_of"]

FOLDER = Path(__file__).parent
MODULES = ("pack.js", "look.js", "state.js", "draw.js", "elements.js", "view.js", "motion.js", "main.js")
"""The scripts, each after those that it imports from."""

PARTS = ("figure", "panel", "equations")
"""The HTML files that pages are composed of."""


@dataclass(frozen=True)
class Page:
    """A self-contained HTML page.

    Attributes:
        html: the page.
    """

    html: str

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the page, over an existing file.

        Returns:
            The path of the file.

        Raises:
            UserError: the file cannot be written.
        """
        if Path(path).is_dir():
            raise UserError(f"{path} is a folder; give a file")
        try:
            write_atomic(Path(path), self.html.encode())
        except OSError as error:
            raise not_writable(error, path) from error
        return Path(path)


def explain(
    model: nn.Module,
    image: ImageSource,
    threshold: float | int = 0.3,
    stages: int | None = None,
    *,
    name: str | None = None,
    credit: str = "",
    book: str = "",
) -> Page:
    """A page of what a detector does to an image.

    Args:
        model: a detector with queries from :func:`regolite.load` or :func:`regolite.build`, with or without REGO.
        image: any source of :func:`regolite.data.read_image`.
        threshold: least score of an object at first; the page has a control for it.
        stages: number of REGO stages, 0 for the base detector only; all by default.
        name: the title; by default the name of the file.
        credit: a line about the image, such as author and license.
        book: address of the folder with the book's chapters, to link them; by default they are only named.

    Returns:
        The page; :meth:`Page.save` writes it.

    Raises:
        UserError: the file is missing or is not an image, a number is out of range, or the model has no queries.
    """
    threshold = share("threshold", threshold)
    check_stages(model, stages)
    pixels = read_image(image)
    names = ["references", "decoder.*", *(["stage.*"] if as_detector(model).num_stages else [])]
    with record(model, names) as trace:
        detect(model, pixels, threshold, stages)
    if name is None:
        name = Path(image).name if isinstance(image, (str, os.PathLike)) else "image"
    config = config_of(model)
    return page_of(pixels, trace, name, threshold, model=config.preset, credit=credit, book=book)


def page_of(
    image: Image.Image,
    trace: Trace,
    name: str = "image",
    threshold: float | int = 0.3,
    *,
    model: str = "",
    credit: str = "",
    book: str = "",
) -> Page:
    """The page of a trace.

    Args:
        image: the image, as the detector was given it.
        trace: its trace; what was not recorded, the page does not show.
        name: the title.
        threshold: least score of an object at first.
        model: the name of the model.
        credit: a line about the image.
        book: address of the folder with the book's chapters, to link them.

    Raises:
        UserError: the trace has no predictions, or is of an image of another size.
    """
    header, numbers = pack(trace)
    if image.size != (header["width"], header["height"]):
        raise UserError(
            f"the image has {image.width} x {image.height} pixels, but the trace is of {header['width']} x "
            f"{header['height']}: give the image that the detector was given, before resizing"
        )
    header |= {"name": name, "model": model, "credit": credit, "book": book, "threshold": threshold,
               "classes": trace.classes}  # fmt: skip
    parts = {
        "title": html.escape(" ".join(name.split())).encode("utf-8", "replace").decode(),
        "css": (FOLDER / "page.css").read_text("utf-8"),
        "js": script_of([FOLDER / module for module in MODULES]),
        "photo": base64.b64encode(jpeg_of(image)).decode(),
        "header": in_script(json.dumps(header)),
        "numbers": base64.b64encode(numbers).decode(),
    }
    return Page(composed(FOLDER / "page.html", parts))


def composed(template: Path, parts: dict[str, str]) -> str:
    """A template whose places, such as ``{{css}}``, are filled with texts; those of ``PARTS`` with these files."""
    parts = {name: (FOLDER / f"{name}.html").read_text("utf-8") for name in PARTS} | parts
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], template.read_text("utf-8"))


def in_script(text: str) -> str:
    """JSON as the content of a script element: nothing in it ends the element."""
    return text.replace("<", "\\u003c")


def script_of(modules: Sequence[Path]) -> str:
    """One script of modules, which also works in a page that is opened from disk, where modules cannot be imported.

    Each module but the last becomes a function of its own that returns what it exports, so that two modules may use
    the same name.

    Args:
        modules: files with different names, each after those that it imports from. They import and export names only
            (``import { a, b as c } from "./x.js";``, ``export const a``, ``export function a``).
    """
    *libraries, entry = modules
    return "\n".join([*map(_enclosed, libraries), _linked(entry.read_text("utf-8"))])


def _enclosed(module: Path) -> str:
    text = _linked(module.read_text("utf-8"))
    kinds = r"^export (?=(?:async )?(?:function\*?|const|let|class) (\w+))"
    names = re.findall(kinds, text, flags=re.MULTILINE)
    body = re.sub(kinds, "", text, flags=re.MULTILINE)
    return f"const {_variable(module.name)} = (() => {{\n{body}\nreturn {{ {', '.join(names)} }};\n}})();\n"


def _linked(text: str) -> str:
    """The text of a module whose imports read the variables of the modules before it."""

    def linked(found: re.Match[str]) -> str:
        return f"const {{{found[1].replace(' as ', ': ')}}} = {_variable(found[2])};"

    return re.sub(r'^import \{([^}]*)\} from "\./([\w.]+)";', linked, text, flags=re.MULTILINE)


def _variable(file: str) -> str:
    return "$" + file.removesuffix(".js")
