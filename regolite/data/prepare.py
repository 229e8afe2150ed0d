"""Download, unpack and validate COCO 2017; validate any data folder in COCO format.

The download is 20 GB from a server without valid https, so everything is verified. An interrupted download continues
(HTTP ``Range``) and is accepted only with COCO's size and SHA-256. An archive is inspected before anything is unpacked,
and may contain COCO's own file names only. Each file is unpacked under a temporary name, checked against the archive's
CRC, and renamed. After any interruption the same command continues.

:func:`check_coco` separates *errors*, which would stop or corrupt training, from *notes*, such as the two boxes without
area in COCO's own annotations, which training leaves out.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import stat
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from http.client import HTTPException, HTTPResponse
from io import FileIO
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, TypeGuard

from regolite.data.coco import (
    LONGEST,
    OPTIONAL,
    PROBED,
    ImageFiles,
    WrongSize,
    category_differences,
    class_name,
    find_annotations,
    find_images,
    is_box,
    is_id,
    read_annotated,
    read_annotations,
    sample,
    size_if_scaled,
)
from regolite.data.images import read_image
from regolite.errors import UserError
from regolite.utils.lock import locked
from regolite.utils.progress import Status

MIRROR = "http://images.cocodataset.org"  # its https certificate is for another name
SPLITS = ("train", "val")
IMAGES = {"train": 118_287, "val": 5_000}  # of COCO 2017
TIMEOUT = 60.0  # seconds without a byte
WAITS = (1, 2, 4, 8, 16, 32, 60, 60)  # seconds before each retry; received data resets the count
CHUNK = 1 << 20  # bytes
NO_SIZE = 1 << 60  # pixels: stands for a missing image size, so that no box lies outside
SCALED = "image scaled after annotation"


@dataclass(frozen=True)
class Archive:
    """One of COCO's zip files.

    Attributes:
        path: its path on the server.
        size: its size in bytes.
        sha256: its SHA-256.
        unpacked: bytes of the files unpacked from it.
        folder: the only folder in it.
        files: regular expression of the file names in that folder.
    """

    path: str
    size: int
    sha256: str
    unpacked: int
    folder: str
    files: str

    @property
    def name(self) -> str:
        """Its file name."""
        return self.path.rpartition("/")[2]


# COCO publishes no checksums. These sizes and checksums are those of TensorFlow Datasets (tensorflow/datasets,
# url_checksums/coco.txt); torchvision's prototype of COCO has the same checksums.
ARCHIVES = {
    "annotations": Archive(
        "annotations/annotations_trainval2017.zip",
        252_907_541,
        "113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268",
        469_785_474 + 19_987_840,  # instances_train2017.json and instances_val2017.json only
        "annotations",
        r"(captions|instances|person_keypoints)_(train|val)2017\.json",
    ),
    "val": Archive(
        "zips/val2017.zip",
        815_585_330,
        "4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05",
        815_585_330,  # JPEG files are stored uncompressed
        "val2017",
        r"\d{12}\.jpg",
    ),
    "train": Archive(
        "zips/train2017.zip",
        19_336_861_798,
        "69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929",
        19_336_861_798,
        "train2017",
        r"\d{12}\.jpg",
    ),
}


def prepare_coco(
    root: str | os.PathLike[str],
    splits: Sequence[str] = SPLITS,
    mirror: str = MIRROR,
    keep_zips: bool = False,
    archives: Mapping[str, Archive] = ARCHIVES,
) -> None:
    """Download the missing parts of COCO 2017 and unpack them: ``train2017/``, ``val2017/`` and ``annotations/``.

    Existing files, unpacked or as a zip file in ``root``, are not downloaded again. Downloaded zip files are deleted
    after unpacking; zip files that existed before are kept.

    Args:
        root: the data folder; it is created if necessary.
        splits: ``train``, ``val`` or both.
        mirror: address of a server that has COCO's files under their own paths. It need not be trusted: sizes and
            checksums are verified.
        keep_zips: keep the zip files.
        archives: the archives by content: ``annotations``, ``train``, ``val``.

    Raises:
        UserError: not enough disk space; a server that cannot be reached, or whose files are missing or different; an
            archive that is damaged or has unexpected content; another process that prepares the same folder.
            Downloaded data is kept.
    """
    root = Path(root)
    check_address(mirror, root)
    if unknown := set(splits) - set(SPLITS):
        raise UserError(f"COCO has no split {min(unknown)!r}: give {' or '.join(SPLITS)}")
    with locked(root):
        _prepare(root, splits, mirror, keep_zips, archives)


def _prepare(root: Path, splits: Sequence[str], mirror: str, keep_zips: bool, archives: Mapping[str, Archive]) -> None:
    """Implements :func:`prepare_coco` after its arguments are checked."""
    listed: dict[str, list[str]] = {}
    done: set[str] = set()
    while todo := [name for name in _missing(root, splits, listed) if name not in done]:
        _check_room(root, [archives[name] for name in todo], keep_zips)
        archive = archives[todo[0]]
        own = root / archive.name
        file = own if own.exists() else _part(root, archive)
        if file != own:
            download(f"{mirror.rstrip('/')}/{archive.path}", file, archive.size)
        verify(file, archive, ours=file != own)
        unpack(file, root, archive, {f"instances_{split}2017.json" for split in splits} | set(listed.get(todo[0], ())))
        if file != own:
            if keep_zips:
                os.replace(file, own)
            else:
                getattr(os, "sync", lambda: None)()  # the images must be on disk before their zip file is deleted
                file.unlink()
        done.add(todo[0])


def _missing(root: Path, splits: Sequence[str], listed: dict[str, list[str]]) -> list[str]:
    """Names of the missing archives, annotations first, since they list the images.

    Args:
        root: the data folder.
        splits: the requested splits.
        listed: cache of the image names in the annotations, by split; filled here.
    """
    files = {split: root / "annotations" / f"instances_{split}2017.json" for split in splits}
    needed = [] if all(file.exists() for file in files.values()) else ["annotations"]
    for split in sorted(splits, reverse=True):  # val, the small one, before train
        folder = root / f"{split}2017"
        if files[split].exists():
            if split not in listed:
                listed[split] = [str(image.get("file_name")) for image in read_annotations(files[split])[0]]
            if not set(listed[split]) <= _sizes(folder).keys():
                needed.append(split)
        elif not folder.is_dir():
            needed.append(split)
    return needed


def _sizes(folder: Path) -> dict[str, int]:
    """Sizes in bytes of the files in a folder, without empty ones, which a power failure can leave."""
    if not folder.is_dir():
        return {}
    return {entry.name: size for entry in os.scandir(folder) if entry.is_file() and (size := entry.stat().st_size)}


def _part(root: Path, archive: Archive) -> Path:
    """The temporary file of a download."""
    return root / f"{archive.name}.part"


def _check_room(root: Path, archives: Sequence[Archive], keep_zips: bool) -> None:
    """Check that the disk has enough space."""
    used = most = 0
    for archive in archives:
        part, own = _part(root, archive), (root / archive.name).exists()
        if not own:
            used += archive.size - (min(part.stat().st_size, archive.size) if part.exists() else 0)
        used += max(0, archive.unpacked - sum(_sizes(root / archive.folder).values()))
        most = max(most, used)
        if not (own or keep_zips):
            used -= archive.size
    free = shutil.disk_usage(root).free
    if most > free:
        raise UserError(
            f"{root}: {_bytes(most)} are needed for {', '.join(archive.name for archive in archives)} and what is in "
            f"it, {_bytes(free)} are free: free some space, give another --root, or begin with --splits val"
        )


# ---------------------------------------------------------------------------------------------------- downloading


def check_address(mirror: str, root: Path) -> None:
    """Check the source and the destination of a download.

    Raises:
        UserError: the mirror is not an http address, or the folder is a file.
    """
    if not re.fullmatch(r"https?://([\w.@-]+|\[[\da-f:.]+\])(:\d+)?(/\S*)?", mirror):
        raise UserError(f"--mirror {mirror} is not an address: give one that begins with http:// or https://")
    if root.exists() and not root.is_dir():
        raise UserError(f"{root} is a file: give a folder")


def download(
    url: str, file: Path, size: int, begins: bytes = b"PK", attempts: int | None = None, show: bool = True
) -> None:
    """Download a file, or continue an interrupted download.

    Args:
        url: its address.
        file: the destination; existing content is taken as the beginning of the file.
        size: expected size in bytes.
        begins: its first bytes; a response that begins differently is refused.
        attempts: give up after this many consecutive attempts without data; by default the length of ``WAITS``.
        show: show a progress bar, and print the reason of each retry.

    Raises:
        UserError: the file is missing or different on the server, or the connection failed repeatedly.
    """
    waits = WAITS[:attempts]
    with open(file, "ab", buffering=0) as out:
        have = out.tell()
        progress, failures = _Progress(f"download {Path(url).name}", size, have, show), 0
        while have < size:
            reason = "the connection was closed"
            try:
                _receive(url, out, size, progress, begins)
            except urllib.error.HTTPError as error:
                error.close()
                reason = f"{error.code} {error.reason}"
                if error.code == 416:
                    raise UserError(f"{url} ends before byte {have} of {size}: give another --mirror") from error
                if error.code < 500 and error.code not in (408, 425, 429):
                    raise UserError(f"{url}: {reason}; check --mirror, or give another") from error
            except (OSError, HTTPException) as error:  # network errors; _write() raises a UserError for disk errors
                reason = str(getattr(error, "reason", error)) or type(error).__name__
            failures = 0 if out.tell() > have else failures + 1
            have = out.tell()
            if have < size:
                if failures >= len(waits):
                    tried = f"{failures} attempts in a row brought nothing" if failures > 1 else "no data arrived"
                    kept = f"; {_bytes(have)} of {_bytes(size)} are kept in {file}" if have else ""
                    raise UserError(
                        f"{url}: {tried} ({reason}){kept}: check the network and give the same command again, or give "
                        "another --mirror"
                    )
                wait = waits[failures]
                progress.say(f"{file.name}: {reason} at {100 * have / size:.0f} %; going on in {wait} s")
                time.sleep(wait)
        progress.close()


def _receive(url: str, out: FileIO, size: int, progress: _Progress, begins: bytes) -> None:
    """One attempt: append the received data to the file until the connection ends."""
    have = out.tell()
    request = urllib.request.Request(url, headers={"User-Agent": "regolite"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
        skip = _beginning(answer, url, have, size)
        while have < size and (data := answer.read1(CHUNK)):  # read1: no data is lost if the connection breaks
            data, skip = data[skip:][: size - have], max(0, skip - len(data))
            if not have and not begins.startswith(data[: len(begins)]):
                raise UserError(f"{url} is not a zip file, perhaps a login page: check the network, or --mirror")
            _write(out, data)
            have += len(data)
            progress.update(have)


def _beginning(answer: HTTPResponse, url: str, have: int, size: int) -> int:
    """Number of bytes of a response to skip: all bytes already received, if the server does not support ``Range``.

    Raises:
        UserError: the response header belongs to another file.
        HTTPException: the response begins at another offset.
    """
    total, skip = answer.headers.get("Content-Length", ""), have
    if answer.status == 206:
        match = re.match(r"bytes (\d+)-\d+/(\d+|\*)", answer.headers.get("Content-Range", ""))
        if not match or int(match[1]) != have:
            raise HTTPException("the server sent another part of the file than requested")
        total, skip = match[2], 0
    if total.isdecimal() and int(total) != size:
        raise UserError(f"{url} has {total} bytes instead of {size}, so it is another file: give another --mirror")
    return skip


def _write(file: FileIO, data: bytes) -> None:
    """Write all data; disk errors become a UserError, to distinguish them from network errors."""
    rest = memoryview(data)
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except OSError as error:
        raise _disk_error(error, Path(file.name)) from error


def _disk_error(error: OSError, file: Path) -> UserError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    fix = "free some space" if full else "check the disk"
    return UserError(f"{file}: {error.strerror}; what is there already is kept: {fix} and give the same command again")


def verify(file: Path, archive: Archive, ours: bool) -> None:
    """Check that a file has the size and the SHA-256 of COCO's archive.

    Args:
        file: the file.
        archive: the expected archive.
        ours: the file was downloaded here. A wrong one is then moved aside, so that the next download starts again; a
            user's own file is left unchanged.

    Raises:
        UserError: the file differs, or is damaged.
    """
    size = file.stat().st_size
    what = f"has {size} bytes, not {archive.size}"
    if size == archive.size:
        digest, progress = hashlib.sha256(), _Progress(f"check {archive.name}", size)
        with open(file, "rb") as content:
            while data := content.read(CHUNK):
                digest.update(data)
                progress.update(content.tell())
        progress.close()
        if digest.hexdigest() == archive.sha256:
            return
        what = f"has another SHA-256 than {archive.sha256[:8]}..., so it was damaged on its way or is another file"
    if ours:
        aside = file.with_suffix(".damaged")
        os.replace(file, aside)
        fix = f"it is now {aside.name}, delete it, and give the same command again or another --mirror"
    else:
        fix = f"delete it, or rename it to {archive.name}.part if it is only the beginning"
    raise UserError(f"{file} {what}: {fix}")


# ------------------------------------------------------------------------------------------------------ unpacking


def unpack(file: Path, root: Path, archive: Archive, wanted: Collection[str]) -> None:
    """Unpack an archive; existing files with the right size and CRC are kept.

    Args:
        file: the zip file.
        root: the parent of its folder.
        archive: its permitted content.
        wanted: names of the files to unpack.

    Raises:
        UserError: the archive is damaged, or has names that COCO's does not have (``../x``, ``/x``, ...), links, or
            duplicate names. In the last three cases nothing is written.
    """
    folder, replaced = root / archive.folder, 0
    try:
        with zipfile.ZipFile(file) as content:
            members = [m for m in _inspect(content, file, archive) if m.filename.rpartition("/")[2] in wanted]
            folder.mkdir(parents=True, exist_ok=True)
            room = sum(member.file_size for member in members) - sum(_sizes(folder).values())
            if room > (free := shutil.disk_usage(folder).free):
                raise UserError(f"{folder}: {_bytes(room)} are needed, {_bytes(free)} are free: free some space")
            progress = _Progress(f"unpack {archive.name}", sum(member.file_size for member in members))
            for member in members:
                target = root / member.filename
                if not _is_whole(target, member):
                    replaced += target.exists()
                    _extract(content, member, target)
                progress.add(member.file_size)
            progress.close()
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{file} cannot be unpacked ({error}): delete it and give the same command again") from error
    if replaced:
        Status.say(f"{replaced} files in {folder} differed from those in {archive.name} and were replaced")


def _inspect(content: zipfile.ZipFile, file: Path, archive: Archive) -> list[zipfile.ZipInfo]:
    """The files in an archive, after checking that each is a plain file with an expected name."""
    members, seen = [], set()
    for member in content.infolist():
        name, kind = member.orig_filename, stat.S_IFMT(member.external_attr >> 16)
        if name == f"{archive.folder}/" and kind in (0, stat.S_IFDIR):
            continue
        if not re.fullmatch(f"{archive.folder}/{archive.files}", name):
            wrong = "a name that COCO's does not have"
        elif kind not in (0, stat.S_IFREG):
            wrong = "a link" if kind == stat.S_IFLNK else "no plain file"
        elif name in seen:
            wrong = "there twice"
        else:
            seen.add(name)
            members.append(member)
            continue
        raise UserError(f"{file} holds {name!r}, {wrong}: nothing of it was unpacked; delete it and fetch another")
    return members


def _is_whole(target: Path, member: zipfile.ZipInfo) -> bool:
    """Whether a file exists, with the size and the CRC in the archive."""
    if target.is_symlink() or not target.is_file() or target.stat().st_size != member.file_size:
        return False
    crc = 0
    with open(target, "rb") as content:
        while data := content.read(CHUNK):
            crc = zlib.crc32(data, crc)
    return crc == member.CRC


def _extract(content: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path) -> None:
    """Unpack a file atomically; ``zipfile`` checks the CRC at its end."""
    temporary = target.with_name(f".{target.name}.part")
    try:
        with content.open(member) as source, open(temporary, "wb", buffering=0) as out:
            while data := source.read(CHUNK):
                _write(out, data)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------------- checking


@dataclass
class Report:
    """Content and defects of a data folder.

    Attributes:
        root: the folder.
        counts: number of images, objects and categories by split.
        wrong: defects that would stop or corrupt training: ``split``, ``kind``, ``file`` (of an image, or of the
            annotations), ``image_id`` and ``annotation_id`` if applicable, and ``said``, the details.
        notes: defects that training tolerates, in the same form.
        opened: for each split of which only a sample of the image files was opened, their number.
        part_of: for each split with COCO's categories and only a subset of its images, the number of all images.
    """

    root: str
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    wrong: list[dict[str, Any]] = field(default_factory=list)
    notes: list[dict[str, Any]] = field(default_factory=list)
    opened: dict[str, int] = field(default_factory=dict)
    part_of: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON content."""
        return dict(vars(self))

    def __str__(self) -> str:
        """A summary: counts, and for each kind of finding its number and the first three."""
        lines = []
        for split, counts in self.counts.items():
            lines.append(f"{split}: " + ", ".join(f"{count} {name}" for name, count in counts.items()))
            if split in self.part_of:
                lines.append(f"- {split}: not all of COCO 2017, which has {self.part_of[split]} images here")
            if split in self.opened:
                lines.append(f"- {split}: {self.opened[split]} image files opened; --read-images opens all")
            for mark, findings in (("!", self.wrong), ("-", self.notes)):
                found = [finding for finding in findings if finding["split"] == split]
                for kind, count in Counter(finding["kind"] for finding in found).items():
                    first = [_in_words(finding) for finding in found if finding["kind"] == kind][:3]
                    more = ["..."] if count > len(first) else []
                    lines.append(f"{mark} {split}: {kind} ({count}): {', '.join(first + more)}")
        return "\n".join(lines)


def _in_words(finding: Mapping[str, Any]) -> str:
    annotation = f", annotation {finding['annotation_id']}" if finding.get("annotation_id") is not None else ""
    said = f" ({finding['said']})" if finding["said"] else ""
    return f"{finding['file']}{annotation}{said}"


def check_coco(
    root: str | os.PathLike[str],
    splits: Sequence[str] = SPLITS,
    read_images: bool = False,
    workers: int | None = None,
) -> Report:
    """Validate a data folder in COCO format.

    Errors are everything that would stop training: images that are missing, empty, listed twice or without a size;
    duplicate ids and category names; categories that differ between the splits; annotations of unknown images or
    categories; boxes that are not four numbers, have a negative size or lie outside their image; other fields of an
    invalid type. Notes are boxes without area (not training targets), boxes that extend beyond the image by more than a
    pixel (training clips them), objects with an area of 0, images without objects, images that were scaled after
    annotation (training scales them back), and unlisted image files. A folder with COCO's categories and fewer images
    is reported as a subset of COCO.

    Args:
        root: the data folder, as in :func:`regolite.data.open_data`.
        splits: names of the splits.
        read_images: decode every image, which takes long, and not only an evenly spaced sample of 200: finds broken
            ones and those of another size or scale.
        workers: number of threads that read images; the number of CPUs by default.

    Raises:
        UserError: the folder does not exist, or its annotations are not JSON in COCO format.
    """
    report = Report(str(root))
    categories: dict[str, dict[int, str]] = {}
    for split in splits:
        categories[split] = _check_split(Path(root), split, read_images, workers, report)
        first = splits[0]
        if categories[first] and categories[split]:
            for said in category_differences(categories[first], categories[split], (first, split)):
                file = find_annotations(Path(root), split).relative_to(root).as_posix()
                finding = {"split": split, "kind": "category differs between splits", "file": file, "said": said}
                report.wrong.append(finding)
    return report


def _check_split(root: Path, split: str, read_images: bool, workers: int | None, report: Report) -> dict[int, str]:
    """Add the findings of a split to the report; return its category names by id, {} if these are invalid."""
    file = find_annotations(root, split)
    images, annotations, categories = read_annotations(file)
    lists = file.relative_to(root).as_posix()
    files = find_images(root, split, [name for image in images if isinstance(name := image.get("file_name"), str)])

    def wrong(kind: str, name: str = lists, said: str = "", **ids: Any) -> None:
        report.wrong.append({"split": split, "kind": kind, "file": name, **ids, "said": said})

    def note(kind: str, name: str, said: str = "", **ids: Any) -> None:
        report.notes.append({"split": split, "kind": kind, "file": name, **ids, "said": said})

    known = _check_ids("category", categories, lists, wrong)
    _check_ids("image", images, lists, wrong)
    _check_ids("annotation", annotations, lists, wrong)
    ids_of: dict[str, set[str]] = {}
    for category in categories:
        name = class_name(category)
        if name is None:
            wrong("category without a name", said=f"id {category.get('id')}")
        else:
            ids_of.setdefault(name, set()).add(str(category.get("id")))
    for name, ids in ids_of.items():
        if len(ids) > 1:
            wrong("category name given twice", said=f"{name!r} is the name of {' and '.join(sorted(ids))}")
    are_valid = not any(f["split"] == split and f["kind"].startswith("category") for f in report.wrong)
    if not annotations:
        wrong("no annotations", said="there is nothing to learn or to measure")
    by_id = _check_images(images, files, wrong, note)
    with_objects = _check_annotations(annotations, by_id, known, wrong, note)
    for number, (name, *_) in by_id.items():
        if number not in with_objects:
            note("image without objects", name, image_id=number)
    report.counts[split] = {
        "images": len(images),
        "objects": len(annotations),
        "categories": len(categories),
    }
    there = {number: image for number, image in by_id.items() if image[0] not in files.missing}
    if not read_images and len(there) > PROBED:
        numbers = list(there)
        there = {numbers[i]: there[numbers[i]] for i in sample(len(numbers))}
        report.opened[split] = len(there)
    for number, kind, said in _read_all(files, there, f"open the images of {split}", workers):
        (note if kind == SCALED else wrong)(kind, there[number][0], said, image_id=number)
    names = {category["id"]: str(category["name"]) for category in categories} if are_valid else {}
    is_coco = (len(names), names.get(1), names.get(90)) == (80, "person", "toothbrush")
    if is_coco and len(images) < IMAGES.get(split, 0):
        report.part_of[split] = IMAGES[split]
    return names


def _check_ids(kind: str, records: Sequence[Mapping[str, Any]], lists: str, wrong: Callable[..., None]) -> set[int]:
    """The ids, which must be unique integers."""
    seen: set[int] = set()
    for record in records:
        number, name = record.get("id"), str(record.get("file_name", lists))
        if not is_id(number):
            wrong(f"{kind} without an id", name, f"id {number!r}", **{f"{kind}_id": number})
        elif number in seen:
            wrong(f"{kind} id given twice", name, f"id {number}", **{f"{kind}_id": number})
        else:
            seen.add(number)
    return seen


def _check_images(
    images: Sequence[Mapping[str, Any]], files: ImageFiles, wrong: Callable[..., None], note: Callable[..., None]
) -> dict[int, tuple[str, int, int]]:
    """Name, width and height of the images, by id."""
    sizes, missing, seen = _sizes(files.folder), set(files.missing), set()
    by_id: dict[int, tuple[str, int, int]] = {}
    for image in images:
        number, name, width, height = image.get("id"), image.get("file_name"), image.get("width"), image.get("height")
        if not isinstance(name, str) or not name:
            wrong("image without a file name", said=f"file_name {name!r}", image_id=number)
            continue
        if name in seen:
            wrong("image listed twice", name, image_id=number)
        seen.add(name)
        if name in missing:
            wrong("missing image", name, image_id=number)
        elif name not in sizes and not files.path(name).stat().st_size:
            wrong("empty image", name, image_id=number)
        if not (_is_side(width) and _is_side(height)):
            wrong("image without a size", name, f"width {width!r}, height {height!r}", image_id=number)
            width = height = NO_SIZE
        if is_id(number):
            by_id.setdefault(number, (name, width, height))
    if files.folder.name != "images":  # in a folder shared by splits, each split lists only a part of the images
        listed = seen | {path.name for path in files.elsewhere.values() if path.parent == files.folder}
        for name in sorted(sizes.keys() - listed):
            note("image not listed", name)
    return by_id


def _is_side(value: Any) -> TypeGuard[int]:
    """Whether a JSON value is the width or height of an image."""
    return type(value) is int and 1 <= value <= LONGEST


def _check_annotations(
    annotations: Sequence[Mapping[str, Any]],
    by_id: Mapping[int, tuple[str, int, int]],
    categories: set[int],
    wrong: Callable[..., None],
    note: Callable[..., None],
) -> set[int]:
    """Check the annotations; return the ids of the images that have any."""
    with_objects: set[int] = set()
    for annotation in annotations:
        image_id, category, box = (annotation.get(key) for key in ("image_id", "category_id", "bbox"))
        ids = {"image_id": image_id, "annotation_id": annotation.get("id")}
        if not is_id(image_id) or image_id not in by_id:
            wrong("annotation of an unknown image", said=f"image_id {image_id!r}", **ids)
            continue
        name, width, height = by_id[image_id]
        with_objects.add(image_id)
        if type(category) is not int or category not in categories:
            wrong("unknown category", name, f"category_id {category!r}", **ids)
        for key, (is_valid, valid) in OPTIONAL.items():
            if annotation.get(key) is not None and not is_valid(annotation[key]):
                wrong(f"{key} is no number", name, f"{annotation[key]!r}, not {valid}", **ids)
        if not is_box(box):
            wrong("box is not [x, y, width, height]", name, repr(box), **ids)
            continue
        x, y, w, h = box
        if w == 0 or h == 0:
            note("box without area", name, f"bbox {box}", **ids)
        elif x >= width or y >= height or x + w <= 0 or y + h <= 0:
            wrong("box outside its image", name, f"bbox {box} in {width}x{height}", **ids)
        elif min(x, y) < -1 or x + w > width + 1 or y + h > height + 1:
            note("box over the edge", name, f"bbox {box} in {width}x{height}", **ids)
        elif annotation.get("area") == 0:
            note("object with an area of 0", name, **ids)
    return with_objects


def _read_all(
    files: ImageFiles, images: Mapping[int, tuple[str, int, int]], title: str, workers: int | None
) -> list[tuple[int, str, str]]:
    """Id, kind and details of images that cannot be read, have another size, or were scaled."""

    def read(number: int) -> tuple[int, str, str] | None:
        name, width, height = images[number]
        try:
            if width == NO_SIZE:
                read_image(files.path(name))
            else:
                read_annotated(files.path(name), width, height)
                if size := size_if_scaled(files.path(name), width, height):
                    return number, SCALED, f"{size[0]}x{size[1]} pixels, annotated at {width}x{height}"
        except WrongSize as error:
            return number, "image of another size", str(error)
        except UserError as error:
            return number, "unreadable image", str(error)
        return None

    status, found = Status(title, leave=False), []
    status.update(0.0)
    with ThreadPool(workers) as pool:  # Pillow releases the GIL while decoding
        for n, one in enumerate(pool.imap(read, images, chunksize=16), 1):
            found += [one] if one else []
            if n % 16 == 0:
                status.update(n / len(images))
    status.close()
    return found


# ------------------------------------------------------------------------------------------------------- progress


class _Progress:
    """Shows processed bytes and bytes per second, up to five times a second."""

    def __init__(self, title: str, total: int, done: int = 0, enabled: bool = True) -> None:
        self.total, self.done, self.first, self.enabled = max(total, 1), done, done, enabled
        self.start = self.shown = time.monotonic()
        self.status = Status(title, enabled, leave=False)
        self.status.update(done / self.total)

    def add(self, count: int) -> None:
        """Count additional bytes."""
        self.update(self.done + count)

    def update(self, done: int) -> None:
        """Set the total of processed bytes."""
        self.done, now = done, time.monotonic()
        if now - self.shown >= 0.2:
            self.shown = now
            speed = (done - self.first) / (now - self.start)
            self.status.update(done / self.total, f"{_bytes(done)} of {_bytes(self.total)}, {_bytes(speed)}/s")

    def say(self, text: str) -> None:
        """Print a line if progress is shown."""
        if self.enabled:
            self.status.say(text)

    def close(self) -> None:
        """Close the progress bar."""
        self.status.close()


def _bytes(count: int | float) -> str:
    """Format a number of bytes."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count:.0f} bytes"
