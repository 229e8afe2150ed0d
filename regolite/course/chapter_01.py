"""Checkers of notebook 01: attention, its gradient, heads, masks, and the module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from regolite.course import Mistake, alike, close, exercise, has_gradient, same_shape
from regolite.models.attention import MultiHeadAttention
from regolite.types import Memory


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
    "Two steps: the gradient of weight i is g . v_i; then multiply by the softmax's derivative, a_i (delta_ij - a_j).",
    "The second term sums over all keys: sum_i a_i (g . v_i) is the same number for every j. What is sum_i a_i v_i?",
    "It is a_j times (g . v_j - g . o) with the output o = weights @ values.",
)
def gradient_of_scores(answer: Callable[..., Any]) -> str:
    """The gradient of attention scores without autograd."""
    for shape in ((5, 3), (8, 2)):
        scores, values, g = torch.randn(shape[0], requires_grad=True), torch.randn(*shape), torch.randn(shape[1])
        weights = torch.softmax(scores, 0)
        [wanted] = torch.autograd.grad(weights @ values @ g, scores, retain_graph=True)
        weights = weights.detach()
        found = answer(weights, values, g)
        same_shape(f"the gradient for {shape[0]} keys", found, wanted.shape)
        gain = values @ g  # the gradient of the weights
        mistakes = {
            "this is the gradient of the weights; it still has to go through the softmax.": gain,
            "raising one score lowers the other weights, since they sum to 1: subtract the "
            "weighted mean over the keys.": weights * gain,
            "only the diagonal of the softmax's derivative is used: a score changes every weight, not only its own.": (
                weights * (1 - weights) * gain
            ),
            "the present output is the mean of the values *with the weights*, not their plain mean.": (
                weights * (gain - gain.mean())
            ),
            "the sign is wrong: this is the direction of a descent step, minus the gradient.": -wanted,
            "the factor a_j is missing: a key that is not read cannot gain much.": gain - weights @ gain,
            "one factor a_j too many.": weights * wanted,
        }
        not_known(found, mistakes)
        close("the gradient", found, wanted)
    return (
        "A score rises in descent if its value lies on the better side of the present output, and in proportion to its "
        "weight: with S equal weights every gradient is of order 1 / S. The sum over the keys is 0."
    )


@exercise(
    "1.3",
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
        batch = torch.stack([scores, -scores])[:, None].expand(2, 3, 4, 6)  # [B, M, Q, S]
        keys = torch.tensor([[False] * 6, [True, False, True, False, False, True]])
        found = answer(batch, keys[:, None, None])
        same_shape("the result for scores [B, M, Q, S] and a mask [B, 1, 1, S]", found, batch.shape)
        close("the weights of a batch", found, batch.masked_fill(keys[:, None, None], float("-inf")).softmax(-1))
        if not answer(1000 * scores, mask).isfinite().all():
            raise Mistake("large scores overflow: use torch.softmax for the exponentials.")
    return "Values and gradients are finite even without visible keys, so one empty image cannot break the training."


# What learners get wrong in multi-head attention, and how each mistake is recognized: `_attention` makes it.
MISTAKES = {
    "unscaled": "the scores are not scaled: divide them by the square root of C'.",
    "scaled by C": "the scores are divided by the square root of C; a head's dot product has only C' = C / M terms.",
    "no root": "the scores are divided by C', not by its square root.",
    "over queries": "the softmax runs over the queries; the weights of a query over the keys should sum to 1.",
    "one head": "the channels are not split: this is a single head with all C channels.",
    "split": "the split into heads is a plain reshape, which splits the tokens (Exercise 1.3): unflatten the channels.",
    "interleaved": "head i has every M-th channel; heads are blocks of adjacent channels.",
    "merge": "the heads are merged in the wrong order: [B, M, Q, C'] needs its axes swapped to [B, Q, M, C'] first.",
    "no out": "the last linear layer, `out`, is not applied.",
    "key as value": "the values are computed from `key`: map `value` by the layer `value`.",
    "raw values": "the values are averaged as they are: map them by the layer `value` first.",
    "keys by query": "the keys are mapped by the layer `query`: use `key`.",
    "not hidden": "the mask changes nothing.",
    "inverted": "the mask is inverted: True means hidden. (F.scaled_dot_product_attention has it the other way.)",
    "late": "the mask comes after the softmax, so hidden keys still take their part of the weight (Exercise 1.4).",
    "zeroed": "hidden keys get the score 0, which is a score like any other; it must be minus infinity.",
}


def _attention(
    module: MultiHeadAttention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, mistake: str = ""
) -> Tensor:
    """Multi-head attention with the module's weights, correct or with one of MISTAKES."""
    batch, heads, dim = query.shape[0], 1 if mistake == "one head" else module.heads, query.shape[-1]

    def split(x: Tensor) -> Tensor:
        if mistake == "split":
            return x.reshape(batch, heads, x.shape[1], -1)
        if mistake == "interleaved":
            return x.unflatten(2, (-1, heads)).permute(0, 3, 1, 2)
        return x.unflatten(2, (heads, -1)).transpose(1, 2)

    q, k = split(module.query(query)), split((module.query if mistake == "keys by query" else module.key)(key))
    v = split(value if mistake == "raw values" else module.value(key if mistake == "key as value" else value))
    scale = {"unscaled": 1.0, "scaled by C": dim**0.5, "no root": dim / heads}.get(mistake, (dim / heads) ** 0.5)
    scores = q @ k.transpose(-2, -1) / scale
    hidden = torch.zeros(batch, key.shape[1], dtype=torch.bool) if mask is None or mistake == "not hidden" else mask
    hidden = (~hidden if mistake == "inverted" and mask is not None else hidden)[:, None, None]
    if mistake != "late":
        scores = scores.masked_fill(hidden, 0.0 if mistake == "zeroed" else float("-inf"))
    weights = torch.softmax(scores, -2 if mistake == "over queries" else -1)
    if mistake == "late":
        weights = weights.masked_fill(hidden, 0.0)
    mixed = weights @ v
    if mistake == "interleaved":
        mixed = mixed.permute(0, 2, 3, 1).flatten(2)
    else:
        mixed = mixed.reshape(batch, -1, dim) if mistake == "merge" else mixed.transpose(1, 2).flatten(2)
    return mixed if mistake == "no out" else module.out(mixed)


def _name_mistake(module: MultiHeadAttention, found: Tensor, inputs: tuple[Tensor, ...], masked: bool) -> None:
    """Raise the Mistake whose output is ``found``, if one is known."""
    q, k, v = inputs[:3]
    mask = inputs[3] if masked else None
    for mistake, message in MISTAKES.items():
        if (mistake in ("not hidden", "inverted", "late", "zeroed")) == masked and alike(
            found, _attention(module, q, k, v, mask, mistake)
        ):
            raise Mistake(message)


@exercise(
    "1.5",
    "Write a method that splits [B, N, C] into [B, M, N, C'] (your solution of 1.3 with one axis more in front), and "
    "use it for queries, keys and values.",
    "scores are q @ k.transpose(-2, -1) / C' ** 0.5, [B, M, Q, S]. A mask [B, S] fits after mask[:, None, None].",
    "forward: weights of step 3, F.dropout(weights, self.dropout, self.training), times v, then "
    "transpose(1, 2).flatten(2), then self.out. For rows without a key use masked_softmax of 1.4.",
)
def multi_head_attention(answer: Any) -> str:
    """The class MultiHeadAttention."""
    if not isinstance(answer, type):
        raise Mistake("the answer should be the class itself, not an object of it.")
    ours, reference = _construct(answer)
    q, k, v = torch.randn(3, 5, 12), torch.randn(3, 7, 12), torch.randn(3, 7, 12)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    found = ours(q, k, v)
    same_shape("the output for 5 queries and 7 keys", found, (3, 5, 12))
    with torch.no_grad():
        _name_mistake(reference, found, (q, k, v), masked=False)
        close("the output", found, reference(q, k, v))
    (found * torch.randn(3, 5, 12)).sum().backward()
    has_gradient("queries, keys and values", *inputs)
    for name, layer in ours.named_children():
        has_gradient(f"the layer `{name}`", layer.weight)
    with torch.no_grad():
        _check_weights(ours, reference, q, k)
    _check_masks(ours, reference, q, k, v)
    with torch.no_grad():
        _check_dropout(answer, reference, q, k, v)
        places = torch.randn(3, 7, 12)
        memory = Memory(k, places, torch.arange(7) >= torch.tensor([[7], [5], [4]]), [(1, 7)])
        if not callable(getattr(ours, "look", None)) or not alike(ours.look(q, memory), reference.look(q, memory)):
            raise Mistake("the method `look`, which was given, is missing or changed: chapter 03 needs it.")
    return "It equals the package's class in outputs, weights and gradients, with and without hidden keys."


def _construct(answer: type) -> tuple[Any, MultiHeadAttention]:
    """A learner's module with its weights copied from the package's; Mistakes of the constructor."""
    ours, reference = answer(12, 3), MultiHeadAttention(12, 3)
    if not isinstance(ours, nn.Module):
        raise Mistake("the class should be an nn.Module.")
    layers, wanted = dict(ours.named_children()), ("query", "key", "value", "out")
    for name in wanted:
        if not isinstance(layers.get(name), nn.Linear):
            raise Mistake(f"there should be a layer `self.{name} = nn.Linear(dim, dim)`.")
    shapes = {name: tuple(tensor.shape) for name, tensor in ours.state_dict().items()}
    for name, tensor in reference.state_dict().items():
        if shapes.get(name) != tuple(tensor.shape):
            raise Mistake(f"`{name}` should have shape {tuple(tensor.shape)}, but has {shapes.get(name, 'no values')}.")
    if more := sorted(set(shapes) - set(reference.state_dict())):
        raise Mistake(f"there are parameters that the specification does not have: {', '.join(more)}.")
    if getattr(ours, "heads", None) != 3 or getattr(answer(12, 2, 0.25), "dropout", None) != 0.25:
        raise Mistake("store the arguments as `self.heads` and `self.dropout`; the default of dropout is 0.")
    wide = answer(64, 4)
    if any(getattr(wide, name).bias.any() for name in wanted):
        raise Mistake("initialize the biases with zeros (nn.init.zeros_).")
    # The bound of Xavier's uniform distribution for a matrix [C, C]; for one matrix [3C, C] of queries, keys and
    # values, as in the package, it is sqrt(1 / 2) times as large. nn.Linear's own is 1 / 8.
    bounds = {name: [(3 / 64) ** 0.5] + [(3 / 128) ** 0.5] * (name != "out") for name in wanted}
    largest = {name: float(getattr(wide, name).weight.detach().abs().max()) for name in wanted}
    if any(not any(0.95 * bound < largest[name] <= bound for bound in bounds[name]) for name in wanted):
        raise Mistake("initialize the weights of all four layers with nn.init.xavier_uniform_.")
    try:
        answer(12, 5)
    except ValueError:
        pass
    else:
        raise Mistake("5 heads do not divide 12 channels: the constructor should raise ValueError.")
    for name, parameter in reference.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    ours.load_state_dict(reference.state_dict())
    return ours, reference


def _check_weights(ours: Any, reference: MultiHeadAttention, q: Tensor, k: Tensor) -> None:
    """Raise a Mistake if ``weights`` is wrong."""
    mask = torch.arange(7) >= torch.tensor([[7], [5], [2]])
    for hidden in (None, mask):
        wanted = reference.weights(q, k, hidden)
        found = ours.weights(q, k) if hidden is None else _masked(lambda: ours.weights(q, k, mask))
        if isinstance(found, Tensor) and alike(found, wanted.mean(1)):
            raise Mistake("`weights` returns the mean over the heads; keep the heads: [B, M, Q, S].")
        same_shape("the result of `weights`", found, wanted.shape)
        if not alike(found.sum(-1), torch.ones(3, 3, 5)):
            raise Mistake("the rows of `weights` should sum to 1" + ("." if hidden is None else ", also with a mask."))
        close("`weights`" + ("" if hidden is None else " with a mask"), found, wanted)


def _masked(run: Callable[[], Any]) -> Any:
    """The result of a call with a mask; a Mistake if the mask does not broadcast."""
    try:
        return run()
    except RuntimeError as error:
        raise Mistake(
            f"with a mask your code raised RuntimeError: {error}. The mask is [B, S] and the scores are [B, M, Q, S]: "
            "give it axes of length 1 for the heads and the queries."
        ) from None


def _check_masks(ours: Any, reference: MultiHeadAttention, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise a Mistake if hidden keys are not hidden, or an image without visible keys gives NaN."""
    mask = torch.arange(7) >= torch.tensor([[6], [5], [2]])
    mask[1, 0] = True
    with torch.no_grad():
        found = _masked(lambda: ours(q, k, v, mask))
        same_shape("the output with a mask", found, (3, 5, 12))
        _name_mistake(reference, found, (q, k, v, mask), masked=True)
        close("the output with a mask", found, reference(q, k, v, mask))
        if not alike(ours(q, k, v, mask=torch.zeros_like(mask)), reference(q, k, v)):
            raise Mistake("a mask that hides nothing changes the output.")
    mask[2] = True
    ours.zero_grad()
    found = ours(q, k, v, mask)
    if not found.isfinite().all():
        raise Mistake("an image whose keys are all hidden gives NaN: use masked_softmax of Exercise 1.4.")
    if not alike(found[:2], reference(q, k, v, mask)[:2]):
        raise Mistake("an image whose keys are all hidden changes the output of the other images.")
    found.square().sum().backward()
    if not all(parameter.grad.isfinite().all() for parameter in ours.parameters()):
        raise Mistake("an image whose keys are all hidden gives finite outputs, but gradients with NaN.")


def _check_dropout(answer: type, reference: MultiHeadAttention, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise a Mistake if dropout is applied where it should not be, or not where it should."""
    dropping = answer(12, 3, 0.5)
    dropping.load_state_dict(reference.state_dict())
    expected = reference(q, k, v)
    if not alike(dropping.eval()(q, k, v), expected):
        raise Mistake("dropout is active in evaluation mode: apply it only if self.training.")
    dropping.train()
    if alike(dropping(q, k, v), expected):
        raise Mistake("dropout does nothing in training mode.")
    if not alike(dropping.weights(q, k), reference.weights(q, k)):
        raise Mistake("`weights` drops in training mode; only `forward` should.")
    if (dropping(q, k, v) == 0).float().mean() > 0.2:
        raise Mistake("dropout is applied to the output; it belongs on the weights, before they meet the values.")
    same_queries = dropping(q[:, :1].expand(-1, 5, -1), k, v)
    if alike(same_queries, same_queries[:, :1].expand(-1, 5, -1)):
        raise Mistake("dropout is applied to the values; it belongs on the weights, where each query has its own.")
    same_values = v[:, :1].expand(-1, 7, -1)  # whatever the weights are, as long as they sum to 1
    if alike(dropping(q, k, same_values), reference(q, k, same_values)):
        raise Mistake("dropout comes too early: apply it to the weights, after the softmax.")
    mean = torch.stack([dropping(q, k, v) for _ in range(200)]).mean(0)
    if (mean - expected).abs().max() > 0.5:
        raise Mistake("dropout changes the mean of the output: F.dropout divides what remains by 1 - p.")
