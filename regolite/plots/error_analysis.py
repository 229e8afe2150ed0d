"""Correct and wrong detections in one image: the base detector against REGO (Figure 5 of the paper)."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from PIL import Image

from regolite.data.dataset import DetectionDataset, Objects
from regolite.data.images import ImageSource, read_image
from regolite.errors import UserError
from regolite.evaluation.error_types import Judged, judge
from regolite.inference import to_detections
from regolite.plots.detections import THRESHOLD
from regolite.plots.drawing import (
    BLUE,
    GRAY,
    TRUTH_COLOR,
    VERMILLION,
    draw_box,
    draw_image,
    draw_labels,
    draw_title,
    stage_color,
)
from regolite.plots.selection import Several, check_image, class_name, grid, last_stage, predictions, several
from regolite.tracing.trace import Trace
from regolite.types import Prediction, stage_name

CROWDED = 16  # with more labels than this, correct detections are not labeled
KIND_LABELS = {"both": "box and class", "ignored": "in a crowd"}  # for kinds whose names are unclear in a figure


def errors_figure(
    image: ImageSource,
    trace: Trace,
    truth: Objects,
    *,
    stage: Several = None,
    base: Trace | None = None,
    threshold: float = THRESHOLD,
    index: int = 0,
) -> Figure:
    """Correct detections, errors and missed objects of the base detector and REGO, side by side on one image.

    Correct detections are blue, without labels if there are many boxes. False positives are vermillion, with their
    error type of :mod:`regolite.evaluation.error_types`; ignored detections in a crowd are gray. Missed objects are
    green and dashed; an object with a detection in a wrong place or of a wrong class does not count as missed.

    Args:
        image: the image, as the detector was given it.
        trace: the trace of :func:`regolite.record`.
        truth: the ground truth of the image, ``dataset.objects(i)``, of classes that the detector knows.
        stage: stages, one or several; the base detector and the last stage by default.
        base: a trace of another detector on the same image, such as a Deformable DETR trained without REGO. Its last
            stage comes first, in place of the base detector inside REGO.
        threshold: minimum score of a detection.
        index: which image of the batch.

    Raises:
        UserError: if the image is not the trace's, the trace has no such stage, or the ground truth has classes that
            the detector does not know.
    """
    image = read_image(image)
    last = last_stage(trace)
    stages = sorted({0, last} if base is None else {last}) if stage is None else several(stage)
    shown = [(stage_name(number).capitalize(), number, trace) for number in stages]
    if base is not None:
        shown.insert(0, ("Without REGO" if not last_stage(base) else "The other detector", last_stage(base), base))
    figure, axes, _ = grid(image, 1, len(shown))
    for ax, (title, number, source) in zip(axes, shown):
        check_image(image, source, index)
        judged = verdicts(source, truth, stage=number, threshold=threshold, index=index)
        draw_image(ax, image)
        boxes, texts, colors = [], [], []
        for box, category, score, kind in zip(judged.boxes, judged.categories, judged.scores, judged.kinds):
            said = "" if kind == "correct" else f": {KIND_LABELS.get(kind, kind)}"
            boxes.append(_corners(box))
            texts.append(f"{class_name(source, int(category))} {score:.2f}{said}")
            colors.append({"correct": BLUE, "ignored": GRAY}.get(kind, VERMILLION))
        for box, color in reversed(list(zip(boxes, colors))):  # the highest-scoring on top
            draw_box(ax, box, color)
        for row in judged.missed:
            boxes.append(_corners(judged.truth.boxes[row]))
            texts.append(f"{class_name(source, int(judged.truth.categories[row]))}: missed")
            colors.append(TRUTH_COLOR)
            draw_box(ax, boxes[-1], TRUTH_COLOR, 1.8, dashed=True)
        if len(boxes) > CROWDED:
            kept = [n for n, color in enumerate(colors) if color != BLUE]
            boxes, texts, colors = [boxes[n] for n in kept], [texts[n] for n in kept], [colors[n] for n in kept]
        draw_labels(ax, boxes, texts, colors, 7.0 * max(0.7, min(1.0, (8 / max(len(boxes), 1)) ** 0.5)))
        counts = judged.counts()
        wrong = sum(counts.values()) - counts["correct"] - counts["missed"]
        note = f"{counts['correct']} right, {wrong} wrong, {counts['missed']} missed"
        draw_title(ax, title, note, stage_color(number))
    return figure


def verdicts(
    trace: Trace, truth: Objects, *, stage: int | None = None, threshold: float = THRESHOLD, index: int = 0
) -> Judged:
    """The error types of a stage's detections, as in evaluation; category ids are labels, the image id is 0.

    Args:
        trace: the trace.
        truth: the ground truth of the image, crowds included.
        stage: the last by default.
        threshold: minimum score of a detection.
        index: image of the batch.

    Raises:
        UserError: if the ground truth has classes that the detector does not know.
    """
    boxes = predictions(trace, last_stage(trace) if stage is None else stage)
    known = boxes.scores.shape[-1]
    if len(truth) and truth.labels.max() >= known:
        raise UserError(
            f"the ground truth has class {truth.labels.max()}, but the detector knows only 0 to {known - 1}: give the "
            "ground truth of the detector's own classes"
        )
    names = tuple(class_name(trace, label) for label in range(known))
    image = _OneImage(truth, trace.frame.original[index].tolist(), names)
    found = to_detections(Prediction(boxes.logits, boxes.boxes), trace.frame.original, boxes.scoring)[index]
    return judge(image.coco, found.to_coco(0, image.category_ids)).above(threshold)


class _OneImage(DetectionDataset):
    """One image's annotations as a data set, for its conversion to COCO's ground truth."""

    def __init__(self, truth: Objects, size: list[int], classes: tuple[str, ...]) -> None:
        self.truth, self.extent, self.classes = truth, size, classes
        self.category_ids, self.image_ids = tuple(range(len(classes))), [0]

    def image(self, i: int) -> Image.Image:
        """Not available: only the annotations are used."""
        raise NotImplementedError

    def objects(self, i: int) -> Objects:
        """The annotations."""
        return self.truth

    def size(self, i: int) -> tuple[int, int]:
        """Height and width."""
        height, width = self.extent
        return height, width

    def file_name(self, i: int) -> str:
        """No file."""
        return ""


def _corners(box: Float[np.ndarray, "4"]) -> list[float]:
    x, y, width, height = box.tolist()
    return [x, y, x + width, y + height]
