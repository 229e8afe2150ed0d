"""Weighted sums of rows of a table, the main operation of RoIAlign.

Bilinear interpolation combines four cells, and a bin is the mean of several interpolated points. So a bin is a weighted
sum of a few rows of a table, the cells' features: a product with a sparse matrix.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from scipy.sparse import csr_array
from torch import Tensor
from torch.autograd.function import once_differentiable


def weighted_sums(
    rows: Float[Tensor, "R C"], index: Int[Tensor, "N T"], weight: Float[Tensor, "N T"]
) -> Float[Tensor, "N C"]:
    """``(rows[index] * weight[..., None]).sum(1)`` without the intermediate [N, T, C] tensor.

    Gradients flow only into ``rows``. ``embedding_bag`` computes the sums on any device. Its backward pass on a CPU
    sorts all indices; scipy's product with the transposed sparse matrix needs no sort.

    Args:
        rows: the table.
        index: the rows of each sum.
        weight: their weights, of the table's data type.
    """
    if torch.compiler.is_compiling():  # torch.compile and torch.export: scipy and embedding_bag have no fast ONNX form
        return torch.bmm(weight[:, None], rows[index])[:, 0]
    if rows.device.type != "cpu":
        return F.embedding_bag(index, rows, per_sample_weights=weight, mode="sum")
    return _WeightedSums.apply(rows, index, weight)


def reference(
    rows: Float[Tensor, "R C"], index: Int[Tensor, "N T"], weight: Float[Tensor, "N T"]
) -> Float[Tensor, "N C"]:
    """The definition of :func:`weighted_sums`."""
    return (rows[index] * weight[..., None]).sum(1)


class _WeightedSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(index, weight)
        ctx.count = len(rows)
        return F.embedding_bag(index, rows, per_sample_weights=weight, mode="sum")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        index, weight = ctx.saved_tensors
        starts = np.arange(0, index.numel() + 1, index.shape[1], dtype=np.int32)
        columns = index.flatten().int().numpy()
        matrix = csr_array((weight.flatten().numpy(), columns, starts), shape=(len(index), ctx.count))
        return torch.from_numpy(matrix.T @ gradient.contiguous().numpy()), None, None
