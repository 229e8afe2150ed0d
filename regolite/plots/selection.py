"""What all figures of a trace ask first: is it this image's, which query, which layer; and what its objects are.

Whatever a caller may choose is a keyword of the same name in every figure: ``query``, ``point``, ``layer``, ``head``,
``stage``, ``level``, ``threshold``, and ``index``, the image of the batch. Wrong choices get a clear error here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from regolite.data.images import ImageSource, read_image
from regolite.errors import UserError
from regolite.plots.drawing import GRAY, INK, draw_box, draw_labels, draw_title, panels, stage_color
from regolite.plots.text import as_is
from regolite.tracing.trace import Boxes, OnCells, Record, Trace

WIDTH, HEIGHT = 9.9, 4.6  # of a row of panels, in inches: a notebook's column; and of one panel at most
WIDE, NARROW = 4.2, 3.0  # panels that have room for a note in their title, and those that have little room at all

Point = tuple[float | int, float | int]
"""x and y in pixels of the image."""

Several = int | Sequence[int] | None
"""A number, several, or None for what a figure takes by itself."""


@dataclass(frozen=True)
class Look:
    """Somebody who looks at the image in one layer: a query, or a cell of the encoder.

    Attributes:
        record: the attention of the layer.
        number: which of those that look.
        who: what to call it.
        layer: number of the layer.
        boxes: what the queries of this layer predict; None for cells, or where it was not recorded.
        point: where the cell was asked for; None for queries.
    """

    record: Record
    number: int
    who: str
    layer: int
    boxes: Boxes | None
    point: Point | None


def looks(trace: Trace, query: Several, point: Point | None, layer: Several, index: int) -> list[list[Look]]:
    """Who looks, one row for each who, one column for each layer.

    Args:
        trace: what was recorded.
        query: queries of the decoder; by default the highest_scoring.
        point: instead, the cell of the finest map of the encoder in which this point of the image lies.
        layer: layers; the last by default.
        index: image of the batch.
    """
    if point is not None:
        if query is not None:
            raise UserError("give a query, which looks in the decoder, or a point, whose cell looks in the encoder")
        names = _layers(trace, "encoder.{}", layer)
        rows = [(f"Cell at ({point[0]:.0f}, {point[1]:.0f})", None)]
    else:
        names = _layers(trace, "decoder.{}.cross", layer)
        queries = [highest_scoring(trace, index)] if query is None else several(query)
        rows = [(f"Query {number}", number) for number in queries]
    table = []
    for who, number in rows:
        table.append([])
        for at, name in names.items():
            record = trace[name]
            if not isinstance(record, OnCells):  # nothing of ours or of transformers; a trace from somewhere else
                raise UserError(f"{name} is no attention to the image")
            asked = record.cell_at(*point, image=index) if point is not None else number
            within("query", asked, looking(record))
            boxes = trace[f"decoder.{at}.boxes"] if point is None and f"decoder.{at}.boxes" in trace else None
            table[-1].append(Look(record, asked, who, at, boxes, point))
    return table


def looking(record: Record) -> int:
    """How many look."""
    if hasattr(record, "locations"):
        return record.locations.shape[1]
    return (record.columns if hasattr(record, "columns") else record.weights).shape[2]


def heads_of(record: Record) -> int:
    """How many heads an attention has."""
    if hasattr(record, "locations"):
        return record.locations.shape[2]
    return (record.columns if hasattr(record, "columns") else record.weights).shape[1]


def _layers(trace: Trace, form: str, layer: Several) -> dict[int, str]:
    """The names of the layers that are meant, by number."""
    if layer is not None:
        return {number: form.format(number) for number in several(layer)}
    known = trace.names(form.format("*"))
    if not known:
        what = form.format("*")
        raise UserError(f"the trace has no {what}: record it too (names), or look at what there is: {trace.names()}")
    return {int(known[-1].split(".")[1]): known[-1]}


def predictions(trace: Trace, stage: int) -> Boxes:
    """O(stage): what the base detector (0) or a stage predicts at its end.

    Raises:
        UserError: when the trace does not have it.
    """
    names = trace.names(f"stage.{stage}.boxes.*" if stage else "decoder.*.boxes")
    if not names:
        who = f"stage {stage}" if stage else "the base detector"
        raise UserError(f"the trace has no boxes of {who}; record them, of a model that has so many stages")
    return trace[names[-1]]


def last_stage(trace: Trace) -> int:
    """The number of the last stage; 0 for a detector without REGO."""
    return max((int(name.split(".")[1]) for name in trace.names("stage.*")), default=0)


def highest_scoring(trace: Trace, index: int) -> int:
    """The query of the highest_scoring object of the last stage."""
    return int(predictions(trace, last_stage(trace)).best(index)[0].argmax())


def class_name(trace: Trace, label: int) -> str:
    """The name of a class, or its number where the model does not know it."""
    return trace.classes[label] if label < len(trace.classes) else f"class {label}"


def title_of(trace: Trace, boxes: Boxes, query: int, index: int) -> str:
    """Class and score of what a query predicts."""
    score, label = (values[query].item() for values in boxes.best(index))
    return f"{class_name(trace, label)} {score:.2f}"


def several(value: Several) -> list[int]:
    """One number or several, as a list."""
    return [value] if isinstance(value, int) else [int(one) for one in value]


def within(what: str, value: int, count: int) -> None:
    """Refuse a number that is not one of 0, ..., count - 1."""
    if not 0 <= value < count:
        raise UserError(f"{what} is {value}, and there are {count}: give 0 to {count - 1}")


def check_image(image: ImageSource, trace: Trace, index: int) -> Image.Image:
    """Read an image as the detector did, and refuse one that is not the trace's."""
    image = read_image(image)
    within("index", index, len(trace.frame.original))
    height, width = trace.frame.original[index].tolist()
    if image.size != (width, height):
        raise UserError(
            f"the image is {image.width} x {image.height}, and image {index} of the trace {width} x {height} "
            "pixels; give the image that the detector was given, as it was before it was resized"
        )
    return image


# ---------------------------------------------------------------------------------------------- what they draw alike


def grid(image: Image.Image, rows: int, columns: int) -> tuple[Figure, list[Axes], float]:
    """Panels for an image in rows and columns, and their width; many of them flow into several rows.

    A row of one panel makes it large; four panels are most that stand side by side.
    """
    count, ratio = rows * columns, image.height / image.width
    across = min(count if columns == 1 else columns, 4)
    width = max(min(WIDTH / across - 0.1, HEIGHT / ratio, 4.8), 2.0)
    figure, axes = panels(ratio, count, across, width)
    return figure, axes, width


def draw_query_box(ax: Axes, trace: Trace, boxes: Boxes, query: int, index: int, color: str) -> None:
    """What a query predicts: its box, with class and score."""
    box = boxes.boxes_xyxy(index)[query].tolist()
    draw_box(ax, box, color)
    draw_labels(ax, [box], [title_of(trace, boxes, query, index)], [color])


def draw_scale(ax: Axes, title: str, note: str, colors: Colormap, peak: float, width: float) -> None:
    """A panel's title, with the scale of its colors from 0 to the peak at the end of the line."""
    draw_title(ax, "", "", stage_color(0))  # the bar alone: these titles share their line
    above = {"xycoords": "axes fraction", "textcoords": "offset points", "annotation_clip": False}
    size = 9 if width >= NARROW else 7.5
    ax.annotate(title, (0, 1), (0, 4), fontsize=size, fontweight="bold", color=INK, **above, **as_is())
    number = f"{peak:.2g}"
    ax.annotate(number, (1, 1), (0, 4), fontsize=7, color=GRAY, ha="right", **above)
    long = 0.36 if width >= NARROW else 0.24
    left = 1 - (long + 0.05 * len(number) + 0.07) / width
    height = ax.get_position().height * ax.figure.get_figheight()
    scale = ax.inset_axes((left, 1 + 0.07 / height, long / width, 0.07 / height))
    scale.imshow(torch.linspace(0, 1, 64)[None].numpy(), cmap=colors, aspect="auto", extent=(0, 1, 0, 1))
    scale.set_xticks([])
    scale.set_yticks([])
    scale.spines[:].set(color=GRAY, linewidth=0.4)
    note = f"{note}    0" if note and width >= WIDE else "0"
    ax.annotate(note, (left, 1), (-3, 4), fontsize=7, color=GRAY, ha="right", **above)


def draw_cross(ax: Axes, point: Float[Tensor, "2"], color: str) -> None:
    """A cross with a light seam."""
    x, y = point.tolist()
    for line, ink, order in ((3.6, "white", 5), (1.8, color, 6)):
        ax.plot([x], [y], marker="+", markersize=11, markeredgewidth=line, color=ink, zorder=order, linestyle="")


def draw_note(ax: Axes, text: str) -> None:
    """A remark at the lower left, in the image."""
    ground = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 2}
    ax.annotate(text, (0, 0), (3, 4), xycoords="axes fraction", textcoords="offset points", fontsize=6.5, color=INK,
                bbox=ground, zorder=7, **as_is())  # fmt: skip


def shown(*choices: Any) -> str:
    """Parts of a note, those that there are."""
    return ", ".join(choice for choice in choices if choice)
