"""Checkers of notebook 00: thresholds, fewer stages, the best stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from regolite.course import Mistake, exercise
from regolite.data import read_image
from regolite.inference import detect_by_stage
from regolite.loading import load
from regolite.types import Detections

DATA = Path(__file__).resolve().parents[2] / "data"


@cache
def _model() -> nn.Module:
    return load()


def _street() -> Image.Image:
    """A street with a man and a car."""
    return read_image(DATA / "coco_tiny" / "images" / "000000234748.jpg")


@exercise(
    "0.1",
    "Compare detections.scores, a tensor [N], with a threshold: the result has one boolean for each detection.",
    "At least means >=. The number of True values is their sum.",
    "One number for each threshold: [int((detections.scores >= threshold).sum()) for threshold in thresholds].",
)
def thresholds(answer: Callable[[Detections, Sequence[float]], Sequence[int]]) -> str:
    """``answer(detections, thresholds)`` counts the detections that remain at each threshold."""
    box = TRUE
    few = _found(
        *[(score, 2, box) for score in (0.75, 0.5, 0.5)], *[(score, 1, box) for score in (0.5, 0.3, 0.25, 0.2)]
    )
    for found, levels in ((few, [0.5]), (few, [0.3, 0.6, 0.9]), (few, [0.6, 0.25, 0.0]), (few[:0], [0.5, 0.1])):
        wanted, said = [len(found.above(level)) for level in levels], answer(found, levels)
        if isinstance(said, (int, Detections)) or (isinstance(said, Tensor) and not said.ndim):
            raise Mistake("the answer should be a list with one number for each threshold.")
        if said is None or len(said) != len(levels):
            raise Mistake(f"for {len(levels)} thresholds there should be {len(levels)} numbers.")
        if any(isinstance(count, Detections) or (isinstance(count, Tensor) and count.numel() != 1) for count in said):
            raise Mistake("the entries should be numbers of detections, not the detections or booleans themselves.")
        counts = [int(count) for count in said]
        if counts != wanted:
            _explain_counts(found, levels, counts)
    return "A higher threshold keeps fewer detections. At 0.05 there are many more, mostly false positives."


def _explain_counts(found: Detections, levels: Sequence[float], counts: list[int]) -> None:
    """Raise the Mistake for wrong numbers of detections above thresholds."""
    known = {
        "every detection is counted, whatever its score.": [len(found)] * len(levels),
        "a score equal to the threshold counts too: at least, not more than.": [
            int((found.scores > level).sum()) for level in levels
        ],
        "these are the detections below the threshold.": [int((found.scores < level).sum()) for level in levels],
        "these are numbers of classes; count detections.": [len(set(found.above(t).labels.tolist())) for t in levels],
    }
    for message, wrong in known.items():
        if counts == wrong:
            raise Mistake(message)
    scores = [round(float(score), 2) for score in found.scores]
    raise Mistake(f"for scores {scores} and thresholds {list(levels)} the numbers {counts} are wrong.")


@exercise(
    "0.2",
    "regolite.detect has an argument for the number of stages.",
    "regolite.detect(model, image, threshold=0.3, stages=stages); it returns a list with one entry per image.",
)
def fewer_stages(answer: Callable[[nn.Module, Image.Image, int], Detections]) -> str:
    """``answer(model, image, stages)`` detects with the first stages."""
    model, image = _model(), _street()
    by_stage = detect_by_stage(model, image, threshold=0.3)
    for stages in (0, 3, 2, 1):
        found = answer(model, image, stages)
        if isinstance(found, list):
            raise Mistake("that is a list with one entry per image: return its only entry.")
        if not isinstance(found, Detections):
            kind = "None" if found is None else type(found).__name__
            raise Mistake(f"the answer should be Detections, but is {kind}.")
        if _same(found, by_stage[stages]):
            continue
        like = [n for n, other in enumerate(by_stage) if _same(found, other)]
        if like == [3]:
            raise Mistake(f"with stages={stages} the answer is that of all three: the argument changes nothing.")
        if like:
            raise Mistake(f"with stages={stages} the answer is that of {like[0]} stages.")
        if len(found) != len(by_stage[stages]):
            count = len(by_stage[stages])
            raise Mistake(
                f"with stages={stages} there are {count} detections with a score of 0.3 or more, not {len(found)}."
            )
        raise Mistake(f"with stages={stages} these are not the model's detections.")
    return (
        "stages=0 is the base detector alone. The paper reports that training with the stages improves it as well "
        "(Table 4)."
    )


def _same(one: Detections, other: Detections) -> bool:
    close = len(one) == len(other) and torch.allclose(one.scores, other.scores, atol=1e-4)
    return bool(close and torch.allclose(one.boxes_xyxy, other.boxes_xyxy, atol=0.05))


def _found(*rows: tuple[float, int, Sequence[float]]) -> Detections:
    """Detections of scores, labels and boxes."""
    scores, labels, boxes = zip(*rows)
    return Detections(torch.tensor(scores), torch.tensor(labels), torch.tensor(boxes), torch.arange(len(rows)))


# A ground-truth box, boxes with decreasing overlap, and one without overlap.
TRUE = (10.0, 10.0, 50.0, 50.0)
NEAR, OFF, FAR = (11.0, 10.0, 51.0, 50.0), (16.0, 10.0, 56.0, 50.0), (30.0, 30.0, 70.0, 70.0)
AWAY = (80.0, 80.0, 99.0, 99.0)

# For each case its stages, the correct one, and messages for known wrong answers.
CASES: list[tuple[list[Detections], int, dict[Any, str]]] = [
    (
        [_found((0.9, 1, OFF)), _found((0.8, 1, FAR)), _found((0.6, 1, NEAR)), _found((0.7, 1, OFF))],
        2,
        {
            3: "stage 3 is not always the best: here stage 2 overlaps more.",
            0: "stage 0 has the highest score here, but the score is not the overlap.",
            1: "stage 1 overlaps least here: look for the largest IoU.",
        },
    ),
    (
        [_found((0.9, 2, NEAR), (0.8, 1, FAR)), _found((0.9, 2, AWAY), (0.5, 1, OFF))],
        1,
        {0: "a detection of another class was used: only those with the object's label count."},
    ),
    (
        [_found((0.9, 1, FAR), (0.4, 1, NEAR)), _found((0.7, 1, OFF), (0.5, 1, AWAY))],
        1,
        {0: "you took a stage's best overlap; take that of its highest-scoring detection of the class, the first."},
    ),
    ([_found((0.9, 2, NEAR)), _found((0.6, 1, FAR)), _found((0.9, 2, NEAR))], 1, {}),
]


@exercise(
    "0.3",
    "detections.labels == label selects the detections of the class; the first of them has the highest score.",
    "box_iou(box_xyxy[None], boxes_xyxy[:1]) is a tensor of shape [1, 1]; without a detection of the class, take 0.",
    "Make a list with one overlap per stage, and return the index of the largest: overlaps.index(max(overlaps)).",
)
def best_stage(answer: Callable[[list[Detections], Tensor, int], int]) -> str:
    """``answer(by_stage, box_xyxy, label)`` is the number of the stage with the best overlap."""
    for by_stage, wanted, mistakes in CASES:
        try:
            said = answer(by_stage, torch.tensor(TRUE), 1)
        except (IndexError, RuntimeError) as error:
            if any(not (found.labels == 1).any() for found in by_stage):
                raise Mistake(
                    f"a stage without a detection of the class raises {type(error).__name__}: its overlap is 0."
                ) from None
            raise
        if isinstance(said, Tensor) and said.numel() == 1:
            said = said.item()
        if isinstance(said, bool) or not isinstance(said, (int, float)) or said != int(said):
            raise Mistake(f"the answer should be the number of a stage, but is {said!r}.")
        if said != wanted:
            raise Mistake(mistakes.get(int(said), f"stage {wanted} overlaps most, not {int(said)}."))
    return "One object proves little: average precision uses all of them (chapter 07)."
