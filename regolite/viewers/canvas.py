"""An image in a notebook that can be clicked: boxes, points, lines and heat over it, by mouse and by keyboard.

:class:`ImageCanvas` is an anywidget: its look and its behavior in the browser stand in ``canvas.js`` and
``canvas.css`` next to this file, as they are, with no build step. It knows nothing of detectors: it shows what it is
given, in pixels of the image, and says what was picked. :mod:`regolite.viewers.explorer` gives it something to show.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anywidget
import numpy as np
import torch
import traitlets
from jaxtyping import Float
from PIL import Image
from torch import Tensor

SIDE = 1280
"""Longest side, in pixels, of the image that is sent to the browser; all places stay in those of the original."""


class ImageCanvas(anywidget.AnyWidget):
    """An image, and over it whatever can be said about places in it.

    Boxes are buttons: Tab goes from one to the next, Enter or the space bar picks one, and a click picks the smallest
    one around it. A box under the mouse, or with the keyboard's focus, shows its label. Where points can be asked
    (``asks``), arrow keys move the point, with Shift in large steps; a click sets it where ``pointing`` is on, or where
    there is no box.

    Attributes:
        image: JPEG of the image.
        width: of the original image, in pixels; all places are in these.
        height: of the original image.
        label: what the image shows, for those who cannot see it.
        boxes: each a dictionary: ``box`` (xyxy), ``label``, ``color``, and if wanted ``tag`` (a word that always
            shows), ``dashed``, ``fixed`` (no button, cannot be picked).
        points: each ``x``, ``y``, ``r`` (pixels of the image), ``opacity``, ``color``, ``shape`` (dot or cross).
        lines: each ``ends`` (x, y, x, y), ``width`` (in pixels of the screen), ``color``.
        heat: rows of shades, a byte a cell, or nothing.
        heat_shape: rows and columns of the heat.
        heat_size: width and height that it covers from the upper left corner, in pixels of the image.
        smooth: blend from cell to cell.
        legend: pairs of a color and what it stands for.
        caption: a line below the image.
        asks: whether points can be asked.
        pointing: whether a click sets the point, and not a box.
        settings: in words that a test can read, what is shown.
        picked: index of the box that was picked, or -1.
        clicked: x and y of the point, or nothing.
    """

    _esm = Path(__file__).with_name("canvas.js").read_text(encoding="utf-8")
    _css = Path(__file__).with_name("canvas.css").read_text(encoding="utf-8")

    image = traitlets.Bytes().tag(sync=True)
    width = traitlets.Int(4).tag(sync=True)
    height = traitlets.Int(3).tag(sync=True)
    label = traitlets.Unicode("no image yet").tag(sync=True)
    boxes = traitlets.List().tag(sync=True)
    points = traitlets.List().tag(sync=True)
    lines = traitlets.List().tag(sync=True)
    heat = traitlets.Bytes().tag(sync=True)
    heat_shape = traitlets.List([0, 0]).tag(sync=True)
    heat_size = traitlets.List([0.0, 0.0]).tag(sync=True)
    smooth = traitlets.Bool(False).tag(sync=True)
    legend = traitlets.List().tag(sync=True)
    caption = traitlets.Unicode("").tag(sync=True)
    asks = traitlets.Bool(False).tag(sync=True)
    pointing = traitlets.Bool(False).tag(sync=True)
    settings = traitlets.Unicode("").tag(sync=True)
    picked = traitlets.Int(-1).tag(sync=True)
    clicked = traitlets.List().tag(sync=True)

    def show_image(self, image: Image.Image, jpeg: bytes, label: str) -> None:
        """Show another image; what lay over the last one is taken away."""
        self.show(
            image=jpeg, width=image.width, height=image.height, label=label,
            boxes=[], points=[], lines=[], legend=[], caption="", picked=-1, clicked=[], settings="", **no_heat(),
        )  # fmt: skip

    def show(self, **state: Any) -> None:
        """Set several attributes at once: one message to the browser."""
        with self.hold_sync():
            for name, value in state.items():
                setattr(self, name, value)


def no_heat() -> dict[str, Any]:
    """The attributes of a canvas without heat."""
    return {"heat": b"", "heat_shape": [0, 0], "heat_size": [0.0, 0.0]}


def heat_of(heat: Float[Tensor, "h w"], size: Sequence[float]) -> dict[str, Any]:
    """The attributes of a canvas that show a map: its largest value gets the full color.

    Args:
        heat: not negative.
        size: width and height that the whole map covers, in pixels of the image.
    """
    shades = (heat / heat.max().clamp(min=1e-12) * 255).round().to(torch.uint8)
    return {"heat": shades.numpy().tobytes(), "heat_shape": list(heat.shape), "heat_size": [float(n) for n in size]}


def shades_of(canvas: ImageCanvas) -> np.ndarray:
    """The heat that a canvas shows, back as rows of bytes."""
    return np.frombuffer(canvas.heat, np.uint8).reshape(canvas.heat_shape)


def jpeg_of(image: Image.Image) -> bytes:
    """An image as JPEG, its longest side at most :data:`SIDE`."""
    small = image.convert("RGB")
    small.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "jpeg", quality=85)
    return buffer.getvalue()
