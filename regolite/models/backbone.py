"""Backbones: a pyramid of feature maps of an image.

The networks are torchvision's. This module selects their feature maps, freezes batch normalization (batches of a
detector are too small for it), and hides padding. Maps are numbered by *stage*, as in the ResNet paper: stage 2 has
stride 4, stage 3 stride 8, stage 4 stride 16, stage 5 stride 32.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.error import URLError

import torch.nn.functional as F
import torchvision
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.models.resnet import Bottleneck
from torchvision.ops import Conv2dNormActivation, FrozenBatchNorm2d

from regolite.errors import UserError
from regolite.types import FeatureMap, ImageBatch
from regolite.utils.weight_files import read

_WEIGHTS = Path(__file__).parents[1] / "weights"
BUNDLED = {
    "bundled": _WEIGHTS / "mobilenet_v2.safetensors",  # ImageNet
    "bundled_coco": _WEIGHTS / "mobilenet_v2_coco.safetensors",  # the body of a detector, an SSD
}
"""The MobileNetV2 weights that are installed with the package, by the value of ``weights`` that selects them."""
WEIGHTS = {
    "mobilenet_v2": "MobileNet_V2_Weights.IMAGENET1K_V1",
    "resnet50": "ResNet50_Weights.IMAGENET1K_V1",
    "resnet101": "ResNet101_Weights.IMAGENET1K_V1",
    "resnext101_32x8d": "ResNeXt101_32X8D_Weights.IMAGENET1K_V1",
    "resnext101_64x4d": "ResNeXt101_64X4D_Weights.IMAGENET1K_V1",
}


class TinyNet(nn.Sequential):
    """A small network for training from scratch: each stage has a convolution of stride 2 and one of stride 1.

    GroupNorm does not need large batches. 0.6 M parameters.
    """

    channels = {2: 32, 3: 64, 4: 128, 5: 128}

    def __init__(self) -> None:
        def conv(inputs: int, outputs: int, stride: int) -> nn.Module:
            return Conv2dNormActivation(inputs, outputs, 3, stride, norm_layer=lambda c: nn.GroupNorm(8, c))

        stages = [nn.Sequential(conv(3, 16, 2), conv(16, 32, 2))]
        for stage in (3, 4, 5):
            inputs, outputs = self.channels[stage - 1], self.channels[stage]
            stages.append(nn.Sequential(conv(inputs, outputs, 2), conv(outputs, outputs, 1)))
        super().__init__(*stages)


class FoldedNorm(FrozenBatchNorm2d):
    """A frozen batch normalization whose scale and shift are applied by the preceding convolution."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
        """Return the input, which :class:`NormalizedConv2d` has normalized."""
        return x


class NormalizedConv2d(nn.Conv2d):
    """A convolution and the frozen batch normalization after it, as one convolution.

    ``norm(conv(x))`` is a convolution with scaled weights plus a shift. Scaling the weights is cheap; scaling the
    output would read and write the largest tensors of a detector twice more.

    Attributes:
        norm: the normalization.
    """

    norm: FoldedNorm

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B D _h _w"]:
        """Convolve and normalize."""
        norm = self.norm
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        weight, bias = self.weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale
        return self._conv_forward(x, weight, bias)


def fold_norms(body: nn.Module) -> None:
    """Fold each frozen batch normalization of a torchvision network into the preceding convolution."""
    for parent in list(body.modules()):
        children = list(parent.children())
        for conv, norm in zip(children, children[1:]):
            if isinstance(norm, FoldedNorm):
                conv.__class__ = NormalizedConv2d  # keeps the module and its weights
                object.__setattr__(conv, "norm", norm)  # not a submodule: it keeps torchvision's name


class Backbone(nn.Module):
    """A feature pyramid.

    Args:
        name: ``mobilenet_v2``, ``resnet50``, ``resnet101``, ``resnext101_32x8d`` (Table 1's X101, by
            its 105 M parameters), ``resnext101_64x4d`` or ``tiny``.
        stages: the returned maps, finest first; 2 to 5.
        weights: ``"imagenet"`` for torchvision's ImageNet weights (downloaded once, then cached), ``"bundled"`` for the
            MobileNetV2 in the repository, ``"bundled_coco"`` for the one trained on COCO as the backbone of an SSD, the
            path of a ``.safetensors`` or ``.pth`` state dict, or None for random initialization.
        dilated: DC5: stage 5 has the stride of stage 4 and dilated convolutions (ResNets only).
        frozen_stages: the stem and the stages up to this number are not trained (DETR freezes up to stage 2).
        mask_padding: set padding to zero before every convolution, so that the maps of an image do not depend on the
            batch. Otherwise convolutions read the features of the padding, as in the published detectors. (The
            GroupNorm of ``tiny`` includes padding in either case.)

    Attributes:
        channels: channels of each returned map.

    Raises:
        UserError: the name or a stage is unknown, or the weights are not available.
    """

    def __init__(
        self,
        name: str,
        stages: Sequence[int] = (2, 3, 4, 5),
        weights: str | None = None,
        dilated: bool = False,
        frozen_stages: int = 0,
        mask_padding: bool = True,
    ) -> None:
        super().__init__()
        if name != "tiny" and name not in WEIGHTS:
            raise UserError(f"unknown backbone {name!r}; choose one of tiny, {', '.join(WEIGHTS)}")
        if dilated and not name.startswith("res"):
            raise UserError(f"backbone {name!r} has no dilated (DC5) form; choose a ResNet")
        if not stages or not set(stages) <= {2, 3, 4, 5}:
            raise UserError(f"the stages of a backbone are {tuple(stages)}; choose some of 2 to 5")
        if frozen_stages not in (0, 2, 3, 4, 5):
            raise UserError(f"frozen_stages of a backbone is {frozen_stages}; choose 0 or one of 2 to 5")
        self.body, self.ends, channels = _split(name, dilated)
        self.stages = tuple(stages)
        self.channels = [channels[s] for s in self.stages]
        self.strides = [16 if dilated and s == 5 else 2**s for s in self.stages]
        self.mask_padding = mask_padding
        fold_norms(self.body)
        if weights is not None:
            self.body.load_state_dict(_state_dict(name, weights, self.body.state_dict()))
        if frozen_stages:
            for part in list(self.body)[: self.ends[frozen_stages]]:
                part.requires_grad_(False)

    def forward(self, images: ImageBatch) -> list[FeatureMap]:
        """The pyramid of a batch, finest map first."""
        maps, x, mask = {}, images.pixels, images.mask
        stage_of = {end: stage for stage, end in self.ends.items()}
        for number, part in enumerate(self.body, start=1):
            if self.mask_padding:
                x, mask = run_masked(part, x, mask)
            else:
                x = part(x)
            if number in stage_of:
                maps[stage_of[number]] = x, mask
        features = []
        for stage, stride in zip(self.stages, self.strides):
            x, mask = maps[stage]
            if self.mask_padding:
                features.append(FeatureMap(hide(x, mask), mask, stride))
            else:
                features.append(FeatureMap(x, shrink(images.mask, x.shape[-2:]), stride))
        return features


def run_masked(
    module: nn.Module, x: Float[Tensor, "B C H W"], mask: Bool[Tensor, "B H W"]
) -> tuple[Float[Tensor, "B D h w"], Bool[Tensor, "B h w"]]:
    """Run a part of a network with zeros on padding before each layer that reads neighbors.

    torchvision's blocks are written out here, since their own ``forward`` has no argument for a mask.

    Args:
        module: a layer, or a block of the networks in :class:`Backbone`.
        x: its input.
        mask: True on padding.

    Returns:
        The output, and the mask at its stride. A cell is padding where it lies wholly on padding. Since padding is at
        the right and at the bottom, that is where the first of the cells that it replaces is padding.
    """
    if isinstance(module, nn.Sequential):
        for part in module:
            x, mask = run_masked(part, x, mask)
        return x, mask
    if isinstance(module, InvertedResidual):
        out, small = run_masked(module.conv, x, mask)
        return (x + out if module.use_res_connect else out), small
    if isinstance(module, Bottleneck):
        out = module.relu(module.bn1(module.conv1(x)))
        out, small = run_masked(module.conv2, out, mask)
        out = module.bn3(module.conv3(module.relu(module.bn2(out))))
        out += x if module.downsample is None else module.downsample(x)
        return module.relu(out), small
    if list(module.children()):
        raise TypeError(f"padding cannot be hidden inside a {type(module).__name__}: write out its forward here")
    if not isinstance(module, (nn.Conv2d, nn.MaxPool2d)):  # a normalization or an activation
        return module(x), mask
    if module.kernel_size not in (1, (1, 1)):  # the maximum is taken of a ReLU's output, where zeros change nothing
        x = hide(x, mask)
    rows, columns = module.stride if isinstance(module.stride, tuple) else (module.stride, module.stride)
    return module(x), mask[:, ::rows, ::columns]


def hide(x: Float[Tensor, "B C h w"], mask: Bool[Tensor, "B h w"]) -> Float[Tensor, "B C h w"]:
    """The map with zeros on padding.

    A product, since ``masked_fill`` does not keep the channels-last layout, to which convolutions would convert back.
    """
    return x * (~mask)[:, None].to(x.dtype)


def shrink(mask: Bool[Tensor, "B H W"], size: Sequence[int]) -> Bool[Tensor, "B h w"]:
    """The padding mask resized to a feature map by nearest neighbor, as in the published detectors."""
    return F.interpolate(mask[None].float(), size=tuple(size))[0].bool()


def _split(name: str, dilated: bool) -> tuple[nn.Sequential, dict[int, int], dict[int, int]]:
    """The network as a sequence of parts, the number of parts up to the end of each stage, and its channels."""
    if name == "tiny":
        return TinyNet(), {2: 1, 3: 2, 4: 3, 5: 4}, TinyNet.channels
    if name == "mobilenet_v2":
        net = torchvision.models.mobilenet_v2(norm_layer=FoldedNorm)
        # The last 1x1 convolution (320 to 1280 channels) belongs to the classifier; detectors do not use it.
        return net.features[:-1], {2: 4, 3: 7, 4: 14, 5: 18}, {2: 24, 3: 32, 4: 96, 5: 320}
    net = getattr(torchvision.models, name)(norm_layer=FoldedNorm, replace_stride_with_dilation=[False, False, dilated])
    del net.avgpool, net.fc
    names = list(net._modules)
    ends = {stage: names.index(f"layer{stage - 1}") + 1 for stage in (2, 3, 4, 5)}
    return nn.Sequential(OrderedDict(net.named_children())), ends, {2: 256, 3: 512, 4: 1024, 5: 2048}


def _state_dict(name: str, weights: str, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights by our names, without those that the network does not have."""
    if weights == "imagenet":
        if name not in WEIGHTS:
            raise UserError(f"there are no ImageNet weights of backbone {name!r}; use weights=None")
        state = download(WEIGHTS[name])
    else:
        if weights in BUNDLED and name != "mobilenet_v2":
            raise UserError(f"only mobilenet_v2 is bundled, not {name!r}; use weights='imagenet', a path or None")
        path = BUNDLED.get(weights, Path(weights))
        if not path.is_file():
            raise UserError(
                f"no backbone weights at {path}; give 'imagenet', 'bundled', 'bundled_coco', an existing file or None"
            )
        state = read(path).tensors
    state = {key.removeprefix("features."): value for key, value in state.items()}
    missing = sorted(set(wanted) - set(state))
    if missing:
        raise UserError(f"{weights} holds no weights of {name}: {missing[0]} and {len(missing) - 1} others are missing")
    for key, own in wanted.items():
        if state[key].shape != own.shape:
            raise UserError(f"{weights}: {key} is {tuple(state[key].shape)} there and {tuple(own.shape)} in {name}")
    return {key: state[key] for key in wanted}


def download(name: str) -> Mapping[str, Tensor]:
    """A state dict of torchvision by the name of its weights, downloaded once and then cached.

    Raises:
        UserError: the download fails.
    """
    weights = torchvision.models.get_weight(name)
    try:
        return weights.get_state_dict(progress=True, check_hash=True)
    except (URLError, OSError, RuntimeError) as error:
        raise UserError(
            f"can't download {name} ({error}); fetch {weights.url} elsewhere and give the path of the file "
            "(weights=PATH), or use random weights (weights=None)"
        ) from error
