"""The baselines of Table 1: FCOS, Faster R-CNN and Mask R-CNN, torchvision's own networks in this package's harness.

They are what detection was before DETR. A transformer's queries settle among themselves who takes which object. These
networks predict at every cell of a feature pyramid (FCOS) or around fixed anchor boxes (the R-CNNs), find every object
many times, and keep the best of what overlaps: non-maximum suppression (NMS), the step that DETR did away with. So a
baseline has no queries, no decoder layers and no :class:`~regolite.types.DetectorOutput`: it gives finished
detections (:meth:`Baseline.detections`), which ``detect`` and ``evaluate`` take as one stage. It is not trained here.

The networks are torchvision's to the last weight; :class:`Baseline` only translates. Images arrive normalized,
resized and padded, labels leave as 0..K-1. As in torchvision, padding is let in: an image's boxes depend a little on
its batch. Resizing is the package's own, with antialiasing, where torchvision's is without.
"""

from __future__ import annotations

import textwrap
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
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from regolite.errors import UserError
from regolite.models.backbone import download
from regolite.models.config import DetectorConfig, register
from regolite.types import Detections, ImageBatch
from regolite.utils.weight_files import read

COCO_WEIGHTS = {
    ("fcos", "resnet50"): "FCOS_ResNet50_FPN_Weights.COCO_V1",
    ("faster_rcnn", "resnet50"): "FasterRCNN_ResNet50_FPN_Weights.COCO_V1",
    ("mask_rcnn", "resnet50"): "MaskRCNN_ResNet50_FPN_Weights.COCO_V1",
}
"""What torchvision has published, by kind and backbone."""

# torchvision's label is COCO's id, 1 to 90, and 0 is the background; ten ids of these COCO itself does not use ("N/A").
COCO_CLASSES = tuple(get_weight("FasterRCNN_ResNet50_FPN_Weights.COCO_V1").meta["categories"][1:])
COCO_IDS = tuple(range(1, len(COCO_CLASSES) + 1))


@dataclass(frozen=True)
class BaselineConfig(DetectorConfig):
    """What a baseline is made of.

    Attributes:
        kind: ``"fcos"`` (Tian et al. 2019), ``"faster_rcnn"`` with a feature pyramid (Lin et al. 2017), or
            ``"mask_rcnn"`` (He et al. 2017), whose masks are left out: detections are boxes.
        backbone: any ResNet or ResNeXt of torchvision by its name there.
        weights: ``"coco"`` for the whole detector as torchvision has published it (downloaded once, then cached);
            ``"imagenet"`` for the backbone's alone; the path of a ``.pth`` or ``.safetensors`` state dict of the whole
            detector; or None for random ones.
        norm_eps: added to the variance in the backbone's frozen batch normalization; torchvision's published R-CNNs
            were trained with 0.
    """

    default_classes: ClassVar = COCO_CLASSES
    default_category_ids: ClassVar = COCO_IDS
    is_trained: ClassVar = False

    kind: Literal["fcos", "faster_rcnn", "mask_rcnn"] = "faster_rcnn"
    backbone: str = "resnet50"
    weights: str | None = "imagenet"
    norm_eps: float = 1e-5


@register("baseline", BaselineConfig)
class Baseline(nn.Module):
    """A detector of torchvision.

    Args:
        config: what it is made of.
        num_classes: number of classes K. torchvision's heads get one column more, number 0: the R-CNNs' background,
            and unused in FCOS, whose classes are scored by sigmoids but counted in the same way.

    Attributes:
        net: torchvision's network. Its parts are ``backbone`` (with the feature pyramid), then ``head`` (FCOS) or
            ``rpn.head``, ``roi_heads.box_head``, ``roi_heads.box_predictor`` and, in Mask R-CNN,
            ``roi_heads.mask_head`` and ``roi_heads.mask_predictor``.

    Raises:
        UserError: when the backbone is unknown, or weights are wanted and can't be had or do not fit.
    """

    def __init__(self, config: BaselineConfig, num_classes: int) -> None:
        super().__init__()
        self.config, self.num_classes = config, num_classes
        if config.backbone not in list_models(torchvision.models, include=("resnet*", "resnext*")):
            raise UserError(f"a baseline has no backbone {config.backbone!r}; give a ResNet of torchvision: resnet50")
        norm = partial(FrozenBatchNorm2d, eps=config.norm_eps)
        pyramid = partial(resnet_fpn_backbone, backbone_name=config.backbone, weights=None, norm_layer=norm)
        if config.kind == "fcos":  # strides 8 to 128; the two coarsest by convolutions of their own
            self.net = FCOS(pyramid(returned_layers=[2, 3, 4], extra_blocks=LastLevelP6P7(256, 256)), num_classes + 1)
        else:  # strides 4 to 32, and 64 by pooling
            self.net = (FasterRCNN if config.kind == "faster_rcnn" else MaskRCNN)(pyramid(), num_classes + 1)
            self.net.roi_heads.mask_roi_pool = None  # so that Mask R-CNN keeps its mask head and does not run it
        self.net.transform = _Prepared(800, 1333, [0.0], [1.0])  # sizes, means and deviations that it does not use
        if config.weights is not None:
            self._load(config.weights)

    def forward(self, images: ImageBatch) -> list[Detections]:
        """What is found in each image, with boxes in pixels of the network's input."""
        return self.detections(images, images.sizes)

    def detections(self, images: ImageBatch, sizes: Int[Tensor, "B 2"], top_k: int = 100) -> list[Detections]:
        """What is found in each image, best first: the method by which the harness knows a finished detector.

        torchvision leaves out what scores less than 0.05 (FCOS: 0.2), and all but the best 100.
        ``Detections.queries`` numbers the detections: no query made them.

        Args:
            images: the images.
            sizes: height and width of the original images in pixels.
            top_k: how many to keep of each image.
        """
        found = self.net([p[:, :h, :w] for p, (h, w) in zip(images.pixels, images.sizes.tolist())])
        scale = (sizes.cpu() / images.sizes.cpu()).flip(1).repeat(1, 2)  # of x, y, x, y
        detections = []
        for one, by in zip(found, scale):
            scores, labels, boxes = (one[name][:top_k].cpu() for name in ("scores", "labels", "boxes"))
            detections.append(Detections(scores, labels - 1, boxes * by, torch.arange(len(scores))))
        return detections

    def dense(self, images: ImageBatch) -> dict[str, Any]:
        """Everything whose cost does not depend on what is found: for counting operations, on the meta device too.

        NMS leaves a number of boxes that is known only when it has run, so :meth:`forward` needs real numbers. Here
        the box head gets 1000 proposals an image and the mask head 100 detections, the most that torchvision lets
        through, as zeros: RoIAlign is not run.

        Returns:
            The raw outputs by the names of the parts: ``"head"``, or ``"rpn"``, ``"box"`` and, of Mask R-CNN,
            ``"mask"``.
        """
        maps = list(self.net.backbone(images.pixels).values())
        if self.config.kind == "fcos":
            return {"head": self.net.head(maps)}
        roi_heads = self.net.roi_heads
        proposals = maps[0].new_zeros(1000 * len(images), maps[0].shape[1], 7, 7)
        outputs = {"rpn": self.net.rpn.head(maps), "box": roi_heads.box_predictor(roi_heads.box_head(proposals))}
        if self.config.kind == "mask_rcnn":
            detections = maps[0].new_zeros(100 * len(images), maps[0].shape[1], 14, 14)
            outputs["mask"] = roi_heads.mask_predictor(roi_heads.mask_head(detections))
        return outputs

    def _load(self, weights: str) -> None:
        """Load the whole detector, or the backbone alone."""
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
                    f"{self.num_classes}: leave num_classes out"
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


class _Prepared(GeneralizedRCNNTransform):
    """torchvision's preparation of images without its steps that are done already: what remains is padding."""

    def normalize(self, image: Float[Tensor, "3 h w"]) -> Float[Tensor, "3 h w"]:
        return image

    def resize(self, image: Float[Tensor, "3 h w"], target: Any = None) -> tuple[Float[Tensor, "3 h w"], Any]:
        return image, target
