"""TSP-RCNN (Sun et al., "Rethinking Transformer-based Set Prediction for Object Detection", ICCV 2021, section 4.2).

Faster R-CNN with a transformer encoder as its box head. Every proposal is a token: its 7 x 7 region, projected, with
the sine embedding of its box. By six layers of self-attention among the proposals one of those on an object can score
high and the others low. A class and a box are predicted for each. There is no decoder: the paper finds that DETR learns
slowly because of its cross-attention.

Only proposals that overlap an object can be matched with it ("restricted matching"). A proposal belongs to the object
that it overlaps most, if their IoU is at least 0.5. Of the proposals of an object, the one with the lowest cost is
trained on its class, all others on "background"; the boxes of all of them are trained.

Where the paper is silent, the released code decides: nine anchors per cell from stride 8 on, separate towers for
objectness and boxes in the region proposal network, 700 proposals, layers that normalize their inputs ("pre-norm"),
non-maximum suppression at IoU 0.7, and the weights of the losses. Here GroupNorm takes the place of its synchronized
batch normalization, which needs many images per step.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import box_convert, generalized_box_iou_loss, roi_align

from regolite.models.attention import MultiHeadAttention
from regolite.models.positions import sine_embedding
from regolite.models.transformer import MLP, NormedEncoder, PreNormEncoderLayer
from regolite.types import Memory

PROPOSALS = 700
"""Number of proposals of an image."""

SCALES = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))
"""Sides of the anchors of a level, relative to four strides."""

STEP_UNITS = (10.0, 10.0, 5.0, 5.0)
"""The unit of predicted steps of center and size is a tenth, and a fifth, of a box."""


class ProposalTowers(nn.Module):
    """The head of the region proposal network: two convolutions each for objectness and boxes.

    Args:
        dim: channels C.
        anchors: anchors per cell.
    """

    def __init__(self, dim: int, anchors: int) -> None:
        super().__init__()
        self.object_tower, self.box_tower = _tower(dim), _tower(dim)
        self.cls_logits, self.bbox_pred = nn.Conv2d(dim, anchors, 1), nn.Conv2d(dim, 4 * anchors, 1)
        for head in (self.cls_logits, self.bbox_pred):
            nn.init.normal_(head.weight, std=0.01)
            nn.init.zeros_(head.bias)  # type: ignore[arg-type]  # torch types the bias as optional

    def forward(self, levels: list[Float[Tensor, "B C _h _w"]]) -> tuple[list[Tensor], list[Tensor]]:
        """Objectness [B, anchors, h, w] and box steps [B, 4 anchors, h, w] of each level."""
        objects = [self.cls_logits(self.object_tower(level)) for level in levels]
        return objects, [self.bbox_pred(self.box_tower(level)) for level in levels]


class ProposalNetwork(RegionProposalNetwork):
    """torchvision's region proposal network, from stride 8 on, with three sides and three shapes of anchors.

    Args:
        dim: channels C of the pyramid.
    """

    def __init__(self, dim: int) -> None:
        sizes = tuple(tuple(4 * stride * scale for scale in SCALES) for stride in (8, 16, 32, 64, 128))
        anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
        super().__init__(
            anchors,
            ProposalTowers(dim, anchors.num_anchors_per_location()[0]),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n={"training": 2000, "testing": 1000},
            post_nms_top_n={"training": PROPOSALS, "testing": PROPOSALS},
            nms_thresh=0.7,
        )

    def forward(
        self, images: Any, features: dict[str, Tensor], targets: Any = None
    ) -> tuple[list[Float[Tensor, "_N 4"]], dict[str, Float[Tensor, ""]]]:
        """The proposals, and in training the loss, in which boxes have weight 2."""
        boxes, losses = super().forward(images, OrderedDict(list(features.items())[1:]), targets)
        return boxes, {name: 2 * loss if "box" in name else loss for name, loss in losses.items()}


class ProposalEncoder(nn.Module):
    """Features of the proposals' regions that know of the other proposals.

    Args:
        dim: channels C of the regions.
        width: channels D of the tokens; a multiple of 16.
        heads: attention heads.
        layers: number of layers.
        ffn_dim: width of the feed-forward networks.
        dropout: probability of dropping.
    """

    def __init__(self, dim: int, width: int, heads: int, layers: int, ffn_dim: int, dropout: float) -> None:
        super().__init__()
        self.project, self.project_positions = nn.Linear(dim * 7**2, width), nn.Linear(width, width)
        self.project_norm = nn.LayerNorm(width)
        for linear in (self.project, self.project_positions):
            nn.init.xavier_uniform_(linear.weight)
        attentions = [MultiHeadAttention(width, heads, dropout) for _ in range(layers)]
        self.encoder = NormedEncoder([PreNormEncoderLayer(width, a, ffn_dim, dropout) for a in attentions], width)

    def forward(
        self,
        regions: Float[Tensor, "B N C 7 7"],
        boxes: Float[Tensor, "B N 4"],
        mask: Bool[Tensor, "B N"],
    ) -> Float[Tensor, "B N D"]:
        """Encode.

        Args:
            regions: the region of each proposal.
            boxes: the proposals, corners relative to the image.
            mask: True on padding.
        """
        numbers = torch.cat([box_convert(boxes, "xyxy", "cxcywh"), boxes], -1)  # the embedding has both formats
        positions = sine_embedding(numbers * 2 * math.pi, self.project.out_features // 8).flatten(-2)
        tokens = self.project_norm(self.project(regions.flatten(2)) + self.project_positions(positions))
        return self.encoder(Memory(tokens, positions, mask, [])).tokens


class TspHeads(RoIHeads):
    """Classes and boxes of the proposals, in the place of a torchvision network's ``roi_heads``.

    Args:
        dim: channels C of the pyramid.
        num_logits: number of logits: the background, at index 0, and the K classes.
        heads: attention heads.
        layers: number of encoder layers.
        dropout: probability of dropping.

    Attributes:
        box_head: the encoder, of 2 C channels.
        box_predictor: the class head, ``cls_score``, and the box head, ``bbox_pred``, with a box for each class.
    """

    def __init__(self, dim: int, num_logits: int, heads: int = 8, layers: int = 6, dropout: float = 0.1) -> None:
        width = 2 * dim
        predictor = nn.ModuleDict(
            {"cls_score": nn.Linear(width, num_logits), "bbox_pred": MLP(width, width, 4 * (num_logits - 1), 3)}
        )
        nn.init.normal_(predictor["cls_score"].weight, std=0.01)  # type: ignore[arg-type]  # ModuleDict has no types
        nn.init.normal_(predictor["bbox_pred"][-1].weight, std=0.001)  # type: ignore[index]
        super().__init__(
            box_roi_pool=None,
            box_head=ProposalEncoder(dim, width, heads, layers, 4 * width, dropout),
            box_predictor=predictor,
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=PROPOSALS,
            positive_fraction=0.25,
            bbox_reg_weights=STEP_UNITS,
            score_thresh=0.0,
            nms_thresh=0.7,
            detections_per_img=100,
        )

    def forward(
        self,
        features: dict[str, Float[Tensor, "B C _h _w"]],
        proposals: Sequence[Float[Tensor, "_N 4"]],
        image_shapes: Sequence[tuple[int, int]],
        targets: Sequence[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Float[Tensor, ""]]]:
        """As torchvision's heads: detections in evaluation, losses in training.

        Args:
            features: the levels of the pyramid by name; the first four are read.
            proposals: corners in pixels.
            image_shapes: height and width of each image.
            targets: in training, ``boxes`` and ``labels`` (from 1) of each image.
        """
        levels = list(features.values())[:4]
        if self.training:
            assert targets is not None  # as torchvision's network checks
            boxes, matched = self._select(proposals, targets)
            return [], self._losses(*self._predict(levels, boxes, image_shapes), boxes, matched, targets)
        logits, steps = self._predict(levels, proposals, image_shapes)
        found = self.postprocess_detections(logits, F.pad(steps, (4, 0)), list(proposals), image_shapes)
        return [{"boxes": b, "scores": s, "labels": n} for b, s, n in zip(*found)], {}

    def predict(
        self, regions: Float[Tensor, "B N C 7 7"], boxes: Float[Tensor, "B N 4"], mask: Bool[Tensor, "B N"]
    ) -> tuple[Float[Tensor, "B N L"], Float[Tensor, "B N _S"]]:
        """The logits, and the steps of a box of each class, of padded proposals (:class:`ProposalEncoder`)."""
        tokens = self.box_head(regions, boxes, mask)
        return self.box_predictor["cls_score"](tokens), self.box_predictor["bbox_pred"](tokens)

    def _predict(
        self,
        levels: Sequence[Float[Tensor, "B C _h _w"]],
        boxes: Sequence[Float[Tensor, "_N 4"]],
        sizes: Sequence[tuple[int, int]],
    ) -> tuple[Float[Tensor, "P L"], Float[Tensor, "P _S"]]:
        """Logits and steps of all proposals of a batch."""
        counts = [len(each) for each in boxes]
        padded = nn.utils.rnn.pad_sequence(list(boxes), batch_first=True)  # [B, N, 4]
        inside = torch.arange(padded.shape[1], device=padded.device) < padded.new_tensor(counts)[:, None]
        scale = padded.new_tensor([(w, h, w, h) for h, w in sizes])
        regions = padded.new_zeros(*padded.shape[:2], levels[0].shape[1], 7, 7)
        regions[inside] = read_regions(levels, boxes).to(regions.dtype)
        hidden = ~inside
        hidden[:, :1] = False  # attention needs at least one key, also in an image without proposals
        logits, steps = self.predict(regions, padded / scale[:, None], hidden)
        return logits[inside], steps[inside]

    def _select(
        self, proposals: Sequence[Float[Tensor, "_N 4"]], targets: Sequence[dict[str, Tensor]]
    ) -> tuple[list[Float[Tensor, "_N 4"]], list[Int[Tensor, "_N"]]]:
        """The proposals to train on, and the object that each is matched with, or -1.

        Objects that are moved a little are added to an image none of whose proposals overlaps one. A random part of the
        proposals, up to 0.3, is dropped.
        """
        selected, matched = [], []
        for boxes, target in zip(proposals, targets):
            objects = target["boxes"].to(boxes.dtype)
            nearest = self._nearest(boxes, objects)
            if len(objects) and (nearest < 0).all():
                boxes = torch.cat([boxes, moved(objects)])
                nearest = self._nearest(boxes, objects)
            [positive], [negative] = self.fg_bg_sampler([(nearest >= 0).to(torch.uint8)])
            chosen = torch.where(positive | negative)[0]
            kept = int(len(chosen) * (1 - 0.3 * torch.rand(()).item()))
            chosen = chosen[torch.randperm(len(chosen), device=chosen.device)[: max(kept, 1)]]
            selected.append(boxes[chosen])
            matched.append(nearest[chosen])
        return selected, matched

    def _nearest(self, boxes: Float[Tensor, "N 4"], objects: Float[Tensor, "T 4"]) -> Int[Tensor, "N"]:
        """The object that each box overlaps most, or -1 if that is less than 0.5."""
        if not len(objects):
            return torch.full((len(boxes),), -1, device=boxes.device)
        return self.proposal_matcher(self.box_similarity(objects, boxes))

    def _losses(
        self,
        logits: Float[Tensor, "P L"],
        steps: Float[Tensor, "P _S"],
        proposals: Sequence[Float[Tensor, "_N 4"]],
        matched: Sequence[Int[Tensor, "_N"]],
        targets: Sequence[dict[str, Tensor]],
    ) -> dict[str, Float[Tensor, ""]]:
        """The loss of the classes by restricted matching, and that of the boxes of all proposals on objects."""
        counts = [len(each) for each in proposals]
        offsets = torch.tensor([0, *(len(t["labels"]) for t in targets)]).cumsum(0).tolist()  # of images' objects
        objects = torch.cat([t["boxes"].to(steps.dtype) for t in targets])
        labels = torch.cat([t["labels"] for t in targets])
        shifted = torch.cat([torch.where(m >= 0, m + start, -1) for m, start in zip(matched, offsets)])
        on = torch.where(shifted >= 0)[0]  # proposals on an object
        object_of, boxes = shifted[on], torch.cat(list(proposals))
        wanted = objects[object_of]
        own = steps.unflatten(1, (-1, 4))[on, labels[object_of] - 1]  # steps of the object's class
        reached = self.box_coder.decode_single(own, boxes[on])
        giou = generalized_box_iou_loss(reached, wanted)
        l1 = (own - self.box_coder.encode_single(wanted, boxes[on])).abs().sum()

        with torch.no_grad():
            cost = 2 * giou - logits[on].softmax(-1).gather(1, labels[object_of, None])[:, 0]
            truth = torch.zeros_like(shifted)
            best = on[lowest(cost, object_of, len(labels))]
            truth[best] = labels[shifted[best]]
        return {
            "loss_classifier": class_loss(logits, truth),
            "loss_box_reg": (l1 + 2 * giou.sum()) / max(sum(counts), 1),
        }


def lowest(cost: Float[Tensor, "M"], group: Int[Tensor, "M"], groups: int) -> Int[Tensor, "_G"]:
    """The index of the lowest cost of each group that has any; the first of equal ones."""
    order = cost.argsort(stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device)
    first = rank.new_full((groups,), len(order)).scatter_reduce(0, group, rank, "amin")
    return order[first[first < len(order)]]


def class_loss(logits: Float[Tensor, "P L"], labels: Int[Tensor, "P"]) -> Float[Tensor, ""]:
    """Cross-entropy; background has weight 0.1, times 2 (1 - p)^2 for its probability p, as in the focal loss."""
    weight = torch.where(labels > 0, 1.0, 0.1)
    right = logits.detach().softmax(-1).gather(1, labels[:, None])[:, 0]
    focus = torch.where(labels > 0, 1.0, 2 * (1 - right) ** 2)
    return (F.cross_entropy(logits, labels, reduction="none") * weight * focus).sum() / (weight.sum() + 1e-6)


def moved(boxes: Float[Tensor, "T 4"]) -> Float[Tensor, "T 4"]:
    """The boxes moved at random by up to a tenth of their sides, which are scaled by 0.8 to 1.25."""
    center, sides = box_convert(boxes, "xyxy", "cxcywh").split(2, -1)
    shift, scale = torch.rand(2, len(boxes), 2, device=boxes.device)
    center, sides = center + sides * (shift - 0.5) * 0.2, sides * 0.8 ** (2 * scale - 1)
    return box_convert(torch.cat([center, sides], -1), "cxcywh", "xyxy")


def read_regions(
    levels: Sequence[Float[Tensor, "B C _h _w"]], boxes: Sequence[Float[Tensor, "_N 4"]]
) -> Float[Tensor, "P C 7 7"]:
    """The 7 x 7 region of each box, by aligned RoIAlign on the level of its size (FPN, equation 1).

    Args:
        levels: the maps at strides 4, 8, 16, 32.
        boxes: the boxes of each image, corners in pixels.
    """
    image = torch.cat([each.new_full((len(each), 1), number) for number, each in enumerate(boxes)])
    rows = torch.cat([image, torch.cat(list(boxes))], 1)  # [P, 5]
    side = ((rows[:, 3] - rows[:, 1]) * (rows[:, 4] - rows[:, 2])).clamp(min=0).sqrt()
    chosen = (4 + torch.log2(side / 224 + 1e-8)).floor().clamp(2, 5) - 2
    regions = levels[0].new_zeros(len(rows), levels[0].shape[1], 7, 7)
    for number, level in enumerate(levels):
        own = torch.where(chosen == number)[0]
        regions[own] = roi_align(level, rows[own].to(level.dtype), 7, 1 / 2 ** (number + 2), aligned=True)
    return regions


def _tower(dim: int) -> nn.Sequential:
    """Two 3 x 3 convolutions, each with GroupNorm and ReLU."""
    parts: list[nn.Module] = []
    for _ in range(2):
        parts += [nn.Conv2d(dim, dim, 3, padding=1, bias=False), nn.GroupNorm(32, dim), nn.ReLU()]
    return nn.Sequential(*parts)
