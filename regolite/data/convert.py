"""Conversion of custom datasets: a folder in COCO, YOLO or Pascal VOC format becomes a data folder in COCO format.

Labeling tools export one of these three formats; :mod:`regolite.data.exports` reads them. The converted folder has
``DIR/train``, ``DIR/val`` and ``DIR/annotations``. The outlines of a COCO export are kept, since objects can be cut out
along them (:mod:`regolite.data.paste`). Invalid boxes and images are corrected or left out, and listed by file name.
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
from regolite.utils.validation import fits, of_kind, plain, shown, whole

MOST_BAD = 0.1  # largest tolerated fraction of unusable annotations; above it the whole export is suspect

# By EXIF orientation: maps a point (x, y) of a stored image of w x h pixels to the upright image.
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
    """Summary of a conversion.

    Attributes:
        form: the source format, ``"COCO"``, ``"YOLO"`` or ``"Pascal VOC"``.
        classes: names of the classes by label.
        images: number of images by split.
        objects: number of objects of each class by split.
        problems: what was corrected or left out, with the file name.
    """

    form: str
    classes: list[str]
    images: dict[str, int] = field(default_factory=dict)
    objects: dict[str, dict[str, int]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """A table of the classes, followed by the problems."""
        names = list(self.images)
        wide = max(len(name) for name in [*self.classes, "images"])
        rows = [f"{self.form}, {len(self.classes)} classes", f"{'':{wide}}" + "".join(f"{name:>8}" for name in names)]
        rows.append(f"{'images':{wide}}" + "".join(f"{self.images[name]:8}" for name in names))
        for one in self.classes:
            rows.append(f"{one:{wide}}" + "".join(f"{self.objects[name].get(one, 0):8}" for name in names))
        return "\n".join([*rows, *(f"! {problem}" for problem in self.problems)])


def convert(source: str | Path, output: str | Path, val: float = 0.2, seed: int = 0) -> Conversion:
    """Convert a folder of images and boxes.

    The format is detected by file type: XML files are Pascal VOC, a ``data.yaml`` with the ``names`` of the classes is
    YOLO, JSON files with ``images``, ``annotations`` and ``categories`` are COCO. Splits are detected by folders (or
    files) named train, val or valid, test, and by Pascal VOC's ``ImageSets/Main``. Without training images, the
    validation or test images are divided into train and val.

    Images are stored upright. If the annotated size differs from the file, the boxes are rotated or scaled to fit. An
    image whose annotation cannot be used is left out and listed.

    Args:
        source: the folder.
        output: the folder to create.
        val: fraction of the images held out for validation if the source has no validation split.
        seed: seed of the random split.

    Raises:
        UserError: the source does not exist or has no known format, the output exists, a central annotation file cannot
            be read, more than a tenth of the images or their annotations cannot be used, or no usable images remain.
    """
    for name, path in (("source", source), ("output", output)):
        of_kind(name, path, (str, os.PathLike), "the path of a folder")
    source, output = Path(source), Path(output)
    if not source.is_dir():
        raise UserError(f"{source} is not a folder: give the folder that your labeling tool has exported")
    if os.path.isfile(output):
        raise UserError(f"{output} is a file: give a new folder")
    if output.exists() and any(output.iterdir()):
        raise UserError(f"{output} exists already: give a new folder")
    seed, val = whole("seed", seed), plain(val)
    if not fits(val, float) or not 0 < val < 1:
        raise UserError(f"val={shown(val)} must lie between 0 and 1: it is the share of images held out")
    export = read_export(source)
    problems, bad = export.problems, export.bad
    changes: defaultdict[str, list[str]] = defaultdict(list)
    images: list[_Fit] = []
    broken = 0  # images that cannot be read
    listed = len(export.images) + len(bad)
    for labeled in sorted(export.images, key=lambda labeled: str(labeled.path)):
        try:
            images.append(_fit(labeled, changes))
        except (UserError, ValueError) as error:
            broken += isinstance(error, UserError)
            bad.append((labeled.path.name, str(error)))
    only_one_broken = len(bad) == broken == 1  # says nothing about the export, however few images it has
    if len(bad) > MOST_BAD * listed and not only_one_broken:
        raise UserError(
            f"{source} cannot be read as {export.form}: {': '.join(bad[0])} ({len(bad)} of {listed} images or "
            "their annotations cannot be used, which is more than a tenth: correct them, or take them out)"
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
    """An image with its objects, in pixels of the upright image."""

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
    """Transform the boxes of an annotation to pixels of the upright image; ``changes`` collects file names by change.

    Raises:
        UserError: the image cannot be read.
        ValueError: the annotation cannot be used, or is for an image of another aspect ratio.
    """
    if image.problem:
        raise ValueError(image.problem)
    stored, orientation = _header(image.path)
    upright = stored[::-1] if orientation >= 5 else stored
    annotated = (1, 1) if image.fractions else image.size or upright
    corners = np.array([one.corners for one in image.objects], dtype=float).reshape(-1, 4)
    outlines = [one.outline for one in image.objects]
    if image.fractions or is_scaled(annotated, upright):
        turn, scale = UPRIGHT[1], np.array(upright) / annotated
    elif is_scaled(annotated, stored):
        turn, scale = UPRIGHT[orientation], np.array(stored) / annotated
        changes["annotated as stored, not as shown: boxes turned with the image"].append(image.path.name)
    else:
        raise ValueError(
            f"{image.source} says {annotated[0]}x{annotated[1]} pixels but the file has {stored[0]}x{stored[1]}: "
            "put the file back that was annotated, or correct its width and height"
        )
    if not image.fractions and (scale != 1).any():
        what = f"annotated at {annotated[0]}x{annotated[1]}, scaled to {stored[0]}x{stored[1]}: boxes scaled along"
        changes[what].append(image.path.name)
    points = corners.reshape(-1, 2, 2) * scale
    points = np.stack(turn(points[..., 0], points[..., 1], *stored), axis=-1)
    corners = np.concatenate([points.min(1), points.max(1)], axis=1)
    if any(outlines):
        scaled = [_scaled(outline, scale) if orientation == 1 else [] for outline in outlines]
        if sum(map(bool, scaled)) < sum(map(bool, outlines)):
            changes["left out outlines that are broken or were made for another size or turn"].append(image.path.name)
        outlines = scaled
    areas = [
        size if one.area is None else one.area * float(scale.prod())
        for one, size in zip(image.objects, _areas(corners))
    ]
    classes, crowd = [one.class_name for one in image.objects], [one.crowd for one in image.objects]
    return _Fit(image.path, image.split or "train", orientation, upright, classes, corners, areas, crowd, outlines)


def _header(path: Path) -> tuple[tuple[int, int], int]:
    """Stored width and height, and the EXIF orientation from 1 to 8.

    Raises:
        UserError: the file is not a readable image.
    """
    try:
        with Image.open(path) as image:
            orientation = orientation_of(image)
            return image.size, orientation if orientation in UPRIGHT else 1
    except Exception as error:  # Pillow can raise almost any exception on a broken file
        read_image(path)  # raises it with a message
        raise UserError(f"image {path} cannot be read ({error}): replace the file") from error


def _scaled(outline: Any, scale: Float[np.ndarray, "2"]) -> Any:
    """Scale an outline in COCO format; [] for an invalid one, and for RLE, which is tied to its image size."""
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
    """Write the images and annotations of a split. Images of the same name keep their folders below ``common``."""
    folder = output / split
    times = Counter(image.path.name for image in images)
    folder.mkdir(parents=True)
    numbers = {name: n for n, name in enumerate(done.classes, 1)}
    records: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    counts: Counter[str] = Counter()
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
        cut = int((np.abs(clipped - image.corners)[kept] > 1).any(1).sum())
        if cut:
            done.problems.append(f"{name}: cut {cut} boxes at the image's edge")
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
    """Copy an image; one with an EXIF rotation is stored upright, as labeling tools show it."""
    if not turned:
        shutil.copyfile(path, target)
        return
    read_image(path).save(target, quality=95)
