"""An interactive image in a notebook, with boxes, points, lines and a heat map, for mouse and keyboard.

:class:`ImageCanvas` is an anywidget; its front end is ``canvas.js`` and ``canvas.css``, without a build step. It is
independent of detectors, which :mod:`regolite.viewers.explorer` adds.
"""

from __future__ import annotations

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


class ImageCanvas(anywidget.AnyWidget):
    """An image with overlays.

    Boxes are buttons: Tab moves between them, Enter or the space bar picks one, and a click picks the smallest one
    around it. A box under the mouse or with the keyboard focus shows its label. If points can be selected (``asks``),
    arrow keys move the point, with Shift in large steps; a click sets it if ``pointing`` is on or there is no box.

    Attributes:
        image: JPEG of the image.
        width: width of the original image in pixels, the unit of all coordinates.
        height: height of the original image in pixels.
        label: alternative text of the image.
        boxes: dictionaries with ``box`` (xyxy), ``label``, ``color``, and optionally ``tag`` (a permanent label),
            ``dashed``, ``fixed`` (not a button, cannot be picked).
        points: dictionaries with ``x``, ``y``, ``r`` (pixels of the image), ``opacity``, ``color``, ``shape`` (dot or
            cross).
        lines: dictionaries with ``ends`` (x, y, x, y), ``width`` (in pixels of the screen), ``color``.
        heat: heat map, row by row, one byte per cell; may be empty.
        heat_shape: rows and columns of the heat map.
        heat_size: width and height of the heat map in pixels of the image, from the upper left corner.
        smooth: interpolate between cells.
        legend: pairs of a color and its meaning.
        caption: a line below the image.
        asks: whether points can be selected.
        pointing: whether a click sets the point instead of picking a box.
        settings: the settings shown, as JSON.
        picked: index of the picked box, or -1.
        clicked: x and y of the point; may be empty.
    """

    _esm = Path(__file__).with_name("canvas.js").read_text(encoding="utf-8")
    _css = Path(__file__).with_name("canvas.css").read_text(encoding="utf-8")

    image = traitlets.Bytes().tag(sync=True)
    width = traitlets.Int(4).tag(sync=True)
    height = traitlets.Int(3).tag(sync=True)
    label = traitlets.Unicode("no image yet").tag(sync=True)
    boxes: traitlets.List[dict[str, Any]] = traitlets.List().tag(sync=True)
    points: traitlets.List[dict[str, Any]] = traitlets.List().tag(sync=True)
    lines: traitlets.List[dict[str, Any]] = traitlets.List().tag(sync=True)
    heat = traitlets.Bytes().tag(sync=True)
    heat_shape = traitlets.List([0, 0]).tag(sync=True)
    heat_size = traitlets.List([0.0, 0.0]).tag(sync=True)
    smooth = traitlets.Bool(False).tag(sync=True)
    legend: traitlets.List[list[str]] = traitlets.List().tag(sync=True)
    caption = traitlets.Unicode("").tag(sync=True)
    asks = traitlets.Bool(False).tag(sync=True)
    pointing = traitlets.Bool(False).tag(sync=True)
    settings = traitlets.Unicode("").tag(sync=True)
    picked = traitlets.Int(-1).tag(sync=True)
    clicked: traitlets.List[float] = traitlets.List().tag(sync=True)

    def show_image(self, image: Image.Image, jpeg: bytes, label: str) -> None:
        """Show another image, without overlays."""
        self.show(
            image=jpeg, width=image.width, height=image.height, label=label,
            boxes=[], points=[], lines=[], legend=[], caption="", picked=-1, clicked=[], settings="", **no_heat(),
        )  # fmt: skip

    def show(self, **state: Any) -> None:
        """Set several attributes in one message to the browser."""
        with self.hold_sync():
            for name, value in state.items():
                setattr(self, name, value)


def no_heat() -> dict[str, Any]:
    """Canvas attributes without a heat map."""
    return {"heat": b"", "heat_shape": [0, 0], "heat_size": [0.0, 0.0]}


def heat_of(heat: Float[Tensor, "h w"], size: Sequence[float]) -> dict[str, Any]:
    """Canvas attributes of a heat map, scaled to its maximum.

    Args:
        heat: non-negative values.
        size: width and height of the map in pixels of the image.
    """
    shades = (heat / heat.max().clamp(min=1e-12) * 255).round().to(torch.uint8)
    return {"heat": shades.numpy().tobytes(), "heat_shape": list(heat.shape), "heat_size": [float(n) for n in size]}


def shades_of(canvas: ImageCanvas) -> np.ndarray:
    """The heat map of a canvas as an array of bytes."""
    return np.frombuffer(canvas.heat, np.uint8).reshape(canvas.heat_shape)
