"""The walk-through of CONTRIBUTING.md: a new detector in one file trains, carries REGO, is saved and loaded."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch

import regolite
from regolite.checkpoint import save_model
from regolite.data import open_data
from regolite.models.config import DETECTORS, ModelConfig

TEXT = (Path(__file__).resolve().parent.parent / "CONTRIBUTING.md").read_text("utf-8")
DATA = "scenes:4:val=2:size=64"


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelConfig:
    """The configuration of the example, whose code has become a file."""
    [code] = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    (tmp_path / "grid_example.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("regolite.models.config.DETECTORS", dict(DETECTORS))
    sys.modules.pop("grid_example", None)
    module = importlib.import_module("grid_example")
    return ModelConfig("grid", module.GridConfig(), augment="none", image_size=64)


def test_the_new_detector_is_registered_and_carries_rego(config, tmp_path):
    scenes = open_data(DATA, "val")
    model = regolite.Rego(regolite.build(config, len(scenes.classes)), stages=2, ffn_dim=32).eval()
    save_model(model, tmp_path / "model.safetensors")
    back = regolite.load(tmp_path / "model.safetensors")
    image = scenes.image(0)
    [ours], [theirs] = (regolite.detect(one, image, threshold=0.0) for one in (model, back))
    assert len(ours) > 0
    torch.testing.assert_close(ours.scores, theirs.scores)
    assert len(regolite.evaluate(model, scenes, progress=False)["stages"]) == 3


def test_the_new_detector_trains(config, tmp_path, monkeypatch):
    monkeypatch.setattr("regolite.plots.run.draw_run", lambda *_: [])
    model = regolite.build(config, len(open_data(DATA, "train").classes))
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    run = regolite.RunConfig(data=DATA, output=str(tmp_path / "run"), epochs=1, batch_size=2, device="cpu", lr=1e-3)
    regolite.train(run, model=model)
    assert any(not torch.equal(value, before[name]) for name, value in model.named_parameters() if "head" in name)
