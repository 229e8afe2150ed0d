"""Anchor DETR (Wang et al., AAAI 2022): object queries at anchor points.

A query of DETR is a learned vector that does not show where it attends. Here it has two interpretable parts:

- an **anchor point** (x, y), learned or on a regular grid. Points and cells of the image share one encoding, sine
  embeddings and a small network; the box is predicted around the point;
- a **pattern**, one of a few learned vectors that all points share. Every point is combined with every pattern, since
  several objects may lie around one point: 300 points with 3 patterns are 900 queries.

Row-column decoupled attention attends to the image at low cost on large maps.
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
from regolite.models.attention import MultiHeadAttention, packed_xavier_
from regolite.models.backbone import Backbone
from regolite.models.config import DetectorConfig, register
from regolite.models.deformable_detr import ImageNorm
from regolite.models.detector import Detector
from regolite.models.positions import sine_embedding
from regolite.models.transformer import MLP, FeedForward, box_head, class_head, in_full_precision
from regolite.types import DetectorOutput, FeatureMap, ImageBatch, Prediction


@dataclass(frozen=True)
class AnchorDetrConfig(DetectorConfig):
    """Configuration of Anchor DETR; other fields are those of :class:`~regolite.models.detr.DetrConfig`.

    Attributes:
        queries: number of object queries, patterns times anchor points.
        patterns: number of patterns.
        anchors: ``"learned"`` anchor points, or a fixed square ``"grid"``.
        mask_padding: exclude padding from the maps, their normalization and the means of rows and columns, so that an
            image's boxes do not depend on the batch. The published models include it.
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
    """The cells of an image, with encoded positions of columns and rows.

    The mask is True on padding, which is at the right and at the bottom, so that it covers whole columns and rows.
    """

    cells: Float[Tensor, "B h w C"]
    x: Float[Tensor, "B w C"]
    y: Float[Tensor, "B h C"]
    mask: Bool[Tensor, "B h w"]


class RowColumnAttention(nn.Module):
    """Row-column decoupled attention (RCDA).

    Dense attention compares a query with all h w cells. RCDA compares it with the w columns, each the mean of its
    cells, and with the h rows; the weight of a cell is the product of its column's and its row's weight. So values are
    averaged along one axis and then along the other, and the h w weights of a query are never stored.

    Args:
        dim: channels C.
        heads: number of heads M; divides ``dim``.
        dropout: probability of dropping an attention weight in training.
        mask_padding: exclude padding from the means.
    """

    def __init__(self, dim: int, heads: int, dropout: float = 0.0, mask_padding: bool = True) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"{heads} heads do not divide {dim} channels")
        self.heads, self.dropout, self.mask_padding = heads, dropout, mask_padding
        self.query_x, self.query_y, self.key_x, self.key_y = (nn.Linear(dim, dim) for _ in range(4))
        self.value, self.out = nn.Linear(dim, dim), nn.Linear(dim, dim)
        packed_xavier_(
            self.query_x, self.query_y, self.key_x, self.key_y, self.value
        )  # the authors' one matrix [5C, C]
        nn.init.zeros_(self.out.bias)

    def forward(
        self, query_x: Float[Tensor, "B Q C"], query_y: Float[Tensor, "B Q C"], grid: Grid
    ) -> Float[Tensor, "B Q C"]:
        """Attend to a grid: ``query_x``, encoded x added, to its columns, and ``query_y`` to its rows."""
        weights = self.weights(query_x, query_y, grid)
        first, second = (F.dropout(w, self.dropout, self.training) for w in weights)
        values = self.value(grid.cells).unflatten(-1, (self.heads, -1))  # [B, h, w, M, c]
        if first.shape[-1] < second.shape[-1]:  # the longer side first: the intermediate tensor is smaller
            first, second, values = second, first, values.transpose(1, 2)
        mixed = torch.einsum("bmqi,bjimc->bmqjc", first, values)
        mixed = torch.einsum("bmqj,bmqjc->bqmc", second, mixed)
        return self.out(mixed.flatten(2))

    def weights(
        self, query_x: Float[Tensor, "B Q C"], query_y: Float[Tensor, "B Q C"], grid: Grid
    ) -> tuple[Float[Tensor, "B M Q w"], Float[Tensor, "B M Q h"]]:
        """The weights of columns and of rows, which sum to 1 each."""
        # The published code takes the mean of the keys, which is the key of the mean: one projection instead of many.
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


class GridEncoderLayer(nn.Module):
    """DETR's encoder layer with RCDA for self-attention among the cells."""

    def __init__(self, dim: int, attention: RowColumnAttention, ffn_dim: int, dropout: float) -> None:
        super().__init__()
        self.attention, self.attention_norm = attention, nn.LayerNorm(dim)
        self.ffn, self.ffn_norm = FeedForward(dim, ffn_dim, dropout), nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, grid: Grid) -> Grid:
        """The grid with updated cells."""
        x = grid.cells
        seen = self.attention((x + grid.x[:, None]).flatten(1, 2), (x + grid.y[:, :, None]).flatten(1, 2), grid)
        x = self.attention_norm(x + self.dropout(seen.view_as(x)))
        return replace(grid, cells=self.ffn_norm(x + self.dropout(self.ffn(x))))


class AnchorDecoderLayer(nn.Module):
    """DETR's decoder layer with RCDA for cross-attention."""

    def __init__(self, dim: int, heads: int, cross_attention: RowColumnAttention, ffn_dim: int, dropout: float) -> None:
        super().__init__()
        self.self_attention, self.self_norm = MultiHeadAttention(dim, heads, dropout), nn.LayerNorm(dim)
        self.cross_attention, self.cross_norm = cross_attention, nn.LayerNorm(dim)
        self.ffn, self.ffn_norm = FeedForward(dim, ffn_dim, dropout), nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, queries: Float[Tensor, "B Q C"], points: tuple[Float[Tensor, "Q C"], ...], grid: Grid
    ) -> Float[Tensor, "B Q C"]:
        """The updated hidden states of the queries.

        Args:
            queries: hidden states.
            points: the encoded anchor points: both coordinates, x alone, y alone.
            grid: what the cross-attention attends to.
        """
        xy, x, y = points
        among = self.self_attention(queries + xy, queries + xy, queries)
        queries = self.self_norm(queries + self.dropout(among))
        seen = self.cross_attention(queries + x, queries + y, grid)
        queries = self.cross_norm(queries + self.dropout(seen))
        return self.ffn_norm(queries + self.dropout(self.ffn(queries)))


@register("anchor_detr", AnchorDetrConfig)
class AnchorDetr(Detector):
    """Anchor DETR; its attributes are those of :class:`~regolite.models.detector.Detector`.

    As in the authors' code, feed-forward networks and output projections of attention keep PyTorch's initialization.

    Args:
        config: its configuration.
        num_classes: number of classes K.

    Raises:
        UserError: the patterns do not divide the queries, or the anchor points fill no square grid.
    """

    projected = False
    points: Tensor

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
        nn.init.zeros_(self.input_projection.bias)  # type: ignore[arg-type]  # torch types the bias as optional
        self.input_norm = ImageNorm(32, c.dim, c.mask_padding)

        def attention() -> RowColumnAttention:
            return RowColumnAttention(c.dim, c.heads, c.dropout, c.mask_padding)

        self.encoder_layers = nn.ModuleList(
            GridEncoderLayer(c.dim, attention(), c.ffn_dim, c.dropout) for _ in range(c.encoder_layers)
        )
        self.decoder_layers = nn.ModuleList(
            AnchorDecoderLayer(c.dim, c.heads, attention(), c.ffn_dim, c.dropout) for _ in range(c.decoder_layers)
        )
        for name, layer in (*self.encoder_layers.named_modules(), *self.decoder_layers.named_modules()):
            if isinstance(layer, nn.Linear) and (".ffn." in name or name.endswith("self_attention.out")):
                layer.reset_parameters()
                if name.endswith("out"):
                    nn.init.zeros_(layer.bias)
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
        """Detect: encode the cells, decode points with patterns, predict boxes around the points."""
        maps = self.backbone(images)
        last = maps[-1]
        cells = self.input_norm(self.input_projection(last.tensor), last.mask).permute(0, 2, 3, 1)
        grid = Grid(cells, self._along(last.mask[:, 0]), self._along(last.mask[:, :, 0]), last.mask)
        for layer in self.encoder_layers:
            grid = layer(grid)

        points = self.points.repeat(self.patterns.num_embeddings, 1)  # [Q, 2], all points with the first pattern first
        queries = self.patterns.weight.repeat_interleave(len(self.points), 0).expand(images.pixels.shape[0], -1, -1)
        xy = self.encode_both(sine_embedding(points.flip(-1) * 2 * math.pi, self.dim // 2).flatten(-2))
        x, y = self.encode_one(sine_embedding(points.T * 2 * math.pi, self.dim))
        layers = []
        for layer in self.decoder_layers:
            queries = layer(queries, (xy, x, y), grid)
            boxes = in_full_precision(self.box_head, queries) + F.pad(inverse_sigmoid(points), (0, 2))
            layers.append(Prediction(in_full_precision(self.class_head, queries), boxes.sigmoid()))

        if self.dilated:  # REGO reads the last map of a DC5 model at the normal stride (appendix A.1)
            maps[-1] = FeatureMap(last.tensor[:, :, ::2, ::2], last.mask[:, ::2, ::2], 2 * last.stride)
        return DetectorOutput(layers, queries, maps, references=points.expand(images.pixels.shape[0], -1, -1))

    def _along(self, mask: Bool[Tensor, "B n"]) -> Float[Tensor, "B n C"]:
        """The encoded positions of columns or rows, in [0, 1] of the unpadded image."""
        number = (~mask).to(self.points.dtype).cumsum(1)
        return self.encode_one(sine_embedding((number - 0.5) / number[:, -1:] * 2 * math.pi, self.dim))
