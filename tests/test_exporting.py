"""Export: files of ONNX and of torch.export say what the model says, tell how to use them, and refuse by name."""

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import shake, unchecked

from regolite import UserError, build, exporting
from regolite.cli import main
from regolite.exporting import Exportable, export, run_onnx, square
from regolite.exporting.card import write_card
from regolite.inference import to_detections
from regolite.models.detector import Detector
from regolite.types import Prediction

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

FAMILIES = ("detr", "anchor_detr", "smca")
SIZES = {"dim": 32, "heads": 4, "queries": 9, "encoder_layers": 1, "decoder_layers": 1, "ffn_dim": 32}


@pytest.fixture(autouse=True)
def without_checks():
    """The shape checker asks for numbers where torch.export has symbols."""
    with unchecked():
        yield


def small(family, stages=1):
    name = family if family.endswith("everyday") else f"{family}_tiny"
    parts = {"detector": SIZES | {"backbone": "tiny", "weights": None, "frozen_stages": 0}}
    if family == "smca":
        parts["detector"]["multi_scale_layers"] = (1,)
    if stages:
        parts["rego"] = {"ffn_dim": 32, "stages": stages, "alphas": (2.0,) * stages}
    torch.manual_seed(0)
    return shake(build(f"rego_{name}" if stages else name, num_classes=3, image_size=64, **parts)).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("exported")


@pytest.fixture(scope="module")
def model():
    with unchecked():
        return small("deformable_detr_everyday")


@pytest.fixture(scope="module")
def file(folder, model):
    with unchecked():
        return export(model, folder / "model.onnx", license="CC0-1.0")


@pytest.fixture(scope="module")
def photo(folder):
    """An oblong image of soft colors, so that ways of resizing differ little."""
    path = folder / "photo.png"
    colors = np.random.default_rng(0).integers(0, 256, (3, 5, 3), np.uint8)
    Image.fromarray(colors).resize((100, 48), Image.Resampling.BICUBIC).save(path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_exported_programs_say_what_the_model_says(family, tmp_path):
    """With REGO; export compares the numbers itself, on images of two sizes, and refuses a batch size that is fixed.

    The everyday detector, whose ONNX file is tested too, is a Deformable DETR.
    """
    file = export(small(family), tmp_path / "model.pt2", "torch-export")
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_onnx_has_the_outputs_of_the_model_for_any_batch(file, model):
    pixels, sizes = torch.rand(3, 3, 64, 64), torch.tensor([[64, 64], [40, 64], [64, 33]])
    logits, boxes = run_onnx(file, pixels, sizes)
    with torch.no_grad():
        expected = Exportable(model)(pixels, sizes)
    torch.testing.assert_close(logits, expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(boxes, expected[1], rtol=1e-4, atol=1e-4)
    assert logits.shape[:2] == (2, 3)  # the base detector and one stage
    assert not torch.equal(logits[0], logits[1])


def test_padding_does_not_matter(file):
    """The module masks what lies beyond an image's size."""
    pixels, sizes = torch.rand(1, 3, 64, 64), torch.tensor([[40, 64]])
    other = pixels.clone()
    other[:, :, 40:] = 0.7
    for one, two in zip(run_onnx(file, pixels, sizes), run_onnx(file, other, sizes)):
        assert torch.equal(one, two)


def test_the_program_beside_the_file_detects(file, photo, model):
    """What it prints are the outputs for the same photograph; its resizing differs in rounding only."""
    script = file.with_name("detect_onnx.py")
    words = [sys.executable, str(script), str(file), str(photo), "0.0"]
    shown = subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()
    pixels, size = square(photo, 64)
    logits, boxes = run_onnx(file, pixels[None], size[None])
    [found] = to_detections(Prediction(logits[-1], boxes[-1]), torch.tensor([[48, 100]]), "sigmoid")
    assert len(shown) == len(found) == 27  # every pair of query and class
    for line, score in zip(shown, found.scores.tolist()):
        assert float(line.split()[1]) == pytest.approx(score, abs=0.02)
    name = model.model_config.classes[found.labels[0]]
    corners = ", ".join(f"{x:.0f}" for x in found.boxes_xyxy[0].tolist())
    assert shown[0].startswith(name) and shown[0].endswith(corners)


def test_the_program_needs_no_package_of_ours(file):
    text = file.with_name("detect_onnx.py").read_text("utf-8")
    assert "regolite" not in text and "torch" not in text and len(text.splitlines()) < 50


def test_the_file_tells_how_it_is_used(file, model):
    about = onnxruntime.InferenceSession(file).get_modelmeta().custom_metadata_map
    assert json.loads(about["classes"]) == list(model.model_config.classes)
    assert (about["size"], about["scoring"], about["license"]) == ("64", "sigmoid", "CC0-1.0")
    assert json.loads(about["results"]) == ["base", "stage 1"]
    card = file.with_suffix(".md").read_text("utf-8")
    assert "[B, 3, 64, 64]" in card and "license: cc0-1.0" in card and "3 classes" in card


def test_no_license_is_made_up(file, tmp_path):
    about = onnxruntime.InferenceSession(file).get_modelmeta().custom_metadata_map
    card = write_card(tmp_path / "other.onnx", {name: value for name, value in about.items() if name != "license"})
    text = card.read_text("utf-8")
    assert "license: " not in text.split("---")[1] and "Their license: not stated." in text


def test_an_image_fills_the_corner_of_its_square(photo):
    pixels, size = square(photo, 64)
    assert size.tolist() == [30, 64] and pixels.shape == (3, 64, 64)
    assert not pixels[:, 30:].any() and pixels[:, :30].min() >= 0 and pixels.max() <= 1
    stored = np.asarray(Image.open(photo).resize((64, 30), Image.Resampling.BILINEAR)).transpose(2, 0, 1) / 255
    assert np.abs(pixels[:, :30].numpy() - stored).max() < 0.02


@pytest.mark.slow
def test_traces_are_further_outputs(model, tmp_path):
    file = export(model, tmp_path / "traced.pt2", "torch-export", traces=True)
    assert file.exists()
    module = Exportable(model, None, ["decoder.0.cross", "stage.1.glimpses"])
    with torch.no_grad():
        outputs = module.outputs(torch.rand(1, 3, 64, 64), torch.tensor([[64, 64]]))
    shapes = {name: tuple(value.shape) for name, value in outputs.items()}
    assert shapes["stage.1.glimpses.regions"] == (1, 9, 4)
    assert shapes["decoder.0.cross.locations"][:3] == (1, 9, 4)


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_smaller_files(precision, file, tmp_path):
    small_file = tmp_path / "small.onnx"
    shutil.copy(file, small_file)
    exporting.reduce_precision(small_file, precision)
    about = onnxruntime.InferenceSession(small_file).get_modelmeta().custom_metadata_map
    assert about["precision"] == precision and json.loads(about["classes"])
    pixels, sizes = torch.rand(1, 3, 64, 64), torch.tensor([[64, 64]])
    full, less = run_onnx(file, pixels, sizes), run_onnx(small_file, pixels, sizes)
    assert small_file.stat().st_size < file.stat().st_size
    assert less[0].dtype == torch.float32 and not torch.equal(full[0], less[0])
    if precision == "fp16":
        torch.testing.assert_close(full[0], less[0], rtol=0.05, atol=0.05)


def test_what_cannot_be_exported_is_named(model, tmp_path):
    target = tmp_path / "model.onnx"
    with pytest.raises(UserError, match="size=70 must be a multiple of 32; 64 is the nearest"):
        export(model, target, size=70)
    with pytest.raises(UserError, match=r"model\.onnx: a file of format torch-export ends in \.pt2"):
        export(model, target, "torch-export")
    with pytest.raises(UserError, match="format='coreml' is unknown: choose one of onnx, torch-export"):
        export(model, target, "coreml")
    with pytest.raises(UserError, match="precision=fp16 is possible for ONNX only"):
        export(model, tmp_path / "model.pt2", "torch-export", precision="fp16")
    with pytest.raises(UserError, match="stages is 4, and this model has 0 to 1"):
        export(model, target, stages=4)
    with pytest.raises(UserError, match="takes a model on the CPU"):
        export(copy.deepcopy(model).to("meta"), target)
    with pytest.raises(UserError, match="returns a varying number of detections"):
        export(NoQueries(model.model_config), target)
    assert not list(tmp_path.iterdir())


def test_a_file_that_says_something_else_is_refused():
    ours, theirs = torch.zeros(2, 3), torch.tensor([[0.0, 0, 0], [0, 0.5, 0]])
    with pytest.raises(UserError, match="has other outputs than the model: boxes differs by 0.5"):
        exporting._compare({"logits": ours, "boxes": ours}, [ours, theirs], "fp32")
    with pytest.raises(UserError, match="numbers that are not finite"):
        exporting._compare({"logits": ours, "boxes": ours}, [ours, theirs / 0], "int8")


class NoQueries(Detector):
    """As the baselines of torchvision, which return detections."""

    def __init__(self, config):
        super().__init__()
        self.model_config = config


def test_a_file_is_checked_with_photographs_of_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).resolve().parents[1])
    pixels, _ = exporting._examples(64, None)
    first, second, *_ = sorted(exporting.PHOTOGRAPHS.iterdir())
    assert torch.equal(pixels, torch.stack([square(first, 64)[0], square(second, 64)[0]]))
    monkeypatch.chdir(tmp_path)
    assert exporting._examples(64, None)[1].tolist() == [[64, 64], [48, 32]], "random colors"


def test_a_pytorch_that_cannot_convert_is_named(model, tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise RuntimeError("no such operator\nand more")

    monkeypatch.setattr(torch.onnx, "export", refuse)
    with pytest.raises(UserError, match=r"^PyTorch .* cannot convert this model to ONNX; .*: no such operator$"):
        export(model, tmp_path / "model.onnx")


def test_without_onnx_there_is_one_line(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"onnxscript is not installed: pip install 'regolite\[export\]'"):
        export(model, tmp_path / "model.onnx")


def test_the_command(tmp_path, capsys):
    assert main(["export", "--output", str(tmp_path / "a.txt")]) == 2
    assert "a.txt: a file of format onnx ends in .onnx" in capsys.readouterr().err


def test_gradients_of_compiled_code_are_those_of_the_package():
    """The forms for torch.compile and torch.export of the two fast operations are their definitions."""
    from regolite.models.deformable_attention import read_and_mix
    from regolite.ops import weighted_sums

    rows, index, weight = torch.randn(9, 4, requires_grad=True), torch.randint(9, (5, 3)), torch.rand(5, 3)
    maps, places, share = torch.randn(2, 3, 5, 6, requires_grad=True), torch.rand(2, 4, 7, 2), torch.rand(2, 4, 7)
    for function, values in ((weighted_sums, (rows, index, weight)), (read_and_mix, (maps, places, share))):
        eager = torch.autograd.grad(function(*values).square().sum(), values[0])[0]
        program = torch.export.export(_Module(function), values, strict=False).module()
        torch.testing.assert_close(torch.autograd.grad(program(*values).square().sum(), values[0])[0], eager)


class _Module(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *values):
        return self.function(*values)
