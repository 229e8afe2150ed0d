"""Copy-paste augmentation: what is cut out, and that pasted pixels and boxes agree."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from pycocotools import mask as rle
from torchvision.ops import box_convert

from regolite.data import CocoFolder, CutOut, DetectionDataset, Pasted, cut_outs, make_transform
from regolite.data.dataset import Objects
from regolite.errors import UserError
from regolite.training.batches import SeededItems

TINY = Path(__file__).parents[1] / "data" / "coco_tiny"
COLORS = {"cat": (255, 0, 0), "dog": (0, 255, 0), "cow": (0, 0, 255)}
WIDTH, HEIGHT = 120, 90


def rectangle(x0, y0, x1, y1):
    """A rectangle as a polygon."""
    return [[x0, y0, x1, y0, x1, y1, x0, y1]]


def encoded(compressed):
    """The RLE of a disk of 40 pixels in an image of 120x90, and where it is."""
    disk = Image.new("L", (WIDTH, HEIGHT))
    ImageDraw.Draw(disk).ellipse([10, 20, 49, 59], fill=1)
    mask = np.asfortranarray(disk)
    if compressed:
        code = rle.encode(mask)
        return {"size": code["size"], "counts": code["counts"].decode()}
    changes = np.flatnonzero(np.diff(mask.ravel(order="F"), prepend=0, append=0))
    return {"size": [HEIGHT, WIDTH], "counts": np.diff([0, *changes, mask.size]).tolist()}


@pytest.fixture
def folder(tmp_path):
    """Writes a data folder of one gray image with the given segmentations, all of class dog but where fields differ."""

    def write(*segmentations, **fields):
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / "images").mkdir(exist_ok=True)
        annotations = [
            {"id": n, "image_id": 7, "category_id": 5, "bbox": [1, 1, 9, 9], "segmentation": s, **fields}
            for n, s in enumerate(segmentations, 1)
        ]
        content = {
            "images": [{"id": 7, "file_name": "a.png", "width": WIDTH, "height": HEIGHT}],
            "annotations": annotations,
            "categories": [{"id": 5, "name": "dog"}, {"id": 3, "name": "cat"}],
        }
        (tmp_path / "annotations" / "instances_train.json").write_text(json.dumps(content))
        Image.new("RGB", (WIDTH, HEIGHT), (90, 90, 90)).save(tmp_path / "images" / "a.png")
        return tmp_path

    return write


class Blank(DetectionDataset):
    """Black images of 120x90, each with the same objects given by their boxes."""

    classes, category_ids, image_ids = ("cow", "dog", "cat"), (10, 20, 30), [1, 2]

    def __init__(self, *boxes, transform=None):
        self.boxes, self.transform = np.array(boxes, dtype=float).reshape(-1, 4), transform
        self.black = Image.new("RGB", (WIDTH, HEIGHT))

    def image(self, i):
        return self.black  # a dataset may keep its images: nobody is to paint on them

    def objects(self, i):
        n = len(self.boxes)
        ids = 11 + 100 * i + np.arange(n)
        areas, crowd = self.boxes[:, 2:].prod(1), np.zeros(n, dtype=bool)
        return Objects(ids, np.zeros(n, dtype=np.int64), self.boxes, areas, crowd, np.full(n, -1))

    def size(self, i):
        return HEIGHT, WIDTH

    def file_name(self, i):
        return f"{i}.png"


def disk(name, scale=0.4, width=60, height=40):
    """A cut-out of one color with an elliptic outline."""
    image = Image.new("RGBA", (width, height), (*COLORS[name], 0))
    ImageDraw.Draw(image).ellipse([0, 0, width - 1, height - 1], fill=(*COLORS[name], 255))
    return CutOut(image, name, 1, scale)


def block(name, scale=1.0, width=WIDTH, height=HEIGHT):
    return CutOut(Image.new("RGBA", (width, height), (*COLORS[name], 255)), name, 1, scale)


def sample(data, seed, i=0):
    torch.manual_seed(seed)
    return data.sample(i)


def extent(seen):
    """Corner, width and height of the True part of a mask."""
    rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    return [columns[0], rows[0], columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0]]


# ------------------------------------------------------------------------------------------------------ cutting out


@pytest.mark.parametrize("segmentation", [encoded(True), encoded(False)], ids=["compressed", "uncompressed"])
def test_cut_out_of_rle(folder, segmentation):
    [cut] = cut_outs(folder(segmentation))
    assert (cut.class_name, cut.image_id, cut.image.mode, cut.image.size) == ("dog", 7, "RGBA", (40, 40))
    assert cut.scale == pytest.approx((40 * 40 / (WIDTH * HEIGHT)) ** 0.5)
    alpha = np.asarray(cut.image)[:, :, 3]
    assert (alpha[10:30, 10:30] == 255).all()
    assert alpha[0, 0] == alpha[-1, -1] == 0
    assert 0 < alpha[20, 0] < alpha[20, 1] < 255  # the edge fades
    assert (np.asarray(cut.image)[:, :, :3] == 90).all()


def test_cut_out_of_polygons(folder):
    two_parts = rectangle(10, 10, 40, 50) + rectangle(60, 10, 100, 50)
    [cut] = cut_outs(folder(two_parts))
    assert cut.image.size == (90, 40)
    assert cut.image.getpixel((20, 20))[3] == 255
    assert cut.image.getpixel((40, 20))[3] == 0


def test_what_is_left_out(folder):
    whole, border, small = rectangle(10, 10, 50, 50), rectangle(1, 10, 50, 50), rectangle(10, 10, 41, 70)
    assert len(cut_outs(folder(whole, border, small, [], None))) == 1
    assert len(cut_outs(folder(whole, border, small), min_size=31)) == 2
    assert len(cut_outs(folder(*[whole] * 5))) == 5
    assert len(cut_outs(folder(*[whole] * 5), per_class=3)) == 3
    for near in (rectangle(10, 1, 50, 50), rectangle(60, 10, 119, 50), rectangle(10, 10, 60, 89)):
        with pytest.raises(UserError, match="none of the 1 objects"):
            cut_outs(folder(near))
    with pytest.raises(UserError, match="no masks"):
        cut_outs(folder(whole, iscrowd=1))


def test_coco_tiny():
    cuts = cut_outs(TINY)
    data = CocoFolder(TINY)
    assert len(cuts) > 300
    assert {cut.class_name for cut in cuts} <= set(data.classes)
    assert all(min(cut.image.size) >= 32 for cut in cuts)
    assert max(sum(cut.class_name == name for cut in cuts) for name in data.classes) <= 100
    dogs = cut_outs(TINY, classes=["dog"])
    assert {cut.class_name for cut in dogs} == {"dog"}
    few = cut_outs(TINY, limit=5)
    assert {cut.image_id for cut in few} <= set(data.image_ids[:5])
    # a box in the file and the cut-out of the same object have one size
    boxes = np.concatenate([data.objects(i).boxes[:, 2:] for i in range(5)])
    assert all(np.abs(boxes - cut.image.size).max(1).min() < 2 for cut in few)


@pytest.mark.parametrize("segmentations", [(), ([],), (None, [])])
def test_no_masks(folder, segmentations):
    with pytest.raises(UserError, match="instances_train.json has boxes but no masks.*export it with polygons or RLE"):
        cut_outs(folder(*segmentations))


@pytest.mark.parametrize(
    "segmentation", [[[1, 2]], "drawn", {"size": [9, 9], "counts": [40, 41]}, {"size": [HEIGHT, WIDTH]}]
)
def test_masks_that_cannot_be_read(folder, segmentation):
    with pytest.raises(UserError, match="segmentation of annotation 2 cannot be read.*: correct it"):
        cut_outs(folder(rectangle(10, 10, 50, 50), segmentation))


def test_classes_that_cannot_be_cut_out(folder):
    root = folder(rectangle(10, 10, 50, 50))
    with pytest.raises(UserError, match="no class 'bird' to cut out: choose from cat, dog"):
        cut_outs(root, classes=["dog", "bird"])
    with pytest.raises(UserError, match="none of the 1 objects .* of a requested class"):
        cut_outs(root, classes=["cat"])


# ---------------------------------------------------------------------------------------------------------- pasting


def test_boxes_are_where_the_pixels_are():
    data = Pasted(Blank(), [disk("dog")], probability=1.0, most=1)
    corners, widths = set(), set()
    for seed in range(60):
        image, objects = sample(data, seed)
        assert objects.labels.tolist() == [1]  # dog in the dataset's own order of classes
        seen = np.asarray(image)[:, :, 1] > 0
        found = np.array(extent(seen))
        np.testing.assert_allclose(objects.boxes[0], found, atol=2)
        assert objects.areas[0] == pytest.approx(seen.sum(), rel=0.15)
        assert found[:2].min() >= 0 and (found[:2] + found[2:] <= (WIDTH, HEIGHT)).all()
        corners.add(tuple(found[:2].tolist()))
        widths.add(int(found[2]))
    assert len(corners) > 50
    natural = 0.4 * (WIDTH * HEIGHT * 60 / 40) ** 0.5
    assert 0.5 * natural - 2 < min(widths) < 0.6 * natural
    assert 0.9 * natural < max(widths) < natural + 2


def test_a_faded_edge_belongs_to_the_object(folder):
    cuts = cut_outs(folder(rectangle(20, 10, 60, 50)))
    _, objects = sample(Pasted(Blank(), cuts, probability=1, most=1, scales=(1, 1)), 0)
    assert objects.boxes[0, 2:].tolist() == [40, 40]
    assert 40 * 40 - 20 <= objects.areas[0] < 40 * 40  # the corners are too faint


def test_half_are_flipped():
    image = Image.new("RGBA", (40, 20), (255, 0, 0, 255))
    image.paste((0, 255, 0, 255), (20, 0, 40, 20))
    data = Pasted(Blank(), [CutOut(image, "cat", 1, 0.3)], probability=1, most=1)
    flipped = 0
    for seed in range(40):
        pixels = np.asarray(sample(data, seed)[0])
        red, green = (extent(pixels[:, :, channel] > 128)[0] for channel in (0, 1))
        flipped += green < red
    assert 8 < flipped < 32


def test_many_objects_cover_each_other():
    """A box frames pixels of its class, and few pixels have no box: those of objects that are mostly hidden."""
    data = Pasted(Blank(), [disk(name, 0.4) for name in COLORS], probability=1, most=6)
    counts = []
    for seed in range(60):
        image, objects = sample(data, seed)
        counts.append(len(objects))
        for name, color in COLORS.items():
            seen = np.asarray(image)[:, :, np.argmax(color)] > 128
            framed = np.zeros_like(seen)
            for x, y, width, height in objects.boxes[objects.labels == data.classes.index(name)].astype(int).tolist():
                inside = seen[y : y + height, x : x + width]
                assert inside.sum() > 0.15 * width * height
                np.testing.assert_allclose(extent(inside), [0, 0, width, height], atol=3)
                framed[y : y + height, x : x + width] = True
            assert (seen & ~framed).mean() < 0.08
    assert max(counts) >= 5


def test_number_of_objects():
    data = Pasted(Blank(), [disk("cow", 0.05)], probability=0.5, most=3)
    counts = torch.tensor([len(sample(data, seed)[1]) for seed in range(200)]).bincount(minlength=5)
    assert 75 < counts[0] < 125
    assert counts[1:4].min() > 15
    assert counts[4] == 0


def test_covered_objects_are_dropped():
    hidden = Pasted(Blank([10, 10, 30, 30]), [block("cat")], probability=1, most=1, scales=(1, 1))
    image, objects = sample(hidden, 0)
    assert image.getpixel((20, 20)) == COLORS["cat"]
    assert objects.labels.tolist() == [2]
    assert objects.boxes.tolist() == [[0, 0, WIDTH, HEIGHT]]
    twice = Pasted(Blank(), [block("cat"), block("dog")], probability=1, most=4, scales=(1, 1))
    assert {len(sample(twice, seed)[1]) for seed in range(20)} == {1}  # whatever is pasted first is hidden


def test_partly_covered_objects_keep_what_is_seen():
    """Blocks as high as the image cover whole columns of one object, which spans the image."""
    data = Pasted(Blank([0.5, 0, 119.5, 90]), [block("cat", 1.0, 40, HEIGHT)], probability=1, most=1, scales=(1, 1))
    kept = 0
    for seed in range(40):
        _, objects = sample(data, seed)
        assert objects.ids.tolist() == [11, 12]  # a third is covered
        (x, y, width, height), (left, _, cover, _) = objects.boxes.tolist()
        assert (y, height, cover) == (0, HEIGHT, 40)
        start, end = (40, WIDTH) if left == 0 else (0.5, left if left == WIDTH - 40 else WIDTH)
        assert (x, x + width) == pytest.approx((start, end))
        assert objects.areas[0] == pytest.approx(119.5 * 90 * 2 / 3)
        kept += left in (0, WIDTH - 40)
    for share, number in ((0.68, 2), (0.72, 1)):
        wide = Pasted(Blank([0, 0, 120, 90]), [block("cat", 1.0, round(share * WIDTH), HEIGHT)], 1, 1, (1, 1))
        assert len(sample(wide, 0)[1]) == number


def test_thin_objects_are_not_taken_for_covered():
    stick = CutOut(Image.new("RGBA", (60, 60)), "cat", 1, 0.5)
    ImageDraw.Draw(stick.image).line([0, 0, 59, 59], fill=(255, 0, 0, 255), width=6)
    image, objects = sample(Pasted(Blank(), [stick], probability=1, most=1, scales=(1, 1)), 0)
    assert len(objects) == 1
    assert objects.areas[0] == pytest.approx((np.asarray(image)[:, :, 0] > 0).sum(), rel=0.3)


def test_original_objects():
    """Crowds are no targets, boxes are cut at the image border, and the originals come first and unchanged."""
    data = Pasted(CocoFolder(TINY), cut_outs(TINY, limit=30), probability=0)
    for i in range(20):
        image, objects = sample(data, i, i)
        assert np.array_equal(image, data.image(i))
        expected = data.dataset.objects(i).targets(*data.size(i))
        assert objects.ids.tolist() == expected.ids.tolist()
        np.testing.assert_array_equal(objects.boxes, expected.boxes)
    data.probability = 1.0
    changed = dropped = 0
    for i in range(40):
        before = data.objects(i).targets(*data.size(i))
        image, after = sample(data, i, i)
        assert image.size == data.size(i)[::-1]
        changed += not np.array_equal(image, data.image(i))
        kept = [k for k in before.ids.tolist() if k in after.ids.tolist()]
        dropped += len(before) - len(kept)
        assert after.ids.tolist()[: len(kept)] == kept
        assert len(set(after.ids.tolist())) == len(after)
        assert (after.boxes[:, 2:] > 0).all() and (after.boxes[:, :2] >= 0).all()
        assert (after.boxes[:, :2] + after.boxes[:, 2:] <= np.array(image.size) + 1e-9).all()
    assert changed == 40
    assert dropped > 0


def test_items_depend_on_the_seed_alone():
    folder = CocoFolder(TINY, transform=make_transform("laptop_crop", 128))
    data = Pasted(folder, cut_outs(TINY, limit=30), probability=1)
    items = SeededItems(data, seed=3)
    first = [items[0, i] for i in range(4)]
    for i in reversed(range(4)):
        pixels, target, _ = items[0, i]
        assert torch.equal(pixels, first[i][0])
        assert torch.equal(target.boxes, first[i][1].boxes)
        assert max(pixels.shape) <= 128  # the transform follows
        assert target.size == data.size(i)
        corners = box_convert(target.boxes, "cxcywh", "xyxy")
        assert corners.min() > -1e-5 and corners.max() < 1 + 1e-5
    other, _, _ = items[1, 0]
    assert other.shape != first[0][0].shape or not torch.equal(other, first[0][0])


def test_evaluation_is_refused():
    data = Pasted(Blank([10, 10, 30, 30]), [disk("cat")], probability=1)
    with pytest.raises(UserError, match="no fixed ground truth: evaluate on its attribute `dataset`"):
        data.coco  # noqa: B018
    assert len(data.dataset.coco.anns) == 2
    assert (len(data), data.file_name(1), data.category_ids) == (2, "1.png", (10, 20, 30))
    assert np.asarray(sample(data, 0)[0]).any()
    assert not np.asarray(data.image(0)).any()
    assert data.objects(0).ids.tolist() == [11]


def test_wrong_options():
    data = Blank()
    bird = CutOut(disk("cat").image, "bird", 1, 0.5)
    with pytest.raises(UserError, match="cut-outs of class 'bird' .* without that class: add it"):
        Pasted(data, [disk("cat"), bird])
    with pytest.raises(UserError, match="0 cut-outs .* at least one"):
        Pasted(data, [])
    for options in ({"probability": 1.5}, {"most": 0}, {"scales": (1.0, 0.5)}, {"scales": (0, 1)}):
        with pytest.raises(UserError, match="1 cut-outs pasted with .*probability from 0 to 1"):
            Pasted(data, [disk("cat")], **options)
