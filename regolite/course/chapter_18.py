"""Checkers of notebook 18: from DETR to today."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_convert

from regolite.boxes import to_xyxy
from regolite.course import Mistake, alike, close, exercise, same_shape
from regolite.denoising import NoisedQueries
from regolite.matching import PaddedTargets
from regolite.models.positions import sine_embedding
from regolite.types import Target

TEMPERATURE = 20.0
"""DAB-DETR's temperature of sine embeddings; DETR's is 10000."""


def reference_scores(
    box: Float[Tensor, "4"], size: Float[Tensor, "2"], rows: int, columns: int, dim: int
) -> Float[Tensor, "rows columns"]:
    """Width- and height-modulated scores of a box: the answer to 18.1.

    Args:
        box: the query's box, ``cxcywh`` in [0, 1].
        size: the reference size, width and height in [0, 1].
        rows: number of rows of cells.
        columns: number of columns.
        dim: channels of the encoding along each axis.
    """
    x, y = _similarity(box[0], columns, dim), _similarity(box[1], rows, dim)
    return ((x * size[0] / box[2])[None] + (y * size[1] / box[3])[:, None]) / (2 * dim) ** 0.5


def _similarity(coordinate: Tensor, cells: int, dim: int) -> Float[Tensor, "cells"]:
    """Dot products of the encoding of a coordinate with those of the cells along an axis."""
    centers = (torch.arange(cells) + 0.5) / cells
    ours = sine_embedding(2 * math.pi * coordinate[None], dim, TEMPERATURE)
    return (sine_embedding(2 * math.pi * centers, dim, TEMPERATURE) @ ours.T)[:, 0]


@exercise(
    "18.1",
    "There is one product of encodings for x and one for y; each has a factor of its own before they are added.",
    "The factor of x is reference_size[0] / w: a wide box gets a small factor, which flattens the scores along x.",
    "scores = (y * h_ref / h)[:, None] + (x * w_ref / w)[None], divided by (2 * dim) ** 0.5.",
)
def modulated(answer: Callable[[Tensor, Tensor, int, int, int], Tensor]) -> str:
    """Positional scores of a query with a box: width- and height-modulated attention."""
    cases: tuple[tuple[list[float], list[float], int, int, int], ...] = (
        ([0.3, 0.6, 0.5, 0.1], [0.2, 0.3], 6, 9, 16),
        ([0.7, 0.2, 0.1, 0.4], [0.3, 0.1], 8, 5, 32),
    )
    for values, sizes, rows, columns, dim in cases:
        box, size = torch.tensor(values), torch.tensor(sizes)
        (cx, cy, w, h), (w_ref, h_ref) = box, size
        x, y = _similarity(cx, columns, dim), _similarity(cy, rows, dim)

        def scores(fx: Tensor | float, fy: Tensor | float, x: Tensor = x, y: Tensor = y) -> Tensor:
            return (x * fx)[None] + (y * fy)[:, None]

        scale = (2 * dim) ** 0.5
        wanted = reference_scores(box, size, rows, columns, dim)
        found = answer(box, size, rows, columns, dim)
        if isinstance(found, Tensor) and found.shape == (columns, rows):
            raise Mistake("rows and columns are exchanged: the scores are [rows, columns], and y belongs to the rows.")
        same_shape("the scores", found, (rows, columns))
        for wrong, problem in (
            (scores(1.0, 1.0) / scale, "the box's width and height have no effect: scores are those of its center."),
            (scores(w / w_ref, h / h_ref) / scale,
             "the factors are upside down: a wide box has to flatten its scores along x, not sharpen them."),
            (scores(h_ref / h, w_ref / w) / scale, "the factors are exchanged: the width belongs to the product of x."),
            (scores(w_ref / w, h_ref / h), "the scores are not divided by the square root of the number of channels."),
            (scores(w_ref / w, h_ref / h) / dim**0.5,
             "x and y have `dim` channels each: divide by the square root of both together."),
            (scores(1 / w, 1 / h) / scale, "the reference size is missing."),
            (wanted.flatten().softmax(0).view(rows, columns),
             "return scores; the softmax comes later, after the contents' scores were added."),
        ):  # fmt: skip
            if alike(found, wrong):
                raise Mistake(problem)
        close(
            "the scores",
            found,
            wanted,
            but="wrong scores: centers are (index + 0.5) / count, with `dim` channels per axis, temperature 20.",
        )
    return "DAB-DETR adds these to the scores of the contents. The network predicts the reference size."


def reference_denoising(
    labels: Int[Tensor, "B T"],
    boxes: Float[Tensor, "B T 4"],
    counts: Sequence[int],
    draws: Mapping[str, Tensor],
    num_queries: int,
    box_noise: float = 0.4,
    label_noise: float = 0.2,
    smallest: float = 0.001,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Noised labels and boxes, the padding mask and the attention mask: the answer to 18.2."""
    batch, most = labels.shape
    labels = torch.where(draws["flip"] < label_noise, draws["other"], labels.repeat(1, 2))
    least = torch.tensor([0.0, 1.0]).repeat_interleave(most)[:, None]
    shift = draws["sign"] * (least + draws["amount"]) * box_noise * boxes[..., 2:].repeat(1, 2, 2) / 2
    x0, y0, x1, y1 = (to_xyxy(boxes).repeat(1, 2, 1) + shift).clamp(0, 1).unbind(-1)
    noised = torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0], -1).clamp(smallest, 1 - smallest)
    padding = (torch.arange(most) >= torch.tensor(counts)[:, None]).repeat(1, 2)
    padding[:, 0] &= ~padding.all(1)
    is_noised = torch.arange(2 * most + num_queries) < 2 * most
    return labels, noised, padding, is_noised[:, None] != is_noised[None]


@exercise(
    "18.2",
    "Positives and negatives have the same ground truth: repeat labels and boxes along the objects, then add noise to "
    "all 2T at once.",
    "A corner moves by sign * (least + amount) * box_noise * half a side, with least 0 for positives and 1 for "
    "negatives, and the sides (w, h, w, h).",
    "is_noised = torch.arange(2 * T + num_queries) < 2 * T; a pair is hidden where is_noised[:, None] differs from "
    "is_noised[None].",
)
def denoising(answer: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]) -> str:
    """Denoising queries by hand: equal to the package's for the same random numbers."""
    classes, queries = 6, 5
    three = torch.tensor([[0.3, 0.4, 0.2, 0.3], [0.9, 0.5, 0.18, 0.6], [0.5] * 4])
    targets = [
        Target(torch.tensor([4, 1, 2]), three, 0, (8, 8)),
        Target(torch.tensor([5]), torch.tensor([[0.6, 0.1, 0.4, 0.16]]), 1, (8, 8)),
        Target(torch.zeros(0, dtype=torch.long), torch.zeros(0, 4), 2, (8, 8)),
    ]  # fmt: skip
    module = NoisedQueries(classes, classes)
    module.labels.weight.data.copy_(torch.eye(classes))  # the embedding shows the label
    for seed in range(4):
        torch.manual_seed(seed)
        one_hot, boxes, padding = module(targets)
        padded = PaddedTargets.of(targets)
        both, corners = padded.labels.repeat(1, 2), torch.zeros(3, 6, 4)
        torch.manual_seed(seed)
        draws = {
            "flip": torch.rand(both.shape),
            "other": torch.randint_like(both, classes),
            "sign": torch.randint_like(corners, 2) * 2 - 1,
            "amount": torch.rand_like(corners),
        }
        found = answer(padded.labels.clone(), padded.boxes.clone(), list(padded.counts), dict(draws), queries)
        if not isinstance(found, (tuple, list)) or len(found) != 4:
            raise Mistake("return four tensors: labels, boxes, padding, hidden.")
        _labels(found[0], padded, draws, one_hot.argmax(-1))
        _boxes(found[1], padded, draws, boxes.detach(), padding)
        _padding(found[2], padding)
        _hidden(found[3], 6, queries)
    return "With these queries you have built DN-DETR's training, with DINO's negatives."


def _labels(found: Tensor, padded: PaddedTargets, draws: Mapping[str, Tensor], wanted: Tensor) -> None:
    """Check the noised labels."""
    same_shape("the labels", found, (3, 6))
    both = padded.labels.repeat(1, 2)
    real = ~(torch.arange(3) >= torch.tensor(padded.counts)[:, None]).repeat(1, 2)
    for wrong, problem in (
        (both, "no label is noised: where flip < label_noise, the label becomes that of `other`."),
        (draws["other"], "all labels are random: keep those where flip is not below label_noise."),
        (torch.where(draws["flip"] < 0.2, both, draws["other"]),
         "labels are kept where they should be noised, and the other way round."),
        (torch.where(draws["flip"] < 0.2, draws["other"], padded.labels.repeat_interleave(2, 1)),
         "positives and negatives take turns: all positives come first, in the objects' order, then all "
         "negatives."),
    ):  # fmt: skip
        if torch.equal(found[real], wrong[real]) and not torch.equal(wrong[real], wanted[real]):
            raise Mistake(problem)
    if not torch.equal(found[real], wanted[real]):
        raise Mistake("the labels differ from the package's: positives first, then negatives, each noised by its draw.")


def _boxes(
    found: Tensor, padded: PaddedTargets, draws: Mapping[str, Tensor], wanted: Tensor, padding: Bool[Tensor, "3 6"]
) -> None:
    """Check the noised boxes."""
    same_shape("the boxes", found, (3, 6, 4))
    real = ~padding & (torch.tensor(padded.counts) > 0)[:, None]
    sides = padded.boxes[..., 2:].repeat(1, 2, 2)
    corners = to_xyxy(padded.boxes).repeat(1, 2, 1)
    least = torch.tensor([0.0, 1.0]).repeat_interleave(3)[:, None]

    def noised(unit: Tensor, low: Tensor | float = least, clip: bool = True, sign: bool = True) -> Tensor:
        shift = (draws["sign"] if sign else 1.0) * (low + draws["amount"]) * 0.4 * unit
        moved = corners + shift
        x0, y0, x1, y1 = (moved.clamp(0, 1) if clip else moved).unbind(-1)
        return torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0], -1).clamp(0.001, 0.999)

    for wrong, problem in (
        (noised(sides / 2, 0.0),
         "the negatives have no more noise than the positives: theirs is between box_noise and twice that."),
        (noised(sides / 2, 1 - least), "positives and negatives are exchanged: the first T have the small noise."),
        (noised(sides), "the noise is relative to half the side of the box, not to the whole."),
        (noised(sides.flip(-1) / 2), "x corners move by a share of the width, y corners by a share of the height."),
        (noised(torch.ones_like(sides) / 2), "the noise is relative to the box: multiply it by half of its sides."),
        (noised(sides / 2, sign=False), "every corner moves right and down: multiply by the sign."),
        (noised(sides / 2, clip=False),
         "boxes stick out of the image: clamp the corners to [0, 1] before going back to cxcywh."),
        ((padded.boxes.repeat(1, 2, 1) + draws["sign"] * (least + draws["amount"]) * 0.2 * sides).clamp(0.001, 0.999),
         "the noise moves the four corner coordinates, not center and size."),
        (to_xyxy(wanted), "these are corners: return cxcywh."),
        (padded.boxes.repeat(1, 2, 1), "the boxes have no noise."),
    ):  # fmt: skip
        if alike(found[real], wrong[real]) and not alike(wrong[real], wanted[real]):
            raise Mistake(problem)
    close(
        "the boxes",
        found[real],
        wanted[real],
        but="the boxes differ from the package's for the same random numbers: go through the shift step by step.",
    )


def _padding(found: Tensor, wanted: Bool[Tensor, "3 6"]) -> None:
    """Check the padding mask."""
    same_shape("the padding", found, (3, 6))
    if found.dtype != torch.bool:
        raise Mistake(f"the padding should hold booleans, not {found.dtype}.")
    if torch.equal(found[:2], ~wanted[:2]):
        raise Mistake("the padding mask is inverted: it is True on padding.")
    if bool(found[2].all()):
        raise Mistake("an image without objects has no key left for the self-attention: keep its first place.")
    if torch.equal(found[:2, :3], wanted[:2, :3]) and not torch.equal(found[:2, 3:], wanted[:2, 3:]):
        raise Mistake("the negatives have padding too: at the same places as the positives.")
    if not torch.equal(found, wanted):
        raise Mistake("the padding is wrong: object n of an image is padding if n is not below its count.")


def _hidden(found: Tensor, noised: int, queries: int) -> None:
    """Check the attention mask."""
    total = noised + queries
    same_shape("the attention mask", found, (total, total))
    if found.dtype != torch.bool:
        raise Mistake(f"the attention mask should hold booleans, not {found.dtype}.")
    is_noised = torch.arange(total) < noised
    wanted = is_noised[:, None] != is_noised[None]
    if torch.equal(found, ~wanted):
        raise Mistake("the attention mask is inverted: it is True where a query (row) must not see another (column).")
    if not found[noised:, :noised].all():
        raise Mistake(
            "a query of the detector sees noised ground truth: in training it would copy the answer, and at "
            "inference there is none to copy."
        )
    if found[noised:, noised:].any():
        raise Mistake("the detector's queries must see each other: that is how they avoid duplicates.")
    if found[:noised, :noised].any():
        raise Mistake(
            "the noised queries see each other here, as in the package: positives and negatives of one group."
        )
    if not torch.equal(found, wanted):
        raise Mistake(
            "here the noised queries do not see the detector's, as in the package, which decodes them separately."
        )


@exercise(
    "18.3",
    "Each group is a detector of its own with the same objects: one assignment per group.",
    "cost.view(groups, -1, T) splits the queries; linear_sum_assignment solves one group.",
    "scipy gives rows and columns; write the rows, plus the number of the group's first query, at the columns.",
)
def group_match(answer: Callable[[Tensor, int], Tensor]) -> str:
    """One-to-many assignment by groups of queries, as in Group DETR."""
    for seed, groups, size, objects in ((0, 3, 4, 2), (1, 2, 5, 5), (2, 4, 3, 1), (3, 1, 6, 3)):
        torch.manual_seed(seed)
        cost = torch.rand(groups * size, objects)
        cost[:size] -= 1.0  # the first group is better than the others
        if size > 2 and objects > 1:
            cost[0, :2], cost[1, :2] = torch.tensor([-3.0, -2.9]), torch.tensor([-2.9, -1.0])  # where greedy fails
        wanted = torch.empty(groups, objects, dtype=torch.long)
        for group in range(groups):
            rows, columns = linear_sum_assignment(cost[group * size : (group + 1) * size].numpy())
            wanted[group, torch.as_tensor(columns)] = torch.as_tensor(rows) + group * size
        found = answer(cost.clone(), groups)
        if isinstance(found, Tensor) and groups != objects and found.shape == (objects, groups):
            raise Mistake("the matrix is transposed: one row per group, one column per object.")
        same_shape("the matched queries", found, (groups, objects))
        first = size * torch.arange(groups)[:, None]
        if torch.equal(found, wanted - first) and groups > 1:
            raise Mistake("these indices start again in every group: count the queries of all groups together.")
        if torch.equal(found, cost.view(groups, size, objects).argmin(1) + first) and not torch.equal(found, wanted):
            raise Mistake("each object takes its best query, even one that is taken: within a group it is one-to-one.")
        if bool(((found < first) | (found >= first + size)).any()):
            if bool((found % groups == torch.arange(groups)[:, None]).all()):
                raise Mistake("the queries come group by group: the first Q rows are group 0, the next Q group 1.")
            raise Mistake(
                "some group matches an object with a query of another group: with one matching for all, the objects' "
                "copies crowd into the best group."
            )
        if any(len(set(row)) < objects for row in found.tolist()):
            raise Mistake("a query is matched with two objects of the same group.")
        if not torch.equal(found, wanted):
            raise Mistake(
                "the assignment of some group is not the cheapest one; are the columns in the objects' order?"
            )
    return "At inference, Group DETR keeps one group and drops the others: no duplicates, and no cost."


@exercise(
    "18.4",
    "A distribution gives a number by its mean: the softmax of the logits times the bins' values, summed up.",
    "offset = (logits.softmax(-1) * values).sum(-1), one for each of left, top, right, bottom, in units of the box's "
    "width or height.",
    "left = cx - (0.5 + offset) * w, right = cx + (0.5 + offset) * w; the same for y with h.",
)
def edges(answer: Callable[[Tensor, Tensor, Tensor], Tensor]) -> str:
    """Edges of a box from distributions, as in D-FINE."""
    torch.manual_seed(0)
    boxes = torch.tensor([[0.5, 0.4, 0.2, 0.3], [0.3, 0.6, 0.4, 0.1]])
    values = torch.tensor([-1.0, -0.5, -0.2, -0.05, 0.0, 0.05, 0.2, 0.5, 1.0])
    for factor in (1.0, 4.0):
        logits = factor * torch.randn(2, 4, 9)
        x, y, w, h = boxes.T
        sides = torch.stack([w, h, w, h], 1)
        start = torch.stack([x, y, x, y], 1)
        sign = torch.tensor([-1.0, -1.0, 1.0, 1.0])

        def moved(offset: Tensor, sides: Tensor = sides, half: float = 0.5, sign: Tensor = sign) -> Tensor:
            return start + sign * (half + offset) * sides  # noqa: B023

        offset = (logits.softmax(-1) * values).sum(-1)
        found = answer(boxes, logits, values)
        same_shape("the corners", found, (2, 4))
        for wrong, problem in (
            (moved(values[logits.argmax(-1)]),
             "you took the value of the likeliest bin. Take the mean: it moves smoothly, and has a "
             "gradient."),
            (moved((logits.sigmoid() * values).sum(-1)),
             "the bins of an edge exclude each other: softmax, not sigmoid."),
            (moved((logits.softmax(1) * values).sum(-1)), "the softmax is over the bins, not over the four edges."),
            (start + sign * 0.5 * sides + offset * sides,
             "a positive offset moves an edge outward: the left one to the left."),
            (moved(offset, half=0.0), "offsets are counted from the edges of the box, not from its center."),
            (start + sign * (0.5 * sides + offset), "offsets are in units of the box's width or height."),
            (moved(offset, sides[:, [1, 0, 3, 2]]),
             "left and right go with the width, top and bottom with the height."),
            (moved(-offset), "a positive offset moves an edge outward."),
            (moved(offset / 2), "an offset of 1 is the whole width or height, not half of it."),
            (box_convert(moved(offset), "xyxy", "cxcywh"), "these are center and size: return corners."),
        ):  # fmt: skip
            if alike(found, wrong):
                raise Mistake(problem)
        close(
            "the corners",
            found,
            moved(offset),
            but="the corners are wrong: each edge is half a side from the center, plus its offset times that side.",
        )
        with_gradient = logits.clone().requires_grad_()
        again = answer(boxes, with_gradient, values)
        if again.requires_grad:
            again.sum().backward()
        if with_gradient.grad is None or not with_gradient.grad.any():
            raise Mistake("no gradient flows back to the logits: an operation is detached or not differentiable.")
    return "With one bin near 1 this is an ordinary offset; two peaks say that the edge could be in two places."
