"""The few types that every room speaks.

Conventions, everywhere in the package:

- a **mask** is True on padding;
- **boxes** are ``cxcywh`` (centre, width, height) in [0, 1] of the *unpadded* picture; ``boxes_xyxy`` are corners in
  pixels of the *original* picture, for people;
- **labels** are contiguous class ids 0..K-1; COCO's own ids exist only at the border (``regolite.data``,
  ``regolite.evaluation``).

In the shapes, B is the batch, Q the queries, C the width of the transformer, K the classes, N the objects of a picture.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass
class ImageBatch:
    """Pictures of different sizes, padded at the right and the bottom to one tensor.

    Attributes:
        pixels: normalised pixels, zero on padding.
        mask: True on padding.
        sizes: height and width of each picture before padding.
        original_sizes: height and width of each picture before it was resized, or None where nobody has told. No model
            reads them: they are for people who look inside.
    """

    pixels: Float[Tensor, "B 3 H W"]
    mask: Bool[Tensor, "B H W"]
    sizes: Int[Tensor, "B 2"]
    original_sizes: Int[Tensor, "B 2"] | None = None

    def __len__(self) -> int:
        return len(self.pixels)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> ImageBatch:
        """The same batch on another device."""
        moved = (t.to(device, non_blocking=non_blocking) for t in (self.pixels, self.mask, self.sizes))
        return ImageBatch(*moved, self.original_sizes)

    def pin_memory(self) -> ImageBatch:
        """The same batch in pinned memory, from which a GPU can fetch it by itself; a ``DataLoader`` asks for it."""
        pinned = (t.pin_memory() for t in (self.pixels, self.mask, self.sizes))
        return ImageBatch(*pinned, self.original_sizes)


@dataclass
class FeatureMap:
    """One level of a feature pyramid.

    Attributes:
        tensor: the features.
        mask: True on cells that lie wholly on padding.
        stride: pixels of the input per cell.
    """

    tensor: Float[Tensor, "B C h w"]
    mask: Bool[Tensor, "B h w"]
    stride: int


@dataclass
class Memory:
    """Feature maps laid out as one row of tokens, as transformers read them; S is the number of cells of all levels.

    Attributes:
        tokens: the cells' features.
        positions: their position encoding.
        mask: True on padding, or None where there is none.
        shapes: height and width of each level.
    """

    tokens: Float[Tensor, "B S C"]
    positions: Float[Tensor, "B S C"]
    mask: Bool[Tensor, "B S"] | None
    shapes: list[tuple[int, int]]


@dataclass
class Prediction:
    """What one decoder layer says about every query: class logits and a box.

    ``logits`` has K columns where classes are scored by sigmoids, and K + 1 where they are scored by a softmax whose
    last column is "no object".
    """

    logits: Float[Tensor, "B Q K"]
    boxes: Float[Tensor, "B Q 4"]


@dataclass
class DetectorOutput:
    """Everything a detector computed, in the paper's names.

    Attributes:
        layers: predictions of the base decoder, layer by layer; the last is O(0) of equation (4).
        queries: hidden states of the last base decoder layer, H_dec(0).
        features: the maps X that glimpses are cut from, finest first.
        proposals: the encoder's own predictions (two-stage Deformable DETR), one class each, or None.
        stages: for each REGO stage the predictions of its decoder layers; the last of stage i is O(i). Empty when the
            detector has no REGO or it is switched off.
        proposals_by_class: the proposals' logits tell classes, and not only "object" in the first of them.
        denoising: what became of noised ground truth, in training (:mod:`regolite.denoising`), or None.
        query_mask: True on queries that are padding, or None where there are none, as in all but ``denoising``.
    """

    layers: list[Prediction]
    queries: Float[Tensor, "B Q C"]
    features: list[FeatureMap]
    proposals: Prediction | None = None
    stages: list[list[Prediction]] = field(default_factory=list)
    proposals_by_class: bool = False
    denoising: DetectorOutput | None = None
    query_mask: Bool[Tensor, "B Q"] | None = None

    @property
    def by_stage(self) -> list[Prediction]:
        """O(0), O(1), ..., O(S): the base detector's prediction and each stage's."""
        return [self.layers[-1], *(stage[-1] for stage in self.stages)]

    @property
    def final(self) -> Prediction:
        """The detector's answer: the last stage's prediction, or the base detector's where there are no stages."""
        return self.by_stage[-1]


@dataclass
class Target:
    """The objects of one picture.

    Attributes:
        labels: contiguous class ids.
        boxes: ``cxcywh`` in [0, 1] of the (transformed, unpadded) picture. Crowds are left out.
        image_id: COCO's id of the picture.
        size: height and width of the original file in pixels, the frame of ``boxes_xyxy``.
    """

    labels: Int[Tensor, "N"]
    boxes: Float[Tensor, "N 4"]
    image_id: int
    size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Target:
        """The same target on another device."""
        labels, boxes = (t.to(device, non_blocking=non_blocking) for t in (self.labels, self.boxes))
        return Target(labels, boxes, self.image_id, self.size)

    def pin_memory(self) -> Target:
        """The same target in pinned memory."""
        return Target(self.labels.pin_memory(), self.boxes.pin_memory(), self.image_id, self.size)


@dataclass
class Detections:
    """Detected objects of one picture, best first.

    Attributes:
        scores: confidence in [0, 1].
        labels: contiguous class ids.
        boxes_xyxy: corners in pixels of the original picture.
        queries: which query made each detection; 0, 1, 2, ... where a detector has no queries.
    """

    scores: Float[Tensor, "N"]
    labels: Int[Tensor, "N"]
    boxes_xyxy: Float[Tensor, "N 4"]
    queries: Int[Tensor, "N"]

    def __len__(self) -> int:
        return len(self.scores)

    def above(self, threshold: float) -> Detections:
        """The detections whose score is at least ``threshold``."""
        keep = self.scores >= threshold
        return Detections(self.scores[keep], self.labels[keep], self.boxes_xyxy[keep], self.queries[keep])
