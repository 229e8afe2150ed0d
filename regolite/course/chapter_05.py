"""Checkers of notebook 05: Hungarian matching."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from regolite import matching as package
from regolite.boxes import box_iou, generalized_box_iou, to_xyxy
from regolite.course import Mistake, close, exercise, same_shape
from regolite.matching import MatchingCosts, PaddedTargets
from regolite.types import Prediction, Target


@exercise(
    "5.1",
    "Which axis of the logits are the classes? Take the softmax over it, no-object included.",
    "probabilities[:, labels] picks one column for each object: [Q, K + 1] and [T] give [Q, T].",
    "return -logits.softmax(-1)[:, labels]",
)
def softmax_cost(answer: Callable[[Tensor, Tensor], Tensor]) -> str:
    """Minus the probability of each object's class."""
    logits, labels = 2 * torch.randn(6, 5), torch.tensor([3, 0, 3])
    found = answer(logits, labels)
    if isinstance(found, Tensor) and found.shape == (3, 6):
        raise Mistake("the matrix is transposed, [T, Q]: rows are queries and columns are objects.")
    same_shape("softmax_cost(logits, labels)", found, (6, 3))
    p = logits.softmax(-1)
    known = {
        "every cost is 0: there is no answer yet.": torch.zeros(6, 3),
        "the sign is wrong: a probable class should have a low cost.": p[:, labels],
        "these are log probabilities. The cost is minus the probability itself.": -p[:, labels].log(),
        "these are logits: the softmax is missing.": -logits[:, labels],
        "the softmax is over the queries, not over the classes.": -logits.softmax(0)[:, labels],
        "the softmax leaves out no-object, the last column: a query that predicts no object would have a high "
        "probability of some class.": -logits[:, :-1].softmax(-1)[:, labels],
        "these are sigmoids, as in Deformable DETR. DETR's classes share one softmax.": -logits.sigmoid()[:, labels],
        "these are the first columns. Take the columns of the objects' labels.": -p[:, :3],
    }
    for said, wrong in known.items():
        if torch.allclose(found.detach().float(), wrong, atol=1e-5):
            raise Mistake(said)
    close("the cost", found, -p[:, labels])
    return "Two objects of one class have the same column: only the boxes distinguish them."


@exercise(
    "5.2",
    "Select first: `logits.gather(2, columns)` with `columns` of shape [B, Q, T] gives each object's logit x.",
    "log p is `F.logsigmoid(x)`, and log (1 - p) is `F.logsigmoid(-x)`.",
    "columns = labels[:, None].expand(-1, logits.shape[1], -1); the cost is the loss as a positive minus that as a "
    "negative.",
)
def focal_cost(answer: Callable[[Tensor, Tensor], Tensor]) -> str:
    """The change of the focal loss if a query were matched with an object, for a batch."""
    logits, labels = 2 * torch.randn(2, 6, 4), torch.tensor([[3, 0, 3], [1, 2, 0]])
    found = answer(logits.clone(), labels.clone())
    if isinstance(found, Tensor) and found.shape == (2, 3, 6):
        raise Mistake("the matrices are transposed, [B, T, Q]: rows are queries and columns are objects.")
    if isinstance(found, Tensor) and found.shape == (2, 6, 4):
        raise Mistake("this is a cost for every class, [B, Q, K]; select the columns of the objects' labels.")
    same_shape("focal_cost(logits, labels)", found, (2, 6, 3))
    x = logits.gather(2, labels[:, None].expand(-1, 6, -1))
    p = x.sigmoid()
    positive, negative = (1 - p) ** 2 * -p.log(), p**2 * -(1 - p).log()
    first = logits[:, :, labels[0]].sigmoid()
    known = {
        "every cost is 0: there is no answer yet.": torch.zeros_like(x),
        "the sign is wrong: a probable class should have a low cost.": 0.75 * negative - 0.25 * positive,
        "the loss as a negative, which a match saves, is not subtracted.": 0.25 * positive,
        "the two parts are added. The loss as a negative is what a match saves: subtract it.": 0.25 * positive
        + 0.75 * negative,
        "alpha is inverted: 0.25 belongs to positives, 0.75 to negatives.": 0.75 * positive - 0.25 * negative,
        "alpha is missing: 0.25 for a positive, 0.75 for a negative.": positive - negative,
        "the factors (1 - p)^2 and p^2 are missing: this is the cross-entropy.": -0.25 * p.log() + 0.75 * (1 - p).log(),
        "the two factors are exchanged: (1 - p)^2 belongs to -log p, p^2 to -log(1 - p).": -0.25 * p**2 * p.log()
        + 0.75 * (1 - p) ** 2 * (1 - p).log(),
        "this is minus the probability, DETR's cost. The focal cost is the difference of two losses.": -p,
        "both images have the labels of the first one; every image has its own.": 0.25 * (1 - first) ** 2 * -first.log()
        - 0.75 * first**2 * -(1 - first).log(),
    }
    for said, wrong in known.items():
        if torch.allclose(found.detach().float(), wrong, atol=1e-5):
            raise Mistake(said)
    close("the cost", found, 0.25 * positive - 0.75 * negative)
    far = answer(torch.tensor([[[200.0, -200.0]]]), torch.tensor([[0, 1]]))
    if not far.isfinite().all():
        raise Mistake(
            "at a logit of 200 or -200 the cost is infinite or NaN: use F.logsigmoid, not the log of a sigmoid."
        )
    close("the cost at a logit of 200", far[0, 0], torch.tensor([-150.0, 50.0]), 1e-2)
    return "It is finite for extreme logits, and negative where the query already predicts the class."


@exercise(
    "5.3",
    "The greedy algorithm takes the smallest number first. What is the worst remaining choice?",
    "After the smallest number only the opposite corner is left. That corner should cost 1.",
    "0 in one corner, 1 in the opposite one, and two numbers slightly above 0 in the other corners.",
)
def trap(answer: Any) -> str:
    """A matrix on which greedy matching is not optimal."""
    if isinstance(answer, (list, tuple)):
        answer = torch.tensor(answer, dtype=torch.float)
    same_shape("the matrix", answer, (2, 2))
    cost = answer.detach().cpu().double()
    if not cost.isfinite().all() or cost.min() < 0 or cost.max() > 1:
        raise Mistake("all costs should lie between 0 and 1.")
    first = int(cost.argmin())
    taken = float(cost.flatten()[first])
    if int((cost == taken).sum()) > 1:
        raise Mistake("the smallest number occurs twice, so the greedy choice is ambiguous. Make one the smallest.")
    diagonal, opposite = float(cost.diagonal().sum()), float(cost.flip(1).diagonal().sum())
    greedy = diagonal if first in (0, 3) else opposite
    excess = greedy - min(diagonal, opposite)
    if excess <= 0:
        raise Mistake(f"the greedy cost is {greedy:.2f}, which is optimal here: the other assignment costs no less.")
    if excess < 0.9 - 1e-6:
        raise Mistake(
            f"the greedy cost is {greedy:.2f} and the optimum {greedy - excess:.2f}: the difference is {excess:.2f}, "
            "not yet 0.9."
        )
    return f"Greedy costs {greedy:.2f}, the optimum {greedy - excess:.2f}: the cheapest pair forces an expensive one."


@exercise(
    "5.4",
    "What are the columns from counts[b] on?",
    "Cut them off before the matching: they are not expensive objects, but no objects.",
    "linear_sum_assignment(matrix[:, :count].numpy()) returns two arrays, queries and objects; zip pairs them.",
)
def assign(answer: Callable[[Tensor, Sequence[int]], Any]) -> str:
    """The matching of a padded batch."""
    counts = [3, 1, 0, 4]
    costs = torch.rand(4, 6, 4)
    for b, count in enumerate(counts):
        costs[b, :, count:] -= 1.0  # padding that is cheap for every query
    found = answer(costs.clone(), list(counts))
    if not isinstance(found, (list, tuple)) or len(found) != len(counts):
        raise Mistake("the answer should be a list with one entry per image.")
    for b, (pairs, count) in enumerate(zip(found, counts)):
        pairs = sorted((int(q), int(t)) for q, t in pairs)
        if any(t >= count for _, t in pairs):
            t = next(t for _, t in pairs if t >= count)
            raise Mistake(f"image {b} has {count} objects, but a query was matched to object {t}: that is padding.")
        if any(len({pair[side] for pair in pairs}) < len(pairs) for side in (0, 1)):
            raise Mistake(f"in image {b} a query or an object occurs in two pairs: the matching is one-to-one.")
        if len(pairs) < count:
            raise Mistake(
                f"image {b} has {count} objects, but {len(pairs)} are matched: others lost their queries to padding. "
                "Remove padding before the matching, not after it."
            )
        wanted = costs[b, :, :count]
        best = float(wanted[linear_sum_assignment(wanted.numpy())].sum()) if count else 0.0
        total = sum(float(wanted[q, t]) for q, t in pairs)
        if total > best + 1e-5:
            raise Mistake(
                f"the pairs of image {b} cost {total:.3f}, and a lower total is possible: padding took queries that "
                "objects needed, or the pairs are not optimal."
            )
    return "Padding is removed before the matching, and an image without objects has no pairs."


@exercise(
    "5.5",
    "torch.cat(..., 1) of the predictions' logits and boxes joins them along the queries: [B, P Q, K], [B, P Q, 4].",
    "`torch.vmap(generalized_box_iou)` works on a batch of corners. After `.cpu()`, reshape to [B, P, Q, T].",
    "Loop over p and b: linear_sum_assignment(cost[b, p, :, :targets.counts[b]]). Collect (p, b, q, t) as rows of a "
    "list, and make a tensor of shape [M, 4] of it; its columns are the four fields of Matches.",
)
def match(answer: Callable[..., Any]) -> str:
    """The matching of several predictions of a batch."""
    weights = MatchingCosts(label=1.5, l1=3.0, giou=4.0)
    trials = (
        ("softmax", MatchingCosts(10.0)), ("softmax", MatchingCosts(1.0)), ("sigmoid", MatchingCosts()),
        ("sigmoid", weights),
    )  # fmt: skip
    for scoring, costs in trials:
        _compare(answer, *_case(scoring), scoring, costs)
    predictions, targets = _case("sigmoid")
    few = [Prediction(p.logits[:, :3], p.boxes[:, :3]) for p in predictions]
    _compare(answer, few, targets, "sigmoid", MatchingCosts(), "with fewer queries than objects ")
    nothing = PaddedTargets(targets.labels[:, :0], targets.boxes[:, :0], [0, 0, 0])
    try:
        found = answer(predictions, nothing, "sigmoid", MatchingCosts())
    except Exception as error:  # the learner's error is explained
        raise Mistake(f"a batch without any object raises {type(error).__name__}; it should have no pairs.") from error
    if _rows(found):
        raise Mistake("a batch without any object has pairs.")
    half = [Prediction(p.logits.bfloat16(), p.boxes.bfloat16()) for p in predictions]
    try:
        found = answer(half, targets, "sigmoid", MatchingCosts())
    except RuntimeError as error:
        raise Mistake(f"predictions in half precision raise an error ({error}): convert them by `.float()`.") from error
    _same(found, package.match(half, targets, "sigmoid", MatchingCosts()), "in half precision ")
    _refuses_nan(answer, predictions, targets)
    return "All predictions of all images are matched, each on its own, with one transfer to the CPU."


def _case(scoring: str) -> tuple[list[Prediction], PaddedTargets]:
    """Three predictions of a batch of three images with 5, 0 and 9 objects."""
    columns = 5 if scoring == "sigmoid" else 6
    predictions = [
        Prediction(
            2 * torch.randn(3, 12, columns),
            torch.cat([torch.rand(3, 12, 2) * 0.6 + 0.2, torch.rand(3, 12, 2) ** 2 * 0.5 + 0.05], 2),
        )
        for _ in range(3)
    ]
    counts = [5, 0, 9]
    boxes = [torch.cat([torch.rand(n, 2) * 0.6 + 0.2, torch.rand(n, 2) ** 2 * 0.5 + 0.05], 1) for n in counts]
    objects = [Target(torch.randint(5, (len(b),)), b, i, (100, 100)) for i, b in enumerate(boxes)]
    return predictions, PaddedTargets.of(objects)


def _compare(
    answer: Callable[..., Any],
    predictions: list[Prediction],
    targets: PaddedTargets,
    scoring: str,
    costs: MatchingCosts,
    where: str = "",
) -> None:
    """Raise a Mistake if the learner's pairs are not the package's."""
    learned = [Prediction(p.logits.clone().requires_grad_(), p.boxes.clone().requires_grad_()) for p in predictions]
    try:
        found = answer(learned, targets, scoring, costs)
    except RuntimeError as error:
        if "requires grad" in str(error):
            raise Mistake("the predictions have a gradient, and pairs have none: use `torch.no_grad`.") from error
        raise
    except ValueError as error:
        if "invalid numeric" in str(error):
            raise Mistake("the cost has NaN or infinite values: GIoU takes corners, x1 <= x2.") from error
        raise
    wanted = package.match(predictions, targets, scoring, costs)
    if where or set(_rows(found)) == set(_rows(wanted)):
        return _same(found, wanted, where)
    for said, options in _KNOWN:
        if set(_rows(found)) == _wrong(predictions, targets, scoring, costs, **options):
            raise Mistake(f"with scoring={scoring!r} {said}")
    return _same(found, wanted, f"with scoring={scoring!r} ")


def _rows(found: Any) -> list[tuple[int, ...]]:
    """The pairs as rows (prediction, image, query, target)."""
    if not isinstance(found, package.Matches):
        raise Mistake(f"return Matches(prediction, image, query, target), not {type(found).__name__}.")
    columns = (found.prediction, found.image, found.query, found.target)
    for name, column in zip(("prediction", "image", "query", "target"), columns):
        if not isinstance(column, Tensor) or column.ndim != 1 or len(column) != len(columns[0]):
            raise Mistake(f"`{name}` should be a tensor with one entry for each pair.")
        if column.dtype != torch.long and len(column):
            raise Mistake(f"`{name}` has type {column.dtype}; indices are torch.long.")
    return [tuple(int(v) for v in row) for row in zip(*(column.tolist() for column in columns))]


def _same(found: Any, wanted: package.Matches, where: str) -> None:
    """Raise a Mistake that says how the pairs differ from the package's."""
    rows, right = _rows(found), _rows(wanted)
    if not rows:
        raise Mistake(f"{where}there are no pairs at all.")
    if sorted(rows) == sorted(right):
        return
    if len(set(rows)) < len(rows):
        raise Mistake(f"{where}a pair occurs twice.")
    swapped = {
        "`query` and `target` are exchanged": {(p, b, t, q) for p, b, q, t in rows},
        "`prediction` and `image` are exchanged": {(b, p, q, t) for p, b, q, t in rows},
    }
    for said, turned in swapped.items():
        if turned == set(right):
            raise Mistake(f"{where}{said}.")
    counts = Counter((p, b) for p, b, _, _ in right)
    for name, n in (("prediction", 0), ("image", 1), ("query", 2)):
        most = {"prediction": 3, "image": 3, "query": 12}[name]
        if any(not 0 <= row[n] < most for row in rows):
            raise Mistake(f"{where}an index of `{name}` is {max(row[n] for row in rows)}, but there are {most}.")
    if any((p, b) not in counts for p, b, _, _ in rows):
        raise Mistake(f"{where}an image without objects has pairs: padding was matched.")
    objects = {b: max(t for _, i, _, t in right if i == b) + 1 for _, b in counts}
    if any(t >= objects[b] for _, b, _, t in rows):
        raise Mistake(f"{where}queries are matched with padding: cut it off by `targets.counts`.")
    missing = [key for key in counts if key not in {(p, b) for p, b, _, _ in rows}]
    if missing and {p for p, *_ in rows} != {0, 1, 2}:
        raise Mistake(f"{where}not every prediction has pairs: each of the three is matched with the objects.")
    own = Counter((p, b) for p, b, _, _ in rows)
    if own != counts:
        raise Mistake(
            f"{where}the numbers of pairs are wrong: each prediction of an image has as many as the image has objects, "
            "or as there are queries if these are fewer. Match every prediction on its own, without padding."
        )
    if any(len({(p, b, row[n]) for row in rows for p, b in [row[:2]]}) < len(rows) for n in (2, 3)):
        raise Mistake(f"{where}a query or an object occurs in two pairs of a prediction: the matching is one-to-one.")
    raise Mistake(f"{where}the pairs do not have the lowest total cost.")


def _refuses_nan(answer: Callable[..., Any], predictions: list[Prediction], targets: PaddedTargets) -> None:
    """Raise a Mistake if predictions with NaN are matched."""
    broken = [Prediction(p.logits.clone(), p.boxes.clone()) for p in predictions]
    broken[1].boxes[0, 2, 1] = math.nan
    try:
        answer(broken, targets, "sigmoid", MatchingCosts())
    except Exception:
        return
    raise Mistake("a prediction with NaN was matched. Training has diverged there: raise an error.")


_KNOWN: tuple[tuple[str, dict[str, Any]], ...] = (
    ("GIoU is added; a large overlap should make a pair cheap.", {"giou": "added"}),
    ("GIoU is missing.", {"giou": "missing"}),
    ("GIoU takes corners; the boxes are center, width and height.", {"giou": "centers"}),
    ("the distance of the boxes is Euclidean; L1 is `p=1`.", {"l1": "euclidean"}),
    ("L1 is a mean over the four numbers of a box; it is their sum.", {"l1": "mean"}),
    ("L1 is missing.", {"l1": "missing"}),
    ("the class cost is missing.", {"label": "missing"}),
    ("the sign of the class cost is wrong: a probable class should be cheap.", {"label": "sign"}),
    ("the class cost is that of the other scoring.", {"label": "other"}),
    ("the class cost is a log probability. It is the probability itself.", {"label": "log"}),
    ("the softmax leaves out no-object.", {"label": "no_object"}),
    ("the loss as a negative is not subtracted from the class cost.", {"label": "positive"}),
    ("every image has the labels of the first one.", {"label": "first"}),
    ("the weights of `costs` are not used.", {"weights": MatchingCosts(1.0, 1.0, 1.0)}),
    ("the weights are fixed numbers; use those of `costs`.", {"weights": MatchingCosts()}),
    ("the pairs are greedy: use linear_sum_assignment.", {"solver": "greedy"}),
    ("each object takes its cheapest query, and one query may have several objects.", {"solver": "nearest"}),
    ("each query takes its cheapest object; the matching is one-to-one.", {"solver": "queries"}),
    ("all predictions share the pairs of the last one.", {"solver": "last"}),
    ("padding is removed after the matching, when it has already taken queries.", {"solver": "after"}),
    ("each object gets one query among all predictions. Every prediction needs pairs of its own.", {"solver": "joint"}),
    ("the joined costs are viewed as [P, B, Q, T]; their first axis is the batch: [B, P, Q, T].", {"solver": "view"}),
    ("a query is numbered along the joined predictions; count from 0 in each.", {"solver": "numbers"}),
)


def _wrong(
    predictions: list[Prediction],
    targets: PaddedTargets,
    scoring: str,
    costs: MatchingCosts,
    label: str = "",
    l1: str = "",
    giou: str = "",
    solver: str = "",
    weights: MatchingCosts | None = None,
) -> set[tuple[int, ...]]:
    """The pairs of a known mistake."""
    costs = weights or costs
    rows: set[tuple[int, ...]] = set()
    all_costs = [_wrong_cost(p, targets, scoring, costs, label, l1, giou).numpy() for p in predictions]
    queries = all_costs[0].shape[1]
    if solver == "view":  # [B, P Q, T] split in the wrong order
        joined = np.concatenate(all_costs, 1)
        all_costs = list(joined.reshape(len(predictions), len(joined), queries, joined.shape[2]))
    for b, count in enumerate(targets.counts):
        if solver == "joint":
            joined = np.concatenate([cost[b, :, :count] for cost in all_costs])
            rows |= {(q // queries, b, q % queries, t) for q, t in zip(*_ints(linear_sum_assignment(joined)))}
            continue
        for p, cost in enumerate(all_costs):
            matrix = (all_costs[-1] if solver == "last" else cost)[b, :, : None if solver == "after" else count]
            pairs = _solve(matrix, solver)
            offset = p * queries if solver == "numbers" else 0
            rows |= {(p, b, q + offset, t) for q, t in pairs if t < count}
    return rows


def _solve(matrix: np.ndarray, solver: str) -> list[tuple[int, int]]:
    if solver == "nearest":
        return [(int(q), t) for t, q in enumerate(matrix.argmin(0))]
    if solver == "queries":
        return [(q, int(t)) for q, t in enumerate(matrix.argmin(1))] if matrix.shape[1] else []
    if solver == "greedy":
        left, pairs = matrix.copy(), []
        for _ in range(min(matrix.shape)):
            q, t = (int(v) for v in np.unravel_index(left.argmin(), left.shape))
            pairs.append((q, t))
            left[q], left[:, t] = np.inf, np.inf
        return pairs
    return list(zip(*_ints(linear_sum_assignment(matrix))))


def _ints(sides: tuple[np.ndarray, np.ndarray]) -> list[list[int]]:
    return [side.tolist() for side in sides]


def _wrong_cost(
    prediction: Prediction,
    targets: PaddedTargets,
    scoring: str,
    costs: MatchingCosts,
    label: str,
    l1: str,
    giou: str,
) -> Float[Tensor, "B Q T"]:
    """The cost with a known mistake in one of its parts."""
    logits, boxes = prediction.logits, prediction.boxes
    labels = targets.labels[:1].expand_as(targets.labels) if label == "first" else targets.labels
    columns = labels[:, None].expand(-1, logits.shape[1], -1)
    x = logits.gather(2, columns)
    p = x.sigmoid()
    positive, negative = 0.25 * (1 - p) ** 2 * -p.log(), 0.75 * p**2 * -(1 - p).log()
    probability = logits.softmax(-1).gather(2, columns)
    is_softmax = (scoring == "softmax") != (label == "other")
    cost = -probability if is_softmax else positive - negative
    if label in ("missing", "sign"):
        cost = cost * (0 if label == "missing" else -1)
    elif label == "log":
        cost = -(probability if is_softmax else p).log()
    elif label == "positive":
        cost = cost if is_softmax else positive
    elif label == "no_object" and is_softmax:
        cost = -logits[..., :-1].softmax(-1).gather(2, columns.clamp(max=logits.shape[2] - 2))
    distance = torch.cdist(boxes, targets.boxes, p=2.0 if l1 == "euclidean" else 1.0)
    distance = distance * {"mean": 0.25, "missing": 0.0}.get(l1, 1.0)
    corners = (boxes, targets.boxes) if giou == "centers" else (to_xyxy(boxes), to_xyxy(targets.boxes))
    overlap = torch.stack([generalized_box_iou(one, other) for one, other in zip(*corners)])
    overlap = overlap.nan_to_num(0.0, 0.0, 0.0) * {"added": -1.0, "missing": 0.0}.get(giou, 1.0)
    return costs.label * cost + costs.l1 * distance - costs.giou * overlap


@exercise(
    "5.6",
    "box_iou(boxes_xyxy, boxes_xyxy) has all pairs, [N, N]. Compare labels and scores in the same form.",
    "labels[:, None] == labels[None] and scores[None] > scores[:, None] are [N, N] too.",
    "A detection is a duplicate if any entry of its row is True in all three: any(1), then count.",
)
def doubles(answer: Callable[[Tensor, Tensor, Tensor, float], int]) -> str:
    """Number of detections that duplicate a higher-scoring one of the same class."""
    square = torch.tensor([0.0, 0.0, 10.0, 10.0])
    slide = torch.tensor([0.0, 2.0, 4.0, 5.0, 30.0, 31.0, 60.0])
    boxes = square + slide[:, None] * torch.tensor([1.0, 0.0, 1.0, 0.0])
    labels, scores = torch.tensor([1, 1, 1, 2, 4, 3, 5]), torch.tensor([0.9, 0.8, 0.7, 0.95, 0.5, 0.6, 0.4])
    for turn in (torch.arange(7), torch.tensor([3, 2, 6, 0, 5, 1, 4])):
        for iou in (0.5, 0.3, 0.9):
            args = boxes[turn], labels[turn], scores[turn]
            found = answer(*args, iou)
            if not isinstance(found, (int, float, Tensor)) or (isinstance(found, Tensor) and found.numel() != 1):
                raise Mistake("the answer should be a single number.")
            found = int(found)
            overlap = box_iou(args[0], args[0]) > iou
            alike, better = args[1][:, None] == args[1], args[2][None] > args[2][:, None]
            wanted = int((overlap & alike & better).any(1).sum())
            if found == wanted:
                continue
            where = f"with an IoU above {iou:g} the count is too {'high' if found > wanted else 'low'}"
            if found == int((overlap & better).any(1).sum()):
                raise Mistake(f"{where}: boxes of different classes are not duplicates.")
            if found == int((overlap & alike & better).sum()):
                raise Mistake(f"{where}: a detection with two better ones counts once. You count pairs.")
            if found == int((overlap & alike).any(1).sum()):
                raise Mistake(
                    f"{where}: each box overlaps itself. Only a box with a higher score makes it a duplicate."
                )
            if found == int((alike & better).any(1).sum()):
                raise Mistake(f"{where}: the overlap is not used.")
            raise Mistake(f"{where}: a duplicate needs all three conditions, and counts once.")
    return "It counts every detection that overlaps a better one of its class."
