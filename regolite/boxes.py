"""Boxes: formats, enlarging, overlap.

Models use ``cxcywh``: center, width and height in [0, 1] of the unpadded image. Results and RoIAlign use ``xyxy``: two
corners. IoU and GIoU are torchvision's, re-exported here.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchvision.ops import box_convert, box_iou, generalized_box_iou

__all__ = ["box_iou", "enlarge", "generalized_box_iou", "inverse_sigmoid", "paired_giou", "to_pixels", "to_xyxy"]


def to_xyxy(boxes: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n 4"]:
    """Convert ``cxcywh`` to ``xyxy`` in the same unit."""
    return box_convert(boxes, "cxcywh", "xyxy")


def enlarge(boxes: Float[Tensor, "*n 4"], alpha: float) -> Float[Tensor, "*n 4"]:
    """Multiply width and height of ``cxcywh`` boxes by alpha: R of equation (7)."""
    return torch.cat([boxes[..., :2], boxes[..., 2:] * alpha], dim=-1)


def paired_giou(boxes: Float[Tensor, "N 4"], others: Float[Tensor, "N 4"]) -> Float[Tensor, "N"]:
    """GIoU of each pair of ``xyxy`` boxes (Rezatofighi et al., 2019), -1 to 1.

    torchvision's ``generalized_box_iou`` computes all N x N pairs. Its loss of pairs selects by a mask, for which the
    CPU waits for the GPU, and adds 1e-7 to areas, which is not small beside those of small boxes.
    """
    begin, end = torch.maximum(boxes[:, :2], others[:, :2]), torch.minimum(boxes[:, 2:], others[:, 2:])
    both = (end - begin).clamp(min=0).prod(-1)
    union = sum((b[:, 2:] - b[:, :2]).prod(-1) for b in (boxes, others)) - both
    hull = (torch.maximum(boxes[:, 2:], others[:, 2:]) - torch.minimum(boxes[:, :2], others[:, :2])).prod(-1)
    tiny = torch.finfo(boxes.dtype).tiny  # of two boxes without area
    return both / union.clamp(min=tiny) - (hull - union) / hull.clamp(min=tiny)


def to_pixels(boxes: Float[Tensor, "B Q 4"], sizes: Int[Tensor, "B 2"]) -> Float[Tensor, "B Q 4"]:
    """``cxcywh`` in [0, 1] to ``xyxy`` in pixels.

    Args:
        boxes: relative boxes.
        sizes: height and width of each image.
    """
    height, width = sizes.to(boxes.dtype).unbind(1)
    return to_xyxy(boxes) * torch.stack([width, height, width, height], dim=1)[:, None]


def inverse_sigmoid(x: Float[Tensor, "*n"], eps: float = 1e-5) -> Float[Tensor, "*n"]:
    """The logit of x, clamped to [eps, 1 - eps]: the space in which boxes are corrected, equation (4)."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))
