"""Checkers of notebook 09: deformable attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from regolite.boxes import inverse_sigmoid
from regolite.course import Mistake, close, exercise, same_shape


def _differs(found: Tensor, wanted: Tensor, tolerance: float = 1e-3) -> bool:
    return found.shape != wanted.shape or not torch.allclose(found.detach().float(), wanted, atol=tolerance)


def _read(x: Tensor, points: Tensor, align_corners: bool = False) -> Tensor:
    """The values of one channel [h, w] at points [N, 2] in [0, 1], by ``grid_sample``."""
    return F.grid_sample(x[None, None], 2 * points[None, None] - 1, align_corners=align_corners)[0, 0, 0]


@exercise(
    "9.1",
    "What is the bilinear value of a map of ones at these points?",
    "For a map of ones the value is the sum of the bilinear weights: bilinear() of a map of ones.",
)
def coverage(answer: Callable[[Tensor, int, int], Tensor]) -> str:
    """``coverage(points, height, width)``: the total bilinear weight of cells inside the map."""
    height, width = 5, 9
    known = torch.tensor([[0.5, 0.5], [0.0, 0.5], [1.0, 1.0], [-0.2, 0.5]])
    points = torch.cat([known, torch.rand(60, 2) * 1.6 - 0.3])
    ones = torch.ones(height, width)
    wanted = _read(ones, points)
    found = answer(points, height, width)
    same_shape("the coverage", found, (len(points),))
    if not _differs(found, torch.ones(len(points))):
        raise Mistake("every point is fully covered in your answer, but at the edge of the map one side is zero.")
    if not _differs(found, _read(ones, points, align_corners=True)):
        raise Mistake(
            "0 and 1 are the outer edges of the map, not the centers of the outermost cells (align_corners=False): "
            "at a corner three of the four neighbors are missing."
        )
    if not _differs(found, _read(torch.ones(width, height), points)):
        raise Mistake("height and width are swapped.")
    close("the coverage", found, wanted)
    return "It is 1 in the middle, 1/2 at the middle of a side, 1/4 at a corner, and 0 from half a cell outside."


@exercise(
    "9.2",
    "Write down the value between four cells as a formula of p_x and p_y, and differentiate it by p_x.",
    "By p_x: right minus left, in the upper and in the lower row, interpolated by p_y.",
    "p_x = x w - 1/2, so the chain rule multiplies the first component by w, and the second by h.",
)
def slope(answer: Callable[[Tensor, Tensor], Tensor]) -> str:
    """``slope(x, points)``: the gradient of bilinear interpolation with respect to the points."""
    height, width = 6, 9
    x = torch.randn(height, width)
    inner = torch.rand(40, 2) * 0.6 + 0.2
    points = inner.clone().requires_grad_()
    [wanted] = torch.autograd.grad(_read(x, points).sum(), points)
    found = answer(x.clone(), inner.clone())
    same_shape("the slopes", found, (40, 2))
    found = found.detach()
    cells = torch.tensor([width, height])
    if not found.any():
        raise Mistake("all slopes are zero, but a point between two different cells has a slope.")
    if not _differs(found, wanted / cells):
        raise Mistake(
            "these are slopes per cell: points are relative to the map, so the chain rule multiplies by both sizes."
        )
    if not _differs(found, wanted / cells * cells.flip(0)):
        raise Mistake("width and height are swapped: x, the first component, belongs to the width.")
    if not _differs(found.flip(1), wanted):
        raise Mistake("x and y are swapped: the first component is the slope along x, along a row.")
    if not _differs(-found, wanted):
        raise Mistake("every slope has the wrong sign: it is right minus left, and lower minus upper.")
    close("the slopes", found, wanted, 1e-3)
    return "Only the four nearest cells contribute to a point's gradient."


@exercise(
    "9.3",
    "Print weights.sum() over the last two axes for one query and one head. What should it be?",
    "Equation (3): the sum over l and k together is 1.",
    "flatten(-2), softmax, unflatten.",
)
def weigh(answer: Callable[[Tensor], Tensor]) -> str:
    """``weigh(scores)``: attention weights over levels and points together."""
    scores = torch.randn(2, 5, 4, 3, 6) * 2
    found = answer(scores.clone())
    same_shape("the weights", found, scores.shape)
    found = found.detach()
    alternatives = {
        "the weights of each level sum to 1, so those of a head sum to the number of levels: the softmax is over the "
        "points of a level, not over levels and points together.": scores.softmax(-1),
        "the softmax is over the levels: it should be over levels and points together.": scores.softmax(-2),
        "the softmax is over the heads: the weights of each head should sum to 1.": scores.softmax(2),
        "the weights of a head sum to 1, but dividing by the number of levels gives every level the same share; with "
        "one softmax over levels and points the query can prefer a level.": scores.softmax(-1) / 3,
        "the softmax is over heads, levels and points: the weights of each head should sum to 1.": (
            scores.flatten(2).softmax(-1).view_as(scores)
        ),
    }
    for mistake, wrong in alternatives.items():
        if not _differs(found, wrong, 1e-5):
            raise Mistake(mistake)
    close("the weights", found, scores.flatten(-2).softmax(-1).view_as(scores), 1e-5)
    return "One softmax distributes the weight over levels and points."


@exercise(
    "9.4",
    "Locations are relative to the padded map: times (width, height) of the batch they are pixels of the input.",
    "Then a pixel of the resized image is original / resized pixels of the file, separately in x and y.",
)
def to_photograph(answer: Callable[..., Tensor]) -> str:
    """``to_photograph(locations, padded, resized, original)``: sampling locations in pixels of the file."""
    locations = torch.rand(7, 8, 3, 4, 2)
    padded, resized, original = (256, 320), (250, 167), (640, 427)

    def right(padded: tuple[int, int], resized: tuple[int, int], original: tuple[int, int]) -> Tensor:
        scale = torch.tensor([padded[i] / resized[i] * original[i] for i in (1, 0)])
        return locations * scale

    wanted = right(padded, resized, original)
    found = answer(locations.clone(), padded, resized, original)
    same_shape("the points", found, locations.shape)
    found = found.detach()
    if not _differs(found, locations * torch.tensor([original[1], original[0]]), 0.05):
        raise Mistake(
            "the padding is ignored: 1 is the edge of the padded batch, not of the image, so your points are shifted "
            "towards the upper left corner."
        )
    if not _differs(found, locations * torch.tensor([padded[1], padded[0]]), 0.05):
        raise Mistake("these are pixels of the padded batch: scale them from the resized image to the original.")
    if not _differs(found, locations * torch.tensor([padded[1] * 2.5, padded[0] * 2.5]), 0.05):
        raise Mistake("2.5 is the scale of the cat's photograph; compute it from the sizes.")
    swapped = right(padded, resized, original) / torch.tensor([padded[1], padded[0]]) * torch.tensor(padded)
    turned = locations * torch.tensor([padded[i] / resized[i] * original[i] for i in (0, 1)])
    if not _differs(found, swapped, 0.05) or not _differs(found, turned, 0.05):
        raise Mistake("x belongs to the width and y to the height; sizes are (height, width), locations (x, y).")
    close("the points", found, wanted, 0.05)
    again = ((192, 256), (162, 256), (407, 640))
    close("the points of another image", answer(locations.clone(), *again), right(*again), 0.05)
    return "Now the points of any batch can be drawn on the original images."


@exercise(
    "9.5",
    "Solve the equation of the refinement for the correction.",
    "wanted = sigmoid(correction + logit(start)), so correction = logit(wanted) - logit(start).",
    "A point has two logits; those of the size are 0: F.pad(logits, (0, 2)). inverse_sigmoid keeps 0 and 1 finite.",
)
def correction(answer: Callable[[Tensor, Tensor], Tensor]) -> str:
    """``correction(start, wanted)``: the required output of the box head."""
    start, wanted = torch.rand(30, 4) * 0.9 + 0.05, torch.rand(30, 4) * 0.9 + 0.05
    found = answer(start.clone(), wanted.clone())
    same_shape("the correction", found, (30, 4))
    if not found.any():
        raise Mistake("a correction of zero does not move the boxes.")
    if not _differs(found, wanted - start):
        raise Mistake("this is the difference of the boxes: they are added as logits, not as numbers in [0, 1].")
    right = inverse_sigmoid(wanted) - inverse_sigmoid(start)
    if not _differs(-found, right):
        raise Mistake("the sign is wrong: the correction leads from the start to the wanted box.")
    if not _differs(found, inverse_sigmoid(wanted)):
        raise Mistake("this is the logit of the wanted box: the layer adds it to the logit of the start.")
    close("the correction of boxes", found, right, 1e-3)

    found = answer(start[:, :2].clone(), wanted.clone())
    same_shape("the correction from reference points", found, (30, 4))
    sizes = inverse_sigmoid(wanted)[:, 2:]
    if not _differs(found[:, 2:], sizes - inverse_sigmoid(torch.tensor(1e-5)), 0.05):
        raise Mistake("for a point, the size starts from the LOGIT 0, which is 0.5, not from a size of 0.")
    close("the correction from reference points", found, torch.cat([right[:, :2], sizes], 1), 1e-3)

    edges = torch.tensor([[0.0, 1.0, 0.5, 1.0]])
    if not answer(edges, torch.full((1, 4), 0.5)).isfinite().all() or not answer(wanted[:1], edges).isfinite().all():
        raise Mistake("the correction is infinite where a coordinate is 0 or 1: clamp it before the logarithm.")
    return (
        "In logits every correction gives a valid box, and small boxes do not need smaller corrections than large ones."
    )


@exercise(
    "9.6",
    "Solve 4 bytes times M S^2 = memory for S, and round down.",
    "math.isqrt(room // (4 * heads)); for the other, room // (heads * points * 3 * 4).",
)
def fits(answer: Callable[[int, int, int], tuple[int, int]]) -> str:
    """``fits(room, heads, points)``: the maximum numbers of tokens of dense and deformable attention."""
    for room, heads, points in ((10**9, 8, 16), (123_456_789, 4, 12), (7 * 10**10, 16, 8)):
        found = answer(room, heads, points)
        if not isinstance(found, (tuple, list)) or len(found) != 2:
            raise Mistake("return two integers: tokens for dense attention, tokens for deformable attention.")
        dense, sparse = found
        if dense != int(dense) or sparse != int(sparse):
            raise Mistake("numbers of tokens are integers: round down.")
        if dense < 1 or sparse < 1:
            raise Mistake(f"{room:,} bytes hold more than {int(dense)} and {int(sparse)} tokens.")
        _affordable("dense", int(dense), room, partial(_dense_bytes, heads), _dense_slips(room, heads))
        slips = {
            "a point has three numbers, a weight and two coordinates": room // (4 * heads * points),
            "a float32 number takes 4 bytes": room // (3 * heads * points),
            "every head has its own points": room // (12 * points),
        }
        _affordable("deformable", int(sparse), room, partial(_sparse_bytes, heads, points), slips)
    return "A gigabyte holds 5,590 tokens densely and 651,041 deformably; an image of 800 by 1066 has 17,821."


def _dense_bytes(heads: int, tokens: int) -> int:
    """Bytes of dense attention weights."""
    return 4 * heads * tokens * tokens


def _sparse_bytes(heads: int, points: int, tokens: int) -> int:
    """Bytes of sampling locations and weights."""
    return 12 * heads * points * tokens


def _dense_slips(room: int, heads: int) -> dict[str, int]:
    return {
        "a float32 number takes 4 bytes": int((room / heads) ** 0.5),
        "every head has its own weights": int((room / 4) ** 0.5),
        "the memory grows with the square of the number of tokens": room // (4 * heads),
    }


def _affordable(kind: str, found: int, room: int, takes: Callable[[int], int], slips: dict[str, int]) -> None:
    """Raise a Mistake unless ``found`` is the largest number of tokens that fits into the room."""
    if takes(found) <= room < takes(found + 1):
        return
    for slip, wrong in slips.items():
        if abs(found - wrong) <= 1:
            raise Mistake(f"{found:,} tokens for {kind} attention: {slip}.")
    how = f"take {takes(found):,} bytes of {room:,}" if takes(found) > room else "leave room for one more"
    raise Mistake(f"{found:,} tokens with {kind} attention {how}.")
