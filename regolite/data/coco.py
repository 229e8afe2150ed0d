"""Data sets in COCO's format: a folder of pictures and one JSON file of annotations.

``DIR/images`` holds the pictures, ``DIR/annotations/instances_train.json`` and ``instances_val.json`` the annotations;
COCO's own names (``DIR/train2017``, ``instances_train2017.json``) or a folder for each split (``DIR/train``) do as
well. The format: https://cocodataset.org/#format-data.

Whatever is wrong with such a folder is said when the data set is made, not an hour into the training; only what needs a
picture to be opened (a broken file, a wrong size) waits until that picture is read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped
from PIL import Image

from regolite.data.dataset import DetectionDataset, Objects
from regolite.errors import UserError


class CocoFolder(DetectionDataset):
    """The pictures of one split of a COCO-format folder; ``dataset[i]`` is ``(pixels Float[3 H W], Target)``.

    Crowds and boxes without area are no targets (both stay in ``coco`` for evaluation); boxes are clipped to the
    picture. Pictures are read as COCO's boxes mean them: any colour mode becomes RGB, EXIF orientation is ignored.

    Args:
        root: the data folder.
        split: ``train``, ``val`` or ``test``; the folder needs a file of annotations for it.
        transform: called with the picture and its boxes and labels (``regolite.data.transforms``); None only
            normalises.
        limit: use only the first so many pictures.
        keep_empty: keep pictures without a single target.
        check_files: refuse a folder in which pictures are missing.
        every: use only one image in this many, before ``limit`` counts: a fair sample of a file that lists one source
            after another, as its first images are not.

    Attributes:
        classes: names of the classes in the order of the labels, which is the order of COCO's category ids.
        category_ids: COCO's id of each class.
        image_ids: COCO's id of each picture.

    Raises:
        UserError: a missing folder or file, invalid JSON, annotations that contradict themselves, a limit below 1;
            when a picture is read: a broken file, or one of another size than its annotation says.
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
        if limit is not None and limit < 1:
            raise UserError(f"limit of {limit} pictures: give at least 1, or leave it out for all")
        self.transform = transform
        file = find_annotations(Path(root), split)
        images, annotations, categories = read_annotations(file)

        category_ids = _whole_numbers(categories, "id", "category", file)
        names = _column(categories, "name", "category", file)
        by_id = np.argsort(category_ids)
        self.category_ids = tuple(category_ids[by_id].tolist())
        self.classes = tuple(str(names[k]) for k in by_id)
        _check_unique(category_ids, "category", file)

        image_ids = _whole_numbers(images, "id", "image", file)
        _check_unique(image_ids, "image", file)
        sizes = np.stack([_whole_numbers(images, side, "image", file) for side in ("height", "width")], axis=1)
        file_names = [str(name) for name in _column(images, "file_name", "image", file)]

        ids = _whole_numbers(annotations, "id", "annotation", file)
        _check_unique(ids, "annotation", file)
        picture = _position(_whole_numbers(annotations, "image_id", "annotation", file), image_ids, ids, "image", file)
        labels = _position(
            _whole_numbers(annotations, "category_id", "annotation", file),
            np.array(self.category_ids),
            ids,
            "category",
            file,
        )
        boxes = _boxes(annotations, sizes[picture], ids, file)
        areas = _optional(annotations, "area", boxes[:, 2:].prod(1), ids, file)
        crowd = _optional(annotations, "iscrowd", np.zeros(len(ids), dtype=int), ids, file)
        decided_by = _optional(annotations, "decided_by", np.full(len(ids), -1), ids, file).astype(np.int64)
        if len(ids) and ids.min() < 1:  # to pycocotools a match with annotation 0 is no match, so ids start at 1
            decided_by = np.where(decided_by >= 0, decided_by - ids.min() + 1, -1)
            ids = ids - ids.min() + 1
        objects = Objects(ids, labels, boxes, areas.astype(float), crowd.astype(bool), decided_by)

        # picture i has rows start[i] to end[i] of the columns
        order = np.argsort(picture, kind="stable")
        self._objects, picture = objects[order], picture[order]
        start, end = (np.searchsorted(picture, np.arange(len(images)), side) for side in ("left", "right"))
        kept = np.arange(len(images))
        if not keep_empty:
            targets = self._objects.targets(*sizes[picture].T)
            kept = np.unique(picture[np.isin(self._objects.ids, targets.ids)])
            if not len(kept):
                raise UserError(f"{file} has no picture with an object: nothing is left without the empty ones")
        kept = kept[::every][:limit]
        self._start, self._end, self._sizes = start[kept], end[kept], sizes[kept]
        self._file_names = [file_names[i] for i in kept]
        self.image_ids = image_ids[kept].tolist()
        self._folder = find_folder(Path(root), split, self._file_names[0])
        if check_files:
            _check_present(self._folder, self._file_names, file)

    def objects(self, i: int) -> Objects:
        """All annotations of picture ``i``, crowds included."""
        return self._objects[self._start[i] : self._end[i]]

    def size(self, i: int) -> tuple[int, int]:
        """Height and width of picture ``i`` in pixels, as annotated."""
        height, width = self._sizes[i].tolist()
        return height, width

    def file_name(self, i: int) -> str:
        """The file name of picture ``i`` in the JSON."""
        return self._file_names[i]

    def path(self, i: int) -> Path:
        """The file of picture ``i``."""
        return self._folder / self._file_names[i]

    def image(self, i: int) -> Image.Image:
        """Picture ``i`` as PIL RGB, untransformed.

        Raises:
            UserError: the file is broken, or of another size than its annotation says.
        """
        picture = read_picture(self.path(i))
        height, width = self.size(i)
        if picture.size != (width, height):
            turned = picture.size == (height, width)
            hint = "store it unrotated: boxes refer to the stored pixels" if turned else "correct one of the two"
            found = f"{picture.width}x{picture.height}"
            raise UserError(f"{self.path(i)} is {found} pixels but its annotation says {width}x{height}: {hint}")
        return picture


def read_picture(path: str | os.PathLike[str]) -> Image.Image:
    """Read a picture of any colour mode as RGB, ignoring its EXIF orientation (as COCO's annotations do).

    Transparency is dropped; 16-bit greyscale is scaled to 8 bits.

    Raises:
        UserError: no such file, or not a picture, or a broken one.
    """
    if not Path(path).is_file():
        raise UserError(f"picture {path} does not exist: check the path")
    try:
        with Image.open(path) as picture:
            picture.load()
            if picture.mode.startswith("I"):  # convert() would clip 16-bit values at 255 instead of scaling them
                picture = Image.fromarray((np.asarray(picture) // 257).clip(0, 255).astype(np.uint8))
            if "transparency" in picture.info:
                picture = picture.convert("RGBA")
            return picture.convert("RGB")
    except Exception as error:  # Pillow's decoders raise nearly anything on a broken file
        raise UserError(f"picture {path} cannot be read ({error}): replace the file") from error


def find_annotations(root: Path, split: str) -> Path:
    """The file with the annotations of a split.

    Raises:
        UserError: there is none.
    """
    if not root.is_dir():
        raise UserError(f"data folder {root} does not exist: give a folder with images and annotations in COCO format")
    names = (f"instances_{split}.json", f"instances_{split}2017.json")
    for name in names:
        if (root / "annotations" / name).is_file():
            return root / "annotations" / name
    raise UserError(f"{root / 'annotations'} has no annotations of split {split!r}: looked for {' and '.join(names)}")


def find_folder(root: Path, split: str, name: str) -> Path:
    """The folder of the pictures of a split: of those that there are, the one that holds the picture of this name.

    Raises:
        UserError: there is no such folder.
    """
    folders = [folder for folder in (root / "images", root / f"{split}2017", root / split) if folder.is_dir()]
    if not folders:
        raise UserError(f"{root} has no pictures: looked for the folders images, {split}2017 and {split}")
    return next((folder for folder in folders if (folder / name).is_file()), folders[0])


def _check_present(folder: Path, names: list[str], file: Path) -> None:
    present = {entry.name for entry in os.scandir(folder)}  # one listing is much faster than asking for each file
    missing = [name for name in names if name not in present and not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{len(missing)} of the {len(names)} pictures of {file} are missing in {folder}, "
            f"the first is {missing[0]}: add them or take them out of the annotations"
        )


def read_annotations(file: Path) -> list[list[dict[str, Any]]]:
    """The lists of images, annotations and categories, without segmentations.

    Raises:
        UserError: no valid JSON, or not in COCO's format.
    """
    try:
        # dropping segmentations while parsing halves the time for full COCO and takes a third of the memory
        content = json.loads(file.read_bytes(), object_hook=_without_segmentation)
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON ({error}): repair it or fetch it again") from error
    lists = []
    for key in ("images", "annotations", "categories"):
        records = content.get(key) if isinstance(content, dict) else None
        if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
            raise UserError(f"{file} has no list of {key}: give instance annotations in COCO format")
        if not records and key != "annotations":
            raise UserError(f"{file} lists no {key}: there is nothing to learn from")
        lists.append(records)
    return lists


def _without_segmentation(record: dict[str, Any]) -> dict[str, Any]:
    record.pop("segmentation", None)
    return record


def _column(records: list[dict[str, Any]], key: str, what: str, file: Path) -> list[Any]:
    """One field of all records."""
    try:
        return [record[key] for record in records]
    except KeyError:
        record = next(record for record in records if key not in record)
        raise UserError(f"{file}: {what} {record.get('id', 'without an id')} has no {key!r}: add it") from None


def _whole_numbers(records: list[dict[str, Any]], key: str, what: str, file: Path) -> Int[np.ndarray, "N"]:
    values = _column(records, key, what, file)
    for value in values:
        if type(value) is not int:
            raise UserError(f"{file}: {what} with {key} {value!r}: make it a whole number")
    return np.array(values, dtype=np.int64)


def _optional(
    annotations: list[dict[str, Any]],
    key: str,
    defaults: Shaped[np.ndarray, "N"],
    ids: Int[np.ndarray, "N"],
    file: Path,
) -> Shaped[np.ndarray, "N"]:
    """A number of each annotation, or its default where the annotation has none."""
    values = [annotation.get(key) for annotation in annotations]
    values = [default if value is None else value for value, default in zip(values, defaults.tolist(), strict=True)]
    for n, value in enumerate(values):
        if not isinstance(value, (int, float)):
            raise UserError(f"{file}: annotation {ids[n]} has {key} {value!r}: make it a number")
    return np.array(values)


def _check_unique(ids: Int[np.ndarray, "N"], what: str, file: Path) -> None:
    values, counts = np.unique(ids, return_counts=True)
    if (counts > 1).any():
        raise UserError(f"{file}: {what} id {values[counts > 1][0]} is given more than once: make the ids unique")


def _position(
    values: Int[np.ndarray, "N"], known: Int[np.ndarray, "M"], ids: Int[np.ndarray, "N"], what: str, file: Path
) -> Int[np.ndarray, "N"]:
    """Where each of the values stands among the known ids."""
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
    """The boxes ``x, y, width, height``, after checking that each makes sense in a picture of its size."""
    boxes = np.empty((len(annotations), 4))
    for n, box in enumerate(_column(annotations, "bbox", "annotation", file)):
        try:
            boxes[n] = box
        except (TypeError, ValueError):
            boxes[n] = np.nan
    bad = ~np.isfinite(boxes).all(1) | (boxes[:, 2:] < 0).any(1)
    if bad.any():
        first = np.flatnonzero(bad)[0]
        given = annotations[first]["bbox"]
        raise UserError(f"{file}: annotation {ids[first]} has bbox {given}: give [x, y, width, height] in pixels")
    outside = (boxes[:, :2] >= sizes[:, ::-1]).any(1) | (boxes[:, :2] + boxes[:, 2:] <= 0).any(1)
    outside &= (boxes[:, 2:] > 0).all(1)
    if outside.any():
        first = np.flatnonzero(outside)[0]
        height, width = sizes[first]
        raise UserError(
            f"{file}: annotation {ids[first]} of image {annotations[first]['image_id']} has bbox "
            f"{annotations[first]['bbox']}, wholly outside the picture of {width}x{height}: correct it"
        )
    return boxes
