"""The set loss (DETR, section 3.1; Deformable DETR, section 3): what training minimizes.

Every decoder layer of the base detector and of every REGO stage predicts a full set of objects, is matched with the
truth by itself, and pays three terms: for classes, for boxes (L1) and for their overlap (GIoU). All layers are computed
together; the terms keep the names of their layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

from regolite.boxes import to_xyxy
from regolite.denoising import known_matches
from regolite.matching import Matches, MatchingCosts, PaddedTargets, match
from regolite.types import DetectorOutput, Prediction, Target
from regolite.utils.validation import Checked


@dataclass(frozen=True)
class LossConfig(Checked):
    """Weights of the loss, which are those of the matching cost too.

    Attributes:
        label: weight of the classification term.
        l1: weight of the L1 distance of boxes.
        giou: weight of 1 - GIoU.
        no_object: weight of "no object" in the softmax cross-entropy (DETR).
        base_label: factor of the base detector's classification terms, its proposals' too; the released REGO has 0.8.
        stage_auxiliary: pay for the first layers of REGO's stages too, as the paper says; the released code drops
            these terms by an oversight.
        proposals_per_object: how many proposals of a two-stage detector each object is matched with, in training. They
            are only candidates, so more than one may be right (one-to-many matching).
        stage_matching: ``"own"``, the paper's: every layer of a stage is matched with the ground truth independently.
            With ``"base"`` a query keeps, through all stages, the object that it has in the base detector's last layer.
            Then H_dec(0) already tells which of several queries on an object is the one to score high. In short
            trainings on few images, independently matched stages scored several of them.
    """

    label: float = 2.0
    l1: float = 5.0
    giou: float = 2.0
    no_object: float = 0.1
    base_label: float = 1.0
    stage_auxiliary: bool = True
    proposals_per_object: int = 1
    stage_matching: Literal["own", "base"] = "own"


class SetLoss:
    """The loss of a whole output.

    Args:
        config: the weights.
        scoring: ``"softmax"`` with no-object or ``"sigmoid"`` with the focal loss.
    """

    def __init__(self, config: LossConfig, scoring: str) -> None:
        self.config, self.scoring = config, scoring
        # DETR's softmax matching weighs the class by 1 where its loss does, Deformable DETR's focal one by 2.
        self.costs = MatchingCosts(config.label, config.l1, config.giou)

    def __call__(
        self,
        output: DetectorOutput,
        targets: Sequence[Target],
        num_boxes: float | None = None,
        num_images: float | None = None,
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """The loss and its weighted terms.

        Every sum is divided by something of the batch. A batch that is done in parts, one after another or by several
        processes, is divided by what the *whole* of it has: then the losses of its parts sum up to its own.

        Args:
            output: a detector's output.
            targets: the objects of each image.
            num_boxes: the number of objects by which box and focal terms are divided; that of these targets by default.
            num_images: the number of images for the cross-entropy, which is divided by the weight of all queries;
                that of these targets, whatever ``num_boxes``, by default.

        Returns:
            The sum to minimize, and every term of it by name: ``base/label``, ``base.1/l1`` (layer 1 of the base),
            ``stage2/giou``, ``stage2.1/giou``, ``proposals/label``, ...

        Raises:
            NonFinitePrediction: when a prediction is infinite or not a number.
        """
        padded = PaddedTargets.of(targets)
        boxes = num_boxes if num_boxes is not None else float(len(padded))
        named = self._named(output)
        terms = self._terms(named, padded, self.scoring, boxes, num_images)
        if output.proposals is not None:  # published proposals know one class only: object
            k = self.config.proposals_per_object
            many = PaddedTargets.of(
                [replace(t, labels=t.labels.repeat(k), boxes=t.boxes.repeat(k, 1)) for t in targets]
            )
            if not output.proposals_by_class:
                many.labels.zero_()
            terms |= self._terms({"proposals": output.proposals}, many, "sigmoid", boxes * k)
        if (noised := output.denoising) is not None:
            named = {f"denoising.{name}": prediction for name, prediction in self._named(noised).items()}
            terms |= self._terms(named, padded, self.scoring, boxes, num_images, noised.query_mask)
        return torch.stack(list(terms.values())).sum(), terms

    def _named(self, output: DetectorOutput) -> dict[str, Prediction]:
        """Every prediction that is trained, by name; the last layer of each decoder has the decoder's own."""
        decoders = {"base": output.layers}
        for number, stage in enumerate(output.stages, start=1):
            decoders[f"stage{number}"] = stage if self.config.stage_auxiliary else stage[-1:]
        named = {}
        for decoder, layers in decoders.items():
            named |= {f"{decoder}.{i}": p for i, p in enumerate(layers[:-1], start=1)} | {decoder: layers[-1]}
        return named

    def _terms(
        self,
        named: dict[str, Prediction],
        targets: PaddedTargets,
        scoring: str,
        num_boxes: float,
        num_images: float | None = None,
        query_mask: Bool[Tensor, "B Q"] | None = None,
    ) -> dict[str, Float[Tensor, ""]]:
        """The weighted terms of several predictions with the same number of queries.

        With ``query_mask``, True on padding, the queries are noised ground truth, and matched by how they were made.
        """
        predictions = list(named.values())
        if query_mask is None:
            matches = self._match(named, targets, scoring)
        else:
            matches = known_matches(targets, len(predictions))
        precision = torch.promote_types(predictions[0].boxes.dtype, torch.float32)
        logits = torch.stack([p.logits for p in predictions]).to(precision)  # [P, B, Q, K]
        boxes = torch.stack([p.boxes for p in predictions]).to(precision)

        if query_mask is not None:
            logits = logits.masked_fill(query_mask[..., None], -1e4)  # sure to be nothing: no loss, and no gradient
        label = self._label_loss(logits, targets, matches, scoring, num_boxes, num_images)
        matched = boxes[matches.prediction, matches.image, matches.query]
        wanted = targets.boxes[matches.image, matches.target].to(precision)
        l1 = F.l1_loss(matched, wanted, reduction="none").sum(-1)
        giou = generalized_box_iou_loss(to_xyxy(matched), to_xyxy(wanted), reduction="none")
        sums = torch.stack([l1, giou]).new_zeros(2, len(predictions))
        l1, giou = sums.index_add(1, matches.prediction, torch.stack([l1, giou])) / max(num_boxes, 1.0)

        c, terms = self.config, {}
        for i, name in enumerate(named):
            factor = 1.0 if name.startswith("stage") else c.base_label
            terms[f"{name}/label"] = c.label * factor * label[i]
            terms[f"{name}/l1"] = c.l1 * l1[i]
            terms[f"{name}/giou"] = c.giou * giou[i]
        return terms

    def _match(self, named: dict[str, Prediction], targets: PaddedTargets, scoring: str) -> Matches:
        """The matched pairs of all predictions."""
        inherit = [name for name in named if self.config.stage_matching == "base" and name.startswith("stage")]
        own = [name for name in named if name not in inherit]
        matches = match([named[name] for name in own], targets, scoring, self.costs, own)
        return matches.repeat(own.index("base"), len(inherit)) if inherit else matches

    def _label_loss(
        self,
        logits: Float[Tensor, "P B Q K"],
        targets: PaddedTargets,
        matches: Matches,
        scoring: str,
        num_boxes: float,
        num_images: float | None,
    ) -> Float[Tensor, "P"]:
        """Focal loss over all queries and classes, or the cross-entropy in which no-object weighs less."""
        at = (matches.prediction, matches.image, matches.query)
        labels = targets.labels[matches.image, matches.target]
        if scoring == "sigmoid":
            truth = torch.zeros_like(logits)
            truth[(*at, labels)] = 1.0
            return sigmoid_focal_loss(logits, truth, alpha=0.25, gamma=2).sum((1, 2, 3)) / max(num_boxes, 1.0)
        nothing = logits.shape[-1] - 1
        truth = torch.full(logits.shape[:3], nothing, device=logits.device)
        truth[at] = labels
        weight = torch.where(truth == nothing, self.config.no_object, 1.0)
        entropy = F.cross_entropy(logits.flatten(0, 2), truth.flatten(), reduction="none").view_as(truth)
        whole = weight.sum((1, 2))
        if num_images is not None:  # that of all queries of the whole batch, of which every object has one
            whole = num_boxes + self.config.no_object * (num_images * logits.shape[2] - num_boxes)
        return (entropy * weight).sum((1, 2)) / whole
