"""Sparse R-CNN (Sun et al., "Sparse R-CNN: End-to-End Object Detection with Learnable Proposals", CVPR 2021).

A set of learned boxes, each with a learned vector, takes the place of thousands of anchors. Six heads refine them, one
after another. A head cuts a 7 x 7 glimpse of each box from a feature pyramid, lets the vectors ("queries" here) attend
to each other, and lets every query read its own glimpse and no other: by two 1 x 1 convolutions whose filters a linear
layer computes from the query. Then it predicts classes and a corrected box. There is no encoder, and no
cross-attention; the loss is DETR's set loss.

It is REGO's closest relative. REGO's stages also read glimpses of the boxes found so far, but by attention: the
glimpses ask, and the hidden states of all queries answer.

Boxes are ``cxcywh`` relative to the image throughout; the authors' code has pixels, which gives the same, since a box
is corrected in units of its own size. As there, boxes are not clipped to the image.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from regolite.boxes import to_pixels
from regolite.models.attention import MultiHeadAttention
from regolite.models.backbone import Backbone, hide
from regolite.models.config import DetectorConfig, register
from regolite.models.detector import Attention, Detector
from regolite.models.glimpse import BINS, cut_glimpses
from regolite.models.transformer import FeedForward, class_head, in_full_precision
from regolite.types import DetectorOutput, FeatureMap, ImageBatch, Prediction

LARGEST_STEP = math.log(100_000 / 16)
"""The largest logarithm by which a head scales a side of a box, as in the R-CNNs."""


@dataclass(frozen=True)
class SparseRcnnConfig(DetectorConfig):
    """Configuration of Sparse R-CNN.

    Attributes:
        backbone: name of the backbone, see :class:`~regolite.models.backbone.Backbone`.
        weights: the backbone's weights.
        frozen_stages: stages of the backbone that are not trained.
        dim: channels C of the pyramid and the queries.
        heads: attention heads M.
        decoder_layers: number of dynamic heads.
        dynamic_dim: channels between the two dynamic convolutions.
        ffn_dim: width of the feed-forward networks.
        class_layers: linear layers before that of the class logits.
        box_layers: linear layers before that of the box.
        dropout: probability of dropping.
        queries: number of learned boxes.
        mask_padding: hide padding from the backbone and the pyramid, so that an image's boxes do not depend on the
            batch. The published models do not hide it.
    """

    backbone: str = "resnet50"
    weights: str | None = "imagenet"
    frozen_stages: int = 2
    dim: int = 256
    heads: int = 8
    decoder_layers: int = 6
    dynamic_dim: int = 64
    ffn_dim: int = 2048
    class_layers: int = 1
    box_layers: int = 3
    dropout: float = 0.0
    queries: int = 300
    mask_padding: bool = True
    scoring: Literal["sigmoid"] = "sigmoid"


@register("sparse_rcnn", SparseRcnnConfig)
class SparseRcnn(Detector):
    """Sparse R-CNN.

    Args:
        config: its configuration.
        num_classes: number of classes K.

    Its attributes are those of :class:`~regolite.models.detector.Detector`; it returns the feature pyramid. The
    self-attentions of its heads can be recorded, as ``decoder.0.self``, ...; it has no other attention.
    """

    projected = True

    def __init__(self, config: SparseRcnnConfig, num_classes: int) -> None:
        super().__init__()
        c = self.config = config
        self.dim, self.heads, self.scoring, self.num_logits = c.dim, c.heads, "sigmoid", num_classes
        self.backbone = Backbone(
            c.backbone, (2, 3, 4, 5), c.weights, frozen_stages=c.frozen_stages, mask_padding=c.mask_padding
        )
        self.pyramid = FeaturePyramid(self.backbone.channels, c.dim, c.mask_padding)
        self.feature_channels = [c.dim] * len(self.backbone.channels)
        self.queries = nn.Embedding(c.queries, c.dim)
        self.boxes = nn.Embedding(c.queries, 4)
        nn.init.constant_(self.boxes.weight[:, :2], 0.5)  # every box is the whole image
        nn.init.constant_(self.boxes.weight[:, 2:], 1.0)
        self.decoder_layers = nn.ModuleList(DynamicHead(c, num_classes) for _ in range(c.decoder_layers))

    def forward(self, images: ImageBatch) -> DetectorOutput:
        """Detect: each head corrects the boxes of the head before, whose gradient ends there."""
        features = self.pyramid(self.backbone(images))
        readable = features
        if not self.config.mask_padding:
            readable = [FeatureMap(f.tensor, torch.zeros_like(f.mask), f.stride) for f in features]
        queries = self.queries.weight.expand(len(images), -1, -1)
        initial = boxes = self.boxes.weight.expand(len(images), -1, -1)
        layers = []
        for layer in self.decoder_layers:
            queries, logits, boxes = layer(queries, boxes, readable, images.sizes)
            layers.append(Prediction(logits, boxes))
            boxes = boxes.detach()
        return DetectorOutput(layers, queries, features, references=initial)

    def transformer_layers(self) -> list[nn.Module]:
        """The dynamic heads."""
        return list(self.decoder_layers)

    def named_attentions(self) -> Iterator[tuple[str, Attention]]:
        """The self-attention of every head: ``decoder.0.self``, ..."""
        for number, layer in enumerate(self.decoder_layers):
            yield f"decoder.{number}.self", (layer, layer.get_submodule("self_attention"))


class FeaturePyramid(nn.Module):
    """A feature pyramid network (Lin et al., FPN, CVPR 2017).

    Each map of the backbone is projected to C channels, the coarser level is doubled in size and added, and a 3 x 3
    convolution reads the sum. Unlike torchvision's, it can hide padding from that convolution.

    Args:
        channels: channels of the backbone's maps, finest first; each has twice the stride of the one before.
        dim: channels C.
        mask_padding: set padding to zero.
    """

    def __init__(self, channels: Sequence[int], dim: int, mask_padding: bool) -> None:
        super().__init__()
        inwards = [nn.Conv2d(c, dim, 1) for c in channels]
        outwards = [nn.Conv2d(dim, dim, 3, padding=1) for _ in channels]
        for convolution in (*inwards, *outwards):
            nn.init.kaiming_uniform_(convolution.weight, a=1)
            nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]  # torch types the bias as optional
        self.inward, self.outward = nn.ModuleList(inwards), nn.ModuleList(outwards)
        self.mask_padding = mask_padding

    def forward(self, features: list[FeatureMap]) -> list[FeatureMap]:
        """The levels, finest first."""
        levels: list[FeatureMap] = []
        coarser = None
        for feature, inward, outward in reversed(list(zip(features, self.inward, self.outward))):
            x = inward(feature.tensor)
            if coarser is not None:
                height, width = x.shape[-2:]
                x = x + F.interpolate(coarser, scale_factor=2.0)[..., :height, :width]
            coarser = hide(x, feature.mask) if self.mask_padding else x
            y = outward(coarser)
            y = hide(y, feature.mask) if self.mask_padding else y
            levels.insert(0, FeatureMap(y, feature.mask, feature.stride))
        return levels


class DynamicHead(nn.Module):
    """One head: self-attention among the queries, the dynamic convolution, a feed-forward network, predictions.

    Args:
        config: the configuration of the detector.
        num_classes: number of classes K.
    """

    def __init__(self, config: SparseRcnnConfig, num_classes: int) -> None:
        super().__init__()
        c = config
        self.self_attention, self.self_norm = MultiHeadAttention(c.dim, c.heads, c.dropout), nn.LayerNorm(c.dim)
        self.interaction, self.interaction_norm = DynamicConvolution(c.dim, c.dynamic_dim), nn.LayerNorm(c.dim)
        self.ffn, self.ffn_norm = FeedForward(c.dim, c.ffn_dim, c.dropout), nn.LayerNorm(c.dim)
        self.dropout = nn.Dropout(c.dropout)
        self.class_tower, self.box_tower = tower(c.dim, c.class_layers), tower(c.dim, c.box_layers)
        self.class_head, self.box_head = class_head(c.dim, num_classes, prior=0.01), nn.Linear(c.dim, 4)
        for head in (self.class_head, self.box_head):
            nn.init.xavier_uniform_(head.weight)

    def forward(
        self,
        queries: Float[Tensor, "B Q C"],
        boxes: Float[Tensor, "B Q 4"],
        features: list[FeatureMap],
        sizes: Int[Tensor, "B 2"],
    ) -> tuple[Float[Tensor, "B Q C"], Float[Tensor, "B Q K"], Float[Tensor, "B Q 4"]]:
        """Refine.

        Args:
            queries: hidden states.
            boxes: the boxes of the head before, ``cxcywh`` relative to the image.
            features: the levels of the pyramid, finest first.
            sizes: height and width of the images, in pixels of the network's input.

        Returns:
            The new hidden states, the logits of the classes, and the corrected boxes.
        """
        glimpses = cut_glimpses(features, to_pixels(boxes, sizes), aligned=True)
        x = self.self_norm(queries + self.dropout(self.self_attention(queries, queries, queries)))
        read = self.interaction(x.flatten(0, 1), glimpses).unflatten(0, x.shape[:2])
        x = self.interaction_norm(x + self.dropout(read))
        x = self.ffn_norm(x + self.dropout(self.ffn(x)))
        logits = in_full_precision(self.class_head, self.class_tower(x))
        return x, logits, corrected(boxes, in_full_precision(self.box_head, self.box_tower(x)))


class DynamicConvolution(nn.Module):
    """The interaction of each query with its own glimpse: two 1 x 1 convolutions with filters made by the query.

    Args:
        dim: channels C of queries and glimpses.
        hidden_dim: channels D between the two convolutions.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.filters = nn.Linear(dim, 2 * dim * hidden_dim)
        self.inward_norm, self.outward_norm = nn.LayerNorm(hidden_dim), nn.LayerNorm(dim)
        self.project, self.project_norm = nn.Linear(dim * BINS**2, dim), nn.LayerNorm(dim)
        for layer in (self.filters, self.project):
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, queries: Float[Tensor, "N C"], glimpses: Float[Tensor, "N C 7 7"]) -> Float[Tensor, "N C"]:
        """What each query reads in its glimpse."""
        inward, outward = self.filters(queries).chunk(2, dim=1)
        x = glimpses.flatten(2).transpose(1, 2)  # [N, 49, C]
        x = self.inward_norm(torch.bmm(x, inward.unflatten(1, (x.shape[2], -1)))).relu()  # [N, 49, D]
        x = self.outward_norm(torch.bmm(x, outward.unflatten(1, (x.shape[2], -1)))).relu()  # [N, 49, C]
        return self.project_norm(self.project(x.flatten(1))).relu()


def tower(dim: int, layers: int) -> nn.Sequential:
    """Linear layers without bias, each with a LayerNorm and a ReLU."""
    parts: list[nn.Module] = []
    for _ in range(layers):
        linear = nn.Linear(dim, dim, bias=False)
        nn.init.xavier_uniform_(linear.weight)
        parts += [linear, nn.LayerNorm(dim), nn.ReLU()]
    return nn.Sequential(*parts)


def corrected(boxes: Float[Tensor, "*n 4"], steps: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n 4"]:
    """The boxes moved by half of ``steps``' x and y times their sides, their sides scaled by exp of its w and h."""
    center, size = boxes.split(2, -1)
    move, scale = steps.split(2, -1)
    return torch.cat([center + move / 2 * size, size * scale.clamp(max=LARGEST_STEP).exp()], -1)
