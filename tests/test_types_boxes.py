"""The types that every room speaks, and boxes."""

import json
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from small_models import unchecked
from torchvision.ops import box_convert

from regolite.boxes import enlarge, inverse_sigmoid, to_pixels, to_xyxy
from regolite.data import batch_images
from regolite.errors import UserError
from regolite.types import Detections, DetectorOutput, ImageBatch, Prediction, Target


def some_prediction(batch=2, queries=3, classes=4):
    return Prediction(torch.randn(batch, queries, classes), torch.rand(batch, queries, 4))


def test_output_by_stage_takes_the_last_layer_of_every_stage():
    layers = [some_prediction() for _ in range(3)]
    stages = [[some_prediction(), some_prediction()] for _ in range(2)]
    bare = DetectorOutput(layers, torch.zeros(2, 3, 8), [])
    assert bare.stages == [] and bare.proposals is None
    assert bare.by_stage == [layers[2]] and bare.final is layers[2]
    whole = DetectorOutput(layers, torch.zeros(2, 3, 8), [], stages=stages)
    assert [id(p) for p in whole.by_stage] == [id(p) for p in (layers[2], stages[0][1], stages[1][1])]
    assert whole.final is stages[1][1]


def test_outputs_do_not_share_their_stages():
    one, other = (DetectorOutput([some_prediction()], torch.zeros(2, 3, 8), []) for _ in range(2))
    one.stages.append([some_prediction()])
    assert other.stages == []


def test_detections_above_a_threshold_keep_the_order_and_the_threshold_itself():
    scores = torch.tensor([0.9, 0.5, 0.4])
    found = Detections(scores, torch.tensor([3, 1, 2]), torch.arange(12.0).view(3, 4), torch.tensor([7, 5, 6]))
    kept = found.above(0.5)
    assert len(kept) == 2
    assert kept.scores.tolist() == pytest.approx([0.9, 0.5])
    assert (kept.labels.tolist(), kept.queries.tolist()) == ([3, 1], [7, 5])
    assert torch.equal(kept.boxes_xyxy, found.boxes_xyxy[:2])
    assert len(found.above(1.0)) == 0


def test_moving_keeps_everything():
    images = batch_images([torch.randn(3, 4, 6), torch.randn(3, 5, 5)])
    moved = images.to("meta")
    assert {t.device.type for t in (moved.pixels, moved.mask, moved.sizes)} == {"meta"}
    assert len(moved) == len(images) == 2
    target = Target(torch.tensor([1, 2]), torch.rand(2, 4), image_id=9, size=(4, 6))
    there = target.to("meta")
    assert (there.labels.device.type, there.boxes.device.type) == ("meta", "meta")
    assert (there.image_id, there.size, len(there)) == (9, (4, 6), 2)


def test_the_checker_of_shapes_is_awake():
    """Should the import hook be lost, every shape in every signature would go unchecked without a word."""
    with pytest.raises(TypeCheckError):
        ImageBatch(torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 5, dtype=torch.bool), torch.zeros(2, 2, dtype=torch.int))
    with pytest.raises(TypeCheckError):
        Prediction(torch.zeros(2, 3, 4), torch.zeros(2, 5, 4))
    with pytest.raises(TypeCheckError):
        to_xyxy(torch.zeros(2, 5))


def test_user_error_is_a_value_error():
    assert issubclass(UserError, ValueError)


def test_to_xyxy():
    boxes = torch.tensor([[0.5, 0.4, 0.2, 0.6]])
    torch.testing.assert_close(to_xyxy(boxes), torch.tensor([[0.4, 0.1, 0.6, 0.7]]))
    many = torch.rand(2, 3, 4)
    torch.testing.assert_close(box_convert(to_xyxy(many), "xyxy", "cxcywh"), many)


@settings(derandomize=True, deadline=None)
@given(st.floats(0.1, 8))
def test_enlarging_keeps_the_center_and_multiplies_the_sides(alpha):
    boxes = torch.tensor([[0.3, 0.7, 0.2, 0.1], [0.5, 0.5, 1.0, 0.0]])
    larger = enlarge(boxes, alpha)
    assert torch.equal(larger[:, :2], boxes[:, :2])
    torch.testing.assert_close(larger[:, 2:], boxes[:, 2:] * alpha)


def test_to_pixels_of_images_of_different_sizes():
    boxes = torch.tensor([[[0.5, 0.5, 1.0, 1.0], [0.25, 0.5, 0.5, 0.2]]]).expand(2, -1, -1)
    pixels = to_pixels(boxes, torch.tensor([[10, 20], [30, 40]]))
    assert pixels[0].tolist() == [[0, 0, 20, 10], pytest.approx([0, 4, 10, 6])]
    assert pixels[1].tolist() == [[0, 0, 40, 30], pytest.approx([0, 12, 20, 18])]


def test_boxes_of_half_precision_stay_in_it():
    boxes = torch.rand(1, 2, 4, dtype=torch.bfloat16)
    assert to_pixels(boxes, torch.tensor([[10, 20]])).dtype == torch.bfloat16


@settings(derandomize=True, deadline=None)
@given(st.floats(1e-4, 1 - 1e-4))
def test_inverse_sigmoid_inverts_the_sigmoid(x):
    logit = inverse_sigmoid(torch.tensor([x], dtype=torch.float64))
    assert logit.item() == pytest.approx(math.log(x / (1 - x)), rel=1e-9, abs=1e-9)
    assert logit.sigmoid().item() == pytest.approx(x)


def test_inverse_sigmoid_is_finite_everywhere():
    ends = inverse_sigmoid(torch.tensor([-1.0, 0.0, 1.0, 2.0]))
    bound = math.log((1 - 1e-5) / 1e-5)
    torch.testing.assert_close(ends, torch.tensor([-bound, -bound, bound, bound]), rtol=1e-3, atol=0)
    x = torch.tensor([0.0, 0.5, 1.0], requires_grad=True)
    inverse_sigmoid(x).sum().backward()
    assert x.grad.isfinite().all() and x.grad[1] == pytest.approx(4)


def three():
    boxes = torch.tensor([[-5.0, 2, 30, 20], [1, 1, 4, 5], [10, 10, 90, 12]])
    columns = (torch.tensor([0.9, 0.5, 0.25]), torch.tensor([1, 0, 1]), boxes, torch.tensor([7, 5, 6]))
    return Detections(*columns, classes=("cat", "dog"), size=(15, 40))


def assert_equal(found, wanted):
    for name in ("scores", "labels", "boxes_xyxy", "queries"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name), rtol=0, atol=1e-5)
    assert (found.classes, found.size) == (wanted.classes, wanted.size)


def test_detections_can_be_indexed():
    found = three()
    assert found[0].queries.tolist() == found[-3].queries.tolist() == [7] and len(found[np.int64(2)]) == 1
    assert found[1:].queries.tolist() == [5, 6] and found[[2, 0]].queries.tolist() == [6, 7]
    assert found[found.labels == 1].class_names == ["dog", "dog"]
    assert found[np.array([False, True, False])].class_names == ["cat"]
    assert found[0].size == (15, 40) and len(found[[]]) == len(found[5:]) == 0
    assert [one.class_names for one in found] == [["dog"], ["cat"], ["dog"]]
    assert found[::-1].queries.tolist() == [6, 5, 7] and len(found[found.scores.argmax()]) == 1
    with pytest.raises(IndexError):
        found[3]
    with pytest.raises(TypeError, match="not by torch.float32"):
        found[1.5]


def test_class_names_and_clipping():
    found = three()
    assert found.class_names == ["dog", "cat", "dog"]
    with pytest.raises(UserError, match="label 1 has no name"):
        replace(found, classes=("cat",)).class_names  # noqa: B018
    clipped = found.clip()
    assert clipped.boxes_xyxy.tolist() == [[0, 2, 30, 15], [1, 1, 4, 5], [10, 10, 40, 12]]
    assert found.boxes_xyxy[0, 0] == -5, "the others stay"
    assert found.clip((11, 20)).boxes_xyxy.tolist() == [[0, 2, 20, 11], [1, 1, 4, 5], [10, 10, 20, 11]]
    with pytest.raises(UserError, match=r"clip\(\(height, width\)\)"):
        replace(found, size=None).clip()
    for size in ((5,), "ab", (-1, 5), (float("nan"), 1), 7):
        with pytest.raises(UserError, match=r"is not \(height, width\) in pixels"), unchecked():
            found.clip(size)


@pytest.mark.parametrize("threshold", [50, -1, float("nan"), "high", None])
def test_a_threshold_is_a_number_from_0_to_1(threshold):
    with pytest.raises(UserError, match="threshold=.* must be a number from 0 to 1"), unchecked():
        three().above(threshold)


def table(**changes):
    columns = {"score": [0.5, 0.9], "label": [0, 1], "xmin": [1, 0], "ymin": [1, 2], "xmax": [4, 30], "ymax": [5, 20]}
    return Detections.from_pandas({**columns, **changes})


@pytest.mark.parametrize(
    ("convert", "said"),
    [
        (lambda: three().to_coco(1, (17,)), "label 1 has no category id"),
        (lambda: Detections.from_coco([{"category_id": 1}], (1,)), "result 1 has bbox None"),
        (lambda: Detections.from_coco([{"category_id": 1, "bbox": [1, 2, 3]}], (1,)), "result 1 has bbox"),
        (
            lambda: Detections.from_coco([{"category_id": 1, "bbox": [1, 2, float("nan"), 3]}], (1,)),
            "result 1 has bbox",
        ),
        (lambda: Detections.from_coco([{"bbox": [1, 2, 3, 4]}], (1,)), "result 1 has category_id None"),
        (
            lambda: Detections.from_coco([{"category_id": 1, "bbox": [1, 2, 3, 4], "score": "x"}], (1,)),
            "must be numbers",
        ),
        (lambda: table(label=[0, float("nan")]), "labels must be a finite number for each detection"),
        (lambda: table(score=[0.5, "x"]), "must be numbers"),
        (lambda: table(label=[0]), "labels must be a finite number for each detection"),
        (lambda: Detections.from_supervision(5), "no class_id"),
    ],
)
def test_what_cannot_be_converted_is_one_clear_error(convert, said):
    with pytest.raises(UserError, match=said), unchecked():
        convert()


@pytest.mark.parametrize("count", [0, 1, 3])
def test_to_supervision_and_back(count):
    found = three()[:count]
    theirs = found.to_supervision()
    assert type(theirs).__module__.startswith("supervision") and len(theirs) == count
    assert theirs.data["class_name"].tolist() == found.class_names
    np.testing.assert_allclose(theirs.xyxy, found.boxes_xyxy)
    assert_equal(Detections.from_supervision(theirs, found.classes, found.size), found)
    again = Detections.from_supervision(theirs[np.arange(count)[::-1]])  # sorted again; names from the data
    assert again.scores.tolist() == found.scores.tolist() and again.class_names == found.class_names
    theirs.class_id = None
    with pytest.raises(UserError, match="no class_id"):
        Detections.from_supervision(theirs)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_to_coco_and_back(count):
    found = three()[:count]
    results = found.to_coco(139, (17, 18))
    assert json.loads(json.dumps(results)) == results
    if count:
        wanted = {"image_id": 139, "category_id": 18, "bbox": [-5, 2, 35, 18]}
        assert results[0] == {**wanted, "score": pytest.approx(0.9)}
    again = Detections.from_coco(results[::-1], (17, 18), found.classes, found.size)
    assert_equal(again, replace(found, queries=again.queries))
    if count == 3:
        results[0]["image_id"] = 7
        with pytest.raises(UserError, match="results of 2 images"):
            Detections.from_coco(results, (17, 18))
        with pytest.raises(UserError, match="category_id 18, which is none"):
            Detections.from_coco(results[2:], (17,))


def test_from_a_table():
    table = {"score": [0.5, 0.9], "label": [0, 1], "xmin": [1, -5], "ymin": [1, 2], "xmax": [4, 30], "ymax": [5, 20]}
    wanted = three()[[0, 1]]
    assert_equal(Detections.from_pandas(table | {"query": [5, 7]}, wanted.classes, wanted.size), wanted)
    assert Detections.from_pandas(table).queries.tolist() == [1, 0]
    del table["ymin"]
    with pytest.raises(UserError, match="no column ymin"):
        Detections.from_pandas(table)


def test_to_pandas_and_back():
    pandas = pytest.importorskip("pandas")
    for found in (three(), three()[:0]):
        table = found.to_pandas()
        assert isinstance(table, pandas.DataFrame) and len(table) == len(found)
        assert table["class_name"].tolist() == found.class_names
        assert_equal(Detections.from_pandas(table, found.classes, found.size), found)


def test_without_pandas(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UserError, match="pip install pandas"):
        three().to_pandas()
