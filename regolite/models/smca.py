"""SMCA (Gao et al., "Fast Convergence of DETR with Spatially Modulated Co-Attention", ICCV 2021).

DETR's queries have to learn where in an image to look, and need hundreds of epochs for it. A query of SMCA says so
beforehand: it predicts the center of its object and, for every attention head, an offset from it and two scales. They
draw a Gaussian-like map G over the cells of the image, whose logarithm is added to the scores of the decoder's
cross-attention ("co-attention") before the softmax: each head looks around its point. Boxes are predicted around the
center. All else is DETR with 300 queries and the focal loss.

The SMCA of Table 1 has three levels, of strides 16, 32 and 64. In its encoder cells look at their own level, and in one
layer at all levels; in its decoder every query attends to each level by itself and weighs the levels ("scale
selection"). With one level, ``backbone_stages=(5,), coarser=False``, the same modules are the single-scale SMCA.

The single-scale SMCA and the multi-scale decoder give the same numbers as the authors' code. The multi-scale encoder
that they published is a later one, of convolutions: Table 1's follows the paper here, checked by its parameters alone.
Where paper and code differ (G with s² in place of 1/s², a center head of three linear layers and not two, keys and
values projected alike on all levels), this is the code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regolite.errors import UserError
from regolite.models.attention import MultiHeadAttention
from regolite.models.backbone import Backbone, shrink
from regolite.models.config import DetectorConfig, register
from regolite.models.positions import sine_positions
from regolite.models.transformer import (
    MLP,
    Decoder,
    DecoderLayer,
    Encoder,
    EncoderLayer,
    box_head,
    class_head,
    flatten,
    in_float32,
)
from regolite.types import DetectorOutput, FeatureMap, ImageBatch, Memory, Prediction


@dataclass(frozen=True)
class SmcaConfig(DetectorConfig):
    """What an SMCA is made of.

    Attributes:
        backbone_stages: stages of the backbone that become levels, finest first.
        coarser: one more level, at half the size of the last of these.
        multi_scale_layers: those encoder layers, counted from 1, in which cells look at all levels and not at their own
            alone.
        beta: how wide the maps G are.

    The other fields are those of :class:`~regolite.models.detr.DetrConfig`.
    """

    backbone: str = "resnet50"
    weights: str | None = "imagenet"
    frozen_stages: int = 2
    backbone_stages: tuple[int, ...] = (4, 5)
    coarser: bool = True
    dim: int = 256
    heads: int = 8
    encoder_layers: int = 5
    multi_scale_layers: tuple[int, ...] = (3,)
    decoder_layers: int = 6
    ffn_dim: int = 1024
    dropout: float = 0.1
    queries: int = 300
    beta: float = 8.0
    mask_padding: bool = True
    scoring: Literal["sigmoid"] = "sigmoid"

    def __post_init__(self) -> None:
        """Check that the fields fit each other."""
        super().__post_init__()
        stages = self.backbone_stages
        if not stages or not set(stages) <= {2, 3, 4, 5} or list(stages) != sorted(set(stages)):
            raise UserError(f"backbone_stages={stages} must be some of 2 to 5, in this order")
        if not set(self.multi_scale_layers) <= set(range(1, self.encoder_layers + 1)):
            raise UserError(f"multi_scale_layers={self.multi_scale_layers} must be some of 1 to {self.encoder_layers}")
        if self.beta <= 0:
            raise UserError(f"beta={self.beta} must be greater than 0")


@register("smca", SmcaConfig)
class Smca(nn.Module):
    """SMCA.

    Args:
        config: what it is made of.
        num_classes: number of classes K.

    Its attributes are those of :class:`~regolite.models.detr.Detr`; it hands the backbone's own maps to REGO,
    as DETR does.
    """

    projected = False

    def __init__(self, config: SmcaConfig, num_classes: int) -> None:
        super().__init__()
        c = self.config = config
        self.dim, self.heads, self.scoring, self.num_logits = c.dim, c.heads, "sigmoid", num_classes
        self.backbone = Backbone(c.backbone, (2, 3, 4, 5), c.weights, False, c.frozen_stages, c.mask_padding)
        self.feature_channels = self.backbone.channels

        inputs = [self.feature_channels[stage - 2] for stage in c.backbone_stages]
        self.projections = nn.ModuleList(nn.Conv2d(channels, c.dim, 1) for channels in inputs)
        self.strides = [2**stage for stage in c.backbone_stages]
        if c.coarser:
            self.projections.append(nn.Conv2d(inputs[-1], c.dim, 3, stride=2, padding=1))
            self.strides.append(2 * self.strides[-1])
        levels = len(self.strides)
        self.level_positions = nn.Parameter(torch.randn(levels, c.dim)) if levels > 1 else None

        self.encoder = MultiScaleEncoder(
            [
                EncoderLayer(c.dim, MultiHeadAttention(c.dim, c.heads, c.dropout), c.ffn_dim, c.dropout)
                for _ in range(c.encoder_layers)
            ],
            c.multi_scale_layers,
        )
        self.decoder = Decoder(
            [SmcaDecoderLayer(c, self.strides) for _ in range(c.decoder_layers)], nn.LayerNorm(c.dim)
        )
        self.query_positions = nn.Embedding(c.queries, c.dim)
        self.center_head = MLP(c.dim, c.dim, 2, layers=3)
        for number in (0, 2, 4):
            nn.init.xavier_uniform_(self.center_head[number].weight)
        self.class_head = class_head(c.dim, num_classes, prior=0.01)
        self.box_head = box_head(c.dim)

    def forward(self, images: ImageBatch) -> DetectorOutput:
        """Detect: predict centers, look around them, predict boxes around them."""
        maps = self.backbone(images)
        memory = self.encoder(self._memory(maps))

        positions = self.query_positions.weight.expand(len(images), -1, -1)
        # Centers are read off what enters the first decoder layer: positions alone, since hidden states start at zero.
        centers = in_float32(self.center_head, self.decoder.layers[0].prior_norm(positions))
        pixels = centers.sigmoid() * images.sizes.flip(1)[:, None]  # x and y in the unpadded image
        cells = pixels[:, :, None] / pixels.new_tensor(self.strides)[:, None]  # [B, Q, L, 2]
        queries, hidden = positions.new_zeros(positions.shape), []
        for layer in self.decoder.layers:
            queries = layer(queries, positions, memory, cells)
            hidden.append(self.decoder.norm(queries))

        boxes = [(in_float32(self.box_head, h) + F.pad(centers, (0, 2))).sigmoid() for h in hidden]
        layers = [Prediction(in_float32(self.class_head, h), b) for h, b in zip(hidden, boxes)]
        return DetectorOutput(layers, hidden[-1], maps)

    def _memory(self, maps: list[FeatureMap]) -> Memory:
        """The levels that the transformer reads, as one row of tokens."""
        sources = [maps[stage - 2] for stage in self.config.backbone_stages]
        levels = [FeatureMap(project(f.tensor), f.mask, f.stride) for project, f in zip(self.projections, sources)]
        if self.config.coarser:
            last, x = sources[-1], self.projections[-1](sources[-1].tensor)
            # A cell is the image's where the cell that it is centered on is; the published code stretches the mask.
            mask = last.mask[:, ::2, ::2] if self.config.mask_padding else shrink(last.mask, tuple(x.shape[-2:]))
            levels.append(FeatureMap(x, mask, 2 * last.stride))
        positions = [sine_positions(f.mask, self.dim) for f in levels]
        if self.level_positions is not None:
            positions = [p + level[:, None, None] for p, level in zip(positions, self.level_positions)]
        return flatten(levels, positions)


class MultiScaleEncoder(Encoder):
    """An encoder most of whose layers work on each level by itself, with the same weights ("intra-scale")."""

    def __init__(self, layers: Sequence[EncoderLayer], multi_scale_layers: Sequence[int]) -> None:
        super().__init__(layers)
        self.multi_scale_layers = multi_scale_layers

    def forward(self, memory: Memory) -> Memory:
        """H_enc: the same memory with tokens that know of each other."""
        for number, layer in enumerate(self.layers, start=1):
            parts = [memory] if number in self.multi_scale_layers else by_level(memory)
            memory = replace(memory, tokens=torch.cat([layer(part) for part in parts], 1))
        return memory


def by_level(memory: Memory) -> list[Memory]:
    """Each level of a memory as a memory of its own."""
    rows = (memory.tokens, memory.positions, memory.mask)
    parts = zip(*(row.split([h * w for h, w in memory.shapes], 1) for row in rows))
    return [Memory(*part, [shape]) for part, shape in zip(parts, memory.shapes)]


class CoAttention(MultiHeadAttention):
    """Multi-head attention whose scores get something added before the softmax: here, log G of every head."""

    def forward(
        self,
        query: Float[Tensor, "B Q C"],
        key: Float[Tensor, "B S C"],
        value: Float[Tensor, "B S C"],
        mask: Bool[Tensor, "B S"],
        log_g: Float[Tensor, "B M Q S"],
    ) -> Float[Tensor, "B Q C"]:
        """As in :class:`~regolite.models.attention.MultiHeadAttention`."""
        q, k, v = self._split(self.query(query)), self._split(self.key(key)), self._split(self.value(value))
        scores, dropout = log_g.masked_fill(mask[:, None, None], float("-inf")), self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=scores, dropout_p=dropout)
        return self.out(mixed.transpose(1, 2).flatten(2))


class SmcaDecoderLayer(DecoderLayer):
    """DETR's decoder layer with spatially modulated co-attention; every head and level has a map G of its own."""

    def __init__(self, config: SmcaConfig, strides: Sequence[int]) -> None:
        c, levels = config, len(strides)
        super().__init__(c.dim, c.heads, CoAttention(c.dim, c.heads, c.dropout), c.ffn_dim, c.dropout)
        self.per_head = (levels, c.heads, 2)
        # As in the authors' code: in pixels G widens with the root of the stride, and beta is that of stride 32.
        self.sharpness = [stride / 32 / c.beta for stride in strides]
        self.prior_norm = nn.LayerNorm(c.dim)
        self.offsets, self.scales = (nn.Linear(c.dim, levels * c.heads * 2) for _ in range(2))
        self.selection = nn.Linear(c.dim, levels) if levels > 1 else None
        for layer in filter(None, (self.offsets, self.selection)):
            nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(self.scales.weight)  # all scales are 1 at the start
        nn.init.ones_(self.scales.bias)

    def forward(
        self,
        queries: Float[Tensor, "B Q C"],
        positions: Float[Tensor, "B Q C"],
        memory: Memory,
        centers: Float[Tensor, "B Q L 2"],
    ) -> Float[Tensor, "B Q C"]:
        """As in DETR; ``centers`` are x and y of the queries' centers, counted in cells of each level."""
        asking = queries + positions
        known = self.prior_norm(asking)
        points = centers[:, :, :, None] + self.offsets(known).unflatten(-1, self.per_head)  # [B, Q, L, M, 2]
        scales = self.scales(known).unflatten(-1, self.per_head).square()
        x = self.self_norm(queries + self.dropout(self.self_attention(asking, asking, queries)))
        seen = []
        for number, (level, sharpness) in enumerate(zip(by_level(memory), self.sharpness)):
            log_g = log_gaussian(points[:, :, number], sharpness * scales[:, :, number], level.shapes[0])
            keys = level.tokens + level.positions
            seen.append(self.cross_attention(x + positions, keys, level.tokens, level.mask, log_g))
        if self.selection is not None:
            seen = [s * alpha for s, alpha in zip(seen, self.selection(known).softmax(-1).split(1, -1))]
        x = self.cross_norm(x + self.dropout(sum(seen)))
        return self.ffn_norm(x + self.dropout(self.ffn(x)))


def log_gaussian(
    points: Float[Tensor, "B Q M 2"], scales: Float[Tensor, "B Q M 2"], shape: tuple[int, int]
) -> Float[Tensor, "B M Q S"]:
    """The logarithm of G: 0 at the point, less by the scale times the squared distance in cells, in x and in y."""
    (height, width), (x, y), (scale_x, scale_y) = shape, points.unbind(-1), scales.unbind(-1)
    across = scale_x[..., None] * (torch.arange(width, device=x.device) - x[..., None]) ** 2  # [B, Q, M, w]
    down = scale_y[..., None] * (torch.arange(height, device=y.device) - y[..., None]) ** 2
    return -(down[..., :, None] + across[..., None, :]).flatten(-2).transpose(1, 2)
