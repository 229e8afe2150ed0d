"""UP-DETR's pre-training by random query patch detection, which needs images and no annotations.

Dai et al., "UP-DETR: Unsupervised Pre-training for Object Detection with Transformers", CVPR 2021, section 3. Patches
of random places and sizes are cut from an image. The backbone, which is not trained, turns each into a vector, which is
added to a group of queries; the decoder is asked where in the image these patches are. Queries of different groups do
not attend to each other, and a tenth of the queries gets no patch. All queries are matched with the patches, as DETR's
with objects, and a matched query must also predict the patch's vector (feature reconstruction), so that the transformer
keeps what tells classes apart.

The detector inside is then trained on annotated images: ``regolite train --model up_detr_r50 --checkpoint FILE``. Two
things differ from the authors' code: patches are cut from the image as the detector sees it, and not from the file, and
their colors are not changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torchvision.ops import box_convert, roi_align

from regolite.losses import LossConfig, SetLoss
from regolite.matching import PaddedTargets, match
from regolite.models.config import register
from regolite.models.detector import Detector
from regolite.models.detr import Detr, DetrConfig
from regolite.models.transformer import MLP, in_full_precision
from regolite.types import DetectorOutput, FeatureMap, ImageBatch, Prediction, Target

SMALLEST = 8.0
"""Smallest side of a patch, and of what it leaves of the image's, in pixels."""


@dataclass(frozen=True)
class PatchDetrConfig(DetrConfig):
    """Configuration of the pre-training: that of the detector, and of the pretext task.

    Attributes:
        patches: number of patches P of an image; divides ``queries``.
        patch_size: side to which patches are resized, in pixels.
        mask_ratio: probability that a query gets no patch.
    """

    pre_norm: bool = True
    frozen_stages: int = 5
    patches: int = 10
    patch_size: int = 128
    mask_ratio: float = 0.1


@register("up_detr_pretraining", PatchDetrConfig)
class PatchDetr(Detector):
    """A DETR that is pre-trained. In evaluation it is this DETR, whose class head has not been trained.

    Args:
        config: its configuration.
        num_classes: number of classes K of the detector.

    Attributes:
        detector: the DETR.
        patch_query: the linear layer from the vector of a patch to C channels.
        patch_head: the logits "a patch" and "no patch" of a query.
        feature_head: the network that predicts the vector of a patch.
    """

    projected = False
    has_own_loss = True
    has_unused_parameters = True  # the detector's class head

    def __init__(self, config: PatchDetrConfig, num_classes: int) -> None:
        super().__init__()
        self.config = config
        if config.queries % config.patches:
            raise ValueError(f"{config.patches} patches do not divide {config.queries} queries")
        own = {f.name: getattr(config, f.name) for f in fields(DetrConfig)}
        self.detector = Detr(DetrConfig(**own), num_classes)
        self.dim, self.heads, self.scoring = config.dim, config.heads, self.detector.scoring
        self.num_logits, self.feature_channels = self.detector.num_logits, self.detector.feature_channels
        channels = self.detector.backbone.channels[-1]
        self.patch_query, self.patch_head = nn.Linear(channels, config.dim), nn.Linear(config.dim, 2)
        self.feature_head = MLP(config.dim, config.dim, channels, layers=2)
        self.set_loss = SetLoss(LossConfig(label=1.0, label_cost=1.0), "softmax")

    def forward(
        self, images: ImageBatch, targets: Sequence[Target] | None = None
    ) -> DetectorOutput | dict[str, Float[Tensor, ""]]:
        """The detector's output; with targets, of which nothing is read, the loss of the pretext task."""
        if targets is None:
            return self.detector(images)
        return self.loss(images, random_boxes(images, self.config.patches))

    def loss(self, images: ImageBatch, boxes: Float[Tensor, "B P 4"]) -> dict[str, Float[Tensor, ""]]:
        """The terms of the loss.

        Args:
            images: the images.
            boxes: the patches, corners in pixels.

        Returns:
            ``label``, ``l1``, ``giou`` and ``feature`` of the last layer, and of each other, as ``label_1``.
        """
        vectors = self.vectors(images, boxes)
        hidden, maps = self.decode(images, vectors)
        layers = [
            Prediction(in_full_precision(self.patch_head, h), in_full_precision(self.detector.box_head, h).sigmoid())
            for h in hidden
        ]
        scale = images.sizes.flip(1).repeat(1, 2)[:, None]
        wanted = box_convert(boxes, "xyxy", "cxcywh") / scale
        labels = torch.zeros(boxes.shape[1], dtype=torch.long, device=boxes.device)
        targets = [Target(labels, each, 0, (1, 1)) for each in wanted]
        _, terms = self.set_loss(DetectorOutput(layers, hidden[-1], maps), targets)

        matches = match(layers, PaddedTargets.of(targets), "softmax", self.set_loss.costs)
        states = torch.stack(hidden)[matches.prediction, matches.image, matches.query]
        rebuilt = F.normalize(in_full_precision(self.feature_head, states), dim=-1)
        true = F.normalize(vectors.detach().to(rebuilt.dtype), dim=-1)[matches.image, matches.target]
        apart = (rebuilt - true).square().sum(-1)
        sums = apart.new_zeros(len(layers)).index_add(0, matches.prediction, apart) / wanted[..., 0].numel()
        terms |= {f"base.{i}/feature": each for i, each in enumerate(sums[:-1], start=1)} | {"base/feature": sums[-1]}
        return {_short(name): term for name, term in terms.items()}

    def vectors(self, images: ImageBatch, boxes: Float[Tensor, "B P 4"]) -> Float[Tensor, "B P F"]:
        """What the backbone makes of each patch: the means of its last map."""
        size = self.config.patch_size
        patches = roi_align(images.pixels, list(boxes), size, aligned=True)  # [B P, 3, size, size]
        sizes = images.sizes.new_full((len(patches), 2), size)
        batch = ImageBatch(patches, torch.zeros_like(patches[:, 0], dtype=torch.bool), sizes)
        return self.detector.backbone(batch)[-1].tensor.mean((2, 3)).unflatten(0, boxes.shape[:2])

    def decode(
        self, images: ImageBatch, vectors: Float[Tensor, "B P F"]
    ) -> tuple[list[Float[Tensor, "B Q C"]], list[FeatureMap]]:
        """The hidden states of each decoder layer, for queries with patches, and the backbone's maps."""
        maps = self.detector.backbone(images)
        memory = self.detector.encode(maps)
        each = self.config.queries // self.config.patches
        asked = self.patch_query(vectors).repeat_interleave(each, 1)  # [B, Q, C]
        if self.training:
            asked = asked * (torch.rand_like(asked[..., :1]) >= self.config.mask_ratio)
        positions = self.detector.query_positions.weight + asked
        apart = grouped(self.config.queries, each, positions.device).expand(len(images), -1, -1)
        queries, hidden = torch.zeros_like(positions), []
        for layer in self.detector.decoder.layers:
            queries = layer(queries, positions, memory, query_mask=apart)
            hidden.append(self.detector.decoder.norm(queries))
        return hidden, maps


def grouped(queries: int, each: int, device: torch.device) -> Bool[Tensor, "Q Q"]:
    """Which queries are hidden from which: True where two are not in the same group of ``each``."""
    group = torch.arange(queries, device=device) // each
    return group[:, None] != group


def random_boxes(images: ImageBatch, count: int) -> Float[Tensor, "B P 4"]:
    """Boxes of random sizes and places within each image, corners in pixels."""
    sides = images.sizes.flip(1)[:, None].to(images.pixels.dtype)  # [B, 1, 2]: width, height
    least = (sides / 4).clamp(max=SMALLEST)
    size, place = torch.rand(2, len(images), count, 2, device=sides.device)
    size = least + size * (sides - 2 * least)
    corner = place * (sides - size)
    return torch.cat([corner, corner + size], -1)


def _short(name: str) -> str:
    """The name of a term: ``label`` of ``base/label``, ``label_1`` of ``base.1/label``."""
    layer, _, term = name.partition("/")
    return term + layer.removeprefix("base").replace(".", "_")


def detection_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a pre-trained model's weights those of the detector inside, by its names, without its class head."""
    inside = {name.removeprefix("detector."): w for name, w in weights.items() if name.startswith("detector.")}
    return {name: w for name, w in inside.items() if not name.startswith("class_head.")}
