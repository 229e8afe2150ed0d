"""Sine embeddings of positions.

Attention treats its tokens as a set. A position encoding added to queries and keys gives each token a position (DETR,
section 3.2; Vaswani et al., section 3.5). Half of the channels encode y, half x.
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
    """Sine embeddings of the cells of a feature map, relative to the unpadded image.

    A cell's coordinate is its index divided by the number of cells of its image, so that it is independent of padding.

    Args:
        mask: True on padding.
        dim: number of channels; the first half encodes y, the second x.
        center: cells have the indices 0.5, 1.5, ... (Deformable DETR) instead of 1, 2, ... (DETR).
    """
    inside = (~mask).float()
    y, x = inside.cumsum(1), inside.cumsum(2)
    shift = 0.5 if center else 0.0
    y = (y - shift) / (y[:, -1:] + 1e-6) * 2 * math.pi
    x = (x - shift) / (x[:, :, -1:] + 1e-6) * 2 * math.pi
    return torch.cat([sine_embedding(y, dim // 2), sine_embedding(x, dim // 2)], dim=-1).permute(0, 3, 1, 2)


def box_positions(boxes: Float[Tensor, "B Q 4"], dim: int) -> Float[Tensor, "B Q four_dims"]:
    """Sine embeddings of the four numbers of a ``cxcywh`` box, ``dim`` each (Deformable DETR, appendix A.4)."""
    return sine_embedding(boxes * 2 * math.pi, dim).flatten(-2)
