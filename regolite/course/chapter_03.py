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
    "Two lines, one for each branch, and each begins with `tokens = tokens + ...`.",
    "The norms stand inside the branches: n = layer.attention_norm(tokens), and n takes the place of the tokens there.",
    "The attention is called as layer.attention(n + positions, n + positions, n). No norm comes after a sum.",
)
def pre_norm(answer: Callable[..., Tensor]) -> str:
    """An encoder layer that normalizes what its branches read."""
    layer = EncoderLayer(16, MultiHeadAttention(16, 2), 32, 0.0)
    for norm in (layer.attention_norm, layer.ffn_norm):  # two norms that nobody can mistake for each other
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
    tokens, positions = torch.randn(2, 7, 16), torch.randn(2, 7, 16)
    first, second = layer.attention_norm, layer.ffn_norm

    def run(keys: bool = True, values: bool = False, swapped: bool = False) -> Tensor:
        one, two = (second, first) if swapped else (first, second)
        n = one(tokens)
        q = n + positions
        x = tokens + layer.attention(q, q if keys else n, q if values else n)
        return x + layer.ffn(two(x))

    with torch.no_grad():
        found = answer(layer, tokens.clone(), positions)
        same_shape("pre_norm(layer, tokens, positions)", found, (2, 7, 16))
        if alike(found, tokens):
            raise Mistake("the tokens came back as they were.")
        n = first(tokens)
        wrong = n + layer.attention(n + positions, n + positions, n)
        before = first(tokens + positions)
        known = {
            "this is the post-norm layer: the norms come after the sums. Here they stand before the branches.": layer(
                Memory(tokens, positions, None, [])
            ),
            "the positions were added to the values too: they belong to what is compared, queries and keys.": run(
                values=True
            ),
            "the keys have no positions: both sides of the comparison need them.": run(keys=False),
            "the two norms are exchanged: attention_norm belongs to the first branch, ffn_norm to the second.": run(
                swapped=True
            ),
            "the sum starts from the normalized tokens. The way past a branch stays free: add to the tokens "
            "themselves.": wrong + layer.ffn(second(wrong)),
            "the feed-forward network reads tokens that are not normalized.": (
                (x := tokens + layer.attention(n + positions, n + positions, n)) + layer.ffn(x)
            ),
            "the attention reads tokens that are not normalized.": (
                (x := tokens + layer.attention(tokens + positions, tokens + positions, tokens)) + layer.ffn(second(x))
            ),
            "the positions were added before the norm: normalize the tokens first, then add the positions.": (
                (x := tokens + layer.attention(before, before, n)) + layer.ffn(second(x))
            ),
        }
        for said, mistaken in known.items():
            if alike(found, mistaken):
                raise Mistake(said)
        close("pre_norm(layer, tokens, positions)", found, run())
    return "The way from the first layer to the last is now a bare sum, and what flows back along it is never rescaled."


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
            raise Mistake(f"a number is wanted, and this is {'nothing' if found is None else type(found).__name__}.")
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
            "an attention has four linear layers: for queries, keys, values, and one that puts the heads together.": (
                2 * 3 * (dim * dim + dim) + network + norms
            ),
        }
        for said, wrong in known.items():
            if found == wrong:
                raise Mistake(said)
        if found != wanted:
            raise Mistake(f"with C = {dim} and F = {ffn} there are {wanted} parameters, and this says {found}.")
    return "With C = 128 and F = 512 half of them are the feed-forward network's; the number of queries is not in it."


@exercise(
    "3.3",
    "What can a sum of two numbers from (0, 1) be?",
    "Add before the sigmoid: what stands for the reference point there is its inverse, regolite.boxes.inverse_sigmoid.",
    "Pad inverse_sigmoid(reference) with zeros for width and height, add it to raw, and take the sigmoid of the sum.",
)
def boxes_at(answer: Callable[[Tensor, Tensor], Tensor]) -> str:
    """Boxes around reference points."""
    raw, reference = 2 * torch.randn(2, 9, 4), 0.02 + 0.96 * torch.rand(2, 9, 2)
    found = answer(raw.clone(), reference.clone())
    same_shape("boxes_at(raw, reference)", found, (2, 9, 4))
    known = {
        "nothing was added: the reference points play no part.": raw.sigmoid(),
        "the reference point itself was added before the sigmoid. A point at 0.9 must become the logit whose sigmoid "
        "is 0.9: inverse_sigmoid.": (raw + F.pad(reference, (0, 2))).sigmoid(),
        "width and height are right only where 0 is added to them: the sigmoid's inverse belongs to the point alone, "
        "so pad after inverse_sigmoid, not before.": (raw + inverse_sigmoid(F.pad(reference, (0, 2)))).sigmoid(),
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
            "some numbers still lie outside of 0 to 1. Whatever is added after a sigmoid can leave the image; add "
            "before it."
        )
    close("boxes_at(raw, reference)", found, (raw + F.pad(inverse_sigmoid(reference), (0, 2))).sigmoid())
    at_rest = answer(torch.zeros(1, 9, 4), reference[:1])
    close("the center where the head gives 0", at_rest[..., :2], reference[:1])
    return "No sum of logits leaves the image, and a head that says 0 answers with its reference point."


@exercise(
    "3.4",
    "With all other logits 0, the softmax of the last column is exp(b) / (K + exp(b)).",
    "Set that equal to p and solve for exp(b) first.",
    "exp(b) = K * p / (1 - p).",
)
def no_object(answer: Callable[[float, int], float]) -> str:
    """The bias of "no object" that starts at a probability."""
    for p, classes in ((0.9, 80), (0.5, 14), (0.99, 3)):
        found = answer(p, classes)
        if isinstance(found, Tensor) and found.numel() == 1:
            found = found.item()
        if isinstance(found, bool) or not isinstance(found, (int, float)):
            raise Mistake(f"a number is wanted, and this is {'nothing' if found is None else type(found).__name__}.")
        if p == 0.5:  # where the sigmoid's formula and a wrong sign look alike
            continue
        logit = math.log(p / (1 - p))
        known = {
            "this is the bias of a sigmoid: K does not appear in it. In a softmax the K other columns share what the "
            "last one leaves.": logit,
            "the sign is wrong: this makes 'no object' as rare as it should be common.": -math.log(classes) - logit,
            "this is exp(b); b is its logarithm.": classes * p / (1 - p),
            "p is the probability of 'no object', not that of an object.": math.log(classes) - logit,
            "K columns stand beside the last one, not K + 1.": math.log(classes + 1) + logit,
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
    return "The more classes share what is left, the larger the bias: for p = 0.9 and 80 classes it is 6.58."


@exercise(
    "3.5",
    "torch.autograd.functional.jacobian(answer, E) has shape [Q, C, Q, C]: first what moves, then what moves it.",
    "Square it, sum over both channels (dimensions 1 and 3), take the root.",
    "Row i is the answer, column j the question, so neither needs to be transposed.",
)
def influence(answer: Callable[..., Tensor]) -> str:
    """How much each query's answer depends on each query's question."""
    layer = DecoderLayer(8, 2, MultiHeadAttention(8, 2), 16, 0.0)
    memory = Memory(torch.randn(1, 11, 8), torch.randn(1, 11, 8), None, [])
    E = torch.randn(5, 8)
    mix = torch.rand(5, 5)
    mix[0] += 3.0  # one answer that hears all, so that rows and columns cannot be mistaken

    def decode(e: Tensor) -> Tensor:
        # channels that do not sum to zero, as they do right after a LayerNorm
        return (mix @ layer(torch.zeros_like(e)[None], e[None], memory)[0]) * torch.linspace(0.5, 2.0, 8)

    jacobian = torch.autograd.functional.jacobian(decode, E)
    wanted = jacobian.square().sum((1, 3)).sqrt()
    found = answer(decode, E.clone())
    same_shape("influence(answer, E)", found, (5, 5))
    if not found.any():
        raise Mistake("the matrix is all zero.")
    known = {
        "the matrix is transposed: entry (i, j) is how answer i depends on question j.": wanted.T,
        "these are sums of squares: the root is missing.": jacobian.square().sum((1, 3)),
        "derivatives of both signs were added up and cancel: square them before they are summed.": jacobian.sum((1, 3)),
        "derivatives of both signs were added up and cancel: square them before they are summed ": (
            jacobian.sum((1, 3)).abs()
        ),
        "these are sums of absolute values; the norm is the root of the sum of squares.": jacobian.abs().sum((1, 3)),
        "the channels of the answer were added up before the derivative was taken, and cancel: every channel of an "
        "answer counts by itself.": jacobian.sum(1).square().sum(-1).sqrt(),
    }
    for said, wrong in known.items():
        if alike(found, wrong, 1e-3):
            raise Mistake(f"{said.rstrip(' .')}.")
    close("influence(answer, E)", found, wanted, tolerance=1e-3 * float(wanted.max()))
    alone = answer(lambda e: (e @ torch.eye(8)) * 3, E.clone())
    close("the influence where no query hears another", alone, torch.eye(5) * 3 * math.sqrt(8), tolerance=1e-3)
    return "Off the diagonal stands what the self-attention among queries carries; without it the matrix is diagonal."
