"""One object in REGO: its boxes and glimpses by stage, and the attention to other objects in each stage.

A query stands for the same object in all stages, so both figures follow one query.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor
from torchvision.ops import batched_nms, box_iou

from regolite.data.images import ImageSource
from regolite.errors import UserError
from regolite.models.glimpse import BINS
from regolite.plots.detections import THRESHOLD
from regolite.plots.drawing import (
    ABOVE,
    GRAY,
    INK,
    draw_box,
    draw_heat,
    draw_image,
    draw_labels,
    draw_title,
    panels,
    stage_color,
    style_axes,
)
from regolite.plots.selection import (
    HEIGHT,
    NARROW,
    WIDTH,
    Several,
    check_image,
    class_name,
    heads_of,
    highest_scoring,
    last_stage,
    looking,
    predictions,
    record_of,
    several,
    title_of,
    within,
)
from regolite.plots.text import as_is, drawable
from regolite.tracing.trace import Glimpses, Trace, Weights
from regolite.types import stage_name

SAME = 0.5  # least IoU of two boxes that stand for the same object


# -------------------------------------------------------------------------------------------------- boxes by stage


def stages_figure(image: ImageSource, trace: Trace, *, query: int | None = None, index: int = 0) -> Figure:
    """One object through the stages: its boxes in the image above, its glimpses below.

    One column for the base detector and for each stage. Above: the box of the stage, and dashed the region of its
    glimpse. Below: the glimpse with its 7 x 7 RoIAlign bins, the box of the previous stage and of this one; the part
    outside the image is hatched. Below the base detector, which has no glimpse, is the score by stage.

    Args:
        image: the image, as the detector was given it.
        trace: the trace of a detector with REGO.
        query: query of the object; the highest-scoring by default.
        index: which image of the batch.

    Raises:
        UserError: if the image is not the trace's, the detector has no REGO, or there is no such query.
    """
    image = check_image(image, trace, index)
    if not trace.names("stage.*.glimpses"):
        raise UserError("the trace has no stage.*.glimpses: only a detector with REGO has glimpses")
    query = highest_scoring(trace, index) if query is None else query
    by_stage = [predictions(trace, stage) for stage in range(last_stage(trace) + 1)]
    within("query", query, by_stage[0].boxes.shape[1])
    boxes = [found.boxes_xyxy(index)[query].tolist() for found in by_stage]
    count, ratio = len(by_stage), image.height / image.width
    width = min(WIDTH / count - 0.1, HEIGHT / ratio)
    figure, above = panels(ratio, count, count, width)
    below = _second_row(figure, above, width)

    _draw_scores(below[0], trace, query, index)
    for stage, (ax, box) in enumerate(zip(above, boxes)):
        draw_image(ax, image)
        draw_title(ax, stage_name(stage).capitalize(), title_of(trace, by_stage[stage], query, index),
                   stage_color(stage))  # fmt: skip
        if stage:
            glimpses = record_of(trace, f"stage.{stage}.glimpses", Glimpses)
            region = glimpses.boxes_xyxy(index)[query].tolist()
            draw_box(ax, region, stage_color(stage), 1.4, dashed=True, inset=0.004 * max(image.size))
            _draw_glimpse(below[stage], image, glimpses, query, index, stage)
            seam = [patheffects.Stroke(linewidth=2.6, foreground="white", alpha=0.7), patheffects.Normal()]
            for number, line in ((stage - 1, (0, (3, 2))), (stage, "-")):
                x0, y0, x1, y1 = boxes[number]
                below[stage].add_patch(
                    Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=stage_color(number), linewidth=1.6,
                              linestyle=line, path_effects=seam if number == stage else None)
                )  # fmt: skip
        draw_box(ax, box, stage_color(stage), 1.8)
    return figure


def _second_row(figure: Figure, above: list[Axes], width: float) -> list[Axes]:
    """Square axes under a row of panels."""
    gap, head, height = 0.08, 0.27, figure.get_figheight()
    total = height + width + head + gap
    for ax in above:
        place = ax.get_position()
        ax.set_position((place.x0, 1 - (1 - place.y0) * height / total, place.width, place.height * height / total))
    figure.set_figheight(total)
    lefts = [ax.get_position().x0 for ax in above]
    across = above[0].get_position().width
    return [figure.add_axes((left, gap / total, across, width / total)) for left in lefts]


def _draw_glimpse(ax: Axes, image: Image.Image, glimpses: Glimpses, query: int, index: int, stage: int) -> None:
    """The region of the image, stretched to a square as by RoIAlign, with its bins."""
    x0, y0, x1, y1 = glimpses.boxes_xyxy(index)[query].tolist()
    ax.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, facecolor="#EEEEEE", edgecolor="#BBBBBB", hatch="////", zorder=0,
                           linewidth=0))  # fmt: skip
    width, height = image.size
    ax.imshow(np.asarray(image), extent=(0, width, height, 0), aspect="auto", zorder=1)
    for n in range(1, BINS):
        style: dict[str, Any] = {"color": "white", "linewidth": 0.5, "alpha": 0.55, "zorder": 2}
        ax.plot([x0 + (x1 - x0) * n / BINS] * 2, [y0, y1], **style)
        ax.plot([x0, x1], [y0 + (y1 - y0) * n / BINS] * 2, **style)
    ax.set_xlim(x0, x1)
    ax.set_ylim(y1, y0)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set(color=stage_color(stage), linestyle=(0, (4, 2.5)), linewidth=1.4)
    stride = glimpses.strides[int(glimpses.level[index, query])]
    draw_title(ax, "Glimpse", f"from the map of stride {stride}", stage_color(stage))


def _draw_scores(ax: Axes, trace: Trace, query: int, index: int) -> None:
    """The score of the last stage's class, stage by stage."""
    count = last_stage(trace) + 1
    label = int(predictions(trace, count - 1).best(index)[1][query])
    scores = [predictions(trace, stage).scores[index, query, label].item() for stage in range(count)]
    place = ax.get_position()  # leave room for the axis labels
    ax.set_position(
        (place.x0 + 0.14 * place.width, place.y0 + 0.13 * place.height, 0.82 * place.width, 0.85 * place.height)
    )
    style_axes(ax, "", "stage")
    ax.plot(range(count), scores, color=GRAY, linewidth=1.2, zorder=1)
    ax.scatter(range(count), scores, c=[stage_color(stage) for stage in range(count)], s=42, zorder=3, clip_on=False)
    for stage, score in enumerate(scores):
        offset = (0, 7 if score < 0.9 else -14)  # above the point, or below it near the top
        ax.annotate(
            f"{score:.2f}", (stage, score), offset, textcoords="offset points", ha="center", fontsize=8, color=INK
        )
    ax.set_ylim(0, 1)
    ax.set_xlim(-0.35, count - 0.65)
    ax.set_xticks(range(count), ["base", *(str(stage) for stage in range(1, count))])
    title = f"score of {class_name(trace, label)}"
    ax.annotate(drawable(title), (0, 1), (0, 4), fontsize=9, fontweight="bold", color=INK, **ABOVE, **as_is())


# -------------------------------------------------------------------------------------------------------- relations


@dataclass(frozen=True, eq=False)
class Related:
    """A query's attention to other objects, the most related first.

    All ``weights``, ``itself`` and ``nothing`` sum to 1.

    Attributes:
        query: the attending query.
        queries: the highest-scoring query of each other object.
        weights: the weight of each object: the sum over all queries that stand for it.
        itself: the weight of the queries that stand for the attending query's own object.
        nothing: the weight of queries that stand for no object.
        of: for every query the index of its object in ``queries``; -1 for the attending query's object, -2 for none.
    """

    query: int
    queries: Int[Tensor, "N"]
    weights: Float[Tensor, "N"]
    itself: float
    nothing: float
    of: Int[Tensor, "Q"]


def related(
    trace: Trace,
    *,
    query: int,
    stage: int | None = None,
    layer: int | None = None,
    head: int | None = None,
    threshold: float = THRESHOLD,
    index: int = 0,
) -> Related:
    """A query's attention in a stage to the objects of the previous stage.

    Attention is from query to query, and many queries stand for one object. Queries are therefore grouped by the
    predictions of the previous stage: the objects are its detections above the threshold after non-maximum suppression
    by class at an IoU of 0.5, and always the attending query. Every other query stands for the object with which its
    box has the highest IoU, if that is at least 0.5, and otherwise for none.

    Args:
        trace: the trace.
        query: the attending query.
        stage: stage of REGO, 0 for the self-attention of the base decoder; the last by default.
        layer: layer of the stage's decoder, counted from 0; the last by default.
        head: one head; by default the mean over the heads.
        threshold: minimum score of an object.
        index: image of the batch.

    Raises:
        UserError: if the trace has no such stage, layer, head or query.
    """
    stage = last_stage(trace) if stage is None else stage
    form = f"stage.{stage}.relations.{{}}" if stage else "decoder.{}.self"
    names = trace.names(form.format("*"))
    if not names:
        raise UserError(
            f"the trace has no {form.format('*')}: record a model that has it; for a detector without REGO, stage=0 "
            "shows the self-attention of its decoder"
        )
    record = record_of(trace, names[-1] if layer is None else form.format(layer), Weights)
    within("query", query, looking(record))
    if head is not None:
        within("head", head, heads_of(record))
    weights = record.of(query, head, index)

    boxes = predictions(trace, max(stage - 1, 0))
    scores, labels = boxes.best(index)
    corners = boxes.boxes_xyxy(index)
    asks = torch.arange(len(scores)) == query
    candidates = (asks | (scores >= threshold)).nonzero()[:, 0]
    ranks = torch.where(asks, 2.0, scores)[candidates]  # the attending query comes first
    objects = candidates[batched_nms(corners[candidates], ranks, labels[candidates], SAME)]
    overlap, nearest = box_iou(corners, corners[objects]).max(1)
    of = torch.where(overlap >= SAME, nearest, -1)
    of[objects] = torch.arange(len(objects))
    shares = torch.zeros(len(objects) + 1).index_add_(0, of + 1, weights)  # first the queries without an object
    weight, order = shares[2:].sort(descending=True, stable=True)
    place = torch.full((len(objects) + 1,), -2)
    place[1], place[2 + order] = -1, torch.arange(len(order))
    return Related(query, objects[1:][order], weight, float(shares[1]), float(shares[0]), place[of + 1])


def relations_figure(
    image: ImageSource,
    trace: Trace,
    *,
    query: int | None = None,
    stage: Several = None,
    layer: int | None = None,
    head: int | None = None,
    top: int = 4,
    threshold: float = THRESHOLD,
    index: int = 0,
) -> Figure:
    """The attention of one object to other objects in each stage (as Figure 6 of the paper).

    One panel for each stage. It shows the predictions of the previous stage, to which the glimpses attend: the object
    in the stage's color, and its most related other objects, connected by lines whose width is the weight. Weights are
    summed over all queries that stand for an object (:func:`related`). The title gives the weight of the object itself
    and of the queries that stand for no object; in brackets, the weight of these under uniform attention.

    Args:
        image: the image, as the detector was given it.
        trace: the trace of :func:`regolite.record`.
        query: query of the object; the highest-scoring of the last stage by default.
        stage: stages, one or several; all of REGO by default. 0 is the self-attention of the base decoder, also of a
            detector without REGO.
        layer: layer of each stage's decoder, counted from 0; the last by default.
        head: one head; by default the mean over the heads.
        top: number of related objects that are drawn.
        threshold: minimum score of an object.
        index: which image of the batch.

    Raises:
        UserError: if the image is not the trace's, or the trace has no such stage, layer, head or query.
    """
    image = check_image(image, trace, index)
    if stage is None and not last_stage(trace):
        raise UserError(
            "the trace has no stage.*.relations: only REGO has them; stage=0 shows the self-attention of the decoder"
        )
    stages = list(range(1, last_stage(trace) + 1)) if stage is None else several(stage)
    query = highest_scoring(trace, index) if query is None else query
    found = [
        related(trace, query=query, stage=number, layer=layer, head=head, threshold=threshold, index=index)
        for number in stages
    ]
    ratio = image.height / image.width
    across = len(stages) if len(stages) <= 3 else -(-len(stages) // 2)  # room for the titles
    figure, axes = panels(ratio, len(stages), across, max(min(WIDTH / across - 0.1, HEIGHT / ratio, 4.8), NARROW))
    for ax, number, relations in zip(axes, stages, found):
        boxes = predictions(trace, max(number - 1, 0))
        corners = boxes.boxes_xyxy(index)
        draw_heat(ax, image, torch.zeros(1, 1))  # the pale image
        own, color = corners[query], stage_color(number)
        others, weights = relations.queries[:top], relations.weights[:top].tolist()
        for other, weight in zip(corners[others], weights):
            draw_box(ax, other.tolist(), INK, 1.2)
            (x0, y0), (x1, y1) = _middle(own, image), _middle(other, image)
            width = min(0.8 + 20 * weight, 12.0)
            seam = [patheffects.Stroke(linewidth=width + 1.6, foreground="white"), patheffects.Normal()]
            ax.plot([x0, x1], [y0, y1], color=color, linewidth=width, path_effects=seam, solid_capstyle="round",
                    zorder=2.5)  # fmt: skip
        draw_box(ax, own.tolist(), color, 2.4)
        names = [class_name(trace, label) for label in boxes.best(index)[1].tolist()]
        texts = [names[query], *(f"{names[other]} {_percent(weight)}" for other, weight in zip(others, weights))]
        chosen = [own, *corners[others]]
        draw_labels(ax, [box.tolist() for box in chosen], texts, [color, *[INK] * len(others)])
        uniform = float((relations.of == -2).float().mean())
        rest = f"no object {_percent(relations.nothing)} (uniform {_percent(uniform)})"
        draw_title(ax, stage_name(number).capitalize(), f"itself {_percent(relations.itself)}, {rest}", color)
    return figure


def _middle(box: Float[Tensor, "4"], image: Image.Image) -> tuple[float, float]:
    """The center of the part of a box inside the image."""
    limit = torch.tensor([float(side) for side in image.size] * 2)
    x0, y0, x1, y1 = box.clamp(min=0).minimum(limit).tolist()
    return (x0 + x1) / 2, (y0 + y1) / 2


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
