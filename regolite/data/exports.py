"""Parsers for labeling tool exports in COCO, YOLO or Pascal VOC format.

They resolve file and class names only; :mod:`regolite.data.convert` fits the boxes to the image file. An invalid record
marks its image with a ``problem`` and affects no other image. The whole image is then unusable: training would treat a
lost object as background.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any
from xml.etree import ElementTree

import yaml  # a dependency of Accelerate

from regolite.data.coco import (
    OPTIONAL,
    class_name,
    is_box,
    is_number,
    outline_box,
    read_json,
    spellings,
    split_named,
)
from regolite.data.images import SUFFIXES
from regolite.errors import UserError
from regolite.utils.validation import shown

NO_LABELS = {"classes", "notes", "README.dataset", "README.roboflow"}  # other text files in the folders of labels
MOST_FRACTION = 2.0  # a YOLO box may extend beyond its image; larger numbers are pixels


@dataclass
class Object:
    """One object.

    Attributes:
        class_name: its class.
        corners: left, top, right, bottom, in pixels of the annotated size or in fractions of the image.
        outline: its segmentation in COCO format, or [].
        crowd: 1 for a region of many objects.
        area: COCO's ``area`` in pixels, or None.
    """

    class_name: str
    corners: tuple[float, float, float, float]
    outline: Any = field(default_factory=list)
    crowd: int = 0
    area: float | None = None


@dataclass
class Labeled:
    """An image file with its annotation.

    Attributes:
        path: the file.
        split: ``train``, ``val`` or ``test``, or None if unknown.
        source: the annotation file, for messages.
        size: annotated width and height in pixels, or None.
        objects: its objects.
        fractions: whether corners are fractions of the image's width and height.
        problem: why the annotation cannot be used, with the field; "" for a valid one.
    """

    path: Path
    split: str | None
    source: str
    size: tuple[int, int] | None = None
    objects: list[Object] = field(default_factory=list)
    fractions: bool = False
    problem: str = ""


@dataclass
class Export:
    """The content of an export.

    Attributes:
        form: the format, ``"COCO"``, ``"YOLO"`` or ``"Pascal VOC"``.
        images: the annotated image files.
        classes: names of all classes.
        problems: what was left out or corrected, with the file name.
        bad: records without a usable image file, and the reason.
    """

    form: str
    images: list[Labeled] = field(default_factory=list)
    classes: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)


def read_export(source: Path) -> Export:
    """Read a folder. The format is detected by file type.

    Raises:
        UserError: no images, no annotations, or a central file (JSON, ``data.yaml``) that cannot be read.
    """
    source = Path(os.path.abspath(source))
    files = [path for path in sorted(source.rglob("*")) if _is_visible(path.relative_to(source)) and path.is_file()]
    images = [path for path in files if path.suffix.lower() in SUFFIXES]
    if not images:
        raise UserError(f"{source} holds no images: looked for {', '.join(sorted(SUFFIXES))}")
    if any(path.suffix == ".xml" for path in files):
        return _read_voc(source, images)
    yamls = {path: names for path in files if path.suffix in (".yaml", ".yml") and (names := _names(path))}
    if yamls:
        return _read_yolo(source, images, yamls)
    jsons = [path for path in files if path.suffix == ".json" and _is_coco(read_json(path))]
    if jsons:
        return _read_coco(source, files, images, jsons)
    if any(path.suffix == ".txt" for path in files):
        there = [f"{_shown(path, source)} {_no_names(path)}" for path in files if path.suffix in (".yaml", ".yml")]
        why = "; ".join(there) or "has no data.yaml"
        fix = "give its class names, as in" if there else "add one with the line"
        raise UserError(f"{source} looks like YOLO, but {why}: {fix} names: [first, second]")
    raise UserError(
        f"{source} has images but no boxes: looked for COCO (*.json), YOLO (data.yaml, *.txt) and Pascal VOC (*.xml)"
    )


def _is_visible(path: Path) -> bool:
    """Whether a file is not hidden; macOS adds ``._a.jpg`` or ``__MACOSX/a.jpg`` to each image of an archive."""
    return not any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


# ------------------------------------------------------------------------------------------------------------- COCO


def _is_coco(content: Any) -> bool:
    lists = [content.get(key) for key in ("images", "annotations", "categories")] if isinstance(content, dict) else [0]
    return all(isinstance(records, list) for records in lists)


def _read_coco(source: Path, files: list[Path], images: list[Path], jsons: list[Path]) -> Export:
    export = Export("COCO")
    finder = _Finder(source, files)
    listed = 0
    for file in jsons:
        content = read_json(file)
        listed += len(content["images"])
        _read_coco_file(source, file, content, finder, export)
    if listed and not export.images and not export.bad:
        where = ", ".join(str(path.relative_to(source)) for path in jsons)
        raise UserError(
            f"{source}: none of the {listed} images that {where} lists is there: "
            f"{next(problem for problem in export.problems if problem.endswith('not there'))}"
        )
    lists: dict[Path, list[str]] = defaultdict(list)
    for image in export.images:
        lists[image.path].append(image.source)
    for image in export.images:
        times = len(lists[image.path])
        if times > 1 and not image.problem:
            sources = sorted(set(lists[image.path]))
            verb = "list" if len(sources) > 1 else "lists"
            image.problem = f"{' and '.join(sources)} {verb} it {times} times: list each file once"
    unlisted = [path for path in images if path not in lists]
    if unlisted:
        export.problems.append(f"{_some(unlisted, source)}: left out, no annotation file lists them")
    return export


def _read_coco_file(source: Path, file: Path, content: Mapping[str, Any], finder: _Finder, export: Export) -> None:
    where, split = file.relative_to(source).as_posix(), split_named(file.relative_to(source))
    classes = _categories(content["categories"], where, export)
    by_image: dict[Any, list[Any]] = defaultdict(list)
    for annotation in content["annotations"]:
        image_id = annotation.get("image_id") if isinstance(annotation, dict) else None
        by_image[image_id if _is_key(image_id) else None].append(annotation)
    ids = Counter(
        image.get("id") for image in content["images"] if isinstance(image, dict) and _is_key(image.get("id"))
    )
    for n, record in enumerate(content["images"], 1):
        name, number = (record.get(key) for key in ("file_name", "id")) if isinstance(record, dict) else (None, None)
        if not isinstance(name, str) or not name:
            why = f"its file_name is {name!r}: give the name of its file"
            export.bad.append((f"{where}, image {n} of the list", why))
            continue
        found = finder.find(name, file, split)
        if found is None:
            export.problems.append(f"{name}: left out, {where} lists it, but it is not there")
            continue
        if isinstance(found, str):
            export.bad.append((name, f"{where} lists it, and {found}"))
            continue
        image = Labeled(found, split or split_named(found.relative_to(source).parent), where)
        export.images.append(image)
        try:
            if not _is_key(number) or ids[number] > 1:
                raise _BadRecord(
                    f"image has id {number!r}, which is missing or not unique: give every image its own id"
                )
            image.size = _size(record.get("width"), record.get("height"), number)
            image.objects = [_coco_object(annotation, classes) for annotation in by_image.get(number, [])]
        except _BadRecord as error:
            image.problem = f"{where}: {error}"
    for image_id in [key for key in by_image if key not in ids]:
        first = by_image[image_id][0]
        which = f"annotation {first.get('id')!r}" if isinstance(first, dict) else repr(first)
        more = f" and {len(by_image[image_id]) - 1} more" if len(by_image[image_id]) > 1 else ""
        given = first.get("image_id") if isinstance(first, dict) else None
        why = f"image_id {given!r} is the id of no image: add the image, or take the annotation out"
        export.bad.append((f"{where}, {which}{more}", why))


class _BadRecord(ValueError):
    """A record that cannot be used; the message gives the reason."""


def _is_key(value: Any) -> bool:
    """Whether a value can be an id: text or a finite number, of any size."""
    return isinstance(value, str) or (type(value) in (int, float) and not (isinstance(value, float) and value != value))


def _categories(records: list[Any], where: str, export: Export) -> dict[Any, str]:
    """Class names by category id."""
    classes: dict[Any, str] = {}
    ids_of: dict[str, list[Any]] = defaultdict(list)
    for n, record in enumerate(records, 1):
        number, name = (record.get("id"), class_name(record)) if isinstance(record, dict) else (None, None)
        if name is None or not _is_key(number):
            raise UserError(f"{where}: category {n} of the list is {record!r}: give it an id and a name")
        if classes.get(number, name) != name:
            raise UserError(f"{where}: category id {number!r} is both {classes[number]!r} and {name!r}: name one")
        if number not in classes:
            ids_of[name].append(number)
        classes[number] = name
    for name, ids in ids_of.items():
        if len(ids) > 1:
            numbers = " and ".join(map(repr, ids))
            export.problems.append(f"{where}: categories {numbers} are all called {name!r}: taken as one class")
    export.classes |= set(classes.values())
    return classes


def _size(width: Any, height: Any, number: Any) -> tuple[int, int] | None:
    """The annotated size of an image, or None if the export has none."""
    if all(side is None or (type(side) in (int, float) and side == 0) for side in (width, height)):
        return None
    for side, value in (("width", width), ("height", height)):
        if not is_number(value) or value < 1 or value != int(value):
            raise _BadRecord(f"image {number!r} has {side} {value!r}: give that of the file, in pixels")
    return int(width), int(height)


def _coco_object(annotation: Any, classes: Mapping[Any, str]) -> Object:
    """Parse a COCO annotation."""
    if not isinstance(annotation, dict):
        raise _BadRecord(f"annotation {annotation!r} is not a record: make it an object with bbox and category_id")
    which = f"annotation {annotation.get('id')!r}"
    category, box = annotation.get("category_id"), annotation.get("bbox")
    outline = annotation.get("segmentation") or []
    if not _is_key(category) or category not in classes:
        raise _BadRecord(f"{which} has category_id {category!r}, which no category has: add the category or correct it")
    if box in (None, []):
        box = outline_box(outline)
        if box is None:
            raise _BadRecord(f"{which} has neither bbox nor a segmentation to take it from: give [x, y, width, height]")
    if not is_box(box):
        raise _BadRecord(f"{which} has bbox {box!r}: give [x, y, width, height] in pixels")
    fields = {key: annotation.get(key) for key in ("area", "iscrowd")}
    for key, value in fields.items():
        is_valid, valid = OPTIONAL[key]
        if value is not None and not is_valid(value):
            raise _BadRecord(f"{which} has {key} {value!r}: make it {valid}")
    x, y, width, height = map(float, box)
    area = None if fields["area"] is None else float(fields["area"])
    return Object(classes[category], (x, y, x + width, y + height), outline, int(fields["iscrowd"] or 0), area)


class _Finder:
    """Resolves a ``file_name`` to a file of the export."""

    def __init__(self, source: Path, files: Iterable[Path]) -> None:
        self.source, self.files = source, set(files)
        self.by_name: dict[str, list[Path]] = defaultdict(list)
        for path in self.files:
            self.by_name[path.name.casefold()].append(path)

    def find(self, name: str, file: Path, split: str | None) -> Path | str | None:
        """Find the file; a string explains an ambiguous name, None means no file.

        A path relative to the folder of the JSON file comes first. Otherwise the file with the longest common path
        suffix wins, one that differs in upper and lower case last. Ties are broken by folder: one named after the split
        or the JSON file, then a folder of images, then one near the JSON file. Folders named after another split are
        not searched.
        """
        for spelled in spellings(name):
            path = Path(os.path.normpath(file.parent / spelled))
            if path in self.files:
                return path
        candidates = []
        for spelled in spellings(name):
            parts = PurePosixPath(spelled).parts
            for path in self.by_name.get(parts[-1].casefold(), []) if parts else []:
                shared = _shared_tail(parts, path.relative_to(self.source).parts)
                base = Path(*path.relative_to(self.source).parts[:-shared])
                if split is None or split_named(base) in (None, split):
                    candidates.append((path.name != parts[-1], -shared, self._rank(base, file, split), path))
        least = min((candidate[:3] for candidate in candidates), default=None)
        best = {path for *rank, path in candidates if tuple(rank) == least}
        if len(best) > 1:
            places = " and in ".join(sorted(path.parent.relative_to(self.source).as_posix() for path in best))
            return f"files of this name are in {places}: write the folder into file_name"
        return best.pop() if best else None

    def _rank(self, base: Path, file: Path, split: str | None) -> int:
        """Rank of a candidate folder, 0 the most likely."""
        own = file.parent.relative_to(self.source)
        if split_named(base) == split is not None or base.name in re.split(r"[_.-]", file.stem):
            return 0
        if base.name in ("images", "JPEGImages"):
            return 1
        return 2 if own in (base, *base.parents) else 3


def _shared_tail(one: tuple[str, ...], other: tuple[str, ...]) -> int:
    """Length of the common suffix of two paths, in parts; upper and lower case are alike."""
    pairs = zip(reversed(one), reversed(other))
    return next((n for n, (a, b) in enumerate(pairs) if a.casefold() != b.casefold()), min(len(one), len(other)))


# ------------------------------------------------------------------------------------------- YOLO and Pascal VOC


def _read_yolo(source: Path, images: list[Path], yamls: Mapping[Path, Any]) -> Export:
    export = Export("YOLO")
    labels = _label_files(source, images, ("labels",), ".txt", export)
    tables: dict[Path, tuple[dict[int, str], int, str]] = {}
    for path, label in labels.items():
        image = Labeled(
            path, split_named(path.parent.relative_to(source)), _shown(label or path, source), fractions=True
        )
        nearest = max(yamls, key=lambda file: len(os.path.commonpath([file, path])))
        if nearest not in tables:
            tables[nearest] = (*_table(nearest, yamls[nearest], export), nearest.name)
        export.images.append(image)
        try:
            lines = label.read_text("utf-8-sig").splitlines() if label else []
            for n, line in enumerate(lines, 1):
                if line.split():
                    image.objects.append(_yolo_object(line, *tables[nearest], f"line {n}"))
        except (_BadRecord, UnicodeDecodeError, OSError) as error:
            image.problem = f"{image.source}: {error}"
    return export


def _names(path: Path) -> Any:
    """The class names and the keypoint shape in a YOLO data file; None for any other YAML file."""
    try:
        content = _read_yaml(path)
    except ValueError:
        return None
    names = content.get("names") if isinstance(content, dict) else None
    return (names, content.get("kpt_shape")) if names else None


def _no_names(path: Path) -> str:
    """Why a YAML file gives no class names."""
    try:
        _read_yaml(path)
    except ValueError as error:
        return str(error)
    return "names no classes"


class _YamlLoader(yaml.BaseLoader):
    """Keeps all values as text: other loaders read the class ``no`` as False and 007 as 7. Refuses repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for key, count in keys.items():
            if count > 1:
                raise yaml.MarkedYAMLError(problem=f"key {key!r} is given {count} times", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> Any:
    """The content of a YAML file.

    Raises:
        ValueError: the file cannot be read; the message gives the reason.
    """
    try:
        return yaml.load(path.read_text("utf-8-sig"), Loader=_YamlLoader)
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"cannot be read ({' '.join(str(error).split())})") from error
    except RecursionError:
        raise ValueError("is nested too deeply") from None


def _table(file: Path, content: tuple[Any, Any], export: Export) -> tuple[dict[int, str], int]:
    """Class names by number, and the number of keypoint values after a box.

    Raises:
        UserError: the names are neither a list nor a mapping from whole numbers, or the keypoint shape is invalid.
    """
    names, shape = content
    if isinstance(names, list):
        names = dict(enumerate(names))
    try:
        table = {int(number): name for number, name in names.items()}
        if len(table) < len(names) or not all(isinstance(name, str) and name.strip() for name in table.values()):
            raise ValueError
    except (AttributeError, ValueError):
        raise UserError(
            f"{file} has names {shown(names)}: write names: [first, second], one name for each class"
        ) from None  # shown: with YAML aliases (&a, *a) a small file can hold a list of billions
    try:
        keypoints = math.prod(map(int, shape)) if shape is not None else 0
    except (TypeError, ValueError):
        raise UserError(f"{file} has kpt_shape {shown(shape)}: write [number of keypoints, 2 or 3]") from None
    for name, count in Counter(table.values()).items():
        if count > 1:
            numbers = " and ".join(str(number) for number, other in table.items() if other == name)
            export.problems.append(f"{file.name}: classes {numbers} are all called {name!r}: taken as one class")
    export.classes |= set(table.values())
    return table, keypoints


def _yolo_object(line: str, table: Mapping[int, str], keypoints: int, named_in: str, which: str) -> Object:
    """Parse a line ``class x y width height``, or a polygon ``class x y x y x y ...``."""
    try:
        number, *values = map(float, line.split())
    except ValueError:
        raise _BadRecord(f"{which} is {line[:60]!r}: write numbers: class x y width height") from None
    if not number.is_integer() or int(number) not in table:
        raise _BadRecord(
            f"{which} has class {line.split()[0]}, which {named_in} does not name: add a name or correct it"
        )
    if len(values) < 4:
        raise _BadRecord(f"{which} is {line[:60]!r}: write class x y width height")
    if len(values) in (4, 5, 4 + keypoints):  # a fifth number is a confidence
        x, y, width, height = values[:4]
        corners = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
        if width < 0 or height < 0:
            raise _BadRecord(f"{which} has width {width} and height {height}: give none below 0")
    else:
        xs, ys = values[: len(values) // 2 * 2 : 2], values[1::2]
        corners = (min(xs), min(ys), max(xs), max(ys))
    if not all(abs(value) <= MOST_FRACTION for value in corners):
        raise _BadRecord(
            f"{which} is {line[:60]!r}, no fractions of the image's width and height: divide pixels by these"
        )
    return Object(table[int(number)], corners)


def _read_voc(source: Path, images: list[Path]) -> Export:
    export = Export("Pascal VOC")
    labels = _label_files(source, images, ("Annotations", "annotations", "labels", "xml"), ".xml", export)
    sets = {label.parent for label in labels.values() if label}
    splits = {folder: _image_sets(folder.parent / "ImageSets" / "Main") for folder in sets}
    homes = {path.parent: label.parent for path, label in labels.items() if label}
    unused = []
    for path, label in labels.items():
        chosen = splits.get(homes.get(path.parent, path), {})
        if chosen and path.stem not in chosen:
            unused.append(path)
            continue
        split = chosen.get(path.stem) or split_named(path.parent.relative_to(source))
        image = Labeled(path, split, _shown(label or path, source))
        export.images.append(image)
        try:
            if label:
                _fill_voc(image, ElementTree.parse(label).getroot())
        except (ElementTree.ParseError, LookupError, ValueError, OSError) as error:  # LookupError: unknown encoding
            image.problem = f"{image.source}: {error}"
        if not image.problem:
            export.classes |= {one.class_name for one in image.objects}
    if unused:
        export.problems.append(f"{_some(unused, source)}: left out, no list in ImageSets/Main names them")
    return export


def _fill_voc(image: Labeled, root: ElementTree.Element) -> None:
    """Parse the size and the objects of an image."""
    if root.tag != "annotation":
        raise _BadRecord(f"its first tag is {root.tag}, not annotation: export it as Pascal VOC")
    texts = (root.findtext(f"size/{side}") for side in ("width", "height"))
    width, height = (_voc_number(text, "size") if text and text.strip() else None for text in texts)
    image.size = _size(width, height, image.path.name)
    for n, one in enumerate(root.findall("object"), 1):
        name = (one.findtext("name") or "").strip()
        which = f"object {n} ({name})"
        if not name:
            raise _BadRecord(f"object {n} has no name: give that of its class")
        box, polygon = one.find("bndbox"), one.find("polygon")
        if box is not None:
            left, top, right, bottom = (
                _voc_number(box.findtext(key), f"{which} has {key}") for key in ("xmin", "ymin", "xmax", "ymax")
            )
        elif polygon is not None:
            values = [
                (e.tag[0], _voc_number(e.text, f"{which} has {e.tag}")) for e in polygon.iter() if e.tag[0] in "xy"
            ]
            xs, ys = ([value for axis, value in values if axis == wanted] for wanted in "xy")
            if len(xs) < 3 or len(ys) != len(xs):
                raise _BadRecord(f"{which} has a polygon of {len(xs)} points: give at least 3, or a bndbox")
            left, top, right, bottom = min(xs), min(ys), max(xs) - 1, max(ys) - 1
        else:
            others = ", ".join(sorted({e.tag for e in one} - {"name", "pose", "truncated", "difficult"})) or "nothing"
            raise _BadRecord(
                f"{which} has no bndbox, but {others}: give xmin, ymin, xmax, ymax (rotated boxes are not read)"
            )
        if right < left or bottom < top:
            raise _BadRecord(f"{which} has a bndbox whose xmax or ymax lies before xmin or ymin: exchange them")
        image.objects.append(
            Object(name, (left - 1, top - 1, right, bottom))
        )  # pixels count from 1, both ends included


def _voc_number(text: str | None, which: str) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not is_number(value):
        raise _BadRecord(f"{which} {text!r}: give a number of pixels")
    return value


def _image_sets(folder: Path) -> dict[str, str]:
    """The split of each file stem in Pascal VOC's image sets."""
    splits = {}
    for split in ("trainval", "train", "val", "test"):  # later ones are more specific
        if (folder / f"{split}.txt").is_file():
            for line in (folder / f"{split}.txt").read_text("utf-8-sig").splitlines():
                if line.split():
                    splits[line.split()[0]] = "train" if split == "trainval" else split
    return splits


def _label_files(
    source: Path, images: list[Path], names: tuple[str, ...], suffix: str, export: Export
) -> dict[Path, Path | None]:
    """The label file of each image, or None for an image without one (a background image).

    A val or test folder without any label file is left out as unlabeled. Everything left out is listed in
    ``export.problems``.
    """
    by_folder: dict[Path, list[Path]] = defaultdict(list)
    for path in images:
        by_folder[path.parent].append(path)
    homes = {folder: _label_folder(folder, paths, source, names, suffix) for folder, paths in by_folder.items()}
    if not any(homes.values()):
        raise UserError(f"{source} has {export.form} annotations but no image that belongs to them: add the images")
    there = {home: {path.stem: path for path in home.glob(f"*{suffix}")} for home in homes.values() if home}
    found = {path: there[home].get(path.stem) if (home := homes[path.parent]) else None for path in images}
    claims: dict[Path, list[Path]] = defaultdict(list)
    for path, label in found.items():
        if label:
            claims[label].append(path)
    for home in sorted(there):
        stray = [stem for stem, path in there[home].items() if path not in claims and stem not in NO_LABELS]
        export.problems += [f"{stem}{suffix}: left out, there is no image of this name" for stem in sorted(stray)]
    others: set[Path] = set()  # images of the same name as the annotated one, as masks have
    refused: set[Path] = set()
    for label, paths in claims.items():
        distances = [_distance(path, label, source) for path in paths]
        owners = [path for path, distance in zip(paths, distances) if distance == min(distances)]
        others |= set(paths) - set(owners)
        if len(owners) > 1:
            both = " and ".join(_shown(path, source) for path in owners)
            export.bad.append((both, f"both would take {_shown(label, source)}: give one another name"))
            refused |= set(owners)
    for folder, paths in by_folder.items():
        empty = [path for path in paths if found[path] is None]
        masks = [path for path in paths if path in others]
        if masks:
            export.problems.append(f"{_some(masks, source)}: left out, their annotations are those of other images")
        if not empty:
            continue
        if any(found[path] and path not in others for path in paths):
            first = min(path.stem for path in empty)
            export.problems.append(f"{first} and {len(empty) - 1} more images have no annotation file: taken as empty")
        elif masks or split_named(folder.relative_to(source)) in ("val", "test"):
            export.problems.append(f"{_some(empty, source)}: left out, they have no annotation files")
            others |= set(empty)
        else:
            export.problems.append(f"{_some(empty, source)}: no annotation files: taken as empty, as background")
    left_out = others | refused
    return {path: label for path, label in found.items() if path not in left_out}


def _label_folder(folder: Path, images: list[Path], source: Path, names: tuple[str, ...], suffix: str) -> Path | None:
    """The label folder of an image folder: itself, a sibling, or the same path with ``images`` replaced."""
    parts = list(folder.parts)
    candidates = [folder, *(folder.parent / name for name in names), *(folder / name for name in names)]
    for n, part in enumerate(parts):
        if part in ("images", "JPEGImages"):
            candidates += [Path(*parts[:n], name, *parts[n + 1 :]) for name in names]
    stems = {path.stem for path in images}
    filled = []
    for candidate in candidates:
        if candidate.is_dir() and candidate.is_relative_to(source):
            labels = {path.stem for path in candidate.glob(f"*{suffix}")} - NO_LABELS
            if labels & stems:
                return candidate
            filled += [candidate] if labels else []
    return filled[0] if filled else None


def _distance(image: Path, label: Path, source: Path) -> int:
    """Distance of an image from its annotation: 0 in the same folder, 1 in a folder named after images, 2 elsewhere."""
    if image.parent == label.parent:
        return 0
    return 1 if {"images", "JPEGImages"} & set(image.relative_to(source).parts) else 2


def _shown(path: Path, source: Path) -> str:
    return path.relative_to(source).as_posix()


def _some(paths: list[Path], source: Path) -> str:
    """The first of several files, and the number of the others."""
    more = f" and {len(paths) - 1} more images" if len(paths) > 1 else ""
    return f"{_shown(paths[0], source)}{more}"
