"""Anchor DETR (Wang et al., AAAI 2022): object queries that are points of the image.

A query of DETR is a learned vector, and where it will attend cannot be read off it. Here it is made of two things that
have a meaning:

- an **anchor point** (x, y), learned or of a regular grid. It is encoded like the cells of the image, by sine waves
  and a small network, so that points and cells are compared in one language; the box is predicted around it;
- a **pattern**, one of a few learned vectors that all points share. Every point is asked once with every pattern, since
  several objects may lie around one point: 300 points with 3 patterns are 900 queries.

The image is looked at by row-column decoupled attention, which is cheap on large maps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regolite.boxes import inverse_sigmoid
from regolite.errors import UserError
from regolite.models.backbone import Backbone
from regolite.models.config import DetectorConfig, register
from regolite.models.deformable_detr import ImageNorm
from regolite.models.positions import sine_embedding
from regolite.models.transformer import MLP, DecoderLayer, EncoderLayer, box_head, class_head, in_float32
from regolite.types import DetectorOutput, FeatureMap, ImageBatch, Prediction


@dataclass(frozen=True)
class AnchorDetrConfig(DetectorConfig):
    """What an Anchor DETR is made of; other fields are those of :class:`~regolite.models.detr.DetrConfig`.

    Attributes:
        queries: number of object queries, patterns times anchor points.
        patterns: number of patterns.
        anchors: whether anchor points are ``"learned"``, or stand on a fixed square ``"grid"``.
        mask_padding: keep padding out of the maps, of their normalization and of the means of rows and columns, so that
            an image's boxes do not depend on the batch. The published models let it in.
    """

    channel_multiple: ClassVar[int] = 32

    backbone: str = "resnet50"
    weights: str | None = "imagenet"
    dilated: bool = False
    frozen_stages: int = 2
    dim: int = 256
    heads: int = 8
    encoder_layers: int = 6
    decoder_layers: int = 6
    ffn_dim: int = 1024
    dropout: float = 0.0
    queries: int = 900
    patterns: int = 3
    anchors: Literal["learned", "grid"] = "learned"
    mask_padding: bool = True
    scoring: Literal["sigmoid"] = "sigmoid"


@dataclass
class Grid:
    """The cells of an image, with the encoded position of every column and of every row.

    The mask is True on padding, a margin on the right and at the bottom, so that it hides whole columns and whole rows.
    """

    cells: Float[Tensor, "B h w C"]
    x: Float[Tensor, "B w C"]
    y: Float[Tensor, "B h C"]
    mask: Bool[Tensor, "B h w"]


class RowColumnAttention(nn.Module):
    """Row-column decoupled attention (RCDA).

    Dense attention compares a query with all h w cells. Here it is compared with the w columns, each the mean of its
    cells, and with the h rows; the weight of a cell is the product of its column's weight and its row's. So values can
    be mixed along one side and then along the other, and the h w weights of every query, which fill the memory where
    maps are large, are never written down.

    Args:
        dim: channels C.
        heads: number of heads M; divides ``dim``.
        dropout: probability with which a weight is dropped while training.
        mask_padding: leave padding out of the means.
    """

    def __init__(self, dim: int, heads: int, dropout: float = 0.0, mask_padding: bool = True) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"{heads} heads do not divide {dim} channels")
        self.heads, self.dropout, self.mask_padding = heads, dropout, mask_padding
        self.query_x, self.query_y, self.key_x, self.key_y = (nn.Linear(dim, dim) for _ in range(4))
        self.value, self.out = nn.Linear(dim, dim), nn.Linear(dim, dim)
        for layer in self.children():
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self, query_x: Float[Tensor, "B Q C"], query_y: Float[Tensor, "B Q C"], grid: Grid
    ) -> Float[Tensor, "B Q C"]:
        """Look at a grid: ``query_x`` asks for columns, its encoded x added, and ``query_y`` for rows."""
        weights = self.weights(query_x, query_y, grid)
        first, second = (F.dropout(w, self.dropout, self.training) for w in weights)
        values = self.value(grid.cells).unflatten(-1, (self.heads, -1))  # [B, h, w, M, c]
        if first.shape[-1] < second.shape[-1]:  # the longer side first: less lies between the two steps
            first, second, values = second, first, values.transpose(1, 2)
        mixed = torch.einsum("bmqi,bjimc->bmqjc", first, values)  # the sum over i leaves a value for each j
        mixed = torch.einsum("bmqj,bmqjc->bqmc", second, mixed)
        return self.out(mixed.flatten(2))

    def weights(
        self, query_x: Float[Tensor, "B Q C"], query_y: Float[Tensor, "B Q C"], grid: Grid
    ) -> tuple[Float[Tensor, "B M Q w"], Float[Tensor, "B M Q h"]]:
        """The weights of columns and of rows; each sums to 1."""
        # The key of a mean is the mean of the keys, which the published code takes: one projection where it needs many.
        counted = (~grid.mask if self.mask_padding else torch.ones_like(grid.mask))[..., None]
        columns, rows = ((grid.cells * counted).sum(side) / counted.sum(side).clamp(min=1) for side in (1, 2))
        return (
            self._compare(self.query_x(query_x), self.key_x(columns + grid.x), grid.mask[:, 0]),
            self._compare(self.query_y(query_y), self.key_y(rows + grid.y), grid.mask[:, :, 0]),
        )

    def _compare(
        self, query: Float[Tensor, "B Q C"], key: Float[Tensor, "B n C"], mask: Bool[Tensor, "B n"]
    ) -> Float[Tensor, "B M Q n"]:
        q, k = (x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in (query, key))
        scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
        return scores.masked_fill(mask[:, None, None], float("-inf")).softmax(-1)


class GridEncoderLayer(EncoderLayer):
    """The encoder layer with RCDA: every cell asks for columns and rows."""

    def forward(self, grid: Grid) -> Grid:
        """The same grid, whose cells have looked at each other."""
        x = grid.cells
        seen = self.attention((x + grid.x[:, None]).flatten(1, 2), (x + grid.y[:, :, None]).flatten(1, 2), grid)
        x = self.attention_norm(x + self.dropout(seen.view_as(x)))
        return replace(grid, cells=self.ffn_norm(x + self.dropout(self.ffn(x))))


class AnchorDecoderLayer(DecoderLayer):
    """The decoder layer with RCDA."""

    def forward(
        self, queries: Float[Tensor, "B Q C"], points: tuple[Float[Tensor, "Q C"], ...], grid: Grid
    ) -> Float[Tensor, "B Q C"]:
        """The queries, having looked at each other as in DETR, and at the grid by columns and rows.

        Args:
            queries: hidden states.
            points: the encoded anchor points: both coordinates together, x alone, y alone.
            grid: what is looked at.
        """
        xy, x, y = points
        among = self.self_attention(queries + xy, queries + xy, queries)
        queries = self.self_norm(queries + self.dropout(among))
        seen = self.cross_attention(queries + x, queries + y, grid)
        queries = self.cross_norm(queries + self.dropout(seen))
        return self.ffn_norm(queries + self.dropout(self.ffn(queries)))


@register("anchor_detr", AnchorDetrConfig)
class AnchorDetr(nn.Module):
    """Anchor DETR; its attributes are those of :class:`~regolite.models.detr.Detr`.

    Args:
        config: what it is made of.
        num_classes: number of classes K.

    Raises:
        UserError: when the patterns do not divide the queries, or the anchor points fill no square grid.
    """

    projected = False

    def __init__(self, config: AnchorDetrConfig, num_classes: int) -> None:
        super().__init__()
        c = config
        points, rest = divmod(c.queries, max(c.patterns, 1))
        side = math.isqrt(points)
        if rest or not points or c.patterns < 1:
            raise UserError(f"{c.patterns} patterns do not divide {c.queries} queries; choose a multiple of them")
        if c.anchors == "grid" and side**2 != points:
            square = f"queries={c.patterns * side**2} for {side} x {side} points"
            raise UserError(f"{points} anchor points fill no square grid; choose {square}")
        self.dim, self.heads, self.scoring, self.num_logits = c.dim, c.heads, "sigmoid", num_classes
        self.dilated = c.dilated
        self.backbone = Backbone(
            c.backbone, (2, 3, 4, 5), c.weights, c.dilated, c.frozen_stages, mask_padding=c.mask_padding
        )
        self.feature_channels = self.backbone.channels
        self.input_projection = nn.Conv2d(self.backbone.channels[-1], c.dim, 1)
        nn.init.xavier_uniform_(self.input_projection.weight)
        nn.init.zeros_(self.input_projection.bias)
        self.input_norm = ImageNorm(32, c.dim, c.mask_padding)

        def attention() -> RowColumnAttention:
            return RowColumnAttention(c.dim, c.heads, c.dropout, c.mask_padding)

        self.encoder_layers = nn.ModuleList(
            GridEncoderLayer(c.dim, attention(), c.ffn_dim, c.dropout) for _ in range(c.encoder_layers)
        )
        self.decoder_layers = nn.ModuleList(
            AnchorDecoderLayer(c.dim, c.heads, attention(), c.ffn_dim, c.dropout) for _ in range(c.decoder_layers)
        )
        self.patterns = nn.Embedding(c.patterns, c.dim)
        if c.anchors == "learned":
            self.points = nn.Parameter(torch.rand(points, 2))
        else:
            steps = (torch.arange(side) + 0.5) / side
            self.register_buffer("points", torch.cartesian_prod(steps, steps), persistent=False)
        self.encode_one, self.encode_both = (MLP(c.dim, c.dim, c.dim, layers=2) for _ in range(2))
        self.class_head = class_head(c.dim, num_classes, prior=0.01)
        self.box_head = box_head(c.dim, size=-2.0)

    def forward(self, images: ImageBatch) -> DetectorOutput:
        """Detect: cells look at cells, points with patterns look at cells, boxes are predicted around the points."""
        maps = self.backbone(images)
        last = maps[-1]
        cells = self.input_norm(self.input_projection(last.tensor), last.mask).permute(0, 2, 3, 1)
        grid = Grid(cells, self._along(last.mask[:, 0]), self._along(last.mask[:, :, 0]), last.mask)
        for layer in self.encoder_layers:
            grid = layer(grid)

        points = self.points.repeat(self.patterns.num_embeddings, 1)  # [Q, 2], all points with the first pattern first
        queries = self.patterns.weight.repeat_interleave(len(self.points), 0).expand(len(images), -1, -1)
        xy = self.encode_both(sine_embedding(points.flip(-1) * 2 * math.pi, self.dim // 2).flatten(-2))
        x, y = self.encode_one(sine_embedding(points.T * 2 * math.pi, self.dim))
        layers = []
        for layer in self.decoder_layers:
            queries = layer(queries, (xy, x, y), grid)
            boxes = in_float32(self.box_head, queries) + F.pad(inverse_sigmoid(points), (0, 2))
            layers.append(Prediction(in_float32(self.class_head, queries), boxes.sigmoid()))

        if self.dilated:  # the glimpses of a DC5 model read its last map at the normal stride (REGO, appendix A.1)
            maps[-1] = FeatureMap(last.tensor[:, :, ::2, ::2], last.mask[:, ::2, ::2], 2 * last.stride)
        return DetectorOutput(layers, queries, maps)

    def _along(self, mask: Bool[Tensor, "B n"]) -> Float[Tensor, "B n C"]:
        """The encoded positions of columns or rows, in [0, 1] of the unpadded image."""
        number = (~mask).float().cumsum(1)
        return self.encode_one(sine_embedding((number - 0.5) / number[:, -1:] * 2 * math.pi, self.dim))
