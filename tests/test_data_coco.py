"""COCO-format folders: the border between COCO's ids and ours, odd files, and every error message."""

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.cocoeval import COCOeval

from regolite.data import CocoFolder, batch_images, check_coco, collate, make_transform, open_data, read_image
from regolite.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from regolite.errors import UserError
from regolite.training import RunConfig
from regolite.training.setup import prepare_data

TINY = Path(__file__).parents[1] / "data" / "coco_tiny"


def content():
    """Three images of 40x30: two objects and a crowd; nothing; one object that juts out and one without area."""
    return {
        "images": [
            {"id": 70, "file_name": "a.png", "width": 40, "height": 30},
            {"id": 5, "file_name": "b.png", "width": 40, "height": 30},
            {"id": 9, "file_name": "c.png", "width": 40, "height": 30},
        ],
        "annotations": [
            {"id": 11, "image_id": 9, "category_id": 90, "bbox": [-10, 20, 20, 20], "area": 77.5, "iscrowd": 0},
            {"id": 12, "image_id": 70, "category_id": 90, "bbox": [4, 6, 10, 12], "area": 100, "iscrowd": 0},
            {"id": 13, "image_id": 70, "category_id": 3, "bbox": [0, 0, 40, 30], "iscrowd": 1, "area": 1200},
            {"id": 14, "image_id": 70, "category_id": 17, "bbox": [20, 0, 20, 30], "segmentation": [[1, 2]]},
            {"id": 15, "image_id": 9, "category_id": 3, "bbox": [5, 5, 0, 5], "area": 0, "iscrowd": 0},
        ],
        "categories": [{"id": 90, "name": "brush"}, {"id": 3, "name": "car"}, {"id": 17, "name": "cat"}],
    }


@pytest.fixture
def folder(tmp_path):
    """Writes a data folder from its JSON content, images included."""

    def write(content, names=("annotations/instances_train.json", "images")):
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / names[1]).mkdir(exist_ok=True)
        (tmp_path / names[0]).write_text(content if isinstance(content, str) else json.dumps(content))
        for name in ("a.png", "b.png", "c.png"):
            Image.new("RGB", (40, 30), (255, 0, 0)).save(tmp_path / names[1] / name)
        return tmp_path

    return write


def test_items(folder):
    data = CocoFolder(folder(content()))
    assert data.classes == ("car", "cat", "brush")
    assert data.category_ids == (3, 17, 90)
    assert data.image_ids == [70, 5, 9]
    assert len(data) == 3

    pixels, target = data[0]
    assert pixels.shape == (3, 30, 40)
    red = (torch.tensor([1.0, 0, 0]) - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    torch.testing.assert_close(pixels[:, 7, 9], red)
    assert (target.image_id, target.size) == (70, (30, 40))
    assert target.labels.tolist() == [2, 1]  # the crowd is no target
    expected = [[9 / 40, 12 / 30, 10 / 40, 12 / 30], [0.75, 0.5, 0.5, 1.0]]
    torch.testing.assert_close(target.boxes, torch.tensor(expected))

    empty = data[1][1]
    assert len(empty) == 0
    assert empty.boxes.shape == (0, 4)
    assert empty.labels.dtype == torch.int64

    clipped = data[-1][1]  # the box without area is gone, the other clipped to 0..10 x 20..30
    assert clipped.labels.tolist() == [2]
    torch.testing.assert_close(clipped.boxes, torch.tensor([[5 / 40, 25 / 30, 10 / 40, 10 / 30]]))
    with pytest.raises(IndexError):
        data[3]
    assert data.path(2).name == "c.png"
    assert data.image(2).size == (40, 30)


def test_ground_truth_for_evaluation(folder, capsys):
    data = CocoFolder(folder(content()))
    assert sorted(data.coco.anns) == [11, 12, 13, 14, 15]
    assert data.coco.anns[13]["iscrowd"] == 1
    assert data.coco.anns[11]["bbox"] == [-10, 20, 20, 20]  # evaluation sees the file's own boxes
    assert data.coco.anns[11]["area"] == 77.5
    assert data.coco.anns[14]["area"] == 600  # not given: width times height
    assert data.coco.anns[12]["category_id"] == 90
    assert sorted(data.coco.imgs) == [5, 9, 70]
    assert data.coco.cats[17]["name"] == "cat"
    assert capsys.readouterr().out == ""
    assert sorted(CocoFolder(folder(content()), limit=1).coco.anns) == [12, 13, 14]


def test_limit_and_empty_images(folder):
    root = folder(content())
    assert CocoFolder(root, limit=2).image_ids == [70, 5]
    assert CocoFolder(root, limit=99).image_ids == [70, 5, 9]
    assert CocoFolder(root, keep_empty=False).image_ids == [70, 9]
    only_crowds = content()
    only_crowds["annotations"] = only_crowds["annotations"][2:3]
    with pytest.raises(UserError, match="no image with an object"):
        CocoFolder(folder(only_crowds), keep_empty=False)


def test_a_fair_share_of_the_training_images(folder):
    """Of a file that lists one source after another, every tenth image is a share of both."""
    listed = content()
    images = [{"id": i, "file_name": "a.png" if i < 40 else "b.png", "width": 40, "height": 30} for i in range(100)]
    listed |= {"images": images, "annotations": []}
    root = folder(listed)
    folder(listed, ("annotations/instances_val.json", "images"))
    tenth = open_data(f"{root}:every=10")
    assert tenth.image_ids == list(range(0, 100, 10))
    assert [tenth.file_name(i) for i in range(10)] == ["a.png"] * 4 + ["b.png"] * 6
    assert len(open_data(f"{root}:every=10", "val")) == 100, "whoever trains on a share is judged on all images"
    assert open_data(f"{root}:every=40", limit=2).image_ids == [0, 40]
    for wrong in ("0", "-1", "ten", ""):
        with pytest.raises(UserError, match="is not a whole number greater than 0; write it as in DIR:every=10"):
            open_data(f"{root}:every={wrong}")


def test_cocos_own_names(folder):
    root = folder(content(), ("annotations/instances_val2017.json", "val2017"))
    assert CocoFolder(root, "val")[0][1].image_id == 70
    assert open_data(root, "val", limit=1).image_ids == [70]


def test_annotation_ids_from_zero_count_in_evaluation(folder):
    changed = content()
    changed["annotations"] = [
        {"id": 0, "image_id": 70, "category_id": 3, "bbox": [4, 6, 10, 12]},
        {"id": 1, "image_id": 70, "category_id": 17, "bbox": [20, 0, 20, 30], "decided_by": 0},
    ]
    data = CocoFolder(folder(changed))
    assert sorted(data.coco.anns) == [1, 2]
    assert data.relations(0) == [(1, 0)]
    evaluator = COCOeval(data.coco, _detections_of_truth(data), "bbox")
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()
    assert evaluator.stats[0] == pytest.approx(1.0)


def _detections_of_truth(data):
    """The targets of a data set as perfect detections in COCO's format."""
    detections = []
    for i in range(len(data)):
        target = data[i][1]
        height, width = target.size
        for label, (x, y, w, h) in zip(target.labels.tolist(), target.boxes.tolist(), strict=True):
            box = [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height]
            one = {"image_id": target.image_id, "category_id": data.category_ids[label], "bbox": box, "score": 0.9}
            detections.append(one)
    return data.coco.loadRes(detections)


def test_coco_tiny():
    data = CocoFolder(TINY, "train")
    assert (len(data), len(data.classes), data.category_ids[-1]) == (126, 80, 90)
    targets = [len(data.objects(i).targets(*data.size(i))) for i in range(len(data))]
    assert sum(targets) == 1156 - 15  # all annotations but the crowds
    assert sum(n > 0 for n in targets) == 124
    gray = data.image_ids.index(86)  # stored as grayscale
    pixels, _ = data[gray]
    gray_levels = pixels * torch.tensor(IMAGENET_STD)[:, None, None] + torch.tensor(IMAGENET_MEAN)[:, None, None]
    torch.testing.assert_close(gray_levels[0], gray_levels[2], atol=1e-5, rtol=0)


def test_perfect_detections_reach_full_ap():
    data = CocoFolder(TINY, "val", limit=4)
    evaluator = COCOeval(data.coco, _detections_of_truth(data), "bbox")
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()
    assert evaluator.stats[0] == pytest.approx(1.0)


def save_grey16(path):
    ramp = np.linspace(0, 65535, 40 * 30).reshape(30, 40).astype(np.uint16)
    Image.fromarray(ramp).save(path)


def save_palette(path):
    image = Image.new("P", (40, 30), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    image.save(path, transparency=b"\x00\x80")


def save_turned(path):
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees to look at"
    Image.new("RGB", (40, 30), (10, 200, 30)).save(path, exif=exif)


@pytest.mark.parametrize(
    "name, save, corner, end",
    [
        ("gray.jpg", lambda path: Image.new("L", (40, 30), 99).save(path), (99, 99, 99), (99, 99, 99)),
        ("cmyk.jpg", lambda path: Image.new("CMYK", (40, 30), (0, 255, 255, 0)).save(path), (255, 0, 0), (255, 0, 0)),
        ("palette.png", save_palette, (10, 200, 30), (10, 200, 30)),
        ("alpha.png", lambda p: Image.new("RGBA", (40, 30), (9, 8, 7, 0)).save(p), (9, 8, 7), (9, 8, 7)),
        ("gray16.png", save_grey16, (0, 0, 0), (255, 255, 255)),
        ("bit.png", lambda path: Image.new("1", (40, 30), 1).save(path), (255, 255, 255), (255, 255, 255)),
        ("turned.png", save_turned, (10, 200, 30), (10, 200, 30)),
    ],
)
def test_any_color_mode(tmp_path, name, save, corner, end):
    save(tmp_path / name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = read_image(tmp_path / name, upright=False)
    assert (image.mode, image.size) == ("RGB", (40, 30))
    np.testing.assert_allclose(image.getpixel((0, 0)), corner, atol=3)
    np.testing.assert_allclose(image.getpixel((39, 29)), end, atol=3)


def change(key, n, **fields):
    """The content with fields of record ``n`` of a list changed; a field set to None is taken out."""
    changed = content()
    changed[key][n].update(fields)
    changed[key][n] = {k: v for k, v in changed[key][n].items() if v is not None}
    return changed


@pytest.mark.parametrize(
    "given, words",
    [
        ("{", ["instances_train.json", "not valid JSON", "repair"]),
        ("[]", ["instances_train.json", "no list of images"]),
        (content() | {"annotations": [1]}, ["instances_train.json", "no list of annotations"]),
        (content() | {"categories": []}, ["instances_train.json", "lists no categories"]),
        (content() | {"images": []}, ["instances_train.json", "lists no images"]),
        (change("images", 1, height=None), ["image 5 has no 'height'"]),
        (change("images", 1, width=4.5), ["image with width 4.5", "whole number"]),
        (change("images", 1, id=70), ["image id 70", "more than once"]),
        (change("annotations", 1, id=11), ["annotation id 11", "more than once"]),
        (change("categories", 1, id=90), ["category id 90", "more than once"]),
        (change("annotations", 1, image_id=8), ["annotation 12", "image 8", "does not list"]),
        (change("annotations", 1, category_id=8), ["annotation 12", "category 8", "does not list"]),
        (change("annotations", 1, bbox=[1, 2, 3]), ["annotation 12", "[1, 2, 3]", "[x, y, width, height]"]),
        (change("annotations", 1, bbox=[9, 9, -3, 3]), ["annotation 12", "[x, y, width, height]"]),
        (change("annotations", 1, bbox=[41, 0, 5, 5]), ["annotation 12 of image 70", "wholly outside", "40x30"]),
        (change("annotations", 1, bbox=[0, -9, 5, 9]), ["annotation 12 of image 70", "wholly outside", "40x30"]),
        (change("annotations", 1, bbox=None), ["annotation 12 has no 'bbox'"]),
        (change("annotations", 1, bbox=None, segmentation=[[1, 2]]), ["annotation 12 has no 'bbox'"]),
        (change("annotations", 1, bbox=5), ["annotation 12 has bbox 5", "[x, y, width, height]"]),
        (change("annotations", 1, bbox=["4", "6", "10", "12"]), ["annotation 12 has bbox ['4'"]),
        (change("annotations", 1, bbox=[True, 6, 10, 12]), ["annotation 12 has bbox [True"]),
        (change("annotations", 1, bbox=[4, 6, float("nan"), 12]), ["annotation 12 has bbox [4, 6, nan, 12]"]),
        (change("annotations", 1, bbox=[4, 6, 1e300, 12]), ["annotation 12 has bbox [4, 6, 1e+300, 12]"]),
        (change("annotations", 1, bbox=[4, 6, 10**400, 12]), ["annotation 12 has bbox"]),
        (change("annotations", 1, area=True), ["annotation 12 has area True"]),
        (change("annotations", 1, area=-4), ["annotation 12 has area -4"]),
        (change("annotations", 1, area=float("inf")), ["annotation 12 has area inf"]),
        (change("annotations", 1, iscrowd=7), ["annotation 12 has iscrowd 7", "0 or 1"]),
        (change("annotations", 1, iscrowd=True), ["annotation 12 has iscrowd True", "0 or 1"]),
        (change("annotations", 1, id="a7"), ["annotation with id 'a7'", "number 2 of the list", "regolite convert"]),
        (change("annotations", 1, id=2**63), ["annotation with id 9223372036854775808", "below 2**63"]),
        (change("annotations", 1, image_id=70.0), ["annotation with image_id 70.0", "id 12"]),
        (change("annotations", 1, category_id=True), ["annotation with category_id True", "id 12"]),
        (change("images", 1, width=0), ["image 5 has width 0"]),
        (change("images", 1, file_name=7), ["image 5 has file_name 7"]),
        (change("categories", 1, name="brush"), ["categories 90 and 3", "both called 'brush'", "rename"]),
        (change("categories", 1, name=True), ["category 3 has name True"]),
        ('{"images": ' + 10**5 * "[", ["nested too deeply"]),
        (change("annotations", 1, area="big"), ["annotation 12 has area 'big'"]),
        (change("images", 2, file_name="d.png"), ["1 of the 3 images", "missing", "the first is d.png"]),
    ],
)
def test_wrong_content_is_named(folder, given, words):
    with pytest.raises(UserError) as error:
        CocoFolder(folder(given))
    message = str(error.value)
    assert all(word in message for word in [*words, "instances_train.json"]), message
    assert "\n" not in message


def test_large_ids_are_kept_or_numbered_again(folder):
    """Ids of 64 bits are common as hashes. Those of annotations would be rounded in pycocotools' tables of matches."""
    given = content()
    large = 2**62 + 1
    for image in given["images"]:
        image["id"] += large
    for n, annotation in enumerate(given["annotations"]):
        annotation.update(id=large + 50 * n, image_id=annotation["image_id"] + large)
    given["annotations"][3]["decided_by"] = large + 50
    data = CocoFolder(folder(given))
    assert data.image_ids == [large + 70, large + 5, large + 9]
    assert sorted(data.coco.anns) == [1, 2, 3, 4, 5]
    assert data.relations(0) == [(1, 0)]
    figures = []
    for one in (data, CocoFolder(folder(content()))):
        evaluator = COCOeval(one.coco, _detections_of_truth(one), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
        figures.append(evaluator.stats.tolist())
    assert figures[0] == figures[1] and figures[0][0] > 0


def test_an_outline_alone_gives_the_box(folder):
    mask = np.zeros((30, 40), dtype=np.uint8, order="F")
    mask[5:9, 10:17] = 1
    rle = coco_mask.encode(mask)
    outlines = [
        [[4, 6, 14, 6, 9, 18.5]],
        [[4, 6, 8, 6, 8, 9], [20, 1, 30, 1, 30, 4, 20, 4]],
        [4, 6, 14, 6, 14, 18],
        {"size": [30, 40], "counts": rle["counts"].decode()},
        {"size": [30, 40], "counts": [305, 4, *[26, 4] * 6, 1200 - 305 - 28 - 26 * 6]},
    ]
    given = content()
    given["annotations"] = [
        {"id": n, "image_id": 70, "category_id": 3, "segmentation": outline, **({"bbox": None} if n == 1 else {})}
        for n, outline in enumerate(outlines, 1)
    ]
    boxes = CocoFolder(folder(given)).objects(0).boxes
    assert boxes.tolist() == [[4, 6, 10, 12.5], [4, 1, 26, 8], [4, 6, 10, 12], [10, 5, 7, 4], [10, 5, 7, 4]]


@pytest.mark.parametrize(
    ("listed", "stored"),
    [
        ("images/a.png", "images/a.png"),  # relative to the folder of the data
        ("images\\a.png", "images/a.png"),
        ("cam 1/a.png", "images/cam 1/a.png"),
        ("cam%201/a.png", "images/cam 1/a.png"),
        ("100%.png", "images/100%.png"),
        ("a.png", "images/train/a.png"),
        ("a.png", "annotations/a.png"),
        ("D:\\photos\\a.png", "images/deep/a.png"),
        ("/data/upload/a.png", "train2017/a.png"),
    ],
)
def test_the_file_that_is_meant(folder, listed, stored):
    root = folder(change("images", 0, file_name=listed))
    for path in (root / "images").iterdir():
        if path.name == "a.png":
            path.unlink()
    (root / stored).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30), (1, 2, 3)).save(root / stored)
    data = CocoFolder(root)
    assert data.path(0) == root / stored and data.image(0).getpixel((0, 0)) == (1, 2, 3)
    assert data.image(1).getpixel((0, 0)) == (255, 0, 0) and data.file_name(0) == listed


def test_another_splits_image_is_never_taken(folder):
    root = folder(change("images", 0, file_name="deep/d.png"))
    (root / "images" / "deep").mkdir()
    (root / "images" / "val").mkdir()
    (root / "val").mkdir()
    for place in (root / "images" / "val", root / "val"):
        Image.new("RGB", (40, 30)).save(place / "d.png")
    with pytest.raises(UserError, match="the first is deep/d.png"):
        CocoFolder(root)
    for place in ("one", "two"):  # the base name is not unique
        (root / "images" / place).mkdir()
        Image.new("RGB", (40, 30)).save(root / "images" / place / "d.png")
    with pytest.raises(UserError, match="the first is deep/d.png"):
        CocoFolder(root)
    (root / "images" / "two" / "d.png").unlink()
    assert CocoFolder(root).path(0) == root / "images" / "one" / "d.png"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (change("categories", 1, name="bus"), "3 is car in train and bus in val"),
        ({**content(), "categories": content()["categories"][:2], "annotations": []}, "17 .cat. is in train alone"),
        ({**content(), "categories": [*content()["categories"], {"id": 4, "name": "x"}]}, "4 .x. is in val alone"),
    ],
)
def test_categories_that_differ_between_splits_are_named(folder, changed, said):
    root = folder(content())
    folder(changed, ("annotations/instances_val.json", "images"))
    config = RunConfig(data=str(root), output="unused", model="deformable_detr_scenes", image_size=64)
    with pytest.raises(UserError, match=f"training and validation annotations name different categories: {said}: give"):
        prepare_data(config, None)
    with pytest.raises(UserError, match="different classes"):
        open_data(root, "train+val")
    folder(content(), ("annotations/instances_val.json", "images"))
    assert prepare_data(config, None)[2].classes == ("car", "cat", "brush")


def test_wrong_places_are_named(folder, tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist"):
        CocoFolder(tmp_path / "nowhere")
    root = folder(content())
    with pytest.raises(UserError, match=r"split 'val'.*instances_val.json and instances_val2017.json"):
        CocoFolder(root, "val")
    with pytest.raises(UserError, match="limit of 0"):
        CocoFolder(root, limit=0)
    shutil.rmtree(root / "images")
    with pytest.raises(UserError, match="looked for the folders images, train2017 and train"):
        CocoFolder(root)


def test_wrong_images_are_named_when_read(folder):
    root = folder(content())
    (root / "images" / "a.png").write_bytes((root / "images" / "a.png").read_bytes()[:60])
    Image.new("RGB", (30, 40)).save(root / "images" / "b.png")
    Image.new("RGB", (44, 30)).save(root / "images" / "c.png")
    data = CocoFolder(root)
    with pytest.raises(UserError, match="a.png cannot be read.*replace"):
        data[0]
    with pytest.raises(UserError, match="b.png is 30x40 .* says 40x30: put the file back .* or correct the width"):
        data[1]
    with pytest.raises(UserError, match="c.png is 44x30 .* says 40x30: put the file back"):
        data[2]
    with pytest.raises(UserError, match="gone.png does not exist"):
        read_image(root / "gone.png")


def corners_of(seen):
    """Left, top, right and bottom of what is seen in an image."""
    rows, columns = np.nonzero(np.asarray(seen))
    return np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("factor", [0.5, 1, 2])
def test_files_that_were_scaled_after_annotation(tmp_path, caplog, factor, orientation):
    """Boxes, the image and the ground truth of evaluation are in the same pixels, those of the annotation."""
    box, exif = [40, 20, 60, 40], Image.Exif()
    exif[0x0112] = orientation
    given = {
        "images": [{"id": 3, "file_name": "a.png", "width": 160, "height": 120}],
        "annotations": [{"id": 1, "image_id": 3, "category_id": 1, "bbox": box, "iscrowd": 0}],
        "categories": [{"id": 1, "name": "dog"}],
    }
    (tmp_path / "annotations").mkdir()
    (tmp_path / "images").mkdir()
    (tmp_path / "annotations" / "instances_train.json").write_text(json.dumps(given))
    shown = Image.new("RGB", (160, 120))
    shown.paste("white", (40, 20, 100, 60))
    shown = shown.resize((int(160 * factor), int(120 * factor)))
    stored = shown if orientation == 1 else shown.transpose(Image.Transpose.ROTATE_90)  # by a camera held sideways
    stored.save(tmp_path / "images" / "a.png", exif=exif)
    caplog.clear()
    data = CocoFolder(tmp_path, transform=make_transform("laptop", 80, train=False))
    said = [record.getMessage() for record in caplog.records]
    size = f"{stored.width}x{stored.height}"
    wanted = f"1 of 1 images were scaled after annotation, as a.png ({size} pixels, annotated at 160x120)"
    assert len(said) == (factor != 1) and all(wanted in one for one in said)
    report = check_coco(tmp_path, ["train"], read_images=True)
    assert not report.wrong
    assert [one["kind"] for one in report.notes] == ["image scaled after annotation"] * (factor != 1)

    image = np.asarray(data.image(0))
    assert image.shape == (120, 160, 3)
    assert np.abs(corners_of(image[..., 0] > 127) - [40, 20, 100, 60]).max() <= 1
    pixels, target = data[0]
    assert target.size == (120, 160)
    torch.testing.assert_close(
        target.boxes, torch.tensor([[70 / 160, 40 / 120, 60 / 160, 40 / 120]]), atol=0.01, rtol=0
    )
    found = corners_of(pixels[0] > pixels[0].mean())
    assert np.abs(found - np.array([40, 20, 100, 60]) * pixels.shape[2] / 160).max() <= 1, "after the transform, too"
    assert data.coco.anns[1]["bbox"] == box and data.coco.imgs[3]["width"] == 160


def test_of_a_large_data_set_a_sample_is_looked_at(folder, caplog, monkeypatch):
    monkeypatch.setattr("regolite.data.coco.PROBED", 2)
    root = folder(content())
    for name in ("a.png", "c.png"):
        Image.new("RGB", (80, 60)).save(root / "images" / name)
    CocoFolder(root)
    [said] = [record.getMessage() for record in caplog.records]
    assert "2 of 2 images looked at were scaled after annotation, as a.png (80x60 pixels, annotated at 40x30)" in said


def test_collate_pads_right_and_bottom():
    images = [torch.full((3, 4, 6), 1.0), torch.full((3, 5, 2), 2.0)]
    batch = batch_images(images)
    assert batch.pixels.shape == (2, 3, 5, 6)
    assert batch.sizes.tolist() == [[4, 6], [5, 2]]
    for image, pixels, mask in zip(images, batch.pixels, batch.mask, strict=True):
        height, width = image.shape[-2:]
        assert torch.equal(pixels[:, :height, :width], image)
        assert not mask[:height, :width].any()
        assert (~mask).sum() == height * width
        assert (pixels[:, mask] == 0).all()
    assert batch_images(images, multiple=4).pixels.shape == (2, 3, 8, 8)
    assert batch_images(images, multiple=4).mask[0, 4:].all()


def test_data_loader(folder):
    data = CocoFolder(folder(content()))
    loader = torch.utils.data.DataLoader(data, batch_size=2, collate_fn=collate, num_workers=1)
    batches = list(loader)
    assert [len(batch) for batch, _ in batches] == [2, 1]
    assert [target.image_id for _, targets in batches for target in targets] == [70, 5, 9]
