"""Checkers of notebook 08: why DETR converges slowly."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from regolite.course import Mistake, alike, close, exercise, same_shape
from regolite.matching import Matches
from regolite.models.attention import MultiHeadAttention
from regolite.types import Target


@exercise(
    "8.1",
    "Two entropies: that of the mean map, and the mean over the heads. Heads are dimension 1.",
    "The mean map is weights.mean(1), with shape [B, Q, S]. Its entropy is never below the mean of the heads'.",
    "0 * log 0 is NaN in floating point. torch.special.entr(a) is -a * log(a), with 0 at 0.",
)
def heads_differ(answer: Callable[[Tensor], Tensor]) -> str:
    """The part of the mean map's entropy that comes from differences between heads."""
    weights = torch.rand(2, 3, 5, 7).mul(3).softmax(-1)
    own = torch.special.entr(weights).sum(-1)
    of_mean = torch.special.entr(weights.mean(1)).sum(-1)
    found = answer(weights.clone())
    if isinstance(found, Tensor) and found.shape == (2, 3):
        raise Mistake("the mean is over the queries here; heads are dimension 1.")
    same_shape("heads_differ(weights)", found, (2, 5))
    known = {
        "this is the mean of the heads' entropies; what is the entropy of the mean map?": own.mean(1),
        "this is the entropy of the mean map; subtract the mean of the heads' entropies.": of_mean,
        "the sign is wrong: the mean map has the higher entropy.": own.mean(1) - of_mean,
        "this compares with the sum over the heads, not with their mean.": of_mean - own.sum(1),
        "this compares with the sharpest head, not with the mean over the heads.": of_mean - own.amin(1),
    }
    for said, wrong in known.items():
        if alike(found, wrong, 1e-3):
            raise Mistake(said)
    close("heads_differ(weights)", found, of_mean - own.mean(1), tolerance=1e-3)
    apart = torch.eye(4)[None, :, None]  # four heads, each with all its weight on a different token
    found = answer(apart)
    if not found.isfinite().all():
        raise Mistake("with weights of exactly 0, as for masked tokens, the answer is NaN or infinite.")
    close("the answer for four heads on four tokens", found, torch.full((1, 1), math.log(4)), tolerance=1e-3)
    return "It is 0 if all heads are equal, and log M if each of M heads attends to different tokens."


@exercise(
    "8.2",
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


def _matches(queries: Tensor, order: Tensor) -> Matches:
    """Pairs of 3 images with 2, 4 and 1 objects, in a given order."""
    image = torch.tensor([0, 0, 1, 1, 1, 1, 2])
    target = torch.tensor([0, 1, 0, 1, 2, 3, 0])
    return Matches(torch.zeros(7, dtype=torch.long), image[order], queries[order], target[order])


@exercise(
    "8.3",
    "Bring both into the same order first: by image, and within an image by target.",
    "matches.image * 1000 + matches.target is one number for each object; argsort of it gives the order.",
    "(before.query[order_before] != after.query[order_after]).float().mean().item()",
)
def share_changed(answer: Callable[[Matches, Matches], float]) -> str:
    """The share of objects whose query changed."""
    first = torch.tensor([3, 7, 3, 7, 1, 0, 5])
    second = torch.tensor([7, 3, 3, 2, 1, 0, 5])  # image 0: swapped; image 1: target 1 went from 7 to 2
    straight = torch.arange(7)
    mixed = torch.tensor([6, 2, 0, 5, 1, 4, 3])
    for before, after in ((straight, straight), (straight, mixed), (mixed, straight)):
        found = answer(_matches(first, before), _matches(second, after))
        if isinstance(found, Tensor) and found.numel() == 1:
            found = found.item()
        if isinstance(found, bool) or not isinstance(found, (int, float)):
            raise Mistake(f"the answer should be a number, but is {'None' if found is None else type(found).__name__}.")
        if math.isclose(found, 3 / 7, abs_tol=1e-4):
            continue
        if math.isclose(found, 3.0, abs_tol=1e-4):
            raise Mistake("this is the number of objects; divide it by the number of all objects.")
        if math.isclose(found, 4 / 7, abs_tol=1e-4) and torch.equal(before, after):
            raise Mistake("this is the share of objects that kept their query.")
        if math.isclose(found, 1 / 7, abs_tol=1e-4):
            raise Mistake(
                "two objects of an image that swap their queries have both changed: compare object by object, not the "
                "sets of matched queries."
            )
        if not torch.equal(before, after):
            raise Mistake(
                "right if both have the same order, but wrong otherwise: sort the pairs by image and target before you "
                "compare."
            )
        raise Mistake(f"three of seven objects changed their query, 0.43, but the answer is {found:.2f}.")
    same = answer(_matches(first, straight), _matches(first, mixed))
    close("the share without changes", float(same), 0.0)
    return "It counts by object, so that a swap of two queries counts twice."


@exercise(
    "8.4",
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
    "8.5",
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
