"""Checkers of notebook 03: encoder and decoder."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regolite.course import Mistake, alike, close, exercise, has_gradient, same_shape
from regolite.models.attention import MultiHeadAttention
from regolite.models.transformer import DecoderLayer, EncoderLayer
from regolite.types import Memory

C, HEADS, FFN = 16, 2, 32


@exercise(
    "3.1",
    "Everything happens within one token: the mean and the variance are taken over the last dimension, dim=-1.",
    "Keep the dimension (keepdim=True), so that [B, S, 1] broadcasts against [B, S, C].",
    "The variance is the mean of the squared deviations, unbiased=False. eps is added to it, then comes the root.",
)
def layer_norm(answer: Callable[..., Tensor]) -> str:
    """LayerNorm by hand."""
    x = torch.randn(2, 7, C) * torch.rand(2, 7, 1) * 4 + 3 * torch.randn(2, 7, 1)
    x[0, 3] = 2.0 + 1e-3 * torch.randn(C)  # a token that is nearly constant shows eps
    weight, bias = torch.rand(C) + 0.5, torch.randn(C)
    found = answer(x.clone(), weight, bias)
    same_shape("layer_norm(x, weight, bias)", found, x.shape)
    deviation = x - x.mean(-1, keepdim=True)
    variance = deviation.square().mean(-1, keepdim=True)
    unbiased = x.var(-1, keepdim=True)
    known = {
        "the tokens are unchanged.": x,
        "the mean and the variance are taken over the tokens. A LayerNorm looks at one token: take them over the "
        "channels, the last dimension.": F.layer_norm(x.transpose(1, 2), (7,)).transpose(1, 2) * weight + bias,
        "one mean and one variance for the whole tensor: every token needs its own.": (
            (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt() * weight + bias
        ),
        "one mean and one variance for each image: every token needs its own.": (
            F.layer_norm(x, (7, C)) * weight + bias
        ),
        "this is divided by the variance; divide by its root, the standard deviation.": (
            deviation / (variance + 1e-5) * weight + bias
        ),
        "the mean is not subtracted.": x / (variance + 1e-5).sqrt() * weight + bias,
        "the mean is not subtracted. Dividing by the root mean square is another norm, RMSNorm.": (
            x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias
        ),
        "the variance is the unbiased estimate, with C - 1 in the denominator. LayerNorm divides by C.": (
            deviation / (unbiased + 1e-5).sqrt() * weight + bias
        ),
        "the variance is the unbiased estimate, with C - 1 in the denominator (the default of torch.std and "
        "torch.var). LayerNorm divides by C.": deviation / (unbiased.sqrt() + 1e-5) * weight + bias,
        "the learned factors and shifts are not used: weight and bias.": deviation / (variance + 1e-5).sqrt(),
        "the learned shifts, bias, are not added.": deviation / (variance + 1e-5).sqrt() * weight,
        "the learned factors, weight, are not used.": deviation / (variance + 1e-5).sqrt() + bias,
        "eps is missing: a token whose channels are all equal would divide 0 by 0.": (
            deviation / variance.sqrt() * weight + bias
        ),
        "eps is added to the standard deviation. It belongs to the variance, under the root.": (
            deviation / (variance.sqrt() + 1e-5) * weight + bias
        ),
        "weight and bias are applied before the token is normalized.": F.layer_norm(x * weight + bias, (C,)),
    }
    wanted = F.layer_norm(x, (C,), weight, bias)
    for said, wrong in known.items():
        if alike(found, wrong) and not alike(wrong, wanted):
            raise Mistake(said)
    close("the normalized token", found, wanted, tolerance=1e-3)
    close("layer_norm of tokens without a batch, [S, C]", answer(x[0], weight, bias), wanted[0], tolerance=1e-3)
    constant = answer(torch.full((1, 2, C), 3.0), weight, bias)
    if not constant.isfinite().all():
        raise Mistake("a token whose channels are all equal gives NaN: eps is missing in the denominator.")
    for tensor in (x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()):
        tensor.grad = None
    (answer(x, weight, bias) * torch.randn(C)).sum().backward()
    has_gradient("the tokens", x)
    has_gradient("weight and bias", weight, bias)
    return "Every token has mean 0 and variance 1 over its channels, until weight and bias say otherwise."


@exercise(
    "3.2",
    "Two lines, one for each branch, each starting with `tokens = tokens + ...`.",
    "The norms are inside the branches: n = layer.attention_norm(tokens) replaces the tokens there.",
    "The attention is called as layer.attention(n + positions, n + positions, n). No norm comes after a sum.",
)
def pre_norm(answer: Callable[..., Tensor]) -> str:
    """A pre-norm encoder layer."""
    attention = MultiHeadAttention(16, 2)
    layer = EncoderLayer(16, attention, 32, 0.0)
    for norm in (layer.attention_norm, layer.ffn_norm):  # make the two norms distinguishable
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
    tokens, positions = torch.randn(2, 7, 16), torch.randn(2, 7, 16)
    first, second = layer.attention_norm, layer.ffn_norm

    def run(keys: bool = True, values: bool = False, swapped: bool = False) -> Tensor:
        one, two = (second, first) if swapped else (first, second)
        n = one(tokens)
        q = n + positions
        x = tokens + attention(q, q if keys else n, q if values else n)
        return x + layer.ffn(two(x))

    with torch.no_grad():
        found = answer(layer, tokens.clone(), positions)
        same_shape("pre_norm(layer, tokens, positions)", found, (2, 7, 16))
        if alike(found, tokens):
            raise Mistake("the tokens are unchanged.")
        n = first(tokens)
        wrong = n + attention(n + positions, n + positions, n)
        before = first(tokens + positions)
        known = {
            "this is the post-norm layer: the norms come after the sums. Here they come before the branches.": layer(
                Memory(tokens, positions, None, [])
            ),
            "the positions were added to the values too: they belong to queries and keys only.": run(values=True),
            "the keys have no positions: both queries and keys need them.": run(keys=False),
            "the two norms are swapped: attention_norm belongs to the first branch, ffn_norm to the second.": run(
                swapped=True
            ),
            "the sum starts from the normalized tokens. The residual connection has no norm: add to the tokens "
            "themselves.": wrong + layer.ffn(second(wrong)),
            "the input of the feed-forward network is not normalized.": (
                (x := tokens + attention(n + positions, n + positions, n)) + layer.ffn(x)
            ),
            "the input of the attention is not normalized.": (
                (x := tokens + attention(tokens + positions, tokens + positions, tokens)) + layer.ffn(second(x))
            ),
            "the positions were added before the norm: normalize the tokens first, then add the positions.": (
                (x := tokens + attention(before, before, n)) + layer.ffn(second(x))
            ),
        }
        for said, mistaken in known.items():
            if alike(found, mistaken):
                raise Mistake(said)
        close("pre_norm(layer, tokens, positions)", found, run())
    return (
        "The residual path from the first layer to the last is now a plain sum, and its gradients are never rescaled."
    )


@exercise(
    "3.3",
    "An attention takes queries, keys, values and a mask. The queries are given; the other three are the memory's.",
    "What is compared carries its position, what is averaged does not.",
    "attention(queries, memory.tokens + memory.positions, ..., memory.mask): the values are the tokens alone.",
)
def look(answer: Callable[..., Tensor]) -> str:
    """Attention to a memory."""
    attention = MultiHeadAttention(C, HEADS)
    memory, queries = _memory(), torch.randn(2, 5, C)
    x, p, mask = memory.tokens, memory.positions, memory.mask
    assert mask is not None
    with torch.no_grad():
        found = answer(attention, queries.clone(), memory)
        if isinstance(found, Tensor) and found.shape == (2, 9, C):
            raise Mistake(
                "the result has a row for every token, 9, but 5 queries ask: queries and keys have changed places."
            )
        same_shape("look(attention, queries, memory)", found, (2, 5, C))
        known = {
            "the keys have no positions: a query could not ask for a place.": attention(queries, x, x, mask),
            "the positions were added to the values too. They say where a token is, not what it is: keys only.": (
                attention(queries, x + p, x + p, mask)
            ),
            "the positions were added to the values, but belong to the keys.": attention(queries, x, x + p, mask),
            "the keys are the positions alone: add them to the tokens.": attention(queries, p, x, mask),
            "the padding is not masked: tokens beside the image were attended to.": attention(queries, x + p, x),
            "the mask is inverted: here, True means padding.": attention(queries, x + p, x, ~mask),
            "the queries are unchanged.": queries,
            "the residual sum does not belong here: return what the attention gives.": (
                queries + attention(queries, x + p, x, mask)
            ),
        }
        for said, wrong in known.items():
            if alike(found, wrong):
                raise Mistake(said)
        close("look(attention, queries, memory)", found, attention(queries, x + p, x, mask))
        still = replace(memory, mask=None)
        close("the result without padding (mask None)", answer(attention, queries, still), attention(queries, x + p, x))
    return "This is the method `look` of MultiHeadAttention; every layer attends to an image through it."


@exercise(
    "3.4",
    "Keep five modules: the attention that you are given, a LayerNorm after each branch, a FeedForward, a Dropout.",
    "The first branch is self.attention.look(x + memory.positions, memory, reference_points), where x = memory.tokens.",
    "Both branches end alike: x = norm(x + dropout(branch)). The second branch reads what the first has returned.",
)
def encoder_layer(answer: Callable[..., nn.Module]) -> str:
    """The encoder layer, against the package's with the same weights."""
    ours = EncoderLayer(C, MultiHeadAttention(C, HEADS), FFN, 0.0)
    theirs = _built("EncoderLayer", answer, ours, C, MultiHeadAttention(C, HEADS), FFN, 0.0)
    memory = _memory()
    x, p, mask = memory.tokens, memory.positions, memory.mask
    one, two, ffn = ours.attention_norm, ours.ffn_norm, ours.ffn
    attention: Any = ours.attention
    with torch.no_grad():
        given = x.clone()
        found = theirs(memory)
        if isinstance(found, Memory):
            raise Mistake("forward returns a Memory. Return its updated tokens only; the encoder puts them back.")
        same_shape("the layer's output", found, x.shape)
        if not torch.equal(memory.tokens, given):
            raise Mistake("the tokens of the memory were changed in place, but others still use them.")
        seen = attention(x + p, x + p, x, mask)
        first = one(x + seen)
        before = one(x)
        middle = x + attention(before + p, before + p, before, mask)
        known = {
            "the tokens are unchanged.": x,
            "this is pre-norm. DETR's layers are post-norm: each norm comes after the sum.": middle + ffn(two(middle)),
            "the feed-forward network is missing.": first,
            "the feed-forward network is missing ": two(first),
            "the attention is missing.": two(x + ffn(x)),
            "the residual sums are missing: add each branch to its input.": two(ffn(one(seen))),
            "the attention's residual sum is missing: x + A(...).": two(one(seen) + ffn(one(seen))),
            "the feed-forward network's residual sum is missing.": two(ffn(first)),
            "the norms are missing.": x + seen + ffn(x + seen),
            "the norm after the attention is missing.": two(x + seen + ffn(x + seen)),
            "the norm after the feed-forward network is missing.": first + ffn(first),
            "the branches are normalized instead of the sums: LN(x + branch), not x + LN(branch).": (
                (y := x + one(seen)) + two(ffn(y))
            ),
            "the two norms are swapped: attention_norm belongs to the first branch, ffn_norm to the second.": (
                one((y := two(x + seen)) + ffn(y))
            ),
            "the same norm is used twice; each branch has its own.": one(first + ffn(first)),
            "the feed-forward network reads the layer's input. It reads what the first branch has made of it.": (
                two(first + ffn(x))
            ),
            "the second sum starts from the layer's input; start from what the first branch has returned.": (
                two(x + ffn(first))
            ),
            "the queries have no positions: self.attention.look adds them to the keys only.": (
                _post(attention(x, x + p, x, mask), x, ours)
            ),
            "positions are missing on queries and keys.": _post(attention(x, x, x, mask), x, ours),
            "the positions were added to the values too.": _post(attention(x + p, x + p, x + p, mask), x, ours),
            "the keys got their positions twice: `look` adds the memory's itself.": (
                _post(attention(x + p, x + 2 * p, x + p, mask), x, ours)
            ),
            "the positions were added to the tokens for good. They are added where the attention compares, and the "
            "sum goes on without them.": _post(seen, x + p, ours),
            "the padding is not masked.": _post(attention(x + p, x + p, x), x, ours),
        }
        wanted = ours(memory)
        _name(found, wanted, known, "the layer's output")
        close(
            "the output without padding (mask None)",
            theirs(replace(memory, mask=None)),
            ours(replace(memory, mask=None)),
        )
    _reaches(theirs, lambda layer, tokens: layer(replace(memory, tokens=tokens)), x)
    _follows("EncoderLayer", answer(C, _Recorder(), FFN, 0.0), "attention", 9, lambda m, layer, r: layer(m, r))
    _drops(
        answer(C, MultiHeadAttention(C, HEADS), FFN, 1.0),
        lambda layer: layer(memory),
        lambda layer: layer.ffn_norm(layer.attention_norm(x)),
    )
    return "It equals the package's layer: output, padding, gradients and dropout."


@exercise(
    "3.5",
    "Three branches in this order: self-attention among the queries, cross-attention to the memory, feed-forward.",
    "Self-attention compares x + positions with x + positions and averages x; query_mask is its mask.",
    "The cross-attention is self.cross_attention.look(x + positions, memory, reference_points). branch_scale "
    "multiplies what comes out of the two attentions, before it is added.",
)
def decoder_layer(answer: Callable[..., nn.Module]) -> str:
    """The decoder layer, against the package's with the same weights."""
    ours = DecoderLayer(C, HEADS, MultiHeadAttention(C, HEADS), FFN, 0.0)
    theirs = _built("DecoderLayer", answer, ours, C, HEADS, MultiHeadAttention(C, HEADS), FFN, 0.0)
    memory = _memory()
    h, e = torch.randn(2, 6, C), torch.randn(2, 6, C)
    hidden = torch.zeros(2, 6, dtype=torch.bool)
    hidden[1, 4:] = True
    with torch.no_grad():
        given = h.clone()
        found = theirs(h, e, memory)
        same_shape("the layer's output", found, h.shape)
        if not torch.equal(h, given):
            raise Mistake("the queries were changed in place, but the caller still needs them.")
        run = _decoding(ours, h, e, memory)
        known = {
            "the queries are unchanged.": h,
            "the cross-attention comes first here. Self-attention among the queries is the first branch.": run("xsf"),
            "the self-attention among the queries is missing.": run("xf"),
            "the cross-attention to the memory is missing.": run("sf"),
            "the feed-forward network is missing.": run("sx"),
            "the queries' positions are missing in the self-attention.": run(self_positions=""),
            "the queries' positions are missing on the keys of the self-attention.": run(self_positions="q"),
            "the queries' positions were added to the values of the self-attention too.": run(self_positions="qkv"),
            "the queries' positions are missing in the cross-attention: what asks is x + positions.": (
                run(cross_positions=False)
            ),
            "the queries' positions are not used.": run(self_positions="", cross_positions=False),
            "the queries' positions were added to the hidden states for good. They are added where the attentions "
            "compare.": run(for_good=True),
            "the self-attention reads the memory: its queries, keys and values are all the hidden states.": (
                run(self_reads_memory=True)
            ),
            "the residual sums are missing: add each branch to its input.": run(residual=""),
            "the residual sum of the self-attention is missing.": run(residual="xf"),
            "the residual sum of the cross-attention is missing.": run(residual="sf"),
            "the residual sum of the feed-forward network is missing.": run(residual="sx"),
            "this is pre-norm. DETR's layers are post-norm: each norm comes after the sum.": run(pre_norm=True),
            "the norms are missing.": run(norms={}),
            "the norms of the two attentions are swapped: self_norm follows the self-attention.": (
                run(norms={"s": ours.cross_norm, "x": ours.self_norm, "f": ours.ffn_norm})
            ),
            "one norm is used for all branches; each has its own.": run(norms=dict.fromkeys("sxf", ours.self_norm)),
            "the cross-attention asks with the layer's input. It asks with what the self-attention's branch has "
            "returned, plus positions.": run(stale=True),
            "each branch reads the layer's input. It reads what the branch before has returned.": run(parallel=True),
        }
        _name(found, ours(h, e, memory), known, "the layer's output")
        at = "the output for positions=0.0 (queries without positions)"
        close(at, theirs(h, 0.0, memory), ours(h, 0.0, memory))
        masked, wanted = theirs(h, e, memory, query_mask=hidden), ours(h, e, memory, query_mask=hidden)
        if alike(masked, found):
            raise Mistake("query_mask has no effect: it is the mask of the self-attention.")
        if not masked.isfinite().all():
            raise Mistake(
                "with a query_mask the output has NaN: it belongs to the self-attention, and True means hidden."
            )
        if alike(masked[1:], ours(h, e, memory, query_mask=~hidden)[1:]):
            raise Mistake("query_mask is inverted: True means hidden.")
        close("the output with a query_mask", masked, wanted)
        scaled = answer(C, HEADS, MultiHeadAttention(C, HEADS), FFN, 0.0, branch_scale=0.5)
        scaled.load_state_dict(ours.state_dict())
        ours.branch_scale = 0.5
        halves = scaled(h, e, memory)
        _name(
            halves,
            ours(h, e, memory),
            {
                "branch_scale has no effect: it multiplies what comes out of the two attentions.": found,
                "branch_scale multiplies the feed-forward network too; only the two attentions are scaled.": (
                    run(scale={"s": 0.5, "x": 0.5, "f": 0.5})
                ),
                "branch_scale multiplies the cross-attention only.": run(scale={"x": 0.5}),
                "branch_scale multiplies the self-attention only.": run(scale={"s": 0.5}),
            },
            "the output with branch_scale=0.5",
        )
        ours.branch_scale = 1.0
    _reaches(theirs, lambda layer, queries: layer(queries, e, memory), h)
    _follows(
        "DecoderLayer",
        answer(C, HEADS, _Recorder(), FFN, 0.0),
        "cross_attention",
        6,
        lambda m, layer, r: layer(h, e, m, r),
    )
    _drops(
        answer(C, HEADS, MultiHeadAttention(C, HEADS), FFN, 1.0),
        lambda layer: layer(h, e, memory),
        lambda layer: layer.ffn_norm(layer.cross_norm(layer.self_norm(h))),
    )
    return "It equals the package's layer: output, masks, gradients, scale and dropout."


@exercise(
    "3.6",
    "torch.autograd.functional.jacobian(answer, E) has shape [Q, C, Q, C]: first the output, then the input.",
    "Square it, sum over both channels (dimensions 1 and 3), take the root.",
    "Row i is the output, column j the input, so no transposition is needed.",
)
def influence(answer: Callable[..., Tensor]) -> str:
    """How much each query's output depends on each query's embedding."""
    layer = DecoderLayer(8, 2, MultiHeadAttention(8, 2), 16, 0.0)
    memory = Memory(torch.randn(1, 11, 8), torch.randn(1, 11, 8), None, [])
    E = torch.randn(5, 8)
    mix = torch.rand(5, 5)
    mix[0] += 3.0  # one output that depends on all inputs, to distinguish rows and columns

    def decode(e: Tensor) -> Tensor:
        # channels that do not sum to zero, unlike directly after a LayerNorm
        return (mix @ layer(torch.zeros_like(e)[None], e[None], memory)[0]) * torch.linspace(0.5, 2.0, 8)

    jacobian = torch.autograd.functional.jacobian(decode, E)
    wanted = jacobian.square().sum((1, 3)).sqrt()
    found = answer(decode, E.clone())
    same_shape("influence(answer, E)", found, (5, 5))
    if not found.any():
        raise Mistake("the matrix is all zero.")
    known = {
        "the matrix is transposed: entry (i, j) is how output i depends on input j.": wanted.T,
        "these are sums of squares: the root is missing.": jacobian.square().sum((1, 3)),
        "derivatives of both signs were summed and cancel: square them before summing.": jacobian.sum((1, 3)),
        "derivatives of both signs were summed and cancel: square them before summing ": (jacobian.sum((1, 3)).abs()),
        "these are sums of absolute values; the norm is the root of the sum of squares.": jacobian.abs().sum((1, 3)),
        "the channels of the output were summed before the derivative, and cancel: differentiate every channel of an "
        "output separately.": jacobian.sum(1).square().sum(-1).sqrt(),
    }
    for said, wrong in known.items():
        if alike(found, wrong, 1e-3):
            raise Mistake(f"{said.rstrip(' .')}.")
    close("influence(answer, E)", found, wanted, tolerance=1e-3 * float(wanted.max()))
    alone = answer(lambda e: (e @ torch.eye(8)) * 3, E.clone())
    close("the influence without interaction of queries", alone, torch.eye(5) * 3 * math.sqrt(8), tolerance=1e-3)
    return "The off-diagonal entries come from self-attention between queries; without it the matrix is diagonal."


def _memory() -> Memory:
    """Nine tokens of two images, the last three of the second image padding."""
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[1, 6:] = True
    return Memory(torch.randn(2, 9, C), torch.randn(2, 9, C), mask, [(3, 3)])


def _post(seen: Tensor, x: Tensor, layer: EncoderLayer) -> Tensor:
    """The rest of a post-norm encoder layer, given the first branch and what it is added to."""
    x = layer.attention_norm(x + seen)
    return layer.ffn_norm(x + layer.ffn(x))


def _decoding(layer: DecoderLayer, h: Tensor, e: Tensor, memory: Memory) -> Callable[..., Tensor]:
    """The decoder layer with chosen mistakes; its branches: s self-attention, x cross-attention, f feed-forward."""

    def run(
        order: str = "sxf",
        residual: str = "sxf",
        self_positions: str = "qk",
        cross_positions: bool = True,
        for_good: bool = False,
        self_reads_memory: bool = False,
        pre_norm: bool = False,
        parallel: bool = False,
        stale: bool = False,
        norms: dict[str, nn.Module] | None = None,
        scale: dict[str, float] | None = None,
    ) -> Tensor:
        own: dict[str, nn.Module] = {"s": layer.self_norm, "x": layer.cross_norm, "f": layer.ffn_norm}
        used = own if norms is None else norms
        x = h + e if for_good else h
        for part in order:
            norm = used.get(part, nn.Identity())
            y = h if parallel else norm(x) if pre_norm else x
            if part == "f":
                branch = layer.ffn(y)
            elif part == "x":
                asks = h + e if stale else y + e if cross_positions and not for_good else y
                branch = layer.cross_attention.look(asks, memory)
            elif self_reads_memory:
                branch = layer.self_attention.look(y + e, memory)
            else:
                q, k, v = (y + e if role in self_positions and not for_good else y for role in "qkv")
                branch = layer.self_attention(q, k, v)
            branch = (scale or {}).get(part, 1.0) * branch
            x = x + branch if part in residual else branch
            x = x if pre_norm else norm(x)
        return x

    return run


def _built(name: str, answer: Callable[..., Any], ours: nn.Module, *arguments: Any) -> nn.Module:
    """The learner's module with random weights that it shares with the package's."""
    if not inspect.isclass(answer) or not issubclass(answer, nn.Module):
        raise Mistake(f"the answer should be the class {name}, an nn.Module, not an object or a function.")
    theirs: nn.Module = answer(*arguments)
    wanted, found = ours.state_dict(), theirs.state_dict()
    if missing := [key for key in wanted if key not in found]:
        part = missing[0].split(".")[0]
        if any(key.split(".")[0] == part for key in found):
            raise Mistake(f"self.{part} has other parameters than the package's: {missing[0]} is missing.")
        raise Mistake(f"the layer has no parameters self.{part}: keep the module's part under this name.")
    if extra := [key for key in found if key not in wanted]:
        raise Mistake(f"the layer has parameters that it does not need: {extra[0]}.")
    for key, value in found.items():
        if value.shape != wanted[key].shape:
            raise Mistake(f"{key} should have shape {tuple(wanted[key].shape)}, but has {tuple(value.shape)}.")
    with torch.no_grad():
        for key, parameter in ours.named_parameters():
            if "norm" in key and key.endswith("weight"):  # norms that can be told apart
                nn.init.uniform_(parameter, 0.5, 1.5)
            elif key.endswith("bias"):
                nn.init.normal_(parameter, std=0.5)
    theirs.load_state_dict(ours.state_dict())
    return theirs


def _name(found: Tensor, wanted: Tensor, known: dict[str, Tensor], what: str) -> None:
    """Raise a :class:`Mistake` that names a known mistake, or says where ``found`` differs."""
    if not alike(found, wanted):
        for said, wrong in known.items():
            if alike(found, wrong):
                raise Mistake(f"{said.rstrip(' .')}.")
    close(what, found, wanted)


class _Recorder(nn.Module):
    """An attention that has only the method ``look``, as in notebook 09, and keeps its arguments."""

    def look(self, queries: Tensor, memory: Memory, reference_points: Tensor | None = None) -> Tensor:
        self.seen = queries, memory, reference_points
        return torch.zeros_like(queries)


def _follows(
    name: str, layer: nn.Module, part: str, tokens: int, run: Callable[[Memory, nn.Module, Tensor], Tensor]
) -> None:
    """Check that a layer leaves to its attention how the image is attended to."""
    memory, points = _memory(), torch.rand(2, tokens, 1, 2)
    recorder = getattr(layer, part)
    if not isinstance(recorder, _Recorder):
        raise Mistake(f"self.{part} is not the attention that {name} was given.")
    try:
        run(memory, layer, points)
    except NotImplementedError:
        raise Mistake(
            f"self.{part} is called as a function. Call its method `look`: the attention of chapter 09 has no keys."
        ) from None
    if not hasattr(recorder, "seen"):
        raise Mistake(f"the method `look` of self.{part} is never called.")
    if recorder.seen[2] is not points:
        raise Mistake(f"reference_points are not handed on to self.{part}.look, which needs them in chapter 09.")


def _reaches(layer: nn.Module, run: Callable[[nn.Module, Tensor], Tensor], start: Tensor) -> None:
    """Check that gradients reach the input and all parameters."""
    start = start.clone().requires_grad_()
    layer.zero_grad()
    (run(layer, start) * torch.randn(start.shape)).sum().backward()
    has_gradient("the input", start)
    for key, parameter in layer.named_parameters():
        if not key.endswith("key.bias"):  # softmax ignores what all keys share
            has_gradient(key, parameter)


def _drops(layer: Any, run: Callable[[Any], Tensor], bare: Callable[[Any], Tensor]) -> None:
    """Check where dropout acts: at probability 1 it erases every branch in training, and nothing in evaluation."""
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, 0.3, 1.2)
    with torch.no_grad():
        layer.train()
        if not alike(run(layer), bare(layer)):
            raise Mistake(
                "with dropout=1 in training every branch should be erased and only the sums and norms remain: apply "
                "dropout to each branch, before it is added."
            )
        inner = [part.p for part in layer.ffn.modules() if isinstance(part, nn.Dropout)]
        if inner != [1.0]:
            raise Mistake("self.ffn is built without the layer's dropout: FeedForward(dim, ffn_dim, dropout).")
        if getattr(getattr(layer, "self_attention", None), "dropout", 1.0) != 1.0:
            raise Mistake("self.self_attention is built without the layer's dropout, which acts on its weights.")
        layer.eval()
        if alike(run(layer), bare(layer)):
            raise Mistake("dropout acts in evaluation too: use nn.Dropout, which layer.eval() switches off.")
