"""What is right and what is wrong in one image: the base detector against REGO (Figure 5 of the paper)."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

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

CROWDED = 16  # more labels than this hide the image: then what is right has none
SAID = {"both": "box and class", "ignored": "in a crowd"}  # where a kind's name alone does not say what is the matter


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
    """What is right, what is wrong and what is missed: the base detector and REGO side by side, on one image.

    Right detections are blue, without labels where there are many boxes. Wrong ones are vermillion, with the kind of
    error as :mod:`regolite.evaluation.error_types` has them; detections in a crowd are gray and do not count.
    Objects that were missed are green and dashed; one that was found in a wrong place or under a wrong name is not
    missed.

    Args:
        image: the image, as the detector was given it.
        trace: what :func:`regolite.record` has recorded.
        truth: the annotations of the image, ``dataset.objects(i)``, of the classes that the detector knows.
        stage: stages, one or several; the base detector and the last stage by default.
        base: of another detector on the same image, as a Deformable DETR that was trained without REGO: its last
            stage comes first, in place of the base detector inside REGO.
        threshold: least score of a detection.
        index: which image of the batch.

    Raises:
        UserError: when the image is not the trace's, the trace has no such stage, or the truth has classes that the
            detector does not know.
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
            said = "" if kind == "correct" else f": {SAID.get(kind, kind)}"
            boxes.append(_corners(box))
            texts.append(f"{class_name(source, int(category))} {score:.2f}{said}")
            colors.append({"correct": BLUE, "ignored": GRAY}.get(kind, VERMILLION))
        for box, color in reversed(list(zip(boxes, colors))):  # the highest_scoring lie over the others
            draw_box(ax, box, color)
        for row in judged.missed:
            boxes.append(_corners(judged.truth.boxes[row]))
            texts.append(f"{class_name(source, int(judged.truth.categories[row]))}: missed")
            colors.append(TRUTH_COLOR)
            draw_box(ax, boxes[-1], TRUTH_COLOR, 1.8, dashed=True)
        if len(boxes) > CROWDED:
            kept = [n for n, color in enumerate(colors) if color != BLUE]
            boxes, texts, colors = ([column[n] for n in kept] for column in (boxes, texts, colors))
        draw_labels(ax, boxes, texts, colors, 7.0 * max(0.7, min(1.0, (8 / max(len(boxes), 1)) ** 0.5)))
        counts = judged.counts()
        wrong = sum(counts.values()) - counts["correct"] - counts["missed"]
        note = f"{counts['correct']} right, {wrong} wrong, {counts['missed']} missed"
        draw_title(ax, title, note, stage_color(number))
    return figure


def verdicts(
    trace: Trace, truth: Objects, *, stage: int | None = None, threshold: float = THRESHOLD, index: int = 0
) -> Judged:
    """What each detection of a stage is, as evaluation judges it; categories are labels, and the image has id 0.

    Args:
        trace: what was recorded.
        truth: the annotations of the image, crowds included.
        stage: the last by default.
        threshold: least score of a detection.
        index: image of the batch.

    Raises:
        UserError: when the truth has classes that the detector does not know.
    """
    boxes = predictions(trace, last_stage(trace) if stage is None else stage)
    known = boxes.scores.shape[-1]
    if len(truth) and truth.labels.max() >= known:
        raise UserError(
            f"the truth has class {truth.labels.max()}, and the detector knows 0 to {known - 1}: give truth of its own"
        )
    names = tuple(class_name(trace, label) for label in range(known))
    image = _OneImage(truth, trace.frame.original[index].tolist(), names)
    found = to_detections(Prediction(boxes.logits, boxes.boxes), trace.frame.original, boxes.scoring)[index]
    return judge(image.coco, found.to_coco(0, image.category_ids)).above(threshold)


class _OneImage(DetectionDataset):
    """One image's annotations as a data set, which knows how to become COCO's ground truth."""

    def __init__(self, truth: Objects, size: list[int], classes: tuple[str, ...]) -> None:
        self.truth, self.extent, self.classes = truth, size, classes
        self.category_ids, self.image_ids = tuple(range(len(classes))), [0]

    def image(self, i: int) -> Image.Image:
        """No image: its annotations are all that is asked for."""
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
