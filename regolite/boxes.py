"""Boxes: formats, enlarging, overlap.

Two formats exist. Models speak ``cxcywh``: center, width, height in [0, 1] of the unpadded image. People and RoIAlign
speak ``xyxy``: two corners. IoU and GIoU are torchvision's own, re-exported so that there is one place to look.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchvision.ops import box_convert, box_iou, generalized_box_iou

__all__ = ["box_iou", "enlarge", "generalized_box_iou", "inverse_sigmoid", "to_pixels", "to_xyxy"]


def to_xyxy(boxes: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n 4"]:
    """Center, width, height to the two corners; the unit stays the same."""
    return box_convert(boxes, "cxcywh", "xyxy")


def enlarge(boxes: Float[Tensor, "*n 4"], alpha: float) -> Float[Tensor, "*n 4"]:
    """Multiply width and height of ``cxcywh`` boxes by alpha and keep the center: R of equation (7)."""
    return torch.cat([boxes[..., :2], boxes[..., 2:] * alpha], dim=-1)


def to_pixels(boxes: Float[Tensor, "B Q 4"], sizes: Int[Tensor, "B 2"]) -> Float[Tensor, "B Q 4"]:
    """``cxcywh`` in [0, 1] to ``xyxy`` in pixels.

    Args:
        boxes: relative boxes.
        sizes: height and width of each image.
    """
    height, width = sizes.to(boxes.dtype).unbind(1)
    return to_xyxy(boxes) * torch.stack([width, height, width, height], dim=1)[:, None]


def inverse_sigmoid(x: Float[Tensor, "*n"], eps: float = 1e-5) -> Float[Tensor, "*n"]:
    """The logit of x, with x kept away from 0 and 1 by ``eps``: the space in which boxes are added, equation (4)."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))
