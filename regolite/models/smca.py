"""SMCA (Gao et al., "Fast Convergence of DETR with Spatially Modulated Co-Attention", ICCV 2021).

DETR's queries need hundreds of epochs to learn where to attend. A query of SMCA predicts the center of its object and,
for every attention head, an offset from the center and two scales. They define a Gaussian-like map G over the cells of
the image. Its logarithm is added to the scores of the decoder's cross-attention ("co-attention") before the softmax, so
that each head attends around its point. Boxes are predicted around the center. The rest is DETR with 300 queries and
the focal loss.

The SMCA of Table 1 has three levels, of strides 16, 32 and 64. In its encoder cells attend to their own level, and in
one layer to all levels; in its decoder every query attends to each level separately and weights the levels ("scale
selection"). With one level, ``backbone_stages=(5,), coarser=False``, the same modules are the single-scale SMCA.

The single-scale SMCA and the multi-scale decoder give the same numbers as the authors' code. The multi-scale encoder
that they published is a later, convolutional one; this one follows the paper and is verified only by its number of
parameters. Where paper and code differ (s² in G instead of 1/s², three instead of two linear layers in the center head,
shared projections of keys and values on all levels), this module follows the code.
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
from regolite.models.detector import Detector
from regolite.models.positions import sine_positions
from regolite.models.transformer import (
    MLP,
    Decoder,
    EncoderLayer,
    FeedForward,
    box_head,
    class_head,
    flatten,
    in_full_precision,
)
from regolite.types import DetectorOutput, FeatureMap, ImageBatch, Memory, Prediction
from regolite.utils.devices import constant


@dataclass(frozen=True)
class SmcaConfig(DetectorConfig):
    """Configuration of SMCA.

    Attributes:
        backbone_stages: stages of the backbone that become levels, finest first.
        coarser: add a level at half the size of the last stage.
        multi_scale_layers: encoder layers, counted from 1, in which cells attend to all levels and not only their own.
        beta: width of the maps G.

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
class Smca(Detector):
    """SMCA.

    Args:
        config: its configuration.
        num_classes: number of classes K.

    Its attributes are those of :class:`~regolite.models.detector.Detector`; it returns the backbone's own maps.
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
            nn.init.xavier_uniform_(self.center_head[number].weight)  # type: ignore[arg-type]  # of a Sequential
        self.class_head = class_head(c.dim, num_classes, prior=0.01)
        self.box_head = box_head(c.dim)

    def forward(self, images: ImageBatch) -> DetectorOutput:
        """Detect: predict centers, attend around them, predict boxes around them."""
        maps = self.backbone(images)
        memory = self.encoder(self._memory(maps))

        positions = self.query_positions.weight.expand(images.pixels.shape[0], -1, -1)
        # Centers are predicted from the input of the first decoder layer: positions alone, as hidden states are zero.
        first = self.decoder.layers[0]
        assert isinstance(first, SmcaDecoderLayer)
        centers = in_full_precision(self.center_head, first.prior_norm(positions))
        pixels = centers.sigmoid() * images.sizes.flip(1)[:, None]  # x and y in the unpadded image
        cells = pixels[:, :, None] / constant(self.strides, pixels.device, pixels.dtype)[:, None]  # [B, Q, L, 2]
        queries, hidden = positions.new_zeros(positions.shape), []
        for layer in self.decoder.layers:
            queries = layer(queries, positions, memory, cells)
            hidden.append(self.decoder.norm(queries))

        boxes = [(in_full_precision(self.box_head, h) + F.pad(centers, (0, 2))).sigmoid() for h in hidden]
        layers = [Prediction(in_full_precision(self.class_head, h), b) for h, b in zip(hidden, boxes)]
        return DetectorOutput(layers, hidden[-1], maps, references=centers.sigmoid())

    def _memory(self, maps: list[FeatureMap]) -> Memory:
        """The input levels of the transformer as one sequence of tokens."""
        sources = [maps[stage - 2] for stage in self.config.backbone_stages]
        levels = [FeatureMap(project(f.tensor), f.mask, f.stride) for project, f in zip(self.projections, sources)]
        if self.config.coarser:
            last, x = sources[-1], self.projections[-1](sources[-1].tensor)
            # A cell is padding where the cell at its center is; the published code resizes the mask.
            mask = last.mask[:, ::2, ::2] if self.config.mask_padding else shrink(last.mask, tuple(x.shape[-2:]))
            levels.append(FeatureMap(x, mask, 2 * last.stride))
        positions = [sine_positions(f.mask, self.dim) for f in levels]
        if self.level_positions is not None:
            positions = [p + level[:, None, None] for p, level in zip(positions, self.level_positions)]
        return flatten(levels, positions)


class MultiScaleEncoder(nn.Module):
    """An encoder in which most layers process each level separately, with shared weights ("intra-scale")."""

    def __init__(self, layers: Sequence[EncoderLayer], multi_scale_layers: Sequence[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.multi_scale_layers = multi_scale_layers

    def forward(self, memory: Memory) -> Memory:
        """H_enc: the memory with updated tokens."""
        for number, layer in enumerate(self.layers, start=1):
            parts = [memory] if number in self.multi_scale_layers else by_level(memory)
            memory = replace(memory, tokens=torch.cat([layer(part) for part in parts], 1))
        return memory


def by_level(memory: Memory) -> list[Memory]:
    """Each level of a memory as a memory of its own."""
    cells = [h * w for h, w in memory.shapes]
    tokens, positions = memory.tokens.split(cells, 1), memory.positions.split(cells, 1)
    masks = [None] * len(cells) if memory.mask is None else memory.mask.split(cells, 1)
    return [Memory(t, p, m, [shape]) for t, p, m, shape in zip(tokens, positions, masks, memory.shapes)]


class CoAttention(MultiHeadAttention):
    """Multi-head attention that adds log G of each head to the scores before the softmax."""

    def forward(
        self,
        query: Float[Tensor, "B Q C"],
        key: Float[Tensor, "B S C"],
        value: Float[Tensor, "B S C"],
        mask: Bool[Tensor, "B S"] | None = None,
        log_g: Float[Tensor, "B M Q S"] | None = None,
    ) -> Float[Tensor, "B Q C"]:
        """As :meth:`regolite.models.attention.MultiHeadAttention.forward`, with log G."""
        if log_g is None:
            return super().forward(query, key, value, mask)
        q, k, v = self._split(self.query(query)), self._split(self.key(key)), self._split(self.value(value))
        bias = log_g if mask is None else log_g.masked_fill(mask[:, None, None], float("-inf"))
        mixed = F.scaled_dot_product_attention(
            q, k, v, attn_mask=bias, dropout_p=self.dropout if self.training else 0.0
        )
        return self.out(mixed.transpose(1, 2).flatten(2))


class SmcaDecoderLayer(nn.Module):
    """DETR's decoder layer with spatially modulated co-attention; each head and level has its own map G."""

    def __init__(self, config: SmcaConfig, strides: Sequence[int]) -> None:
        super().__init__()
        c, levels = config, len(strides)
        cross_attention = CoAttention(c.dim, c.heads, c.dropout)
        self.self_attention, self.self_norm = MultiHeadAttention(c.dim, c.heads, c.dropout), nn.LayerNorm(c.dim)
        self.cross_attention, self.cross_norm = cross_attention, nn.LayerNorm(c.dim)
        self.ffn, self.ffn_norm = FeedForward(c.dim, c.ffn_dim, c.dropout), nn.LayerNorm(c.dim)
        self.dropout = nn.Dropout(c.dropout)
        self.per_head = (levels, c.heads, 2)
        # As in the authors' code: in pixels, G widens with the square root of the stride; beta is that of stride 32.
        self.sharpness = [stride / 32 / c.beta for stride in strides]
        self.prior_norm = nn.LayerNorm(c.dim)
        self.offsets, self.scales = (nn.Linear(c.dim, levels * c.heads * 2) for _ in range(2))
        self.selection = nn.Linear(c.dim, levels) if levels > 1 else None
        for layer in filter(None, (self.offsets, self.selection)):
            nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(self.scales.weight)  # all scales are initially 1
        nn.init.ones_(self.scales.bias)

    def forward(
        self,
        queries: Float[Tensor, "B Q C"],
        positions: Float[Tensor, "B Q C"],
        memory: Memory,
        centers: Float[Tensor, "B Q L 2"],
    ) -> Float[Tensor, "B Q C"]:
        """As in DETR; ``centers`` are x and y of the queries' centers, in cells of each level."""
        asking = queries + positions
        known = self.prior_norm(asking)
        points = centers[:, :, :, None] + self.offsets(known).unflatten(-1, self.per_head)  # [B, Q, L, M, 2]
        scales = self.scales(known).unflatten(-1, self.per_head).square()
        x = self.self_norm(queries + self.dropout(self.self_attention(asking, asking, queries)))
        seen: list[Tensor] = []
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
    """The logarithm of G: minus the squared distances in cells from the point, in x and y, times their scales."""
    (height, width), (x, y), (scale_x, scale_y) = shape, points.unbind(-1), scales.unbind(-1)
    across = scale_x[..., None] * (torch.arange(width, device=x.device) - x[..., None]) ** 2  # [B, Q, M, w]
    down = scale_y[..., None] * (torch.arange(height, device=y.device) - y[..., None]) ** 2
    return -(down[..., :, None] + across[..., None, :]).flatten(-2).transpose(1, 2)
