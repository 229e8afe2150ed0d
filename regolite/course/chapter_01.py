"""Checkers of notebook 01: attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from regolite.course import Mistake, close, exercise, has_gradient, same_shape


def not_known(found: Tensor, mistakes: Mapping[str, Tensor]) -> None:
    """Raise a :class:`Mistake` if the answer is that of a common mistake.

    Args:
        found: the learner's tensor.
        mistakes: messages, and the tensors that result from the mistakes.
    """
    for said, wrong in mistakes.items():
        if found.shape == wrong.shape and torch.allclose(found.detach().double(), wrong.double(), atol=1e-5):
            raise Mistake(said)


@exercise(
    "1.1",
    "Three lines: the scores of the query with all keys, their softmax, the mean of the values with these weights.",
    "`keys @ query` is a vector of S scores. Divide it by the square root of the number of channels of the query.",
    "`weights = torch.softmax(keys @ query / len(query) ** 0.5, dim=0)`, then `weights @ values`.",
)
def one_query(answer: Callable[..., Any]) -> str:
    """Scaled dot-product attention of a single query."""
    query, keys, values = (torch.randn(*shape) for shape in ((6,), (9, 6), (9, 4)))
    inputs = [x.requires_grad_() for x in (query, keys, values)]
    found = answer(*inputs)
    same_shape("the answer", found, (4,))
    with torch.no_grad():
        scores = keys @ query
        wanted = torch.softmax(scores / 6**0.5, 0) @ values
        mistakes = {
            "the answer is the plain mean of the values and does not depend on the query.": values.mean(0),
            "the scores are not scaled: divide them by the square root of the channels.": scores.softmax(0) @ values,
            "the scores are divided by c, not by the square root of c.": (scores / 6).softmax(0) @ values,
            "the scores are divided by the square root of the number of keys, not of channels.": (
                (scores / 9**0.5).softmax(0) @ values
            ),
            "the scaling comes too late: divide the scores before the softmax, not the weights after it.": (
                scores.softmax(0) / 6**0.5 @ values
            ),
            "the values are weighted by the scores themselves: the softmax is missing.": scores / 6**0.5 @ values,
        }
    not_known(found, mistakes)
    close("the answer", found, wanted)
    found.sum().backward()
    has_gradient("the query, the keys and the values", *inputs)
    with torch.no_grad():
        if not torch.as_tensor(answer(200 * query, keys, values)).isfinite().all():
            raise Mistake("large scores overflow: subtract the largest before the exponential (torch.softmax does).")
    return "That is all of attention; what remains is to do it for many queries and heads at once."


@exercise(
    "1.2",
    "Split torch.arange(12).view(3, 4) into 2 heads: token 0 is [0, 1, 2, 3]. Which channels belong to head 0?",
    "reshape keeps the memory order, in which the tokens come first, not the heads.",
    "Split the channels only, `x.unflatten(1, (heads, -1))`, and then swap the first two axes.",
)
def splitting(answer: Callable[..., Any]) -> str:
    """Channels into heads."""
    x = torch.randn(5, 12)
    found = answer(x, 3)
    if isinstance(found, Tensor) and found.shape == (5, 3, 4):
        raise Mistake("the heads should be the first axis and the tokens the second: swap them.")
    same_shape("the result", found, (3, 5, 4))
    mistakes = {
        "head 0 holds all channels of the first tokens and never sees the other tokens: a plain reshape splits the "
        "tokens, not the channels.": x.reshape(3, 5, 4),
        "head i has every third channel, starting at i. Heads are blocks of adjacent channels; otherwise weights of "
        "other models cannot be loaded.": x.unflatten(1, (4, 3)).permute(2, 0, 1),
    }
    not_known(found, mistakes)
    close("the result", found, x.unflatten(1, (3, 4)).transpose(0, 1))
    return "A head has all tokens, and its own block of channels of each token. The shape alone does not show this."


@exercise(
    "1.3",
    "Compute the entropy of each row over the last axis, and take the exponential of it.",
    "0 * log(0) is 0 * -inf, which is NaN. The limit of a ln a for a to 0 is 0: a zero weight should add 0.",
    "`torch.special.entr(weights)` is -a ln a, with 0 at 0; or clamp before the logarithm.",
)
def effective_cells(answer: Callable[..., Any]) -> str:
    """The exponential of the entropy of attention weights."""
    weights = torch.softmax(3 * torch.randn(2, 5, 8), -1)
    found = answer(weights)
    same_shape("the result for weights of shape (2, 5, 8)", found, (2, 5))
    entropy = torch.special.entr(weights).sum(-1)
    mistakes = {
        "the numbers are all 0: compute the entropy of each row, and its exponential.": torch.zeros_like(entropy),
        "this is the entropy itself; its exponential is the number of patches.": entropy,
        "the sign of the entropy is wrong: a ln a is negative, so the numbers are below 1.": (-entropy).exp(),
        "the logarithm is to base 2 and the exponential to base e: take the natural logarithm.": (
            (entropy / torch.tensor(2.0).log()).exp()
        ),
    }
    not_known(found, mistakes)
    close("the number", found, entropy.exp(), tolerance=1e-3)
    sure = torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.5, 0.0, 0.5, 0.0], [0.25, 0.25, 0.25, 0.25]])
    found = answer(sure)
    if found.isnan().any():
        raise Mistake("a weight of exactly 0 gives NaN: 0 times the logarithm of 0. It should add 0.")
    close("the number for rows with weights of 0", found, torch.tensor([1.0, 2.0, 4.0]), tolerance=1e-3)
    return "A number of patches is easier to picture than an entropy in nats, and has the same information."


@exercise(
    "1.4",
    "Mask the keys before the softmax, so that the visible ones share all of the weight.",
    "A row of -inf gives NaN. A large negative number instead makes such a row uniform; then set it to 0.",
    "`scores.masked_fill(mask, torch.finfo(scores.dtype).min)`, the softmax, and then the stub's masked_fill.",
)
def surviving_softmax(answer: Callable[..., Any]) -> str:
    """A masked softmax without NaN."""
    scores = (4 * torch.randn(4, 6)).requires_grad_()
    mask = torch.rand(4, 6) < 0.4
    mask[0], mask[1, :3] = False, torch.tensor([True, False, True])
    mask[3] = True  # no visible key
    found = answer(scores, mask)
    same_shape("the result", found, (4, 6))
    with torch.no_grad():
        visible = scores[:3].masked_fill(mask[:3], float("-inf")).softmax(-1)
        late = scores[:3].softmax(-1).masked_fill(mask[:3], 0.0)
        inverted = scores[:3].masked_fill(~mask[:3], float("-inf")).softmax(-1)
    not_known(
        found[:3],
        {
            "rows no longer sum to 1: the mask comes after the softmax, so hidden keys have received part of the "
            "weight before they are set to 0.": late,
            "the mask is not used.": scores[:3].softmax(-1),
        },
    )
    if torch.allclose(found[1].detach(), inverted[1], atol=1e-5):
        raise Mistake("the mask is inverted: True means hidden.")
    close("the weights", found[:3], visible)
    if found[3].isnan().any():
        raise Mistake("the row whose keys are all masked is NaN: its softmax is 0 / 0.")
    if torch.allclose(found[3], torch.full((6,), 1 / 6)):
        raise Mistake("the row whose keys are all masked has uniform weights; they should be 0.")
    close("the row whose keys are all masked", found[3], torch.zeros(6))
    (found * torch.arange(6.0)).sum().backward()
    if scores.grad is not None and scores.grad.isnan().any():
        raise Mistake(
            "the values are right, but the gradient is NaN: you replace a NaN afterwards, but its derivative stays. "
            "Avoid the NaN itself."
        )
    has_gradient("the scores", scores)
    with torch.no_grad():
        if not answer(1000 * scores, mask).isfinite().all():
            raise Mistake("large scores overflow: use torch.softmax for the exponentials.")
    return "Values and gradients are finite even without visible keys, so one empty image cannot break the training."


@exercise(
    "1.5",
    "Count the cells as the table above does, rounding up.",
    "Every cell has a weight for every cell: the square of their number. Multiply by heads, images and bytes.",
    "`cells = -(-height // stride) * -(-width // stride)`; the rest are factors.",
)
def bytes_of_weights(answer: Callable[..., Any]) -> str:
    """Memory of dense self-attention."""
    found = answer(800, 1066, 32)
    if not isinstance(found, (int, float)):
        raise Mistake(f"the number of bytes should be a number, but is {type(found).__name__}.")
    tokens, below = 25 * 34, 25 * 33
    known: dict[float, str] = {
        tokens: "these are the tokens; every token has a weight for every other.",
        below: "these are the tokens, and too few: 1066 / 32 is not an integer, and the last column counts too.",
        tokens**2: "these are the weights of one head; there are 8, of 4 bytes each.",
        8 * tokens**2: "this is the number of weights; each takes 4 bytes.",
        4 * tokens**2: "the heads are missing: each has its own weights.",
        32 * below**2: "1066 / 32 is not an integer; the partly covered column of cells counts too.",
        32 * tokens: "every token has a weight for every other: S squared, not S.",
        8 * 2 * tokens**2: "float32 has 4 bytes, float16 has 2.",
    }
    if found in known:
        raise Mistake(known[found])
    for height, width, stride, heads, batch, bytes_each in (
        (800, 1066, 32, 8, 1, 4),
        (407, 640, 16, 8, 2, 4),
        (640, 427, 8, 4, 3, 2),
        (33, 32, 32, 1, 1, 4),
    ):
        wanted = (-(-height // stride) * -(-width // stride)) ** 2 * heads * batch * bytes_each
        found = answer(height, width, stride, heads, batch, bytes_each)
        if found != wanted:
            case = f"{height} x {width} at stride {stride}, {heads} heads, batch of {batch}, {bytes_each} bytes each"
            raise Mistake(f"for {case} it should be {wanted:,}, but is {found:,}.")
    return "Stride 8 at 800 x 1066 takes 5.4 GiB per image and layer, without gradients: too much for dense attention."
