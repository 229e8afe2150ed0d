"""Checkers of notebook 02: from images to tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regolite.course import Mistake, close, exercise, same_shape
from regolite.models.positions import sine_embedding, sine_positions


def _field(layers: list[tuple[int, int]]) -> int:
    field = stride = 1
    for kernel, step in layers:
        field += (kernel - 1) * stride
        stride *= step
    return field


@exercise(
    "2.1",
    "Keep two numbers: the field so far, and the stride so far, the distance of adjacent cells in pixels.",
    "A kernel of 3 reaches one cell further on both sides, and the cells of its input are one stride apart.",
    "For each layer: `field += (kernel - 1) * stride`, and only then `stride *= step`.",
)
def field_of_convolutions(answer: Callable[..., Any]) -> str:
    """The receptive field of a chain of convolutions."""
    for layers, known in (
        ([], {0: "without any layer a cell is a pixel and sees 1."}),
        ([(3, 1)], {0: "there is no answer yet.", 2: "the cell itself counts too: start from 1."}),
        (
            [(3, 1), (3, 1)],
            {6: "kernels do not add up: the second widens the field by 2, not by 3.", 9: "they do not multiply."},
        ),
        (
            [(3, 2), (3, 1)],
            {
                5: "the second layer's cells are two pixels apart, since the first has stride 2.",
                6: "the windows of 3 overlap: the second layer reaches (3 - 1) cells further, 2 pixels each.",
                9: "the stride is used too early: a layer's own stride affects only the next layers.",
            },
        ),
        ([(3, 2), (1, 1), (5, 2), (3, 2), (3, 1)], {}),
        ([(7, 2), (3, 2), (3, 1), (3, 2), (3, 1)], {}),
    ):
        found, wanted = answer(layers), _field(layers)
        if found != wanted:
            raise Mistake(known.get(found, f"for the layers {layers} it should be {wanted}, but is {found}."))
    more = -(-(1333 - 491) // (2 * 32))
    return f"From 491 pixels at stride 32 it takes {more} more layers of kernel 3 to cover 1333; attention takes one."


@exercise(
    "2.2",
    "Turn it around: does a cell's square contain any pixel of the image?",
    "F.max_pool2d of ~mask as floats tells whether any pixel of a square is 1.",
    "`F.max_pool2d((~mask).float()[:, None], stride, ceil_mode=True)[:, 0] == 0`; ceil_mode keeps partial cells.",
)
def shrunken_mask(answer: Callable[..., Any]) -> str:
    """A padding mask at the size of a feature map."""
    odd = torch.ones(2, 407, 640, dtype=torch.bool)
    odd[0, :300, :427], odd[1, :, :97] = False, False
    scattered = torch.rand(2, 21, 34) < 0.8  # unrealistic, but it reveals shortcuts
    for mask, strides in ((odd, (32, 16, 8)), (scattered, (4,))):
        for stride in strides:
            inside = (~mask).float()[:, None]
            wanted = F.max_pool2d(inside, stride, ceil_mode=True)[:, 0] == 0
            found = answer(mask, stride)
            same_shape(f"the mask at stride {stride}", found, wanted.shape)
            if found.dtype != torch.bool:
                raise Mistake(f"a mask has dtype bool, not {found.dtype}.".replace("torch.", ""))
            _compare(found, wanted, inside, mask, stride)
    return "Rounding hides no strip of an image, and cells of pure padding are masked."


def _compare(found: Tensor, wanted: Tensor, inside: Tensor, mask: Tensor, stride: int) -> None:
    """Raise a Mistake for the error of a downsampled mask."""
    if torch.equal(found, wanted):
        return
    if torch.equal(found, ~wanted):
        raise Mistake("the mask is inverted: True is padding.")
    any_padding = F.max_pool2d(1 - inside, stride, ceil_mode=True)[:, 0] > 0
    if torch.equal(found, any_padding):
        raise Mistake("cells with a strip of the image are marked as padding: a cell is padding only if all of it is.")
    size = list(wanted.shape[1:])
    if torch.equal(found, F.interpolate(mask[None].float(), size=size)[0].bool()):
        raise Mistake(
            f"interpolation stretches the mask to the map, but {mask.shape[1]} is not a multiple of {stride}, so its "
            f"cells are not the map's: {int((found != wanted).sum())} cells are wrong."
        )
    if torch.equal(found, mask[:, ::stride, ::stride]):
        raise Mistake(
            "the first pixel of a square decides alone; this is right for padding up to the edge, but not in general."
        )
    lost, gained = int((found & ~wanted).sum()), int((~found & wanted).sum())
    raise Mistake(
        f"at stride {stride}, {lost} cells with a part of the image are marked as padding, and {gained} of pure "
        "padding are not."
    )


# What learners get wrong in positions, and how each mistake is recognized: `_positions` makes it.
MISTAKES = {
    "of the map": "the coordinate is divided by the size of the padded map: the cat's last row is at 0.65 in a "
    "batch with the giraffes, but at 1 alone.",
    "from 0": "cells are numbered from 0; DETR numbers them from 1 (an exclusive sum, or arange(h), starts at 0).",
    "always centers": "one half is subtracted without `center`.",
    "no turn": "the factor 2 pi is missing: coordinates run from 0 to 1 and not once around the circle.",
    "half a turn": "the coordinate runs to pi and not to 2 pi.",
    "x first": "x and y are swapped: the first half of the channels is y, the number of the row, cumsum(1).",
    "padding counts": "padding is counted instead of the image: use ~mask.",
    "not divided": "the cells' numbers are not divided by the number of rows or columns of the image.",
}


def _positions(mask: Tensor, dim: int, center: bool = False, mistake: str = "") -> Tensor:
    """DETR's sine encoding [B, dim, h, w], correct or with one of MISTAKES."""
    inside = (mask if mistake == "padding counts" else ~mask).float()
    if mistake == "of the map":
        inside = torch.ones_like(inside)
    y, x = inside.cumsum(1), inside.cumsum(2)
    rows, columns = y[:, -1:] + 1e-6, x[:, :, -1:] + 1e-6
    if mistake == "not divided":
        rows, columns = torch.ones_like(rows), torch.ones_like(columns)
    shift = 1.0 if mistake == "from 0" else 0.5 if center or mistake == "always centers" else 0.0
    turn = {"no turn": 1.0, "half a turn": math.pi}.get(mistake, 2 * math.pi)
    down, across = (y - shift) / rows * turn, (x - shift) / columns * turn
    parts = [sine_embedding(down, dim // 2), sine_embedding(across, dim // 2)]
    return torch.cat(parts[::-1] if mistake == "x first" else parts, dim=-1).permute(0, 3, 1, 2)


@exercise(
    "2.3",
    "The mask gives the size of each image; the shape of the map does not. (~mask).float() is 1 on the image's cells.",
    "cumsum(1) of it counts 1, 2, 3, ... down each column and stops on padding; its last row `y[:, -1:]` is the number "
    "of rows. x the same way with cumsum(2) and `x[:, :, -1:]`.",
    "`y = (y - shift) / (y[:, -1:] + 1e-6) * 2 * math.pi` with shift 0.5 or 0; then sine_embedding(y, dim // 2), the "
    "same for x, torch.cat(..., dim=-1).permute(0, 3, 1, 2).",
)
def positions_of_a_batch(answer: Callable[..., Any]) -> str:
    """The two-dimensional sine encoding, relative to the unpadded image."""
    alone, batch = torch.zeros(1, 13, 20, dtype=torch.bool), torch.ones(2, 20, 20, dtype=torch.bool)
    batch[0, :13], batch[1, :, :14] = False, False
    for mask, dim, center in ((alone, 16, False), (batch, 24, False), (batch, 24, True), (alone, 16, True)):
        found = answer(mask, dim, center)
        case = f"a mask of shape {tuple(mask.shape)}, {dim} channels" + (", center=True" if center else "")
        if isinstance(found, Tensor) and found.shape == (*mask.shape, dim):
            raise Mistake("the channels are the last axis; they should be the second: permute(0, 3, 1, 2).")
        same_shape(f"the result for {case}", found, (mask.shape[0], dim, *mask.shape[1:]))
        inside = ~mask[:, None].expand_as(found)
        wanted = sine_positions(mask, dim, center)
        if not torch.allclose(found[inside], wanted[inside], atol=1e-4):
            for mistake, message in MISTAKES.items():
                if torch.allclose(found[inside], _positions(mask, dim, center, mistake)[inside], atol=1e-3):
                    raise Mistake(message)
            if center and torch.allclose(found[inside], sine_positions(mask, dim)[inside], atol=1e-4):
                raise Mistake("center=True changes nothing: subtract one half from the cells' numbers.")
            number, channel, row, column = (
                ((found - wanted).abs().nan_to_num(9.0) * inside > 1e-4).nonzero()[0].tolist()
            )
            raise Mistake(
                f"for {case}, channel {channel} of image {number} is wrong at row {row}, column {column}; it encodes "
                f"{'y' if channel < dim // 2 else 'x'}."
            )
        if not found.isfinite().all():
            raise Mistake("padding has NaN or infinite values, which spoil sums even if masked: do not divide by 0.")
    return (
        "The bug of the stub affects objects far from the upper left corner most: the error grows with the coordinate."
    )


@exercise(
    "2.4",
    "Compute the angle of each pair first: omega times delta, with omega = temperature ** (-2 i / dim) for pair i.",
    "Row 2i of the matrix gives the sine: sin(a + b) = sin(a) cos(b) + cos(a) sin(b). Row 2i + 1 gives the cosine.",
    "With c and s of every pair: R[2i, 2i] = c, R[2i, 2i + 1] = s, R[2i + 1, 2i] = -s, R[2i + 1, 2i + 1] = c.",
)
def moving_matrix(answer: Callable[..., Any]) -> str:
    """The matrix that shifts sine embeddings."""
    places = torch.linspace(0, 2 * math.pi, 7)
    for delta, dim, temperature in ((0.7, 8, 10000.0), (-1.3, 12, 10000.0), (0.4, 8, 20.0)):
        found = answer(delta, dim, temperature)
        same_shape(f"the matrix for {dim} channels", found, (dim, dim))
        before, after = sine_embedding(places, dim, temperature), sine_embedding(places + delta, dim, temperature)
        moved = before @ found.to(before.dtype).T
        if torch.allclose(moved, before, atol=1e-4):
            raise Mistake("the matrix does not change the embedding.")
        if torch.allclose(moved, sine_embedding(places - delta, dim, temperature), atol=1e-4):
            raise Mistake(
                "the matrix shifts by -delta: the signs of the sines are swapped (or the matrix is transposed)."
            )
        if torch.allclose(before @ _turning_alike(delta, dim).T, moved, atol=1e-4):
            raise Mistake("every pair is rotated by the same angle delta: rotate pair i by omega_i times delta.")
        if torch.allclose(before @ _turning_halves(delta, dim, temperature).T, moved, atol=1e-4):
            raise Mistake(
                "sines and cosines are interleaved (sine, cosine, sine, ...), not half of each: pair i is 2i, 2i + 1."
            )
        close(
            f"the shifted embedding (delta {delta}, {dim} channels, temperature {temperature:g})",
            moved,
            after,
            tolerance=1e-3,
        )
    return "One linear layer can attend to any fixed offset. That is the advantage of sine embeddings."


def _turning_alike(delta: float, dim: int) -> Tensor:
    block = torch.tensor([[math.cos(delta), math.sin(delta)], [-math.sin(delta), math.cos(delta)]])
    return torch.block_diag(*[block] * (dim // 2))


def _turning_halves(delta: float, dim: int, temperature: float) -> Tensor:
    angle = delta * temperature ** (-2 * torch.arange(dim // 2) / dim)
    c, s = angle.cos().diag(), angle.sin().diag()
    return torch.cat([torch.cat([c, s], 1), torch.cat([-s, c], 1)])


@exercise(
    "2.5",
    "The levels follow one another: subtract the tokens of a level until the number lies within a level.",
    "A level has h times w tokens, row by row: within it, row and column are divmod(number, w).",
    "Loop over shapes and strides; if token < h * w, return the square of divmod(token, w), else token -= h * w.",
)
def place_of_token(answer: Callable[..., Any]) -> str:
    """From the number of a token to its square in the image."""
    shapes, strides = [(80, 60), (40, 30), (20, 15)], [8, 16, 32]
    for token in (0, 61, 4799, 4800, 5999, 6000, 6163, 6299):
        number, level = token, 0
        while number >= shapes[level][0] * shapes[level][1]:
            number -= shapes[level][0] * shapes[level][1]
            level += 1
        (h, w), stride = shapes[level], strides[level]

        def square(row: int, column: int, stride: int = stride) -> tuple[int, ...]:
            return tuple(side * stride for side in (column, row, column + 1, row + 1))

        row, column = divmod(number, w)
        wanted = square(row, column)
        found = tuple(int(side) for side in answer(token, shapes, strides))
        if found == wanted:
            continue
        if found == square(column, row):
            raise Mistake(f"x and y are swapped: token {token} is at {wanted}, not at {found}.")
        if found == square(*divmod(number, h)):
            raise Mistake("a row has w tokens, not h: the row is the number divided by the width of the level.")
        if found[3] > 640:
            raise Mistake(
                f"token {token} would end at pixel {found[3]}, below the image's 640: it belongs to a coarser level; "
                "subtract all tokens of the finer levels first."
            )
        raise Mistake(f"token {token} is the square {wanted}, not {found}.")
    return "This turns a weight of token 6163 into a position in the photograph; chapter 13 uses it for its maps."
