"""Checkers of notebook 08: why DETR converges slowly."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from regolite.course import Mistake, alike, close, exercise, same_shape
from regolite.matching import Matches, MatchingCosts, PaddedTargets, match
from regolite.models.attention import MultiHeadAttention
from regolite.types import Prediction, Target

# -------------------------------------------------------------------------------------------------------- references


def index_vectors(matches: Matches, images: int, queries: int) -> Int[Tensor, "B Q"]:
    """For every query the object that it is matched with, -1 for none (DN-DETR, section 3.1).

    Args:
        matches: pairs of one prediction.
        images: number of images B.
        queries: number of queries Q.
    """
    vectors = torch.full((images, queries), -1, device=matches.query.device)
    vectors[matches.image, matches.query] = matches.target
    return vectors


class InstabilityMeter:
    """Measures during training how often the matching changes from one epoch to the next.

    Args:
        scoring: ``"softmax"`` or ``"sigmoid"``.
        costs: the weights of the matching cost.
        faults: names of rules to break (:data:`FAULTS`); with them the checker recognizes misconceptions.
    """

    def __init__(self, scoring: str, costs: MatchingCosts, faults: Collection[str] = ()) -> None:
        self.scoring, self.costs, self.faults = scoring, costs, faults
        self.before: dict[int, list[int]] | None = None
        self.now: dict[int, list[int]] = {}

    def update(self, prediction: Prediction, targets: Sequence[Target]) -> None:
        """Match a batch and remember the index vectors of its images.

        Args:
            prediction: the last layer's prediction.
            targets: the objects of each image.
        """
        pairs = match([prediction], PaddedTargets.of(targets), self.scoring, self.costs)
        vectors = index_vectors(pairs, len(targets), prediction.boxes.shape[1])
        if "zero" in self.faults:
            vectors = vectors.clamp(min=0)
        for place, (target, vector) in enumerate(zip(targets, vectors.tolist())):
            key = len(self.now) if "by_place" in self.faults else target.image_id
            self.now[place if "by_row" in self.faults else key] = vector

    def end_epoch(self) -> dict[str, Any] | None:
        """Compare the epoch with the one before.

        Returns:
            ``images``: number of images seen in both epochs; ``score``: DN-DETR's IS, the mean over these images of the
            number of queries whose entry changed; ``moved``: the share of their objects that changed their query. None
            if no image was seen in both, as in the first epoch.
        """
        before, self.before, self.now = self.before, self.now, {}
        if "first" in self.faults and before is not None:
            now, self.before = self.before, before
        else:
            now = self.before
        if "stale" in self.faults and before is not None:
            self.before = before | now
        both = [key for key in now if before is not None and key in before]
        if before is None or not both:
            return None
        changes = moved = objects = 0
        shares = []
        for key in both:
            changed = sum(old != new for old, new in zip(before[key], now[key]))
            owners = [{target: query for query, target in enumerate(v) if target >= 0} for v in (before[key], now[key])]
            if "sets" in self.faults:
                gone = len(set(owners[0].values()) - set(owners[1].values()))
            elif "twice" in self.faults:
                gone = changed
            else:
                gone = sum(query != owners[0].get(target) for target, query in owners[1].items())
            changes, moved, objects = changes + changed, moved + gone, objects + len(owners[1])
            shares.append(gone / max(len(owners[1]), 1))
        count = {"sum": 1, "per_object": max(objects, 1), "all_images": len(now)}
        divisor = next((count[fault] for fault in count if fault in self.faults), len(both))
        score = moved / len(both) if "moved_only" in self.faults else changes / divisor
        share = sum(shares) / len(shares) if "mean_share" in self.faults else moved / max(objects, 1)
        return {"images": len(both), "score": score, "moved": share}


# ---------------------------------------------------------------------------------------------------------- checkers


@exercise(
    "8.1",
    "Write the softmax: the n tokens have exp(d) each, the S - n others exp(0) = 1 each. What is the total of the n?",
    "p = n * exp(d) / (n * exp(d) + S - n). Solve for exp(d) first.",
    "exp(d) = p / (1 - p) * (S - n) / n.",
)
def gap(answer: Callable[[float, int, int], float]) -> str:
    """The score at which n of S tokens get the share p."""
    for p, n, total in ((0.9, 16, 280), (0.5, 3, 64), (0.99, 1, 1000), (0.2, 10, 20)):
        found = answer(p, n, total)
        if isinstance(found, Tensor) and found.numel() == 1:
            found = found.item()
        if isinstance(found, bool) or not isinstance(found, (int, float)):
            raise Mistake(f"the answer should be a number, but is {'None' if found is None else type(found).__name__}.")
        odds, others = math.log(p / (1 - p)), math.log((total - n) / n)
        known = {
            "the others are S - n tokens, not S.": odds + math.log(total / n),
            "this is for one token, but n tokens share p.": odds + math.log(total - n),
            "each of the n tokens gets the share p here; it should be their total.": math.log(p * (total - n))
            - math.log(1 - p)
            if n > 1
            else math.nan,
            "this is exp(d); d is its logarithm.": p / (1 - p) * (total - n) / n,
            "this is the log odds alone: the number of tokens that share the rest matters too.": odds,
            "the sign is wrong.": -(odds + others),
        }
        for said, wrong in known.items():
            if math.isclose(found, wrong, abs_tol=1e-4) and not math.isclose(wrong, odds + others, abs_tol=1e-4):
                raise Mistake(said)
        scores = torch.zeros(total, dtype=torch.float64)
        scores[:n] = found
        reached = scores.softmax(0)[:n].sum().item()
        if not math.isclose(reached, p, abs_tol=1e-4):
            raise Mistake(f"with p = {p}, n = {n}, S = {total} their total is {reached:.4f}.")
    return (
        "For 90 % on 16 of 280 tokens it is 5.0. Initial scores with a standard deviation of 1 are far from it, and "
        "the distance grows with log S."
    )


@exercise(
    "8.2",
    "First the inner products g . v_k, one number for each token; then their mean, weighted by the attention.",
    "wish = gradient @ values.T has shape [Q, S]; subtract (weights * wish).sum(-1, keepdim=True).",
    "weights * (wish - (weights * wish).sum(-1, keepdim=True))",
)
def score_gradient(answer: Callable[[Tensor, Tensor, Tensor], Tensor]) -> str:
    """The gradient at the scores of an attention."""
    scores = (2 * torch.randn(3, 7)).requires_grad_()
    values, gradient = torch.randn(7, 4), torch.randn(3, 4)
    weights = scores.softmax(-1)
    (weights @ values * gradient).sum().backward()
    assert scores.grad is not None
    weights = weights.detach()
    found = answer(weights.clone(), values.clone(), gradient.clone())
    if isinstance(found, Tensor) and found.shape == (3, 4):
        raise Mistake("this has one entry per channel; the gradient at the scores has one per token, [Q, S].")
    same_shape("the gradient at the scores", found, (3, 7))
    wish = gradient @ values.T
    mean = (weights * wish).sum(-1, keepdim=True)
    known = {
        "this is the gradient at the weights; the scores lie before the softmax.": wish,
        "subtract the mean: raising one score lowers all other weights, since they sum to 1.": weights * wish,
        "the factor a_k in front is missing.": wish - mean,
        "the mean over the tokens is weighted by the attention.": weights * (wish - wish.mean(-1, keepdim=True)),
        "the sign is wrong.": -weights * (wish - mean),
        "this keeps only the diagonal of the softmax's Jacobian: every weight depends on every score.": weights
        * (1 - weights)
        * wish,
    }
    for said, wrong in known.items():
        if alike(found, wrong, 1e-4):
            raise Mistake(said)
    close("the gradient at the scores", found, scores.grad, tolerance=1e-5)
    return "It sums to 0 over the tokens, and is small both where attention is even and where one token has it all."


def _pairs(order: Sequence[int]) -> Matches:
    """Pairs of 3 images with 2, 0 and 3 objects, in a given order."""
    image, query = torch.tensor([0, 0, 2, 2, 2]), torch.tensor([3, 1, 0, 4, 3])
    target, rows = torch.tensor([0, 1, 0, 2, 1]), torch.tensor(order)
    return Matches(torch.zeros(5, dtype=torch.long), image[rows], query[rows], target[rows])


@exercise(
    "8.3",
    "Start from a tensor [B, Q] full of -1, and write into it at the matched places.",
    "Two index tensors at once: vectors[matches.image, matches.query] = ...",
)
def check_vectors(answer: Callable[[Matches, int, int], Tensor]) -> str:
    """The object of every query."""
    wanted = torch.tensor([[-1, 1, -1, 0, -1], [-1, -1, -1, -1, -1], [0, -1, -1, 1, 2]])
    for order in ((0, 1, 2, 3, 4), (4, 2, 0, 3, 1)):
        found = answer(_pairs(order), 3, 5)
        if isinstance(found, Tensor) and found.shape == (3, 3):
            raise Mistake("this has one entry per object; an index vector has one per query.")
        same_shape("the index vectors", found, (3, 5))
        if found.tolist() == wanted.tolist():
            continue
        if found.dtype == torch.bool:
            raise Mistake("which object a query is matched with is needed, not only whether it is.")
        if found.tolist() == wanted.clamp(min=0).tolist():
            raise Mistake("unmatched queries get -1: 0 is the index of an object.")
        if found.tolist() == (wanted + 1).tolist():
            raise Mistake("object t is written as t, and no object as -1.")
        if torch.equal(found >= 0, wanted >= 0):
            raise Mistake("the right queries are marked, but not with the index of their object, matches.target.")
        if (found >= 0).any(1)[1]:
            raise Mistake("image 1 has no objects, yet one of its queries is matched: index by matches.image, too.")
        raise Mistake(f"query by query, image 0 should be {wanted[0].tolist()}, but is {found[0].tolist()}.")
    return "Two index vectors of an image, one epoch apart, say all about the stability of its matching."


def _case(owners: Sequence[Sequence[int]], ids: Sequence[int], scoring: str) -> tuple[Prediction, list[Target]]:
    """A batch in which object t of image b is matched with query ``owners[b][t]``, of 6."""
    logits, boxes, targets = torch.full((len(ids), 6, 4), -4.0), torch.rand(len(ids), 6, 4) * 0.05 + 0.01, []
    if scoring == "softmax":
        logits[..., -1] = 2.0
    for b, (queries, image_id) in enumerate(zip(owners, ids)):
        generator = torch.Generator().manual_seed(image_id)
        true = torch.rand(len(queries), 4, generator=generator) * 0.3 + 0.3
        labels = torch.randint(3, (len(queries),), generator=generator)
        for t, q in enumerate(queries):
            boxes[b, q], logits[b, q, labels[t]] = true[t], 4.0
        targets.append(Target(labels, true, image_id, (100, 100)))
    return Prediction(logits, boxes), targets


_EPOCHS: list[tuple[str, list[tuple[list[list[int]], list[int]]]]] = [
    ("the first epoch", [([[0, 1], [2], []], [11, 12, 13]), ([[5, 4, 3]], [14])]),
    ("an epoch in which one object got another query", [([[0, 1], [3], []], [11, 12, 13]), ([[5, 4, 3]], [14])]),
    ("an epoch in which two objects swapped their queries", [([[0, 1], [3], []], [11, 12, 13]), ([[5, 3, 4]], [14])]),
    ("an epoch with the images in another order", [([[5, 2, 4]], [14]), ([[], [1, 0], [3]], [13, 11, 12])]),
    ("an epoch that saw two images only", [([[1, 0], [5, 2, 3]], [11, 14])]),
    ("an epoch after one that saw two images only", [([[2, 0], [4], []], [11, 12, 13]), ([[5, 2, 3]], [14])]),
    ("an epoch that saw other images only", [([[2, 0]], [15])]),
]

FAULTS = {
    "by_place": "images are compared by their place, but training shuffles them: use target.image_id.",
    "by_row": "images are compared by their row in the batch, and later batches overwrite them: use target.image_id.",
    "sum": "the score is a mean over the images that were seen in both epochs, not a sum.",
    "per_object": "the score is the number of changed queries per image, not per object.",
    "all_images": "divide by the number of images that were seen in both epochs.",
    "moved_only": "the score counts queries: one that loses its object and one that gets it are two changes.",
    "zero": "an unmatched query is written as -1: with 0, it cannot be told from a query with object 0.",
    "first": "each epoch is compared with the one before, not with the first one.",
    "stale": "an image that the epoch before did not see has nothing to be compared with; forget older epochs.",
    "twice": "an object that moves changes two entries: moved counts objects, not entries.",
    "mean_share": "moved is the share of all objects of these images together, not a mean over images.",
    "sets": "two objects that swap their queries have both moved: compare object by object, not sets of queries.",
}
"""Misconceptions about the measurement, and what the checker says."""


@exercise(
    "8.4",
    "Two dicts by image_id, of this epoch and of the one before; end_epoch moves the first to the second.",
    "In update: pairs = match([prediction], PaddedTargets.of(targets), self.scoring, self.costs), then Exercise 8.3.",
    "For a single image: (old != new).sum() changed queries. Object t moved if the query with old == t is another one "
    "than that with new == t.",
)
def check_meter(answer: Callable[[str, MatchingCosts], Any]) -> str:
    """A meter of matching instability."""
    for scoring in ("softmax", "sigmoid"):
        costs = MatchingCosts(1.0 if scoring == "softmax" else 2.0)
        meter, wanted = answer(scoring, costs), InstabilityMeter(scoring, costs)
        suspects = {fault: InstabilityMeter(scoring, costs, {fault}) for fault in FAULTS}
        for what, batches in _EPOCHS:
            for owners, ids in batches:
                prediction, targets = _case(owners, ids, scoring)
                for one in (meter, wanted, *suspects.values()):
                    one.update(prediction, targets)
            found, right = meter.end_epoch(), wanted.end_epoch()
            said = {fault: one.end_epoch() for fault, one in suspects.items()}
            if _same(found, right):
                suspects = {fault: one for fault, one in suspects.items() if _same(said[fault], right)}
                continue
            if right is None:
                blamed = [f for f in suspects if said[f] is not None and _same(found, said[f])]
                raise Mistake(FAULTS[blamed[0]] if blamed else f"{what}: nothing to compare, so return None.")
            if not isinstance(found, dict) or set(found) != {"images", "score", "moved"}:
                raise Mistake(f"{what}: return a dict of images, score and moved, not {found!r}.")
            for fault in suspects:
                if not _same(said[fault], right) and _same(found, said[fault]):
                    raise Mistake(f"{what}: {FAULTS[fault]}")
            name = next(n for n in right if not math.isclose(float(found[n]), right[n], abs_tol=1e-5))
            raise Mistake(f"{what}: {name} should be {right[name]:.4g}, but is {float(found[name]):.4g}.")
    return "Call update after every step and end_epoch after every epoch, and DN-DETR's figure is yours."


def _same(one: Any, other: dict[str, Any] | None) -> bool:
    if other is None or not isinstance(one, dict):
        return one is None and other is None
    return set(one) == set(other) and all(math.isclose(float(one[n]), other[n], abs_tol=1e-5) for n in other)


@exercise(
    "8.5",
    "Four tests, one after another; `(boxes < 0) | (boxes > 1)` is the first.",
    "For corners: center minus half the size must not be below -0.01, and center plus half the size not above 1.01.",
    "Test for corners only if all numbers lie in [0, 1]; .any() of an empty tensor is False, so no image is special.",
)
def suspicious(answer: Callable[[Target, int], set[str]]) -> str:
    """The errors in the targets of an image."""

    def target(boxes: list[list[float]], labels: list[int]) -> Target:
        return Target(torch.tensor(labels, dtype=torch.long), torch.tensor(boxes).reshape(-1, 4), 1, (480, 640))

    right = [0.5, 0.4, 0.3, 0.2]
    cases = [
        ("correct boxes and labels", target([right, [0.1, 0.1, 0.2, 0.2]], [0, 79]), set()),
        ("an image without objects", target([], []), set()),
        ("a box that fills the image", target([[0.5, 0.5, 1.0, 1.0]], [3]), set()),
        ("a box that touches the border, a rounding error outside", target([[0.1, 0.5, 0.203, 0.2]], [3]), set()),
        ("boxes in pixels", target([right, [320.0, 200.0, 90.0, 60.0]], [0, 1]), {"pixels"}),
        ("a negative center", target([[-0.2, 0.5, 0.1, 0.1]], [0]), {"pixels"}),
        ("corners of a box at the lower right", target([right, [0.6, 0.5, 0.9, 0.8]], [0, 1]), {"corners"}),
        ("corners of a box at the upper left", target([[0.1, 0.2, 0.4, 0.5]], [0]), {"corners"}),
        ("labels that start at 1", target([right, right], [1, 80]), {"labels"}),
        ("a negative label", target([right], [-1]), {"labels"}),
        ("a box without height", target([right, [0.5, 0.5, 0.2, 0.0]], [0, 1]), {"empty"}),
        ("corners and COCO's own class id 90", target([[0.6, 0.5, 0.9, 0.8]], [90]), {"corners", "labels"}),
    ]
    for what, given, wanted in cases:
        found = answer(given, 80)
        if not isinstance(found, (set, frozenset)):
            raise Mistake(
                f"the answer should be a set of words, but is {'None' if found is None else type(found).__name__}."
            )
        if found != wanted:
            missing, extra = sorted(wanted - found), sorted(found - wanted)
            parts = [f"{word!r} is missing" for word in missing] + [f"{word!r} does not apply" for word in extra]
            raise Mistake(f"for {what}: {', '.join(parts)}.")
    return "Run it on a whole data set before training; it takes seconds."


@exercise(
    "8.6",
    "copy.deepcopy makes the copy. A score is a product of a query and a key: which of the two should grow?",
    "Multiply the query projection by the factor, its weight and its bias; leave the keys alone.",
    "with torch.no_grad(): copied.query.weight *= factor; copied.query.bias *= factor",
)
def sharpen(answer: Callable[[MultiHeadAttention, float], MultiHeadAttention]) -> str:
    """An attention with larger scores."""
    attention = MultiHeadAttention(16, 2)
    torch.nn.init.normal_(attention.query.bias)
    torch.nn.init.normal_(attention.key.bias)
    before = {name: value.clone() for name, value in attention.state_dict().items()}
    query, tokens = torch.randn(1, 5, 16), torch.randn(1, 9, 16)

    def scores(module: MultiHeadAttention) -> Tensor:
        """Scores up to a constant for each query."""
        logs = module.weights(query, tokens).log()
        return logs - logs.mean(-1, keepdim=True)

    factor = 3.0
    with torch.no_grad():
        wanted = factor * scores(attention)
        plain = scores(attention)
        copied = answer(attention, factor)
        if not isinstance(copied, MultiHeadAttention):
            kind = "None" if copied is None else type(copied).__name__
            raise Mistake(f"the answer should be a MultiHeadAttention, but is {kind}.")
        if any(not torch.equal(value, before[name]) for name, value in attention.state_dict().items()):
            raise Mistake("the original has changed: work on a copy (copy.deepcopy).")
        if copied is attention or alike(scores(copied), plain, 1e-3):
            raise Mistake("the scores are unchanged.")
        if alike(scores(copied), factor * wanted, 1e-3):
            raise Mistake(
                "the scores have grown by the factor squared: you scaled both queries and keys. One of them is enough."
            )
        if alike(scores(copied), factor**0.5 * plain, 1e-3):
            raise Mistake("the scores have grown by the root of the factor.")
        if not alike(scores(copied), wanted, 1e-3):
            bare = MultiHeadAttention(16, 2)
            bare.load_state_dict(before)
            bare.query.weight *= factor
            if alike(scores(copied), scores(bare), 1e-3):
                raise Mistake("you scaled the weight, but not the bias: the bias is part of the query.")
            close("the scores of the copy", scores(copied), wanted, tolerance=1e-2)
        close("the output of the values", copied.value(tokens), attention.value(tokens))
        close("the output projection", copied.out(tokens), attention.out(tokens))
    return "The attention is sharper; only a training run can show whether that speeds up convergence."
