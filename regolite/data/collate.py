"""Padded batches of images of different sizes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from regolite.types import ImageBatch, Target


def batch_images(images: Sequence[Float[Tensor, "3 _h _w"]], multiple: int = 1) -> ImageBatch:
    """Pad images with zeros at the right and the bottom to the largest height and width in the batch.

    Args:
        images: normalized pixels; zero is the mean color of ImageNet.
        multiple: round the padded height and width up to a multiple of this (the backbone's stride).

    Returns:
        The batch; its mask is True on padding.
    """
    sizes = torch.tensor([image.shape[-2:] for image in images])
    height, width = (-(-side // multiple) * multiple for side in sizes.amax(0).tolist())
    pixels = images[0].new_zeros(len(images), 3, height, width)
    mask = torch.ones(len(images), height, width, dtype=torch.bool, device=pixels.device)
    for i, image in enumerate(images):
        h, w = image.shape[-2:]
        pixels[i, :, :h, :w] = image
        mask[i, :h, :w] = False
    return ImageBatch(pixels, mask, sizes.to(pixels.device))


def collate(
    items: Sequence[tuple[Float[Tensor, "3 _h _w"], Target]], multiple: int = 1
) -> tuple[ImageBatch, list[Target]]:
    """The ``collate_fn`` of a ``DataLoader``: collate items of a dataset into a padded batch and its targets."""
    images, targets = zip(*items, strict=True)
    return batch_images(images, multiple), list(targets)
