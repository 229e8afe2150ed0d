"""Checkers of notebook 07: right answers pass, and each well-known mistake is named."""

import numpy as np
import pytest
import torch

from regolite.course import Mistake, find


def solve(number, *answer):
    return find(number).checker(*answer)


def curve(right, objects):
    hits = torch.as_tensor(right).double().cumsum(0)
    precision = hits / torch.arange(1, len(right) + 1)
    return precision, precision.flip(0).cummax(0).values.flip(0), hits / objects


def at_101(right, objects):
    _, envelope, recall = curve(right, objects)
    first = torch.searchsorted(recall, torch.from_numpy(np.linspace(0, 1, 101)))
    return torch.cat([envelope, envelope.new_zeros(1)])[first].mean()


def area(right, objects):
    return (curve(right, objects)[1] * right).sum() / objects


def area_as_a_sum_of_strips(right, objects):
    _, envelope, recall = curve(right, objects)
    widths = torch.diff(recall, prepend=torch.zeros(1).double())
    return float((widths * envelope).sum())


@pytest.mark.parametrize("answer", [area, area_as_a_sum_of_strips])
def test_area_solved(answer):
    assert "exact area" in solve("7.1", answer) or "exact area" in solve("7.1", answer)


@pytest.mark.parametrize(
    "answer, message",
    [
        (lambda right, objects: curve(right, objects)[0].mean(), "mean of the precisions over all boxes"),
        (lambda right, objects: (curve(right, objects)[0] * right).sum() / objects, "without interpolation"),
        (lambda right, objects: curve(right, objects)[1][right].mean(), "ignores the missed objects"),
        (at_101, "mean at 101 recalls"),
        (lambda right, objects: 0.5, "the area should be"),
        (lambda right, objects: curve(right, objects)[1], "should have shape"),
    ],
)
def test_area_mistakes(answer, message):
    with pytest.raises(Mistake, match=message):
        solve("7.1", answer)


def test_moved_boxes_solved():
    assert "2/3" in solve("7.2", {"AP": 40, "AP50": 100, "AP75": 0})


@pytest.mark.parametrize(
    "prediction, message",
    [
        ({"AP": 0.0, "AP50": 0.0, "AP75": 0.0}, "AP50 is not 0"),
        ({"AP": 0.4, "AP50": 1.0, "AP75": 0.0}, "in percent"),
        ({"AP": 40.0, "AP50": 100.0, "AP75": 100.0}, "AP75 is not 100"),
        ({"AP": 66.7, "AP50": 100.0, "AP75": 0.0}, "not a mean of overlaps"),
        ({"AP": 50.0, "AP50": 100.0, "AP75": 0.0}, "mean of AP50 and AP75"),
        ({"AP": 30.0, "AP50": 100.0, "AP75": 0.0}, "count the thresholds"),
        ({"AP": 40.0, "AP75": 0.0}, "lacks AP50"),
    ],
)
def test_moved_boxes_mistakes(prediction, message):
    with pytest.raises(Mistake, match=message):
        solve("7.2", prediction)


def pooled(scores, right, objects):
    order = torch.cat(scores).argsort(descending=True)
    return at_101(torch.cat(right)[order], sum(objects))


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
        (lambda scores, right, objects: 0.123, "AP should be"),
    ],
)
def test_pooled_mistakes(answer, message):
    with pytest.raises(Mistake, match=message):
        solve("7.3", answer)


def best_threshold(scores, right, objects, figure=lambda hits, said, objects: 2 * hits / (said + objects)):
    ranked, order = scores.sort(descending=True)
    return ranked[figure(right[order].double().cumsum(0), torch.arange(1, len(scores) + 1), objects).argmax()]


def test_best_threshold_solved():
    assert "operating point" in solve("7.4", best_threshold)
    solve("7.4", lambda *given: float(best_threshold(*given)))


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
        solve("7.4", answer)


def relabel(labels, overlap, truth, least=0.5):
    if not overlap.shape[1]:
        return labels
    best, which = overlap.max(1)
    return torch.where(best >= least, truth[which], labels)


def in_place(labels, overlap, truth):
    labels[:] = relabel(labels, overlap, truth)
    return labels


def test_relabel_solved():
    assert "oracles" in solve("7.5", relabel)


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
        solve("7.5", answer)
