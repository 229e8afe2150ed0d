"""Two small public datasets: download them from GitHub, verify every file, and convert them to a COCO-format folder.

``cards`` has Pascal VOC labels, ``aquarium`` YOLO labels. Each is taken from one commit of a repository; the size and
the SHA-256 of every file of that commit are listed in ``sources/NAME.csv``, one line for each image and its labels. A
file counts as downloaded once its SHA-256 is right, so an interrupted download continues with the same command.

The originals are kept in ``DIR/source`` under their paths in the repository. Files that are already there, from a clone
for example, are not downloaded again.
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import os
import threading
import urllib.parse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from regolite.data import prepare
from regolite.data.images import read_image
from regolite.errors import UserError
from regolite.utils.files import write_atomic
from regolite.utils.lock import locked
from regolite.utils.progress import Status, track

MIRROR = "https://raw.githubusercontent.com"
SPLITS = ("train", "val", "test")
LISTS = Path(__file__).with_name("sources")
CONNECTIONS = 8
ATTEMPTS = 5  # per file, within half a minute; received data is kept for the next attempt


@dataclass(frozen=True)
class Source:
    """A public dataset in a GitHub repository.

    Attributes:
        about: what the dataset shows.
        repository: ``OWNER/NAME``.
        commit: the commit to download.
        folder: the folder in the repository.
        license: name of the license.
        license_url: address of its text.
        license_note: where the license is stated.
        attribution: the authors, and the origin of the dataset.
        splits: how the splits were made.
        classes: names of the classes in the order of their labels.
        labels: suffix of the label files, a key of ``READERS``.
        side: the longer side of converted images in pixels, at most.
        quality: JPEG quality of converted images.
    """

    about: str
    repository: str
    commit: str
    folder: str
    license: str
    license_url: str
    license_note: str
    attribution: str
    splits: str
    classes: tuple[str, ...]
    labels: str
    side: int
    quality: int

    def __str__(self) -> str:
        """Source, license and attribution, one per line."""
        return (
            f"Source: https://github.com/{self.repository}/tree/{self.commit}/{self.folder}\n"
            f"License: {self.license} ({self.license_url}), {self.license_note}\n"
            f"Attribution: {self.attribution}"
        )


SOURCES = {
    "cards": Source(
        about="Photographs of playing cards (nine to ace of a Pinochle deck) on a table.",
        repository="EdjeElectronics/TensorFlow-Object-Detection-API-Tutorial-Train-Multiple-Objects-Windows-10",
        commit="c1645825822622fc75919b6be253779d49678f55",
        folder="images",
        license="Apache-2.0",
        license_url="https://www.apache.org/licenses/LICENSE-2.0",
        license_note="the license of the repository, which has no separate statement about the images",
        attribution="Evan Juras (EdjeElectronics), who took and labeled the photographs",
        splits="test is the published test set; val is a fixed selection of 48 of the 296 published training images",
        classes=("nine", "ten", "jack", "queen", "king", "ace"),
        labels=".xml",
        side=480,
        quality=85,
    ),
    "aquarium": Source(
        about="Photographs of animals in two aquariums, the Henry Doorly Zoo (Omaha) and the National Aquarium "
        "(Baltimore); version raw-1024.",
        repository="Chandra0804/Underwater-Object-Detection-YOLO-V8",
        commit="a54dbe6961dd8cea077fe673ef9e50f779a46afb",
        folder="aquarium_pretrain",
        license="CC BY 4.0",
        license_url="https://creativecommons.org/licenses/by/4.0/",
        license_note="stated in README.dataset.txt of that folder",
        attribution="Roboflow, https://public.roboflow.ai/object-detection/aquarium",
        splits="as published; the published valid is val",
        classes=("fish", "jellyfish", "penguin", "puffin", "shark", "starfish", "stingray"),
        labels=".txt",
        side=512,
        quality=82,
    ),
}

# The label of each object, and its box xyxy as fractions of the image's width and height.
Labels = Iterator[tuple[int, tuple[float, float, float, float]]]


class File(NamedTuple):
    """A file of a source: its path in the source's folder, its size in bytes, its SHA-256."""

    path: str
    size: int
    sha256: str


class Example(NamedTuple):
    """An image of a source with its labels, and the split that it belongs to."""

    split: str
    image: File
    labels: File


def fetch_dataset(name: str, root: str | os.PathLike[str], mirror: str = MIRROR) -> None:
    """Download a public dataset and convert it: ``images/``, ``annotations/instances_{train,val,test}.json``.

    Files in ``root/source`` with the right SHA-256 are not downloaded again. Files are written atomically, so after an
    interruption the same call continues.

    Args:
        name: ``cards`` or ``aquarium``.
        root: the data folder; it is created if necessary.
        mirror: address of a server that has the files under ``OWNER/NAME/COMMIT/PATH``, as GitHub has. It need not be
            trusted: every file's size and SHA-256 are checked.

    Raises:
        UserError: an unknown name; a folder that holds another dataset; a server that cannot be reached, or whose file
            is missing or different; another process that writes to the folder. Downloaded files are kept.
    """
    root = Path(root)
    if name not in SOURCES:
        raise UserError(f"no dataset {name!r}: give {' or '.join(SOURCES)}")
    prepare.check_address(mirror, root)
    source, examples, about = SOURCES[name], list_examples(name), root / "SOURCES.md"
    ours = about.is_file() and about.read_bytes().startswith(f"# {name}\n".encode())
    if (root / "annotations").exists() and not ours:
        raise UserError(f"{root} holds another dataset, whose annotations would be overwritten: give another --root")
    folder = root / "source" / source.folder
    url = f"{mirror.rstrip('/')}/{source.repository}/{source.commit}/{source.folder}"
    with locked(root):
        write_atomic(about, _about(name, source).encode())
        _download(name, url, folder, [file for example in examples for file in (example.image, example.labels)])
        _convert(name, source, examples, folder, root)


def list_examples(name: str) -> list[Example]:
    """The images of a source with their labels: train, val, test, each in the order of the file names."""
    with open(LISTS / f"{name}.csv", encoding="utf-8", newline="") as lines:
        return [
            Example(
                row["split"],
                File(row["image"], int(row["image_bytes"]), row["image_sha256"]),
                File(_labels_of(name, row["image"]), int(row["labels_bytes"]), row["labels_sha256"]),
            )
            for row in csv.DictReader(lines)
        ]


def _labels_of(name: str, image: str) -> str:
    """Path of an image's labels: in the same folder (VOC), or in ``labels`` beside ``images`` (YOLO)."""
    return str(PurePosixPath(image.replace("/images/", "/labels/")).with_suffix(SOURCES[name].labels))


# ---------------------------------------------------------------------------------------------------- downloading


def _download(name: str, url: str, folder: Path, files: Sequence[File]) -> None:
    """Download the files that are missing or damaged."""
    missing = [file for file in files if not _is_right(folder / file.path, file)]
    if not missing:
        return
    total, left = sum(file.size for file in files), sum(file.size for file in missing)
    status = Status(f"download {name}", leave=False)
    status.update(1 - left / total)
    stopped = threading.Event()

    def download(file: File) -> File:
        if not stopped.is_set():
            _download_one(url, folder, file, ATTEMPTS)
        return file

    with ThreadPool(CONNECTIONS) as pool:
        try:
            # One attempt for the first file: without a network the error comes at once.
            _download_one(url, folder, missing[0], attempts=1)
            arrived = itertools.chain(missing[:1], pool.imap_unordered(download, missing[1:]))
            for count, file in enumerate(arrived, len(files) - len(missing) + 1):
                left -= file.size
                status.update(1 - left / total, f"{count} of {len(files)} files")
        except UserError:  # no thread may write to a file that the next call downloads
            stopped.set()
            pool.close()
            pool.join()
            raise
        finally:
            stopped.set()
            status.close()


def _download_one(url: str, folder: Path, file: File, attempts: int) -> None:
    """Download a file under a temporary name, verify and rename it."""
    address, target = f"{url}/{urllib.parse.quote(file.path)}", folder / file.path
    part = target.with_name(f"{target.name}.part")
    target.parent.mkdir(parents=True, exist_ok=True)
    resumed = part.exists()
    prepare.download(address, part, file.size, begins=b"", attempts=attempts, show=False)
    if not _is_right(part, file):
        part.unlink()
        if resumed:  # the part from an earlier run may be damaged
            return _download_one(url, folder, file, attempts)
        raise UserError(
            f"{address} has another SHA-256 than {file.sha256[:8]}..., so it was damaged on its way or is another "
            "file: give the same command again, or another --mirror"
        )
    os.replace(part, target)


def _is_right(path: Path, file: File) -> bool:
    """Whether a file exists and has the right SHA-256."""
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == file.sha256


# ----------------------------------------------------------------------------------------------------- converting


def _convert(name: str, source: Source, examples: Sequence[Example], folder: Path, root: Path) -> None:
    """Write the images at their final size, and the annotations of each split."""
    contents = {split: _head(source) for split in SPLITS}
    annotation_id = 0
    for image_id, example in enumerate(track(examples, f"convert {name}"), 1):
        content = contents[example.split]
        original = read_image(folder / example.image.path)
        scale = min(1.0, source.side / max(original.size))
        width, height = (max(1, round(scale * side)) for side in original.size)
        image = original.resize((width, height), Image.Resampling.LANCZOS)
        encoded = io.BytesIO()
        image.save(encoded, "JPEG", quality=source.quality)
        file_name = _file_name(example.image.path)
        write_atomic(root / "images" / file_name, encoded.getvalue())
        content["images"].append(
            {"id": image_id, "file_name": file_name, "width": width, "height": height, "license": 1}
        )
        labels = (folder / example.labels.path).read_bytes()
        for label, box in READERS[source.labels](labels, original.size, source.classes):
            x0, y0, x1, y1 = np.clip(box, 0, 1) * (width, height, width, height)
            w, h = x1 - x0, y1 - y0
            if min(w, h) < 1:
                continue
            annotation_id += 1
            content["annotations"].append(
                {
                    "id": annotation_id,
                    "image_id": image_id,
                    "category_id": label + 1,
                    "bbox": [round(float(value), 2) for value in (x0, y0, w, h)],
                    "area": round(float(w * h), 2),
                    "iscrowd": 0,
                }
            )
    for split, content in contents.items():
        write_atomic(root / "annotations" / f"instances_{split}.json", json.dumps(content).encode())


def _file_name(path: str) -> str:
    """Name of a converted image: that of the original, without the suffix appended by Roboflow."""
    return PurePosixPath(path).stem.split("_jpg.rf.")[0].removesuffix("_jpeg") + ".jpg"


def _head(source: Source) -> dict[str, Any]:
    """A COCO file without images."""
    return {
        "info": {"description": f"{source.about} {source.attribution}"},
        "licenses": [{"id": 1, "name": source.license, "url": source.license_url}],
        "categories": [{"id": n, "name": name, "supercategory": ""} for n, name in enumerate(source.classes, 1)],
        "images": [],
        "annotations": [],
    }


def _read_voc(content: bytes, size: tuple[int, int], classes: Sequence[str]) -> Labels:
    width, height = size
    for found in ElementTree.fromstring(content).iter("object"):
        x0, y0, x1, y1 = (float(found.findtext(f"bndbox/{key}", "")) for key in ("xmin", "ymin", "xmax", "ymax"))
        yield classes.index(found.findtext("name", "")), (x0 / width, y0 / height, x1 / width, y1 / height)


def _read_yolo(content: bytes, size: tuple[int, int], classes: Sequence[str]) -> Labels:
    for line in content.decode().splitlines():
        label, cx, cy, w, h = map(float, line.split())
        yield int(label), (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)


# Pascal VOC and YOLO. Each takes the content of a file, the image's width and height, and the class names.
READERS = {".xml": _read_voc, ".txt": _read_yolo}


def _about(name: str, source: Source) -> str:
    """The content of SOURCES.md."""
    facts = "\n".join(f"- {line}" for line in str(source).splitlines())
    return (
        f"# {name}\n\n{source.about}\n\n{facts}\n"
        f"- Splits: {source.splits}.\n"
        f"- Changes: images resized to at most {source.side} pixels on the longer side and saved as JPEG of quality "
        f"{source.quality}; boxes scaled with them and converted to COCO format; boxes under 1 pixel left out.\n\n"
        "`source` has the original files. Training does not need them; `regolite data` downloads again those that are "
        "missing.\n"
    )
