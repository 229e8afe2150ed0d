"""The checkers of notebook 05 accept what is right and name what is wrong."""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torchvision.ops import box_convert, box_iou, generalized_box_iou, sigmoid_focal_loss

from regolite import matching as package
from regolite.course import Mistake, find
from regolite.matching import Matches, MatchingCosts
from regolite.types import Prediction


def pairs(matrix):
    return [(int(q), int(t)) for q, t in zip(*linear_sum_assignment(matrix.numpy()))]


def assign(costs, counts):
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


def greedy(cost, count):
    left, found = cost[:, :count].clone(), []
    for _ in range(count):
        q, t = divmod(int(left.argmin()), count)
        found.append((q, t))
        left[q], left[:, t] = 1e9, 1e9
    return found


def doubles(boxes, labels, scores, iou, overlap=True, alike=True, better=True, count=None):
    yes = torch.ones(len(boxes), len(boxes), dtype=torch.bool)
    yes &= box_iou(boxes, boxes) > iou if overlap else yes
    yes &= labels[:, None] == labels if alike else yes
    yes &= scores[None] > scores[:, None] if better else yes
    return int(yes.sum()) if count == "pairs" else int(yes.any(1).sum())


def softmax_cost(logits, labels):
    return -logits.softmax(-1)[:, labels]


def focal_cost(formula=lambda p, positive, negative: 0.25 * positive - 0.75 * negative):
    def answer(logits, labels):
        x = logits.gather(2, labels[:, None].expand(-1, logits.shape[1], -1))
        p = x.sigmoid()
        return formula(p, (1 - p) ** 2 * -F.logsigmoid(x), p**2 * -F.logsigmoid(-x))

    return answer


def focal_by_image(logits, labels):
    rows = []
    for x, own in zip(logits, labels):
        x = x[:, own]
        rows.append(sigmoid_focal_loss(x, torch.ones_like(x)) - sigmoid_focal_loss(x, torch.zeros_like(x)))
    return torch.stack(rows)


def focal_by_log(logits, labels):
    p = logits.gather(2, labels[:, None].expand(-1, logits.shape[1], -1)).sigmoid()
    return 0.25 * (1 - p) ** 2 * -p.log() - 0.75 * p**2 * -(1 - p).log()


def iou_of(boxes, others):
    return generalized_box_iou(box_convert(boxes, "cxcywh", "xyxy"), box_convert(others, "cxcywh", "xyxy"))


def learner(
    softmax=softmax_cost,
    sigmoid=lambda x, c: focal_cost()(x[None], c[None])[0],
    l1=lambda a, b: torch.cdist(a, b, p=1),
    giou=iou_of,
    solve=lambda cost, count: pairs(cost[:, :count]),
    rows=lambda p, b, q, t: (p, b, q, t),
    weights=None,
    grad=False,
    dtype=torch.long,
    nan=False,
    raw=False,
    empty=True,
):
    """A learner's matching, layer by layer and image by image."""

    def answer(predictions, targets, scoring, costs):
        w = (costs.label, costs.l1, costs.giou)
        if weights is not None:
            w = weights if isinstance(weights, tuple) else (weights.label, weights.l1, weights.giou)
        found = []
        with torch.set_grad_enabled(grad):
            for p, prediction in enumerate(predictions):
                for b, count in enumerate(targets.counts):
                    x, boxes = prediction.logits[b], prediction.boxes[b]
                    x, boxes = (x, boxes) if raw else (x.float(), boxes.float())
                    label = (softmax if scoring == "softmax" else sigmoid)(x, targets.labels[b])
                    cost = w[0] * label + w[1] * l1(boxes, targets.boxes[b]) - w[2] * giou(boxes, targets.boxes[b])
                    cost = cost.nan_to_num(1e4) if nan else cost
                    found += [rows(p, b, q, t) for q, t in solve(cost, count)]
        if empty:
            return Matches(*torch.tensor(found, dtype=dtype).reshape(-1, 4).T)
        return Matches(*torch.stack([torch.tensor(row) for row in found], 1))

    return answer


def joint(predictions, targets, scoring, costs):
    """One query for an object among all predictions."""
    whole = Prediction(torch.cat([p.logits for p in predictions], 1), torch.cat([p.boxes for p in predictions], 1))
    found, queries = package.match([whole], targets, scoring, costs), predictions[0].boxes.shape[1]
    return Matches(found.query // queries, found.image, found.query % queries, found.target)


@torch.no_grad()
def viewed(predictions, targets, scoring, costs):
    """The joined costs [B, P Q, T], viewed as [P, B, Q, T]."""
    joined = torch.cat([package.matching_cost(p, targets, scoring, costs) for p in predictions], 1)
    joined = joined.view(len(predictions), len(joined), -1, joined.shape[2])
    counts = enumerate(targets.counts)
    rows = [(p, b, *t) for b, n in counts for p in range(len(joined)) for t in pairs(joined[p, b][:, :n])]
    return Matches(*torch.tensor(rows).reshape(-1, 4).T)


RIGHT = [
    ("5.1", softmax_cost),
    ("5.1", lambda logits, labels: -logits.softmax(1).gather(1, labels.expand(len(logits), -1))),
    ("5.2", focal_cost()),
    ("5.2", focal_by_image),
    ("5.3", torch.tensor([[0.0, 0.01], [0.01, 1.0]])),
    ("5.3", torch.tensor([[0.04, 1.0], [0.0, 0.04]])),
    ("5.3", [[0, 0.02], [0.02, 1]]),
    ("5.4", assign),
    ("5.4", lambda costs, counts: tuple(np.stack(linear_sum_assignment(c[:, :n]), 1) for c, n in zip(costs, counts))),
    ("5.5", package.match),
    ("5.5", learner()),
    ("5.6", doubles),
    ("5.6", lambda *args: torch.tensor(doubles(*args))),
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
    ("5.2", lambda logits, labels: torch.zeros(2, 6, 3), "no answer yet"),
    ("5.2", lambda logits, labels: focal_cost()(logits, labels).transpose(1, 2), "transposed"),
    ("5.2", lambda logits, labels: logits, "a cost for every class"),
    ("5.2", lambda logits, labels: -focal_cost()(logits, labels), "the sign is wrong"),
    ("5.2", focal_cost(lambda p, pos, neg: 0.25 * pos), "which a match saves, is not subtracted"),
    ("5.2", focal_cost(lambda p, pos, neg: 0.25 * pos + 0.75 * neg), "are added"),
    ("5.2", focal_cost(lambda p, pos, neg: 0.75 * pos - 0.25 * neg), "alpha is inverted"),
    ("5.2", focal_cost(lambda p, pos, neg: pos - neg), "alpha is missing"),
    ("5.2", focal_cost(lambda p, pos, neg: -0.25 * p.log() + 0.75 * (1 - p).log()), "this is the cross-entropy"),
    ("5.2", focal_cost(lambda p, pos, neg: -p), "minus the probability"),
    (
        "5.2",
        focal_cost(lambda p, pos, neg: pos * 0.25 * p**2 / (1 - p) ** 2 - neg * 0.75 * (1 - p) ** 2 / p**2),
        "the two factors are exchanged",
    ),
    ("5.2", lambda logits, labels: focal_cost()(logits, labels[:1].expand_as(labels)), "labels of the first one"),
    ("5.2", focal_by_log, "use F.logsigmoid"),
    ("5.3", torch.tensor([[0.2, 0.6], [0.5, 0.8]]), "which is optimal here"),
    ("5.3", torch.tensor([[0.1, 0.2], [0.2, 0.8]]), "the difference is 0.50, not yet 0.9"),
    ("5.3", torch.tensor([[0.0, 0.1], [0.1, 2.0]]), "between 0 and 1"),
    ("5.3", torch.tensor([[0.0, -0.1], [0.1, 1.0]]), "between 0 and 1"),
    ("5.3", torch.tensor([[0.0, 0.0], [0.0, 1.0]]), "occurs twice"),
    ("5.3", torch.zeros(3, 3), r"should have shape \(2, 2\)"),
    ("5.3", None, "is None"),
    ("5.4", lambda costs, counts: [pairs(matrix) for matrix in costs], "matched to object 3: that is padding"),
    (
        "5.4",
        lambda costs, counts: [[p for p in pairs(matrix) if p[1] < n] for matrix, n in zip(costs, counts)],
        "padding took queries that objects needed",
    ),
    ("5.4", lambda costs, counts: [each[:1] for each in assign(costs, counts)], "but 1 are matched"),
    ("5.4", greedy_batch, "a lower total is possible"),
    (
        "5.4",
        lambda costs, counts: [[(int(m[:, t].argmin()), t) for t in range(n)] for m, n in zip(costs, counts)],
        "one-to-one",
    ),
    ("5.4", lambda costs, counts: assign(costs, counts)[0], "one entry per image"),
    ("5.5", lambda *args: (1, 2, 3, 4), "return Matches"),
    ("5.5", learner(giou=lambda a, b: -iou_of(a, b)), "GIoU is added"),
    ("5.5", learner(giou=lambda a, b: 0 * iou_of(a, b)), "GIoU is missing"),
    ("5.5", learner(giou=generalized_box_iou), "GIoU takes corners"),
    ("5.5", learner(l1=lambda a, b: torch.cdist(a, b)), "Euclidean"),
    ("5.5", learner(l1=lambda a, b: (a[:, None] - b).abs().mean(-1)), "mean over the four numbers"),
    ("5.5", learner(l1=lambda a, b: 0 * torch.cdist(a, b)), "L1 is missing"),
    ("5.5", learner(softmax=lambda x, c: focal_cost()(x[None], c[None])[0]), "that of the other scoring"),
    ("5.5", learner(softmax=lambda x, c: -softmax_cost(x, c)), "the sign of the class cost"),
    ("5.5", learner(softmax=lambda x, c: -x.log_softmax(-1)[:, c]), "log probability"),
    ("5.5", learner(softmax=lambda x, c: softmax_cost(x[:, :-1], c)), "leaves out no-object"),
    ("5.5", learner(sigmoid=softmax_cost), "that of the other scoring"),
    (
        "5.5",
        learner(sigmoid=lambda x, c: focal_cost(lambda p, pos, neg: 0.25 * pos)(x[None], c[None])[0]),
        "is not subtracted",
    ),
    ("5.5", learner(sigmoid=lambda x, c: 0 * softmax_cost(x, c)), "the class cost is missing"),
    ("5.5", learner(weights=MatchingCosts(1.0, 1.0, 1.0)), "weights of `costs` are not used"),
    ("5.5", learner(weights=(2.0, 5.0, 2.0)), "the weights are"),
    ("5.5", learner(solve=greedy), "the pairs are greedy"),
    ("5.5", learner(solve=lambda c, n: [(int(c[:, t].argmin()), t) for t in range(n)]), "takes its cheapest query"),
    ("5.5", learner(solve=lambda c, n: pairs(c)), "padding was matched"),
    ("5.5", learner(solve=lambda c, n: [p for p in pairs(c) if p[1] < n]), "removed after the matching"),
    ("5.5", learner(rows=lambda p, b, q, t: (p, b, t, q)), "`query` and `target` are exchanged"),
    ("5.5", learner(rows=lambda p, b, q, t: (b, p, q, t)), "`prediction` and `image` are exchanged"),
    ("5.5", learner(rows=lambda p, b, q, t: (p, b, q + 12 * p, t)), "numbered along the joined predictions"),
    ("5.5", learner(rows=lambda p, b, q, t: (0, b, q, t)), "pair|prediction"),
    ("5.5", joint, "one query among all predictions"),
    ("5.5", viewed, "first axis is the batch"),
    ("5.5", lambda p, t, s, c: package.match([p[-1]] * len(p), t, s, c), "share the pairs of the last one"),
    ("5.5", lambda p, t, s, c: package.match(p[-1:], t, s, c), "not every prediction has pairs"),
    ("5.5", learner(grad=True), "use `torch.no_grad`"),
    ("5.5", learner(dtype=torch.int32), "indices are torch.long"),
    ("5.5", learner(nan=True), "with NaN was matched"),
    ("5.5", learner(raw=True), "convert them by `.float"),
    ("5.5", learner(empty=False), "a batch without any object raises"),
    ("5.6", lambda *args: 0, "the count is too low"),
    ("5.6", lambda *args: doubles(*args, alike=False), "boxes of different classes"),
    ("5.6", lambda *args: doubles(*args, count="pairs"), "You count pairs"),
    ("5.6", lambda *args: doubles(*args, better=False), "overlaps itself"),
    ("5.6", lambda *args: doubles(*args, overlap=False), "the overlap is not used"),
    ("5.6", lambda *args: None, "a single number"),
]


@pytest.mark.parametrize(("number", "answer"), RIGHT)
def test_right_answers_pass(number, answer):
    assert len(find(number).run(answer)) > 20


@pytest.mark.parametrize(("number", "answer", "said"), WRONG)
def test_mistakes_are_named(number, answer, said):
    with pytest.raises(Mistake, match=said):
        find(number).run(answer)


@pytest.mark.parametrize("answer", [answer for number, answer, _ in WRONG if number == "5.3"])
def test_no_right_answer_is_given_away(answer):
    """A wrong answer is not told the numbers of one that passes."""
    with pytest.raises(Mistake) as caught:
        find("5.3").run(answer)
    told = {float(number) for number in re.findall(r"\d+(?:\.\d+)?", str(caught.value))}
    for right in (torch.as_tensor(right) for number, right in RIGHT if number == "5.3"):
        assert not {round(number, 4) for number in right.flatten().tolist()} <= told
