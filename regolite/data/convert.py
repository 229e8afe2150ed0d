"""One's own data: a folder with boxes in COCO, YOLO or Pascal VOC form becomes a data folder of ours.

Labelling tools export one of these three; supervision reads them all. What the converted folder holds is COCO's form
(``DIR/train``, ``DIR/val``, ``DIR/annotations``), which is what everything here opens; the outlines of a COCO export
are kept, since objects can be cut out along them (:mod:`regolite.data.paste`). What is wrong with single boxes
or pictures is mended or left out, and listed by file name.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps

from regolite.data.coco import read_picture
from regolite.errors import UserError

if TYPE_CHECKING:
    from supervision import DetectionDataset

PICTURES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
ORIENTATION = 0x0112  # EXIF's tag for how a camera was held


@dataclass
class Conversion:
    """What was converted.

    Attributes:
        form: ``"COCO"``, ``"YOLO"`` or ``"Pascal VOC"``.
        classes: names of the classes by label.
        pictures: number of pictures of each split.
        objects: number of objects of each class, split by split.
        problems: what was mended or left out, with the file's name.
    """

    form: str
    classes: list[str]
    pictures: dict[str, int] = field(default_factory=dict)
    objects: dict[str, dict[str, int]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """A table of the classes, and the problems."""
        names = list(self.pictures)
        wide = max(len(name) for name in [*self.classes, "pictures"])
        rows = [f"{self.form}, {len(self.classes)} classes", f"{'':{wide}}" + "".join(f"{name:>8}" for name in names)]
        rows.append(f"{'pictures':{wide}}" + "".join(f"{self.pictures[name]:8}" for name in names))
        for one in self.classes:
            rows.append(f"{one:{wide}}" + "".join(f"{self.objects[name].get(one, 0):8}" for name in names))
        return "\n".join([*rows, *(f"! {problem}" for problem in self.problems)])


def convert(source: str | Path, output: str | Path, val: float = 0.2, seed: int = 0) -> Conversion:
    """Convert a folder of pictures and boxes.

    The form is recognised by its files: XML files are Pascal VOC's, a ``data.yaml`` with the ``names`` of the classes
    is YOLO's, JSON files with ``images``, ``annotations`` and ``categories`` are COCO's. Splits are recognised by
    folders (or files) named train, val or valid, test, and by Pascal VOC's ``ImageSets/Main``.

    Args:
        source: the folder.
        output: the folder to make.
        val: share of the pictures that are held out for validation, where the source has no validation split.
        seed: of that choice.

    Raises:
        UserError: when the source or a form is missing, the output exists, an annotation file cannot be read, or
            nothing is left.
    """
    source, output = Path(source), Path(output)
    if not source.is_dir():
        raise UserError(f"{source} is no folder: give the folder that your labelling tool has exported")
    if output.exists() and any(output.iterdir()):
        raise UserError(f"{output} exists already: give a folder that can be made anew")
    if not 0 < val < 1:
        raise UserError(f"val={val} must lie between 0 and 1: it is the share of pictures held out")
    with warnings.catch_warnings():  # it warns that OpenCV is missing, and does well without
        warnings.simplefilter("ignore", UserWarning)
        from supervision import DetectionDataset
    form, parts = _find(source)
    if not parts:
        raise UserError(f"{source} has {form} annotations but no picture that belongs to them: add the pictures")
    problems: list[str] = []
    try:
        read = {
            split: DetectionDataset.merge(list(sets)) for split, sets in _read(source, form, parts, problems).items()
        }
        # Merged, all parts have the same classes in the same order; each keeps its own pictures.
        whole = DetectionDataset.merge(list(read.values()))
    except UserError:
        raise
    except Exception as error:  # its readers raise nearly anything on a broken file
        raise UserError(f"{source} cannot be read as {form}: {error}") from error
    splits = {split: sorted(part.image_paths) for split, part in read.items()}
    if not {"train", "val"} <= set(splits):
        own = splits.pop("train", None) or splits.pop("val", [])
        held = set(random.Random(seed).sample(own, max(1, round(val * len(own))) if own else 0))
        splits |= {"train": [path for path in own if path not in held], "val": sorted(held)}
    if not splits["train"]:
        raise UserError(f"{source} has {len(whole)} pictures: too few to train on some and hold out others")
    if not any(len(whole.annotations[path]) for path in splits["train"]):
        raise UserError(f"{source} has no box in a training picture: there is nothing to learn from")
    done = Conversion(form, list(whole.classes), problems=problems)
    for split in sorted(splits, key=["train", "val", "test"].index):
        _write(DetectionDataset, whole, splits[split], output, split, done)
    return done


def _find(source: Path) -> tuple[str, list[tuple[str, Path, Path]]]:
    """The form, and its parts: split, folder of the pictures, folder or file of the annotations."""
    folders = sorted({path.parent for path in source.rglob("*") if path.suffix.lower() in PICTURES})
    if not folders:
        raise UserError(f"{source} holds no pictures: looked for {', '.join(sorted(PICTURES))}")
    if any(source.rglob("*.xml")):
        beside = ("Annotations", "annotations", "labels", "xml")
        pairs = [(_split(f, source), f, _partner(f, beside, "*.xml")) for f in folders]
        return "Pascal VOC", [(split, f, g) for split, f, g in pairs if g]
    if any(_names(path) for path in source.rglob("*.y*ml")):
        pairs = [(_split(f, source), f, _partner(f, ("labels",), "*.txt")) for f in folders]
        return "YOLO", [(split, f, g) for split, f, g in pairs if g]
    found = [path for path in sorted(source.rglob("*.json")) if _is_coco(path)]
    if found:
        return "COCO", [(_split(path, source), _pictures_of(path, folders), path) for path in found]
    if any(source.rglob("*.txt")):
        raise UserError(f"{source} looks like YOLO, but has no data.yaml: add one with the line names: [first, second]")
    raise UserError(
        f"{source} has pictures but no boxes: looked for COCO (*.json), YOLO (data.yaml, *.txt) and Pascal VOC (*.xml)"
    )


def _split(path: Path, source: Path) -> str:
    """The split that a folder or file is named after, train where it has no such name."""
    words = path.relative_to(source).as_posix().lower().replace("2017", "")
    for word in reversed(re.split(r"[/_.-]", words)):
        if word in SPLITS:
            return SPLITS[word]
    return "train"


def _partner(folder: Path, names: tuple[str, ...], pattern: str) -> Path | None:
    """The folder of the annotations of a folder of pictures: itself, a sibling, or one where images became labels."""
    parts = list(folder.parts)
    candidates = [folder, *(folder.parent / name for name in names), *(folder / name for name in names)]
    for n, part in enumerate(parts):
        if part in ("images", "JPEGImages"):
            candidates += [Path(*parts[:n], name, *parts[n + 1 :]) for name in names]
    return next((c for c in candidates if c.is_dir() and any(c.glob(pattern))), None)


def _names(path: Path) -> Any:
    """The names of the classes in a YAML file of YOLO's, or None."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        return None
    return content.get("names") if isinstance(content, dict) else None


def _is_coco(path: Path) -> bool:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): export it again") from error
    lists = (content.get(key) for key in ("images", "annotations", "categories")) if isinstance(content, dict) else ()
    return bool(lists) and all(isinstance(records, list) for records in lists)


def _pictures_of(path: Path, folders: list[Path]) -> Path:
    """The folder that holds the most of the pictures that a COCO file lists."""
    names = [Path(record["file_name"]) for record in json.loads(path.read_bytes())["images"]]
    return max(folders, key=lambda folder: sum((folder / name).is_file() for name in names))


def _read(
    source: Path, form: str, parts: list[tuple[str, Path, Path]], problems: list[str]
) -> dict[str, list[DetectionDataset]]:
    """What supervision reads of each part, by split."""
    from supervision import DetectionDataset

    read: dict[str, list[DetectionDataset]] = {}
    for split, pictures, boxes in parts:
        if form == "COCO":
            with tempfile.TemporaryDirectory() as folder:
                file = _readable(boxes, pictures, Path(folder) / "annotations.json", problems)
                found = {split: DetectionDataset.from_coco(str(pictures), str(file))}
            _attach_outlines(found[split], boxes, pictures)
        elif form == "YOLO":
            files = [path for path in sorted(source.rglob("*.y*ml")) if _names(path)]
            names = max(files, key=lambda path: len(os.path.commonpath([path, pictures])))  # the nearest
            found = {split: DetectionDataset.from_yolo(str(pictures), str(boxes), str(names))}
            _report_orphans(pictures, boxes, "*.txt", problems)
        else:
            found = DetectionDataset.from_pascal_voc(str(pictures), str(boxes))
            found = _image_sets(found, boxes.parent / "ImageSets" / "Main") or {split: found}
            _report_orphans(pictures, boxes, "*.xml", problems)
        for name, part in found.items():
            read.setdefault(name, []).append(part)
    return read


def _readable(file: Path, pictures: Path, target: Path, problems: list[str]) -> Path:
    """Write a COCO file without pictures that are missing, and without outlines, which would be drawn as masks."""
    content = json.loads(file.read_bytes())
    missing = {
        image["id"]: image["file_name"] for image in content["images"] if not (pictures / image["file_name"]).is_file()
    }
    problems += [f"{name}: left out, {file.name} lists it, but it is not there" for name in missing.values()]
    content["images"] = [image for image in content["images"] if image["id"] not in missing]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] not in missing and a.get("bbox")]
    for annotation in content["annotations"]:
        annotation.pop("segmentation", None)
    target.write_text(json.dumps(content), encoding="utf-8")
    return target


def _attach_outlines(found: DetectionDataset, file: Path, pictures: Path) -> None:
    """Give each box the outline that a COCO file has for it; supervision would make masks of them all, in memory."""
    content = json.loads(file.read_bytes())
    paths = {image["id"]: str((pictures / image["file_name"]).resolve()) for image in content["images"]}
    outlines: dict[str, list[Any]] = {}
    for annotation in content["annotations"]:
        if annotation.get("bbox"):
            outlines.setdefault(paths[annotation["image_id"]], []).append(annotation.get("segmentation") or [])
    for path, boxes in found.annotations.items():
        if len(boxes):
            boxes.data["outline"] = np.fromiter(outlines[path], dtype=object, count=len(boxes))


def _report_orphans(pictures: Path, annotations: Path, pattern: str, problems: list[str]) -> None:
    """Name the annotation files that belong to no picture, and count the pictures without annotations."""
    stems = {path.stem for path in pictures.iterdir() if path.suffix.lower() in PICTURES}
    noted = {path.stem for path in annotations.glob(pattern)} - {
        "classes",
        "notes",
        "README.dataset",
        "README.roboflow",
    }
    problems += [f"{stem}{pattern[1:]}: left out, there is no picture of this name" for stem in sorted(noted - stems)]
    if stems - noted:
        first = min(stems - noted)
        problems.append(f"{first} and {len(stems - noted) - 1} more pictures have no annotation file: taken as empty")


def _image_sets(found: DetectionDataset, folder: Path) -> dict[str, DetectionDataset]:
    """The splits that Pascal VOC keeps as lists of names."""
    splits = {}
    for name in ("train", "val", "test"):
        if (folder / f"{name}.txt").is_file():
            stems = {
                line.split()[0] for line in (folder / f"{name}.txt").read_text("utf-8").splitlines() if line.split()
            }
            chosen = {path: found.annotations[path] for path in found.image_paths if Path(path).stem in stems}
            splits[name] = type(found)(classes=found.classes, images=list(chosen), annotations=chosen)
    return splits


def _write(
    kind: type[DetectionDataset], whole: DetectionDataset, paths: list[str], output: Path, split: str, done: Conversion
) -> None:
    """Write the pictures and annotations of a split."""
    folder = output / split
    folder.mkdir(parents=True)
    annotations, counts = {}, Counter()
    for path in paths:
        name = Path(path).name
        try:
            picture = read_picture(path)
        except UserError as error:
            done.problems.append(f"{name}: left out, {error}")
            continue
        target = str(folder / name)
        if target in annotations:
            raise UserError(f"two pictures of split {split} are called {name}: give each a name of its own")
        picture, turned = _copy(Path(path), picture, Path(target))
        boxes = whole.annotations[path]
        if turned:  # outlines are those of the stored pixels
            boxes.data.pop("outline", None)
        limits = np.array([picture.width, picture.height] * 2)
        clipped = boxes.xyxy.clip(0, limits)
        kept = (clipped[:, 2:] - clipped[:, :2] > 0).all(1)
        if (~kept).any():
            done.problems.append(f"{name}: left out {int((~kept).sum())} boxes without area in the picture")
        moved = int((np.abs(clipped - boxes.xyxy)[kept] > 1).any(1).sum())
        if moved:
            done.problems.append(f"{name}: cut {moved} boxes at the picture's edge")
        boxes.xyxy = clipped
        annotations[target] = boxes[kept]
        counts.update(whole.classes[label] for label in annotations[target].class_id)
    written = kind(classes=whole.classes, images=list(annotations), annotations=annotations)
    file = output / "annotations" / f"instances_{split}.json"
    written.as_coco(annotations_path=str(file))
    _write_outlines(file, [boxes.data.get("outline", [[]] * len(boxes)) for boxes in annotations.values()])
    done.pictures[split], done.objects[split] = len(annotations), dict(counts)


def _write_outlines(file: Path, by_image: Iterable[Iterable[Any]]) -> None:
    """Add the outlines to a file of annotations, which lists the boxes image by image in the same order."""
    outlines = list(chain.from_iterable(by_image))
    if any(outlines):
        content = json.loads(file.read_bytes())
        for annotation, outline in zip(content["annotations"], outlines, strict=True):
            annotation["segmentation"] = outline
        file.write_text(json.dumps(content), encoding="utf-8")


def _copy(path: Path, picture: Image.Image, target: Path) -> tuple[Image.Image, bool]:
    """Copy a picture; one that a camera held sideways is stored upright, as labelling tools show it.

    Returns:
        The picture as it is stored, and whether it was turned.
    """
    with Image.open(path) as original:
        turned = original.getexif().get(ORIENTATION, 1) != 1
        if turned:
            picture = ImageOps.exif_transpose(original).convert("RGB")
            picture.save(target, quality=95)
    if not turned:
        shutil.copyfile(path, target)
    return picture, turned
