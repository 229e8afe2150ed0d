"""Augmentation and normalization, built on torchvision's transforms v2.

A transform is called as ``transform(image)`` or ``transform(image, {"boxes": ..., "labels": ...})`` with a PIL RGB
image and ``tv_tensors.BoundingBoxes``. It returns normalized pixels ``Float[3 H W]``, and the boxes transformed alike.

All randomness comes from torch's global generator: a seed makes it reproducible, and a saved generator state resumes
it. A ``DataLoader`` seeds a generator for each worker from the global one, so the same seed gives the same images for
the same number of workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from regolite.errors import UserError
from regolite.utils.validation import check_bounds, whole

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Mean of ImageNet's red, green and blue in [0, 1], with which torchvision's backbones were trained."""
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Standard deviation of ImageNet's channels."""

DETR_SIZE = 800
LAPTOP_SIZE = 320
LONGEST = 10_000  # pixels: limit of the longer side when a narrow image is enlarged before cropping


def to_pixels() -> v2.Transform:
    """The last step of every transform: PIL image to tensor, normalized with ImageNet's mean and standard deviation."""
    steps = [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        v2.ToPureTensor(),
    ]
    return v2.Compose(steps)


class Resize(v2.Resize):
    """Torchvision's ``Resize``, but no side is rounded down to 0 (4000 x 8 pixels would become 320 x 0)."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Compute the new height and width like torchvision, once per call for image and boxes."""
        height, width = v2.query_size(flat_inputs)
        short, long = sorted((height, width))
        if self.size is None:
            new_short, new_long = int(self.max_size * short / long), self.max_size
        else:
            new_short, new_long = self.size[0], int(self.size[0] * long / short)
            if new_long > self.max_size:
                new_short, new_long = int(self.max_size * new_short / new_long), self.max_size
        new_short = max(new_short, 1)
        return {"size": [new_long, new_short] if height > width else [new_short, new_long]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Resize one input: the image or the boxes."""
        return self._call_kernel(F.resize, inpt, **params, interpolation=self.interpolation, antialias=self.antialias)


class RandomShortestSize(v2.RandomShortestSize):
    """Torchvision's ``RandomShortestSize``, but no side is rounded down to 0."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Sample the new height and width."""
        params = super().make_params(flat_inputs)
        return {**params, "size": [max(1, side) for side in params["size"]]}


class RandomSizeCrop(v2.Transform):
    """Crop a window of uniformly sampled height, width and position.

    Boxes are clipped to the window; use ``v2.SanitizeBoundingBoxes`` afterwards to drop empty boxes.

    Args:
        min_size: the smallest side in pixels.
        max_size: the largest side in pixels, limited by the image.
    """

    def __init__(self, min_size: int, max_size: int) -> None:
        super().__init__()
        self.min_size, self.max_size = min_size, max_size

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Sample the window, once per call for image and boxes."""
        height, width = v2.query_size(flat_inputs)
        crop_height, crop_width = (
            _randint(min(self.min_size, side), min(self.max_size, side)) for side in (height, width)
        )
        return {
            "top": _randint(0, height - crop_height),
            "left": _randint(0, width - crop_width),
            "height": crop_height,
            "width": crop_width,
        }

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Crop one thing: the image or the boxes."""
        return self._call_kernel(F.crop, inpt, **params)


class RandomZoom(v2.Transform):
    """Crop a window with the aspect ratio of the image, at a uniformly sampled position.

    The aspect ratio is kept, so that a batch of similarly shaped images needs little padding. Boxes are clipped to the
    window; use ``v2.SanitizeBoundingBoxes`` afterwards to drop empty boxes.

    Args:
        least: the smallest side of the window relative to the image; it is sampled uniformly from ``least`` to 1.
    """

    def __init__(self, least: float) -> None:
        super().__init__()
        self.least = least

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Sample the window, once per call for image and boxes."""
        share = self.least + (1 - self.least) * float(torch.rand(()))
        sides = v2.query_size(flat_inputs)
        height, width = (max(1, round(share * side)) for side in sides)
        top, left = (_randint(0, side - window) for side, window in zip(sides, (height, width)))
        return {"top": top, "left": left, "height": height, "width": width}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Crop one thing: the image or the boxes."""
        return self._call_kernel(F.crop, inpt, **params)


def detr_train(min_sizes: Sequence[int] = range(480, 801, 32), max_size: int = 1333) -> v2.Transform:
    """DETR's training recipe (Carion et al. 2020, section 4, "technical details").

    Flip horizontally with probability 1/2. Then, with probability 1/2, resize the shorter side to one of ``min_sizes``
    with the longer at most ``max_size``; otherwise resize the shorter side to 400, 500 or 600, crop a window with sides
    of 384 to 600 pixels, and resize it. Objects outside the crop are dropped.
    """
    resize = RandomShortestSize(list(min_sizes), max_size=max_size)
    crop = v2.Compose(
        [RandomShortestSize([400, 500, 600], LONGEST), RandomSizeCrop(384, 600), v2.SanitizeBoundingBoxes(), resize]
    )
    return v2.Compose([v2.RandomHorizontalFlip(), v2.RandomChoice([resize, crop]), to_pixels()])


def detr_val(size: int = DETR_SIZE, max_size: int = 1333) -> v2.Transform:
    """DETR's evaluation size: the shorter side ``size`` pixels, the longer at most ``max_size``.

    If the longer side is limited, torchvision's rounding may differ from DETR's code by a pixel or two.
    """
    return v2.Compose([Resize(size, max_size=max_size), to_pixels()])


def laptop_train(size: int = LAPTOP_SIZE, crop: bool = False) -> v2.Transform:
    """Mild augmentation of small images: horizontal flip, and the longer side sampled from 0.8 to 1.0 of ``size``.

    Args:
        size: the longest side in pixels.
        crop: fix the longer side at ``size``, and with probability 1/2 crop a window of 0.5 to 1 of the image's sides.
    """
    if crop:
        window = v2.Compose([RandomZoom(0.5), v2.SanitizeBoundingBoxes()])
        scale = v2.Compose([v2.RandomApply([window], p=0.5), Resize(None, max_size=size)])
    else:
        scale = v2.RandomChoice([Resize(None, max_size=side) for side in range(round(0.8 * size), size + 1)])
    return v2.Compose([v2.RandomHorizontalFlip(), scale, to_pixels()])


def laptop_val(size: int | None = LAPTOP_SIZE) -> v2.Transform:
    """The longer side ``size`` pixels; None leaves the image at its own size."""
    if size is None:
        return to_pixels()
    return v2.Compose([Resize(None, max_size=size), to_pixels()])


TRANSFORMS = ("detr", "laptop", "laptop_crop", "none")
"""The names that ``make_transform`` knows."""


def make_transform(name: str, size: int | None = None, train: bool = True) -> v2.Transform:
    """Build a transform from a name and a size, as stored in a run configuration.

    Args:
        name: ``detr`` (recipe and sizes of the paper), ``laptop``, ``laptop_crop`` (``laptop`` with random crops), or
            ``none`` (no augmentation: the evaluation transform of ``laptop``, in training too).
        size: in pixels; for ``detr`` the shorter side (800 if None; training sizes and the limit of the longer side
            scale with it), for the others the longer side (320 if None; for ``none``, None keeps the original size).
        train: True for the training transform, False for evaluation and detection.

    Returns:
        A callable on a PIL image and its ``{"boxes", "labels"}``, or on the image alone (training transforms with a
        crop need the boxes).

    Raises:
        UserError: an unknown name, or a size below 16 pixels.
    """
    if name not in TRANSFORMS:
        raise UserError(f"unknown transform {name!r}: choose one of {', '.join(TRANSFORMS)}")
    if size is not None and whole("size", size) < 16:
        raise UserError(f"image size {size} is too small: give at least 16 pixels")
    check_bounds("image_size", size)
    if name == "detr":
        scale = 1.0 if size is None else size / DETR_SIZE
        if train:
            return detr_train([round(side * scale) for side in range(480, 801, 32)], round(1333 * scale))
        return detr_val(size or DETR_SIZE, round(1333 * scale))
    if name == "none":
        return laptop_val(size)
    size = size or LAPTOP_SIZE
    return laptop_train(size, crop=name == "laptop_crop") if train else laptop_val(size)


def _randint(low: int, high: int) -> int:
    """A random integer from ``low`` to ``high``, both included."""
    return int(torch.randint(low, high + 1, ()))
