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
    "5.3",
    "itertools.permutations(range(5), 3) gives every way to choose 3 of 5 in order.",
    "Each choice is the queries of objects 0, 1, 2; sum cost[query, object].",
    "min(permutations(range(Q), T), key=lambda queries: sum(cost[q, t] for t, q in enumerate(queries)))",
)
def cheapest_queries(answer: Callable[[Tensor], Sequence[int]]) -> str:
    """The optimal queries of all objects, by brute force."""
    for queries, objects in ((3, 3), (5, 3), (6, 2), (4, 1)):
        cost = torch.rand(queries, objects)
        cost[0] *= 0.1  # the cheapest query of every object
        where = f"for {queries} queries and {objects} objects"
        found = answer(cost.clone())
        if found is None:
            raise Mistake("the answer should be a list of queries, but is None.")
        found = [int(q) for q in found]
        if len(found) != objects:
            raise Mistake(f"{where} the list has {len(found)} entries; it should have one query for each object.")
        if not all(0 <= q < queries for q in found):
            raise Mistake(f"{where} there is no query {next(q for q in found if not 0 <= q < queries)}.")
        if len(set(found)) < objects:
            raise Mistake(f"{where} one query is matched to two objects: each object took its own cheapest.")
        total = sum(float(cost[q, t]) for t, q in enumerate(found))
        cheapest = min(
            sum(float(cost[q, t]) for t, q in enumerate(each)) for each in permutations(range(queries), objects)
        )
        if total > cheapest + 1e-5:
            swapped = sum(float(cost[q, t]) for t, q in enumerate(sorted(found)))
            also = " (the order is that of the objects, not of the queries)" if swapped < total else ""
            raise Mistake(f"{where} your choice costs {total:.3f}, but {cheapest:.3f} is possible{also}.")
    return "It agrees with a search over all choices; scipy finds the same without one."


@exercise(
    "5.4",
    "What are the columns from counts[b] on?",
    "Cut them off before the matching: they are not expensive objects, but no objects.",
    "[optimal(matrix[:, :count]) for matrix, count in zip(costs, counts)]",
)
def match_batch(answer: Callable[[Tensor, Sequence[int]], Any]) -> str:
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
                f"the pairs of image {b} cost {total:.3f}, but {best:.3f} is possible: padding took queries that "
                "objects needed."
            )
    return "Padding is removed before the matching, and an image without objects has no pairs."


@exercise(
    "5.5",
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
            where = f"with an IoU above {iou:g} there are {wanted} duplicates among 7 detections, not {found}"
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
            raise Mistake(f"{where}.")
    return "It counts every detection that overlaps a better one of its class."
