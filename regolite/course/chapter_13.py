"""Checkers of notebook 13, look inside: masked weights, cells and pixels, entropy, relations, interventions."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regolite.course import Mistake, alike, close, exercise, same_shape
from regolite.data.scenes import Scene, Scenes
from regolite.evaluation.removal import without
from regolite.models.attention import MultiHeadAttention
from regolite.tracing.trace import AttentionMap, Frame


@exercise(
    "13.1",
    "Before the softmax, what must the score of a key be for a weight of exactly 0?",
    "Minus infinity. The scores are [B, M, Q, S] and the mask is [B, S]: it needs two more dimensions in the middle.",
    'scores.masked_fill(mask[:, None, None], float("-inf")) before the softmax, if there is a mask.',
)
def masked_weights(answer: Callable[..., Any]) -> str:
    """``answer(module, query, key, mask)``: the weights of a call, without padding."""
    attention = MultiHeadAttention(32, 4)
    query, key = torch.randn(2, 5, 32), torch.randn(2, 7, 32)
    close("the weights without a mask", answer(attention, query, key, None), attention.weights(query, key))
    mask = torch.zeros(2, 7, dtype=torch.bool)
    mask[0, 4:], mask[1, 6:] = True, True
    wanted, plain = attention.weights(query, key, mask), attention.weights(query, key)
    found = answer(attention, query, key, mask)
    same_shape("the weights", found, (2, 4, 5, 7))
    zeroed = plain.masked_fill(mask[:, None, None], 0.0)
    for wrong, said in (
        (plain, "the mask has no effect: padded keys still have weight."),
        (
            zeroed,
            "padded keys have weight 0, but the others do not sum to 1: mask them before the softmax, not after.",
        ),
        (
            attention.weights(query, key, ~mask),
            "the mask is inverted: True marks masked keys.",
        ),
    ):
        if alike(found, wrong):
            raise Mistake(said)
    if found.masked_select(mask[:, None, None].expand_as(found)).any():
        raise Mistake(
            "padded keys have a small weight: give them a score of minus infinity, not a large negative number."
        )
    close("the weights", found, wanted)
    return "Now your recorder is correct for padded batches too, and equals MultiHeadAttention.weights."


SHAPES, STRIDES, SIZES, ORIGINAL = ((24, 32), (12, 16), (6, 8)), (8, 16, 32), (171, 250), (428, 626)


@exercise(
    "13.2",
    "First the pixel of the network's input: multiply by the resized side over the original one, for each axis.",
    "Divided by the stride, and rounded down, that is the column (of x) and the row (of y).",
    "A level starts after all cells of the finer ones: sum(h * w for h, w in shapes[:level]). Then row * columns + "
    "column, with the columns of the padded map.",
)
def cell_number(answer: Callable[..., Any]) -> str:
    """``answer(x, y, level, original, sizes, shapes, strides)``."""
    frame = Frame((192, 256), torch.tensor([SIZES]), torch.tensor([ORIGINAL]))
    count = sum(h * w for h, w in SHAPES)
    cells = AttentionMap(torch.zeros(1, 1, 1, count), SHAPES, None, frame)
    for level in (0, 1, 2):
        rows, columns = SHAPES[level]
        start = sum(h * w for h, w in SHAPES[:level])
        for x, y in ((300.0, 211.0), (5.0, 420.0), (620.5, 7.25), (411.0, 333.0), (0.0, 0.0)):
            found = answer(x, y, level, ORIGINAL, SIZES, SHAPES, STRIDES)
            if not isinstance(found, int):
                raise Mistake(f"a cell number should be an int, but is a {type(found).__name__}.")
            wanted = cells.cell_at(x, y, level)
            if found == wanted:
                continue
            u, v = (x * SIZES[1] / ORIGINAL[1] / STRIDES[level], y * SIZES[0] / ORIGINAL[0] / STRIDES[level])
            stretched = int(y / ORIGINAL[0] * rows) * columns + int(x / ORIGINAL[1] * columns)
            at = f"at ({x:g}, {y:g}) on level {level}"
            for wrong, said in (
                (wanted - start, "the number is relative to its level: add the cells of all finer levels."),
                (stretched, "the map is stretched over the image, as if there were no padding."),
                (start + stretched, "the map is stretched over the image, as if there were no padding."),
                (start + int(u) * columns + int(v), "x and y are swapped: x counts columns."),
                (start + int(u) * rows + int(v), "the tokens are in row-major order: row * columns + column."),
                (start + round(v) * columns + round(u), "round down, not to the nearest: a cell starts at its corner."),
                (
                    start + int(y / STRIDES[level]) * columns + int(x / STRIDES[level]),
                    "the resizing is missing: the stride is in pixels of the network's input.",
                ),
            ):
                if found == wrong:
                    raise Mistake(f"{at}: {said}")
            raise Mistake(f"{at} the cell is {wanted}, not {found}.")
    return "This maps a click to its token, as the viewers do."


@exercise(
    "13.3",
    "How many cells share the weight equally if the entropy is log 5?",
    "The exponential of the entropy. 0 * log 0 is NaN in PyTorch but should be 0: use torch.special.entr.",
    "by_head = torch.special.entr(weights).sum(-1).exp(), and the same of weights.mean(0).",
)
def perplexity(answer: Callable[..., Any]) -> str:
    """``answer(weights)``: the effective number of cells of each head, and of the mean of the heads."""
    weights = torch.randn(4, 30).softmax(-1)
    weights[:, 20:] = 0.0
    weights = weights / weights.sum(-1, keepdim=True)
    answered = answer(weights)
    if not isinstance(answered, tuple) or len(answered) != 2:
        raise Mistake("return a pair: a number for each head, and one for the mean of the heads.")
    by_head, together = (torch.as_tensor(value) for value in answered)
    same_shape("the numbers of the heads", by_head, (4,))
    if by_head.isnan().any() or together.isnan().any():
        raise Mistake("NaN: a weight of exactly 0 gives 0 * log 0, which should count as 0.")
    entropy = torch.special.entr(weights).sum(-1)
    mean = torch.special.entr(weights.mean(0)).sum(-1)
    for wrong, said in (
        (entropy, "these are entropies, in nats: the number of cells is the exponential."),
        (entropy / torch.tensor(2.0).log(), "these are entropies in bits: the number of cells is 2 to their power."),
        ((entropy / torch.tensor(2.0).log()).exp(), "the entropy is in bits, but the exponential is for nats."),
    ):
        if alike(by_head, wrong):
            raise Mistake(said)
    close("the numbers of the heads", by_head, entropy.exp())
    if alike(together, by_head.mean()) or alike(together, entropy.mean().exp()):
        raise Mistake("the second is a mean over heads; it should be the number of cells of the mean of the weights.")
    close("the number of the mean of the heads", together, mean.exp())
    return (
        "The entropy of the mean map is at least the mean entropy of the heads, since entropy is concave: a mean map "
        "can be wider than every head."
    )


@exercise(
    "13.4",
    "Use one element more than there are objects. Where should the weights with owner -1 go?",
    "Index -1 is the last element of a tensor, but index_add_ takes no negative index: replace -1 by `count` first.",
    "torch.zeros(count + 1).index_add_(0, owner.where(owner >= 0, count), weights)",
)
def gathered(answer: Callable[..., Any]) -> str:
    """``answer(weights, owner, count)``: the weight of each object, then the weight without an object."""
    for count, owner in ((3, [0, 2, -1, 0, -1, 2, 2, 0]), (4, [-1, 1, 3, -1, 1, 1, 0, -1]), (1, [-1] * 8)):
        weights, index = torch.rand(8).softmax(0), torch.tensor(owner)
        kept = index.clone()
        found = answer(weights, index, count)
        if not torch.equal(index, kept):
            raise Mistake("your function changes its input owners.")
        wanted = torch.stack([weights[index == k].sum() for k in (*range(count), -1)])
        if isinstance(found, Tensor) and found.shape == (count,):
            clamped = torch.zeros(count).index_add_(0, index.clamp(min=0), weights)
            if alike(found, clamped):
                raise Mistake("queries without an object, owner -1, were assigned to object 0.")
            if alike(found, wanted[:-1]):
                raise Mistake("the weight without an object is missing: it comes last.")
        same_shape("the shares", found, (count + 1,))
        if alike(found, wanted.roll(1)):
            raise Mistake("the weight without an object comes first here, but should come last.")
        means = torch.stack([weights[index == k].mean().nan_to_num() for k in (*range(count), -1)])
        if alike(found, means) and not alike(found, wanted):
            raise Mistake("this is the mean over an object's queries: take the sum.")
        close("the shares", found, wanted)
    return "The weights of all objects, the object itself and no object sum to 1, so no share is hidden."


@exercise(
    "13.5",
    "The ball itself may not be removed: its class would be undefined.",
    "The removal that *lowers* the preference most leaves the *smallest* preference.",
    "With all numbers but the ball's as `others`: min(others, key=lambda k: ask(without(scene, k))).",
)
def needed(answer: Callable[..., Any]) -> str:
    """``answer(ask, scene, ball)``: the object whose removal lowers the preference most."""
    scenes = Scenes(40, seed=5, context=1, split="exercise")
    tried, wrong = 0, False
    for i in range(len(scenes)):
        scene = scenes.scene(i)
        pairs = scenes.relations(i)
        if len(scene.things) < 4 or len(pairs) < 2:
            continue
        tried += 1
        for ball, decider in pairs:
            others = [k for k in range(len(scene.things)) if k != ball]
            right = others[int(torch.randint(len(others), ()))]  # this model need not use the decider
            worth = _worth(scene, ball, right)

            def ask(variant: Scene, worth: dict[tuple[float, float], float] = worth) -> float:
                return sum(worth.get((thing.x, thing.y), 0.0) for thing in variant.things)

            found = answer(ask, scene, ball)
            if found == right:
                continue
            after = {k: ask(without(scene, k)) for k in range(len(scene.things))}
            if not isinstance(found, int):
                raise Mistake(f"the answer should be the number of an object, an int, but is a {type(found).__name__}.")
            if found == ball:
                raise Mistake("that is the ball itself, which may not be removed.")
            least, among = max(range(len(scene.things)), key=after.__getitem__), others.index(right)
            if found == least == among:  # ambiguous mistake; another ball will show which
                wrong = True
                continue
            if found == least:
                raise Mistake("that is the object whose removal leaves the largest preference: it is needed least.")
            if found == among:
                raise Mistake("that is its index among the others, without the ball: return its number in the scene.")
            if found == decider:
                raise Mistake("that is the decider, but this model may need another object: test all of them.")
            raise Mistake(f"object {right} is needed most, not {found}.")
    assert tried, "the scenes have no such case"
    if wrong:
        raise Mistake("for some balls another object is needed most.")
    return "This works for any model, at the cost of one forward pass per object."


def _worth(scene: Scene, ball: int, needed: int) -> dict[tuple[float, float], float]:
    """Contributions to an additive preference, by position; the ball has the largest, then the needed object."""
    shares = torch.rand(len(scene.things)) * 0.1 - 0.05
    shares[ball], shares[needed] = 0.6, 0.3
    return {(thing.x, thing.y): float(share) for thing, share in zip(scene.things, shares)}


@exercise(
    "13.6",
    "A softmax over equal scores is uniform. Scores are products of projected queries and keys.",
    "If every projected query is the zero vector, all scores are 0: set weight and bias of `query` to 0, in no_grad.",
    "Keep a clone of both, fill them with zeros, yield inside `try`, and copy them back in `finally`.",
)
def even(answer: Callable[..., AbstractContextManager]) -> str:
    """``answer(attention)``: a context in which every query gives the same weight to every key."""
    attention = MultiHeadAttention(32, 4)
    nn.init.normal_(attention.query.bias)
    query, key, value = torch.randn(1, 5, 32), torch.randn(1, 7, 32), torch.randn(1, 7, 32)
    mask = torch.zeros(1, 7, dtype=torch.bool)
    mask[:, 5:] = True
    kept = {name: tensor.clone() for name, tensor in attention.state_dict().items()}
    parameters = {name: id(parameter) for name, parameter in attention.named_parameters()}
    with torch.no_grad():
        before = attention(query, key, value, mask)
        with answer(attention):
            inside = attention(query, key, value, mask)
        _check_even(attention, inside, before, value)
        _check_restored(attention, kept, parameters, attention(query, key, value, mask), before)
        try:
            with answer(attention):
                raise KeyError("planted")
        except KeyError:
            pass
        else:
            raise Mistake("your context manager suppresses exceptions: use `finally`, not `except`.")
        if not torch.equal(attention(query, key, value, mask), before):
            raise Mistake("after an exception inside, the module stays changed: restore it in `finally`.")
    return "This changes the model instead of the image: the second kind of intervention."


def _check_even(
    attention: MultiHeadAttention, inside: Float[Tensor, "1 5 32"], before: Tensor, value: Float[Tensor, "1 7 32"]
) -> None:
    """Raise a Mistake if the output is not that of uniform attention to the five keys without padding."""
    if torch.equal(inside, before):
        raise Mistake("inside the context, the module's output is unchanged.")

    def mixed(values: Tensor) -> Tensor:
        return attention.out(attention.value(values).mean(1, keepdim=True)).expand_as(inside)

    if alike(inside, mixed(value)):
        raise Mistake("padding has weight too: the weights should be uniform over the unmasked keys.")
    if alike(inside, attention.out.bias.expand_as(inside)):
        raise Mistake("the values are 0: make the scores equal, and keep the values.")
    if not alike(inside, mixed(value[:, :5])):
        raise Mistake(
            "the weights are not uniform inside the context: weight *and bias* of the query projection must be 0."
        )


def _check_restored(
    attention: MultiHeadAttention, kept: dict[str, Tensor], parameters: dict[str, int], after: Tensor, before: Tensor
) -> None:
    """Raise a Mistake if the module is not restored."""
    state = attention.state_dict()
    for name, tensor in kept.items():
        if name not in state or not torch.equal(state[name], tensor):
            raise Mistake(f"afterwards {name} is not restored.")
    if not torch.equal(after, before):
        raise Mistake("afterwards the module's output differs from before.")
    if {name: id(parameter) for name, parameter in attention.named_parameters()} != parameters:
        raise Mistake("afterwards its parameters are new tensors, unknown to an optimizer: copy the values back.")
