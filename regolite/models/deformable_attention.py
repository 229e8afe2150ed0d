"""Multi-scale deformable attention (Zhu et al., Deformable DETR, equation 3) in plain PyTorch.

Dense attention compares a query with every cell of the image. Deformable attention samples a few points: from the query
alone, each head predicts K offsets from a reference point on each of L levels and K L weights that sum to 1, and
returns the weighted sum of the values at these points. Nothing needs to be compiled: ``grid_sample`` interpolates on
any device.
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
from regolite.utils.devices import constant


def sample_and_mix(
    values: Float[Tensor, "B S M c"],
    shapes: list[tuple[int, int]],
    locations: Float[Tensor, "B Q M L K 2"],
    weights: Float[Tensor, "B Q M L K"],
) -> Float[Tensor, "B Q C"]:
    """Interpolate values bilinearly at the sampling locations and sum them with the attention weights.

    Args:
        values: concatenated values of all levels, split into heads; S is the number of cells of all levels.
        shapes: height and width of each level.
        locations: x, y in [0, 1] of the (padded) map; outside it the value is zero.
        weights: attention weights, which sum to 1 over levels and points.
    """
    batch, _, heads, _ = values.shape
    locations = locations.permute(3, 0, 2, 4, 1, 5).flatten(1, 2)  # [L, B*M, K, Q, 2]
    weights = weights.permute(3, 0, 2, 4, 1).flatten(1, 2)  # [L, B*M, K, Q]
    mixed = values.new_zeros(())
    # Level by level: the samples of all levels together would be the largest tensor of the model.
    by_level = values.split([height * width for height, width in shapes], 1)
    for value, shape, places, weight in zip(by_level, shapes, locations, weights):
        maps = value.permute(0, 2, 3, 1).reshape(batch * heads, -1, *shape)  # [B*M, c, h, w]
        mixed = mixed + read_and_mix(maps, places, weight)  # [B*M, c, Q]
    return mixed.unflatten(0, (batch, heads)).flatten(1, 2).transpose(1, 2)


def read_and_mix(
    maps: Float[Tensor, "N c h w"], places: Float[Tensor, "N K Q 2"], weight: Float[Tensor, "N K Q"]
) -> Float[Tensor, "N c Q"]:
    """``(F.grid_sample(maps, 2 * places - 1) * weight[:, None]).sum(2)``: the same numbers, with less memory.

    Autograd would keep the samples, [N, c, K, Q], for the backward pass: most of the model's memory. Here the backward
    pass samples again, and neither pass holds more samples at once than fit in a CPU's cache. For many samples this is
    also faster.

    Args:
        maps: one level, with heads in the batch dimension.
        places: sampling locations, x and y in [0, 1].
        weight: the weight of each sample.
    """
    if torch.compiler.is_compiling():  # torch.compile and torch.export plan memory themselves
        samples = _read(maps.to(places.dtype), 2 * places - 1)
        return (samples * weight.to(places.dtype)[:, None]).sum(2).to(maps.dtype)
    return _ReadAndMix.apply(maps.to(places.dtype), places, weight.to(places.dtype)).to(maps.dtype)


class _ReadAndMix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, maps: Tensor, places: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(maps, places, weight)
        mixed = maps.new_empty(*maps.shape[:2], places.shape[2])
        for chunk, at, w, out in _chunks(maps, places, weight, mixed):
            torch.sum(_read(chunk, 2 * at - 1).mul_(w[:, None]), 2, out=out)
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = []
        for chunk, at, w, upstream in _chunks(*ctx.saved_tensors, gradient[:, :, None]):
            grid = 2 * at - 1
            samples = _read(chunk, grid)
            to_weight = samples.mul_(upstream).sum(1)
            to_samples = torch.mul(upstream, w[:, None], out=samples)
            to_maps, to_grid = _read_backward(to_samples, chunk, grid, 0, 0, False, [True, True])
            parts.append((to_maps, 2 * to_grid, to_weight))
        maps, places, weight = (rows[0] if len(parts) == 1 else torch.cat(rows) for rows in zip(*parts))
        return maps, places, weight


def _read(maps: Tensor, grid: Tensor) -> Tensor:
    return F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


_read_backward = torch.ops.aten.grid_sampler_2d_backward  # takes _read's modes as numbers and an output mask


CACHED = 2**18  # samples: 1 MiB of float32, about the cache of a core


def _chunks(maps: Tensor, places: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Chunks of rows of every tensor: on a CPU, as many rows as have samples that fit in the cache; on a GPU, all.

    On a CPU ``grid_sample`` assigns whole maps to threads, so a chunk has at least as many rows as there are threads.
    Small maps are processed many at a time, since a call takes longer than their interpolation.
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
        """Initially head m samples in direction m, point k at distance k, with equal weights."""
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

    def forward(
        self, queries: Float[Tensor, "B Q C"], memory: Memory, reference_points: Float[Tensor, "B Q L d"]
    ) -> Float[Tensor, "B Q C"]:
        """Attend to a flattened pyramid around the reference points.

        Args:
            queries: the queries, positions added.
            memory: the tokens of all levels.
            reference_points: x, y (d = 2) or cxcywh (d = 4) on each level, in [0, 1] of the padded map.
        """
        values = self.value(memory.tokens)
        if memory.mask is not None:
            values = values.masked_fill(memory.mask[..., None], 0.0)
        values = values.unflatten(2, (self.heads, -1))
        mixed = sample_and_mix(values, memory.shapes, *self.sampling(queries, memory.shapes, reference_points))
        return self.out(mixed)

    def look(
        self,
        queries: Float[Tensor, "B Q C"],
        memory: Memory,
        reference_points: Float[Tensor, "B Q L d"] | None = None,
    ) -> Float[Tensor, "B Q C"]:
        """The module's output, by the method that transformer layers call; reference points are required."""
        if reference_points is None:
            raise ValueError("deformable attention needs reference points")
        return self(queries, memory, reference_points)

    def sampling(
        self,
        queries: Float[Tensor, "B Q C"],
        shapes: list[tuple[int, int]],
        reference_points: Float[Tensor, "B Q L d"],
    ) -> tuple[Float[Tensor, "B Q M L K 2"], Float[Tensor, "B Q M L K"]]:
        """Sampling locations of each head, in [0, 1] of the padded map, and their attention weights.

        The unit of an offset is a cell of the level for a reference point, and 1 / K of half the box's size for a
        reference box, so that the initial points spread over the box.
        """
        offsets = self.sampling_offsets(queries).unflatten(2, (self.heads, self.levels, self.points, 2))
        weights = self.attention_weights(queries).unflatten(2, (self.heads, self.levels * self.points))
        weights = weights.softmax(-1).unflatten(3, (self.levels, self.points))
        reference = reference_points[:, :, None, :, None]  # [B, Q, 1, L, 1, d]
        if reference.shape[-1] == 2:
            cells = constant([(w, h) for h, w in shapes], offsets.device, offsets.dtype)
            offsets = offsets / cells[:, None]
        else:
            offsets = offsets / self.points * reference[..., 2:] * 0.5
        return reference[..., :2] + offsets, weights
