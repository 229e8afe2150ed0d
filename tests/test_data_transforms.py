"""Transforms move boxes exactly as pixels: rectangles drawn in the boxes stay in them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from torchvision import tv_tensors
from torchvision.transforms import v2

from regolite.data import make_transform
from regolite.data.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    TRANSFORMS,
    RandomSizeCrop,
    RandomZoom,
    Resize,
    detr_train,
    detr_val,
)
from regolite.errors import UserError

WIDTH, HEIGHT = 320, 220
BOXES = torch.tensor([[8.0, 10, 58, 60], [180, 60, 300, 200], [140, 5, 170, 215]])


def rectangles():
    """A black image with a red, a green and a blue rectangle: the channel of the color is the label."""
    image = Image.new("RGB", (WIDTH, HEIGHT))
    for channel, (x0, y0, x1, y1) in enumerate(BOXES.int().tolist()):
        color = tuple(255 * (channel == k) for k in range(3))
        ImageDraw.Draw(image).rectangle([x0, y0, x1 - 1, y1 - 1], fill=color)
    return image


def apply(transform, seed):
    torch.manual_seed(seed)
    boxes = tv_tensors.BoundingBoxes(BOXES, format="XYXY", canvas_size=(HEIGHT, WIDTH))
    pixels, moved = transform(rectangles(), {"boxes": boxes, "labels": torch.arange(3)})
    levels = pixels * torch.tensor(IMAGENET_STD)[:, None, None] + torch.tensor(IMAGENET_MEAN)[:, None, None]
    return levels, moved["boxes"], moved["labels"]


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("size", [None, 160])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_rectangles_stay_in_their_boxes(name, size, train):
    transform = make_transform(name, size, train)
    for seed in range(6):
        levels, boxes, labels = apply(transform, seed)
        assert len(boxes) == len(labels)
        seen = levels > 0.5
        for box, label in zip(boxes, labels.tolist(), strict=True):
            rows, columns = seen[label].any(1).nonzero(), seen[label].any(0).nonzero()
            drawn = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            assert (drawn - box).abs().max() < 1.5, (seed, box, drawn)
        gone = set(range(3)) - set(labels.tolist())  # an object that is dropped is hardly seen any more
        assert all(min(seen[label].any(0).sum(), seen[label].any(1).sum()) <= 2 for label in gone)


def test_every_step_occurs():
    """Flips and crops do happen, or the test above proves little."""
    sizes, flipped, dropped = set(), 0, 0
    for seed in range(40):
        levels, boxes, labels = apply(make_transform("laptop_crop", 160), seed)
        sizes.add(tuple(boxes[0, 2:] - boxes[0, :2]) if len(boxes) else ())
        dropped += len(labels) < 3
        centers = {label: box[[0, 2]].mean() for label, box in zip(labels.tolist(), boxes, strict=True)}
        if 0 in centers and 1 in centers:
            flipped += bool(centers[0] > centers[1])
    assert len(sizes) > 15  # half of the windows are the whole image
    assert flipped in range(8, 32)
    assert dropped > 1


def test_sizes():
    assert apply(make_transform("none"), 0)[0].shape == (3, HEIGHT, WIDTH)
    assert apply(make_transform("none", 160, train=True), 0)[0].shape == (3, 110, 160)
    assert apply(make_transform("laptop", 160, train=False), 0)[0].shape == (3, 110, 160)
    assert apply(detr_val(), 0)[0].shape == (3, 800, 1163)
    assert apply(detr_val(800, 900), 0)[0].shape == (3, 619, 900)
    longer = [max(apply(make_transform("laptop", 160), seed)[0].shape) for seed in range(30)]
    assert min(longer) >= 128
    assert max(longer) <= 160
    assert len(set(longer)) > 8
    for seed in range(8):
        shorter, longest = sorted(apply(detr_train([200, 240], 300), seed)[0].shape[1:])
        assert longest <= 300
        assert shorter <= 240


def test_crop_window():
    torch.manual_seed(0)
    crop = RandomSizeCrop(100, 400)
    windows = [crop(rectangles()).size for _ in range(50)]
    assert min(min(window) for window in windows) >= 100
    assert max(width for width, _ in windows) <= WIDTH
    assert len(set(windows)) > 40
    small = Image.new("RGB", (50, 60))
    assert crop(small).size == (50, 60)


def test_zoomed_images_keep_their_shape():
    """So batches of images of one shape need no padding."""
    torch.manual_seed(0)
    windows = [RandomZoom(0.5)(rectangles()).size for _ in range(50)]
    shares = [width / WIDTH for width, _ in windows]
    assert 0.5 <= min(shares) < 0.6 and 0.9 < max(shares) <= 1
    assert all(abs(height / HEIGHT - share) <= 1 / HEIGHT for (_, height), share in zip(windows, shares))
    assert RandomZoom(0.5)(Image.new("RGB", (1, 1))).size == (1, 1)
    shapes = {apply(make_transform("laptop_crop", 160), seed)[0].shape[1:] for seed in range(20)}
    assert all(max(shape) == 160 and abs(min(shape) - 110) <= 1 for shape in shapes)


@pytest.mark.parametrize("name", ["detr", "laptop", "laptop_crop"])
def test_randomness_is_torchs(name):
    transform = make_transform(name, 96)
    first, boxes, _ = apply(transform, 3)
    again, same, _ = apply(transform, 3)
    assert torch.equal(first, again)
    assert torch.equal(boxes, same)
    others = [apply(transform, seed)[0] for seed in range(4, 8)]
    assert any(other.shape != first.shape or not torch.equal(other, first) for other in others)


def test_image_alone_and_no_objects():
    pixels = make_transform("laptop", 160, train=False)(rectangles())
    assert type(pixels) is torch.Tensor
    for name in TRANSFORMS:
        empty = tv_tensors.BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=(HEIGHT, WIDTH))
        for seed in range(4):
            torch.manual_seed(seed)
            _, moved = make_transform(name, 96)(
                rectangles(), {"boxes": empty, "labels": torch.zeros(0, dtype=torch.int64)}
            )
            assert moved["boxes"].shape == (0, 4)


def test_errors():
    with pytest.raises(UserError, match="'lapton'.*detr, laptop"):
        make_transform("lapton")
    with pytest.raises(UserError, match="size 3 is too small"):
        make_transform("laptop", 3)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 900), st.integers(1, 900), st.sampled_from([(None, 96), ([64], 120)]))
def test_sizes_are_torchvisions_and_never_0(height, width, how):
    ours, theirs = (kind(how[0], max_size=how[1]) for kind in (Resize, v2.Resize))
    pixels = torch.zeros(1, height, width, dtype=torch.uint8)
    try:
        wanted = theirs(pixels).shape
    except RuntimeError:  # of a side of 0 pixels
        wanted = None
    found = ours(pixels).shape
    if wanted is not None:
        assert found == wanted
    assert min(found) == 1 and max(found) <= how[1]


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("size", [(4000, 8), (8, 4000), (20000, 3), (1, 1)])
def test_lines_of_pixels_keep_both_sides(name, train, size):
    transform = make_transform(name, 64, train)
    for seed in range(6):
        torch.manual_seed(seed)
        whole = tv_tensors.BoundingBoxes(torch.tensor([[0.0, 0, *size]]), format="XYXY", canvas_size=size[::-1])
        pixels, moved = transform(Image.new("RGB", size), {"boxes": whole, "labels": torch.tensor([3])})
        height, width = pixels.shape[1:]
        assert min(height, width) >= 1 and max(height, width) <= 64 * 3
        for box in moved["boxes"].tolist():
            assert box == pytest.approx([0, 0, width, height], abs=1e-3)
