"""The heads of Cascade R-CNN (Cai and Vasconcelos, "Cascade R-CNN: Delving into High Quality Object Detection", 2018).

Three box heads, one after another. Each reads the boxes that the one before has corrected, and has a higher threshold
in training: a box is positive if its IoU with an object is at least 0.5, 0.6, 0.7. Corrected boxes give every head
enough positives at its threshold (section 4 of the paper).

A head is torchvision's :class:`~torchvision.models.detection.roi_heads.RoIHeads`, with one box per proposal for all
classes. Thresholds, loss weights, and units of the box steps are those of mmdetection, whose model Table 1 quotes.
Unlike there, RoIAlign is torchvision's, which samples without the shift by half a cell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import MultiScaleRoIAlign, clip_boxes_to_image

THRESHOLDS = (0.5, 0.6, 0.7)
"""The smallest IoU of a positive box with an object, by head."""

LOSS_WEIGHTS = (1.0, 0.5, 0.25)
"""Weights of the heads' losses."""

HIDDEN = 1024
"""Width of the two linear layers of a box head."""


class CascadeHeads(nn.Module):
    """The three heads, in the place of a torchvision network's ``roi_heads``.

    Args:
        dim: channels C of the feature pyramid.
        num_logits: number of logits: the background, at index 0, and the K classes.

    Attributes:
        stages: the heads. Each has a mask head too, which counts as a part of Cascade Mask R-CNN and is not run.
    """

    def __init__(self, dim: int, num_logits: int) -> None:
        super().__init__()
        self.stages = nn.ModuleList(_stage(dim, num_logits, number) for number in range(1, len(THRESHOLDS) + 1))

    def forward(
        self,
        features: Mapping[str, Float[Tensor, "B C _h _w"]],
        proposals: Sequence[Float[Tensor, "_N 4"]],
        image_sizes: Sequence[tuple[int, int]],
        targets: Sequence[Mapping[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Float[Tensor, ""]]]:
        """As :meth:`RoIHeads.forward`: detections in evaluation, losses in training.

        The score of a detection is the mean of the three heads' (section 4.3 of the paper), its box the last head's.

        Args:
            features: the levels of the pyramid by name.
            proposals: boxes of the region proposal network, corners in pixels.
            image_sizes: height and width of each image.
            targets: in training, ``boxes`` and ``labels`` (from 1) of each image.
        """
        boxes, scores = list(proposals), []
        losses: dict[str, Float[Tensor, ""]] = {}
        for number, (stage, weight) in enumerate(zip(self.stages, LOSS_WEIGHTS), start=1):
            assert isinstance(stage, RoIHeads)
            if self.training:
                boxes, _, labels, wanted = stage.select_training_samples(boxes, targets)
            regions = stage.box_roi_pool(features, boxes, image_sizes)
            logits, steps = stage.box_predictor(stage.box_head(regions))
            if self.training:
                label, box = stage_loss(logits, steps, torch.cat(labels), torch.cat(wanted))
                losses |= {f"loss_classifier_{number}": weight * label, f"loss_box_reg_{number}": weight * box}
            else:
                scores.append(logits.softmax(-1))
            if number < len(self.stages):
                moved = stage.box_coder.decode_single(steps.detach(), torch.cat(boxes))
                parts = moved.split([len(each) for each in boxes])
                boxes = [clip_boxes_to_image(part, size) for part, size in zip(parts, image_sizes)]
                if self.training:  # without the objects' own boxes, which every head gets beside its proposals
                    boxes = [b[~_is_object(n, w)] for b, n, w in zip(boxes, labels, wanted)]
        if self.training:
            return [], losses
        mean = torch.stack(scores).mean(0)
        last = self.stages[-1]
        assert isinstance(last, RoIHeads)
        found = last.postprocess_detections(mean.log(), steps.repeat(1, mean.shape[1]), boxes, image_sizes)
        return [{"boxes": b, "scores": s, "labels": n} for b, s, n in zip(*found)], {}


def stage_loss(
    logits: Float[Tensor, "N L"], steps: Float[Tensor, "N 4"], labels: Tensor, wanted: Float[Tensor, "N 4"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """The cross-entropy of a head, and the smooth L1 distance of its box steps on positives; means over all boxes."""
    positive = labels > 0
    box = F.smooth_l1_loss(steps[positive], wanted[positive], reduction="sum") / max(len(labels), 1)
    return F.cross_entropy(logits, labels), box


def _stage(dim: int, num_logits: int, number: int) -> RoIHeads:
    """Head ``number``, which corrects boxes in units that are smaller by this factor."""
    predictor = FastRCNNPredictor(HIDDEN, num_logits)
    predictor.bbox_pred = nn.Linear(HIDDEN, 4)  # one box for all classes
    threshold = THRESHOLDS[number - 1]
    stage = RoIHeads(
        MultiScaleRoIAlign(["0", "1", "2", "3"], output_size=7, sampling_ratio=2),
        TwoMLPHead(dim * 7**2, HIDDEN),
        predictor,
        fg_iou_thresh=threshold,
        bg_iou_thresh=threshold,
        batch_size_per_image=512,
        positive_fraction=0.25,
        bbox_reg_weights=(10.0 * number, 10.0 * number, 5.0 * number, 5.0 * number),
        score_thresh=0.05,
        nms_thresh=0.5,
        detections_per_img=100,
        mask_head=MaskRCNNHeads(dim, (256,) * 4, 1),
        mask_predictor=MaskRCNNPredictor(256, 256, num_logits),
    )
    for part in (stage.mask_head, stage.mask_predictor):
        part.requires_grad_(False)  # targets have no masks
    return stage


def _is_object(labels: Tensor, wanted: Float[Tensor, "N 4"]) -> Tensor:
    """Which of the boxes are an object's own: positives with nothing to correct."""
    return (labels > 0) & (wanted == 0).all(-1)
