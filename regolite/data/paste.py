"""Copy-paste augmentation: objects are cut out along their masks and pasted onto other images.

After Dwibedi, Misra and Hebert, "Cut, Paste and Learn" (ICCV 2017), and Ghiasi et al., "Simple Copy-Paste is a Strong
Data Augmentation Method for Instance Segmentation" (CVPR 2021). As in both papers, objects are pasted at random places,
regardless of the scene. Their edges are blended, since a detector would otherwise learn to detect hard edges instead of
objects (Dwibedi et al., section 5.2).
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from PIL import Image, ImageFilter, ImageOps
from pycocotools.coco import COCO

from regolite.data.coco import CocoFolder, find_annotations
from regolite.data.dataset import DetectionDataset, Objects
from regolite.data.views import View
from regolite.errors import UserError

EDGE = 1.5  # standard deviation in pixels of the Gaussian blur that blends the edge of a cut-out
BORDER = 2  # objects closer to the image border, in pixels, count as truncated: polygons often stop short of it
COVERED = 0.7  # objects occluded by more than this fraction are dropped


@dataclass(frozen=True)
class CutOut:
    """An object without its background.

    Attributes:
        image: RGBA, as large as the object's box; alpha is 0 outside its mask and rises to 255 from the edge inwards.
        class_name: name of its class (labels differ between datasets).
        image_id: COCO's id of the source image.
        scale: square root of the area of its box relative to the source image.
    """

    image: Image.Image
    class_name: str
    image_id: int
    scale: float


def cut_outs(
    root: str | os.PathLike[str],
    split: str = "train",
    classes: Sequence[str] | None = None,
    min_size: int = 32,
    per_class: int = 100,
    limit: int | None = None,
) -> list[CutOut]:
    """Cut out the objects of a COCO-format folder along their polygon or RLE masks.

    Crowds, small objects and objects at the image border, which are mostly truncated, are left out.

    Args:
        root: the data folder.
        split: ``train`` or ``val``; training on cut-outs of ``val`` would spoil its evaluation.
        classes: names of the classes to cut out; None for all.
        min_size: least width and height of an object in pixels.
        per_class: the most cut-outs of a class, since all stay in memory; the first ones are taken.
        limit: use only the first ``limit`` images.

    Raises:
        UserError: an unknown class, no masks, a mask that cannot be read, no usable object, or as ``CocoFolder``.
    """
    data = CocoFolder(root, split, limit=limit)
    unknown = set(classes or ()) - set(data.classes)
    if unknown:
        raise UserError(f"{root} has no class {min(unknown)!r} to cut out: choose from {', '.join(data.classes)}")
    names = dict(zip(data.category_ids, data.classes))
    file = find_annotations(Path(root), split)
    coco = COCO()
    coco.dataset = json.loads(file.read_bytes())  # a CocoFolder keeps no masks, to save memory
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        coco.createIndex()
    found: list[CutOut] = []
    masks, count = 0, Counter[str]()
    for i, image_id in enumerate(data.image_ids):
        image, (height, width) = None, data.size(i)
        for annotation in coco.imgToAnns[image_id]:
            if annotation.get("iscrowd") or not annotation.get("segmentation"):
                continue
            masks += 1
            name = names[annotation["category_id"]]
            if count[name] >= per_class or (classes is not None and name not in classes):
                continue
            mask = _mask(coco, annotation, (width, height), file)
            box = left, top, right, bottom = mask.getbbox() or (0, 0, 0, 0)
            gap = min(left, top, width - right, height - bottom)
            if gap < BORDER or min(right - left, bottom - top) < min_size:
                continue
            image = image or data.image(i)
            cut = image.crop(box)
            # After blurring, alpha is one half along the outline. Only the inner half is kept: outside is background.
            blurred = mask.filter(ImageFilter.GaussianBlur(EDGE)).crop(box)
            cut.putalpha(blurred.point(lambda alpha: max(0, 2 * alpha - 255)))
            found.append(CutOut(cut, name, image_id, math.sqrt(cut.width * cut.height / (width * height))))
            count[name] += 1
    if not masks:
        raise UserError(
            f"{file} has boxes but no masks, and objects are cut out along masks: export it with polygons or RLE "
            f"('segmentation')"
        )
    if not found:
        raise UserError(
            f"{file}: none of the {masks} objects with masks can be cut out: one must be at least {min_size} pixels "
            f"wide and high, clear of the image border and of a requested class; lower min_size or add images"
        )
    return found


class Pasted(View):
    """A dataset for training, with cut-outs pasted onto its images at random.

    ``pasted[i]`` and ``pasted.sample(i)`` draw new cut-outs at every call, from torch's global generator. ``image`` and
    ``objects`` return the originals, because two separate calls would draw different cut-outs. The dataset's transform
    is applied afterwards.

    Args:
        dataset: the images to paste onto.
        cut_outs: the cut-outs, drawn uniformly.
        probability: probability that an image gets any cut-outs.
        most: the most cut-outs on one image; their number is drawn uniformly from 1 to ``most``.
        scales: range of the factor on a cut-out's own ``scale``, drawn log-uniformly; factors above 1 blur.

    Raises:
        UserError: an unknown class, no cut-outs, an option out of range.
    """

    def __init__(
        self,
        dataset: DetectionDataset,
        cut_outs: Sequence[CutOut],
        probability: float | int = 0.5,
        most: int = 3,
        scales: tuple[float | int, float | int] = (0.5, 1.0),
    ) -> None:
        unknown = {cut.class_name for cut in cut_outs} - set(dataset.classes)
        if unknown:
            raise UserError(
                f"cut-outs of class {min(unknown)!r} are pasted onto a dataset without that class: add it to the "
                f"dataset's categories, or leave these cut-outs out"
            )
        if not cut_outs or not 0 <= probability <= 1 or most < 1 or not 0 < scales[0] <= scales[1]:
            raise UserError(
                f"{len(cut_outs)} cut-outs pasted with probability={probability}, most={most}, scales={scales}: give "
                f"at least one cut-out, a probability from 0 to 1, most of at least 1, and scales above 0 in order"
            )
        self.dataset, self.cut_outs = dataset, list(cut_outs)
        self.probability, self.most, self.scales = probability, most, scales
        self.classes, self.category_ids, self.image_ids = dataset.classes, dataset.category_ids, dataset.image_ids
        self.transform = dataset.transform

    def sample(self, i: int) -> tuple[Image.Image, Objects]:
        """Image ``i`` with pasted objects, and all visible objects; crowds and occluded objects are left out."""
        image, objects = self.dataset.sample(i)
        objects = objects.targets(image.height, image.width)
        if torch.rand(()) >= self.probability:
            return image, objects
        image = image.copy()
        front = np.full((image.height, image.width), -1)  # index of the pasted object at each pixel, or -1
        labels, boxes, areas = [], [], []
        for k in range(1 + _below(self.most)):
            cut_out = self.cut_outs[_below(len(self.cut_outs))]
            cut = self._resize(cut_out, image.size)
            left, top = _below(image.width - cut.width + 1), _below(image.height - cut.height + 1)
            image.paste(cut, (left, top), cut)
            solid = np.asarray(cut)[:, :, 3] >= 48  # along a straight edge the blended alpha begins with 63
            front[top : top + cut.height, left : left + cut.width][solid] = k
            labels.append(self.classes.index(cut_out.class_name))
            boxes.append([left, top, cut.width, cut.height])
            areas.append(solid.sum())
        new = np.arange(len(labels))
        both = Objects(
            np.append(objects.ids, objects.ids.max(initial=0) + 1 + new),
            np.append(objects.labels, labels),
            np.vstack([objects.boxes, boxes]),
            np.append(objects.areas, areas),
            np.append(objects.crowd, new < 0),
            np.append(objects.decided_by, np.full_like(new, -1)),
        )
        return image, _visible(both, np.append(np.full(len(objects), -1), new), front)

    def place(self, i: int) -> tuple[DetectionDataset, int]:
        """The dataset, and the same index."""
        return self.dataset, i

    @property
    def coco(self) -> COCO:
        """Refused: an evaluation would compare detections in pasted images with annotations of other ones."""
        raise UserError("a dataset with pasted objects has no fixed ground truth: evaluate on its attribute `dataset`")

    def _resize(self, cut_out: CutOut, size: tuple[int, int]) -> Image.Image:
        """Resize a cut-out to a random scale that fits into an image (width, height); flip it with probability 1/2."""
        low, high = map(math.log, self.scales)
        scale = cut_out.scale * math.exp(low + (high - low) * float(torch.rand(())))
        factor = scale * math.sqrt(math.prod(size) / math.prod(cut_out.image.size))
        factor = min(factor, *(whole / part for whole, part in zip(size, cut_out.image.size)))
        width, height = (max(1, round(factor * side)) for side in cut_out.image.size)
        cut = cut_out.image.resize((width, height))
        return ImageOps.mirror(cut) if torch.rand(()) < 0.5 else cut


def _visible(objects: Objects, owners: Int[np.ndarray, "N"], front: Int[np.ndarray, "H W"]) -> Objects:
    """Drop objects that are mostly occluded, and shrink boxes to the visible part.

    Args:
        objects: original objects, of which only boxes are known, and pasted ones, whose area is their pixel count.
        owners: index of each object in ``front``; -1 for original objects.
        front: index of the pasted object at each pixel, or -1.
    """
    boxes, shares = objects.boxes.copy(), np.zeros(len(objects))
    for n, (x, y, width, height) in enumerate(objects.boxes.tolist()):
        left, top = math.floor(x), math.floor(y)
        shown = front[top : math.ceil(y + height), left : math.ceil(x + width)] == owners[n]
        pixels = shown.size if owners[n] < 0 else objects.areas[n]
        if (visible := Image.fromarray(shown).getbbox()) is not None:
            shares[n] = shown.sum() / pixels
            x0, y0, x1, y1 = visible
            start = max(x, left + x0), max(y, top + y0)
            boxes[n] = *start, min(x + width, left + x1) - start[0], min(y + height, top + y1) - start[1]
    seen = Objects(objects.ids, objects.labels, boxes, shares * objects.areas, objects.crowd, objects.decided_by)
    return seen[shares >= 1 - COVERED]


def _mask(coco: COCO, annotation: dict[str, Any], size: tuple[int, int], file: Path) -> Image.Image:
    """The mask of an annotation, 0 or 255, for an image of this width and height."""
    try:
        mask = Image.fromarray(255 * coco.annToMask(annotation))
        if mask.size != size:
            raise ValueError(f"its size is {mask.size}, that of the image {size}")
    except Exception as error:  # pycocotools can raise almost any exception
        raise UserError(
            f"{file}: the segmentation of annotation {annotation['id']} cannot be read ({error}): correct it"
        ) from error
    return mask


def _below(end: int) -> int:
    """A random integer from 0 to ``end - 1``."""
    return int(torch.randint(end, ()))
