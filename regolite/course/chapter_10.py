"""Checkers of notebook 10, glimpses: regions, RoIAlign, padding, weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torchvision.ops import box_convert, roi_align

from regolite.boxes import enlarge, to_pixels, to_xyxy
from regolite.course import Mistake, alike, close, exercise, same_shape
from regolite.data import batch_images
from regolite.models.glimpse import _taps


def _boxes(*shape: int) -> Float[Tensor, "*n 4"]:
    """Boxes in [0, 1], ``cxcywh``, none of them square."""
    return torch.cat([0.3 + 0.4 * torch.rand(*shape, 2), 0.1 + 0.3 * torch.rand(*shape, 2)], -1)


def _compare(name: str, found: Tensor, wanted: Tensor, *mistakes: tuple[Tensor, str]) -> None:
    """Raise a Mistake if ``found`` is not ``wanted``, with the message of the known mistake or with the numbers."""
    if not alike(found, wanted, 1e-3):
        for wrong, message in mistakes:
            if alike(found, wrong, 1e-3):
                raise Mistake(message)
    close(name, found, wanted, 1e-3)


@exercise(
    "10.1",
    "Multiplying all four numbers by alpha moves the box away from the corner of the image. What must not change?",
    "The center stays: (x0 + x1) / 2. Half the new width is alpha times half the old one.",
    "With the mean of the two corners as `center` and half their difference as `half`, the corners are "
    "torch.cat([center - alpha * half, center + alpha * half], -1).",
)
def enlarge_corners(answer: Callable[..., Any]) -> str:
    """``answer(boxes_xyxy, alpha)``."""

    def wider(boxes_xyxy: Tensor, factor: float) -> Tensor:
        return box_convert(enlarge(box_convert(boxes_xyxy, "xyxy", "cxcywh"), factor), "cxcywh", "xyxy")

    for shape in ((1,), (3, 5)):
        boxes, alpha = 100 * to_xyxy(_boxes(*shape)), 3.0
        before = boxes.clone()
        found = answer(boxes, alpha)
        same_shape("the enlarged boxes", found, (*shape, 4))
        if not torch.equal(boxes, before):
            raise Mistake("your function changes its input boxes: create new ones.")
        wanted = wider(boxes, alpha)
        _compare(
            "the enlarged boxes",
            found,
            wanted,
            (boxes, "the boxes are unchanged."),
            (
                alpha * boxes,
                "you multiplied corners by alpha, which moves a box away from the origin: its center must not change.",
            ),
            (
                wider(boxes, alpha**0.5),
                "the area grew by alpha, not the sides: multiply width and height by alpha.",
            ),
            (
                wider(boxes, 2 * alpha),
                "the box grew by alpha on each side of the center, twice too much: half the width goes to each side.",
            ),
            (
                box_convert(wanted, "xyxy", "cxcywh"),
                "the result is center, width, height: convert it to corners.",
            ),
            (wanted.clamp(min=0), "the result is clipped at 0: regions may reach beyond the image."),
        )
    return "A region keeps the center of its box, whatever the format."


@exercise(
    "10.2",
    "Where is column 0.0 of `read` in pixels, and where does `region / stride` place it?",
    "The center of cell 0 is half a cell from the edge: a pixel x is at column x / stride - 0.5.",
    "Half a cell is stride / 2 pixels: align(level, region - stride / 2, stride).",
)
def align_exactly(answer: Callable[..., Any]) -> str:
    """``answer(level, region, stride)``, as ``roi_align`` with ``aligned=True``."""
    for stride in (8, 16):
        level = torch.randn(5, 12, 15)
        theirs = partial(roi_align, level[None], output_size=7, spatial_scale=1 / stride, sampling_ratio=2)
        for corners in ([2.3, 1.2, 9.9, 10.1], [4.0, 3.5, 6.5, 5.25]):
            region = torch.tensor(corners) * stride
            found = answer(level, region, stride)
            same_shape("the glimpse", found, (5, 7, 7))
            _compare(
                "the glimpse",
                found,
                theirs(boxes=[region[None]], aligned=True)[0],
                (
                    theirs(boxes=[region[None]])[0],
                    "this is still `aligned=False`: the points are half a cell too far to the right and the bottom.",
                ),
                (
                    theirs(boxes=[region[None] + stride / 2])[0],
                    "the points were moved in the wrong direction and are now a whole cell off: subtract.",
                ),
                (
                    theirs(boxes=[region[None] - 0.5])[0],
                    "you subtracted half a pixel; subtract half a cell, which is half a stride in pixels.",
                ),
                (
                    theirs(boxes=[region[None] - stride])[0],
                    "you subtracted a whole cell: the center of a cell is half a cell from its edge.",
                ),
            )
    return "It equals roi_align with aligned=True: every point is read at its exact position."


@exercise(
    "10.3",
    "A box of (0.5, 0.5, 1, 1) covers its whole image. Which corners should it have, for each image of the batch?",
    "The padded size is the same for all images; `images.sizes` has each one's own height and width.",
    "Each image has a row of images.sizes: to_pixels(enlarge(boxes, alpha), images.sizes).",
)
def regions_of(answer: Callable[..., Any]) -> str:
    """``answer(boxes, alpha, images)``: enlarged corners in pixels, in each image's own frame."""
    images = batch_images([torch.zeros(3, 96, 160), torch.zeros(3, 128, 64), torch.zeros(3, 50, 70)], multiple=32)
    boxes, alpha, sizes = _boxes(3, 4), 2.0, images.sizes
    found = answer(boxes, alpha, images)
    same_shape("the regions", found, (3, 4, 4))
    padded = sizes.new_tensor(images.mask.shape[1:]).expand_as(sizes)
    larger = enlarge(boxes, alpha)
    _compare(
        "the regions",
        found,
        to_pixels(larger, sizes),
        (
            to_pixels(larger, padded),
            "the regions are still scaled by the padded size of the batch, 128 x 160: in every smaller image they are "
            "too large, and too far to the right and the bottom.",
        ),
        (to_pixels(larger, sizes.flip(1)), "height and width are swapped."),
        (to_pixels(boxes, sizes), "the boxes are in the right frame, but not enlarged by alpha."),
        (to_pixels(larger, sizes[:1].expand(3, 2)), "all images were scaled by the size of the first one."),
        (to_xyxy(larger), "the corners are still in [0, 1]: multiply them by the images' sizes."),
    )
    return "An image's regions no longer depend on the images that share its batch."


@exercise(
    "10.4",
    "Row b has the weights of bin b: weight[0, 0, b, t] in column cell[0, 0, b, t], for its four taps t.",
    "Two taps can have the same cell, if points are close or at the border. Then their weights add up.",
    "matrix.scatter_add_(1, cell[0, 0], weight[0, 0]) adds weights of equal cells; an assignment would keep only one.",
)
def reading_matrix(answer: Callable[..., Any]) -> str:
    """``answer(begin, end, extent)``: the weights of the seven bins along one axis."""
    for begin, end, extent in ((1.3, 15.2, 20), (2.2, 5.1, 12), (-4.0, 9.5, 9)):
        found = answer(begin, end, extent)
        same_shape("the matrix", found, (7, extent))
        cell, weight = (t[0, 0] for t in _taps(torch.tensor([[[begin, end]]]), torch.tensor([[extent]])))
        empty = torch.zeros(7, extent)
        wanted = empty.scatter_add(1, cell, weight)
        if not found.any():
            raise Mistake("the matrix is all zero: no bin reads anything.")
        _compare(
            "the matrix",
            found,
            wanted,
            (
                empty.scatter(1, cell, weight),
                "if two taps have the same cell, only one of their weights was kept: add them. Each row of a region "
                "inside the map sums to 1.",
            ),
            (
                2 * wanted,
                "the rows sum to 2 instead of 1: a bin is the mean of its two points, not their sum.",
            ),
        )
    return "RoIAlign on one level is W_y X W_x^T: linear in the features and separable."


@exercise(
    "10.5",
    "The neighbor's center is inside when it is no farther from the ball's than half the region's side, in x and y.",
    "In x that needs alpha >= 2 |dx| / w, in y alpha >= 2 |dy| / h. Both must hold.",
    "2 * (deciders[:, :2] - balls[:, :2]).abs() / balls[:, 2:], then the larger of the two: .amax(1).",
)
def smallest_alpha(answer: Callable[..., Any]) -> str:
    """``answer(balls, deciders)``: the smallest alpha whose region contains the decider's center."""
    balls, deciders = 128 * _boxes(50), 128 * _boxes(50)
    found = answer(balls, deciders)
    same_shape("alpha", found, (50,))
    away = deciders[:, :2] - balls[:, :2]
    ratio = 2 * away.abs() / balls[:, 2:]
    _compare(
        "alpha",
        found,
        ratio.amax(1),
        (torch.ones(50), "every alpha is 1: the function does not use the neighbors yet."),
        (ratio.amax(1) / 2, "these are half the correct values: a region extends only half its width to each side."),
        (ratio.amin(1), "one axis is not enough: the center must be inside in x and in y, so the larger alpha counts."),
        (
            (2 * away.abs() / deciders[:, 2:]).amax(1),
            "you divided by the neighbor's size; divide by the ball's, which is enlarged.",
        ),
        ((2 * away / balls[:, 2:]).amax(1), "take the absolute value of dx and dy: the neighbor may be on any side."),
        (
            2 * away.norm(dim=1) / balls[:, 2],
            "a region is a rectangle, not a circle: compare in x and in y, not the distance.",
        ),
    )
    return "The paper's largest alpha, 3, includes the neighbor's center for about three balls in ten."
