"""Hungarian matching: a one-to-one assignment of queries to objects (DETR, section 3.1).

The cost of assigning object t to query q is low if the query predicts its class and a similar box. scipy finds the
assignment with the lowest total cost for each image, layer and stage separately. All costs are computed together on the
device and copied to the CPU in one transfer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from regolite.boxes import generalized_box_iou, to_xyxy
from regolite.errors import UserError
from regolite.types import Prediction, Target
from regolite.utils.devices import constant


class NonFinitePrediction(UserError):
    """Logits or boxes are infinite or NaN and cannot be matched; the message says which."""


@dataclass(frozen=True)
class MatchingCosts:
    """Weights of the three parts of the cost, constants of the focal loss, and the box format of the L1 distance."""

    label: float = 2.0
    l1: float = 5.0
    giou: float = 2.0
    focal_alpha: float = 0.25
    focal_gamma: float = 2.0
    l1_boxes: Literal["cxcywh", "xyxy"] = "cxcywh"


@dataclass
class PaddedTargets:
    """The targets of a batch as tensors, padded to the largest number of objects T in an image.

    Attributes:
        labels: class ids, 0 on padding.
        boxes: ``cxcywh`` in [0, 1], the whole image on padding.
        counts: objects in each image.
    """

    labels: Int[Tensor, "B T"]
    boxes: Float[Tensor, "B T 4"]
    counts: list[int]

    @staticmethod
    def of(targets: Sequence[Target], least: int = 0) -> PaddedTargets:
        """Pad a batch of targets to the largest number of objects in an image, but at least to ``least``."""
        counts = [len(target) for target in targets]
        most, device = max(least, *counts), targets[0].boxes.device
        labels = torch.zeros(len(targets), most, dtype=torch.long, device=device)
        boxes = constant([0.5, 0.5, 1.0, 1.0], device).repeat(len(targets), most, 1)
        for b, target in enumerate(targets):
            labels[b, : counts[b]] = target.labels
            boxes[b, : counts[b]] = target.boxes
        return PaddedTargets(labels, boxes, counts)

    def __len__(self) -> int:
        return sum(self.counts)


@dataclass
class Matches:
    """Matched pairs of P predictions (layers and stages), one entry per pair.

    Attributes:
        prediction: index of the prediction, below P.
        image: index of the image in the batch.
        query: index of the query.
        target: index of the object in the image.
    """

    prediction: Int[Tensor, "M"]
    image: Int[Tensor, "M"]
    query: Int[Tensor, "M"]
    target: Int[Tensor, "M"]


def matching_cost(
    prediction: Prediction, targets: PaddedTargets, scoring: str, costs: MatchingCosts
) -> Float[Tensor, "B Q T"]:
    """The cost of assigning object t of an image to query q.

    Args:
        prediction: logits and boxes; several predictions can be concatenated along the queries.
        targets: the objects.
        scoring: ``"softmax"`` or ``"sigmoid"``.
        costs: the weights of the parts.
    """
    logits = prediction.logits.float()
    columns = targets.labels[:, None].expand(-1, logits.shape[1], -1)
    if scoring == "softmax":
        label = -logits.softmax(-1).gather(2, columns)
    else:  # the focal loss of a positive minus that of a negative
        x = logits.gather(2, columns)
        p, alpha, gamma = x.sigmoid(), costs.focal_alpha, costs.focal_gamma
        right = alpha * (1 - p) ** gamma * -torch.nn.functional.logsigmoid(x)
        wrong = (1 - alpha) * p**gamma * -torch.nn.functional.logsigmoid(-x)
        label = right - wrong
    boxes, wanted = prediction.boxes.float(), targets.boxes
    corners, wanted_corners = to_xyxy(boxes), to_xyxy(wanted)
    l1 = torch.cdist(*((boxes, wanted) if costs.l1_boxes == "cxcywh" else (corners, wanted_corners)), p=1)
    giou = torch.vmap(generalized_box_iou)(corners, wanted_corners)
    return costs.label * label + costs.l1 * l1 - costs.giou * giou


@torch.no_grad()
def match(
    predictions: Sequence[Prediction],
    targets: PaddedTargets,
    scoring: str,
    costs: MatchingCosts,
    names: Sequence[str] | None = None,
    sources: Sequence[int] | None = None,
) -> Matches:
    """Match the queries of every prediction with the objects.

    Args:
        predictions: P predictions with the same number of queries.
        targets: the objects.
        scoring: ``"softmax"`` or ``"sigmoid"``.
        costs: the weights of the cost.
        names: names of the predictions in error messages; by default their indices.
        sources: indices of predictions: the result has the pairs of each of them, numbered from 0. An index may occur
            several times, for predictions that share their pairs. By default each prediction once.

    Raises:
        NonFinitePrediction: a cost is infinite or NaN.
    """
    batch, queries = predictions[0].boxes.shape[:2]
    joined = Prediction(torch.cat([p.logits for p in predictions], 1), torch.cat([p.boxes for p in predictions], 1))
    cost = matching_cost(joined, targets, scoring, costs).cpu().numpy()  # the only wait for the device
    if not np.isfinite(cost).all():
        raise NonFinitePrediction(_not_finite(predictions, targets, names or range(len(predictions))))
    cost = cost.reshape(batch, len(predictions), queries, cost.shape[-1])
    assigned = [
        [linear_sum_assignment(cost[b, p, :, :count]) for b, count in enumerate(targets.counts)]
        for p in range(len(predictions))
    ]
    found = [pairs for p in (range(len(predictions)) if sources is None else sources) for pairs in assigned[p]]
    query, target = np.concatenate(found, axis=1)
    pairs = np.array([len(q) for q, _ in found])  # of each image and prediction
    prediction, image = np.divmod(np.repeat(np.arange(len(found)), pairs), batch)
    return Matches(*constant(np.stack([prediction, image, query, target]), targets.boxes.device))


def _not_finite(predictions: Sequence[Prediction], targets: PaddedTargets, names: Sequence[str | int]) -> str:
    """Which values make a cost infinite or NaN, and how to fix it."""
    bad = [
        f"{name}/{part}"
        for name, p in zip(names, predictions)
        for part in ("logits", "boxes")
        if not getattr(p, part).isfinite().all()
    ]
    if not bad and not targets.boxes.isfinite().all():
        return "boxes of the targets are not finite: correct the annotations or the transform"
    what = ", ".join(bad) or "the overlaps of boxes without area"
    return (
        f"predictions cannot be matched, since these are not finite: {what}. Lower the learning rate, clip the "
        "gradient, or train without mixed precision"
    )
