"""The set loss (DETR, section 3.1; Deformable DETR, section 3).

Every decoder layer of the base detector and of every REGO stage predicts a set of objects. Each set is matched with the
ground truth separately and has three loss terms: classification, L1 distance of boxes, and GIoU. The terms of all
layers are computed together and named after their layers.

A detector without queries has a loss of its own, which :class:`OwnLoss` adds up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from regolite.boxes import paired_giou, to_xyxy
from regolite.denoising import known_matches
from regolite.errors import UserError
from regolite.matching import Matches, MatchingCosts, PaddedTargets, match
from regolite.types import DetectorOutput, Prediction, Target
from regolite.utils.validation import Checked


@dataclass(frozen=True)
class LossConfig(Checked):
    """Weights of the terms of the loss, and of the costs of its matching.

    Attributes:
        label: weight of the classification term.
        l1: weight of the L1 distance of boxes.
        l1_boxes: format of the boxes in the L1 distance, here and in the matching: ``"cxcywh"``, or ``"xyxy"`` in
            Sparse R-CNN.
        giou: weight of 1 - GIoU.
        label_cost: weight of the class in the matching: 1 in DETR (softmax), 2 in Deformable DETR (focal).
        l1_cost: weight of the L1 distance in the matching.
        giou_cost: weight of GIoU in the matching.
        focal_alpha: weight of the positives in the focal loss and its cost; negatives have 1 - alpha.
        focal_gamma: exponent of the focal loss and its cost.
        no_object: weight of "no object" in the softmax cross-entropy (DETR).
        base_label: factor of the classification terms of the base detector and its proposals; 0.8 in the released REGO.
        stage_auxiliary: include the loss of the first layers of REGO's stages, as in the paper; the released code omits
            these terms by mistake.
        proposals_per_object: number of proposals of a two-stage detector that are matched with each object in training
            (one-to-many matching).
        stage_matching: ``"own"`` (the paper): every layer of a stage is matched with the ground truth independently.
            With ``"base"`` all stages use the matching of the base detector's last layer, so that H_dec(0) determines
            which of several queries on an object scores high. In short training runs on few images, independently
            matched stages gave high scores to several of them.
        base_matches: ``"own"``: the base detector's last layer is matched with the ground truth independently. With
            ``"last_stage"`` it is trained on the pairs of the last stage, as in the released REGO, whose criterion
            overwrites a variable; without stages it has its own pairs. Earlier layers always have their own.
    """

    label: float = 2.0
    l1: float = 5.0
    giou: float = 2.0
    label_cost: float = 2.0
    l1_cost: float = 5.0
    giou_cost: float = 2.0
    focal_alpha: float = 0.25
    focal_gamma: float = 2.0
    no_object: float = 0.1
    base_label: float = 1.0
    stage_auxiliary: bool = True
    proposals_per_object: int = 1
    stage_matching: Literal["own", "base"] = "own"
    base_matches: Literal["own", "last_stage"] = "own"
    l1_boxes: Literal["cxcywh", "xyxy"] = "cxcywh"

    def __post_init__(self) -> None:
        """Check that the fields fit each other."""
        super().__post_init__()
        if (self.stage_matching, self.base_matches) == ("base", "last_stage"):
            raise UserError(
                "stage_matching='base' and base_matches='last_stage' take their pairs from each other: change one of "
                "them to 'own'"
            )


class SetLoss:
    """The loss of a whole output.

    Args:
        config: the weights.
        scoring: ``"softmax"`` with no-object or ``"sigmoid"`` with the focal loss.
    """

    def __init__(self, config: LossConfig, scoring: str) -> None:
        self.config, self.scoring = config, scoring
        c = config
        self.costs = MatchingCosts(c.label_cost, c.l1_cost, c.giou_cost, c.focal_alpha, c.focal_gamma, c.l1_boxes)

    def __call__(
        self,
        output: DetectorOutput,
        targets: Sequence[Target],
        num_boxes: float | None = None,
        num_images: float | None = None,
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """The loss and its weighted terms.

        Every sum is normalized by the batch. If a batch is processed in parts, sequentially or by several processes,
        the normalizers of the *whole* batch must be given; then the losses of the parts add up to that of the batch.

        Args:
            output: a detector's output.
            targets: the objects of each image.
            num_boxes: the number of objects that normalizes box and focal terms; that of these targets by default.
            num_images: the number of images that, with ``num_boxes``, normalizes the cross-entropy; by default it is
                normalized by the weights of these targets.

        Returns:
            The loss, and its terms by name: ``base/label``, ``base.1/l1`` (layer 1 of the base), ``stage2/giou``,
            ``stage2.1/giou``, ``proposals/label``, ...

        Raises:
            NonFinitePrediction: a prediction is infinite or NaN.
        """
        padded = PaddedTargets.of(targets)
        boxes = num_boxes if num_boxes is not None else float(len(padded))
        named = self._named(output)
        terms = self._terms(named, padded, self.scoring, boxes, num_images)
        if output.proposals is not None:  # published proposals have one class: object
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
        """All trained predictions by name; the last layer has the name of its decoder."""
        decoders = {"base": output.layers}
        for number, stage in enumerate(output.stages, start=1):
            decoders[f"stage{number}"] = stage if self.config.stage_auxiliary else stage[-1:]
        named: dict[str, Prediction] = {}
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

        With ``query_mask``, True on padding, the queries are noised ground truth with known matches.
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
            logits = logits.masked_fill(query_mask[..., None], -1e4)  # certainly no object: no loss and no gradient
        label = self._label_loss(logits, targets, matches, scoring, num_boxes, num_images)
        matched = boxes[matches.prediction, matches.image, matches.query]
        wanted = targets.boxes[matches.image, matches.target].to(precision)
        corners, wanted_corners = to_xyxy(matched), to_xyxy(wanted)
        compared = (matched, wanted) if self.config.l1_boxes == "cxcywh" else (corners, wanted_corners)
        l1 = F.l1_loss(*compared, reduction="none").sum(-1)
        giou = 1 - paired_giou(corners, wanted_corners)
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
        names = list(named)
        sources = {name: name for name in names}  # the prediction whose pairs each one has
        if self.config.stage_matching == "base":
            sources |= {name: "base" for name in names if name.startswith("stage")}
        if self.config.base_matches == "last_stage" and names[-1].startswith("stage"):
            sources["base"] = names[-1]
        own = [name for name in names if sources[name] == name]
        matched = [own.index(sources[name]) for name in names]
        return match([named[name] for name in own], targets, scoring, self.costs, own, matched)

    def _label_loss(
        self,
        logits: Float[Tensor, "P B Q K"],
        targets: PaddedTargets,
        matches: Matches,
        scoring: str,
        num_boxes: float,
        num_images: float | None,
    ) -> Float[Tensor, "P"]:
        """Focal loss over all queries and classes, or cross-entropy with a lower weight of no-object."""
        at = (matches.prediction, matches.image, matches.query)
        labels = targets.labels[matches.image, matches.target]
        if scoring == "sigmoid":
            truth = torch.zeros_like(logits)
            classes = (*at, labels)
            truth[classes] = 1.0
            focal = sigmoid_focal_loss(logits, truth, self.config.focal_alpha, self.config.focal_gamma)
            return focal.sum((1, 2, 3)) / max(num_boxes, 1.0)
        nothing = logits.shape[-1] - 1
        truth = torch.full(logits.shape[:3], nothing, device=logits.device)
        truth[at] = labels
        weight = torch.where(truth == nothing, self.config.no_object, 1.0)
        entropy = F.cross_entropy(logits.flatten(0, 2), truth.flatten(), reduction="none").view_as(truth)
        losses = (entropy * weight).sum((1, 2))
        if num_images is None:
            return losses / weight.sum((1, 2))
        # The total weight of the queries of the whole batch, one of which is matched with each object.
        return losses / (num_boxes + self.config.no_object * (num_images * logits.shape[2] - num_boxes))


class OwnLoss:
    """The loss of a detector that computes its own, such as torchvision's (:mod:`regolite.models.baselines`)."""

    def __call__(
        self,
        terms: Mapping[str, Float[Tensor, ""]],
        targets: Sequence[Target],
        num_boxes: float | None = None,
        num_images: float | None = None,
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """The loss and its terms.

        Args:
            terms: the terms by name, each normalized by the images of ``targets``.
            targets: the objects of each image.
            num_boxes: unused; :class:`SetLoss` takes it.
            num_images: the number of images in the whole batch, if these are a part of it; the parts are then weighted
                by their images.

        Returns:
            The loss, and its terms by name: ``base/classification``, ...
        """
        share = 1.0 if num_images is None else len(targets) / num_images
        named = {f"base/{name}": share * term for name, term in terms.items()}
        return torch.stack(list(named.values())).sum(), named
