"""A page of what a detector does to an image: one HTML file that opens from disk, without a server or a network.

::

    page = regolite.explain(regolite.load(), "photo.jpg")
    page.save("photo.html")

The page shows the photograph with the boxes of the base detector and of every stage, and for each object the sampling
points of its query, its glimpses, its related objects, and the path of its box; below, the equations with its numbers.
It takes one recorded forward pass (:func:`regolite.record`), whose numbers are quantized and stored in the page
(:mod:`regolite.explaining.packing`). Its scripts are plain modules beside this file, written into the page as they are:

==============  ========================================================================================================
``pack.js``     stored bytes to numbers
``look.js``     what the numbers say of a choice: pure functions
``state.js``    the choice, and how actions change it
``draw.js``     data and state on a canvas
``view.js``     the page's elements
``main.js``     puts them together
==============  ========================================================================================================

Only ``pack.js`` and ``main.js`` know that the numbers come with the page.
"""

from __future__ import annotations

import base64
import html
import json
import os
import re
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
MODULES = ("pack.js", "look.js", "state.js", "draw.js", "view.js", "main.js")
"""The scripts, each after those that it imports from."""


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
        "js": "\n".join(_inlined(FOLDER / module) for module in MODULES),
        "photo": base64.b64encode(jpeg_of(image)).decode(),
        "header": json.dumps(header).replace("<", "\\u003c"),  # no text of a header ends its element
        "numbers": base64.b64encode(numbers).decode(),
    }
    template = (FOLDER / "page.html").read_text("utf-8")
    return Page(re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], template))


def _inlined(module: Path) -> str:
    """A module without its imports and exports, since all modules become one script."""
    text = re.sub(r"^import [^;]*;.*\n", "", module.read_text("utf-8"), flags=re.MULTILINE)
    return re.sub(r"^export ", "", text, flags=re.MULTILINE)
