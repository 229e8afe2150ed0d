"""Detectors that are small enough to test by the dozen, and a backbone in which no cell sees its neighbors."""

from contextlib import contextmanager

import jaxtyping
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from regolite.data import batch_images
from regolite.models.anchor_detr import AnchorDetr, AnchorDetrConfig
from regolite.models.conditional_detr import ConditionalDetr, ConditionalDetrConfig
from regolite.models.deformable_detr import DeformableDetr, DeformableDetrConfig
from regolite.models.detector import Detector, as_detector
from regolite.models.detr import Detr, DetrConfig
from regolite.models.presets import build
from regolite.models.smca import Smca, SmcaConfig
from regolite.models.sparse_rcnn import SparseRcnn, SparseRcnnConfig
from regolite.types import FeatureMap

CLASSES = 5
SIZES = {
    "backbone": "tiny", "weights": None, "frozen_stages": 0, "dim": 32, "heads": 4,
    "encoder_layers": 2, "decoder_layers": 2, "ffn_dim": 48, "dropout": 0.0, "queries": 7,
}  # fmt: skip


def detr(**changes):
    return shake(Detr(DetrConfig(**(SIZES | changes)), CLASSES)).eval()


def detr_star(**changes):
    return detr(reference_points=True, scoring="sigmoid", **changes)


def up_detr(**changes):
    return detr(pre_norm=True, **changes)


def conditional_detr(**changes):
    return shake(ConditionalDetr(ConditionalDetrConfig(**(SIZES | changes)), CLASSES)).eval()


def anchor_detr(**changes):
    return shake(AnchorDetr(AnchorDetrConfig(**(SIZES | {"patterns": 1} | changes)), CLASSES)).eval()


def smca(**changes):
    return shake(Smca(SmcaConfig(**(SIZES | {"multi_scale_layers": (2,)} | changes)), CLASSES)).eval()


def deformable(**changes):
    sizes = SIZES | {"levels": 3, "points": 2} | changes
    return shake(DeformableDetr(DeformableDetrConfig(**sizes), CLASSES)).eval()


def refined(**changes):
    return deformable(refine=True, **changes)


def two_stage(**changes):
    return deformable(refine=True, two_stage=True, **changes)


def sparse_rcnn(**changes):
    sizes = {name: value for name, value in SIZES.items() if name != "encoder_layers"} | {"dynamic_dim": 8} | changes
    model = shake(SparseRcnn(SparseRcnnConfig(**sizes), CLASSES)).eval()
    for layer in model.decoder_layers:  # shaken boxes would soon be a thousand times as large as the image
        nn.init.normal_(layer.box_head.weight, std=0.05)
    return model


# Those with an encoder, and a decoder with cross-attention.
TRANSFORMERS = {
    f.__name__: f
    for f in (detr, detr_star, up_detr, conditional_detr, anchor_detr, smca, deformable, refined, two_stage)
}
DETECTORS = TRANSFORMERS | {"sparse_rcnn": sparse_rcnn}


def small(name="rego_deformable_detr_refined_scenes", num_classes=3, **changes):
    """A preset at a small size; with REGO, two stages of it."""
    sizes = {
        "queries": 6, "dim": 32, "heads": 4, "detector.ffn_dim": 32,
        "detector.encoder_layers": 1, "detector.decoder_layers": 2,
        "backbone": "tiny", "weights": None, "frozen_stages": 0,
    }  # fmt: skip
    rego = {"stages": 2, "rego.ffn_dim": 32} if name.startswith("rego_") else {}
    return build(name, num_classes, **(sizes | rego | changes)).eval()


def shake(model):
    """Weights without zeros, so that every output depends on every input."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.15)
    return model


def small_resnet(monkeypatch, blocks=(1, 1, 1, 1)):
    """Let ResNet-50 have one block a stage: its structure at a quarter of its cost."""

    def build(norm_layer, replace_stride_with_dilation):
        block = torchvision.models.resnet.Bottleneck
        return torchvision.models.ResNet(
            block, list(blocks), norm_layer=norm_layer, replace_stride_with_dilation=replace_stride_with_dilation
        )

    monkeypatch.setattr(torchvision.models, "resnet50", build)


def unfold_norms(monkeypatch):
    """Let frozen norms stand beside their convolutions, so that others' backbones round as ours does.

    Folded ones give the same up to rounding (test_backbone compares them in float64). But where the input of a ReLU is
    all but zero, rounding decides whether a gradient passes.
    """
    monkeypatch.setattr("regolite.models.backbone.FoldedNorm", FrozenBatchNorm2d)
    monkeypatch.setattr("regolite.models.backbone.fold_norms", lambda body: None)


class StubBackbone(nn.Module):
    """Mean colors of square cells, mixed to many channels: an image's maps are the same alone and in any batch."""

    def __init__(self, like):
        super().__init__()
        self.channels, self.strides = like.channels, like.strides
        self.mixes = nn.ParameterList(torch.randn(c, 3) for c in self.channels)

    def forward(self, images):
        features = []
        for stride, mix in zip(self.strides, self.mixes):
            means = F.avg_pool2d(images.pixels, stride, ceil_mode=True) * stride
            mask = F.max_pool2d((~images.mask).float(), stride, ceil_mode=True) == 0
            tensor = torch.einsum("bihw,oi->bohw", means, mix).masked_fill(mask[:, None], 0.0)
            features.append(FeatureMap(tensor, mask, stride))
        return features


def with_stub(detector):
    """The same detector on a backbone that does not mix cells."""
    detector.backbone = StubBackbone(detector.backbone)
    return detector


def random_images(*sizes):
    return [torch.randn(3, *size) for size in sizes]


@contextmanager
def unchecked():
    """Without the checker of annotations, which finds values of a wrong type before the package does."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def batch(*sizes, multiple=32):
    """A batch of random images of these heights and widths."""
    return batch_images(random_images(*sizes), multiple)


def check_contract(detector, num_classes, images):
    """Assert that what a detector says of itself is true of its output.

    Args:
        detector: the detector, in evaluation mode.
        num_classes: number of classes K.
        images: a batch.

    Returns:
        The output.
    """
    assert isinstance(detector, Detector) and as_detector(detector) is detector
    with torch.no_grad():
        output = detector(images)
    assert detector.scoring in ("softmax", "sigmoid") and detector.dim % detector.heads == 0
    assert detector.num_logits == num_classes + (detector.scoring == "softmax")
    for prediction in (*output.layers, *output.by_stage):
        assert prediction.logits.shape[-1] == detector.num_logits
    assert output.layers[-1].logits.shape[:2] == output.queries.shape[:2] and output.queries.shape[2] == detector.dim
    channels = [feature.tensor.shape[1] for feature in output.features]
    assert detector.feature_channels == channels
    assert not detector.projected or set(channels) == {detector.dim}
    assert len(output.stages) == detector.num_stages
    if output.references is not None:
        assert output.references.shape[:2] == output.queries.shape[:2] and output.references.shape[2] in (2, 4)

    attentions = dict(detector.named_attentions())
    modules = set(detector.modules())
    assert all(modules.issuperset(found) for found in attentions.values())
    decoder = [name for name in attentions if name.startswith("decoder.") and name.endswith(".self")]
    assert decoder == [f"decoder.{layer}.self" for layer in range(len(decoder))]
    assert len(output.layers) - len(decoder) in (0, 1, 2)  # RT-DETR's and D-FINE's predict before their decoder layers
    assert {detector.parameter_group(name) for name, _ in detector.named_parameters()} >= {"backbone", "rest"}
    return output
