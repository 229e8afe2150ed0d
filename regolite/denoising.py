"""Query denoising (DN-DETR, Li et al., CVPR 2022; contrastive as in DINO, Zhang et al., ICLR 2023): training only.

Early in training the matching is unstable: in each epoch an object is assigned to another query, and the decoder learns
little about refining boxes. Denoising adds queries with known matches: ground-truth boxes and classes with noise, which
the decoder and each stage of REGO learn to remove. Half of them, the negatives, have more noise and must be classified
as no object.

The decoder processes them separately from the detector's own queries, so that neither attend to the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torchvision.ops import box_convert

from regolite.boxes import to_xyxy
from regolite.matching import Matches, PaddedTargets
from regolite.types import Target
from regolite.utils.devices import constant

SMALLEST = 0.001  # of the image: keeps areas positive and inverse sigmoids finite


class NoisedQueries(nn.Module):
    """Queries made from ground truth: one positive and one negative for each object of an image.

    Args:
        num_classes: number of classes K.
        dim: channels C.
        box_noise: the largest shift of a corner of a positive, as a fraction of half the box's size. A corner of a
            negative is shifted by more than that, and at most twice as much.
        label_noise: probability that a class is replaced by a random one.
    """

    def __init__(self, num_classes: int, dim: int, box_noise: float = 0.4, label_noise: float = 0.2) -> None:
        super().__init__()
        self.labels = nn.Embedding(num_classes, dim)
        nn.init.normal_(self.labels.weight, std=0.1)
        self.box_noise, self.label_noise = box_noise, label_noise

    def forward(
        self, targets: Sequence[Target]
    ) -> tuple[Float[Tensor, "B D C"], Float[Tensor, "B D 4"], Bool[Tensor, "B D"]]:
        """Embedded noised classes, noised boxes, and a mask that is True on padding.

        The first D / 2 queries are the positives, in the order of the targets; the negatives follow.
        """
        padded = PaddedTargets.of(targets, least=1)
        most, device = padded.boxes.shape[1], padded.boxes.device
        counts = constant(padded.counts, device)
        mask = (torch.arange(most, device=device) >= counts[:, None]).repeat(1, 2)
        mask[:, 0] &= ~mask.all(1)  # attention needs at least one key, also in an image without objects

        labels = padded.labels.repeat(1, 2)
        is_noised = torch.rand(labels.shape, device=device) < self.label_noise
        labels = torch.where(is_noised, torch.randint_like(labels, self.labels.num_embeddings), labels)

        true_boxes = padded.boxes.to(self.labels.weight.dtype)
        corners = to_xyxy(true_boxes).repeat(1, 2, 1)
        half = true_boxes[..., 2:].repeat(1, 2, 2) / 2
        least = constant([0.0, 1.0], device).repeat_interleave(most)[:, None]  # positives, negatives
        sign = torch.randint_like(corners, 2) * 2 - 1
        corners = corners + sign * (least + torch.rand_like(corners)) * self.box_noise * half
        boxes = box_convert(corners.clamp(0, 1), "xyxy", "cxcywh").clamp(SMALLEST, 1 - SMALLEST)
        return self.labels(labels), boxes, mask


def known_matches(targets: PaddedTargets, predictions: int) -> Matches:
    """The known pairs of noised queries and objects: positive t belongs to object t.

    Args:
        targets: the objects.
        predictions: number of predictions (layers and stages).
    """
    pairs = [(b, t) for b, count in enumerate(targets.counts) for t in range(count)]
    rows = [[p, *pair] for p in range(predictions) for pair in pairs]
    prediction, image, object_ = constant(rows, targets.boxes.device, torch.long).view(-1, 3).T
    return Matches(prediction, image, object_, object_)
