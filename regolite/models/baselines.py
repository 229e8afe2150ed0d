"""The baselines of Table 1: FCOS, Faster, Mask, Cascade and TSP-RCNN with torchvision's networks.

They predict at every cell of a feature pyramid (FCOS) or around fixed anchor boxes (the R-CNNs), detect each object
several times, and select the highest-scoring of overlapping boxes: non-maximum suppression (NMS), which DETR does not
need. So a baseline has no queries, no decoder layers and no :class:`~regolite.types.DetectorOutput`. It returns final
detections (:meth:`Baseline.detections`), which ``detect`` and ``evaluate`` treat as one stage, and in training the
terms of its loss (:meth:`Baseline.loss`).

The networks, losses and weights are torchvision's; :class:`Baseline` converts inputs and outputs. Images are
normalized, resized and padded, labels are 0..K-1. As in torchvision, padding is not hidden: an image's boxes depend
slightly on its batch. Images are resized by this package with antialiasing, in torchvision without.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torchvision
from jaxtyping import Float, Int
from torch import Tensor, nn
from torchvision.models import get_model_weights, get_weight, list_models
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN, resnet_fpn_backbone
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7

from regolite.boxes import to_pixels
from regolite.errors import UserError
from regolite.models.backbone import Backbone, download
from regolite.models.cascade import CascadeHeads
from regolite.models.config import DetectorConfig, register
from regolite.models.detector import Detector, ParameterGroup
from regolite.models.tsp_rcnn import PROPOSALS, ProposalNetwork, TspHeads
from regolite.types import Detections, ImageBatch, Target
from regolite.utils.weight_files import read

COCO_WEIGHTS = {
    ("fcos", "resnet50"): "FCOS_ResNet50_FPN_Weights.COCO_V1",
    ("faster_rcnn", "resnet50"): "FasterRCNN_ResNet50_FPN_Weights.COCO_V1",
    ("mask_rcnn", "resnet50"): "MaskRCNN_ResNet50_FPN_Weights.COCO_V1",
}
"""Weights published by torchvision, by kind and backbone."""

# torchvision's labels are COCO's ids, 1 to 90, of which ten are unused ("N/A"); 0 is the background.
COCO_CLASSES = tuple(get_weight("FasterRCNN_ResNet50_FPN_Weights.COCO_V1").meta["categories"][1:])
COCO_IDS = tuple(range(1, len(COCO_CLASSES) + 1))


SMALL_BACKBONES = ("mobilenet_v2", "tiny")


@dataclass(frozen=True)
class BaselineConfig(DetectorConfig):
    """Configuration of a baseline.

    Attributes:
        kind: ``"fcos"`` (Tian et al. 2019), ``"faster_rcnn"`` with a feature pyramid (Lin et al. 2017),
            ``"mask_rcnn"`` (He et al. 2017), ``"cascade_mask_rcnn"`` (:mod:`regolite.models.cascade`), or
            ``"tsp_rcnn"`` (:mod:`regolite.models.tsp_rcnn`). Mask branches are neither run nor trained.
        backbone: name of a ResNet or ResNeXt of torchvision; or ``"mobilenet_v2"`` or ``"tiny"``, the small ones of
            :class:`~regolite.models.backbone.Backbone`.
        weights: ``"coco"`` for the detector published by torchvision (downloaded once, then cached); ``"imagenet"`` for
            the backbone only; the path of a ``.pth`` or ``.safetensors`` state dict of the detector; or None for random
            initialization. For a small backbone as in :class:`~regolite.models.backbone.Backbone`.
        frozen_stages: stages of the backbone that are not trained.
        dim: channels of the feature pyramid and the heads; 256 for ResNets.
        norm_eps: epsilon of the backbone's frozen batch normalization; 0 in torchvision's published R-CNNs.
    """

    default_classes: ClassVar = COCO_CLASSES
    default_category_ids: ClassVar = COCO_IDS
    channel_multiple: ClassVar = 32

    kind: Literal["fcos", "faster_rcnn", "mask_rcnn", "cascade_mask_rcnn", "tsp_rcnn"] = "faster_rcnn"
    backbone: str = "resnet50"
    weights: str | None = "imagenet"
    frozen_stages: int = 2
    dim: int = 256
    norm_eps: float = 1e-5

    @property
    def is_small(self) -> bool:
        """Whether the backbone is a small one of this package."""
        return self.backbone in SMALL_BACKBONES


@register("baseline", BaselineConfig)
class Baseline(Detector):
    """A detector of torchvision.

    Args:
        config: its configuration.
        num_classes: number of classes K. torchvision's heads have one more logit, at index 0: the background of the
            R-CNNs, unused in FCOS.

    Attributes:
        net: torchvision's network. Its parts are ``backbone`` (with the feature pyramid), then ``head`` (FCOS) or
            ``rpn.head``, ``roi_heads.box_head``, ``roi_heads.box_predictor`` and, in Mask R-CNN,
            ``roi_heads.mask_head`` and ``roi_heads.mask_predictor``. In Cascade Mask R-CNN each of
            ``roi_heads.stages`` has these four.

    Raises:
        UserError: the backbone is unknown, or the weights are not available or do not fit.
    """

    has_own_loss = True

    def __init__(self, config: BaselineConfig, num_classes: int) -> None:
        super().__init__()
        self.config, self.num_classes = config, num_classes
        if config.kind == "fcos":  # strides 8 to 128; the two coarsest by extra convolutions
            pyramid = _pyramid(config, (3, 4, 5), LastLevelP6P7(config.dim, config.dim))
            self.net = FCOS(pyramid, num_classes + 1)
        else:  # strides 4 to 32, and 64 by pooling; TSP-RCNN: 64 and 128 by extra convolutions
            extra = LastLevelP6P7(config.dim, config.dim) if config.kind == "tsp_rcnn" else LastLevelMaxPool()
            pyramid = _pyramid(config, (2, 3, 4, 5), extra)
            self.net = (MaskRCNN if config.kind == "mask_rcnn" else FasterRCNN)(pyramid, num_classes + 1)
        if config.kind == "mask_rcnn":
            self.net.roi_heads.mask_roi_pool = None  # so that the mask head does not run
            for part in (self.net.roi_heads.mask_head, self.net.roi_heads.mask_predictor):
                part.requires_grad_(False)  # targets have no masks
        if config.kind == "cascade_mask_rcnn":
            self.net.roi_heads = CascadeHeads(config.dim, num_classes + 1)
        if config.kind == "tsp_rcnn":
            self.net.rpn = ProposalNetwork(config.dim)
            self.net.roi_heads = TspHeads(config.dim, num_classes + 1)
        self.net.transform = _Prepared(800, 1333, [0.0], [1.0])  # unused sizes, means and deviations
        if config.weights is not None and not config.is_small:
            self._load(config.weights)

    def forward(
        self, images: ImageBatch, targets: Sequence[Target] | None = None
    ) -> list[Detections] | dict[str, Float[Tensor, ""]]:
        """The detections of each image, with boxes in pixels of the network's input; with targets, the loss."""
        return self.detections(images, images.sizes) if targets is None else self.loss(images, targets)

    def loss(self, images: ImageBatch, targets: Sequence[Target]) -> dict[str, Float[Tensor, ""]]:
        """The terms of torchvision's loss, in the precision of the weights: in bfloat16 gradients of FCOS became NaN.

        Args:
            images: the images.
            targets: their objects.

        Returns:
            Of FCOS ``classification``, ``bbox_regression`` and ``bbox_ctrness``, of the R-CNNs ``loss_objectness``,
            ``loss_rpn_box_reg``, ``loss_classifier`` and ``loss_box_reg``, the last two for each head of a cascade
            (``loss_classifier_1``, ...).

        Raises:
            UserError: the model is not in training mode.
        """
        if not self.training:
            raise UserError("a baseline computes its loss in training mode: call model.train()")
        boxes = [to_pixels(t.boxes[None], size[None])[0] for t, size in zip(targets, images.sizes)]
        wanted = [{"boxes": box, "labels": t.labels + 1} for t, box in zip(targets, boxes)]
        with torch.autocast(images.pixels.device.type, enabled=False):
            return self.net(self._unpadded(images), wanted)

    def detections(self, images: ImageBatch, sizes: Int[Tensor, "B 2"], top_k: int = 100) -> list[Detections]:
        """The detections of each image, highest-scoring first, without a further step of postprocessing.

        torchvision removes detections with scores below 0.05 (FCOS: 0.2), and keeps at most 100 per image.
        ``Detections.queries`` are the numbers of the detections.

        Args:
            images: the images.
            sizes: height and width of the original images in pixels.
            top_k: largest number of detections of an image.
        """
        found = self.net(self._unpadded(images))
        scale = (sizes.cpu() / images.sizes.cpu()).flip(1).repeat(1, 2)  # of x, y, x, y
        detections = []
        for one, by in zip(found, scale):
            scores, labels, boxes = (one[name][:top_k].cpu() for name in ("scores", "labels", "boxes"))
            detections.append(Detections(scores, labels - 1, boxes * by, torch.arange(len(scores))))
        return detections

    def dense(self, images: ImageBatch, training: bool = False) -> dict[str, Any]:
        """Run all parts with a fixed number of boxes, to count operations, also on the meta device.

        The number of boxes after NMS depends on the data. Here the box head gets 1000 proposals per image (TSP-RCNN:
        700) and the mask head 100 detections, the maxima, as zeros; RoIAlign is not run.

        Args:
            images: the images.
            training: run what a training step runs: no mask head, and 512 proposals per image (TSP-RCNN: 700).

        Returns:
            The raw outputs of the parts by name: ``"head"``, or ``"rpn"``, ``"box"`` and, of Mask R-CNN, ``"mask"``;
            for each head of a cascade ``"box_1"``, ``"mask_1"``, ...
        """
        maps = list(self.net.backbone(images.pixels).values())
        if self.config.kind == "fcos":
            return {"head": self.net.head(maps)}
        if self.config.kind == "tsp_rcnn":
            boxes = maps[0].new_zeros(len(images), PROPOSALS, 4)
            regions = maps[0].new_zeros(len(images), PROPOSALS, maps[0].shape[1], 7, 7)
            box = self.net.roi_heads.predict(regions, boxes, boxes[..., 0] > 0)
            return {"rpn": self.net.rpn.head(maps[1:]), "box": box}
        outputs = {"rpn": self.net.rpn.head(maps)}
        cascade = self.config.kind == "cascade_mask_rcnn"
        for number, heads in enumerate(self.net.roi_heads.stages if cascade else [self.net.roi_heads], start=1):
            suffix = f"_{number}" if cascade else ""
            count = heads.fg_bg_sampler.batch_size_per_image if training else 1000
            regions = maps[0].new_zeros(count * len(images), maps[0].shape[1], 7, 7)
            outputs[f"box{suffix}"] = heads.box_predictor(heads.box_head(regions))
            if self.config.kind != "faster_rcnn" and not training:
                detections = maps[0].new_zeros(100 * len(images), maps[0].shape[1], 14, 14)
                outputs[f"mask{suffix}"] = heads.mask_predictor(heads.mask_head(detections))
        return outputs

    def parameter_group(self, name: str) -> ParameterGroup:
        """``backbone`` for torchvision's ``backbone.body``, without the feature pyramid beside it."""
        return "backbone" if "backbone.body." in name else "rest"

    @staticmethod
    def _unpadded(images: ImageBatch) -> list[Float[Tensor, "3 _h _w"]]:
        return [pixels[:, :h, :w] for pixels, (h, w) in zip(images.pixels, images.sizes.tolist())]

    def _load(self, weights: str) -> None:
        """Load weights of the detector or of the backbone."""
        c, net = self.config, self.net
        if weights == "imagenet":
            net = self.net.backbone.body
            state = download(str(get_model_weights(c.backbone)["IMAGENET1K_V1"]))
            state = {key: state[key] for key in net.state_dict()}  # without the classifier
        elif weights == "coco":
            if (c.kind, c.backbone) not in COCO_WEIGHTS:
                raise UserError(
                    f"torchvision has published no COCO weights of {c.kind} on {c.backbone}; give weights='imagenet', "
                    "the path of a file or None"
                )
            if self.num_classes != len(COCO_CLASSES):
                raise UserError(
                    f"torchvision's COCO weights know {len(COCO_CLASSES)} classes (COCO's ids 1 to 90), not "
                    f"{self.num_classes}: leave num_classes out, or train others from weights='imagenet'"
                )
            state = download(COCO_WEIGHTS[c.kind, c.backbone])
        elif not Path(weights).is_file():
            raise UserError(f"no weights of a baseline at {weights}; give 'coco', 'imagenet', an existing file or None")
        else:
            state = read(weights).tensors
        try:
            net.load_state_dict(state)
        except RuntimeError as error:  # torch lists every key, one a line and more
            reason = textwrap.shorten(str(error).partition("\n")[2], 200, placeholder=" ...")
            raise UserError(
                f"{weights} does not fit {c.kind} on {c.backbone} with {self.num_classes} classes: {reason}"
            ) from error


def _pyramid(config: BaselineConfig, stages: tuple[int, ...], extra: ExtraFPNBlock) -> nn.Module:
    """The backbone with a feature pyramid of these stages, and coarser levels by ``extra``."""
    if config.is_small:
        backbone = Backbone(config.backbone, stages, config.weights, frozen_stages=config.frozen_stages)
        ends = {str(backbone.ends[stage] - 1): str(level) for level, stage in enumerate(stages)}
        return BackboneWithFPN(backbone.body, ends, backbone.channels, config.dim, extra)
    if config.backbone not in list_models(torchvision.models, include=("resnet*", "resnext*")):
        raise UserError(f"a baseline has no backbone {config.backbone!r}; give a ResNet of torchvision: resnet50")
    if config.dim != 256:
        raise UserError(f"dim={config.dim}: torchvision's pyramid on a {config.backbone} has 256 channels")
    return resnet_fpn_backbone(
        backbone_name=config.backbone,
        weights=None,
        norm_layer=partial(FrozenBatchNorm2d, eps=config.norm_eps),
        trainable_layers=5 - config.frozen_stages,
        returned_layers=[stage - 1 for stage in stages],
        extra_blocks=extra,
    )


class _Prepared(GeneralizedRCNNTransform):
    """torchvision's transform without normalization and resizing, which are already done; it only pads."""

    def normalize(self, image: Float[Tensor, "3 h w"]) -> Float[Tensor, "3 h w"]:
        return image

    def resize(self, image: Float[Tensor, "3 h w"], target: Any = None) -> tuple[Float[Tensor, "3 h w"], Any]:
        return image, target
