"""The figures of notebook 21: average precision by category, IoU histograms, precision-recall curves, errors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from regolite.data import DetectionDataset
from regolite.evaluation.coco import Measured
from regolite.evaluation.error_types import KINDS, Judged
from regolite.plots.drawing import (
    GRAY,
    INK,
    TRUTH_COLOR,
    VERMILLION,
    draw_box,
    draw_image,
    draw_title,
    panels,
    stage_color,
    style_axes,
)
from regolite.plots.text import as_is, drawable
from regolite.types import stage_name

LINES = ("-", "--", "-.", ":")
RATIO = 0.75  # height / width of an image crop


def plot_categories(
    names: Sequence[str], ap: Float[np.ndarray, "S K"], objects: Int[np.ndarray, "K"], count: int = 10
) -> Figure:
    """AP of the best and the worst categories: the last stage as a bar, the base detector as a point.

    Args:
        names: names of the categories.
        ap: AP by stage and category, NaN for a category without objects.
        objects: number of objects by category.
        count: number of best, and of worst categories; no category is in both.
    """
    ranked = [k for k in np.argsort(-ap[-1], kind="stable").tolist() if not math.isnan(ap[-1, k])]
    best = ranked[: min(count, math.ceil(len(ranked) / 2))]
    worst = ranked[len(best) :][-count:]
    rows = max(len(best), len(worst), 1)
    figure = Figure((9.6, 1.5 + 0.26 * rows), dpi=100, layout="constrained")
    for ax, title, chosen in zip(figure.subplots(1, 2), ("The best categories", "The worst categories"), (best, worst)):
        style_axes(ax, title, "AP (%); in brackets: objects")
        ax.grid(visible=False)
        ax.set_xlim(0, 100)
        ax.set_ylim(rows - 0.4, -0.6)
        ax.barh(range(len(chosen)), ap[-1, chosen], 0.62, color=stage_color(len(ap) - 1), label=stage_name(len(ap) - 1))
        if len(ap) > 1:
            point = {"marker": "o", "s": 26, "facecolor": "white", "edgecolor": stage_color(0), "linewidth": 1.6}
            ax.scatter(ap[0, chosen], range(len(chosen)), zorder=3, clip_on=False, label=stage_name(0), **point)
        ax.set_yticks(range(len(chosen)), [f"{drawable(names[k])} ({objects[k]})" for k in chosen], **as_is())
        ax.tick_params(axis="y", length=0, labelcolor=INK)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def plot_precision(by_stage: Sequence[Measured], ious: Sequence[float] = (0.5, 0.75)) -> Figure:
    """Precision-recall curves by stage, averaged over the categories, one panel for each IoU threshold.

    Args:
        by_stage: the result of :func:`regolite.evaluation.measure` for each stage.
        ious: the IoU thresholds.
    """
    figure = Figure((9.6, 3.8), dpi=100, layout="constrained")
    for ax, iou in zip(figure.subplots(1, len(ious), sharey=True), ious):
        style_axes(ax, f"IoU at least {iou:.2f}", "recall (%)", "precision (%)")
        for stage, measured in enumerate(by_stage):
            curve = measured.curve(iou)
            line = {"color": stage_color(stage), "linestyle": LINES[stage % 4], "linewidth": 1.8}
            ax.plot(np.linspace(0, 100, len(curve)), curve, label=stage_name(stage), **line)
        ax.set_xlim(0, 100)
        ax.set_ylim(0, 104)
    _legend(figure, ax)
    return figure


def plot_overlaps(by_stage: Sequence[Judged]) -> Figure:
    """Histogram of the IoU of each stage's correct detections with their objects: the paper's Figure 4.

    Args:
        by_stage: the detections of each stage.
    """
    figure = Figure((7.6, 3.8), dpi=100, layout="constrained")
    ax = figure.subplots()
    style_axes(ax, "Correct detections by IoU with their object", "IoU", "detections")
    edges = np.linspace(0.5, 1.0, 6)
    wide = 0.8 / len(by_stage)
    for stage, judged in enumerate(by_stage):
        numbers = overlap_histogram(judged)
        at = np.arange(len(numbers)) - 0.4 + wide * (stage + 0.5)
        bars = ax.bar(at, numbers, 0.92 * wide, color=stage_color(stage), label=stage_name(stage))
        ax.bar_label(bars, fontsize=7, color=INK, padding=2)
    ax.set_xticks(range(5), [f"{low:.1f} to {high:.1f}" for low, high in zip(edges, edges[1:])])
    ax.tick_params(axis="x", length=0)
    ax.set_ylim(0, max(1.0, 1.08 * ax.get_ylim()[1]))
    _legend(figure, ax)
    return figure


def overlap_histogram(judged: Judged) -> list[int]:
    """Number of correct detections with an IoU of 0.5 to 0.6, 0.6 to 0.7, ..., 0.9 to 1."""
    overlaps = judged.overlaps[judged.kinds == "correct"]
    return np.histogram(overlaps.clip(0.5, 1.0), [0.5, 0.6, 0.7, 0.8, 0.9, 1.0])[0].tolist()


def plot_errors(by_stage: Sequence[Judged], costs: Sequence[Mapping[str, float]], threshold: float) -> Figure:
    """Errors of each type by stage: their number above a score threshold, and their cost in AP50.

    Args:
        by_stage: the detections of each stage.
        costs: the rise in AP50 without them (:meth:`~regolite.evaluation.error_types.Judged.costs`), by stage.
        threshold: minimum score of a counted detection.
    """
    figure = Figure((9.6, 3.8), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2)
    counts = [judged.above(threshold).counts() for judged in by_stage]
    style_axes(left, f"Errors with a score of at least {threshold:g}", "", "errors")
    style_axes(right, "What they cost, all scores", "", "points of AP50")
    wide = 0.8 / len(by_stage)
    for ax, values in ((left, counts), (right, costs)):
        for stage, numbers in enumerate(values):
            at = np.arange(len(KINDS)) - 0.4 + wide * (stage + 0.5)
            ax.bar(
                at, [numbers[kind] for kind in KINDS], 0.92 * wide, color=stage_color(stage), label=stage_name(stage)
            )
        ax.set_xticks(range(len(KINDS)), KINDS)
        ax.tick_params(axis="x", length=0, labelcolor=INK)
        heights = np.nan_to_num([[numbers[kind] for kind in KINDS] for numbers in values])
        ax.set_xlim(-0.6, len(KINDS) - 0.4)
        ax.set_ylim(1.05 * min(0.0, heights.min()), max(1.0, 1.05 * heights.max()))
    _legend(figure, right)
    return figure


def draw_errors(dataset: DetectionDataset, judged: Judged, count: int = 6, columns: int = 3) -> Figure | None:
    """The highest-scoring false positive of each image: the detection in red, its nearest object dashed in green.

    Args:
        dataset: the data set.
        judged: the detections.
        count: number of images.
        columns: images per row.

    Returns:
        The figure, or None without false positives.
    """
    wrong = np.flatnonzero(np.isin(judged.kinds, KINDS))
    first = np.sort(np.unique(judged.image_ids[wrong], return_index=True)[1])  # the highest-scoring of each image
    chosen = wrong[first][:count]
    names = dict(zip(dataset.category_ids, dataset.classes))
    entries = []
    for row in chosen.tolist():
        about, note, frames = int(judged.objects[row]), "", []
        if about >= 0:
            frames = [(judged.truth.boxes[about], TRUTH_COLOR, True)]
            note = f"IoU {judged.overlaps[row]:.2f}"
            if judged.truth.categories[about] != judged.categories[row]:
                note = f"{names[int(judged.truth.categories[about])]}, {note}"
        title = f"{judged.kinds[row]}: {names[int(judged.categories[row])]} {judged.scores[row]:.2f}"
        entries.append((int(judged.image_ids[row]), title, note, [(judged.boxes[row], VERMILLION, False), *frames]))
    return _draw_details(dataset, entries, columns)


def draw_missed(
    dataset: DetectionDataset, judged: Judged, threshold: float, count: int = 6, columns: int = 3
) -> Figure | None:
    """The largest missed object of each image, in green, with its best detection below the threshold.

    Args:
        dataset: the data set.
        judged: the detections.
        threshold: minimum score of a detection that counts.
        count: number of images.
        columns: images per row.

    Returns:
        The figure, or None if no object was missed.
    """
    truth, missed = judged.truth, judged.above(threshold).missed
    missed = missed[np.argsort(-truth.boxes[missed, 2:].prod(1), kind="stable")]
    first = np.sort(np.unique(truth.image_ids[missed], return_index=True)[1])  # the largest of each image
    names = dict(zip(dataset.category_ids, dataset.classes))
    entries = []
    for row in missed[first][:count].tolist():
        near = np.flatnonzero((judged.objects == row) & np.isin(judged.kinds, ("correct", "class", "box")))
        note = f"{judged.kinds[near[0]]} with {judged.scores[near[0]]:.2f}" if len(near) else "no detection"
        title = names[int(truth.categories[row])]
        entries.append((int(truth.image_ids[row]), title, note, [(truth.boxes[row], TRUTH_COLOR, False)]))
    return _draw_details(dataset, entries, columns)


Frame = tuple[Float[np.ndarray, "4"], str, bool]
"""A box as corner, width and height; its color; whether it is dashed."""


def _draw_details(
    dataset: DetectionDataset, entries: Sequence[tuple[int, str, str, Sequence[Frame]]], columns: int
) -> Figure | None:
    """Image crops around boxes; an entry holds the COCO image id, title, note and boxes."""
    if not entries:
        return None
    place = {image_id: i for i, image_id in enumerate(dataset.image_ids)}
    figure, axes = panels(RATIO, len(entries), min(columns, len(entries)), width=2.8)
    for ax, (image_id, title, note, frames) in zip(axes, entries):
        corners = np.array([[x, y, x + width, y + height] for (x, y, width, height), *_ in frames])
        image, (left, top) = _cut(dataset.image(place[image_id]), corners)
        draw_image(ax, image)
        for (x0, y0, x1, y1), (_, color, dashed) in reversed(list(zip(corners.tolist(), frames))):
            draw_box(ax, [x0 - left, y0 - top, x1 - left, y1 - top], color, 2.2, dashed)
        draw_title(ax, title, note, frames[0][1])
    return figure


def _cut(image: Image.Image, boxes_xyxy: Float[np.ndarray, "n 4"]) -> tuple[Image.Image, tuple[int, int]]:
    """The crop of an image around boxes, at least a quarter of its width, and the crop's left and top."""
    (x0, y0), (x1, y1) = boxes_xyxy[:, :2].min(0), boxes_xyxy[:, 2:].max(0)
    wide = max(2.5 * (x1 - x0), 2.5 * (y1 - y0) / RATIO, image.width / 4)
    width = min(round(wide), image.width)
    height = min(round(max(RATIO * width, 1.1 * (y1 - y0))), image.height)
    left = round(min(max((x0 + x1 - width) / 2, 0), image.width - width))
    top = round(min(max((y0 + y1 - height) / 2, 0), image.height - height))
    return image.crop((left, top, left + width, top + height)), (left, top)


def _legend(figure: Figure, ax: Axes) -> None:
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9, labelcolor=GRAY
    )
