"""One's own data: a folder with boxes in COCO, YOLO or Pascal VOC form becomes a data folder of ours.

Labeling tools export one of these three; :mod:`regolite.data.exports` reads them. What the converted folder holds is
COCO's form (``DIR/train``, ``DIR/val``, ``DIR/annotations``), which is what everything here opens; the outlines of a
COCO export are kept, since objects can be cut out along them (:mod:`regolite.data.paste`). What is wrong with single
boxes or images is put right or left out, and listed by file name.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from regolite.data.coco import is_scaled, outline_box
from regolite.data.exports import Labeled, read_export
from regolite.data.images import orientation_of, read_image
from regolite.errors import UserError
from regolite.utils.validation import fits, plain, shown, whole

MOST_BAD = 0.1  # share of the annotations that may be unusable: with more, something is wrong with the whole export

# Where a point (x, y) of the stored pixels lies once an image of w x h pixels is turned upright, by EXIF's orientation.
UPRIGHT: dict[int, Callable[..., tuple[Any, Any]]] = {
    1: lambda x, y, w, h: (x, y),
    2: lambda x, y, w, h: (w - x, y),
    3: lambda x, y, w, h: (w - x, h - y),
    4: lambda x, y, w, h: (x, h - y),
    5: lambda x, y, w, h: (y, x),
    6: lambda x, y, w, h: (h - y, x),
    7: lambda x, y, w, h: (h - y, w - x),
    8: lambda x, y, w, h: (y, w - x),
}


@dataclass
class Conversion:
    """What was converted.

    Attributes:
        form: ``"COCO"``, ``"YOLO"`` or ``"Pascal VOC"``.
        classes: names of the classes by label.
        images: number of images of each split.
        objects: number of objects of each class, split by split.
        problems: what was mended or left out, with the file's name.
    """

    form: str
    classes: list[str]
    images: dict[str, int] = field(default_factory=dict)
    objects: dict[str, dict[str, int]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """A table of the classes, and the problems."""
        names = list(self.images)
        wide = max(len(name) for name in [*self.classes, "images"])
        rows = [f"{self.form}, {len(self.classes)} classes", f"{'':{wide}}" + "".join(f"{name:>8}" for name in names)]
        rows.append(f"{'images':{wide}}" + "".join(f"{self.images[name]:8}" for name in names))
        for one in self.classes:
            rows.append(f"{one:{wide}}" + "".join(f"{self.objects[name].get(one, 0):8}" for name in names))
        return "\n".join([*rows, *(f"! {problem}" for problem in self.problems)])


def convert(source: str | Path, output: str | Path, val: float = 0.2, seed: int = 0) -> Conversion:
    """Convert a folder of images and boxes.

    The form is recognized by its files: XML files are Pascal VOC's, a ``data.yaml`` with the ``names`` of the classes
    is YOLO's, JSON files with ``images``, ``annotations`` and ``categories`` are COCO's. Splits are recognized by
    folders (or files) named train, val or valid, test, and by Pascal VOC's ``ImageSets/Main``; validation or test
    images alone are divided into train and val.

    Images are stored upright. An annotation that gives another size than the file is read for the file as it is stored,
    or for one that was scaled; its boxes are turned or scaled along. An image whose annotation cannot be used is left
    out and listed.

    Args:
        source: the folder.
        output: the folder to make.
        val: share of the images that are held out for validation, where the source has no validation split.
        seed: of that choice.

    Raises:
        UserError: when the source or a form is missing, the output exists, an annotation file that all depends on
            cannot be read, more than a tenth of the annotations cannot be used, or nothing is left.
    """
    source, output = Path(source), Path(output)
    if not source.is_dir():
        raise UserError(f"{source} is no folder: give the folder that your labeling tool has exported")
    if output.exists() and any(output.iterdir()):
        raise UserError(f"{output} exists already: give a folder that can be made anew")
    seed, val = whole("seed", seed), plain(val)
    if not fits(val, float) or not 0 < val < 1:
        raise UserError(f"val={shown(val)} must lie between 0 and 1: it is the share of images held out")
    export = read_export(source)
    problems, bad, changes = export.problems, export.bad, defaultdict(list)
    listed, images = len(export.images) + len(bad), []
    for image in sorted(export.images, key=lambda image: str(image.path)):
        try:
            images.append(_fit(image, changes))
        except UserError as error:
            problems.append(f"{image.path.name}: left out, {error}")
        except ValueError as error:
            bad.append((image.path.name, str(error)))
    if len(bad) > MOST_BAD * listed:
        raise UserError(
            f"{source} cannot be read as {export.form}: {': '.join(bad[0])} ({len(bad)} of {listed} annotations cannot "
            "be used, which is more than a tenth: correct them, or take them and their images out)"
        )
    problems += [f"{name}: left out, {why}" for name, why in bad]
    for what, names in changes.items():
        more = f" and {len(names) - 1} more images" if len(names) > 1 else ""
        problems.append(f"{names[0]}{more}: {what}")
    splits: dict[str, list[_Fit]] = defaultdict(list)
    for image in images:
        splits[image.split].append(image)
    common = Path(os.path.commonpath([image.path.parent for image in images])) if images else source
    if not {"train", "val"} <= set(splits):
        only = next((split for split in ("train", "val", "test") if split in splits), "train")
        if only != "train":
            problems.append(f"there are no training images: those of {only} are divided into train and val")
        own = splits.pop(only, [])
        held = set(random.Random(seed).sample(range(len(own)), max(1, round(val * len(own))) if own else 0))
        splits["train"] = [image for n, image in enumerate(own) if n not in held]
        splits["val"] = [own[n] for n in sorted(held)]
    if not splits["train"]:
        why = f" ({problems[0]})" if problems else ""
        raise UserError(f"{source} has {len(images)} images: too few to train on some and hold out others{why}")
    if not any(len(image.corners) for image in splits["train"]):
        raise UserError(f"{source} has no box in a training image: there is nothing to learn from")
    done = Conversion(export.form, sorted(export.classes), problems=problems)
    for split in sorted(splits, key=["train", "val", "test"].index):
        _write(splits[split], common, output, split, done)
    return done


@dataclass
class _Fit:
    """An image with its objects in pixels of the upright image."""

    path: Path
    split: str
    orientation: int
    size: tuple[int, int]
    classes: list[str]
    corners: Float[np.ndarray, "N 4"]
    areas: list[float]
    crowd: list[int]
    outlines: list[Any]


def _fit(image: Labeled, changes: dict[str, list[str]]) -> _Fit:
    """Bring the boxes of an annotation to the pixels of the upright image; ``changes`` gets its name for each change.

    Raises:
        UserError: the image cannot be read.
        ValueError: the annotation cannot be used, or is for an image of another shape.
    """
    if image.problem:
        raise ValueError(image.problem)
    stored, orientation = _header(image.path)
    upright = stored[::-1] if orientation >= 5 else stored
    said = (1, 1) if image.fractions else image.size or upright
    corners = np.array([one.corners for one in image.objects], dtype=float).reshape(-1, 4)
    outlines = [one.outline for one in image.objects]
    areas = [one.area for one in image.objects]
    if image.fractions or is_scaled(said, upright):
        turn, scale = UPRIGHT[1], np.array(upright) / said
    elif is_scaled(said, stored):
        turn, scale = UPRIGHT[orientation], np.array(stored) / said
        changes["annotated as stored, not as shown: boxes turned with the image"].append(image.path.name)
    else:
        raise ValueError(
            f"{image.source} says {said[0]}x{said[1]} pixels but the file has {stored[0]}x{stored[1]}: "
            "put the file back that was annotated, or correct its width and height"
        )
    if not image.fractions and (scale != 1).any():
        what = f"annotated at {said[0]}x{said[1]}, scaled to {stored[0]}x{stored[1]}: boxes scaled along"
        changes[what].append(image.path.name)
    points = corners.reshape(-1, 2, 2) * scale
    points = np.stack(turn(points[..., 0], points[..., 1], *stored), axis=-1)
    corners = np.concatenate([points.min(1), points.max(1)], axis=1)
    if any(outlines):
        scaled = [_scaled(outline, scale) if orientation == 1 else [] for outline in outlines]
        if sum(map(bool, scaled)) < sum(map(bool, outlines)):
            changes["left out outlines that are broken or were made for another size or turn"].append(image.path.name)
        outlines = scaled
    areas = [size if area is None else area * scale.prod() for area, size in zip(areas, _areas(corners))]
    classes, crowd = [one.class_name for one in image.objects], [one.crowd for one in image.objects]
    return _Fit(image.path, image.split or "train", orientation, upright, classes, corners, areas, crowd, outlines)


def _header(path: Path) -> tuple[tuple[int, int], int]:
    """Width and height as stored, and EXIF's orientation from 1 to 8.

    Raises:
        UserError: it is no image.
    """
    try:
        with Image.open(path) as image:
            orientation = orientation_of(image)
            return image.size, orientation if orientation in UPRIGHT else 1
    except Exception as error:  # Pillow raises nearly anything on a broken file
        raise UserError(f"image {path} cannot be read ({error}): replace the file") from error


def _scaled(outline: Any, scale: Float[np.ndarray, "2"]) -> Any:
    """An outline in COCO's form, scaled; [] for none, and for RLE, which only fits the size that it was made for."""
    if outline_box(outline) is None:
        return []
    if (scale == 1).all():
        return outline
    if isinstance(outline, dict):
        return []
    polygons = outline if isinstance(outline[0], list) else [outline]
    return [(np.array(polygon, dtype=float).reshape(-1, 2) * scale).ravel().tolist() for polygon in polygons]


def _areas(corners: Float[np.ndarray, "N 4"]) -> list[float]:
    return (corners[:, 2:] - corners[:, :2]).prod(1).tolist()


def _write(images: list[_Fit], common: Path, output: Path, split: str, done: Conversion) -> None:
    """Write the images and annotations of a split. Images of one name keep their folders below ``common``."""
    folder = output / split
    times = Counter(image.path.name for image in images)
    folder.mkdir(parents=True)
    numbers = {name: n for n, name in enumerate(done.classes, 1)}
    records, annotations, counts = [], [], Counter()
    for image in images:
        name = image.path.name
        try:
            read_image(image.path)
        except UserError as error:
            done.problems.append(f"{name}: left out, {error}")
            continue
        kept_name = name if times[name] == 1 else image.path.relative_to(common).as_posix()
        target = folder / kept_name
        target.parent.mkdir(parents=True, exist_ok=True)
        _copy(image.path, image.orientation != 1, target)
        clipped = image.corners.clip(0, np.array(image.size * 2))
        kept = (clipped[:, 2:] - clipped[:, :2] > 0).all(1)
        if (~kept).any():
            done.problems.append(f"{name}: left out {int((~kept).sum())} boxes without area in the image")
        moved = int((np.abs(clipped - image.corners)[kept] > 1).any(1).sum())
        if moved:
            done.problems.append(f"{name}: cut {moved} boxes at the image's edge")
        width, height = image.size
        records.append({"id": len(records) + 1, "file_name": kept_name, "width": width, "height": height})
        for n in np.flatnonzero(kept).tolist():
            left, top, right, bottom = clipped[n].tolist()
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": len(records),
                    "category_id": numbers[image.classes[n]],
                    "bbox": [left, top, right - left, bottom - top],
                    "area": image.areas[n],
                    "iscrowd": image.crowd[n],
                    "segmentation": image.outlines[n],
                }
            )
            counts[image.classes[n]] += 1
    categories = [{"id": number, "name": name, "supercategory": name} for name, number in numbers.items()]
    content = {"images": records, "annotations": annotations, "categories": categories}
    file = output / "annotations" / f"instances_{split}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content), encoding="utf-8")
    done.images[split], done.objects[split] = len(records), dict(counts)


def _copy(path: Path, turned: bool, target: Path) -> None:
    """Copy an image; one that a camera held sideways is stored upright, as labeling tools show it."""
    if not turned:
        shutil.copyfile(path, target)
        return
    read_image(path).save(target, quality=95)
