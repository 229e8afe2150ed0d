"""The checkers of notebook 00 accept right answers and name the mistake in wrong ones."""

from __future__ import annotations

import pytest
import torch
from torchvision.ops import box_iou

import regolite
from regolite.course import Mistake, find


def says(number, *answer):
    """What the checker says to an answer, right or wrong."""
    try:
        return find(number).checker(*answer)
    except Mistake as mistake:
        return str(mistake)


def kept(found, levels, remain=lambda found, level: found.scores >= level):
    return [int(remain(found, level).sum()) for level in levels]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (kept, "mostly false positives"),
        (lambda found, levels: torch.tensor(kept(found, levels)), "mostly false positives"),
        (lambda found, levels: [len(found.above(level)) for level in levels], "mostly false positives"),
        (lambda found, levels: [len(found) for _ in levels], "every detection is counted"),
        (lambda *given: kept(*given, lambda found, level: found.scores > level), "at least, not more than"),
        (lambda *given: kept(*given, lambda found, level: found.scores < level), "below the threshold"),
        (lambda found, levels: [len(found.above(t).labels.unique()) for t in levels], "numbers of classes"),
        (lambda found, levels: [found.above(level) for level in levels], "not the detections"),
        (lambda found, levels: [found.scores >= level for level in levels], "booleans themselves"),
        (lambda found, levels: len(found.above(levels[0])), "one number for each threshold"),
        (lambda found, levels: kept(found, levels[:1]), "there should be 3 numbers"),
        (lambda found, levels: sorted(kept(found, levels)), "are wrong"),
        (lambda found, levels: None, "there should be 1 numbers"),
    ],
)
def test_thresholds(answer, message):
    assert message in says("0.1", answer)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda m, p, stages: regolite.detect(m, p, threshold=0.3, stages=stages)[0], "is the base detector alone"),
        (lambda m, p, stages: regolite.detect(m, p, threshold=0.3)[0], "that of all three"),
        (lambda m, p, stages: regolite.detect(m, p, stages=stages), "one entry per image"),
        (
            lambda m, p, stages: regolite.detect(m, p, 0.3, stages=max(stages - 1, 0))[0],
            "stages=3 the answer is that of 2",
        ),
        (lambda m, p, stages: regolite.detect(m, p, threshold=0.0, stages=stages)[0], "not 100"),
        (lambda m, p, stages: None, "but is None"),
    ],
)
def test_fewer_stages(answer, message):
    assert message in says("0.2", answer)


def best_stage(by_stage, box_xyxy, label, ours=lambda found, label: found.labels == label, overlap=None):
    overlaps = []
    for found in by_stage:
        boxes = found.boxes_xyxy[ours(found, label)]
        iou = box_iou(box_xyxy[None], boxes)[0] if len(boxes) else torch.zeros(1)
        overlaps.append(float((overlap or (lambda values: values[0]))(iou)))
    return overlaps.index(max(overlaps))


def most_confident(by_stage, box_xyxy, label):
    scores = [float(found.scores[0]) for found in by_stage]
    return scores.index(max(scores))


def unguarded(by_stage, box_xyxy, label):
    overlaps = [box_iou(box_xyxy[None], found.boxes_xyxy[found.labels == label])[0][0] for found in by_stage]
    return int(torch.stack(overlaps).argmax())


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (best_stage, "One object proves little"),
        (lambda *given: torch.tensor(best_stage(*given)), "One object proves little"),
        (lambda by_stage, box, label: len(by_stage) - 1, "not always the best"),
        (most_confident, "the score is not the overlap"),
        (lambda *given: best_stage(*given, ours=lambda found, label: found.labels > 0), "of another class"),
        (lambda *given: best_stage(*given, overlap=lambda values: values.max()), "its highest-scoring detection"),
        (lambda *given: best_stage(*given) + 1, "not always the best"),
        (unguarded, "a stage without a detection of the class raises IndexError"),
        (lambda *given: None, "should be the number of a stage, but is None"),
    ],
)
def test_best_stage(answer, message):
    assert message in says("0.3", answer)
