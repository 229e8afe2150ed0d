"""Checkers of notebook 13, look inside: a recorder, cells and pixels, relations, interventions, an ablation harness."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regolite.course import Mistake, alike, close, exercise, same_shape
from regolite.data.scenes import Scene, Scenes
from regolite.evaluation.relations import interval
from regolite.evaluation.removal import without
from regolite.models.attention import MultiHeadAttention
from regolite.tracing.trace import AttentionMap, Frame


@exercise(
    "13.1",
    "The hook gets (module, inputs, output); inputs is a tuple, and its fourth element, if any, is the mask. Before "
    "the softmax, what must the score of a padded key be for a weight of exactly 0?",
    "Minus infinity. The scores are [B, M, Q, S] and the mask is [B, S]: it needs two more dimensions in the middle. "
    "Yield the list inside `try`, and remove the handle in `finally`.",
    'scores.masked_fill(mask[:, None, None], float("-inf")).softmax(-1).detach(), appended to the list; '
    "handle = attention.register_forward_hook(see); try: yield seen; finally: handle.remove()",
)
def recorder(answer: Callable[..., AbstractContextManager]) -> str:
    """``answer(attention)``: a context whose value is the list of the weights of every call."""
    attention = MultiHeadAttention(32, 4)
    query, key = torch.randn(2, 5, 32), torch.randn(2, 7, 32)
    mask = torch.zeros(2, 7, dtype=torch.bool)
    mask[0, 4:], mask[1, 6:] = True, True
    plain = attention(query, key, key)
    with answer(attention) as seen:
        if not isinstance(seen, list):
            raise Mistake(
                f"the context should give a list, but gives {'None' if seen is None else type(seen).__name__}."
            )
        outputs = attention(query, key, key), attention(query, key, key, mask)
        attention(query[:, :3], key, key, None)
    if not torch.equal(outputs[0], plain):
        raise Mistake("while you record, the module's output is different: a hook that returns a value replaces it.")
    if len(seen) != 3:
        raise Mistake(f"after three calls the list should have three elements, but has {len(seen)}.")
    for found, asked, hidden in ((seen[0], query, None), (seen[1], query, mask), (seen[2], query[:, :3], None)):
        _check_weights(found, attention, asked, key, hidden)
    if any(found.requires_grad for found in seen):
        raise Mistake("the recorded weights hang on the graph and keep all activations alive: detach them.")
    attention(query, key, key)
    if len(seen) != 3:
        raise Mistake("after the context a call is still recorded: remove the hook.")
    try:
        with answer(attention) as seen:
            raise KeyError("planted")
    except KeyError:
        pass
    else:
        raise Mistake("your context manager suppresses exceptions: use `finally`, not `except`.")
    attention(query, key, key)
    if seen:
        raise Mistake("after an exception inside, the hook stays on the module: remove it in `finally`.")
    return "Your recorder equals MultiHeadAttention.weights, for padded batches too, and leaves the model as it was."


def _check_weights(found: Any, attention: MultiHeadAttention, query: Tensor, key: Tensor, mask: Tensor | None) -> None:
    """Raise a Mistake if these are not the weights of the call."""
    wanted, plain = attention.weights(query, key, mask), attention.weights(query, key)
    if isinstance(found, Tensor) and found.shape == wanted.mean(1).shape:
        raise Mistake("the heads are averaged: keep one matrix for each head.")
    if isinstance(found, Tensor) and found.shape == wanted.mT.shape:
        raise Mistake("queries and keys are swapped: rows are queries, columns are keys.")
    same_shape("the weights of a call", found, wanted.shape)
    q, k = (x.unflatten(2, (attention.heads, -1)).transpose(1, 2) for x in (attention.query(query), attention.key(key)))
    scores = q @ k.mT
    for wrong, said in (
        (scores.softmax(-1), "the scores are not divided by the square root of C', the channels of one head."),
        ((scores / query.shape[-1] ** 0.5).softmax(-1), "divide by the square root of C' = C / M, not of C."),
        (
            (scores / q.shape[-1] ** 0.5).softmax(-2),
            "the softmax runs over the queries: each query's weights sum to 1.",
        ),
        (scores / q.shape[-1] ** 0.5, "these are the scores: the softmax is missing."),
        (scores, "the scores are neither scaled nor normalized by a softmax."),
    ):
        if mask is None and alike(found, wrong):
            raise Mistake(said)
    if mask is None:
        close("the weights", found, wanted)
        return
    zeroed = plain.masked_fill(mask[:, None, None], 0.0)
    for wrong, said in (
        (plain, "the mask has no effect: padded keys still have weight."),
        (zeroed, "padded keys have weight 0, but the others do not sum to 1: mask before the softmax, not after."),
        (attention.weights(query, key, ~mask), "the mask is inverted: True marks masked keys."),
    ):
        if alike(found, wrong):
            raise Mistake(said)
    if found.masked_select(mask[:, None, None].expand_as(found)).any():
        raise Mistake(
            "padded keys have a small weight: give them a score of minus infinity, not a large negative number."
        )
    close("the weights", found, wanted)


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
            raise Mistake(
                f"{at} that is the wrong cell: undo the resizing, divide by the stride, round down, and count the "
                "cells before it."
            )
    return "This maps a click to its token, as the viewers do."


@exercise(
    "13.3",
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
        if alike(found[count], torch.zeros(())) and bool(wanted[-1]):
            raise Mistake("queries without an object are dropped: their weight comes last.")
        last = torch.zeros(count + 1)
        last[index.where(index >= 0, count)] = weights
        if alike(found, last) and not alike(found, wanted):
            raise Mistake("an assignment keeps one query per object: several stand for the same, so add them up.")
        means = torch.stack([weights[index == k].mean().nan_to_num() for k in (*range(count), -1)])
        if alike(found, means) and not alike(found, wanted):
            raise Mistake("this is the mean over an object's queries: take the sum.")
        close("the shares", found, wanted)
    return "The weights of all objects, the object itself and no object sum to 1, so no share is hidden."


@exercise(
    "13.4",
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
            raise Mistake("that object is not the one whose removal leaves the smallest preference.")
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
    "13.5",
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


@exercise(
    "13.6",
    "Measure first, then for each part: `with ExitStack() as stack:` enter switch_off(module) for every module of the "
    "part, and measure inside. Subtract `before` from `after`, not the means of the two.",
    "The bootstrap: for each image the sum of its changes and their number. Draw image indices [samples, images] with "
    "torch.randint; the mean of a resample is the sum of its sums divided by the sum of its numbers.",
    "means = sums[drawn].sum(1) / counts[drawn].sum(1); low, high = means.quantile(torch.tensor([0.025, 0.975])). "
    "At the end: if not torch.equal(measure(), before): raise RuntimeError(...)",
)
def harness(answer: Callable[..., Any]) -> str:
    """``answer(parts, measure, images, switch_off)``: the effect of each part and its cluster bootstrap interval."""
    bench = _Bench()
    found = answer(bench.parts, bench.measure, list(bench.images), bench.switch_off)
    if not isinstance(found, dict) or set(found) != set(bench.parts):
        raise Mistake("return a dictionary with an entry for each part, by its name.")
    if bench.off:
        raise Mistake("at the end some modules are still switched off.")
    if bench.seen and not any(len(off) == 2 for off in bench.seen):
        raise Mistake("the modules of a part are switched off one after another: all of them must be off together.")
    if any(len({name[0] for name in off}) > 1 for off in bench.seen):
        raise Mistake("two parts are switched off at the same time: restore one before the next.")
    for name in bench.parts:
        _check_effect(name, found[name], bench)
    bench = _Bench(leaky=True)
    try:
        answer(bench.parts, bench.measure, list(bench.images), bench.switch_off)
    except RuntimeError:
        pass
    else:
        raise Mistake("one part was not restored, and your harness did not notice: measure the intact model again.")
    bench = _Bench(failing=True)
    with suppress(KeyError):
        answer(bench.parts, bench.measure, list(bench.images), bench.switch_off)
    if bench.off:
        raise Mistake("if `measure` raises, the modules stay switched off: enter the contexts in a `with` block.")
    return "Paired by ball, resampled by image: what the intervals of Figure 13.14 are made of."


class _Bench:
    """A model of three parts whose effects are known; balls of one image change alike.

    Args:
        leaky: leaving the context of one module does not restore it.
        failing: measuring raises an error while a part is off.
    """

    def __init__(self, leaky: bool = False, failing: bool = False) -> None:
        sizes = torch.randint(1, 7, (60,))
        self.images = torch.arange(60).repeat_interleave(sizes)[torch.randperm(int(sizes.sum()))]
        n = len(self.images)
        self.level = 3.0 * torch.randn(n)  # balls differ far more than a part changes them
        effects = torch.randn(3, 60) + 0.25 * sizes  # with sizes: a mean over images is another one than over balls
        self.changes = dict(zip("ABC", 0.1 * effects[:, self.images] + 0.02 * torch.randn(3, n)))
        self.parts = {name: [f"{name}{k}" for k in range(2 - (name == "B"))] for name in "ABC"}
        self.off: list[str] = []
        self.seen: list[list[str]] = []
        self.leaky, self.failing = leaky, failing

    def measure(self) -> Tensor:
        if self.off:
            self.seen.append(list(self.off))
            if self.failing:
                raise KeyError("planted")
        values = self.level.clone()
        for name in self.off:
            values += self.changes[name[0]] / len(self.parts[name[0]])
        return values

    def switch_off(self, module: str) -> _Switch:
        return _Switch(self.off, module, restores=not (self.leaky and module == "C1"))


class _Switch:
    """A context in which a module is off. It is no generator, which would be closed when it is collected."""

    def __init__(self, off: list[str], module: str, restores: bool) -> None:
        self.off, self.module, self.restores = off, module, restores

    def __enter__(self) -> None:
        self.off.append(self.module)

    def __exit__(self, *_: object) -> None:
        if self.restores:
            self.off.remove(self.module)


def _check_effect(name: str, found: Any, bench: _Bench) -> None:
    """Raise a Mistake if mean or interval of a part are wrong."""
    if not isinstance(found, (tuple, list)) or len(found) != 3:
        raise Mistake("the entry of a part should be three numbers: mean, low, high.")
    mean, low, high = (float(value) for value in found)
    change, images = bench.changes[name].double(), bench.images
    by_image = torch.stack([change[images == image].mean() for image in images.unique()])
    if math.isclose(mean, -float(change.mean()), abs_tol=1e-4):
        raise Mistake("the sign is wrong: the change is after minus before.")
    if not math.isclose(mean, float(change.mean()), abs_tol=1e-4):
        if math.isclose(mean, float(by_image.mean()), abs_tol=1e-4):
            raise Mistake("that is a mean over images of means over balls: every ball counts alike.")
        if math.isclose(mean, float(change.mean()) / 2, abs_tol=1e-4):
            raise Mistake("only one module of the part was off while you measured.")
        raise Mistake(f"the mean change of part {name} is wrong: measure with the whole part off, and subtract before.")
    if low > high:
        raise Mistake("the interval's ends are swapped: low comes first.")
    of_cluster = interval(change.numpy(), images.numpy())
    width = (high - low) / (of_cluster["high"] - of_cluster["low"])
    shift = abs(low + high - of_cluster["low"] - of_cluster["high"]) / 2
    if abs(width - 1) <= 0.13 and shift <= 0.1 * (high - low):
        return
    of_images = interval(by_image.numpy(), images.unique().numpy())
    if max(abs(low - of_images["low"]), abs(high - of_images["high"])) <= 0.1 * (high - low):
        raise Mistake("the resampled means are taken over images: divide the sum over all balls drawn by their number.")
    if not low < mean < high:
        raise Mistake("the interval should contain the mean.")
    if abs(width - 1) <= 0.13:
        raise Mistake("the interval is shifted: take the quantiles 0.025 and 0.975 of the resampled means.")
    of_balls = 2 * 1.96 * float(change.std()) / math.sqrt(len(change))
    if abs((high - low) / of_balls - 1) <= 0.13:
        raise Mistake("the interval is too narrow: resample whole images with all of their balls, not single balls.")
    if width > 2.5:
        raise Mistake("the interval is far too wide: resample the paired differences, not before and after apart.")
    ninety = 1.645 / 1.96
    if abs(width - ninety) <= 0.07:
        raise Mistake("that is about a 90 % interval: the quantiles of 95 % are 0.025 and 0.975.")
    raise Mistake(f"the interval of part {name} is too {'wide' if width > 1 else 'narrow'}: see steps 3 and 4.")
