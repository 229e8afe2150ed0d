"""Checkers of notebook 05: Hungarian matching."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import permutations
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from regolite.boxes import box_iou
from regolite.course import Mistake, close, exercise, same_shape


@exercise(
    "5.1",
    "Which axis of the logits do the classes lie on? There the softmax runs, no-object included.",
    "probabilities[:, labels] picks one column for each object: [Q, K + 1] and [T] give [Q, T].",
    "return -logits.softmax(-1)[:, labels]",
)
def softmax_cost(answer: Callable[[Tensor, Tensor], Tensor]) -> str:
    """Minus the probability of each object's class."""
    logits, labels = 2 * torch.randn(6, 5), torch.tensor([3, 0, 3])
    found = answer(logits, labels)
    if isinstance(found, Tensor) and found.shape == (3, 6):
        raise Mistake("the matrix lies on its side, [T, Q]: rows are queries and columns are objects.")
    same_shape("softmax_cost(logits, labels)", found, (6, 3))
    p = logits.softmax(-1)
    known = {
        "every cost is 0: there is no answer yet.": torch.zeros(6, 3),
        "the sign is wrong: a probable class should be cheap.": p[:, labels],
        "these are log probabilities. The cost is the probability itself, with a minus.": -p[:, labels].log(),
        "these are logits: the softmax is missing.": -logits[:, labels],
        "the softmax runs over the queries, not over the classes.": -logits.softmax(0)[:, labels],
        "the softmax leaves out no-object, the last column: a query that is sure to see nothing would look "
        "sure of some class.": -logits[:, :-1].softmax(-1)[:, labels],
        "these are sigmoids, as in Deformable DETR. DETR's classes share one softmax.": -logits.sigmoid()[:, labels],
        "these are the first columns. Take the columns of the objects' labels.": -p[:, :3],
    }
    for said, wrong in known.items():
        if torch.allclose(found.detach().float(), wrong, atol=1e-5):
            raise Mistake(said)
    close("the cost", found, -p[:, labels])
    return "Two objects of one class have the same column: the boxes will have to tell them apart."


@exercise(
    "5.2",
    "Greed takes the smallest number first. What is the worst that can be left to it then?",
    "Make the smallest number a bait: after it, only the corner across is left. That corner should cost 1.",
    "0 at one corner, 1 across from it, and two numbers slightly above 0 at the other corners.",
)
def trap(answer: Any) -> str:
    """A matrix on which greed loses."""
    if isinstance(answer, (list, tuple)):
        answer = torch.tensor(answer, dtype=torch.float)
    same_shape("the matrix", answer, (2, 2))
    cost = answer.detach().cpu().double()
    if not cost.isfinite().all() or cost.min() < 0 or cost.max() > 1:
        raise Mistake("all costs should lie between 0 and 1.")
    first = int(cost.argmin())
    taken = float(cost.flatten()[first])
    if int((cost == taken).sum()) > 1:
        raise Mistake("the smallest number stands there twice, so what greed takes is chance. Make one the smallest.")
    diagonal, across = float(cost.diagonal().sum()), float(cost.flip(1).diagonal().sum())
    paid = diagonal if first in (0, 3) else across
    lost = paid - min(diagonal, across)
    if lost <= 0:
        raise Mistake(f"greed pays {paid:.2f}, and that is optimal here: the other assignment costs no less.")
    if lost < 0.9 - 1e-6:
        raise Mistake(f"greed pays {paid:.2f} and the optimum is {paid - lost:.2f}: it loses {lost:.2f}, not yet 0.9.")
    return f"Greed pays {paid:.2f} where {paid - lost:.2f} would do: one bait, and the rest of the bill comes after it."


@exercise(
    "5.3",
    "itertools.permutations(range(5), 3) gives every way to choose 3 of 5 in order.",
    "Read such a choice as the queries of objects 0, 1, 2, and add up cost[query, object].",
    "min(permutations(range(Q), T), key=lambda queries: sum(cost[q, t] for t, q in enumerate(queries)))",
)
def cheapest_queries(answer: Callable[[Tensor], Sequence[int]]) -> str:
    """The cheapest queries of all objects, by trial."""
    for queries, objects in ((3, 3), (5, 3), (6, 2), (4, 1)):
        cost = torch.rand(queries, objects)
        cost[0] *= 0.1  # everybody's favorite
        where = f"for {queries} queries and {objects} objects"
        found = answer(cost.clone())
        if found is None:
            raise Mistake("nothing is returned: a list of queries is wanted.")
        found = [int(q) for q in found]
        if len(found) != objects:
            raise Mistake(f"{where} the list has {len(found)} entries: one query for each object is wanted.")
        if not all(0 <= q < queries for q in found):
            raise Mistake(f"{where} there is no query {next(q for q in found if not 0 <= q < queries)}.")
        if len(set(found)) < objects:
            raise Mistake(f"{where} one query answers for two objects: each object took its own cheapest.")
        paid = sum(float(cost[q, t]) for t, q in enumerate(found))
        cheapest = min(
            sum(float(cost[q, t]) for t, q in enumerate(each)) for each in permutations(range(queries), objects)
        )
        if paid > cheapest + 1e-5:
            swapped = sum(float(cost[q, t]) for t, q in enumerate(sorted(found)))
            also = " (the order is that of the objects, not of the queries)" if swapped < paid else ""
            raise Mistake(f"{where} your choice costs {paid:.3f}, and {cheapest:.3f} is possible{also}.")
    return "It agrees with trial over all choices; scipy gives the same without trying them."


@exercise(
    "5.4",
    "What do the columns from counts[b] on stand for?",
    "Cut them off before the matching: they are not expensive objects, they are none.",
    "[optimal(matrix[:, :count]) for matrix, count in zip(costs, counts)]",
)
def match_batch(answer: Callable[[Tensor, Sequence[int]], Any]) -> str:
    """The matching of a padded batch."""
    counts = [3, 1, 0, 4]
    costs = torch.rand(4, 6, 4)
    for b, count in enumerate(counts):
        costs[b, :, count:] -= 1.0  # padding that suits every query
    found = answer(costs.clone(), list(counts))
    if not isinstance(found, (list, tuple)) or len(found) != len(counts):
        raise Mistake("a list with one entry an image is wanted.")
    for b, (pairs, count) in enumerate(zip(found, counts)):
        pairs = sorted((int(q), int(t)) for q, t in pairs)
        if any(t >= count for _, t in pairs):
            t = next(t for _, t in pairs if t >= count)
            raise Mistake(f"image {b} has {count} objects, and a query was given to object {t}: that is padding.")
        if len(pairs) < count:
            raise Mistake(
                f"image {b} has {count} objects, and {len(pairs)} are matched: the queries that padding took are "
                "missing. Leave padding out before the matching, not after it."
            )
        wanted = costs[b, :, :count]
        best = float(wanted[linear_sum_assignment(wanted.numpy())].sum()) if count else 0.0
        paid = sum(float(wanted[q, t]) for q, t in pairs)
        if paid > best + 1e-5:
            raise Mistake(
                f"the pairs of image {b} cost {paid:.3f}, and {best:.3f} is possible: padding took queries that "
                "objects needed."
            )
    return "Padding is cut off before the matching, and an image without objects has no pairs."


@exercise(
    "5.5",
    "box_iou(boxes_xyxy, boxes_xyxy) has all pairs, [N, N]. Compare labels and scores in the same form.",
    "labels[:, None] == labels[None] and scores[None] > scores[:, None] are [N, N] too.",
    "A detection is a double if any entry of its row is True in all three: any(1), then count.",
)
def doubles(answer: Callable[[Tensor, Tensor, Tensor, float], int]) -> str:
    """How many detections sit on a better one of the same class."""
    square = torch.tensor([0.0, 0.0, 10.0, 10.0])
    slide = torch.tensor([0.0, 2.0, 4.0, 5.0, 30.0, 31.0, 60.0])
    boxes = square + slide[:, None] * torch.tensor([1.0, 0.0, 1.0, 0.0])
    labels, scores = torch.tensor([1, 1, 1, 2, 4, 3, 5]), torch.tensor([0.9, 0.8, 0.7, 0.95, 0.5, 0.6, 0.4])
    for turn in (torch.arange(7), torch.tensor([3, 2, 6, 0, 5, 1, 4])):
        for iou in (0.5, 0.3, 0.9):
            args = boxes[turn], labels[turn], scores[turn]
            found = answer(*args, iou)
            if not isinstance(found, (int, float, Tensor)) or (isinstance(found, Tensor) and found.numel() != 1):
                raise Mistake("a single number is wanted.")
            found = int(found)
            overlap = box_iou(args[0], args[0]) > iou
            alike, better = args[1][:, None] == args[1], args[2][None] > args[2][:, None]
            wanted = int((overlap & alike & better).any(1).sum())
            if found == wanted:
                continue
            where = f"with an IoU above {iou:g} there are {wanted} doubles among 7 detections, not {found}"
            if found == int((overlap & better).any(1).sum()):
                raise Mistake(f"{where}: boxes of different classes are no doubles of each other.")
            if found == int((overlap & alike & better).sum()):
                raise Mistake(f"{where}: a detection below two better ones counts once. You count pairs.")
            if found == int((overlap & alike).any(1).sum()):
                raise Mistake(f"{where}: each box overlaps itself. Only a higher score makes another one a double.")
            if found == int((alike & better).any(1).sum()):
                raise Mistake(f"{where}: the overlap plays no part.")
            raise Mistake(f"{where}.")
    return "It counts every detection that a better one of its class covers."
