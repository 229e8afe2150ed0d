"""Data of one's own: each form and layout gives the same pictures and boxes; what is wrong is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

from regolite.cli import main
from regolite.data import convert, cut_outs, open_data
from regolite.errors import UserError

# name, width, height, objects: class and x, y, width, height in pixels
PICTURES = [
    ("a.jpg", 100, 80, [("cat", 10, 20, 30, 40), ("dog", 50, 0, 50, 80)]),
    ("b.png", 60, 120, [("dog", 6, 12, 30, 60)]),
    ("c.jpg", 80, 80, []),
    ("d.jpg", 64, 64, [("ant", 0, 0, 64, 64)]),
    ("e.jpg", 90, 70, [("cat", 9, 7, 18, 14), ("cat", 45, 35, 18, 14)]),
]
CLASSES = ["cat", "dog", "ant"]  # in an order of their own


def paint(folder: Path, pictures=PICTURES) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for n, (name, width, height, _) in enumerate(pictures):
        Image.new("RGB", (width, height), (40 * n, 90, 160)).save(folder / name)


def coco(file: Path, pictures=PICTURES) -> None:
    images, annotations = [], []
    for i, (name, width, height, objects) in enumerate(pictures, 7):
        images.append({"id": i, "file_name": name, "width": width, "height": height})
        for label, x, y, w, h in objects:
            record = {"id": len(annotations) + 1, "image_id": i, "category_id": 10 * CLASSES.index(label) + 10}
            outline = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            annotations.append({**record, "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0, "segmentation": outline})
    categories = [{"id": 10 * n + 10, "name": name} for n, name in enumerate(CLASSES)]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))


def yolo(folder: Path, pictures=PICTURES) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, width, height, objects in pictures:
        lines = [
            f"{CLASSES.index(c)} {(x + w / 2) / width} {(y + h / 2) / height} {w / width} {h / height}"
            for c, x, y, w, h in objects
        ]
        (folder / name).with_suffix(".txt").write_text("\n".join(lines))


def voc(folder: Path, pictures=PICTURES) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, width, height, objects in pictures:
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
    """Every picture of a data folder with its objects."""
    found = {}
    for split in ("train", "val"):
        dataset = open_data(root, split)
        for i in range(len(dataset)):
            objects = dataset.objects(i)
            dataset[i]  # its size is what the annotation says
            rounded = [tuple(round(float(v), 2) for v in box) for box in objects.boxes]
            found[dataset.file_name(i)] = {(dataset.classes[k], *box) for k, box in zip(objects.labels, rounded)}
    return found


WANTED = {name: {(c, *map(float, box)) for c, *box in objects} for name, _, _, objects in PICTURES}


def exported(root: Path, layout: str) -> Path:
    """An export in one of the layouts that labelling tools write."""
    train, val = PICTURES[:3], PICTURES[3:]
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
    assert done.pictures == {"train": 3, "val": 2}
    assert boxes(tmp_path / "data") == WANTED
    if splits:
        dataset = open_data(tmp_path / "data", "val")
        assert sorted(dataset.file_name(i) for i in range(2)) == ["d.jpg", "e.jpg"]
    assert sum(count for split in done.objects.values() for count in split.values()) == 6
    assert (tmp_path / "data" / "train").is_dir() and str(done).startswith(f"{form}, 3 classes")


def test_held_out_pictures_depend_on_the_seed_alone(tmp_path):
    source = exported(tmp_path / "export", "yolo")
    held = []
    for n, seed in enumerate((0, 0, 1, 2, 3)):
        convert(source, tmp_path / f"data{n}", val=0.4, seed=seed)
        held.append({path.name for path in (tmp_path / f"data{n}" / "val").iterdir()})
    assert held[0] == held[1] and len({frozenset(names) for names in held}) > 1


def test_test_pictures_are_neither_trained_on_nor_held_out(tmp_path):
    for split, part in (("train", PICTURES[:3]), ("test", PICTURES[3:])):
        paint(tmp_path / "export" / split, part)
        coco(tmp_path / "export" / split / "_annotations.coco.json", part)
    done = convert(tmp_path / "export", tmp_path / "data", val=0.34)
    assert done.pictures == {"train": 2, "val": 1, "test": 2}
    assert {path.name for path in (tmp_path / "data" / "test").iterdir()} == {"d.jpg", "e.jpg"}


def test_names_of_classes_may_lie_in_another_folder(tmp_path):
    source = exported(tmp_path / "export", "yolo")
    (source / "config").mkdir()
    (source / "data.yaml").rename(source / "config" / "data.yaml")
    assert sorted(convert(source, tmp_path / "data").classes) == sorted(CLASSES)


def test_an_export_with_validation_pictures_alone_is_divided(tmp_path):
    paint(tmp_path / "export" / "valid")
    voc(tmp_path / "export" / "valid")
    assert convert(tmp_path / "export", tmp_path / "data", val=0.4).pictures == {"train": 3, "val": 2}


def test_nothing_is_written_where_nothing_can_be_learnt(tmp_path):
    source = exported(tmp_path / "export", "yolo")
    for path in (source / "labels").iterdir():
        path.write_text("")
    with pytest.raises(UserError, match="nothing to learn from"):
        convert(source, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_a_picture_held_sideways_is_stored_upright(tmp_path):
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
        "stray.txt: left out, there is no picture of this name",
        "c and 0 more pictures have no annotation file: taken as empty",
        "b.png: left out 2 boxes without area in the picture",
        "b.png: cut 1 boxes at the picture's edge",
    ]
    assert boxes(tmp_path / "data")["b.png"] == {("dog", 42.0, 30.0, 18.0, 60.0)}
    assert "! stray.txt" in str(done)


def test_missing_and_broken_pictures_of_coco_are_named(tmp_path):
    source = exported(tmp_path / "export", "coco")
    (source / "images" / "a.jpg").unlink()
    (source / "images" / "e.jpg").write_bytes((source / "images" / "e.jpg").read_bytes()[:300])
    done = convert(source, tmp_path / "data", val=0.5)
    missing, broken = sorted(done.problems)
    assert missing == "a.jpg: left out, result.json lists it, but it is not there"
    assert broken.startswith("e.jpg: left out, picture ") and "replace the file" in broken
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
        ("coco", lambda root: (root / "result.json").unlink(), "has pictures but no boxes"),
        ("coco", lambda root: shutil.rmtree(root / "images"), "holds no pictures"),
        ("voc", lambda root: (root / "Annotations" / "a.xml").write_text("<annot"), "cannot be read as Pascal VOC"),
        (
            "voc",
            lambda root: [p.rename(root / f"{p.stem}.xml") for p in (root / "Annotations").iterdir()],
            "no picture",
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
    with pytest.raises(UserError, match="is no folder"):
        convert(tmp_path / "nothing", tmp_path / "data")
    with pytest.raises(UserError, match="val=1.5 must lie between"):
        convert(source, tmp_path / "data", val=1.5)
    paint(tmp_path / "one", PICTURES[:1])
    voc(tmp_path / "one", PICTURES[:1])
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
    assert len(annotations) == sum(len(objects) for *_, objects in PICTURES)
    for one in annotations:
        x, y, w, h = one["bbox"]
        assert one["segmentation"] == [[x, y, x + w, y, x + w, y + h, x, y + h]]
    [train_file] = (tmp_path / "data" / "annotations").glob("instances_train.json")
    assert train_file.is_file() and cut_outs(tmp_path / "data", min_size=10)


def test_outlines_of_a_picture_that_is_turned_are_left_out(tmp_path):
    source = tmp_path / "source"
    paint(source / "images")
    for name, *_ in PICTURES:
        path = source / "images" / name
        with Image.open(path) as image:
            exif = image.getexif()
            exif[0x0112] = 6
            image.save(path, exif=exif)
    coco(source / "annotations.json")
    convert(source, tmp_path / "data")
    for file in (tmp_path / "data" / "annotations").iterdir():
        assert not any(one["segmentation"] for one in json.loads(file.read_text())["annotations"])
