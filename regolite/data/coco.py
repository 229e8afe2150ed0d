"""Datasets in COCO format: a folder of images and one JSON file of annotations per split.

``DIR/images`` holds the images, ``DIR/annotations/instances_train.json`` and ``instances_val.json`` the annotations.
COCO's own names (``DIR/train2017``, ``instances_train2017.json``) and one folder per split (``DIR/train``) are also
accepted. The format: https://cocodataset.org/#format-data.

A folder is validated when the dataset is created, not an hour into the training. Only defects of image files (broken
files, wrong sizes) are reported later, when the image is read.
"""

from __future__ import annotations

import json
import logging
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from os.path import isfile  # False where Path.is_file raises: for a name that is too long
from pathlib import Path
from typing import Any, TypeGuard
from urllib.parse import unquote

import numpy as np
from jaxtyping import Float, Int, Shaped
from PIL import Image
from pycocotools import mask

from regolite.data.dataset import DetectionDataset, Objects
from regolite.data.images import read_image
from regolite.errors import UserError
from regolite.utils import distributed
from regolite.utils.validation import whole

SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
LONGEST = 1e6  # pixels: no image is wider or higher, so a larger number in a box is a mistake
PROBED = 200  # image files opened when the dataset is created: opening all of COCO's would take minutes
LARGEST_ID = 2**53  # pycocotools stores annotation ids as 64-bit floats, which are exact up to here


class CocoFolder(DetectionDataset):
    """The images of one split of a COCO-format folder; ``dataset[i]`` is ``(pixels Float[3 H W], Target)``.

    Crowds and boxes without area are not targets (both stay in ``coco`` for evaluation). Boxes are clipped to the
    image. Images are read in the orientation of their annotations (:func:`read_annotated`) and converted to RGB. Files
    that were resized after annotation are scaled back to the annotated size, with one warning.

    Args:
        root: the data folder.
        split: ``train``, ``val`` or ``test``; the folder needs an annotation file for it.
        transform: called with the image and its boxes and labels (``regolite.data.transforms``); None only
            normalizes.
        limit: use only the first ``limit`` images.
        keep_empty: keep images without targets.
        check_files: refuse a folder in which images are missing.
        every: use only every n-th image, applied before ``limit``. In a file that lists one source after another, this
            is a representative sample and the first images are not.

    Attributes:
        classes: names of the classes in the order of the labels, which is the order of COCO's category ids.
        category_ids: COCO's id of each class.
        image_ids: COCO's id of each image.
        file: the annotation file.

    Raises:
        UserError: a missing folder or file, invalid JSON, inconsistent annotations, duplicate category names, an
            invalid id, box or number, a limit below 1. When an image is read: a broken file, or one whose aspect ratio
            differs from its annotation.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str = "train",
        transform: Callable[..., Any] | None = None,
        limit: int | None = None,
        keep_empty: bool = True,
        check_files: bool = True,
        every: int = 1,
    ) -> None:
        if limit is not None and whole("limit", limit) < 1:
            raise UserError(f"limit of {limit} images: give at least 1, or leave it out for all")
        self.transform = transform
        self.file = file = find_annotations(Path(root), split)
        images, annotations, categories = read_annotations(file)

        category_ids = _whole_numbers(categories, "id", "category", file)
        names = _class_names(categories, file)
        by_id = np.argsort(category_ids)
        self.category_ids = tuple(category_ids[by_id].tolist())
        self.classes = tuple(names[k] for k in by_id)
        _check_unique(category_ids, "category", file)

        image_ids = _whole_numbers(images, "id", "image", file)
        _check_unique(image_ids, "image", file)
        sizes = np.stack([_sides(images, side, file) for side in ("height", "width")], axis=1)
        file_names = _column(images, "file_name", "image", file)
        for image, name in zip(images, file_names):
            if not isinstance(name, str) or not name:
                raise UserError(f"{file}: image {image['id']} has file_name {name!r}: give the name of its file")

        ids = _whole_numbers(annotations, "id", "annotation", file)
        _check_unique(ids, "annotation", file)
        owners = _position(_whole_numbers(annotations, "image_id", "annotation", file), image_ids, ids, "image", file)
        labels = _position(
            _whole_numbers(annotations, "category_id", "annotation", file),
            np.array(self.category_ids),
            ids,
            "category",
            file,
        )
        boxes = _boxes(annotations, sizes[owners], ids, file)
        areas = _optional(annotations, "area", boxes[:, 2:].prod(1), ids, file)
        crowd = _optional(annotations, "iscrowd", np.zeros(len(ids), dtype=int), ids, file)
        decided_by = _optional(annotations, "decided_by", np.full(len(ids), -1), ids, file).astype(np.int64)
        if len(ids) and not 1 <= ids.min() <= ids.max() <= LARGEST_ID:
            ids, decided_by = _numbered_from_1(ids, decided_by)
        objects = Objects(ids, labels, boxes, areas.astype(float), crowd.astype(bool), decided_by)

        # image i owns rows start[i] to end[i] of the columns
        order = np.argsort(owners, kind="stable")
        self._objects, owners = objects[order], owners[order]
        start, end = (np.searchsorted(owners, np.arange(len(images)), side) for side in ("left", "right"))
        kept = np.arange(len(images))
        if not keep_empty:
            targets = self._objects.targets(*sizes[owners].T)
            kept = np.unique(owners[np.isin(self._objects.ids, targets.ids)])
            if not len(kept):
                raise UserError(f"{file} has no image with an object: nothing is left without the empty ones")
        kept = kept[::every][:limit]
        self._start, self._end, self._sizes = start[kept], end[kept], sizes[kept]
        self._file_names = [file_names[i] for i in kept]
        self.image_ids = image_ids[kept].tolist()
        self._files = find_images(Path(root), split, self._file_names)
        if check_files and self._files.missing:
            missing = self._files.missing
            raise UserError(
                f"{len(missing)} of the {len(kept)} images of {file} are missing in {self._files.folder}, "
                f"the first is {missing[0]}: add them or take them out of the annotations"
            )
        if distributed.rank() == 0:
            self._warn_of_scaled_files()

    def _warn_of_scaled_files(self) -> None:
        """Warn of files that were scaled after annotation; of a large dataset, only a sample is checked."""
        places = sample(len(self))
        scaled = []
        for i in places:
            height, width = self.size(i)
            if size := size_if_scaled(self.path(i), width, height):
                scaled.append(f"{self.file_name(i)} ({size[0]}x{size[1]} pixels, annotated at {width}x{height})")
        if scaled:
            logging.getLogger("regolite").warning(
                f"{self.file}: {len(scaled)} of {len(places)} images {'looked at ' * (len(places) < len(self))}were "
                f"scaled after annotation, as {scaled[0]}: each is scaled back when it is read; `regolite convert` "
                "scales the boxes instead, once and for all"
            )

    def objects(self, i: int) -> Objects:
        """All annotations of image ``i``, crowds included."""
        return self._objects[self._start[i] : self._end[i]]

    def size(self, i: int) -> tuple[int, int]:
        """Height and width of image ``i`` in pixels, as annotated."""
        height, width = self._sizes[i].tolist()
        return height, width

    def file_name(self, i: int) -> str:
        """The file name of image ``i`` in the annotation file."""
        return self._file_names[i]

    def path(self, i: int) -> Path:
        """The file of image ``i``."""
        return self._files.path(self._file_names[i])

    def image(self, i: int) -> Image.Image:
        """Image ``i`` as PIL RGB, untransformed.

        Raises:
            UserError: the file is broken, or its aspect ratio differs from its annotation.
        """
        height, width = self.size(i)
        return read_annotated(self.path(i), width, height)


def sample(count: int) -> list[int]:
    """The indices of at most :data:`PROBED` of ``count`` images, evenly spaced."""
    return np.unique(np.linspace(0, count - 1, min(count, PROBED)).astype(int)).tolist()


class WrongSize(UserError):
    """The aspect ratio of an image differs from its annotation."""


def read_annotated(path: str | os.PathLike[str], width: int, height: int) -> Image.Image:
    """Read an image in the orientation that its annotated size fits: as stored or, if only that fits, upright.

    COCO's annotations refer to stored pixels, but labeling tools apply the EXIF orientation. A file that was scaled
    after annotation is scaled back, so that boxes, outlines and areas in pixels are right.

    Raises:
        UserError: the file cannot be read.
        WrongSize: the aspect ratio differs.
    """
    annotated = (width, height)
    image = stored = read_image(path, upright=False)
    if not is_scaled(annotated, stored.size) and is_scaled(annotated, stored.size[::-1]):
        image = read_image(path)
    if is_scaled(annotated, image.size):
        return image if image.size == annotated else image.resize(annotated)
    raise WrongSize(
        f"image {path} is {stored.width}x{stored.height} pixels but its annotation says {width}x{height}: put the file "
        "back that was annotated, or correct the width and height"
    )


def is_scaled(annotated: tuple[int, int], actual: tuple[int, int]) -> bool:
    """Whether two sizes (width, height) have the same aspect ratio, up to rounding to whole pixels."""
    (w, h), (width, height) = annotated, actual
    return abs(h * width / w - height) < 1 or abs(w * height / h - width) < 1


def size_if_scaled(path: str | os.PathLike[str], width: int, height: int) -> tuple[int, int] | None:
    """Width and height of a file that was scaled after annotation; None for any other file, or a broken one."""
    try:
        with Image.open(path) as image:
            size = image.size
    except Exception:  # any error: it is raised again, with a message, when the image is read
        return None
    annotated = ((width, height), (height, width))
    return size if size not in annotated and any(is_scaled(one, size) for one in annotated) else None


def find_annotations(root: Path, split: str) -> Path:
    """Find the annotation file of a split.

    Raises:
        UserError: there is none.
    """
    if os.path.isfile(root):
        raise UserError(f"data {root} is a file: give a folder with images and annotations in COCO format")
    if not root.is_dir():
        raise UserError(f"data folder {root} does not exist: give a folder with images and annotations in COCO format")
    names = (f"instances_{split}.json", f"instances_{split}2017.json")
    for name in names:
        if (root / "annotations" / name).is_file():
            return root / "annotations" / name
    raise UserError(f"{root / 'annotations'} has no annotations of split {split!r}: looked for {' and '.join(names)}")


@dataclass
class ImageFiles:
    """The files of the images in an annotation file.

    Attributes:
        folder: the folder that holds most of them.
        elsewhere: files other than ``folder / name``, by the name in the annotations.
        missing: names without a file.
    """

    folder: Path
    elsewhere: dict[str, Path] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    def path(self, name: str) -> Path:
        """The file of the image with this name in the annotations."""
        return self.elsewhere.get(name) or self.folder / name


def find_images(root: Path, split: str, names: Sequence[str]) -> ImageFiles:
    """Find the images of a split.

    A name is looked up as it is written, then in its other :func:`spellings`. Folders are the
    split's own (``images/train``, ``train2017``, ``train``), ``images``, the folder of the annotations and ``root``.
    Otherwise a file with the same base name is used, if it is unique outside the folders of other splits; ``a.jpg``
    finds ``a.JPG``.

    Args:
        root: the data folder.
        split: ``train``, ``val`` or ``test``.
        names: the file names in the annotations.

    Raises:
        UserError: there is no image folder.
    """
    own = [root / "images" / split, root / "images" / f"{split}2017"]
    shared = [root / "images", root / f"{split}2017", root / split]
    folders = [folder for folder in own + shared if folder.is_dir()]
    listed = {folder: {entry.name for entry in os.scandir(folder)} for folder in folders}  # faster than asking for each
    first = next((f for f in folders for name in names[:1] if name in listed[f] or isfile(f / name)), None)
    files = ImageFiles(first or next((f for f in folders if f in shared), root))
    present = listed.get(files.folder, set())
    places = [*folders, root / "annotations", root]
    for name in dict.fromkeys(names):
        if name in present or isfile(files.folder / name):
            continue
        found = next((p / s for s in spellings(name) for p in places if isfile(p / s)), None)
        if found:
            files.elsewhere[name] = found
        else:
            files.missing.append(name)
    if files.missing:
        _find_by_base_name(files, folders, split)
    if not folders and len(files.missing) == len(set(names)):
        raise UserError(f"{root} has no images: looked for the folders images, {split}2017 and {split}")
    return files


def _find_by_base_name(files: ImageFiles, folders: Sequence[Path], split: str) -> None:
    """Find missing files by base name, if unique; upper and lower case count only where several files differ by it."""
    by_base: defaultdict[str, set[Path]] = defaultdict(set)
    for folder in folders:
        for path in folder.rglob("*"):
            if split_named(path.relative_to(folder).parent) in (None, split):
                by_base[path.name.casefold()].add(path)
    for name in list(files.missing):
        bases = {spelled.rpartition("/")[2] for spelled in spellings(name)}
        found = {path for base in bases for path in by_base[base.casefold()] if path.is_file()}
        found = {path for path in found if path.name in bases} or found
        if len(found) == 1:
            files.elsewhere[name] = found.pop()
            files.missing.remove(name)


def spellings(name: str) -> list[str]:
    """Variants of a file name: as written, with backslashes as slashes, without percent-encoding.

    Each also in both normal forms of Unicode: macOS decomposes letters with accents, other systems compose them.
    """
    slashes = name.replace("\\", "/")
    local = slashes.rpartition("/data/local-files/?d=")[2]  # Label Studio's prefix of files in its local storage
    written = [name, slashes, unquote(slashes), unquote(local)]
    return list(
        dict.fromkeys(written + [unicodedata.normalize(form, one) for form in ("NFC", "NFD") for one in written])
    )


def split_named(path: Path) -> str | None:
    """The split in the name of a folder or file; the last matching word wins, None if no word matches."""
    words = re.split(r"[/_.-]", path.as_posix().lower().replace("2017", ""))
    return next((SPLITS[word] for word in reversed(words) if word in SPLITS), None)


def read_annotations(file: Path) -> list[list[dict[str, Any]]]:
    """Read the lists of images, annotations and categories, without segmentations.

    An annotation that has only a segmentation gets its bounding box.

    Raises:
        UserError: invalid JSON, or not in COCO format.
    """
    # Dropping segmentations while parsing full COCO halves the time and cuts the memory to a third.
    content = read_json(file, _without_segmentation)
    lists = []
    for key in ("images", "annotations", "categories"):
        records = content.get(key) if isinstance(content, dict) else None
        if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
            raise UserError(f"{file} has no list of {key}: give instance annotations in COCO format")
        if not records and key != "annotations":
            raise UserError(f"{file} lists no {key}: there is nothing to learn from")
        lists.append(records)
    return lists


def read_json(file: Path, object_hook: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """Read a JSON file.

    Raises:
        UserError: the file cannot be read, is invalid JSON, or is nested too deeply.
    """
    try:
        return json.loads(file.read_bytes(), object_hook=object_hook)
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON ({error}): repair it or export it again") from error
    except RecursionError:
        raise UserError(f"{file} is nested too deeply for annotations: export it again") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): check the file") from error


def _without_segmentation(record: dict[str, Any]) -> dict[str, Any]:
    outline = record.pop("segmentation", None)
    if outline and record.get("bbox") in (None, []) and (box := outline_box(outline)):
        record["bbox"] = box
    return record


def outline_box(outline: Any) -> list[float] | None:
    """The bounding box ``[x, y, width, height]`` of a COCO segmentation, or None if it is invalid.

    Args:
        outline: polygons ``[[x, y, x, y, ...], ...]``, one polygon ``[x, y, ...]``, or RLE, in pixels.
    """
    if isinstance(outline, dict):
        try:
            rle = mask.frPyObjects(outline, *outline["size"]) if isinstance(outline["counts"], list) else outline
            box = mask.toBbox(rle).tolist()
        except Exception:  # pycocotools raises nearly anything
            return None
        return box if box[2] > 0 and box[3] > 0 else None
    if not isinstance(outline, list) or not outline:
        return None
    polygons = outline if isinstance(outline[0], list) else [outline]
    if not all(isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 and all(map(is_number, p)) for p in polygons):
        return None
    x, y = (np.array([value for polygon in polygons for value in polygon[start::2]], float) for start in (0, 1))
    return [float(x.min()), float(y.min()), float(np.ptp(x)), float(np.ptp(y))]


def is_number(value: Any, most: float = LONGEST) -> TypeGuard[float]:
    """Whether a JSON value is a number from ``-most`` to ``most``: true, NaN and 1e300 are not."""
    return type(value) in (int, float) and abs(value) <= most


def is_box(box: Any) -> TypeGuard[list[float]]:
    """Whether a JSON value is a box ``[x, y, width, height]`` in pixels."""
    return isinstance(box, list) and len(box) == 4 and all(map(is_number, box)) and box[2] >= 0 and box[3] >= 0


def is_id(value: Any) -> TypeGuard[int]:
    """Whether a JSON value is an id that training can use: an integer of at most 64 bits."""
    return type(value) is int and -(2**63) <= value < 2**63


# Optional fields of an annotation: a check of the value, and a description of valid values.
OPTIONAL: dict[str, tuple[Callable[[Any], bool], str]] = {
    "area": (lambda value: is_number(value, LONGEST**2) and value >= 0, "a number of pixels, or leave it out"),
    "iscrowd": (lambda value: type(value) in (int, float) and value in (0, 1), "0 or 1"),
    "decided_by": (is_id, "the id of an annotation"),
}


def class_name(category: Mapping[str, Any]) -> str | None:
    """The name of a category as text, or None. A number counts as a name; true, null and lists do not."""
    name = category.get("name")
    return str(name) if (isinstance(name, str) and name) or is_number(name) else None


def category_differences(first: Mapping[int, str], second: Mapping[int, str], names: tuple[str, str]) -> list[str]:
    """Describe the differences between two lists of categories.

    Args:
        first: names of categories by id.
        second: the same for another split.
        names: names of the two, as ``("train", "val")``.
    """
    found = []
    for number in sorted(first.keys() | second.keys()):
        one, other = first.get(number), second.get(number)
        if one is None or other is None:
            found.append(f"{number} ({one or other}) is in {names[0] if other is None else names[1]} alone")
        elif one != other:
            found.append(f"{number} is {one} in {names[0]} and {other} in {names[1]}")
    return found


def _class_names(categories: list[dict[str, Any]], file: Path) -> list[str]:
    _column(categories, "name", "category", file)
    ids: dict[str, Any] = {}
    for category in categories:
        name = class_name(category)
        if name is None:
            given = category["name"]
            raise UserError(f"{file}: category {category['id']} has name {given!r}: give the name of the class as text")
        if ids.setdefault(name, category["id"]) != category["id"]:
            raise UserError(
                f"{file}: categories {ids[name]} and {category['id']} are both called {name!r}: rename one, or let "
                "`regolite convert` make one class of them"
            )
    return [str(category["name"]) for category in categories]


def _sides(images: list[dict[str, Any]], side: str, file: Path) -> Int[np.ndarray, "N"]:
    """Heights or widths in pixels."""
    values = _whole_numbers(images, side, "image", file)
    for image, value in zip(images, values.tolist()):
        if not 1 <= value <= LONGEST:
            raise UserError(f"{file}: image {image['id']} has {side} {value}: give that of the file, in pixels")
    return values


def _column(records: list[dict[str, Any]], key: str, what: str, file: Path) -> list[Any]:
    """One field of every record."""
    try:
        return [record[key] for record in records]
    except KeyError:
        record = next(record for record in records if key not in record)
        raise UserError(f"{file}: {what} {record.get('id', 'without an id')} has no {key!r}: add it") from None


def _whole_numbers(records: list[dict[str, Any]], key: str, what: str, file: Path) -> Int[np.ndarray, "N"]:
    values = _column(records, key, what, file)
    for n, value in enumerate(values):
        if not is_id(value):
            which = f"number {n + 1} of the list" if key == "id" else f"id {records[n].get('id')!r}"
            fix = "make it a whole number below 2**63"
            if key.endswith("id"):
                fix += ", or let `regolite convert` number all of them again"
            raise UserError(f"{file}: {what} with {key} {value!r} ({which}): {fix}")
    return np.array(values, dtype=np.int64)


def _optional(
    annotations: list[dict[str, Any]],
    key: str,
    defaults: Shaped[np.ndarray, "N"],
    ids: Int[np.ndarray, "N"],
    file: Path,
) -> Shaped[np.ndarray, "N"]:
    """A number of each annotation, or its default if the annotation has none."""
    values = [annotation.get(key) for annotation in annotations]
    is_valid, valid = OPTIONAL[key]
    for n, value in enumerate(values):
        if value is not None and not is_valid(value):
            raise UserError(f"{file}: annotation {ids[n]} has {key} {value!r}: make it {valid}")
    return np.array(
        [default if value is None else value for value, default in zip(values, defaults.tolist(), strict=True)]
    )


def _numbered_from_1(
    ids: Int[np.ndarray, "N"], decided_by: Int[np.ndarray, "N"]
) -> tuple[Int[np.ndarray, "N"], Int[np.ndarray, "N"]]:
    """Renumber annotations whose ids pycocotools cannot store; it also takes a match with annotation 0 for no match."""
    new = {identity: n for n, identity in enumerate(sorted(ids.tolist()), 1)}
    deciders = [new.get(decider, -1) if decider >= 0 else -1 for decider in decided_by.tolist()]
    return np.array([new[identity] for identity in ids.tolist()], np.int64), np.array(deciders, np.int64)


def _check_unique(ids: Int[np.ndarray, "N"], what: str, file: Path) -> None:
    values, counts = np.unique(ids, return_counts=True)
    if (counts > 1).any():
        raise UserError(f"{file}: {what} id {values[counts > 1][0]} is given more than once: make the ids unique")


def _position(
    values: Int[np.ndarray, "N"], known: Int[np.ndarray, "M"], ids: Int[np.ndarray, "N"], what: str, file: Path
) -> Int[np.ndarray, "N"]:
    """The index of each value among the known ids."""
    unknown = ~np.isin(values, known)
    if unknown.any():
        first = np.flatnonzero(unknown)[0]
        raise UserError(
            f"{file}: annotation {ids[first]} refers to {what} {values[first]}, which the file does not list: "
            f"add the {what} or take the annotation out"
        )
    order = np.argsort(known)
    return order[np.searchsorted(known, values, sorter=order)]


def _boxes(
    annotations: list[dict[str, Any]], sizes: Int[np.ndarray, "N 2"], ids: Int[np.ndarray, "N"], file: Path
) -> Float[np.ndarray, "N 4"]:
    """The boxes ``x, y, width, height``, checked against the size of their image."""
    given = _column(annotations, "bbox", "annotation", file)
    for n, box in enumerate(given):
        if not is_box(box):
            raise UserError(f"{file}: annotation {ids[n]} has bbox {box}: give [x, y, width, height] in pixels")
    boxes = np.array(given, dtype=float).reshape(-1, 4)
    outside = (boxes[:, :2] >= sizes[:, ::-1]).any(1) | (boxes[:, :2] + boxes[:, 2:] <= 0).any(1)
    outside &= (boxes[:, 2:] > 0).all(1)
    if outside.any():
        first = np.flatnonzero(outside)[0]
        height, width = sizes[first]
        raise UserError(
            f"{file}: annotation {ids[first]} of image {annotations[first]['image_id']} has bbox "
            f"{annotations[first]['bbox']}, wholly outside the image of {width}x{height}: correct it"
        )
    return boxes
