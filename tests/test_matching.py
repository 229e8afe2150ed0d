"""Matching: the cheapest assignment, of every layer and stage by itself, whatever the batch looks like."""

from itertools import permutations

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import generalized_box_iou

from regolite.boxes import to_xyxy
from regolite.errors import UserError
from regolite.matching import Matches, MatchingCosts, NonFinitePrediction, PaddedTargets, match, matching_cost
from regolite.types import Prediction, Target

CLASSES = 5
SCORINGS = ("softmax", "sigmoid")
COSTS = MatchingCosts(label=1.5, l1=4.0, giou=2.5, focal_alpha=0.4, focal_gamma=1.5)


def boxes(*shape):
    return torch.cat([torch.rand(*shape, 2), 0.05 + 0.6 * torch.rand(*shape, 2)], -1)


def make_targets(*counts):
    return [Target(torch.randint(CLASSES, (n,)), boxes(n), i, (100, 100)) for i, n in enumerate(counts)]


def make_predictions(count, batch, queries, scoring):
    columns = CLASSES + (scoring == "softmax")
    return [Prediction(2 * torch.randn(batch, queries, columns), boxes(batch, queries)) for _ in range(count)]


def cost_of(logits, box, label, wanted, scoring):
    """The cost of one pair, number by number, as the papers write it."""
    if scoring == "softmax":
        right = -logits.softmax(0)[label]
    else:
        p = logits[label].sigmoid()
        right = 0.4 * (1 - p) ** 1.5 * -p.log() - 0.6 * p**1.5 * -(1 - p).log()
    overlap = generalized_box_iou(to_xyxy(box[None]), to_xyxy(wanted[None]))[0, 0]
    return float(COSTS.label * right + COSTS.l1 * (box - wanted).abs().sum() - COSTS.giou * overlap)


def cost_matrix(prediction, target, b, scoring):
    queries = range(prediction.boxes.shape[1])
    return torch.tensor(
        [
            [
                cost_of(prediction.logits[b, q], prediction.boxes[b, q], target.labels[t], target.boxes[t], scoring)
                for t in range(len(target))
            ]
            for q in queries
        ]
    ).view(len(queries), len(target))


def as_set(matches: Matches):
    rows = torch.stack([matches.prediction, matches.image, matches.query, matches.target], 1).tolist()
    assert len({tuple(row) for row in rows}) == len(rows)
    return {tuple(row) for row in rows}


@pytest.mark.parametrize("scoring", SCORINGS)
def test_cost_is_that_of_the_papers(scoring):
    targets = make_targets(3, 1)
    [prediction] = make_predictions(1, 2, 4, scoring)
    cost = matching_cost(prediction, PaddedTargets.of(targets), scoring, COSTS)
    for b, target in enumerate(targets):
        torch.testing.assert_close(cost[b, :, : len(target)], cost_matrix(prediction, target, b, scoring))


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("counts", [(1, 6), (6, 2), (3, 3), (0, 4)])
def test_cheapest_of_all_assignments(scoring, counts):
    targets = make_targets(*counts)
    predictions = make_predictions(2, 2, 6, scoring)
    found = as_set(match(predictions, PaddedTargets.of(targets), scoring, COSTS))
    assert len(found) == 2 * sum(counts)
    for p, prediction in enumerate(predictions):
        for b, target in enumerate(targets):
            cost = cost_matrix(prediction, target, b, scoring)
            pairs = {(q, t) for i, j, q, t in found if (i, j) == (p, b)}
            assert {t for _, t in pairs} == set(range(len(target)))  # every object has its query
            assert len({q for q, _ in pairs}) == len(target)  # and no query has two
            cheapest = min(
                sum(cost[q, t].item() for t, q in enumerate(queries)) for queries in permutations(range(6), len(target))
            )
            assert sum(cost[q, t].item() for q, t in pairs) == pytest.approx(cheapest, abs=1e-4)


@pytest.mark.parametrize("scoring", SCORINGS)
def test_all_at_once_equals_one_at_a_time(scoring):
    targets = make_targets(7, 0, 3, 12)
    predictions = make_predictions(5, 4, 20, scoring)
    wanted = set()
    for p, prediction in enumerate(predictions):
        for b, target in enumerate(targets):
            alone = Prediction(prediction.logits[b : b + 1], prediction.boxes[b : b + 1])
            cost = matching_cost(alone, PaddedTargets.of([target]), scoring, COSTS)[0]
            wanted |= {(p, b, int(q), int(t)) for q, t in zip(*linear_sum_assignment(cost.numpy()))}
    assert as_set(match(predictions, PaddedTargets.of(targets), scoring, COSTS)) == wanted


def test_order_of_the_objects_does_not_matter():
    [target] = make_targets(6)
    predictions = make_predictions(3, 1, 9, "sigmoid")
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    shuffled = Target(target.labels[order], target.boxes[order], 0, target.size)
    plain = as_set(match(predictions, PaddedTargets.of([target]), "sigmoid", COSTS))
    moved = as_set(match(predictions, PaddedTargets.of([shuffled]), "sigmoid", COSTS))
    assert {(p, b, q, int(order[t])) for p, b, q, t in moved} == plain


def test_more_objects_than_queries():
    targets = make_targets(8, 2)
    predictions = make_predictions(2, 2, 3, "sigmoid")
    found = as_set(match(predictions, PaddedTargets.of(targets), "sigmoid", COSTS))
    for p in range(2):
        assert {q for i, b, q, _ in found if (i, b) == (p, 0)} == {0, 1, 2}  # every query has an object
        assert {t for i, b, _, t in found if (i, b) == (p, 1)} == {0, 1}
    cost = cost_matrix(predictions[0], targets[0], 0, "sigmoid")
    cheapest = min(sum(cost[q, t].item() for q, t in enumerate(ts)) for ts in permutations(range(8), 3))
    total = sum(cost[q, t].item() for i, b, q, t in found if (i, b) == (0, 0))
    assert total == pytest.approx(cheapest, abs=1e-4)


@pytest.mark.parametrize("scoring", SCORINGS)
def test_batch_without_any_object(scoring):
    targets = PaddedTargets.of(make_targets(0, 0))
    assert len(targets) == 0
    matches = match(make_predictions(3, 2, 4, scoring), targets, scoring, COSTS)
    assert as_set(matches) == set()
    assert matches.query.dtype == torch.long


def test_padding_is_never_matched():
    # The padding's label and box would suit every query perfectly, and the true object suits none.
    whole = torch.tensor([0.5, 0.5, 1.0, 1.0])
    logits = torch.full((2, 4, CLASSES), -9.0)
    logits[..., 0] = 9.0
    prediction = Prediction(logits, whole.expand(2, 4, 4).clone())
    targets = [
        Target(torch.tensor([3]), torch.tensor([[0.1, 0.1, 0.02, 0.02]]), 0, (9, 9)),
        Target(torch.full((4,), 2), torch.tensor([[0.9, 0.9, 0.02, 0.02]]).repeat(4, 1), 1, (9, 9)),
    ]
    padded = PaddedTargets.of(targets)
    assert padded.counts == [1, 4] and padded.labels.shape == (2, 4)
    found = as_set(match([prediction], padded, "sigmoid", COSTS))
    assert {t for _, b, _, t in found if b == 0} == {0}
    assert {t for _, b, _, t in found if b == 1} == {0, 1, 2, 3}


def test_one_transfer(monkeypatch):
    transfers = []

    def recorded(name):
        method = getattr(Tensor, name)
        return lambda self, *args: transfers.append((name, tuple(self.shape))) or method(self, *args)

    for name in ("cpu", "tolist", "item", "__bool__"):  # whatever would wait for the device
        monkeypatch.setattr(Tensor, name, recorded(name))
    targets = PaddedTargets.of(make_targets(3, 5))
    match(make_predictions(9, 2, 10, "sigmoid"), targets, "sigmoid", COSTS)
    assert transfers == [("cpu", (2, 90, 5))]  # all predictions of all images with all objects


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("part", ["logits", "boxes"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_named(scoring, part, value):
    predictions = make_predictions(3, 2, 4, scoring)
    getattr(predictions[1], part)[1, 2] = value
    targets = PaddedTargets.of(make_targets(2, 3))
    with pytest.raises(NonFinitePrediction, match=rf"not finite: stage1/{part}\. Lower the learning rate") as error:
        match(predictions, targets, scoring, COSTS, ["base", "stage1", "stage2"])
    assert isinstance(error.value, UserError)
    with pytest.raises(NonFinitePrediction, match=f"not finite: 1/{part}"):
        match(predictions, targets, scoring, COSTS)


def test_targets_that_are_not_finite_are_named():
    targets = make_targets(2, 3)
    targets[1].boxes[0, 2] = float("nan")
    with pytest.raises(NonFinitePrediction, match="boxes of the targets are not finite: correct the annotations"):
        match(make_predictions(1, 2, 4, "sigmoid"), PaddedTargets.of(targets), "sigmoid", COSTS)


def test_no_gradient_flows_through_the_matching():
    predictions = make_predictions(2, 2, 4, "sigmoid")
    for prediction in predictions:
        prediction.boxes.requires_grad_()
    matches = match(predictions, PaddedTargets.of(make_targets(1, 2)), "sigmoid", COSTS)
    assert not matches.query.requires_grad
