"""The public functions: each wrong value is refused by name, numbers of numpy are numbers, and modes are kept."""

import contextlib
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import unchecked

import regolite
from regolite.data import Scenes, make_transform, open_data
from regolite.data.convert import convert
from regolite.errors import UserError
from regolite.evaluation import EvaluationConfig, bootstrap, evaluate
from regolite.evaluation.complexity import count
from regolite.evaluation.relations import relation_score
from regolite.evaluation.removal import removal
from regolite.evaluation.run_comparison import Comparison
from regolite.inference import detect_by_stage
from regolite.utils.devices import choose_device

SMALL = {
    "queries": 6, "dim": 32, "heads": 2, 
    "detector.ffn_dim": 16, "detector.encoder_layers": 1, "detector.decoder_layers": 1,
    "rego.ffn_dim": 16, "stages": 2, "image_size": 64,
}  # fmt: skip
IMAGE = Image.new("RGB", (40, 30), "green")
NAME = "rego_deformable_detr_scenes"
SCENES = Scenes(1, size=64)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return regolite.build(NAME, 14, **SMALL).eval()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"detector.encoder_layers": -1}, "encoder_layers=-1 must not be negative"),
        ({"detector.encoder_layers": 10**6}, "encoder_layers=1000000 must be at most 100"),
        ({"detector.decoder_layers": 0}, "decoder_layers=0 must be at least 1"),
        ({"points": 10**6}, "points=1000000 must be at most 64"),
        ({"queries": np.float64(5)}, "queries=5.0 is not a whole number"),
        ({"heads": 0}, "heads=0 must be at least 1"),
        ({"detector.dropout": 1.5}, "dropout=1.5 must be at most 1"),
        ({"alphas": (1.0, -2.0)}, "alphas=(1.0, -2.0) must not be negative"),
        ({"alphas": (1.0, 0.0)}, "alphas=(1.0, 0.0) must be greater than 0"),
        ({"stages": 1000}, "stages=1000 must be at most 20"),
        ({"label": -1.0}, "label=-1.0 must not be negative"),
        ({"image_size": 0}, "image_size=0 must be at least 1"),
        ({"num_classes": 0}, "num_classes=0 must be at least 1"),
        ({"num_classes": 2.5}, "num_classes=2.5 is not a whole number"),
        ({"num_classes": 10**9}, "num_classes=1000000000 must be at most 100000"),
        ({"dim": 127}, "2 heads do not divide 127 channels"),
        ({"dim": 127, "heads": 1}, "dim=127 must be a multiple of 32"),
        ({"dim": 48}, "dim=48 must be a multiple of 32"),
    ],
)
def test_build(changes, said):
    with unchecked(), pytest.raises(UserError) as caught:
        regolite.build(NAME, **({"num_classes": 3} | SMALL | changes))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_dim_that_sines_cannot_fill():
    with pytest.raises(UserError, match="dim=126 must be a multiple of 4"):
        regolite.build("detr_scenes", 3, dim=126, heads=1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"threshold": 50}, "threshold=50 must be a number from 0 to 1"),
        ({"threshold": -0.1}, "threshold=-0.1 must be a number from 0 to 1"),
        ({"threshold": float("nan")}, "threshold=nan must be a number from 0 to 1"),
        ({"threshold": "high"}, "threshold='high' must be a number from 0 to 1"),
        ({"threshold": True}, "threshold=True must be a number from 0 to 1"),
        ({"top_k": -1}, "top_k=-1 must be at least 1"),
        ({"top_k": 2.5}, "top_k=2.5 is not a whole number"),
        ({"stages": 3}, "stages is 3, and this model has 0 to 2"),
        ({"stages": -1}, "stages=-1 must not be negative"),
    ],
)
def test_detect(model, options, said):
    with unchecked(), pytest.raises(UserError) as caught:
        regolite.detect(model, IMAGE, **options)
    assert said in str(caught.value)
    if "stages" not in options:
        with unchecked(), pytest.raises(UserError) as caught:
            detect_by_stage(model, IMAGE, **options)
        assert said in str(caught.value)


def test_stages_of_a_detector_without_rego(model):
    with pytest.raises(UserError, match="stages is 1, and this model has no REGO: give 0, or leave it out"):
        regolite.detect(model.detector, IMAGE, stages=1)
    assert regolite.detect(model.detector, IMAGE, stages=0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"batch_size": 1.5}, "batch_size=1.5 is not a whole number"),
        ({"stages": 9}, "stages is 9"),
    ],
)
@pytest.mark.parametrize("function", [evaluate, relation_score])
def test_measuring(model, function, options, said):
    with unchecked(), pytest.raises(UserError) as caught:
        function(model, Scenes(1, size=64), progress=False, **options)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"top_k": 0}, "top_k=0 must be at least 1"),
        ({"workers": -1}, "workers=-1 must be at least 0"),
        ({"draws": -5}, "draws=-5 must be at least 0"),
        ({"backend": "coco"}, "unknown backend 'coco'"),
        ({"on_broken": "ignore"}, "on_broken='ignore' is not one of 'stop', 'skip'"),
    ],
)
def test_evaluate(model, options, said):
    with pytest.raises(UserError, match=said):
        evaluate(model, Scenes(1, size=64), progress=False, **options)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda model, folder: bootstrap(SCENES.coco, [[]], draws=0), "draws=0 must be at least 1"),
        (lambda model, folder: removal(model, SCENES, [], stages=7), "stages is 7"),
        (lambda model, folder: count(model, 0, 64), "height=0 must be at least 1"),
        (lambda model, folder: regolite.load(device="gpu"), "device gpu: PyTorch has no such device"),
        (lambda model, folder: regolite.load(None), "path=None is not the path of a file"),
        (lambda model, folder: regolite.train({"data": "x"}), "config={'data': 'x'} is not a RunConfig"),
        (lambda model, folder: regolite.train(regolite.RunConfig(), 5), "watch=5 is not a function"),
        (lambda model, folder: open_data(Path(__file__)), "test_api.py is a file: give a folder"),
        (lambda model, folder: regolite.build(5, 3), "preset=5 is not the name of a preset or a ModelConfig"),
        (lambda model, folder: regolite.detect(None, IMAGE), "model=None is not a detector"),
        (lambda model, folder: evaluate(model, "data/coco_tiny"), "dataset='data/coco_tiny' is not a dataset"),
        (lambda model, folder: regolite.record(None).__enter__(), "model=None is not a detector"),
        (
            lambda model, folder: regolite.Rego(model.detector, {"stages": 2}),
            "config={'stages': 2} is not a RegoConfig",
        ),
        (lambda model, folder: open_data("scenes:5", limit="all"), "limit='all' is not a whole number"),
        (lambda model, folder: open_data("data/coco_tiny", limit=1.5), "limit=1.5 is not a whole number"),
        (lambda model, folder: Scenes(2.5), "number of images 2.5: give 1 to"),
        (lambda model, folder: make_transform("laptop", 10**9), "image_size=1000000000 must be at most 10000"),
        (lambda model, folder: make_transform("detr", "big"), "size='big' is not a whole number"),
        (lambda model, folder: choose_device("cuda:99"), "device cuda:99: PyTorch sees no such device"),
        (
            lambda model, folder: convert(folder / "source", folder / "new", val="half"),
            "val='half' must lie between 0 and 1",
        ),
        (lambda model, folder: convert(folder / "source", folder / "new", seed=0.5), "seed=0.5 is not a whole number"),
        (lambda model, folder: regolite.RegoConfig(alphas=[3.0, 2.0, -1.0]), "must not be negative"),
        (lambda model, folder: regolite.RunConfig(epochs=np.float32(1.5)), "epochs=1.5 is not a whole number"),
        (lambda model, folder: regolite.train(regolite.RunConfig(output="")), "output='' is no folder: give output"),
        (lambda model, folder: regolite.RunConfig(data="a\0b"), "data='a\\x00b' is empty or not a name"),
        (lambda model, folder: regolite.RunConfig(drop_epochs=(-1,)), "drop_epochs=(-1,) must not be negative"),
        (lambda model, folder: evaluate(model, SCENES, detections=folder), "is a folder: give a file"),
        (lambda model, folder: open_data(None), "root=None is not the path of a data folder, or scenes"),
        (lambda model, folder: open_data("scenes:2", 1), "split=1 is not the name of a split"),
        (lambda model, folder: open_data("scenes:2", transform="detr"), "transform='detr' is not a function"),
        (lambda model, folder: convert(None, folder / "new"), "source=None is not the path of a folder"),
        (lambda model, folder: convert(folder / "source", Path(__file__)), "is a file: give a new folder"),
        (
            lambda model, folder: replace(model.model_config, category_ids=[1] * 14),
            "category_ids=(1, 1, 1, 1, 1, 1, ...) must be unique and below 2**63",
        ),
        (lambda model, folder: EvaluationConfig(batch_size=np.int64(0)), "batch_size=0 must be greater than 0"),
    ],
)
def test_others(model, tmp_path, call, said):
    (tmp_path / "source").mkdir()
    with unchecked(), pytest.raises(UserError) as caught:
        call(model, tmp_path)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_numbers_of_numpy_lists_and_paths(model, tmp_path):
    with unchecked():
        config = regolite.RunConfig(
            data=tmp_path, output=tmp_path / "run", lr=np.float32(0.5), epochs=np.int64(3), drop_epochs=[1, np.int32(2)]
        )
        assert (config.lr, config.epochs, config.drop_epochs) == (0.5, 3, (1, 2)) and type(config.epochs) is int
        assert (config.data, config.output) == (str(tmp_path), str(tmp_path / "run"))
        assert Comparison(runs=[Path("a"), "b"]).runs == ("a", "b")
        made = regolite.configure(
            NAME, rego={"dropout": np.float64(0.25)}, alphas=np.array([3.0, 2.0, 1.0]), classes=["a", "b"]
        )
        assert made.rego.alphas == (3.0, 2.0, 1.0) and made.classes == ("a", "b")
        assert type(made.detector.dropout) is float
        assert replace(made, category_ids=[4, 7]).category_ids == (4, 7)
        [found] = regolite.detect(model, IMAGE, np.float32(0.0), np.int64(1), np.int64(2))
        assert len(found) == 2
        assert regolite.build(NAME, np.int64(3), **SMALL).model_config.category_ids == (0, 1, 2)


class Interrupted(Exception):
    pass


def modes(model):
    return [module.training for module in model.modules()]


@pytest.mark.parametrize("fails", [False, True])
def test_no_call_changes_the_mode_of_any_part(fails, monkeypatch):
    """A model in training whose base detector is not, as people freeze it by hand."""
    torch.manual_seed(0)
    model = regolite.build(NAME, 14, **SMALL).train()
    model.detector.eval()
    before, scenes, seen = modes(model), Scenes(2, size=64), []

    def forward(*args, **kwargs):
        seen.append(model.training or model.detector.training)
        if fails:
            raise Interrupted
        return own(*args, **kwargs)

    own = model.forward
    monkeypatch.setattr(model, "forward", forward)
    for call in (
        lambda: regolite.detect(model, [IMAGE, IMAGE]),
        lambda: detect_by_stage(model, IMAGE),
        lambda: evaluate(model, scenes, progress=False),
        lambda: relation_score(model, scenes, progress=False),
        lambda: count(model, 64, 64),
    ):
        seen.clear()
        with contextlib.suppress(Interrupted, UserError):  # a model that has learned nothing finds no relations
            call()
        assert seen and not any(seen), "it looked in evaluation mode"
        assert modes(model) == before


def test_full_size_is_said(model, caplog):
    """Neither the data nor the model says how images are prepared."""
    base = regolite.build(
        "deformable_detr_scenes", 14, **{k: v for k, v in SMALL.items() if "rego" not in k and k != "stages"}
    )
    del base.model_config
    with caplog.at_level(logging.WARNING, "regolite"):
        evaluate(base, Scenes(1, size=64), progress=False)
    assert "images are used at full size" in caplog.text
