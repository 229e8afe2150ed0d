"""Checkers of notebook 07: right answers pass, and each well-known mistake is named."""

import contextlib
import io

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from scipy.optimize import linear_sum_assignment

from regolite.course import Mistake, find
from regolite.course.chapter_07 import FAULTS, RECALLS, coco_cases, coco_figures
from regolite.evaluation import average_precision


def solve(number, *answer):
    return find(number).checker(*answer)


def curve(right, objects):
    hits = torch.as_tensor(right).double().cumsum(0)
    precision = hits / torch.arange(1, len(right) + 1)
    return precision, precision.flip(0).cummax(0).values.flip(0), hits / objects


def at_recalls(right, objects):
    _, envelope, recall = curve(right, objects)
    return torch.cat([envelope, envelope.new_zeros(1)])[torch.searchsorted(recall, RECALLS)]


def at_101(right, objects):
    return at_recalls(right, objects).mean()


def claim(overlap, threshold):
    claimed = torch.full((overlap.shape[0],), -1)
    taken = torch.zeros(overlap.shape[1], dtype=torch.bool)
    for d, row in enumerate(overlap):
        allowed = (row >= threshold) & ~taken
        if allowed.any():
            claimed[d] = torch.where(allowed, row, -1.0).argmax()
            taken[claimed[d]] = True
    return claimed


def claim_by_lists(overlap, threshold):
    claimed, free = [], set(range(overlap.shape[1]))
    for row in overlap.tolist():
        best = max((g for g in free if row[g] >= threshold), key=row.__getitem__, default=-1)
        claimed.append(best)
        free -= {best}
    return torch.tensor(claimed, dtype=torch.long)


def without_taken(overlap, threshold):
    if not overlap.shape[1]:
        return torch.full((len(overlap),), -1)
    best, which = overlap.max(1)
    return torch.where(best >= threshold, which, -1)


def as_voc(overlap, threshold):
    claimed = without_taken(overlap, threshold).tolist()
    return torch.tensor([g if g not in claimed[:d] else -1 for d, g in enumerate(claimed)])


def by_objects(overlap, threshold):
    claimed = torch.full((overlap.shape[0],), -1)
    for g in range(overlap.shape[1]):
        column = torch.where(claimed < 0, overlap[:, g], -1.0)
        if column.max() >= threshold:
            claimed[column.argmax()] = g
    return claimed


def optimal(overlap, threshold):
    claimed = torch.full((overlap.shape[0],), -1)
    for d, g in zip(*linear_sum_assignment(overlap.numpy(), maximize=True)):
        if overlap[d, g] >= threshold:
            claimed[d] = int(g)
    return claimed


@pytest.mark.parametrize("answer", [claim, claim_by_lists])
def test_claim_solved(answer):
    assert "Greedy by score" in solve("7.1", answer)


@pytest.mark.parametrize(
    "answer, message",
    [
        (without_taken, "only once"),
        (as_voc, "Pascal VOC"),
        (by_objects, "the detections choose"),
        (optimal, "the detections choose"),
        (lambda overlap, threshold: torch.zeros(len(overlap), dtype=torch.long), "should not be"),
        (lambda overlap, threshold: claim(overlap, threshold + 1e-6), "exactly the threshold"),
        (lambda overlap, threshold: claim(overlap, threshold) >= 0, "index of the claimed object"),
        (lambda overlap, threshold: claim(overlap, threshold).clamp(min=0), "gets -1"),
        (lambda overlap, threshold: claim(overlap, threshold)[:-1], "should have shape"),
        (
            lambda overlap, threshold: claim(overlap, threshold) if overlap.shape[1] else torch.zeros(3),
            "without objects",
        ),
    ],
)
def test_claim_mistakes(answer, message):
    with pytest.raises(Mistake, match=message):
        solve("7.1", answer)


def steps(right, objects):
    precision, envelope, recall = curve(right, objects)
    return precision, envelope, recall, torch.searchsorted(recall, RECALLS)


def padded(heights, places):
    return torch.cat([heights, heights.new_zeros(1)])[places]


def by_definition(right, objects):
    precision, _, recall, _ = steps(right, objects)
    best = [precision[recall >= r].max() if (recall >= r).any() else torch.tensor(0.0).double() for r in RECALLS]
    return torch.stack(best)


def without_missed(right, objects):
    return at_recalls(right, max(1, int(right.sum())))


def from_the_start(right, objects):
    precision, _, _, first = steps(right, objects)
    return padded(precision.cummax(0).values, first)


@pytest.mark.parametrize("answer", [at_recalls, by_definition])
def test_precision_solved(answer):
    assert "AP of one class" in solve("7.2", answer)


@pytest.mark.parametrize(
    "answer, message",
    [
        (lambda right, objects: padded(steps(right, objects)[0], steps(right, objects)[3]), "precision itself"),
        (from_the_start, "wrong end"),
        (without_missed, "missed objects count"),
        (lambda right, objects: at_recalls(right, objects).mean(), "not their mean"),
        (
            lambda right, objects: steps(right, objects)[1][steps(right, objects)[3].clamp(max=len(right) - 1)],
            "never reaches",
        ),
        (
            lambda right, objects: padded(
                steps(right, objects)[1], torch.searchsorted(steps(right, objects)[2], RECALLS, right=True)
            ),
            "equals r counts",
        ),
        (lambda right, objects: steps(right, objects)[0], "should have shape"),
        (lambda right, objects: torch.full((101,), 0.5), "should be"),
    ],
)
def test_precision_mistakes(answer, message):
    with pytest.raises(Mistake, match=message):
        solve("7.2", answer)


def pooled(scores, right, objects):
    order = torch.cat(scores).argsort(descending=True)
    return at_101(torch.cat(right)[order], sum(objects))


def without_empty_images(scores, right, objects):
    filled = [k for k, count in enumerate(objects) if count]
    return pooled([scores[k] for k in filled], [right[k] for k in filled], objects)


def test_pooled_solved():
    assert "one ranking" in solve("7.3", pooled)
    solve("7.3", lambda *given: float(pooled(*given)))


@pytest.mark.parametrize(
    "answer, message",
    [
        (
            lambda scores, right, objects: torch.stack([at_101(r, n) for r, n in zip(right, objects) if n]).mean(),
            "still a mean of one AP per image",
        ),
        (
            lambda scores, right, objects: sum(at_101(r, n) for r, n in zip(right, objects) if n) / len(objects),
            "with 0 for empty ones",
        ),
        (lambda scores, right, objects: at_101(torch.cat(right), sum(objects)), "not sorted"),
        (
            lambda scores, right, objects: at_101(torch.cat(right)[torch.cat(scores).argsort()], sum(objects)),
            "reversed",
        ),
        (without_empty_images, "left out of the ranking"),
        (lambda scores, right, objects: 0.123, "AP should be"),
    ],
)
def test_pooled_mistakes(answer, message):
    with pytest.raises(Mistake, match=message):
        solve("7.3", answer)


def figures_without(*faults):
    return lambda found, objects, classes: coco_figures(found, objects, classes, set(faults))


def test_coco_solved():
    assert "pycocotools" in solve("7.4", coco_figures)
    solve("7.4", lambda *given: {name: torch.tensor(value) for name, value in coco_figures(*given).items()})


@pytest.mark.parametrize("fault", FAULTS)
def test_coco_misconceptions_are_named(fault):
    with pytest.raises(Mistake) as mistake:
        solve("7.4", figures_without(fault))
    assert str(mistake.value).endswith(FAULTS[fault])


def changing_boxes(found, objects, classes):
    figures = coco_figures(found, objects, classes)
    found[0].boxes_xyxy[:, 2:] -= found[0].boxes_xyxy[:, :2]
    return figures


@pytest.mark.parametrize(
    "answer, message",
    [
        (lambda *given: coco_figures(*given)["AP"], "a dict of the six"),
        (lambda *given: {n: v for n, v in coco_figures(*given).items() if n != "APs"}, "a dict of the six"),
        (lambda *given: dict.fromkeys(("AP", "AP50", "AP75", "APs", "APm", "APl"), 50.0), "AP should be"),
        (lambda *given: coco_figures(*given) | {"AP75": coco_figures(*given)["AP50"]}, "AP75 should be"),
        (figures_without("unsorted", "crowd_iou"), "with several images: the detections of a class are not sorted"),
        (changing_boxes, "changed in place"),
    ],
)
def test_coco_mistakes(answer, message):
    with pytest.raises(Mistake, match=message):
        solve("7.4", answer)


@pytest.mark.parametrize("name", coco_cases())
def test_coco_reference_equals_pycocotools(name):
    found, objects, classes = coco_cases()[name]
    annotations = [
        {"image_id": i, "category_id": int(label), "bbox": box.tolist(), "area": float(area), "iscrowd": int(crowd)}
        for i, one in enumerate(objects, start=1)
        for label, box, area, crowd in zip(one.labels, one.boxes, one.areas, one.crowd)
    ]
    coco = COCO()
    coco.dataset = {
        "images": [{"id": i} for i in range(1, len(found) + 1)],
        "categories": [{"id": k} for k in range(classes)],
        "annotations": [{"id": n, **one} for n, one in enumerate(annotations, start=1)],
        "info": {},
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    results = [r for i, one in enumerate(found, start=1) for r in one.to_coco(i, list(range(classes)))]
    theirs = average_precision(coco, results)
    for figure, value in coco_figures(found, objects, classes).items():
        assert value == pytest.approx(theirs[figure], abs=1e-4) if theirs[figure] is not None else np.isnan(value)


def best_threshold(scores, right, objects, figure=lambda hits, said, objects: 2 * hits / (said + objects)):
    ranked, order = scores.sort(descending=True)
    return ranked[figure(right[order].double().cumsum(0), torch.arange(1, len(scores) + 1), objects).argmax()]


def test_best_threshold_solved():
    assert "operating point" in solve("7.5", best_threshold)
    solve("7.5", lambda *given: float(best_threshold(*given)))


@pytest.mark.parametrize(
    "answer, message",
    [
        (lambda scores, right, objects: 0.5, "not one of the scores"),
        (lambda *given: best_threshold(*given, lambda hits, said, objects: hits / said), "precision alone"),
        (lambda scores, right, objects: scores.min(), "keeps everything"),
        (
            lambda scores, right, objects: scores[
                (2 * right.double().cumsum(0) / (torch.arange(1, len(scores) + 1) + objects)).argmax()
            ],
            "before sorting",
        ),
        (lambda scores, right, objects: scores, "should have shape"),
    ],
)
def test_best_threshold_mistakes(answer, message):
    with pytest.raises(Mistake, match=message):
        solve("7.5", answer)


def relabel(labels, overlap, truth, least=0.5):
    if not overlap.shape[1]:
        return labels
    best, which = overlap.max(1)
    return torch.where(best >= least, truth[which], labels)


def in_place(labels, overlap, truth):
    labels[:] = relabel(labels, overlap, truth)
    return labels


def test_relabel_solved():
    assert "oracles" in solve("7.6", relabel)


@pytest.mark.parametrize(
    "answer, message",
    [
        (lambda labels, overlap, truth: labels, "no label is changed"),
        (lambda labels, overlap, truth: truth[overlap.argmax(1)], "keep their class"),
        (lambda labels, overlap, truth: relabel(labels, overlap, truth, 0.50001), "exactly 0.5"),
        (lambda labels, overlap, truth: relabel(labels, overlap, torch.arange(len(truth))), "number of the object"),
        (in_place, "in place"),
        (
            lambda labels, overlap, truth: relabel(labels, overlap, truth) if len(truth) else labels[:0],
            "in an image without objects",
        ),
        (lambda labels, overlap, truth: labels + 1, "should become"),
    ],
)
def test_relabel_mistakes(answer, message):
    with pytest.raises(Mistake, match=message):
        solve("7.6", answer)
