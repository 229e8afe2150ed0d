"""Open any dataset by name: a folder, or a specification of synthetic scenes."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from regolite.data.coco import CocoFolder
from regolite.data.dataset import DetectionDataset
from regolite.data.scenes import Scenes
from regolite.data.views import Joined
from regolite.errors import UserError
from regolite.utils.validation import of_kind, shown, whole

_OPTIONS: dict[str, Callable[[str], Any]] = {
    "val": int,
    "seed": int,
    "size": int,
    "max_objects": int,
    "context": float,
    "scale": float,
    "nearer": float,
}


def open_data(
    root: str | os.PathLike[str],
    split: str = "train",
    transform: Callable[..., Any] | None = None,
    limit: int | None = None,
    check_files: bool = True,
) -> DetectionDataset:
    """Open a COCO-format folder, or scenes.

    Args:
        root: a folder, or ``scenes[:N][:option=value]...``: N training images (2000 by default), and the options
            ``val`` (number of images in the split ``val``, by default a tenth of N), ``seed``, ``size``,
            ``max_objects``, ``context``, ``scale`` and ``nearer`` of ``Scenes``. Examples: ``data/coco_tiny``,
            ``scenes``, ``scenes:500:seed=3:context=0``. A folder with that name is ``./scenes``. ``DIR:every=10`` uses
            every tenth training image of a folder; other splits stay complete.
        split: ``train``, ``val`` or ``test``, or several as in ``train+val``; a folder needs an annotation file for
            each.
        transform: called with the image and its boxes and labels; None only normalizes.
        limit: use only the first ``limit`` images.
        check_files: refuse a folder in which images are missing.

    Raises:
        UserError: as ``CocoFolder`` and ``Scenes``, or an invalid specification of scenes.
    """
    of_kind("root", root, (str, os.PathLike), "the path of a data folder, or scenes")
    of_kind("split", split, str, "the name of a split: train, val or test")
    if transform is not None and not callable(transform):
        raise UserError(f"transform={shown(transform)} is not a function: regolite.data.make_transform makes one")
    if "+" in split:
        parts = [open_data(root, part, transform, limit, check_files) for part in split.split("+")]
        return Joined(parts, limit)
    name, *words = str(root).split(":")
    if name != "scenes":
        folder, stride, every = os.fspath(root).rpartition(":every=")
        if not stride:
            return CocoFolder(root, split, transform, limit, check_files=check_files)
        if not every.isdecimal() or int(every) < 1:
            raise UserError(f"{root}: every={every} is not a whole number greater than 0; write it as in DIR:every=10")
        thinned = int(every) if split == "train" else 1
        return CocoFolder(folder, split, transform, limit, check_files=check_files, every=thinned)
    options: dict[str, Any] = {"val": None}
    num_images = 2000
    for n, word in enumerate(words):
        key, equals, value = word.partition("=")
        try:
            if equals:
                options[key] = _OPTIONS[key](value)
            elif n == 0:
                num_images = int(word)
            else:
                raise ValueError(word)
        except (KeyError, ValueError):
            known = ", ".join(f"{option}=..." for option in _OPTIONS)
            raise UserError(
                f"{root}: {word!r} is not understood: give scenes:NUMBER and options of {known}, separated by colons"
            ) from None
    val = options.pop("val")
    if split == "val":
        num_images = max(1, num_images // 10) if val is None else val
    if limit is not None and whole("limit", limit) < 1:
        raise UserError(f"limit of {limit} images: give at least 1, or leave it out for all")
    return Scenes(num_images if limit is None else min(limit, num_images), transform=transform, split=split, **options)
