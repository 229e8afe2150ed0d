"""Data of one's own: each form and layout gives the same images and boxes; what is wrong is named."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
import unicodedata
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from regolite.cli import main
from regolite.data import convert, cut_outs, open_data
from regolite.errors import UserError

# name, width, height, objects: class and x, y, width, height in pixels
IMAGES = [
    ("a.jpg", 100, 80, [("cat", 10, 20, 30, 40), ("dog", 50, 0, 50, 80)]),
    ("b.png", 60, 120, [("dog", 6, 12, 30, 60)]),
    ("c.jpg", 80, 80, []),
    ("d.jpg", 64, 64, [("ant", 0, 0, 64, 64)]),
    ("e.jpg", 90, 70, [("cat", 9, 7, 18, 14), ("cat", 45, 35, 18, 14)]),
]
CLASSES = ["cat", "dog", "ant"]  # in an order of their own


def paint(folder: Path, images=IMAGES) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for n, (name, width, height, _) in enumerate(images):
        Image.new("RGB", (width, height), (40 * n, 90, 160)).save(folder / name)


def coco(file: Path, given=IMAGES) -> None:
    images, annotations = [], []
    for i, (name, width, height, objects) in enumerate(given, 7):
        images.append({"id": i, "file_name": name, "width": width, "height": height})
        for label, x, y, w, h in objects:
            record = {"id": len(annotations) + 1, "image_id": i, "category_id": 10 * CLASSES.index(label) + 10}
            outline = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            annotations.append({**record, "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0, "segmentation": outline})
    categories = [{"id": 10 * n + 10, "name": name} for n, name in enumerate(CLASSES)]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))


def yolo(folder: Path, images=IMAGES) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, width, height, objects in images:
        lines = [
            f"{CLASSES.index(c)} {(x + w / 2) / width} {(y + h / 2) / height} {w / width} {h / height}"
            for c, x, y, w, h in objects
        ]
        (folder / name).with_suffix(".txt").write_text("\n".join(lines))


def voc(folder: Path, images=IMAGES) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, width, height, objects in images:
        root = ElementTree.Element("annotation")
        ElementTree.SubElement(root, "filename").text = name
        size = ElementTree.SubElement(root, "size")
        for side, value in (("width", width), ("height", height), ("depth", 3)):
            ElementTree.SubElement(size, side).text = str(value)
        for label, x, y, w, h in objects:
            one = ElementTree.SubElement(root, "object")
            ElementTree.SubElement(one, "name").text = label
            box = ElementTree.SubElement(one, "bndbox")
            # Pascal VOC counts pixels from 1 and includes both ends
            for corner, value in (("xmin", x + 1), ("ymin", y + 1), ("xmax", x + w), ("ymax", y + h)):
                ElementTree.SubElement(box, corner).text = str(value)
        ElementTree.ElementTree(root).write((folder / name).with_suffix(".xml"))


def names_file(folder: Path) -> None:
    (folder / "data.yaml").write_text(f"names: {CLASSES}\nnc: 3\n")


def boxes(root: Path) -> dict[str, set[tuple]]:
    """Every image of a data folder with its objects."""
    found = {}
    for split in ("train", "val"):
        dataset = open_data(root, split)
        for i in range(len(dataset)):
            objects = dataset.objects(i)
            dataset[i]  # its size is what the annotation says
            rounded = [tuple(round(float(v), 2) for v in box) for box in objects.boxes]
            found[dataset.file_name(i)] = {(dataset.classes[k], *box) for k, box in zip(objects.labels, rounded)}
    return found


WANTED = {name: {(c, *map(float, box)) for c, *box in objects} for name, _, _, objects in IMAGES}


def exported(root: Path, layout: str) -> Path:
    """An export in one of the layouts that labeling tools write."""
    train, val = IMAGES[:3], IMAGES[3:]
    if layout == "yolo":
        paint(root / "images")
        yolo(root / "labels")
        names_file(root)
    elif layout == "yolo, images by split":
        for split, part in (("train", train), ("val", val)):
            paint(root / "images" / split, part)
            yolo(root / "labels" / split, part)
        names_file(root)
    elif layout == "yolo, splits of images":
        for split, part in (("train", train), ("valid", val)):
            paint(root / split / "images", part)
            yolo(root / split / "labels", part)
        names_file(root)
    elif layout == "yolo, all in one":
        paint(root)
        yolo(root)
        names_file(root)
    elif layout == "voc":
        paint(root / "JPEGImages")
        voc(root / "Annotations")
    elif layout == "voc with sets":
        exported(root, "voc")
        (root / "ImageSets" / "Main").mkdir(parents=True)
        (root / "ImageSets" / "Main" / "train.txt").write_text("a\nb\nc\n")
        (root / "ImageSets" / "Main" / "val.txt").write_text("d\ne\n")
    elif layout == "voc, splits in one":
        for split, part in (("train", train), ("valid", val)):
            paint(root / split, part)
            voc(root / split, part)
    elif layout == "coco":
        paint(root / "images")
        coco(root / "result.json")
    elif layout == "coco, splits":
        for split, part in (("train", train), ("valid", val)):
            paint(root / split, part)
            coco(root / split / "_annotations.coco.json", part)
    elif layout == "coco's own":
        for split, part in (("train2017", train), ("val2017", val)):
            paint(root / split, part)
            coco(root / "annotations" / f"instances_{split}.json", part)
    return root


@pytest.mark.parametrize(
    ("layout", "form", "splits"),
    [
        ("yolo", "YOLO", False),
        ("yolo, images by split", "YOLO", True),
        ("yolo, splits of images", "YOLO", True),
        ("yolo, all in one", "YOLO", False),
        ("voc", "Pascal VOC", False),
        ("voc with sets", "Pascal VOC", True),
        ("voc, splits in one", "Pascal VOC", True),
        ("coco", "COCO", False),
        ("coco, splits", "COCO", True),
        ("coco's own", "COCO", True),
    ],
)
def test_every_layout_gives_the_same_boxes(tmp_path, layout, form, splits):
    done = convert(exported(tmp_path / "export", layout), tmp_path / "data", val=0.4)
    assert (done.form, sorted(done.classes), done.problems) == (form, sorted(CLASSES), [])
    assert done.images == {"train": 3, "val": 2}
    assert boxes(tmp_path / "data") == WANTED
    if splits:
        dataset = open_data(tmp_path / "data", "val")
        assert sorted(dataset.file_name(i) for i in range(2)) == ["d.jpg", "e.jpg"]
    assert sum(count for split in done.objects.values() for count in split.values()) == 6
    assert (tmp_path / "data" / "train").is_dir() and str(done).startswith(f"{form}, 3 classes")


def test_held_out_images_depend_on_the_seed_alone(tmp_path):
    source = exported(tmp_path / "export", "yolo")
    held = []
    for n, seed in enumerate((0, 0, 1, 2, 3)):
        convert(source, tmp_path / f"data{n}", val=0.4, seed=seed)
        held.append({path.name for path in (tmp_path / f"data{n}" / "val").iterdir()})
    assert held[0] == held[1] and len({frozenset(names) for names in held}) > 1


def test_test_images_are_neither_trained_on_nor_held_out(tmp_path):
    for split, part in (("train", IMAGES[:3]), ("test", IMAGES[3:])):
        paint(tmp_path / "export" / split, part)
        coco(tmp_path / "export" / split / "_annotations.coco.json", part)
    done = convert(tmp_path / "export", tmp_path / "data", val=0.34)
    assert done.images == {"train": 2, "val": 1, "test": 2}
    assert {path.name for path in (tmp_path / "data" / "test").iterdir()} == {"d.jpg", "e.jpg"}


def test_names_of_classes_may_lie_in_another_folder(tmp_path):
    source = exported(tmp_path / "export", "yolo")
    (source / "config").mkdir()
    (source / "data.yaml").rename(source / "config" / "data.yaml")
    assert sorted(convert(source, tmp_path / "data").classes) == sorted(CLASSES)


def test_an_export_with_validation_images_alone_is_divided(tmp_path):
    paint(tmp_path / "export" / "valid")
    voc(tmp_path / "export" / "valid")
    assert convert(tmp_path / "export", tmp_path / "data", val=0.4).images == {"train": 3, "val": 2}


def test_nothing_is_written_where_nothing_can_be_learnt(tmp_path):
    source = exported(tmp_path / "export", "yolo")
    for path in (source / "labels").iterdir():
        path.write_text("")
    with pytest.raises(UserError, match="nothing to learn from"):
        convert(source, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_a_image_held_sideways_is_stored_upright(tmp_path):
    source = exported(tmp_path / "export", "yolo")
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right
    Image.new("RGB", (80, 100), "red").save(source / "images" / "a.jpg", exif=exif)  # shown, it is 100 x 80
    convert(source, tmp_path / "data", val=0.4)
    assert boxes(tmp_path / "data")["a.jpg"] == WANTED["a.jpg"]


def test_what_is_wrong_with_one_thing_is_named_and_the_rest_is_kept(tmp_path):
    source = exported(tmp_path / "export", "yolo")
    labels = source / "labels"
    (labels / "stray.txt").write_text("0 0.5 0.5 0.1 0.1")
    (labels / "c.txt").unlink()
    (labels / "b.txt").write_text("1 0.9 0.5 0.4 0.5\n1 0.5 0.5 0 0.2\n2 1.5 1.5 0.1 0.1")
    done = convert(source, tmp_path / "data", val=0.4)
    assert done.problems == [
        "stray.txt: left out, there is no image of this name",
        "c and 0 more images have no annotation file: taken as empty",
        "b.png: left out 2 boxes without area in the image",
        "b.png: cut 1 boxes at the image's edge",
    ]
    assert boxes(tmp_path / "data")["b.png"] == {("dog", 42.0, 30.0, 18.0, 60.0)}
    assert "! stray.txt" in str(done)


def test_missing_and_broken_images_of_coco_are_named(tmp_path):
    source = exported(tmp_path / "export", "coco")
    (source / "images" / "a.jpg").unlink()
    (source / "images" / "e.jpg").write_bytes((source / "images" / "e.jpg").read_bytes()[:300])
    done = convert(source, tmp_path / "data", val=0.5)
    missing, broken = sorted(done.problems)
    assert missing == "a.jpg: left out, result.json lists it, but it is not there"
    assert broken.startswith("e.jpg: left out, image ") and "replace the file" in broken
    assert set(boxes(tmp_path / "data")) == {"b.png", "c.jpg", "d.jpg"}


def spoil_json(root):
    (root / "result.json").write_text("{")


def spoil_yolo(root):
    (root / "labels" / "a.txt").write_text("0 0.5 nonsense 0.1 0.1")


@pytest.mark.parametrize(
    ("layout", "spoil", "said"),
    [
        ("yolo", lambda root: (root / "data.yaml").unlink(), "looks like YOLO, but has no data.yaml"),
        ("yolo", spoil_yolo, "cannot be read as YOLO: .*nonsense"),
        ("coco", spoil_json, "result.json is not valid JSON"),
        ("coco", lambda root: (root / "result.json").unlink(), "has images but no boxes"),
        ("coco", lambda root: shutil.rmtree(root / "images"), "holds no images"),
        ("voc", lambda root: (root / "Annotations" / "a.xml").write_text("<annot"), "cannot be read as Pascal VOC"),
        (
            "voc",
            lambda root: [p.rename(root / f"{p.stem}.xml") for p in (root / "Annotations").iterdir()],
            "no image",
        ),
    ],
)
def test_what_cannot_be_converted_is_one_clear_error(tmp_path, layout, spoil, said):
    source = exported(tmp_path / "export", layout)
    spoil(source)
    with pytest.raises(UserError, match=said):
        convert(source, tmp_path / "data", val=0.4)


def test_wrong_arguments(tmp_path):
    source = exported(tmp_path / "export", "voc")
    with pytest.raises(UserError, match="is not a folder"):
        convert(tmp_path / "nothing", tmp_path / "data")
    with pytest.raises(UserError, match="val=1.5 must lie between"):
        convert(source, tmp_path / "data", val=1.5)
    paint(tmp_path / "one", IMAGES[:1])
    voc(tmp_path / "one", IMAGES[:1])
    with pytest.raises(UserError, match="too few to train on some"):
        convert(tmp_path / "one", tmp_path / "data")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UserError, match="exists already"):
        convert(source, tmp_path / "full")


def test_command(tmp_path, capsys):
    source = exported(tmp_path / "export", "voc")
    assert main(["convert", str(source), "--output", str(tmp_path / "data"), "--val", "0.4"]) == 0
    said = capsys.readouterr().out
    assert "Pascal VOC, 3 classes" in said and f"train --data {tmp_path / 'data'}" in said
    assert main(["convert", str(tmp_path / "no"), "--output", str(tmp_path / "data")]) == 2


def test_outlines_of_a_coco_export_stay_with_their_boxes(tmp_path):
    source = tmp_path / "source"
    paint(source / "images")
    coco(source / "annotations.json")
    file = source / "annotations.json"
    content = json.loads(file.read_text())
    content["annotations"].insert(0, {**content["annotations"][0], "id": 99, "bbox": [200, 200, 9, 9]})  # left out
    content["annotations"].reverse()
    file.write_text(json.dumps(content))
    convert(source, tmp_path / "data")
    written = [json.loads(f.read_text()) for f in sorted((tmp_path / "data" / "annotations").iterdir())]
    annotations = [one for part in written for one in part["annotations"]]
    assert len(annotations) == sum(len(objects) for *_, objects in IMAGES)
    for one in annotations:
        x, y, w, h = one["bbox"]
        assert one["segmentation"] == [[x, y, x + w, y, x + w, y + h, x, y + h]]
    [train_file] = (tmp_path / "data" / "annotations").glob("instances_train.json")
    assert train_file.is_file() and cut_outs(tmp_path / "data", min_size=10)


def test_outlines_of_a_image_that_is_turned_are_left_out(tmp_path):
    source = tmp_path / "source"
    paint(source / "images")
    for name, *_ in IMAGES:
        path = source / "images" / name
        with Image.open(path) as image:
            exif = image.getexif()
            exif[0x0112] = 6
            image.save(path, exif=exif)
    coco(source / "annotations.json")
    convert(source, tmp_path / "data")
    for file in (tmp_path / "data" / "annotations").iterdir():
        assert not any(one["segmentation"] for one in json.loads(file.read_text())["annotations"])


# ------------------------------------------------------------------------------------------------ which file is meant


def found(root: Path, split: str) -> dict[str, list]:
    """The objects of a split by file name."""
    data = open_data(root, split)
    return {
        data.file_name(i): [
            (data.classes[k], *(round(float(v), 2) for v in box))
            for k, box in zip(data.objects(i).labels, data.objects(i).boxes)
        ]
        for i in range(len(data))
    }


def everything(root: Path) -> dict[str, list]:
    return found(root, "train") | found(root, "val")


def four(width: int = 64, height: int = 48) -> list[tuple]:
    """Four images, each with a box that differs from the others'."""
    return [(f"{name}.png", width, height, [("cat", 5 + n, 6, 20, 10)]) for n, name in enumerate("abcd")]


def wanted_of_four() -> dict[str, list]:
    return {name: [(c, *map(float, box)) for c, *box in objects] for name, _, _, objects in four()}


def rename(file: Path, names) -> None:
    """Call the images of a COCO file otherwise."""
    content = json.loads(file.read_text())
    for image in content["images"]:
        image["file_name"] = names(image["file_name"])
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("json_file", "folder", "names"),
    [
        ("result.json", "images", "images/{}"),
        ("result.json", "images", "images\\{}"),
        ("result.json", "images", "./images/{}"),
        ("result.json", "images", "/data/upload/3/{}"),
        ("result.json", "images", "D:\\photos\\images\\{}"),
        ("result.json", "my images", "my%20images/{}"),
        ("result.json", "my images", "/data/local-files/?d={}"),
        ("result.json", "my images", "/data/local-files/?d=project%5Cmy%20images%2F{}"),
        ("result.json", ".", "{}"),
        ("result.json", "deep/er", "{}"),
        ("annotations/result.json", "images", "../images/{}"),
        ("annotations/result.json", "images", "{}"),
        ("annotations/result.json", "annotations", "{}"),
    ],
)
def test_names_of_coco_images(tmp_path, json_file, folder, names):
    source = tmp_path / "in"
    paint(source / folder, four())
    coco(source / json_file, four())
    rename(source / json_file, names.format)
    done = convert(source, tmp_path / "out", val=0.25)
    assert done.problems == [] and everything(tmp_path / "out") == wanted_of_four()


def test_a_percent_sign_may_be_one(tmp_path):
    images = [(f"{n}0%25.png", *rest) for n, (_, *rest) in enumerate(four())]
    paint(tmp_path / "in", images)
    coco(tmp_path / "in" / "r.json", images)
    convert(tmp_path / "in", tmp_path / "out", val=0.25)
    assert set(everything(tmp_path / "out")) == {"00%25.png", "10%25.png", "20%25.png", "30%25.png"}


def test_images_of_one_name_in_several_folders(tmp_path):
    images = [(f"{folder}/{name}", *rest) for folder in ("cam1", "cam2") for name, *rest in four()[:2]]
    images = [(name, w, h, [("cat", n, 0, 9, 9)]) for n, (name, w, h, _) in enumerate(images)]
    for folder in ("cam1", "cam2"):
        paint(tmp_path / "in" / "images" / folder, four()[:2])
    coco(tmp_path / "in" / "result.json", images)
    done = convert(tmp_path / "in", tmp_path / "out", val=0.25)
    assert done.images == {"train": 3, "val": 1}
    both = [found(tmp_path / "out", split) for split in ("train", "val")]
    boxes = sorted(box for split in both for boxes in split.values() for box in boxes)
    assert boxes == [("cat", float(n), 0.0, 9.0, 9.0) for n in range(4)]
    data = open_data(tmp_path / "out", "train")
    for i in range(len(data)):
        assert data.image(i).size == (64, 48)


def test_images_of_one_name_in_several_splits(tmp_path):
    """Each split's annotations belong to its own image, and an image that only another split has is missing."""
    for n, split in enumerate(("train", "val")):
        paint(tmp_path / "in" / split, [(name, 64 + n, 48, []) for name, *_ in four()])
        coco(tmp_path / "in" / "annotations" / f"{split}.json", four(64 + n))
    (tmp_path / "in" / "train" / "d.png").unlink()
    done = convert(tmp_path / "in", tmp_path / "out")
    assert done.problems == ["d.png: left out, annotations/train.json lists it, but it is not there"]
    for split, width, count in (("train", 64, 3), ("val", 65, 4)):
        data = open_data(tmp_path / "out", split)
        assert [data.image(i).width for i in range(len(data))] == count * [width]


def test_a_name_that_could_be_two_files_is_refused(tmp_path):
    for folder in ("one", "two"):
        paint(tmp_path / "in" / folder, four())
    coco(tmp_path / "in" / "result.json", four())
    with pytest.raises(
        UserError, match="a.png: result.json lists it, and files of this name are in one and in two: wr"
    ):
        convert(tmp_path / "in", tmp_path / "out")
    (tmp_path / "in" / "one").rename(tmp_path / "in" / "images")  # this is the one meant
    done = convert(tmp_path / "in", tmp_path / "out", val=0.25)
    assert done.problems == ["two/a.png and 3 more images: left out, no annotation file lists them"]


def test_two_files_of_the_same_images_are_refused(tmp_path):
    paint(tmp_path / "in" / "images", four())
    coco(tmp_path / "in" / "result.json", four())
    coco(tmp_path / "in" / "result_val.json", four()[:2])
    with pytest.raises(UserError, match="a.png: result.json and result_val.json list it 2 times"):
        convert(tmp_path / "in", tmp_path / "out")


def test_no_listed_image_is_there(tmp_path):
    paint(tmp_path / "in" / "images", [("z.png", 64, 48, [])])
    coco(tmp_path / "in" / "result.json", four())
    with pytest.raises(UserError, match="none of the 4 images that result.json lists is there.*a.png"):
        convert(tmp_path / "in", tmp_path / "out")


def test_a_folder_of_background(tmp_path):
    source = tmp_path / "in"
    paint(source / "train" / "images", four())
    yolo(source / "train" / "labels", four())
    paint(source / "background" / "images", [(f"z{n}.png", 64, 48, []) for n in range(4)])
    paint(source / "test" / "images", [("t.png", 64, 48, [])])
    names_file(source)
    done = convert(source, tmp_path / "out", val=0.25)
    assert done.problems == [
        "background/images/z0.png and 3 more images: no annotation files: taken as empty, as background",
        "test/images/t.png: left out, they have no annotation files",
    ]
    assert everything(tmp_path / "out") == wanted_of_four() | {f"z{n}.png": [] for n in range(4)}


def test_a_background_image_never_gets_the_boxes_of_another(tmp_path):
    """Both folders lie beside the labels, and both have an a.png."""
    source = tmp_path / "in"
    paint(source / "images", four())
    yolo(source / "labels", four())
    paint(source / "background", [("a.png", 64, 48, [])])
    names_file(source)
    done = convert(source, tmp_path / "out", val=0.25)
    assert done.problems == ["background/a.png: left out, their annotations are those of other images"]
    assert everything(tmp_path / "out") == wanted_of_four()


def test_masks_of_pascal_voc_are_no_images(tmp_path):
    source = tmp_path / "in"
    paint(source / "JPEGImages", [(f"{name}.jpg", 64, 48, []) for name in "abcd"])
    paint(source / "SegmentationClass", four()[:3])
    voc(source / "Annotations", four())
    done = convert(source, tmp_path / "out", val=0.25)
    assert done.problems == [
        "SegmentationClass/a.png and 2 more images: left out, their annotations are those of other images"
    ]
    assert set(everything(tmp_path / "out")) == {"a.jpg", "b.jpg", "c.jpg", "d.jpg"}


def test_two_images_of_one_label_file(tmp_path):
    source = tmp_path / "in"
    images = [(f"{n}.png", 64, 48, [("cat", 5, 6, 20, 10)]) for n in range(20)]
    paint(source / "images", [*images, ("0.jpg", 64, 48, [])])
    yolo(source / "labels", images)
    names_file(source)
    done = convert(source, tmp_path / "out")
    assert done.problems == [
        "images/0.jpg and images/0.png: left out, both would take labels/0.txt: give one another name"
    ]
    assert done.images == {"train": 15, "val": 4}


@pytest.mark.parametrize("split", ["test", "val"])
def test_one_split_alone_is_divided(tmp_path, split):
    paint(tmp_path / "in" / "images", four())
    coco(tmp_path / "in" / f"export_{split}.json", four())
    done = convert(tmp_path / "in", tmp_path / "out", val=0.25)
    assert done.images == {"train": 3, "val": 1} and everything(tmp_path / "out") == wanted_of_four()
    assert done.problems == [f"there are no training images: those of {split} are divided into train and val"]


def test_hidden_files_of_an_archive_are_no_images(tmp_path):
    source = exported(tmp_path / "in", "coco")
    for path in list((source / "images").iterdir()):
        (source / "__MACOSX" / "images").mkdir(parents=True, exist_ok=True)
        (source / "__MACOSX" / "images" / f"._{path.name}").write_bytes(b"\0\5\x16\7")
        (source / "images" / f"._{path.name}").write_bytes(b"\0\5\x16\7")
    assert convert(source, tmp_path / "out", val=0.4).problems == []


# ---------------------------------------------------------------------------------------------------- sizes and EXIF


@pytest.mark.parametrize("form", ["coco", "voc"])
def test_boxes_are_scaled_with_the_image(tmp_path, form):
    source = tmp_path / "in"
    paint(source / "images", four(32, 24))
    coco(source / "r.json", four()) if form == "coco" else voc(source / "Annotations", four())
    done = convert(source, tmp_path / "out", val=0.25)
    assert done.problems == ["a.png and 3 more images: annotated at 64x48, scaled to 32x24: boxes scaled along"]
    half = {name: [(c, *(v / 2 for v in box)) for c, *box in boxes] for name, boxes in wanted_of_four().items()}
    assert everything(tmp_path / "out") == half
    if form == "coco":
        [record, *_] = json.loads((tmp_path / "out/annotations/instances_train.json").read_text())["annotations"]
        x, y, w, h = record["bbox"]
        assert record["area"] == w * h and record["segmentation"] == [[x, y, x + w, y, x + w, y + h, x, y + h]]


def test_an_image_of_another_shape_is_named(tmp_path):
    images = [(f"{n}.png", 64, 48, [("cat", 5, 6, 20, 10)]) for n in range(20)]
    paint(tmp_path / "in", images)
    paint(tmp_path / "in", [("7.png", 64, 64, [])])
    coco(tmp_path / "in" / "r.json", images)
    done = convert(tmp_path / "in", tmp_path / "out")
    [problem] = done.problems
    assert problem.startswith("7.png: left out, r.json says 64x48 pixels but the file has 64x64: put the file back")
    assert "7.png" not in everything(tmp_path / "out")


@pytest.mark.parametrize(
    ("annotated", "orientation"),
    [("shown", n) for n in range(1, 9)] + [("stored", n) for n in (1, 5, 6, 7, 8)],  # 2 to 4 keep the size: as shown
)
def test_boxes_follow_the_image_whichever_way_it_is_turned(tmp_path, annotated, orientation):
    """A black box on white stays under its annotation, be that for the stored pixels or for what viewers show."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    images = []
    for n in range(2):
        stored = Image.new("RGB", (64, 48), "white")
        stored.paste("black", (8, 4, 28, 14))
        (tmp_path / "in").mkdir(exist_ok=True)
        stored.save(tmp_path / "in" / f"{n}.png", exif=exif)
        with Image.open(tmp_path / "in" / f"{n}.png") as opened:
            looked_at = stored if annotated == "stored" else ImageOps.exif_transpose(opened)
        left, top, right, bottom = ImageOps.invert(looked_at).getbbox()
        images.append((f"{n}.png", *looked_at.size, [("cat", left, top, right - left, bottom - top)]))
    coco(tmp_path / "in" / "r.json", images)
    convert(tmp_path / "in", tmp_path / "out", val=0.5)
    data = open_data(tmp_path / "out", "train")
    x, y, w, h = data.objects(0).boxes[0].tolist()
    assert ImageOps.invert(data.image(0)).getbbox() == (x, y, x + w, y + h)


# ------------------------------------------------------------------------------------------------------------ objects


def twenty(tmp_path: Path, form: str) -> Path:
    """Twenty images with a cat each."""
    images = [(f"{n:02}.png", 64, 48, [("cat", 5, 6, 20, 10)]) for n in range(20)]
    paint(tmp_path / "in" / "images", images)
    if form == "coco":
        coco(tmp_path / "in" / "r.json", images)
    elif form == "yolo":
        yolo(tmp_path / "in" / "labels", images)
        names_file(tmp_path / "in")
    else:
        voc(tmp_path / "in" / "Annotations", images)
    return tmp_path / "in"


def spoil(source: Path, form: str, wrong, n: int) -> None:
    """Make the annotation of image ``n`` wrong."""
    if form == "coco":
        content = json.loads((source / "r.json").read_text())
        content["annotations"][n].update(wrong)
        (source / "r.json").write_text(json.dumps(content))
    elif form == "yolo":
        (source / "labels" / f"{n:02}.txt").write_bytes(wrong)
    else:
        file = source / "Annotations" / f"{n:02}.xml"
        file.write_text(file.read_text().replace(*wrong))


@pytest.mark.parametrize(
    ("form", "wrong", "said"),
    [
        ("coco", {"bbox": 5}, "r.json: annotation 4 has bbox 5: give [x, y, width, height] in pixels"),
        ("coco", {"bbox": [1, 2, float("nan"), 4]}, "r.json: annotation 4 has bbox [1, 2, nan, 4]"),
        ("coco", {"bbox": [1, 2, 1e300, 4]}, "r.json: annotation 4 has bbox [1, 2, 1e+300, 4]"),
        ("coco", {"bbox": [1, 2, 10**400, 4]}, "r.json: annotation 4 has bbox"),
        ("coco", {"bbox": [True, 2, 3, 4]}, "r.json: annotation 4 has bbox [True, 2, 3, 4]"),
        ("coco", {"bbox": ["1", "2", "3", "4"]}, "r.json: annotation 4 has bbox ['1', '2', '3', '4']"),
        ("coco", {"bbox": [1, 2, -3, 4]}, "r.json: annotation 4 has bbox [1, 2, -3, 4]"),
        ("coco", {"bbox": None, "segmentation": []}, "r.json: annotation 4 has neither bbox nor a segmentation"),
        ("coco", {"bbox": [], "segmentation": [[1, 2]]}, "r.json: annotation 4 has neither bbox nor a segmentation"),
        ("coco", {"iscrowd": 7}, "r.json: annotation 4 has iscrowd 7: make it 0 or 1"),
        ("coco", {"area": True}, "r.json: annotation 4 has area True: make it a number"),
        ("coco", {"area": float("nan")}, "r.json: annotation 4 has area nan: make it a number"),
        ("coco", {"category_id": 99}, "r.json: annotation 4 has category_id 99, which no category has"),
        ("coco", {"category_id": True}, "r.json: annotation 4 has category_id True, which no category has"),
        ("coco", {"category_id": [10]}, "r.json: annotation 4 has category_id [10], which no category has"),
        ("yolo", b"0 0.5 0.5 0.2 -0.2", "labels/03.txt: line 1 has width 0.2 and height -0.2"),
        ("yolo", b"0 0.5 0.5 0.2 0.2\n0 32 24 20 10", "labels/03.txt: line 2 is '0 32 24 20 10', no fractions"),
        ("yolo", b"0 0.5 nan 0.2 0.2", "labels/03.txt: line 1 is '0 0.5 nan 0.2 0.2', no fractions"),
        ("yolo", b"0 0.5 1e300 0.2 0.2", "labels/03.txt: line 1 is '0 0.5 1e300 0.2 0.2', no fractions"),
        ("yolo", b"3 0.5 0.5 0.2 0.2", "labels/03.txt: line 1 has class 3, which data.yaml does not name"),
        ("yolo", b"-1 0.5 0.5 0.2 0.2", "labels/03.txt: line 1 has class -1, which data.yaml does not name"),
        ("yolo", b"0.5 0.5 0.5 0.2 0.2", "labels/03.txt: line 1 has class 0.5, which data.yaml does not name"),
        ("yolo", b"cat 0.5 0.5 0.2 0.2", "labels/03.txt: line 1 is 'cat 0.5 0.5 0.2 0.2': write numbers"),
        ("yolo", b"0 0.5 0.5", "labels/03.txt: line 1 is '0 0.5 0.5': write class x y width height"),
        ("yolo", b"\xff\xfe0 0.5", "labels/03.txt: 'utf-8' codec"),
        ("voc", ("</annotation>", ""), "Annotations/03.xml: no element found"),
        ("voc", ("bndbox", "robndbox"), "Annotations/03.xml: object 1 (cat) has no bndbox, but robndbox"),
        ("voc", ("<xmin>6</xmin>", "<xmin>x</xmin>"), "Annotations/03.xml: object 1 (cat) has xmin 'x'"),
        ("voc", ("<xmin>6</xmin>", ""), "Annotations/03.xml: object 1 (cat) has xmin None"),
        ("voc", ("<xmin>6</xmin>", "<xmin>nan</xmin>"), "Annotations/03.xml: object 1 (cat) has xmin 'nan'"),
        ("voc", ("<xmin>6</xmin>", "<xmin>60</xmin>"), "Annotations/03.xml: object 1 (cat) has a bndbox whose xmax"),
        ("voc", ("<name>cat</name>", "<name> </name>"), "Annotations/03.xml: object 1 has no name"),
        (
            "voc",
            ("<annotation>", "<?xml version='1.0' encoding='none'?><annotation>"),
            "Annotations/03.xml: unknown en",
        ),
        ("voc", ("annotation>", "annotations>"), "Annotations/03.xml: its first tag is annotations"),
    ],
)
def test_one_bad_annotation_among_many_is_left_out_by_name(tmp_path, form, wrong, said):
    source = twenty(tmp_path, form)
    spoil(source, form, wrong, 3)
    done = convert(source, tmp_path / "out")
    [problem] = done.problems
    assert problem.startswith(f"03.png: left out, {said}")
    names = set(everything(tmp_path / "out"))
    assert names == {f"{n:02}.png" for n in range(20)} - {"03.png"}
    for n in (5, 6):
        spoil(source, form, wrong, n)
    too_many = "3 of 20 images or their annotations cannot be used, which is more than a tenth"
    with pytest.raises(UserError, match=too_many) as error:
        convert(source, tmp_path / "again")
    assert f"03.png: {said}" in str(error.value) and not (tmp_path / "again").exists()


def test_broken_images_count_as_bad_annotations_do(tmp_path):
    source = twenty(tmp_path, "coco")
    for n in range(3):
        next(source.rglob(f"{n:02}.png")).write_bytes(b"no image")
    with pytest.raises(UserError, match=r"00\.png: image .*3 of 20 images or their annotations cannot be used"):
        convert(source, tmp_path / "out")


def test_names_may_differ_in_upper_and_lower_case(tmp_path):
    """Cameras write .JPG, labeling tools often .jpg; a file of exactly the name comes first."""
    source = twenty(tmp_path, "coco")
    first, second = (next(source.rglob(f"{n:02}.png")) for n in range(2))
    first.rename(first.with_name("00.PNG"))
    shutil.copy(second, second.with_name("01.PNG"))
    done = convert(source, tmp_path / "out")
    assert done.problems == ["images/01.PNG: left out, no annotation file lists them"]
    assert set(everything(tmp_path / "out")) == {"00.PNG", *(f"{n:02}.png" for n in range(1, 20))}


def test_records_that_belong_to_no_image_are_named(tmp_path):
    source = twenty(tmp_path, "coco")
    spoil(source, "coco", {"image_id": "8"}, 3)
    content = json.loads((source / "r.json").read_text())
    content["images"].append({"id": 99, "file_name": None})
    (source / "r.json").write_text(json.dumps(content))
    done = convert(source, tmp_path / "out")
    assert done.problems == [
        "r.json, image 21 of the list: left out, its file_name is None: give the name of its file",
        "r.json, annotation 4: left out, image_id '8' is the id of no image: add the image, or take the annotation out",
    ]
    assert done.images == {"train": 16, "val": 4}


@pytest.mark.parametrize(
    "number",
    [lambda n: f"p{n}", lambda n: n + 2**63, lambda n: n + 10**40, lambda n: float(n), lambda n: n + 0.5, lambda n: -n],
    ids=["words", "64 bits", "more bits", "floats", "halves", "negative"],
)
def test_any_ids_are_converted(tmp_path, number):
    paint(tmp_path / "in", four())
    coco(tmp_path / "in" / "r.json", four())
    content = json.loads((tmp_path / "in" / "r.json").read_text())
    for records, key in (("images", "id"), ("annotations", "id"), ("annotations", "image_id"), ("categories", "id")):
        for record in content[records]:
            record[key] = number(record[key])
    for annotation in content["annotations"]:
        annotation["category_id"] = number(annotation["category_id"])
    (tmp_path / "in" / "r.json").write_text(json.dumps(content))
    done = convert(tmp_path / "in", tmp_path / "out", val=0.25)
    assert done.problems == [] and everything(tmp_path / "out") == wanted_of_four()


@pytest.mark.parametrize("sizes", [{}, {"width": None, "height": None}, {"width": 0, "height": 0}])
def test_sizes_that_are_missing_are_those_of_the_files(tmp_path, sizes):
    paint(tmp_path / "in", four())
    coco(tmp_path / "in" / "r.json", four())
    content = json.loads((tmp_path / "in" / "r.json").read_text())
    content["images"] = [{"id": i["id"], "file_name": i["file_name"], **sizes} for i in content["images"]]
    (tmp_path / "in" / "r.json").write_text(json.dumps(content))
    convert(tmp_path / "in", tmp_path / "out", val=0.25)
    assert everything(tmp_path / "out") == wanted_of_four()


def test_an_outline_alone_gives_the_box(tmp_path):
    paint(tmp_path / "in", four())
    coco(tmp_path / "in" / "r.json", four())
    content = json.loads((tmp_path / "in" / "r.json").read_text())
    for annotation, box in zip(content["annotations"], (None, [], 0, 0), strict=True):
        annotation.pop("bbox") if box == 0 else annotation.update(bbox=box)
    (tmp_path / "in" / "r.json").write_text(json.dumps(content))
    convert(tmp_path / "in", tmp_path / "out", val=0.25)
    assert everything(tmp_path / "out") == wanted_of_four()


def test_a_broken_outline_is_left_out(tmp_path):
    paint(tmp_path / "in", four())
    coco(tmp_path / "in" / "r.json", four())
    content = json.loads((tmp_path / "in" / "r.json").read_text())
    broken = (5, [[1, 2]], {"size": [48, 64], "counts": 7})
    for annotation, outline in zip(content["annotations"], broken):
        annotation["segmentation"] = outline
    (tmp_path / "in" / "r.json").write_text(json.dumps(content))
    done = convert(tmp_path / "in", tmp_path / "out", val=0.25)
    assert done.problems == [
        "a.png and 2 more images: left out outlines that are broken or were made for another size or turn"
    ]
    written = [json.loads(file.read_text())["annotations"] for file in (tmp_path / "out" / "annotations").iterdir()]
    assert sorted(len(a["segmentation"]) for part in written for a in part) == [0, 0, 0, 1]
    assert everything(tmp_path / "out") == wanted_of_four()


def test_categories_of_one_name_are_one_class(tmp_path):
    images = [(name, w, h, [(c, *box)]) for (name, w, h, [(_, *box)]), c in zip(four(), ["cat", "dog", "ant", "cat"])]
    paint(tmp_path / "in", images)
    coco(tmp_path / "in" / "r.json", images)
    text = (tmp_path / "in" / "r.json").read_text()
    (tmp_path / "in" / "r.json").write_text(text.replace('"name": "dog"', '"name": "cat"'))
    done = convert(tmp_path / "in", tmp_path / "out", val=0.25)
    assert done.problems == ["r.json: categories 10 and 20 are all called 'cat': taken as one class"]
    classes = {name: box[0][0] for name, box in everything(tmp_path / "out").items()}
    assert classes == {"a.png": "cat", "b.png": "cat", "c.png": "ant", "d.png": "cat"}


@pytest.mark.parametrize(
    ("yaml", "first", "classes"),
    [
        ("names: [no, yes, on]", "no", ["no", "on", "yes"]),
        ("names: {0: off, 1: true, 2: ~}", "off", ["off", "true", "~"]),
        ("names: [1, 2.50, 007]", "1", ["007", "1", "2.50"]),
        ("names: {0: cat, 2: dog}\nnc: 3", "cat", ["cat", "dog"]),
        ("names:\n  '0': cat", "cat", ["cat"]),
    ],
)
def test_names_of_classes_are_text(tmp_path, yaml, first, classes):
    paint(tmp_path / "in" / "images", four())
    yolo(tmp_path / "in" / "labels", four())
    (tmp_path / "in" / "data.yaml").write_text(yaml)
    done = convert(tmp_path / "in", tmp_path / "out", val=0.25)
    assert done.classes == classes
    assert {boxes[0][0] for boxes in everything(tmp_path / "out").values()} == {first}


@pytest.mark.parametrize("names", ["{a: cat}", "[[cat]]", "cat", "['']", "{0: cat, 0.5: dog}", "{0: cat, 00: dog}"])
def test_names_that_are_none(tmp_path, names):
    paint(tmp_path / "in" / "images", four())
    yolo(tmp_path / "in" / "labels", four())
    (tmp_path / "in" / "data.yaml").write_text(f"names: {names}")
    with pytest.raises(UserError, match=r"data.yaml has names .*: write names: \[first, second\]"):
        convert(tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("names: []", "data.yaml names no classes: give its class names"),
        ("nc: 2", "data.yaml names no classes"),
        ("names:\n\t- cat", "data.yaml cannot be read .*found character"),
        ("names: [cat]\nnames: [dog]", "data.yaml cannot be read .*key 'names' is given 2 times"),
        ("names: {0: cat, 0: dog}", "data.yaml cannot be read .*key '0' is given 2 times"),
        (f"names: {2000 * '['}", "data.yaml is nested too deeply"),
    ],
)
def test_why_a_yaml_file_names_no_classes(tmp_path, content, said):
    paint(tmp_path / "in" / "images", four())
    yolo(tmp_path / "in" / "labels", four())
    (tmp_path / "in" / "data.yaml").write_text(content)
    with pytest.raises(UserError, match=f"looks like YOLO, but {said}") as caught:
        convert(tmp_path / "in", tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_an_image_above_pillows_limit_gets_its_own_advice(tmp_path, monkeypatch):
    source = exported(tmp_path / "export", "coco")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match=r"is larger than Pillow's limit .*set PIL.Image.MAX_IMAGE_PIXELS"):
        convert(source, tmp_path / "data")


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_composed_and_decomposed(tmp_path, forms):
    """macOS decomposes letters with accents in file names."""
    listed, stored = (unicodedata.normalize(form, "für") for form in forms)
    images = [f"{listed}{n}.png" for n in range(4)]
    for n in range(4):
        (tmp_path / "in").mkdir(exist_ok=True)
        Image.new("RGB", (64, 48)).save(tmp_path / "in" / f"{stored}{n}.png")
    records = [{"id": n, "file_name": name, "width": 64, "height": 48} for n, name in enumerate(images)]
    objects = [{"id": n, "image_id": n, "category_id": 1, "bbox": [1, 2, 3, 4]} for n in range(4)]
    content = {"images": records, "annotations": objects, "categories": [{"id": 1, "name": "cat"}]}
    (tmp_path / "in" / "r.json").write_text(json.dumps(content))
    assert convert(tmp_path / "in", tmp_path / "out", val=0.25).images == {"train": 3, "val": 1}


def test_lines_of_yolo_that_are_more_than_a_box(tmp_path):
    """A confidence, a class as savetxt writes it, a polygon and keypoints."""
    paint(tmp_path / "in" / "images", four())
    labels = tmp_path / "in" / "labels"
    labels.mkdir()
    (labels / "a.txt").write_text("0 0.5 0.5 0.25 0.5 0.9")
    (labels / "b.txt").write_text("\n0.000e+00 0.5 0.5 0.25 0.5\r\n")
    (labels / "c.txt").write_text("0 0.375 0.25 0.625 0.25 0.5 0.75")
    (labels / "d.txt").write_text("\ufeff0 0.5 0.5 0.25 0.5 0.1 0.2 2 0.3 0.4 1")
    (tmp_path / "in" / "data.yaml").write_text("names: [cat]\nkpt_shape: [2, 3]")
    convert(tmp_path / "in", tmp_path / "out", val=0.25)
    assert everything(tmp_path / "out") == {f"{name}.png": [("cat", 24.0, 12.0, 16.0, 24.0)] for name in "abcd"}


def test_deep_files_are_one_clear_error(tmp_path):
    paint(tmp_path / "in" / "images", four())
    (tmp_path / "in" / "r.json").write_text(10**5 * "[")
    with pytest.raises(UserError, match="r.json is nested too deeply"):
        convert(tmp_path / "in", tmp_path / "out")
    (tmp_path / "in" / "r.json").unlink()
    (tmp_path / "in" / "data.yaml").write_text(f"names: {10**5 * '['}")
    with pytest.raises(UserError, match="has images but no boxes"):
        convert(tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize("where", ["names: *h", "names: [*h, *h]", "names: [cat]\nkpt_shape: *h", "names: {0: *h}"])
def test_a_small_yaml_file_that_stands_for_billions(tmp_path, where):
    """References to references: nine lines, and 10^9 values when they are written out."""
    paint(tmp_path / "in" / "images", four())
    yolo(tmp_path / "in" / "labels", four())
    lines = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    for before, name in zip("abcdefg", "bcdefgh"):
        lines.append(f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]")
    (tmp_path / "in" / "data.yaml").write_text("\n".join([*lines, where]))
    begun = time.monotonic()
    with pytest.raises(UserError, match=r"data\.yaml has (names|kpt_shape)") as caught:
        convert(tmp_path / "in", tmp_path / "out")
    assert len(str(caught.value)) < 500 and time.monotonic() - begun < 5


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    form=st.sampled_from(["coco", "yolo", "voc"]),
    size=st.tuples(st.integers(5, 300), st.integers(5, 300)),
    orientation=st.integers(1, 8),
    factor=st.sampled_from([1, 2, 3]),
    corners=st.lists(st.tuples(*[st.floats(0, 1)] * 4), min_size=1, max_size=4),
)
def test_boxes_stay_where_they_are(tmp_path, form, size, orientation, factor, corners):
    """Whatever the size, EXIF's orientation and the factor between annotation and file, a box moves by half a pixel."""
    with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
        source, (width, height) = Path(folder) / "in", size
        exif = Image.Exif()
        exif[0x0112] = orientation
        boxes = []
        for x0, y0, x1, y1 in corners:
            left, top = round(min(x0, x1) * (width - 1)), round(min(y0, y1) * (height - 1))
            right, bottom = max(left + 1, round(max(x0, x1) * width)), max(top + 1, round(max(y0, y1) * height))
            boxes.append((left, top, right - left, bottom - top))
        shown = [(f"{n}.png", width * factor, height * factor, []) for n in range(2)]
        (source / "images").mkdir(parents=True)
        for name, w, h, _ in shown:
            Image.new("L", (h, w) if orientation >= 5 else (w, h)).save(source / "images" / name, exif=exif)
        images = [(name, width, height, [("cat", *box) for box in boxes]) for name, *_ in shown]
        if form == "coco":
            coco(source / "r.json", images)
        elif form == "yolo":
            yolo(source / "labels", images)
            names_file(source)
        else:
            voc(source / "Annotations", images)
        convert(source, Path(folder) / "out", val=0.5)
        data = open_data(Path(folder) / "out", "train")
        assert data.image(0).size == (width * factor, height * factor)
        assert len(data.objects(0)) == len(boxes)
        assert abs(data.objects(0).boxes - factor * np.array(boxes)).max() < 0.5


def upright(size: tuple[int, int], orientation: int, box: tuple[int, ...]) -> tuple[tuple[int, int], tuple[int, ...]]:
    """Size of an image and corners of a box as viewers show them; Pillow turns a painted rectangle."""
    painted = Image.new("1", size)
    painted.paste(1, box)
    painted.getexif()[0x0112] = orientation
    shown = ImageOps.exif_transpose(painted)
    return shown.size, shown.getbbox()


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=st.tuples(st.integers(5, 200), st.integers(5, 200)),
    factor=st.sampled_from([1, 1.5, 3]),
    orientations=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    as_stored=st.booleans(),
    corners=st.lists(st.tuples(*[st.floats(0, 1)] * 4), min_size=1, max_size=4),
)
@pytest.mark.parametrize("form", ["yolo", "voc"])
def test_there_and_back(tmp_path, form, size, factor, orientations, as_stored, corners):
    """COCO to YOLO or Pascal VOC and back: no side of a box moves by more than half a pixel.

    The files are larger than the annotated ones by the factor, and held in one way for COCO and in another for the
    second form. COCO's annotations are for the pixels as stored or as shown.
    """

    def save(folder: Path, shown: tuple[int, int], orientation: int) -> None:
        folder.mkdir(parents=True)
        exif = Image.Exif()
        exif[0x0112] = orientation
        for n in range(2):
            Image.new("L", shown[::-1] if orientation >= 5 else shown).save(folder / f"{n}.png", exif=exif)

    def objects(boxes: np.ndarray) -> list[tuple]:
        return [("cat", left, top, right - left, bottom - top) for left, top, right, bottom in boxes.tolist()]

    first, second = orientations
    width, height = size
    stored = np.array(
        [
            (left, top, max(left + 1, round(max(x0, x1) * width)), max(top + 1, round(max(y0, y1) * height)))
            for x0, y0, x1, y1 in corners
            for left, top in [(round(min(x0, x1) * (width - 1)), round(min(y0, y1) * (height - 1)))]
        ]
    )
    turned = [upright(size, first, tuple(box)) for box in stored.tolist()]
    (shown_size, _), shown = turned[0], np.array([box for _, box in turned])
    if size == shown_size:  # nothing tells whether stored or shown pixels are meant: taken as shown
        as_stored = False
    file_size = tuple(round(factor * side) for side in shown_size)
    wanted = shown * np.tile(np.array(file_size) / shown_size, 2)
    with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
        root = Path(folder)
        save(root / "coco", file_size, first)
        said, boxes = (size, stored) if as_stored else (shown_size, shown)
        coco(root / "coco" / "r.json", [(f"{n}.png", *said, objects(boxes)) for n in range(2)])
        convert(root / "coco", root / "once", val=0.5)
        once = open_data(root / "once", "train").objects(0).boxes.astype(float)
        once[:, 2:] += once[:, :2]

        save(root / form / "images", file_size, second)
        if form == "voc":
            once = np.floor(once + 0.5)  # it counts whole pixels
        images = [(f"{n}.png", *file_size, objects(once)) for n in range(2)]
        (yolo if form == "yolo" else voc)(root / form / "labels", images)
        names_file(root / form)
        convert(root / form, root / "twice", val=0.5)
        for split in ("train", "val"):
            data = open_data(root / "twice", split)
            twice = data.objects(0).boxes.astype(float)
            twice[:, 2:] += twice[:, :2]
            assert data.image(0).size == file_size and len(twice) == len(wanted)
            assert abs(twice - wanted).max() < 0.5 + 1e-3
