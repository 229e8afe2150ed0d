"""Average precision: pycocotools' own figures, by stage, for detections whose quality is known."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

from regolite import build, configure
from regolite.data import CocoFolder, Scenes, make_transform
from regolite.data.views import OfImages
from regolite.errors import UserError
from regolite.evaluation import FIGURES, average_precision, detect_all, evaluate, measure
from regolite.types import DetectorOutput, FeatureMap, Prediction

TINY = Path(__file__).parents[1] / "data" / "coco_tiny"
BACKENDS = ("pycocotools", "faster-coco-eval")


@pytest.fixture(scope="module")
def tiny():
    return CocoFolder(TINY, "val")


def planted(coco, quality, seed=0):
    """Detections made from the truth: ``perfect``, ``shifted``, ``wrong`` labels, or a ``mixture`` with false ones."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.rand(shape, generator=generator)

    categories, found = sorted(coco.cats), []
    for annotation in coco.dataset["annotations"]:
        if annotation["iscrowd"]:
            continue
        x, y, w, h = annotation["bbox"]
        category, score = annotation["category_id"], 0.5 + 0.5 * float(draw())
        if quality == "shifted":
            x = x + 0.2 * w  # IoU 0.8 / 1.2 = 0.67
        if quality == "wrong" or quality == "mixture" and draw() < 0.2:
            category = categories[(categories.index(category) + 1) % len(categories)]
        if quality == "mixture":
            dx, dy, dw, dh = (0.3 * (draw(4) - 0.5)).tolist()
            x, y, w, h, score = x + dx * w, y + dy * h, w * (1 + dw), h * (1 + dh), float(draw())
            if draw() < 0.2:
                continue
        box = {"bbox": [x, y, w, h], "score": score}
        found.append({"image_id": annotation["image_id"], "category_id": category, **box})
    return found


def by_pycocotools(file, results):
    """The twelve figures without any of our code."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(file)
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return 100 * evaluation.stats


@pytest.mark.parametrize("quality", ["perfect", "shifted", "wrong", "mixture"])
def test_figures_are_pycocotools_own(tiny, quality):
    results = planted(tiny.coco, quality)
    figures = average_precision(tiny.coco, results)
    assert tuple(figures) == FIGURES
    wanted = by_pycocotools(TINY / "annotations" / "instances_val.json", results)
    assert list(figures.values()) == pytest.approx(wanted.tolist(), abs=1e-4)
    assert average_precision(tiny.coco, results, "faster-coco-eval") == pytest.approx(figures, abs=1e-4)
    if quality == "perfect":
        assert figures["AP"] == figures["AP75"] == 100.0
    if quality == "shifted":  # at the thresholds 0.50, 0.55, 0.60 and 0.65 of ten
        assert figures["AP50"] == 100.0 and figures["AP75"] == 0.0 and figures["AP"] == pytest.approx(40, abs=1)
    if quality == "wrong":
        assert figures["AP"] < 5
    if quality == "mixture":
        assert 10 < figures["AP"] < figures["AP50"] < 90


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_detected_gives_zero(tiny, backend):
    assert average_precision(tiny.coco, [], backend) == {name: 0.0 for name in FIGURES}


def test_unknown_backend(tiny):
    with pytest.raises(UserError, match="unknown backend 'coco'; choose 'pycocotools' or 'faster-coco-eval'"):
        average_precision(tiny.coco, planted(tiny.coco, "perfect"), "coco")


@pytest.fixture
def folder(tmp_path):
    """Images of three sizes and category ids with gaps, not in order; no object is small; one image is empty."""
    sizes = {7: (200, 160), 3: (120, 180), 12: (150, 150)}
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": w, "height": h} for i, (w, h) in sizes.items()],
        "annotations": [
            {"id": 1, "image_id": 3, "category_id": 90, "bbox": [10, 20, 50, 60], "area": 3000, "iscrowd": 0},
            {"id": 2, "image_id": 7, "category_id": 17, "bbox": [20, 10, 150, 120], "area": 18000, "iscrowd": 0},
            {"id": 3, "image_id": 7, "category_id": 3, "bbox": [0, 100, 60, 60], "area": 3600, "iscrowd": 0},
            {"id": 4, "image_id": 7, "category_id": 3, "bbox": [0, 0, 200, 160], "area": 32000, "iscrowd": 1},
        ],
        "categories": [{"id": 90, "name": "brush"}, {"id": 3, "name": "car"}, {"id": 17, "name": "cat"}],
    }
    (tmp_path / "annotations").mkdir()
    (tmp_path / "images").mkdir()
    (tmp_path / "annotations" / "instances_val.json").write_text(json.dumps(content))
    for i, size in sizes.items():
        Image.new("RGB", size).save(tmp_path / "images" / f"{i}.png")
    return tmp_path


def test_no_annotation_at_all_is_an_error_unless_detections_are_saved(folder, tmp_path):
    file = folder / "annotations" / "instances_val.json"
    oracle = Oracle(CocoFolder(folder, "val"))
    oracle.model_config = configure("deformable_detr_scenes", image_size=96)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"annotations": []}))
    with pytest.raises(UserError, match="instances_val.json: 3 images without a single annotation, nothing to measure"):
        evaluate(oracle, CocoFolder(folder, "val"), progress=False)
    figures = evaluate(oracle, CocoFolder(folder, "val"), progress=False, detections=tmp_path / "found.json")
    assert figures["AP"] is None and json.loads((tmp_path / "found.json").read_text())


class Oracle(nn.Module):
    """A detector that was told the truth: stage 2 says it, stage 1 moves every box, the base makes them small."""

    scoring = "sigmoid"

    def __init__(self, dataset, queries=5):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.dataset, self.queries, self.next, self.seen = dataset, queries, 0, []

    def forward(self, images):
        self.seen.append((len(images), self.training, torch.is_inference_mode_enabled()))
        classes = len(self.dataset.classes)
        logits = torch.full((3, len(images), self.queries, classes), -9.0)
        boxes = torch.full((3, len(images), self.queries, 4), 0.5)
        for b in range(len(images)):
            target = self.dataset[self.next][1]
            for n, (label, box) in enumerate(zip(target.labels.tolist(), target.boxes)):
                logits[:, b, n, label] = 9.0
                boxes[:, b, n] = box
                boxes[0, b, n, 2:] /= 10
                boxes[1, b, n, 0] += 0.2 * box[2]
            self.next += 1
        base, first, second = (Prediction(x, y) for x, y in zip(logits, boxes))
        features = [FeatureMap(torch.zeros(len(images), 1, 1, 1), torch.zeros(len(images), 1, 1).bool(), 32)]
        hidden = torch.zeros(len(images), self.queries, 1)
        return DetectorOutput([base], hidden, features, stages=[[base, first], [base, second]])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_evaluate_by_stage(folder, backend, batch_size):
    dataset = CocoFolder(folder, "val")
    figures = evaluate(Oracle(dataset), dataset, batch_size=batch_size, backend=backend, progress=False)
    assert figures["images"] == 3
    assert [stage["stage"] for stage in figures["stages"]] == [0, 1, 2]
    assert [stage["AP"] for stage in figures["stages"]] == pytest.approx([0, 40, 100])
    assert figures["stages"][1]["AP50"] == 100.0
    assert {name: figures[name] for name in FIGURES} == {name: figures["stages"][-1][name] for name in FIGURES}
    # No object is small: that figure does not exist, which is not the same as 0.
    assert figures["APs"] is None and figures["ARs"] is None
    assert figures["APm"] == figures["APl"] == 100.0
    assert json.loads(json.dumps(figures)) == figures


def test_files_that_were_scaled_after_annotation_change_no_figure(folder):
    wanted = evaluate(Oracle(CocoFolder(folder, "val")), CocoFolder(folder, "val"), progress=False)
    Image.new("RGB", (400, 320)).save(folder / "images" / "7.png")
    dataset = CocoFolder(folder, "val")
    assert evaluate(Oracle(dataset), dataset, progress=False) == wanted


def without(oracle, *left_out):
    """An oracle that is not asked for these images."""
    order = [i for i in range(len(oracle.dataset)) if i not in left_out]
    oracle.dataset = OfImages(oracle.dataset, order)
    return oracle


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_an_image_that_cannot_be_read_is_left_out_with_its_ground_truth(folder, tmp_path, batch_size, workers):
    oracle = Oracle(CocoFolder(folder, "val"))
    (folder / "images" / "7.png").write_bytes(b"")  # the first, which has most objects
    dataset = CocoFolder(folder, "val")
    how = {"batch_size": batch_size, "workers": workers, "progress": False}
    with pytest.raises(UserError, match="^image .*7.png cannot be read"):
        evaluate(oracle, dataset, **how)
    file = tmp_path / "found.json"
    figures = evaluate(without(oracle, 0), dataset, **how, on_broken="skip", detections=file)
    assert figures["images"] == 2 and figures["AP"] == 100.0 and figures["APl"] is None
    assert [said.partition(" cannot")[0] for said in figures["broken"]] == [f"image {folder / 'images' / '7.png'}"]
    assert {line["image_id"] for line in json.loads(file.read_text())} == {3, 12}

    for name in ("3.png", "12.png"):
        (folder / "images" / name).unlink()
    dataset = CocoFolder(folder, "val", check_files=False)
    with pytest.raises(UserError, match="3 of 3 images cannot be read, is the disk there.*7.png"):
        evaluate(oracle, dataset, **how, on_broken="skip")


def test_many_broken_images_in_a_row_are_the_disk(folder, monkeypatch):
    monkeypatch.setattr("regolite.evaluation.coco.TRIES", 2)
    oracle, dataset = Oracle(CocoFolder(folder, "val")), CocoFolder(folder, "val")
    for name in ("7.png", "12.png"):  # the first and the last
        (folder / "images" / name).write_bytes(b"")
    assert evaluate(without(oracle, 0, 2), dataset, progress=False, on_broken="skip")["images"] == 1
    Image.new("RGB", (200, 160)).save(folder / "images" / "7.png")
    (folder / "images" / "3.png").write_bytes(b"")
    with pytest.raises(UserError, match="2 of 3 images cannot be read, is the disk there.*3.png"):
        evaluate(Oracle(dataset), dataset, progress=False, on_broken="skip")


def test_nothing_detected_keeps_missing_sizes_missing(folder):
    figures = average_precision(CocoFolder(folder, "val").coco, [])
    assert figures["APs"] is None and figures["APm"] == 0.0 and figures["AP"] == 0.0


def test_coco_ids_at_the_border(folder, monkeypatch):
    """Our labels are 0, 1, 2; COCO's ids are 3, 17, 90: pycocotools must get the latter, and pixels."""
    kept = []
    monkeypatch.setattr(
        "regolite.evaluation.coco.average_precision",
        lambda coco, results, backend: kept.append(results) or {name: 0.0 for name in FIGURES},
    )
    dataset = CocoFolder(folder, "val")
    evaluate(Oracle(dataset), dataset, progress=False)
    sure = [r for r in kept[-1] if r["score"] > 0.5]
    assert [(r["image_id"], r["category_id"]) for r in sure] == [(7, 17), (7, 3), (3, 90)]
    wanted = [[20, 10, 150, 120], [0, 100, 60, 60], [10, 20, 50, 60]]
    for result, box in zip(sure, wanted):
        assert result["bbox"] == pytest.approx(box, abs=1e-3)


COLUMNS = {"classes": tuple(str(i) for i in range(91)), "category_ids": tuple(range(91))}


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_models_own_categories(folder, backend):
    """A published model has a column for every number up to 90; what it finds beside the data's counts for nothing."""
    dataset = CocoFolder(folder, "val")
    model = Oracle(dataset)
    model.model_config = configure("deformable_detr_scenes", augment="none", image_size=64, **COLUMNS)
    plain = model.forward

    def forward(images):
        output = plain(images)
        for prediction in output.by_stage:
            wide = torch.full((*prediction.logits.shape[:2], 91), -9.0)
            wide[..., list(dataset.category_ids)] = prediction.logits
            wide[..., [0, 16]] = 8.0  # numbers that the data do not know
            prediction.logits = wide
        return output

    model.forward = forward
    figures = evaluate(model, dataset, backend=backend, progress=False)
    assert [stage["AP"] for stage in figures["stages"]] == pytest.approx([0, 40, 100])


def test_a_model_without_names_of_classes_takes_the_datas(folder):
    dataset = CocoFolder(folder, "val")
    model = Oracle(dataset)
    for numbers in ((), (0, 1, 2)):
        model.model_config = configure("deformable_detr_scenes", category_ids=numbers)
        model.next = 0
        assert evaluate(model, dataset, progress=False)["AP"] == pytest.approx(100)


@pytest.mark.parametrize("category_ids", [(3, 17, 80), (1, 2, 3), tuple(range(80))])
def test_categories_that_the_model_does_not_know(folder, category_ids):
    dataset = CocoFolder(folder, "val")
    model = Oracle(dataset)
    model.model_config = configure("deformable_detr_scenes", category_ids=category_ids)
    with pytest.raises(UserError, match=r"categories that the model does not know: \[.*90\]"):
        evaluate(model, dataset, progress=False)
    assert not model.seen


def test_images_are_prepared_as_the_model_says(folder):
    """Where the data have a transform it is theirs; where they have none it is the model's, and not full size."""
    sizes = []

    class Watching(Oracle):
        def forward(self, images):
            sizes.extend(images.sizes.tolist())
            return super().forward(images)

    for transform, configured, wanted in (
        (None, 80, [80, 80, 80]),
        (make_transform("none", 100), 80, [100, 100, 100]),
        (None, None, [200, 180, 150]),
    ):
        dataset = CocoFolder(folder, "val", transform)
        model = Watching(dataset)
        if configured:
            model.model_config = configure("deformable_detr_scenes", image_size=configured)
        assert evaluate(model, dataset, batch_size=2, progress=False)["AP"] == pytest.approx(100)
        assert [max(size) for size in sizes] == wanted and dataset.transform is transform
        sizes.clear()


def test_the_detections_can_be_kept(folder):
    """The file is the last stage's, and gives the same figures by pycocotools alone."""
    dataset, file = CocoFolder(folder, "val"), folder / "new" / "detections.json"
    figures = evaluate(Oracle(dataset), dataset, progress=False, detections=file)
    by_stage = detect_all(Oracle(dataset), dataset, progress=False)
    assert json.loads(file.read_text()) == by_stage[-1] != by_stage[0]
    wanted = by_pycocotools(folder / "annotations" / "instances_val.json", str(file))
    assert [-100.0 if v is None else v for v in (figures[n] for n in FIGURES)] == pytest.approx(wanted.tolist())


@pytest.mark.parametrize("backend", BACKENDS)
def test_precision_by_category_and_recall(tiny, backend):
    measured = measure(tiny.coco, planted(tiny.coco, "mixture"), backend)
    assert measured.precision.shape == (10, 101, len(tiny.classes))
    assert np.nanmean(measured.by_category) == pytest.approx(measured.figures["AP"], abs=1e-3)
    labels = {label for i in range(len(tiny)) for label in tiny[i][1].labels.tolist()}
    assert set(np.flatnonzero(~np.isnan(measured.by_category))) == labels
    for name, iou in (("AP50", 0.5), ("AP75", 0.75)):
        curve = measured.curve(iou)
        assert (np.diff(curve) <= 1e-9).all() and curve.mean() == pytest.approx(measured.figures[name], abs=1e-3)


def test_top_k(folder):
    dataset = CocoFolder(folder, "val", limit=1)
    full = evaluate(Oracle(dataset), dataset, progress=False)
    assert full["AP"] == full["AR1"] == 100.0  # one object a class in this image
    assert evaluate(Oracle(dataset), dataset, top_k=1, progress=False)["AP"] == pytest.approx(50)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("workers", [0, 1])
def test_leaves_no_trace(folder, training, workers):
    dataset = CocoFolder(folder, "val")
    model = Oracle(dataset).train(training)
    before = torch.get_rng_state()
    evaluate(model, dataset, batch_size=2, workers=workers, progress=False)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training == training
    assert model.seen == [(2, False, True), (1, False, True)]


def test_stages_of_a_rego():
    small = {
        "dim": 32,
        "heads": 2,
        "detector.ffn_dim": 16,
        "queries": 6,
        "detector.encoder_layers": 1,
        "detector.decoder_layers": 1,
    }
    model = build("rego_deformable_detr_scenes", 14, **small, rego={"ffn_dim": 16}, stages=2)
    dataset = Scenes(3, size=64)
    every = evaluate(model, dataset, progress=False)["stages"]
    assert [stage["stage"] for stage in every] == [0, 1, 2]
    assert evaluate(model, dataset, stages=1, progress=False)["stages"] == every[:2]
    assert evaluate(model, dataset, stages=0, progress=False)["stages"] == every[:1]
    assert evaluate(model.detector, dataset, progress=False)["stages"] == every[:1]
