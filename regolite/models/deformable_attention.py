"""Multi-scale deformable attention (Zhu et al., Deformable DETR, equation 3) in plain PyTorch.

Dense attention compares a query with every cell of the image. Deformable attention looks at a handful of points: each
head predicts, from the query alone, K offsets from a reference point on each of L levels and K L weights that sum to 1,
and mixes the values that it reads there. There is nothing to compile: ``grid_sample`` does the reading on any device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from regolite.types import Memory


def sample_and_mix(
    values: Float[Tensor, "B S M c"],
    shapes: list[tuple[int, int]],
    locations: Float[Tensor, "B Q M L K 2"],
    weights: Float[Tensor, "B Q M L K"],
) -> Float[Tensor, "B Q C"]:
    """Read values at the sampling locations by bilinear interpolation and sum them with the attention weights.

    Args:
        values: values of all levels in a row, split into heads; S is the number of cells of all levels.
        shapes: height and width of each level.
        locations: x, y in [0, 1] of the (padded) map; outside it the value is zero.
        weights: attention weights, which sum to 1 over levels and points.
    """
    batch, _, heads, _ = values.shape
    locations = locations.permute(3, 0, 2, 4, 1, 5).flatten(1, 2)  # [L, B*M, K, Q, 2]
    weights = weights.permute(3, 0, 2, 4, 1).flatten(1, 2)  # [L, B*M, K, Q]
    mixed = 0.0
    # Level by level: the samples of all levels side by side would be the largest tensor of the whole model.
    by_level = values.split([height * width for height, width in shapes], 1)
    for value, shape, places, weight in zip(by_level, shapes, locations, weights):
        maps = value.permute(0, 2, 3, 1).reshape(batch * heads, -1, *shape)  # [B*M, c, h, w]
        mixed = mixed + read_and_mix(maps, places, weight)  # [B*M, c, Q]
    return mixed.unflatten(0, (batch, heads)).flatten(1, 2).transpose(1, 2)


def read_and_mix(
    maps: Float[Tensor, "N c h w"], places: Float[Tensor, "N K Q 2"], weight: Float[Tensor, "N K Q"]
) -> Float[Tensor, "N c Q"]:
    """``(F.grid_sample(maps, 2 * places - 1) * weight[:, None]).sum(2)``: the same numbers, with less memory.

    Autograd would keep the samples, [N, c, K, Q], for the backward pass: most of the memory of the whole model. Here
    the backward pass reads them a second time, and neither pass has more of them at once than a CPU's cache holds.
    Where there are many, that takes less time, too.

    Args:
        maps: one level, the heads as if they were images.
        places: where to read, x and y in [0, 1].
        weight: the weight of each sample.
    """
    return _ReadAndMix.apply(maps.to(places.dtype), places, weight.to(places.dtype)).to(maps.dtype)


class _ReadAndMix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, maps: Tensor, places: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(maps, places, weight)
        mixed = maps.new_empty(*maps.shape[:2], places.shape[2])
        for some_maps, at, w, out in _few(maps, places, weight, mixed):
            torch.sum(_read(some_maps, 2 * at - 1).mul_(w[:, None]), 2, out=out)
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = []
        for some_maps, at, w, upstream in _few(*ctx.saved_tensors, gradient[:, :, None]):
            grid = 2 * at - 1
            samples = _read(some_maps, grid)
            to_weight = samples.mul_(upstream).sum(1)
            to_samples = torch.mul(upstream, w[:, None], out=samples)
            to_maps, to_grid = _read_backward(to_samples, some_maps, grid, 0, 0, False, [True, True])
            parts.append((to_maps, 2 * to_grid, to_weight))
        return parts[0] if len(parts) == 1 else tuple(torch.cat(several) for several in zip(*parts))


def _read(maps: Tensor, grid: Tensor) -> Tensor:
    return F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


_read_backward = torch.ops.aten.grid_sampler_2d_backward  # _read's modes as numbers, and which gradients are wanted


CACHED = 2**18  # samples: a MiB of float32, about what the cache of a core holds


def _few(maps: Tensor, places: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Some rows of every tensor after others: on a CPU as many as its cache holds the samples of, on a GPU all of them.

    ``grid_sample`` gives each thread of a CPU a map of its own, so there are at least as many rows as threads. Small
    maps go many at a time: for them a call takes longer than the reading.
    """
    rows, channels, points, queries = len(maps), maps.shape[1], places.shape[1], places.shape[2]
    if maps.device.type == "cpu":
        rows = torch.get_num_threads() * max(1, CACHED // (channels * points * queries))
    return zip(*(tensor.split(rows) for tensor in (maps, places, *others)))


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention.

    Args:
        dim: channels C.
        heads: number of heads M.
        levels: number of feature levels L.
        points: sampling points K per head and level.
    """

    def __init__(self, dim: int, heads: int, levels: int, points: int) -> None:
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.sampling_offsets = nn.Linear(dim, heads * levels * points * 2)
        self.attention_weights = nn.Linear(dim, heads * levels * points)
        self.value, self.out = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self._initialize()

    def _initialize(self) -> None:
        """At the start head m looks in direction m, its point k at distance k, with equal weights."""
        nn.init.zeros_(self.sampling_offsets.weight)
        angle = torch.arange(self.heads) * (2 * math.pi / self.heads)
        direction = torch.stack([angle.cos(), angle.sin()], -1)
        direction = direction / direction.abs().max(-1, keepdim=True).values
        distance = torch.arange(1, self.points + 1)
        offsets = direction[:, None, None] * distance[:, None]  # [M, 1, K, 2]
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.expand(-1, self.levels, -1, -1).flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for layer in (self.value, self.out):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def look(
        self, queries: Float[Tensor, "B Q C"], memory: Memory, reference_points: Float[Tensor, "B Q L d"]
    ) -> Float[Tensor, "B Q C"]:
        """Look at a flattened pyramid around the reference points.

        Args:
            queries: what asks, positions added.
            memory: the tokens of all levels.
            reference_points: x, y (d = 2) or cxcywh (d = 4) on each level, in [0, 1] of the padded map.
        """
        values = self.value(memory.tokens)
        if memory.mask is not None:
            values = values.masked_fill(memory.mask[..., None], 0.0)
        values = values.unflatten(2, (self.heads, -1))
        mixed = sample_and_mix(values, memory.shapes, *self.sampling(queries, memory.shapes, reference_points))
        return self.out(mixed)

    def sampling(
        self,
        queries: Float[Tensor, "B Q C"],
        shapes: list[tuple[int, int]],
        reference_points: Float[Tensor, "B Q L d"],
    ) -> tuple[Float[Tensor, "B Q M L K 2"], Float[Tensor, "B Q M L K"]]:
        """Where each head looks, in [0, 1] of the padded map, and with which weight.

        Offsets from a point are counted in cells of the level; offsets from a box in half sizes of the box over K, so
        that the initial points spread over the box.
        """
        offsets = self.sampling_offsets(queries).unflatten(2, (self.heads, self.levels, self.points, 2))
        weights = self.attention_weights(queries).unflatten(2, (self.heads, self.levels * self.points))
        weights = weights.softmax(-1).unflatten(3, (self.levels, self.points))
        reference = reference_points[:, :, None, :, None]  # [B, Q, 1, L, 1, d]
        if reference.shape[-1] == 2:
            cells = torch.tensor([(w, h) for h, w in shapes], dtype=offsets.dtype, device=offsets.device)
            offsets = offsets / cells[:, None]
        else:
            offsets = offsets / self.points * reference[..., 2:] * 0.5
        return reference[..., :2] + offsets, weights
