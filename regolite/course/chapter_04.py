"""Checkers of notebook 04: boxes and overlap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from regolite.boxes import box_iou, generalized_box_iou, to_xyxy
from regolite.course import Mistake, alike, close, exercise, has_gradient, same_shape

COUCH = (0.4841, 0.4970, 0.9682, 0.9850)
"""The couch of COCO image 599, ``cxcywh``."""


def _boxes(count: int) -> Tensor:
    """Boxes inside the image, ``cxcywh``."""
    size = 0.1 + 0.3 * torch.rand(count, 2)
    return torch.cat([size / 2 + torch.rand(count, 2) * (1 - size), size], 1)


@exercise(
    "4.1",
    "Which of the four numbers does a horizontal flip change? Consider the center first, then the size.",
    "A point 0.1 from the left border is 0.1 from the right border afterwards, so its x is 0.9.",
    "Clone the boxes (or build new ones by torch.cat) and replace column 0 by 1 minus itself.",
)
def mirror(answer: Callable[[Tensor], Tensor]) -> str:
    """Boxes of a horizontally flipped image."""
    boxes = _boxes(6)
    given = boxes.clone()
    found = answer(given)
    same_shape("mirror(boxes)", found, (6, 4))
    cx, cy, w, h = boxes.unbind(1)
    if not torch.equal(given, boxes):
        raise Mistake("the input boxes were changed, but the caller still needs them. Work on a copy (clone).")
    known = {
        "the boxes are unchanged: the center's x has to change.": boxes,
        "this is a vertical flip: y changed instead of x.": torch.stack([cx, 1 - cy, w, h], 1),
        "the centers left the image: x became -x. The axis is the middle of the image, not 0.": (
            torch.stack([-cx, cy, w, h], 1)
        ),
        "this flips corners, but the boxes are cxcywh: there is no second x to swap.": torch.stack(
            [1 - w, cy, 1 - cx, h], 1
        ),
        "the widths changed. A flipped object has the same width.": torch.stack([1 - cx, cy, -w, h], 1),
    }
    for said, wrong in known.items():
        if alike(found, wrong):
            raise Mistake(said)
    close("mirror(boxes)", found, torch.stack([1 - cx, cy, w, h], 1))
    return "One number of four changes; with corners two would change and have to be swapped."


@exercise(
    "4.2",
    "Try two boxes that do not touch, first side by side, then diagonally apart. What is `far - near`?",
    "Two boxes apart in x and in y have two negative sides. What is their product?",
    "Set negative sides to 0 before they are multiplied: clamp(min=0), then prod.",
)
def paired_iou(answer: Callable[[Tensor, Tensor], Tensor]) -> str:
    """IoU of pairs; the faulty version multiplies two negative sides."""
    touching = torch.tensor([[0.1, 0.1, 0.5, 0.6], [0.2, 0.3, 0.9, 0.8]])
    moved = touching + torch.tensor([0.1, -0.05, 0.15, 0.1])
    small = torch.tensor([[0.0, 0.0, 0.2, 0.2]])
    beside, across = small + torch.tensor([0.6, 0.1, 0.6, 0.1]), small + torch.tensor([0.3, 0.35, 0.3, 0.35])
    a, b = torch.cat([touching, small, small]), torch.cat([moved, beside, across])
    found = answer(a, b)
    if isinstance(found, Tensor) and found.shape == (4, 4):
        raise Mistake("this is the matrix of all pairs. Here box n is compared with box n only: the result is [N].")
    same_shape("paired_iou(a, b)", found, (4,))
    found = found.detach()
    wanted = box_iou(a, b).diagonal()
    close("the IoU of boxes that overlap", found[:2], wanted[:2])
    if abs(float(found[2])) > 1e-4:
        raise Mistake(
            f"two boxes side by side, which do not touch, have IoU {float(found[2]):.2f}: one side of their "
            "intersection is negative."
        )
    if abs(float(found[3])) > 1e-4:
        raise Mistake(
            f"two boxes diagonally apart, which do not touch, have IoU {float(found[3]):.2f}: the "
            "intersection has two negative sides, and their product is positive."
        )
    a.requires_grad_()
    answer(a, b)[:2].sum().backward()
    has_gradient("the boxes", a)
    return "Negative sides are clamped before the product, so they no longer cancel."


@exercise(
    "4.3",
    "Let the width be 1 and the height be 1. How wide is the intersection after a shift of s? And the union?",
    "The intersection is 1 - s wide, the union 1 + s.",
    "Solve t = (1 - s) / (1 + s) for s.",
)
def largest_shift(answer: Callable[[float], float]) -> str:
    """Largest horizontal shift, in widths, for a given IoU."""
    for t in (0.5, 0.75, 0.95, 0.3, 1.0):
        found = answer(t)
        if not isinstance(found, (int, float, Tensor)):
            raise Mistake(f"largest_shift({t}) should be a number, but is {type(found).__name__}.")
        found, wanted = float(found), (1 - t) / (1 + t)
        if abs(found - wanted) > 1e-4:
            if t == 0.5 and found == 0:
                raise Mistake("a box can move before its IoU falls below 0.5, but your answer for t = 0.5 is 0.")
            if abs(found - (1 - t)) < 1e-4:
                raise Mistake(
                    f"for t = {t} your answer is {found:.2f}. That is right for the intersection alone: as it shrinks, "
                    "the union grows."
                )
            if abs(found - (1 - t) / 2) < 1e-4:
                raise Mistake(f"for t = {t} your answer is {found:.2f}. Check it: intersection 1 - s, union 1 + s.")
            reached = (1 - found) / (1 + found) if found > -1 else float("nan")
            raise Mistake(f"for t = {t} your answer is {found:.4f}, but with that shift the IoU is {reached:.2f}.")
    return "A shift of 1/3 of the width gives an IoU of 0.50, 1/7 gives 0.75, and 1/39 gives 0.95."


@exercise(
    "4.4",
    "Overlap needs corners: convert both tensors first.",
    "Row n with row n: torch.maximum and torch.minimum of [N, 2] tensors, without a new axis.",
    "1 - (intersection / union - (hull - union) / hull), with the sides of the intersection clamped at 0.",
)
def paired_giou_loss(answer: Callable[[Tensor, Tensor], Tensor]) -> str:
    """1 - GIoU of pairs of ``cxcywh`` boxes."""
    boxes, wanted = _boxes(7), _boxes(7)
    boxes[0], wanted[0] = torch.tensor([0.2, 0.2, 0.2, 0.1]), torch.tensor([0.8, 0.7, 0.2, 0.3])  # far apart
    boxes[1], wanted[1] = torch.tensor([0.5, 0.5, 0.2, 0.2]), torch.tensor([0.5, 0.5, 0.6, 0.4])  # one in the other
    found = answer(boxes.clone(), wanted.clone())
    if isinstance(found, Tensor) and found.shape == (7, 7):
        raise Mistake(
            "this is the matrix of all pairs, [7, 7]. Compare box n with ground-truth box n only: the result is [7]."
        )
    same_shape("paired_giou_loss(boxes, wanted)", found, (7,))
    giou = _giou(to_xyxy(boxes), to_xyxy(wanted))
    iou = box_iou(to_xyxy(boxes), to_xyxy(wanted)).diagonal()
    known = {
        "this is GIoU itself. A loss should be 0 for a perfect box: 1 - GIoU.": giou,
        "this is 1 - IoU: the term of the hull is missing, so boxes that do not touch have no gradient.": 1 - iou,
        "the boxes are cxcywh, and overlap needs corners: convert them first.": 1 - _giou(boxes, wanted),
        "the term of the hull has the wrong sign: empty space in the hull should make the loss larger.": 1
        - (2 * iou - giou),
    }
    for said, wrong in known.items():
        if torch.allclose(found.detach().float(), wrong, atol=1e-4, equal_nan=True):
            raise Mistake(said)
    close("the loss", found, 1 - giou)
    boxes.requires_grad_()
    loss = answer(boxes, wanted)
    if not loss.requires_grad:
        raise Mistake("no gradient flows back to the boxes: an operation is detached or not differentiable.")
    loss.sum().backward()
    has_gradient("the boxes", boxes)
    if boxes.grad is None or not boxes.grad[0].any():
        raise Mistake("the two boxes that are far apart have no gradient: which term of GIoU should give one?")
    return "It equals 1 - GIoU of every pair, and boxes that do not touch have a gradient too."


@exercise(
    "4.5",
    "The union is |A| + |B| minus the intersection. So only the intersection and the hull can change as a box moves.",
    "When is the hull simply the larger of the two boxes? What is the intersection then?",
    "Put a small box anywhere inside the couch's, not at its center and not touching its border.",
)
def stuck(answer: Any) -> str:
    """A box whose center has no GIoU gradient."""
    same_shape("the box", answer, (4,))
    box = answer.detach().cpu().float().requires_grad_()
    if not box.isfinite().all() or not (box[2:] > 0).all():
        raise Mistake("the box needs a width and a height above 0.")
    corners = to_xyxy(box.detach())
    if (corners < -1e-6).any() or (corners > 1 + 1e-6).any():
        raise Mistake("the box extends beyond the image: all four corners should lie between 0 and 1.")
    couch = torch.tensor(COUCH)
    away = float((box[:2] - couch[:2]).detach().norm())
    if away < 0.1:
        raise Mistake(
            f"the center is only {away:.2f} from the couch's: there the position is right and needs no gradient."
        )
    giou = _giou(to_xyxy(box)[None], to_xyxy(couch)[None])[0]
    (gradient,) = torch.autograd.grad(1 - giou, box)
    for axis, slope in zip("xy", gradient[:2].tolist()):
        if abs(slope) > 1e-6:
            raise Mistake(
                f"the center's {axis} still has a gradient, {slope:.2f}: moving the box along {axis} changes the "
                "intersection or the hull."
            )
    return "If one box contains the other, the hull is the larger one and GIoU is IoU: only sizes have gradients."


def _giou(a_xyxy: Tensor, b_xyxy: Tensor) -> Tensor:
    """GIoU of pairs."""
    return generalized_box_iou(a_xyxy, b_xyxy).diagonal()
