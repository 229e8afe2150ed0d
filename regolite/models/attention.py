"""Multi-head attention, equations (1) and (2) of the paper.

Each head projects queries, keys and values to C' = C / M channels and averages the values, weighted by the softmax of
scaled dot products. The heads' outputs are concatenated and projected. PyTorch's fused kernel computes the averages;
:meth:`MultiHeadAttention.weights` returns the weights that the kernel does not expose.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regolite.types import Memory


def packed_xavier_(*layers: nn.Linear) -> None:
    """Initialize linear layers as one matrix of their rows, and their biases with zeros.

    ``nn.MultiheadAttention`` holds the weights of queries, keys and values in one matrix [3C, C], whose Xavier bound is
    sqrt(6 / 4C), 0.0765 for C = 256; that of three matrices [C, C] would be sqrt(6 / 2C), 0.108. DETR, Deformable DETR,
    SMCA and REGO use this module.
    """
    fan_out = sum(layer.out_features for layer in layers)
    for layer in layers:
        bound = (6 / (layer.in_features + fan_out)) ** 0.5
        nn.init.uniform_(layer.weight, -bound, bound)
        nn.init.zeros_(layer.bias)


class MultiHeadAttention(nn.Module):
    """A(X_q, X_kv) of equation (1), initialized as in DETR (:func:`packed_xavier_`).

    Args:
        dim: channels C of queries and output.
        heads: number of heads M; divides ``dim``.
        dropout: probability of dropping an attention weight in training.
    """

    def __init__(self, dim: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"{heads} heads do not divide {dim} channels")
        self.heads, self.dropout = heads, dropout
        self.query, self.key, self.value = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        packed_xavier_(self.query, self.key, self.value)
        packed_xavier_(self.out)

    def forward(
        self,
        query: Float[Tensor, "B Q C"],
        key: Float[Tensor, "B S C"],
        value: Float[Tensor, "B S C"],
        mask: Bool[Tensor, "B S"] | Bool[Tensor, "B Q S"] | None = None,
    ) -> Float[Tensor, "B Q C"]:
        """Attend.

        Args:
            query: queries, positions added.
            key: keys, positions added.
            value: values.
            mask: True on keys that are hidden (padding), from all queries or from each one.
        """
        q, k, v = self._split(self.query(query)), self._split(self.key(key)), self._split(self.value(value))
        allowed = None if mask is None else ~mask.unflatten(0, (-1, 1) if mask.dim() == 3 else (-1, 1, 1))
        mixed = F.scaled_dot_product_attention(
            q, k, v, attn_mask=allowed, dropout_p=self.dropout if self.training else 0.0
        )
        return self.out(mixed.transpose(1, 2).flatten(2))

    def look(
        self,
        queries: Float[Tensor, "B Q C"],
        memory: Memory,
        reference_points: Float[Tensor, "B Q L d"] | None = None,
    ) -> Float[Tensor, "B Q C"]:
        """Attend to all tokens of a memory; reference points, which deformable attention needs, are unused."""
        return self(queries, memory.tokens + memory.positions, memory.tokens, memory.mask)

    def weights(
        self, query: Float[Tensor, "B Q C"], key: Float[Tensor, "B S C"], mask: Bool[Tensor, "B S"] | None = None
    ) -> Float[Tensor, "B M Q S"]:
        """The attention weights A_qkv of equation (2) of each head; each row sums to 1."""
        q, k = self._split(self.query(query)), self._split(self.key(key))
        scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
        if mask is not None:
            scores = scores.masked_fill(mask[:, None, None], float("-inf"))
        return torch.softmax(scores, dim=-1)

    def _split(self, x: Float[Tensor, "B N C"]) -> Float[Tensor, "B M N c"]:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)
