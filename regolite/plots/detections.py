"""Detections and ground truth on images, stage by stage."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from regolite.boxes import enlarge
from regolite.data import DetectionDataset
from regolite.data.images import ImageSource, read_image
from regolite.plots.drawing import (
    CLASS_COLORS,
    INK,
    TRUTH_COLOR,
    draw_box,
    draw_image,
    draw_objects,
    draw_title,
    label_text,
    panels,
    stage_color,
)
from regolite.types import Detections, stage_name

THRESHOLD = 0.3  # minimum score of a box that is drawn: low, so that a model early in training shows some


def draw_detections(
    image: ImageSource, detections: Detections, classes: Sequence[str], scores: bool = True
) -> Image.Image:
    """A copy of an image with the detections drawn in the colors of their classes.

    Args:
        image: the image.
        detections: detections in the image.
        classes: names of the classes by label.
        scores: write the scores too.

    Returns:
        An RGB image of the same size; line widths and font size scale with it.
    """
    # At 64 dots per inch width / dpi * dpi is exact, so the copy has the size of the image.
    image = read_image(image)
    dpi, (width, height) = 64, image.size
    figure = Figure((width / dpi, height / dpi), dpi=dpi)
    canvas = FigureCanvasAgg(figure)
    ax = figure.add_axes((0, 0, 1, 1))
    draw_image(ax, image)
    colors = [CLASS_COLORS[label % len(CLASS_COLORS)] for label in detections.labels.tolist()]
    pixels = max(9.0, 0.026 * math.sqrt(width * height))  # font size
    draw_objects(ax, detections, classes, colors, 72 / dpi * pixels, scores)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def draw_stages(
    image: ImageSource,
    by_stage: Sequence[Detections],
    classes: Sequence[str],
    truth: Detections | None = None,
    alphas: Sequence[float] | None = None,
    threshold: float = THRESHOLD,
    columns: int | None = None,
) -> Figure:
    """The detections of the base detector and of every stage, side by side (as Figure 5 of the paper).

    Args:
        image: the image.
        by_stage: detections of each stage, from :func:`regolite.inference.detect_by_stage`, 0 the base detector.
        classes: names of the classes by label.
        truth: the ground truth (:func:`ground_truth`), drawn in its own panel.
        alphas: enlarging ratios alpha(1), ..., alpha(S). With them every stage's panel shows, dashed, the glimpse of
            the highest-scoring object of the last stage: R(O_box(i-1), alpha(i)) of equation (7). This needs the
            object's box in the previous stage, so ``by_stage`` should hold detections of all scores.
        threshold: minimum score of a detection that is drawn.
        columns: panels per row; all by default.
    """
    image = read_image(image)
    count = len(by_stage) + (truth is not None)
    figure, axes = panels(image.height / image.width, count, columns)
    size = 7.0
    for stage, (ax, detections) in enumerate(zip(axes, by_stage)):
        draw_image(ax, image)
        note = ""
        region = _glimpse(by_stage, stage, alphas, threshold)
        if alphas and region is not None:
            draw_box(ax, region, stage_color(stage), 0.2 * size, dashed=True, inset=0.004 * max(image.size))
            note = f"dashed: its glimpse, α = {alphas[stage - 1]:g}"
        draw_title(ax, stage_name(stage).capitalize(), note, stage_color(stage))
        shown = detections.above(threshold)
        draw_objects(ax, shown, classes, [stage_color(stage)] * len(shown), size)
        if not len(shown):
            best = f" (best: {label_text(detections, 0, classes)})" if len(detections) else ""
            said = ax.text(0.5, 0.5, f"nothing above {threshold:g}{best}", transform=ax.transAxes, fontsize=size)
            ground = {"facecolor": INK, "edgecolor": "none", "alpha": 0.75, "pad": 4}
            said.set(color="white", ha="center", va="center", bbox=ground)
    if truth is not None:
        draw_image(axes[-1], image)
        draw_title(axes[-1], "Ground truth", "", TRUTH_COLOR)
        draw_objects(axes[-1], truth, classes, [TRUTH_COLOR] * len(truth), size, scores=False)
    return figure


def draw_ground_truth(dataset: DetectionDataset, indices: Sequence[int], columns: int = 4) -> Figure:
    """Images of a data set with their ground truth; crowds are left out.

    Args:
        dataset: the data set.
        indices: indices of the images.
        columns: images per row.
    """
    # One panel shape for all images: that of the tallest, but no taller than wide.
    ratio = max(dataset.size(i)[0] / dataset.size(i)[1] for i in indices)
    figure, axes = panels(min(ratio, 1.0), len(indices), min(columns, len(indices)))
    for ax, i in zip(axes, indices):
        truth = ground_truth(dataset, i)
        draw_image(ax, dataset.image(i))
        draw_title(ax, dataset.file_name(i), f"{len(truth)} objects", TRUTH_COLOR)
        colors = [CLASS_COLORS[label % len(CLASS_COLORS)] for label in truth.labels.tolist()]
        draw_objects(ax, truth, dataset.classes, colors, 7.0, scores=False)
    return figure


def ground_truth(dataset: DetectionDataset, i: int) -> Detections:
    """The ground truth of image ``i`` of a data set, as detections of score 1; crowds are left out."""
    objects = dataset.objects(i).targets(*dataset.size(i))
    boxes = torch.from_numpy(objects.boxes).float()
    boxes_xyxy = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
    count = len(objects)
    return Detections(torch.ones(count), torch.from_numpy(objects.labels), boxes_xyxy, torch.full((count,), -1))


def _glimpse(
    by_stage: Sequence[Detections], stage: int, alphas: Sequence[float] | None, threshold: float
) -> list[float] | None:
    """A stage's glimpse of the last stage's highest-scoring object: ``xyxy`` in pixels, or None if not known."""
    if stage == 0 or not alphas or not len(by_stage[-1].above(threshold)):
        return None
    before = by_stage[stage - 1]
    same = (before.queries == by_stage[-1].queries[0]).nonzero()
    return _enlarged(before.boxes_xyxy[same[0, 0]], alphas[stage - 1]).tolist() if len(same) else None


def _enlarged(box_xyxy: Float[Tensor, "4"], alpha: float) -> Float[Tensor, "4"]:
    center, size = (box_xyxy[:2] + box_xyxy[2:]) / 2, box_xyxy[2:] - box_xyxy[:2]
    larger = enlarge(torch.cat([center, size]), alpha)
    return torch.cat([larger[:2] - larger[2:] / 2, larger[:2] + larger[2:] / 2])
