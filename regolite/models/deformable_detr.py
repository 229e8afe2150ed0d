"""Deformable DETR (Zhu et al., 2021): plain, with iterative box refinement, and two-stage; Efficient DETR; DINO.

A pyramid of feature maps, and an encoder and a decoder with deformable attention, which samples a few points of every
level around a reference point (:mod:`regolite.models.deformable_attention`). Every query has a reference point; boxes
are predicted around it.

Efficient DETR (Yao et al., "Efficient DETR: Improving End-to-End Object Detector with Dense Prior", 2021) is a
two-stage one of three encoder layers and a single decoder layer: its queries start from proposals scored by class and
from their tokens (``token_queries``), and one pair of heads predicts proposals and objects (``shared_heads``). No code
was published; the paper lowers the number of proposals during training, which is not done here.

DINO (Zhang et al., "DINO: DETR with Improved DeNoising Anchor Boxes for End-to-End Object Detection", ICLR 2023) trains
a two-stage one by contrastive denoising (:mod:`regolite.denoising`), with ``mixed_queries`` and ``look_forward_twice``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regolite.boxes import inverse_sigmoid
from regolite.denoising import NoisedQueries
from regolite.models.backbone import Backbone, shrink
from regolite.models.config import DetectorConfig, register
from regolite.models.deformable_attention import DeformableAttention
from regolite.models.detector import Detector
from regolite.models.positions import box_positions, sine_positions
from regolite.models.transformer import (
    DecoderLayer,
    Encoder,
    EncoderLayer,
    box_head,
    class_head,
    flatten,
    in_full_precision,
)
from regolite.types import DetectorOutput, FeatureMap, ImageBatch, Memory, Prediction, Target


@dataclass(frozen=True)
class DeformableDetrConfig(DetectorConfig):
    """Configuration of Deformable DETR.

    Attributes:
        backbone: name of the backbone, see :class:`~regolite.models.backbone.Backbone`.
        weights: the backbone's weights.
        dilated: DC5, stage 5 at stride 16.
        frozen_stages: stages of the backbone that are not trained.
        backbone_stages: stages of the backbone that become levels.
        levels: number of levels L; those beyond ``backbone_stages`` halve the last map.
        points: sampling points K per head and level.
        dim: channels C.
        heads: attention heads M.
        encoder_layers: number of encoder layers.
        decoder_layers: number of decoder layers.
        ffn_dim: width of the feed-forward networks.
        dropout: probability of dropping.
        queries: number of object queries.
        refine: iterative box refinement: each layer corrects the box of the previous layer.
        two_stage: take the encoder's highest-scoring proposals as queries instead of learned ones; needs ``refine``.
        mask_padding: exclude padding from the maps and their normalization, so that an image's boxes do not depend on
            the batch. The published models include it.
        token_queries: two-stage only: score proposals by class, and initialize the content of a query with the token
            that proposed it, as RT-DETR does. The published two-stage models score only "object", and compute the
            content from the proposed box.
        shared_heads: two-stage with ``token_queries`` only: the heads of the first decoder layer also predict the
            proposals, as in Efficient DETR.
        mixed_queries: two-stage only: score proposals by class, and take only positions from them; the contents of the
            queries are learned, as in DINO.
        look_forward_twice: with ``refine``: the box loss of a layer also trains the box of the layer before it, from
            which it starts, as in DINO.
        denoising: two-stage only: also train on noised ground truth (:mod:`regolite.denoising`).
    """

    channel_multiple: ClassVar[int] = 32

    backbone: str = "resnet50"
    weights: str | None = "imagenet"
    dilated: bool = False
    frozen_stages: int = 2
    backbone_stages: tuple[int, ...] = (3, 4, 5)
    levels: int = 4
    points: int = 4
    dim: int = 256
    heads: int = 8
    encoder_layers: int = 6
    decoder_layers: int = 6
    ffn_dim: int = 1024
    dropout: float = 0.1
    queries: int = 300
    refine: bool = False
    two_stage: bool = False
    mask_padding: bool = True
    token_queries: bool = False
    shared_heads: bool = False
    mixed_queries: bool = False
    look_forward_twice: bool = False
    denoising: bool = False
    scoring: Literal["sigmoid"] = "sigmoid"

    @property
    def proposals_by_class(self) -> bool:
        """Whether proposals are scored by class, not as "object"."""
        return self.token_queries or self.mixed_queries


@register("deformable_detr", DeformableDetrConfig)
class DeformableDetr(Detector):
    """Deformable DETR.

    Args:
        config: its configuration.
        num_classes: number of classes K.

    Its attributes are those of :class:`~regolite.models.detector.Detector`; it returns the projected pyramid.
    """

    projected = True

    def __init__(self, config: DeformableDetrConfig, num_classes: int) -> None:
        super().__init__()
        c = self.config = config
        if c.two_stage and not c.refine:
            raise ValueError("two_stage needs refine: proposals are boxes, and only refinement starts from boxes")
        for option in ("token_queries", "mixed_queries", "denoising"):
            if getattr(c, option) and not c.two_stage:
                raise ValueError(f"{option} needs two_stage: only there are queries made from boxes")
        if c.token_queries and c.mixed_queries:
            raise ValueError("token_queries and mixed_queries exclude each other: contents are tokens, or learned")
        if c.look_forward_twice and not c.refine:
            raise ValueError("look_forward_twice needs refine: without it no layer starts from another's boxes")
        if c.shared_heads and not c.token_queries:
            raise ValueError("shared_heads needs token_queries: other proposals know one class, object")
        if c.levels < len(c.backbone_stages):
            raise ValueError(f"{c.levels} levels cannot hold {len(c.backbone_stages)} stages of the backbone")
        self.dim, self.heads, self.scoring, self.num_logits = c.dim, c.heads, "sigmoid", num_classes
        self.feature_channels, self.denoises = [c.dim] * c.levels, c.denoising

        self.backbone = Backbone(
            c.backbone, c.backbone_stages, c.weights, c.dilated, c.frozen_stages, mask_padding=c.mask_padding
        )
        self.pyramid = Pyramid(self.backbone.channels, c.levels, c.dim, c.mask_padding)
        self.level_positions = nn.Parameter(torch.randn(c.levels, c.dim))

        def attention() -> DeformableAttention:
            return DeformableAttention(c.dim, c.heads, c.levels, c.points)

        self.encoder = Encoder(
            [EncoderLayer(c.dim, attention(), c.ffn_dim, c.dropout) for _ in range(c.encoder_layers)]
        )
        self.decoder_layers = nn.ModuleList(
            DecoderLayer(c.dim, c.heads, attention(), c.ffn_dim, c.dropout) for _ in range(c.decoder_layers)
        )
        if c.two_stage:
            self.proposals = Proposals(c.dim, num_classes, c.queries, c.mask_padding, c.token_queries, c.mixed_queries)
            if c.denoising:
                self.noised_queries = NoisedQueries(num_classes, c.dim)
        else:
            self.queries = nn.Embedding(c.queries, c.dim)
            self.query_positions = nn.Embedding(c.queries, c.dim)
            self.reference_points = nn.Linear(c.dim, 2)
            nn.init.xavier_uniform_(self.reference_points.weight)
            nn.init.zeros_(self.reference_points.bias)

        # With refinement each layer has its own heads; without it all layers share one pair.
        heads = c.decoder_layers if c.refine else 1
        class_heads = [class_head(c.dim, num_classes, prior=0.01) for _ in range(heads)]
        box_heads = [box_head(c.dim, 0.0 if c.two_stage or i else -2.0) for i in range(heads)]
        self.class_heads, self.box_heads = nn.ModuleList(class_heads), nn.ModuleList(box_heads)
        if c.shared_heads:
            self.proposals.class_head, self.proposals.box_head = class_heads[0], box_heads[0]

    def forward(self, images: ImageBatch, targets: Sequence[Target] | None = None) -> DetectorOutput:
        """Detect: encode the pyramid, decode the queries, predict classes and boxes.

        Args:
            images: the images.
            targets: the ground truth, for training with denoising.
        """
        maps = self.pyramid(self.backbone(images), images.mask)
        positions = [
            sine_positions(f.mask, self.dim, center=True) + level[:, None, None]
            for f, level in zip(maps, self.level_positions)
        ]
        valid = torch.stack([valid_ratio(f.mask) for f in maps], 1)  # [B, L, 2]
        memory = flatten(maps, positions)
        memory = self.encoder(memory, cell_centers(memory.shapes, valid))

        proposals = None
        if self.config.two_stage:
            proposals, reference, query_positions, queries = self.proposals(memory)
        else:
            query_positions = self.query_positions.weight.expand(images.pixels.shape[0], -1, -1)
            queries = self.queries.weight.expand(images.pixels.shape[0], -1, -1)
            reference = in_full_precision(self.reference_points, query_positions).sigmoid()

        layers, queries = self.decode(queries, query_positions, memory, valid, reference)
        by_class = self.config.proposals_by_class
        output = DetectorOutput(layers, queries, maps, proposals, proposals_by_class=by_class, references=reference)
        if targets is not None and self.denoises:
            content, boxes, mask = self.noised_queries(targets)
            query_positions, from_boxes = self.proposals.embed(boxes)
            content = content if by_class else content + from_boxes
            layers, queries = self.decode(content, query_positions, memory, valid, boxes, mask)
            output.denoising = DetectorOutput(layers, queries, maps, query_mask=mask)
        return output

    def decode(
        self,
        queries: Float[Tensor, "B Q C"],
        query_positions: Float[Tensor, "B Q C"],
        memory: Memory,
        valid: Float[Tensor, "B L 2"],
        reference: Float[Tensor, "B Q d"],
        query_mask: Bool[Tensor, "B Q"] | None = None,
    ) -> tuple[list[Prediction], Float[Tensor, "B Q C"]]:
        """Run all decoder layers, for queries of any origin.

        Args:
            queries: contents of the queries.
            query_positions: their position encodings.
            memory: the encoded tokens.
            valid: share of each level's width and height that is not padding.
            reference: where the queries start, in [0, 1]: points ``xy``, or boxes ``cxcywh``.
            query_mask: True on queries that are padding.

        Returns:
            The predictions of each layer, and the hidden states of the last.
        """
        layers: list[Prediction] = []
        start = reference  # the reference with its gradient, if its layer is to learn from the next one's loss
        for number, layer in enumerate(self.decoder_layers):
            scale = valid.repeat(1, 1, reference.shape[-1] // 2)  # xy, or xy and wh
            queries = layer(queries, query_positions, memory, reference[:, :, None] * scale[:, None], query_mask)
            head = min(number, len(self.box_heads) - 1)
            offsets = in_full_precision(self.box_heads[head], queries)
            layers.append(Prediction(in_full_precision(self.class_heads[head], queries), moved(start, offsets)))
            if self.config.refine:
                start = moved(reference, offsets) if self.config.look_forward_twice else layers[-1].boxes.detach()
                reference = start.detach()
        return layers, queries


def moved(reference: Float[Tensor, "B Q d"], offsets: Float[Tensor, "B Q 4"]) -> Float[Tensor, "B Q 4"]:
    """Boxes around reference points or boxes; the offsets are added before the sigmoid."""
    start = inverse_sigmoid(reference)
    return (offsets + F.pad(start, (0, 4 - start.shape[-1]))).sigmoid()


class Pyramid(nn.Module):
    """The backbone's maps projected to C channels, and coarser levels computed from the last one."""

    def __init__(self, channels: Sequence[int], levels: int, dim: int, mask_padding: bool) -> None:
        super().__init__()
        projections: list[nn.Conv2d] = [nn.Conv2d(inputs, dim, 1) for inputs in channels]
        inputs = channels[-1]
        for _ in range(levels - len(channels)):
            projections.append(nn.Conv2d(inputs, dim, 3, stride=2, padding=1))
            inputs = dim
        for projection in projections:
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)  # type: ignore[arg-type]  # torch types the bias as optional
        self.projections = nn.ModuleList(projections)
        self.norms = nn.ModuleList(ImageNorm(32, dim, mask_padding) for _ in projections)
        self.mask_padding = mask_padding

    def forward(self, features: list[FeatureMap], mask: Bool[Tensor, "B H W"]) -> list[FeatureMap]:
        """All levels, finest first."""
        levels: list[FeatureMap] = []
        for number, (project, norm) in enumerate(zip(self.projections, self.norms)):
            if number < len(features):
                source = features[number]
                x, small, stride = project(source.tensor), source.mask, source.stride
            else:
                source = features[-1] if number == len(features) else levels[-1]
                x, stride = project(source.tensor), source.stride * 2
                # A cell is padding where the cell at its center is, so that an image has the same cells in every
                # batch. The published models resize the whole mask, whose sides need not be multiples of 64.
                small = source.mask[:, ::2, ::2] if self.mask_padding else shrink(mask, tuple(x.shape[-2:]))
            levels.append(FeatureMap(norm(x, small), small, stride))
        return levels


class ImageNorm(nn.GroupNorm):
    """GroupNorm that excludes padding from mean and variance and sets it to zero in the output.

    PyTorch's GroupNorm includes padding, so that the features of an image depend on the batch.
    """

    def __init__(self, groups: int, channels: int, mask_padding: bool) -> None:
        super().__init__(groups, channels)
        self.mask_padding = mask_padding

    def forward(
        self, input: Float[Tensor, "B C h w"], mask: Bool[Tensor, "B h w"] | None = None
    ) -> Float[Tensor, "B C h w"]:
        """Normalize each image by its own cells."""
        if mask is None or not self.mask_padding:
            return super().forward(input)
        inside = (~mask)[:, None, None].to(input.dtype)  # [B, 1, 1, h, w]
        grouped = input.unflatten(1, (self.num_groups, -1))
        count = inside.sum((-3, -2, -1), keepdim=True) * grouped.shape[2]
        mean = (grouped * inside).sum((2, 3, 4), keepdim=True) / count
        variance = ((grouped - mean) ** 2 * inside).sum((2, 3, 4), keepdim=True) / count
        normal = ((grouped - mean) * (variance + self.eps).rsqrt()).flatten(1, 2)
        return (normal * self.weight[:, None, None] + self.bias[:, None, None]) * inside[:, 0]


def valid_ratio(mask: Bool[Tensor, "B h w"]) -> Float[Tensor, "B 2"]:
    """Fraction of the padded map, in x and in y, that is the image."""
    inside = (~mask).float()
    return torch.stack([inside[:, 0].mean(1), inside[:, :, 0].mean(1)], 1)


def cell_centers(shapes: list[tuple[int, int]], valid: Float[Tensor, "B L 2"]) -> Float[Tensor, "B S L 2"]:
    """The encoder's reference points: the center of every cell, on each level, in [0, 1] of the padded map."""
    centers = []
    for level, (height, width) in enumerate(shapes):
        rows, columns = (torch.arange(n, device=valid.device) + 0.5 for n in (height, width))
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        padded = torch.stack([x / width, y / height], -1).flatten(0, 1)
        centers.append(padded / valid[:, None, level])  # in [0, 1] of the image
    return torch.cat(centers, 1)[:, :, None] * valid[:, None]


class Proposals(nn.Module):
    """The first stage of two-stage Deformable DETR (appendix A.4).

    Every cell proposes a box; the highest-scoring proposals become queries.

    Args:
        dim: channels C.
        num_classes: logits of the class head; without scores by class only the first is used, as "object".
        queries: number of proposals that become queries.
        mask_padding: never choose a proposal on padding. The published models can choose one: its box is all ones.
        token_queries: see :class:`DeformableDetrConfig`.
        mixed_queries: see :class:`DeformableDetrConfig`.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        queries: int,
        mask_padding: bool,
        token_queries: bool = False,
        mixed_queries: bool = False,
    ) -> None:
        super().__init__()
        self.dim, self.count, self.mask_padding, self.token_queries = dim, queries, mask_padding, token_queries
        self.by_class = token_queries or mixed_queries
        self.contents = nn.Embedding(queries, dim) if mixed_queries else None
        self.project, self.project_norm = nn.Linear(dim, dim), nn.LayerNorm(dim)
        self.to_query, self.to_query_norm = nn.Linear(2 * dim, 2 * dim), nn.LayerNorm(2 * dim)
        for layer in (self.project, self.to_query):  # as in the authors' code; biases keep PyTorch's initialization
            nn.init.xavier_uniform_(layer.weight)
        self.class_head = class_head(dim, num_classes, prior=0.01)
        self.box_head = box_head(dim, size=0.0)

    def forward(
        self, memory: Memory
    ) -> tuple[Prediction, Float[Tensor, "B Q 4"], Float[Tensor, "B Q C"], Float[Tensor, "B Q C"]]:
        """All proposals; reference boxes, positions and hidden states of the queries from the highest-scoring ones."""
        anchors, usable = self._anchors(memory)
        tokens = memory.tokens.masked_fill(~usable, 0.0)
        tokens = self.project_norm(self.project(tokens))
        logits = in_full_precision(self.class_head, tokens)
        boxes = in_full_precision(self.box_head, tokens) + inverse_sigmoid(anchors)
        # Anchors near the edge of the range have no finite logit: their boxes are set to ones, as published.
        boxes = boxes.masked_fill(~usable, float("inf")).sigmoid()
        scores = logits.max(-1).values if self.by_class else logits[..., 0]
        if self.mask_padding and memory.mask is not None:
            scores = scores.masked_fill(memory.mask, float("-inf"))
        best = scores.topk(min(self.count, scores.shape[1]), dim=1).indices
        reference = boxes.gather(1, best[..., None].expand(-1, -1, 4)).detach()
        positions, queries = self.embed(reference)
        if self.token_queries:
            queries = tokens.gather(1, best[..., None].expand(-1, -1, self.dim)).detach()
        elif self.contents is not None:
            queries = self.contents.weight[: best.shape[1]].expand(len(best), -1, -1)
        return Prediction(logits, boxes), reference, positions, queries

    def embed(self, boxes: Float[Tensor, "B Q 4"]) -> tuple[Float[Tensor, "B Q C"], Float[Tensor, "B Q C"]]:
        """Positions and hidden states of queries, from their boxes."""
        positions, queries = self.to_query_norm(self.to_query(box_positions(boxes, self.dim // 2))).chunk(2, dim=-1)
        return positions, queries

    @staticmethod
    def _anchors(memory: Memory) -> tuple[Float[Tensor, "B S 4"], Bool[Tensor, "B S 1"]]:
        """A box at each cell and whether it is usable. Sizes are 0.05 on the finest level and double on each next."""
        assert memory.mask is not None  # flatten always sets it
        anchors = []
        masks = memory.mask.split([h * w for h, w in memory.shapes], 1)
        for level, ((height, width), mask) in enumerate(zip(memory.shapes, masks)):
            valid = valid_ratio(mask.unflatten(1, (height, width)))[:, None]
            centers = cell_centers([(height, width)], torch.ones_like(valid))[:, :, 0] / valid
            anchors.append(torch.cat([centers, torch.full_like(centers, 0.05 * 2**level)], -1))
        boxes = torch.cat(anchors, 1)
        usable = ((boxes > 0.01) & (boxes < 0.99)).all(-1) & ~memory.mask
        return boxes, usable[..., None]
