"""Encoder and decoder layers (DETR, appendix A.3), for dense and deformable attention.

The attention to the image is an argument of a layer: with :class:`~regolite.models.attention.MultiHeadAttention` it is
a layer of DETR, with :class:`~regolite.models.deformable_attention.DeformableAttention` one of Deformable DETR. Every
branch is followed by dropout, a residual sum and a LayerNorm ("post-norm"). The layers of UP-DETR and TSP-RCNN have the
LayerNorm before each branch ("pre-norm", Xiong et al., "On Layer Normalization in the Transformer Architecture", 2020).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regolite.models.attention import MultiHeadAttention
from regolite.types import FeatureMap, Memory


@runtime_checkable
class ImageAttention(Protocol):
    """An attention module that encoder and decoder layers can use to attend to the image."""

    def look(
        self,
        queries: Float[Tensor, "B Q C"],
        memory: Memory,
        reference_points: Float[Tensor, "B Q L d"] | None = None,
    ) -> Float[Tensor, "B Q C"]:
        """Attend to the tokens of ``memory``."""
        ...


def flatten(features: Sequence[FeatureMap], positions: Sequence[Float[Tensor, "B C _h _w"]]) -> Memory:
    """Concatenate the levels of a pyramid to one sequence of tokens, finest level first, in row-major order."""
    return Memory(
        tokens=torch.cat([f.tensor.flatten(2) for f in features], 2).transpose(1, 2),
        positions=torch.cat([p.flatten(2) for p in positions], 2).transpose(1, 2),
        mask=torch.cat([f.mask.flatten(1) for f in features], 1),
        shapes=[tuple(f.tensor.shape[-2:]) for f in features],  # type: ignore[misc]  # torch.Size has no typed length
    )


class FeedForward(nn.Sequential):
    """Two linear layers with a ReLU between them, applied to each token separately."""

    def __init__(self, dim: int, hidden_dim: int, dropout: float) -> None:
        super().__init__(nn.Linear(dim, hidden_dim), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden_dim, dim))
        for layer in (self[0], self[3]):
            nn.init.xavier_uniform_(layer.weight)  # type: ignore[arg-type]  # Sequential does not type its layers


class EncoderLayer(nn.Module):
    """Self-attention among the tokens of the image, then the feed-forward network."""

    def __init__(self, dim: int, attention: ImageAttention, ffn_dim: int, dropout: float) -> None:
        super().__init__()
        self.attention, self.attention_norm = attention, nn.LayerNorm(dim)
        self.ffn, self.ffn_norm = FeedForward(dim, ffn_dim, dropout), nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, memory: Memory, reference_points: Float[Tensor, "B S L 2"] | None = None
    ) -> Float[Tensor, "B S C"]:
        """The updated tokens of ``memory``."""
        x = memory.tokens
        seen = self.attention.look(x + memory.positions, memory, reference_points)
        x = self.attention_norm(x + self.dropout(seen))
        return self.ffn_norm(x + self.dropout(self.ffn(x)))


class PreNormEncoderLayer(EncoderLayer):
    """An encoder layer that normalizes the input of each branch, and not the sums."""

    def forward(
        self, memory: Memory, reference_points: Float[Tensor, "B S L 2"] | None = None
    ) -> Float[Tensor, "B S C"]:
        """The updated tokens of ``memory``."""
        normed = replace(memory, tokens=self.attention_norm(memory.tokens))
        seen = self.attention.look(normed.tokens + memory.positions, normed, reference_points)
        x = memory.tokens + self.dropout(seen)
        return x + self.dropout(self.ffn(self.ffn_norm(x)))


class Encoder(nn.Module):
    """Encoder layers one after another."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, memory: Memory, reference_points: Float[Tensor, "B S L 2"] | None = None) -> Memory:
        """H_enc: the memory with updated tokens."""
        for layer in self.layers:
            memory = replace(memory, tokens=layer(memory, reference_points))
        return memory


class NormedEncoder(Encoder):
    """Pre-norm encoder layers one after another, and a LayerNorm of what the last one returns."""

    def __init__(self, layers: Sequence[nn.Module], dim: int) -> None:
        super().__init__(layers)
        self.norm = nn.LayerNorm(dim)

    def forward(self, memory: Memory, reference_points: Float[Tensor, "B S L 2"] | None = None) -> Memory:
        """The memory with updated tokens."""
        memory = super().forward(memory, reference_points)
        return replace(memory, tokens=self.norm(memory.tokens))


class DecoderLayer(nn.Module):
    """Self-attention among the queries, cross-attention to the memory, then the feed-forward network.

    Args:
        dim: channels C.
        heads: heads of the self-attention.
        cross_attention: attention of the queries to the memory.
        ffn_dim: width of the feed-forward network.
        dropout: probability of dropping.
        branch_scale: factor of the two attention branches: 0.5 in the released REGO, 1 in all other models.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        cross_attention: ImageAttention,
        ffn_dim: int,
        dropout: float,
        branch_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.self_attention, self.self_norm = MultiHeadAttention(dim, heads, dropout), nn.LayerNorm(dim)
        self.cross_attention, self.cross_norm = cross_attention, nn.LayerNorm(dim)
        self.ffn, self.ffn_norm = FeedForward(dim, ffn_dim, dropout), nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        self.branch_scale = branch_scale

    def forward(
        self,
        queries: Float[Tensor, "B Q C"],
        positions: Float[Tensor, "B Q C"] | float,
        memory: Memory,
        reference_points: Float[Tensor, "B Q L d"] | None = None,
        query_mask: Bool[Tensor, "B Q"] | Bool[Tensor, "B Q Q"] | None = None,
    ) -> Float[Tensor, "B Q C"]:
        """The updated hidden states of the queries.

        Args:
            queries: hidden states.
            positions: positions of the queries, added where they are queries or keys; 0 for none.
            memory: what the cross-attention attends to.
            reference_points: reference points of deformable cross-attention, on each level.
            query_mask: True on queries that are hidden from the others (padding), or from each one.
        """
        x = queries
        among = self.self_attention(x + positions, x + positions, x, query_mask)
        x = self.self_norm(x + self.branch_scale * self.dropout(among))
        seen = self.cross_attention.look(x + positions, memory, reference_points)
        x = self.cross_norm(x + self.branch_scale * self.dropout(seen))
        return self.ffn_norm(x + self.dropout(self.ffn(x)))


class PreNormDecoderLayer(DecoderLayer):
    """A decoder layer that normalizes the input of each branch, and not the sums."""

    def forward(
        self,
        queries: Float[Tensor, "B Q C"],
        positions: Float[Tensor, "B Q C"] | float,
        memory: Memory,
        reference_points: Float[Tensor, "B Q L d"] | None = None,
        query_mask: Bool[Tensor, "B Q"] | Bool[Tensor, "B Q Q"] | None = None,
    ) -> Float[Tensor, "B Q C"]:
        """The updated hidden states of the queries, as :meth:`DecoderLayer.forward`."""
        x = self.self_norm(queries)
        among = self.self_attention(x + positions, x + positions, x, query_mask)
        queries = queries + self.branch_scale * self.dropout(among)
        seen = self.cross_attention.look(self.cross_norm(queries) + positions, memory, reference_points)
        queries = queries + self.branch_scale * self.dropout(seen)
        return queries + self.dropout(self.ffn(self.ffn_norm(queries)))


class Decoder(nn.Module):
    """Decoder layers one after another. It returns the hidden states of every layer, since every layer has a loss.

    Args:
        layers: the layers.
        norm: LayerNorm between a layer's output and the heads (DETR), or None.
    """

    def __init__(self, layers: Sequence[nn.Module], norm: nn.LayerNorm | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = norm if norm is not None else nn.Identity()

    def forward(
        self,
        queries: Float[Tensor, "B Q C"],
        positions: Float[Tensor, "B Q C"] | float,
        memory: Memory,
        query_mask: Bool[Tensor, "B Q"] | None = None,
    ) -> list[Float[Tensor, "B Q C"]]:
        """Hidden states of each layer; the last is H_dec.

        Args:
            queries: initial hidden states.
            positions: positions of the queries.
            memory: what the queries attend to.
            query_mask: True on queries that are hidden from the others (padding).
        """
        hidden = []
        for layer in self.layers:
            queries = layer(queries, positions, memory, query_mask=query_mask)
            hidden.append(self.norm(queries))
        return hidden


def in_full_precision(head: nn.Module, x: Float[Tensor, "*n C"]) -> Float[Tensor, "*n D"]:
    """The output of a head, computed in the precision of its weights under autocast too.

    Autocast computes linear layers in 16 bits. bfloat16 has 8 bits of precision, which would round all boxes to a grid
    of 2.5 pixels in an image of 640 pixels.
    """
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return head(x)
    with torch.autocast(kind, enabled=False):
        return head(x.to(next(head.parameters()).dtype))


class MLP(nn.Sequential):
    """The box head F_box of equation (3): linear layers with ReLU between them."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, layers: int) -> None:
        dims = [in_dim] + [hidden_dim] * (layers - 1)
        blocks: list[nn.Module] = []
        for i, o in zip(dims, dims[1:]):
            blocks += [nn.Linear(i, o), nn.ReLU()]
        super().__init__(*blocks, nn.Linear(dims[-1], out_dim))


def class_head(dim: int, num_logits: int, prior: float | None = None) -> nn.Linear:
    """The class head F_cls of equation (3).

    Args:
        dim: channels of the hidden states.
        num_logits: number of logits.
        prior: initial probability of every class (Lin et al., Focal Loss, section 4.1), or None.
    """
    head = nn.Linear(dim, num_logits)
    if prior is not None:
        nn.init.constant_(head.bias, -math.log((1 - prior) / prior))
    return head


def box_head(dim: int, size: float | None = None) -> MLP:
    """The box head F_box. Initially it predicts the reference point as center and the logit ``size`` as both sizes.

    With ``size=None`` it keeps PyTorch's initialization (DETR, whose queries have no reference points).
    """
    head = MLP(dim, dim, 4, layers=3)
    if size is not None:
        nn.init.zeros_(head[-1].weight)  # type: ignore[arg-type]  # Sequential does not type its layers
        nn.init.zeros_(head[-1].bias)  # type: ignore[arg-type]
        nn.init.constant_(head[-1].bias[2:], size)  # type: ignore[index]
    return head
