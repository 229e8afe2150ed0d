"""From pictures of different sizes to one padded batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from regolite.types import ImageBatch, Target


def batch_pictures(pictures: Sequence[Float[Tensor, "3 _h _w"]], multiple: int = 1) -> ImageBatch:
    """Pad pictures with zeros at the right and the bottom to the largest height and width among them.

    Args:
        pictures: normalised pixels; zero is then the mean colour of ImageNet.
        multiple: round the padded height and width up to a multiple of this (a backbone's stride, say).

    Returns:
        The batch; its mask is True on padding.
    """
    sizes = torch.tensor([picture.shape[-2:] for picture in pictures])
    height, width = (-(-side // multiple) * multiple for side in sizes.amax(0).tolist())
    pixels = pictures[0].new_zeros(len(pictures), 3, height, width)
    mask = torch.ones(len(pictures), height, width, dtype=torch.bool, device=pixels.device)
    for i, picture in enumerate(pictures):
        h, w = picture.shape[-2:]
        pixels[i, :, :h, :w] = picture
        mask[i, :h, :w] = False
    return ImageBatch(pixels, mask, sizes.to(pixels.device))


def collate(
    items: Sequence[tuple[Float[Tensor, "3 _h _w"], Target]], multiple: int = 1
) -> tuple[ImageBatch, list[Target]]:
    """The ``collate_fn`` of a ``DataLoader``: items of a data set to a padded batch and its targets."""
    pictures, targets = zip(*items, strict=True)
    return batch_pictures(pictures, multiple), list(targets)
