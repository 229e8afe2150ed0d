"""Detections: which scores, which classes, and boxes in pixels of the image that was given."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from regolite import build, configure, detect
from regolite.errors import UserError
from regolite.inference import detect_by_stage, to_detections
from regolite.types import Detections, DetectorOutput, FeatureMap, Prediction


class Finder(nn.Module):
    """A detector that sees: one query, its box around all bright pixels of the image, class 1."""

    scoring = "sigmoid"

    def __init__(self, augment="laptop", image_size=96):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.model_config = configure("deformable_detr_scenes", augment=augment, image_size=image_size)
        self.seen = []

    def forward(self, images):
        assert not self.training
        self.seen.append((tuple(images.pixels.shape[-2:]), tuple(images.sizes[0].tolist())))
        boxes = []
        for pixels, mask, (height, width) in zip(images.pixels, images.mask, images.sizes.tolist()):
            rows, columns = torch.where((pixels.mean(0) > 0.5) & ~mask)
            left, top, right, bottom = (x.item() for x in (columns.min(), rows.min(), columns.max(), rows.max()))
            box = torch.tensor([(left + right + 1) / 2, (top + bottom + 1) / 2, right + 1 - left, bottom + 1 - top])
            boxes.append(box / torch.tensor([width, height, width, height]))
        logits = torch.tensor([[[-4.0, 2.0]]]).repeat(len(images), 1, 1)
        feature = FeatureMap(torch.zeros(len(images), 1, 1, 1), torch.zeros(len(images), 1, 1).bool(), 32)
        prediction = Prediction(logits, torch.stack(boxes)[:, None])
        return DetectorOutput([prediction], torch.zeros(len(images), 1, 1), [feature])


def image(width, height, box, mode="RGB"):
    pixels = np.zeros((height, width), dtype=np.uint8)
    left, top, right, bottom = box
    pixels[top:bottom, left:right] = 255
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("augment", ["laptop", "none", "detr"])
@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((96, 96), (10, 20, 50, 90)),  # as the network wants it
        ((400, 150), (40, 10, 300, 120)),  # wide: shrunk, then padded below
        ((110, 390), (20, 200, 100, 380)),  # tall: shrunk, then padded at the right
        ((40, 30), (5, 6, 30, 24)),  # small: enlarged
    ],
)
def test_boxes_are_pixels_of_the_original_image(augment, size, box):
    model = Finder(augment)
    [found] = detect(model, image(*size, box))
    pixel = 1.5 * max(max(size) / 96, 1)  # one and a half pixels of the coarser of the two images
    assert found.boxes_xyxy[0].tolist() == pytest.approx(box, abs=pixel)
    assert found.labels.tolist() == [1] and found.queries.tolist() == [0]
    assert found.scores.tolist() == pytest.approx([torch.tensor(2.0).sigmoid().item()])
    [(padded, unpadded)] = model.seen
    assert all(side % 32 == 0 for side in padded)
    assert unpadded[0] / unpadded[1] == pytest.approx(size[1] / size[0], rel=0.05)  # never stretched


def test_several_images_each_in_its_own_pixels():
    boxes = [(10, 5, 60, 45), (100, 20, 180, 60)]
    found = detect(Finder(), [image(80, 60, boxes[0]), image(200, 70, boxes[1])])
    assert len(found) == 2
    for detections, box in zip(found, boxes):
        assert detections.boxes_xyxy[0].tolist() == pytest.approx(box, abs=3)
    assert detect(Finder(), []) == []


@pytest.mark.parametrize(
    ("mode", "suffix"), [("RGB", "jpg"), ("L", "png"), ("L", "jpg"), ("CMYK", "jpg"), ("P", "png")]
)
@pytest.mark.parametrize("as_path", [True, False])
def test_any_color_mode(tmp_path, mode, suffix, as_path):
    box = (20, 10, 70, 40)
    given = image(90, 60, box, mode)
    given.save(tmp_path / f"image.{suffix}")
    name = tmp_path / f"image.{suffix}"
    for source in [name, str(name)] if as_path else [given]:
        [found] = detect(Finder(), source)
        assert found.boxes_xyxy[0].tolist() == pytest.approx(box, abs=2)


def test_threshold():
    score = torch.tensor(2.0).sigmoid().item()  # 0.88
    given = image(90, 60, (20, 10, 70, 40))
    assert len(detect(Finder(), given, threshold=score + 0.01)[0]) == 0
    assert len(detect(Finder(), given, threshold=score - 0.01)[0]) == 1
    [every] = detect(Finder(), given, threshold=0.0)
    assert every.labels.tolist() == [1, 0]  # the query stands for both classes, best first
    assert len(detect(Finder(), given, threshold=0.0, top_k=1)[0]) == 1


def test_wrong_files(tmp_path):
    with pytest.raises(UserError, match=r"image .*nowhere\.jpg does not exist"):
        detect(Finder(), tmp_path / "nowhere.jpg")
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    model = Finder()
    with pytest.raises(UserError, match=r"image .*broken\.jpg cannot be read"):
        detect(model, [image(90, 60, (20, 10, 70, 40)), str(tmp_path / "broken.jpg")])
    assert not model.seen  # before the work, not after it


def test_images_of_every_kind_and_folders_and_patterns(tmp_path):
    box = (20, 10, 70, 40)
    given = image(90, 60, box)
    given.save(tmp_path / "b.png")
    image(60, 90, (5, 30, 50, 80)).save(tmp_path / "a.png")
    array = np.asarray(given)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    one = (given, array, array / 255, tensor, tensor / 255, (tmp_path / "b.png").read_bytes(), tmp_path / "b.png")
    for source in one:
        [found] = detect(Finder(), source)
        assert found.boxes_xyxy[0].tolist() == pytest.approx(box, abs=2) and found.size == (60, 90)
    assert len(detect(Finder(), one)) == len(one)
    assert len(detect(Finder(), np.stack([array, array]))) == len(detect(Finder(), tensor[None])) + 1 == 2
    for source in (tmp_path, str(tmp_path), f"{tmp_path}/*.png", [tmp_path]):
        assert [found.size for found in detect(Finder(), source)] == [(90, 60), (60, 90)], "sorted by name"


def test_a_photograph_that_was_held_sideways_is_seen_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = image(60, 90, (5, 30, 50, 80))
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "phone.png", exif=exif)
    with Image.open(tmp_path / "phone.png") as opened:
        for source in (tmp_path / "phone.png", opened):
            [found] = detect(Finder(), source)
            assert found.size == (90, 60) and found.boxes_xyxy[0].tolist() == pytest.approx((5, 30, 50, 80), abs=2)


@pytest.mark.parametrize("size", [(4000, 8), (8, 4000), (1, 1), (20000, 10)])
@pytest.mark.parametrize("augment", ["laptop", "detr"])
def test_images_of_extreme_shape(size, augment):
    [found] = detect(Finder(augment), Image.new("RGB", size, "white"))
    assert found.boxes_xyxy[0].tolist() == pytest.approx([0, 0, *size], rel=0.05)


def test_wrong_values(tmp_path):
    given, model = image(90, 60, (20, 10, 70, 40)), Finder()
    for options, said in (
        ({"threshold": 50}, "threshold=50 must be a number from 0 to 1"),
        ({"threshold": float("nan")}, "threshold=nan"),
        ({"top_k": -1}, "top_k=-1 must be at least 1"),
    ):
        with pytest.raises(UserError, match=said):
            detect(model, given, **options)
    with pytest.raises(UserError, match=r"number 2 of the images: image \(ndarray\) has shape \[7\]"):
        detect(model, [given, np.zeros(7)])
    with pytest.raises(UserError, match="is a URL: download it"):
        detect(model, "https://example.org/dog.jpg")
    with pytest.raises(UserError, match="has no images"):
        detect(model, tmp_path)
    assert not model.seen


def test_an_error_in_the_model_leaves_it_in_training(monkeypatch):
    model = Finder().train()
    with pytest.raises(RuntimeError):  # no bright pixel
        detect(model, Image.new("RGB", (40, 40)))
    assert model.training


def test_detections_know_the_classes():
    model = build("deformable_detr_scenes", 2, dim=32, heads=2, ffn_dim=16, encoder_layers=1, decoder_layers=1)
    [found] = detect(model, Image.new("RGB", (90, 60)), threshold=0.0)
    assert found.classes == tuple(model.model_config.classes) and len(found.clip()) == len(found)


def test_model_without_a_configuration():
    model = Finder()
    del model.model_config
    with pytest.raises(UserError, match="set its model_config"):
        detect(model, image(90, 60, (20, 10, 70, 40)))


@pytest.mark.parametrize("training", [True, False])
def test_leaves_the_model_as_it_was(training):
    model = Finder().train(training)
    detect(model, image(90, 60, (20, 10, 70, 40)))
    assert model.training == training


def test_sigmoid_takes_the_best_pairs_of_query_and_class():
    logits = torch.tensor([[[3.0, 2.0, -5.0], [-1.0, -2.0, 2.5], [-9.0, -9.0, -9.0]]])
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.4], [0.25, 0.5, 0.1, 0.1], [0.5, 0.5, 1.0, 1.0]]])
    [found] = to_detections(Prediction(logits, boxes), torch.tensor([[100, 200]]), "sigmoid", top_k=4)
    assert found.queries.tolist() == [0, 1, 0, 1]
    assert found.labels.tolist() == [0, 2, 1, 0]
    torch.testing.assert_close(found.scores, torch.tensor([3.0, 2.5, 2.0, -1.0]).sigmoid())
    wide, narrow = [80.0, 30.0, 120.0, 70.0], [40.0, 45.0, 60.0, 55.0]
    torch.testing.assert_close(found.boxes_xyxy, torch.tensor([wide, narrow, wide, narrow]))
    [every] = to_detections(Prediction(logits, boxes), torch.tensor([[100, 200]]), "sigmoid")
    assert len(every) == 9


def test_softmax_takes_the_best_class_of_each_query():
    logits = torch.tensor([[[3.0, 2.0, 0.0], [0.0, 1.0, 5.0], [0.0, 4.0, 1.0]]])  # the last column is "no object"
    boxes = torch.rand(1, 3, 4)
    [found] = to_detections(Prediction(logits, boxes), torch.tensor([[100, 200]]), "softmax")
    p = logits[0].softmax(-1)
    assert found.queries.tolist() == [2, 0, 1]
    assert found.labels.tolist() == [1, 0, 1]
    torch.testing.assert_close(found.scores, torch.stack([p[2, 1], p[0, 0], p[1, 1]]))
    [best] = to_detections(Prediction(logits, boxes), torch.tensor([[100, 200]]), "softmax", top_k=2)
    assert best.queries.tolist() == [2, 0]


def test_each_image_of_a_batch_has_its_own_size():
    logits = torch.tensor([[[2.0]], [[1.0]]])
    boxes = torch.tensor([[[0.5, 0.5, 1.0, 1.0]]]).repeat(2, 1, 1)
    found = to_detections(Prediction(logits, boxes), torch.tensor([[100, 200], [30, 20]]), "sigmoid")
    assert [d.boxes_xyxy[0].tolist() for d in found] == [[0, 0, 200, 100], [0, 0, 20, 30]]


class Finished(nn.Module):
    """A detector that ends in detections and not in a DetectorOutput."""

    model_config = configure("deformable_detr_scenes", image_size=96)

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def detections(self, images, sizes, top_k):
        assert not self.training and images.sizes.tolist() == [[48, 96]]
        [[height, width]] = sizes.tolist()
        boxes = torch.tensor([[0.0, 0.0, width, height], [1.0, 2.0, 3.0, 4.0]])
        scores, labels = torch.tensor([0.9, 0.25]), torch.tensor([4, 1])
        return [Detections(scores[:top_k], labels[:top_k], boxes[:top_k], torch.arange(2)[:top_k])]


def test_a_detector_may_give_detections_itself():
    given = image(300, 150, (0, 0, 10, 10))
    alone = (
        detect(Finished(), given, 0.5),
        detect_by_stage(Finished(), given, 0.5),
        detect(Finished(), given, top_k=1),
    )
    for found in alone:
        [found] = found  # of one image; of one stage
        assert found.boxes_xyxy.tolist() == [[0, 0, 300, 150]] and found.labels.tolist() == [4]
    assert len(detect(Finished(), given, threshold=0.2, top_k=2)[0]) == 2


def test_stages():
    small = {
        "dim": 32,
        "heads": 2,
        "detector.ffn_dim": 16,
        "queries": 6,
        "detector.encoder_layers": 1,
        "detector.decoder_layers": 1,
    }
    model = build("rego_deformable_detr_scenes", 14, **small, rego={"ffn_dim": 16}, stages=2, image_size=64)
    given = image(90, 60, (20, 10, 70, 40))
    by_stage = detect_by_stage(model, given, threshold=0.0)
    assert len(by_stage) == 3
    for stages, wanted in enumerate(by_stage):
        [found] = detect(model, given, threshold=0.0, stages=stages)
        assert torch.equal(found.scores, wanted.scores) and torch.equal(found.boxes_xyxy, wanted.boxes_xyxy)
    [final] = detect(model, given, threshold=0.0)
    assert torch.equal(final.boxes_xyxy, by_stage[-1].boxes_xyxy)
    assert not torch.equal(by_stage[0].scores, by_stage[1].scores)
