"""Checkers of notebook 03: encoder and decoder."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regolite.boxes import inverse_sigmoid
from regolite.course import Mistake, alike, close, exercise, same_shape
from regolite.models.attention import MultiHeadAttention
from regolite.models.transformer import DecoderLayer, EncoderLayer
from regolite.types import Memory


@exercise(
    "3.1",
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
    "3.2",
    "Count the linear layers first: four in each attention, two in the feed-forward network.",
    "There are two attentions (among queries, and to the image), one feed-forward network and three norms.",
    "A linear layer from a to b has a * b weights and b biases, and a LayerNorm of width C has 2 * C numbers.",
)
def parameters(answer: Callable[[int, int], int]) -> str:
    """The number of parameters of a decoder layer."""
    for dim, ffn in ((128, 512), (24, 40), (8, 96)):
        layer = DecoderLayer(dim, 2, MultiHeadAttention(dim, 2), ffn, 0.0)
        wanted = sum(p.numel() for p in layer.parameters())
        attention, network, norms = 4 * (dim * dim + dim), 2 * dim * ffn + ffn + dim, 3 * 2 * dim
        found = answer(dim, ffn)
        if isinstance(found, bool) or not isinstance(found, (int, float)):
            raise Mistake(f"the answer should be a number, but is {'None' if found is None else type(found).__name__}.")
        known = {
            "one of the two attentions is missing.": attention + network + norms,
            "the norms are missing.": 2 * attention + network,
            "the biases of the linear layers are missing.": 2 * 4 * dim * dim + 2 * dim * ffn + norms,
            "the biases of the feed-forward network are missing.": 2 * attention + 2 * dim * ffn + norms,
            "the biases of the attentions are missing.": 2 * 4 * dim * dim + network + norms,
            "the feed-forward network has two linear layers, to F and back to C.": (
                2 * attention + dim * ffn + ffn + norms
            ),
            "there are three norms, one after each branch.": 2 * attention + network + 2 * 2 * dim,
            "a norm has a factor and a shift for each channel: 2 * C.": 2 * attention + network + 3 * dim,
            "an attention has four linear layers: for queries, keys, values, and the output.": (
                2 * 3 * (dim * dim + dim) + network + norms
            ),
        }
        for said, wrong in known.items():
            if found == wrong:
                raise Mistake(said)
        if found != wanted:
            raise Mistake(f"with C = {dim} and F = {ffn} there are {wanted} parameters, not {found}.")
    return (
        "With C = 128 and F = 512 half of them are in the feed-forward network; the number of queries does not matter."
    )


@exercise(
    "3.3",
    "What can a sum of two numbers from (0, 1) be?",
    "Add before the sigmoid, where the reference point is a logit: regolite.boxes.inverse_sigmoid.",
    "Pad inverse_sigmoid(reference) with zeros for width and height, add it to raw, and take the sigmoid of the sum.",
)
def boxes_at(answer: Callable[[Tensor, Tensor], Tensor]) -> str:
    """Boxes around reference points."""
    raw, reference = 2 * torch.randn(2, 9, 4), 0.02 + 0.96 * torch.rand(2, 9, 2)
    found = answer(raw.clone(), reference.clone())
    same_shape("boxes_at(raw, reference)", found, (2, 9, 4))
    known = {
        "nothing was added: the reference points are not used.": raw.sigmoid(),
        "the reference point itself was added before the sigmoid. A point at 0.9 must become the logit whose sigmoid "
        "is 0.9: inverse_sigmoid.": (raw + F.pad(reference, (0, 2))).sigmoid(),
        "something other than 0 was added to width and height: apply inverse_sigmoid to the point alone and pad after "
        "it, not before.": (raw + inverse_sigmoid(F.pad(reference, (0, 2)))).sigmoid(),
        "the reference point was added to width and height too.": (
            raw + inverse_sigmoid(torch.cat([reference, reference], -1))
        ).sigmoid(),
        "the sigmoid is missing: these are logits.": raw + F.pad(inverse_sigmoid(reference), (0, 2)),
    }
    for said, wrong in known.items():
        if alike(found, wrong):
            raise Mistake(said)
    if (found < 0).any() or (found > 1).any():
        raise Mistake(
            "some numbers are still outside 0 to 1. A sum after the sigmoid can leave the image; add before it."
        )
    close("boxes_at(raw, reference)", found, (raw + F.pad(inverse_sigmoid(reference), (0, 2))).sigmoid())
    at_rest = answer(torch.zeros(1, 9, 4), reference[:1])
    close("the center for a head output of 0", at_rest[..., :2], reference[:1])
    return "No sum of logits leaves the image, and a head output of 0 gives the reference point."


@exercise(
    "3.4",
    "With all other logits 0, the softmax of the last column is exp(b) / (K + exp(b)).",
    "Set that equal to p and solve for exp(b) first.",
    "exp(b) = K * p / (1 - p).",
)
def no_object(answer: Callable[[float, int], float]) -> str:
    """The bias for an initial probability of "no object"."""
    for p, classes in ((0.9, 80), (0.5, 14), (0.99, 3)):
        found = answer(p, classes)
        if isinstance(found, Tensor) and found.numel() == 1:
            found = found.item()
        if isinstance(found, bool) or not isinstance(found, (int, float)):
            raise Mistake(f"the answer should be a number, but is {'None' if found is None else type(found).__name__}.")
        if p == 0.5:  # where a wrong sign has no effect
            continue
        logit = math.log(p / (1 - p))
        known = {
            "this is the bias of a sigmoid: K does not appear in it. In a softmax the K other columns share the rest "
            "of the probability.": logit,
            "the sign is wrong: this makes 'no object' improbable.": -math.log(classes) - logit,
            "this is exp(b); b is its logarithm.": classes * p / (1 - p),
            "p is the probability of 'no object', not that of an object.": math.log(classes) - logit,
            "there are K columns besides the last one, not K + 1.": math.log(classes + 1) + logit,
        }
        for said, wrong in known.items():
            if math.isclose(found, wrong, abs_tol=1e-4):
                raise Mistake(said)
        if classes == 80 and math.isclose(found, math.log(classes), abs_tol=1e-4):
            raise Mistake("this makes 'no object' as probable as all classes together, one half, whatever p is.")
    for p, classes in ((0.9, 80), (0.5, 14), (0.99, 3)):
        logits = torch.zeros(classes + 1, dtype=torch.float64)
        logits[-1] = float(answer(p, classes))
        reached = logits.softmax(0)[-1].item()
        if not math.isclose(reached, p, abs_tol=1e-4):
            raise Mistake(f"with p = {p} and K = {classes} 'no object' starts at {reached:.4f}.")
    return "The more classes share the rest, the larger the bias: for p = 0.9 and 80 classes it is 6.58."


@exercise(
    "3.5",
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
