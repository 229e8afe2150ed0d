"""Selection of queries, layers, heads and stages in traces, shared by all figures, and its validation.

Every figure uses the same keywords: ``query``, ``point``, ``layer``, ``head``, ``stage``, ``level``, ``threshold``, and
``index``, the image of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from regolite.data.images import ImageSource, read_image
from regolite.errors import UserError
from regolite.plots.drawing import ABOVE, GRAY, INK, draw_box, draw_labels, draw_title, panels, stage_color
from regolite.plots.text import as_is, drawable
from regolite.tracing.trace import Boxes, RowColumnMap, Sampling, Trace, Weights

WIDTH, HEIGHT = 9.9, 4.6  # in inches: width of a row of panels (a notebook's column), maximum height of a panel
WIDE, NARROW = 4.2, 3.0  # in inches: panels at least WIDE have a note in the title, those below NARROW a small title

Point = tuple[float | int, float | int]
"""x and y in pixels of the image."""

Several = int | Sequence[int] | None
"""A number, several, or None for the figure's default."""

Attention = Weights | Sampling
"""Dense or deformable attention."""

Kind = TypeVar("Kind")


@dataclass(frozen=True)
class Look:
    """The attention of a decoder query or an encoder cell in one layer.

    Attributes:
        record: the attention of the layer.
        number: index of the query or cell.
        who: its name in titles.
        layer: number of the layer.
        boxes: predictions of this layer's queries; None for cells, or if not recorded.
        point: the selected point of a cell; None for queries.
    """

    record: Attention
    number: int
    who: str
    layer: int
    boxes: Boxes | None
    point: Point | None


def looks(trace: Trace, query: Several, point: Point | None, layer: Several, index: int) -> list[list[Look]]:
    """The selected attentions: one row for each query or cell, one column for each layer.

    Args:
        trace: the trace.
        query: decoder queries; by default the highest-scoring.
        point: instead, the encoder cell of the finest map that contains this point of the image.
        layer: layers; the last by default.
        index: image of the batch.

    Raises:
        UserError: for a selection that the trace does not have, or both a query and a point.
    """
    if point is not None:
        if query is not None:
            raise UserError("give either a query (decoder attention) or a point (encoder attention), not both")
        row = []
        for number, name in _layers(trace, "encoder.{}", layer).items():
            record = attention_of(trace, name)
            cell = record.cell_at(*point, image=index)
            within("query", cell, looking(record))
            row.append(Look(record, cell, f"Cell at ({point[0]:.0f}, {point[1]:.0f})", number, None, point))
        return [row]
    names = _layers(trace, "decoder.{}.cross", layer)
    table = []
    for asked in [highest_scoring(trace, index)] if query is None else several(query):
        row = []
        for number, name in names.items():
            record = attention_of(trace, name)
            within("query", asked, looking(record))
            predicted = f"decoder.{number}.boxes"
            boxes = record_of(trace, predicted, Boxes) if predicted in trace else None
            row.append(Look(record, asked, f"Query {asked}", number, boxes, None))
        table.append(row)
    return table


def record_of(trace: Trace, name: str, kind: type[Kind]) -> Kind:
    """A record of a trace; raise UserError if it is missing or not of this kind."""
    record = trace[name]
    if not isinstance(record, kind):  # a trace from another source
        raise UserError(f"{name} of the trace is {type(record).__name__}, not {kind.__name__}")
    return record


def attention_of(trace: Trace, name: str) -> Attention:
    """An attention of a trace; raise UserError if it is missing or another kind of record."""
    record = trace[name]
    if not isinstance(record, Weights | Sampling):  # a trace from another source
        raise UserError(f"{name} is not an attention over the image")
    return record


def looking(record: Attention) -> int:
    """Number of queries of an attention."""
    if isinstance(record, Sampling):
        return record.locations.shape[1]
    return (record.columns if isinstance(record, RowColumnMap) else record.weights).shape[2]


def heads_of(record: Attention) -> int:
    """Number of heads of an attention."""
    if isinstance(record, Sampling):
        return record.locations.shape[2]
    return (record.columns if isinstance(record, RowColumnMap) else record.weights).shape[1]


def _layers(trace: Trace, form: str, layer: Several) -> dict[int, str]:
    """The names of the selected layers, by number."""
    if layer is not None:
        return {number: form.format(number) for number in several(layer)}
    known = trace.names(form.format("*"))
    if not known:
        what = form.format("*")
        raise UserError(f"the trace has no {what}: record it too (names); it has {trace.names()}")
    return {int(known[-1].split(".")[1]): known[-1]}


def predictions(trace: Trace, stage: int) -> Boxes:
    """O(stage): the final predictions of the base detector (0) or a stage.

    Raises:
        UserError: if the trace does not have them.
    """
    names = trace.names(f"stage.{stage}.boxes.*" if stage else "decoder.*.boxes")
    if not names:
        who = f"stage {stage}" if stage else "the base detector"
        raise UserError(f"the trace has no boxes of {who}; record them with a model that has this stage")
    return record_of(trace, names[-1], Boxes)


def last_stage(trace: Trace) -> int:
    """The number of the last stage; 0 for a detector without REGO."""
    return max((int(name.split(".")[1]) for name in trace.names("stage.*")), default=0)


def highest_scoring(trace: Trace, index: int) -> int:
    """The query of the highest-scoring object of the last stage."""
    return int(predictions(trace, last_stage(trace)).best(index)[0].argmax())


def class_name(trace: Trace, label: int) -> str:
    """The name of a class, or its number if it has no name."""
    return trace.classes[label] if label < len(trace.classes) else f"class {label}"


def title_of(trace: Trace, boxes: Boxes, query: int, index: int) -> str:
    """Class and score of a query's prediction."""
    scores, labels = boxes.best(index)
    return f"{class_name(trace, int(labels[query]))} {scores[query]:.2f}"


def several(value: int | Sequence[int]) -> list[int]:
    """One number or several, as a list."""
    return [value] if isinstance(value, int) else [int(one) for one in value]


def within(what: str, value: int, count: int) -> None:
    """Raise UserError for a number that is not one of 0, ..., count - 1."""
    if not 0 <= value < count:
        raise UserError(f"{what} is {value}, but there are only {count}: give 0 to {count - 1}")


def check_image(image: ImageSource, trace: Trace, index: int) -> Image.Image:
    """Read an image as the detector did; raise UserError if its size differs from the trace's."""
    image = read_image(image)
    within("index", index, len(trace.frame.original))
    height, width = trace.frame.original[index].tolist()
    if image.size != (width, height):
        raise UserError(
            f"the image has {image.width} x {image.height} pixels, but image {index} of the trace has {width} x "
            f"{height}: give the image that the detector was given, before resizing"
        )
    return image


# ---------------------------------------------------------------------------------------------- shared drawing


def grid(image: Image.Image, rows: int, columns: int) -> tuple[Figure, list[Axes], float]:
    """Panels for an image in rows and columns, at most four side by side; and the panel width in inches."""
    count, ratio = rows * columns, image.height / image.width
    across = min(count if columns == 1 else columns, 4)
    width = max(min(WIDTH / across - 0.1, HEIGHT / ratio, 4.8), 2.0)
    figure, axes = panels(ratio, count, across, width)
    return figure, axes, width


def draw_query_box(ax: Axes, trace: Trace, boxes: Boxes, query: int, index: int, color: str) -> None:
    """A query's predicted box, with class and score."""
    box = boxes.boxes_xyxy(index)[query].tolist()
    draw_box(ax, box, color)
    draw_labels(ax, [box], [title_of(trace, boxes, query, index)], [color])


def draw_scale(ax: Axes, title: str, note: str, colors: Colormap, peak: float, width: float) -> None:
    """A panel's title, with a color scale from 0 to the peak at the right."""
    draw_title(ax, "", "", stage_color(0))  # the bar only

    size = 9 if width >= NARROW else 7.5
    ax.annotate(drawable(title), (0, 1), (0, 4), fontsize=size, fontweight="bold", color=INK, **ABOVE, **as_is())
    number = f"{peak:.2g}"
    ax.annotate(number, (1, 1), (0, 4), fontsize=7, color=GRAY, ha="right", **ABOVE)
    assert isinstance(ax.figure, Figure)  # panels are in no subfigure
    long = 0.36 if width >= NARROW else 0.24
    left = 1 - (long + 0.05 * len(number) + 0.07) / width
    height = ax.get_position().height * ax.figure.get_figheight()
    scale = ax.inset_axes((left, 1 + 0.07 / height, long / width, 0.07 / height))
    scale.imshow(torch.linspace(0, 1, 64)[None].numpy(), cmap=colors, aspect="auto", extent=(0, 1, 0, 1))
    scale.set_xticks([])
    scale.set_yticks([])
    scale.spines[:].set(color=GRAY, linewidth=0.4)
    note = f"{note}    0" if note and width >= WIDE else "0"
    ax.annotate(note, (left, 1), (-3, 4), fontsize=7, color=GRAY, ha="right", **ABOVE)


def draw_cross(ax: Axes, point: Float[Tensor, "2"], color: str) -> None:
    """A cross with a white outline."""
    x, y = point.tolist()
    for line, ink, order in ((3.6, "white", 5), (1.8, color, 6)):
        ax.plot([x], [y], marker="+", markersize=11, markeredgewidth=line, color=ink, zorder=order, linestyle="")


def draw_note(ax: Axes, text: str) -> None:
    """A note at the lower left of the image."""
    ground = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 2}
    ax.annotate(text, (0, 0), (3, 4), xycoords="axes fraction", textcoords="offset points", fontsize=6.5, color=INK,
                bbox=ground, zorder=7, **as_is())  # fmt: skip


def shown(*choices: str) -> str:
    """The non-empty parts of a note, joined by commas."""
    return ", ".join(choice for choice in choices if choice)
