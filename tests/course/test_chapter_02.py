"""Checkers of notebook 02: right answers pass, each well-known mistake is called by its name."""

import math

import pytest
import torch
import torch.nn.functional as F

from regolite.course import Mistake, chapter_02, find
from regolite.models.positions import sine_embedding, sine_positions


def said(number, answer):
    """What the checker holds against an answer."""
    torch.manual_seed(0)
    with pytest.raises(Mistake) as caught:
        find(number).checker(answer)
    return str(caught.value)


def field(layers, start=1, early=False, extra=1, strides=True):
    total, stride = start, 1
    for kernel, step in layers:
        stride *= step if early and strides else 1
        total += (kernel - extra) * stride
        stride *= step if not early and strides else 1
    return total


def shrink(mask, stride):
    return F.max_pool2d((~mask).float()[:, None], stride, ceil_mode=True)[:, 0] == 0


def interpolated(mask, stride):
    return F.interpolate(mask[None].float(), size=[-(-side // stride) for side in mask.shape[1:]])[0].bool()


def positions(mask, dim, center=False, tiny=1e-6):
    inside = (~mask).float()
    y, x = inside.cumsum(1) - center / 2, inside.cumsum(2) - center / 2
    y, x = y / (inside.sum(1, keepdim=True) + tiny), x / (inside.sum(2, keepdim=True) + tiny)
    both = [sine_embedding(axis * 2 * math.pi, dim // 2) for axis in (y, x)]
    return torch.cat(both, dim=-1).permute(0, 3, 1, 2)


def matrix(delta, dim, temperature=10000):
    angles = delta * temperature ** (-2 * torch.arange(dim // 2) / dim)
    blocks = [torch.tensor([[math.cos(a), math.sin(a)], [-math.sin(a), math.cos(a)]]) for a in angles.tolist()]
    return torch.block_diag(*blocks)


def halves(delta, dim, temperature=10000):
    angles = delta * temperature ** (-2 * torch.arange(dim // 2) / dim)
    c, s = angles.cos().diag(), angles.sin().diag()
    return torch.cat([torch.cat([c, s], 1), torch.cat([-s, c], 1)])


def square(token, shapes, strides):
    for (h, w), stride in zip(shapes, strides):
        if token < h * w:
            row, column = divmod(token, w)
            return column * stride, row * stride, (column + 1) * stride, (row + 1) * stride
        token -= h * w


def first_level(token, shapes, strides):
    row, column = divmod(token, shapes[0][1])
    return column * 8, row * 8, column * 8 + 8, row * 8 + 8


def by_height(token, shapes, strides):
    return square(token, [(w, h) for h, w in shapes], strides)


def exchanged(token, shapes, strides):
    left, top, right, bottom = square(token, shapes, strides)
    return top, left, bottom, right


RIGHT = {"2.1": field, "2.2": shrink, "2.3": positions, "2.4": matrix, "2.5": square}


@pytest.mark.parametrize("number", RIGHT)
def test_right_answers_pass(number):
    torch.manual_seed(0)
    assert find(number).checker(RIGHT[number]).endswith(".")


def test_other_right_answers_pass():
    def blocks(mask, stride):
        height, width = mask.shape[1:]
        padded = F.pad(mask, (0, -width % stride, 0, -height % stride), value=True)
        return padded.unflatten(1, (-1, stride)).unflatten(3, (-1, stride)).all(4).all(2)

    torch.manual_seed(0)
    find("2.2").checker(blocks)
    find("2.3").checker(sine_positions)
    find("2.5").checker(lambda *given: torch.tensor(square(*given)))


WRONG = {
    "field: stub": ("2.1", lambda layers: 0, "sees 1"),
    "field: from 0": ("2.1", lambda layers: field(layers, start=0) if layers else 1, "counts too"),
    "field: adds kernels": ("2.1", lambda layers: field(layers, extra=0) - bool(layers), "do not add up"),
    "field: no stride": ("2.1", lambda layers: field(layers, strides=False), "two pixels apart"),
    "field: too early": ("2.1", lambda layers: field(layers, early=True), "too early"),
    "shrink: stub": ("2.2", interpolated, "not a multiple"),
    "shrink: any": ("2.2", lambda m, s: F.max_pool2d(m.float()[:, None], s, ceil_mode=True)[:, 0] > 0, "a strip"),
    "shrink: one pixel": ("2.2", lambda m, s: m[:, ::s, ::s], "first pixel"),
    "shrink: inverted": ("2.2", lambda m, s: ~shrink(m, s), "inverted"),
    "shrink: floats": ("2.2", lambda m, s: shrink(m, s).float(), "has dtype bool"),
    "shrink: floor": ("2.2", lambda m, s: F.max_pool2d((~m).float()[:, None], s)[:, 0] == 0, "shape"),
    "shrink: all": ("2.2", lambda m, s: torch.ones_like(shrink(m, s)), "marked as padding"),
    **{
        f"positions: {mistake}": ("2.3", lambda *given, m=mistake: chapter_02._positions(*given, m), said[:40])
        for mistake, said in chapter_02.MISTAKES.items()
    },
    "positions: no centers": (
        "2.3",
        lambda mask, dim, center=False: positions(mask, dim),
        "center=True changes nothing",
    ),
    "positions: NaN": ("2.3", lambda *given: positions(*given, tiny=0.0), "NaN"),
    "positions: channels last": ("2.3", lambda *given: positions(*given).permute(0, 2, 3, 1), "permute(0, 3, 1, 2)"),
    "positions: channels each": ("2.3", lambda mask, dim, *rest: positions(mask, 2 * dim, *rest), "should have shape"),
    "positions: one image": (
        "2.3",
        lambda mask, *rest: positions(mask[:1], *rest).repeat(len(mask), 1, 1, 1),
        "image 1",
    ),
    "matrix: stub": ("2.4", lambda delta, dim, temperature: torch.eye(dim), "does not change the embedding"),
    "matrix: back": ("2.4", lambda *given: matrix(*given).T, "by -delta"),
    "matrix: alike": ("2.4", lambda delta, dim, temperature: matrix(delta, dim, 1), "same angle"),
    "matrix: halves": ("2.4", halves, "interleaved"),
    "matrix: half the angle": ("2.4", lambda delta, *rest: matrix(delta / 2, *rest), "should be"),
    "matrix: temperature": ("2.4", lambda delta, dim, temperature: matrix(delta, dim), "temperature 20"),
    "square: stub": ("2.5", first_level, "coarser level"),
    "square: exchanged": ("2.5", exchanged, "x and y"),
    "square: cells": ("2.5", lambda t, shapes, s: square(t, shapes, [1, 1, 1]), "is the square"),
    "square: off by one": ("2.5", lambda t, *rest: square(max(t - 1, 0), *rest), "is the square"),
    "square: one stride": ("2.5", lambda t, shapes, s: square(t, shapes, [8, 8, 8]), "is the square"),
    "square: by height": ("2.5", by_height, "not h"),
}


@pytest.mark.parametrize(("number", "answer", "message"), WRONG.values(), ids=list(WRONG))
def test_mistakes_are_named(number, answer, message):
    assert message in said(number, answer)
