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
    """The image of the notebook, with a man and a car."""
    return read_image(DATA / "coco_tiny" / "images" / "000000234748.jpg")


@exercise(
    "0.1",
    "Every box in the panel has its score next to its class. Nothing below 0.35 is drawn.",
    "A score of 0.52 is at least 0.5. Which others of stage 3 are?",
    "Count in code: len(found[3].above(0.5)).",
)
def thresholds(at_035: int, at_05: int, at_07: int) -> str:
    """Number of detections of stage 3 at thresholds 0.35, 0.5 and 0.7."""
    last = detect_by_stage(_model(), _street(), threshold=0.0)[-1]
    for threshold, said in ((0.35, at_035), (0.5, at_05), (0.7, at_07)):
        if isinstance(said, Detections):
            raise Mistake("the answers are numbers of detections, `len(...)`.")
        count = len(last.above(threshold))
        if said != count:
            direction = "more" if said < count else "fewer"
            raise Mistake(f"at a threshold of {threshold} {direction} than {said} detections remain.")
    return "A higher threshold keeps fewer detections. At 0.05 there are many more, mostly false positives."


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
    return "stages=0 is the base detector alone, which was improved by training with the stages (the paper's Table 4)."


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
    return "One object proves little: average precision uses all of them (notebook 07)."
