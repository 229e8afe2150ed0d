"""Sine positions: where a token stands, written as waves of many lengths.

Attention treats its tokens as a set. A position encoding added to queries and keys tells it where each one stands
(DETR, section 3.2; Vaswani et al., section 3.5). Half of the channels encode y, half x.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def sine_embedding(coordinate: Float[Tensor, "*n"], dim: int, temperature: float = 10000) -> Float[Tensor, "*n dim"]:
    """Sine and cosine of a coordinate at ``dim / 2`` wavelengths, interleaved.

    Args:
        coordinate: angles in radians; a position in [0, 1] is multiplied by 2 pi first.
        dim: number of channels, even.
        temperature: ratio of the longest to the shortest wavelength.
    """
    pair = torch.arange(dim, dtype=torch.float32, device=coordinate.device) // 2
    angles = coordinate[..., None] / temperature ** (2 * pair / dim)
    return torch.stack([angles[..., 0::2].sin(), angles[..., 1::2].cos()], dim=-1).flatten(-2)


def sine_positions(mask: Bool[Tensor, "B h w"], dim: int, center: bool = False) -> Float[Tensor, "B dim h w"]:
    """Positions of the cells of a feature map, relative to the unpadded image.

    A cell's coordinate is its number divided by the number of cells of its own image, so padding moves nothing.

    Args:
        mask: True on padding.
        dim: number of channels; the first half encodes y, the second x.
        center: number the cells 0.5, 1.5, ... (Deformable DETR) and not 1, 2, ... (DETR).
    """
    inside = (~mask).float()
    y, x = inside.cumsum(1), inside.cumsum(2)
    shift = 0.5 if center else 0.0
    y = (y - shift) / (y[:, -1:] + 1e-6) * 2 * math.pi
    x = (x - shift) / (x[:, :, -1:] + 1e-6) * 2 * math.pi
    return torch.cat([sine_embedding(y, dim // 2), sine_embedding(x, dim // 2)], dim=-1).permute(0, 3, 1, 2)


def box_positions(boxes: Float[Tensor, "B Q 4"], dim: int) -> Float[Tensor, "B Q four_dims"]:
    """Waves of the four numbers of a ``cxcywh`` box, ``dim`` channels each (Deformable DETR, appendix A.4)."""
    return sine_embedding(boxes * 2 * math.pi, dim).flatten(-2)
