"""Glimpses: features of enlarged boxes, equation (7), V(i) = f_ext(X, R(O_box(i-1), alpha(i))).

RoIAlign (He et al., Mask R-CNN) divides a box into 7 x 7 bins and averages bilinearly interpolated features at 2 x 2
points of each bin. Each point depends on four cells, so a bin is a weighted sum of sixteen cells.
:func:`regolite.ops.weighted_sums` computes the sums of all bins, boxes and levels at once. On a CPU it is several times
as fast as torchvision's ``roi_align``, whose backward pass uses one thread (``python -m benchmarks.speed``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from regolite.ops import weighted_sums
from regolite.types import FeatureMap
from regolite.utils.devices import constant

BINS = 7
POINTS = 2  # per bin and axis


def choose_level(boxes_xyxy: Float[Tensor, "B Q 4"], strides: Sequence[int]) -> Int[Tensor, "B Q"]:
    """The level from which each glimpse is cut: coarse levels for large boxes (Lin et al., FPN, equation 1).

    A box of 224 x 224 pixels belongs to stride 16, and every doubling moves one level up.

    Args:
        boxes_xyxy: boxes in pixels of the network's input.
        strides: stride of each level, a power of two, each double the one before.
    """
    size = (boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]).prod(-1).clamp(min=0).sqrt()
    level = torch.floor(4 + torch.log2(size / 224) + 1e-6)  # log2 of the stride
    finest, coarsest = (s.bit_length() - 1 for s in (strides[0], strides[-1]))
    return (level.clamp(finest, coarsest) - finest).long()


def cut_glimpses(
    features: Sequence[FeatureMap], boxes_xyxy: Float[Tensor, "B Q 4"], aligned: bool = False
) -> Float[Tensor, "BQ C 7 7"]:
    """RoIAlign of every box on the level of its size, excluding padding.

    As in RoIAlign, a point up to one cell outside its image reads the border, and a point farther outside reads zero;
    padding is never read. No gradient flows into the boxes.

    Args:
        features: the maps X, finest first, all with C channels.
        boxes_xyxy: boxes in pixels of the network's input.
        aligned: subtract the half cell by which RoIAlign otherwise reads too far right and down, and keep boxes of less
            than a cell as they are, as ``aligned=True`` in torchvision. The released REGO does not.

    Returns:
        The glimpses, ordered by image and query.
    """
    batch, queries = boxes_xyxy.shape[:2]
    device = boxes_xyxy.device
    precision = torch.promote_types(features[0].tensor.dtype, torch.float32)
    boxes = boxes_xyxy.detach().to(precision).nan_to_num()  # NaN has no cell; the loss reports it
    level = choose_level(boxes, [f.stride for f in features])

    # By level: stride, cells of each image, cells and width of the padded map.
    strides = constant([f.stride for f in features], device)
    extents = torch.stack([torch.stack([(~f.mask[:, 0]).sum(1), (~f.mask[:, :, 0]).sum(1)], -1) for f in features], 1)
    cells = constant([f.mask[0].numel() for f in features], device)
    widths = constant([f.mask.shape[2] for f in features], device)
    starts = batch * (cells.cumsum(0) - cells)  # first row of each level
    image = torch.arange(batch, device=device)[:, None]
    extent = extents[image, level]  # [B, Q, 2]: width and height in cells
    first = (starts[level] + image * cells[level])[..., None]  # [B, Q, 1]: the row of the image's first cell

    corners = (boxes / strides[level][..., None]).unflatten(-1, (2, 2))  # [B, Q, corner, axis]
    x, x_weight = _taps(corners[..., 0], extent[..., 0], aligned)
    y, y_weight = _taps(corners[..., 1], extent[..., 1], aligned)
    row = first[..., None] + y * widths[level][..., None, None]  # [B, Q, 7, 4]
    index = row[:, :, :, None, :, None] + x[:, :, None, :, None, :]  # [B, Q, 7, 7, 4, 4]
    weight = y_weight[:, :, :, None, :, None] * x_weight[:, :, None, :, None, :]

    rows = torch.cat([f.tensor.permute(0, 2, 3, 1).flatten(0, 2) for f in features])  # [B * cells of all levels, C]
    bins = weighted_sums(rows.to(precision), index.flatten(4).flatten(0, 3), weight.flatten(4).flatten(0, 3))
    return bins.unflatten(0, (batch * queries, BINS, BINS)).permute(0, 3, 1, 2)


def _taps(
    corners: Float[Tensor, "B Q 2"], extent: Int[Tensor, "B Q"], aligned: bool = False
) -> tuple[Int[Tensor, "B Q 7 4"], Float[Tensor, "B Q 7 4"]]:
    """Along one axis, the four cells of each bin (two neighbors of two points) and their weights.

    Args:
        corners: begin and end of each box in cells.
        extent: number of cells of the box's image.
        aligned: see :func:`cut_glimpses`.
    """
    begin, end = corners[..., :1], corners[..., 1:]
    size = end - begin
    begin, size = (begin - 0.5, size) if aligned else (begin, size.clamp(min=1))
    size = size / (BINS * POINTS)
    points = begin + size * (torch.arange(BINS * POINTS, device=corners.device) + 0.5)  # [B, Q, 14]
    limit = extent[..., None]
    inside = (points >= -1) & (points <= limit)
    points = points.clamp(min=0).minimum(limit - 1.0)
    lower = points.floor()
    fraction = points - lower
    cell = torch.stack([lower, (lower + 1).minimum(limit - 1.0)], -1).long()
    weight = torch.stack([1 - fraction, fraction], -1) * inside[..., None] / POINTS
    return cell.unflatten(2, (BINS, POINTS)).flatten(3), weight.unflatten(2, (BINS, POINTS)).flatten(3)


class GlimpseHead(nn.Module):
    """A vector for each glimpse: a convolution over the whole 7 x 7 window, then a linear layer.

    Args:
        channels: channels of the features.
        dim: channels of the vector.
        groups: groups of the convolution.
    """

    def __init__(self, channels: int, dim: int, groups: int = 4) -> None:
        super().__init__()
        self.window = nn.Conv2d(channels, dim, BINS, groups=groups)
        self.window_norm = nn.LayerNorm(dim)
        self.project = nn.Linear(dim, dim)
        self.project_norm = nn.LayerNorm(dim)
        for layer in (self.window, self.project):
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]  # torch types the bias as optional

    def forward(self, glimpses: Float[Tensor, "N C 7 7"]) -> Float[Tensor, "N D"]:
        """The glimpse vectors V(i)."""
        # A convolution over the whole map is a matrix product for each group, which is several times as fast on a CPU.
        groups = self.window.groups
        inputs = glimpses.unflatten(1, (groups, -1)).flatten(2).transpose(0, 1)  # [groups, N, C / groups * 49]
        weight = self.window.weight.unflatten(0, (groups, -1)).flatten(2)  # [groups, D / groups, C / groups * 49]
        x = torch.bmm(inputs, weight.transpose(1, 2)).transpose(0, 1).flatten(1) + self.window.bias  # type: ignore[operator]
        return self.project_norm(self.project(self.window_norm(x).relu()))


class FeatureContext(nn.Module):
    """Context that the released code adds to every level before cutting glimpses; the paper does not mention it.

    The outputs of three dilated 3 x 3 convolutions are added with a factor of 0.1. Their input is detached, so that
    they do not train the features.

    Args:
        dim: channels of the features.
    """

    def __init__(self, dim: int, hidden_dim: int = 64) -> None:
        super().__init__()
        inwards = [nn.Conv2d(dim, hidden_dim, 3, padding=d, dilation=d, groups=8) for d in (3, 7, 11)]
        outwards = [nn.Conv2d(hidden_dim, dim, 1) for _ in inwards]
        self.inward, self.outward = nn.ModuleList(inwards), nn.ModuleList(outwards)
        self.norm = nn.GroupNorm(32, dim)
        self.dropout = nn.Dropout(0.01)
        for inward, outward in zip(inwards, outwards):
            nn.init.xavier_normal_(inward.weight)
            nn.init.normal_(outward.weight, std=1e-3)
            nn.init.zeros_(inward.bias)  # type: ignore[arg-type]  # torch types the bias as optional
            nn.init.zeros_(outward.bias)  # type: ignore[arg-type]

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
        """The level with its context, normalized."""
        for inward, outward in zip(self.inward, self.outward):
            around = outward(inward(x.detach().relu()).relu())
            x = x + 0.1 * self.dropout(around)
        return self.norm(x)
