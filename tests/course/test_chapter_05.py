"""The checkers of notebook 05 accept what is right and name what is wrong."""

from itertools import permutations

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torchvision.ops import box_iou

from regolite.course import Mistake, find


def by_scipy(cost):
    queries, objects = linear_sum_assignment(cost.numpy())
    return [int(q) for _, q in sorted(zip(objects, queries))]


def by_trial(cost):
    choices = permutations(range(cost.shape[0]), cost.shape[1])
    return min(choices, key=lambda chosen: sum(float(cost[q, t]) for t, q in enumerate(chosen)))


def pairs(matrix):
    return [(int(q), int(t)) for q, t in zip(*linear_sum_assignment(matrix.numpy()))]


def match_batch(costs, counts):
    return [pairs(matrix[:, :count]) for matrix, count in zip(costs, counts)]


def greedy_batch(costs, counts):
    found = []
    for matrix, count in zip(costs.clone(), counts):
        found.append([])
        for t in range(count):
            q = int(matrix[:, t].argmin())
            matrix[q] = 9.0
            found[-1].append((q, t))
    return found


def doubles(boxes, labels, scores, iou, overlap=True, alike=True, better=True, count=None):
    yes = torch.ones(len(boxes), len(boxes), dtype=torch.bool)
    yes &= box_iou(boxes, boxes) > iou if overlap else yes
    yes &= labels[:, None] == labels if alike else yes
    yes &= scores[None] > scores[:, None] if better else yes
    return int(yes.sum()) if count == "pairs" else int(yes.any(1).sum())


def softmax_cost(logits, labels):
    return -logits.softmax(-1)[:, labels]


RIGHT = [
    ("5.1", softmax_cost),
    ("5.1", lambda logits, labels: -logits.softmax(1).gather(1, labels.expand(len(logits), -1))),
    ("5.2", torch.tensor([[0.0, 0.01], [0.01, 1.0]])),
    ("5.2", torch.tensor([[0.04, 1.0], [0.0, 0.04]])),
    ("5.2", [[0, 0.02], [0.02, 1]]),
    ("5.3", by_scipy),
    ("5.3", by_trial),
    ("5.3", lambda cost: torch.tensor(by_scipy(cost))),
    ("5.4", match_batch),
    ("5.5", doubles),
    ("5.5", lambda *args: torch.tensor(doubles(*args))),
]

WRONG = [
    ("5.1", lambda logits, labels: torch.zeros(6, 3), "no answer yet"),
    ("5.1", lambda logits, labels: softmax_cost(logits, labels).T, "transposed"),
    ("5.1", lambda logits, labels: -softmax_cost(logits, labels), "a probable class should have a low cost"),
    ("5.1", lambda logits, labels: -logits.log_softmax(-1)[:, labels], "log probabilities"),
    ("5.1", lambda logits, labels: -logits[:, labels], "the softmax is missing"),
    ("5.1", lambda logits, labels: -logits.softmax(0)[:, labels], "over the queries, not over the classes"),
    ("5.1", lambda logits, labels: -logits[:, :-1].softmax(-1)[:, labels], "leaves out no-object"),
    ("5.1", lambda logits, labels: -logits.sigmoid()[:, labels], "sigmoids"),
    ("5.1", lambda logits, labels: -logits.softmax(-1)[:, :3], "first columns"),
    ("5.1", lambda logits, labels: 0.5 * softmax_cost(logits, labels), "the cost should be"),
    ("5.2", torch.tensor([[0.2, 0.6], [0.5, 0.8]]), "which is optimal here"),
    ("5.2", torch.tensor([[0.1, 0.2], [0.2, 0.8]]), "the difference is 0.50, not yet 0.9"),
    ("5.2", torch.tensor([[0.0, 0.1], [0.1, 2.0]]), "between 0 and 1"),
    ("5.2", torch.tensor([[0.0, 0.0], [0.0, 1.0]]), "occurs twice"),
    ("5.2", torch.zeros(3, 3), r"should have shape \(2, 2\)"),
    ("5.2", None, "is None"),
    ("5.3", lambda cost: cost.argmin(0).tolist(), "one query is matched to two objects"),
    ("5.3", lambda cost: list(range(cost.shape[1])), "is possible"),
    ("5.3", lambda cost: by_scipy(cost)[:-1], "one query for each object"),
    ("5.3", lambda cost: [99] * cost.shape[1], "there is no query 99"),
    ("5.3", lambda cost: None, "a list of queries, but is None"),
    ("5.4", lambda costs, counts: [pairs(matrix) for matrix in costs], "matched to object 3: that is padding"),
    (
        "5.4",
        lambda costs, counts: [[p for p in pairs(matrix) if p[1] < n] for matrix, n in zip(costs, counts)],
        "padding took queries that objects needed",
    ),
    ("5.4", lambda costs, counts: [each[:1] for each in match_batch(costs, counts)], "but 1 are matched"),
    ("5.4", greedy_batch, "is possible"),
    ("5.4", lambda costs, counts: match_batch(costs, counts)[0], "one entry per image"),
    ("5.5", lambda *args: 0, "there are 2 duplicates among 7 detections, not 0"),
    ("5.5", lambda *args: doubles(*args, alike=False), "boxes of different classes"),
    ("5.5", lambda *args: doubles(*args, count="pairs"), "You count pairs"),
    ("5.5", lambda *args: doubles(*args, better=False), "overlaps itself"),
    ("5.5", lambda *args: doubles(*args, overlap=False), "the overlap is not used"),
    ("5.5", lambda *args: None, "a single number"),
]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize(("number", "answer"), RIGHT)
def test_right_answers_pass(number, answer):
    assert len(find(number).checker(answer)) > 20


@pytest.mark.parametrize(("number", "answer", "said"), WRONG)
def test_mistakes_are_named(number, answer, said):
    with pytest.raises(Mistake, match=said):
        find(number).checker(answer)
