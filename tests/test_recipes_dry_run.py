"""Each training of the paper that differs at laptop size, for two steps: no preset, field or override is misspelt."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from small_runs import train_in_two

from regolite import RunConfig, train
from regolite.models.config import ModelConfig
from regolite.models.presets import configure
from regolite.paper.recipes import RECIPES, recipe
from regolite.training.setup import parse_overrides

TINY = ("backbone=tiny", "weights=none", "frozen_stages=0", "dim=64")
LAYERS = ("heads=4", "queries=9", "detector.decoder_layers=1", "detector.ffn_dim=32")
SMALL = {
    "data": "scenes:4:val=1:size=64", "image_size": 64, "batch_size": 2, "epochs": 1, "drop_epochs": (1,),
    "warmup": 0.0, "evaluate_every": 0, "log_every": 1, "device": "cpu",
}  # fmt: skip


@pytest.fixture(autouse=True)
def without_images(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("regolite.plots.run.draw_run", lambda *args, **kwargs: [])


def laptop(name: str, output: Path, **changes: object) -> RunConfig:
    """A recipe with what makes its model and its run small."""
    one, model = recipe(name), configure(recipe(name).model)
    own = ["dilated=false"] * getattr(model.detector, "dilated", False)  # the small backbone has no DC5
    own += ["detector.encoder_layers=1"] * hasattr(model.detector, "encoder_layers")
    own += ["multi_scale_layers=1,"] * hasattr(model.detector, "multi_scale_layers")
    own += ["rego.ffn_dim=32"] * (model.rego is not None)
    own += LAYERS if hasattr(model.detector, "queries") else ()  # torchvision's detectors have none
    overrides = (*one.overrides, *TINY, *own)
    return one.config(**{**SMALL, "output": str(output), "overrides": overrides, **changes})


def check(folder: Path, name: str) -> None:
    """Two steps were taken with the recipe's learning rate, and every stage was measured."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in steps] == [1, 2]
    assert all(line["loss"] > 0 and line["lr"] == recipe(name).lr for line in steps)
    stages = sum(one.startswith("stages=") and int(one[-1]) for one in recipe(name).overrides)
    stages = (stages or 3) * name.startswith("rego_")
    assert len(lines[-1]["stages"]) == 1 + stages
    assert (folder / "model.safetensors").exists()


def content(name: str) -> tuple[ModelConfig, RunConfig]:
    """What is trained, without the names of recipe and preset: at laptop size R101 is R50, and 36 epochs are 50."""
    config = laptop(name, Path("run"))
    model = configure(config.model, **parse_overrides(config.overrides))
    return replace(model, preset="model"), replace(config, model="model", overrides=())


@pytest.mark.slow
@pytest.mark.parametrize("name", {content(name): name for name in reversed(RECIPES)}.values())
def test_two_steps(name: str, tmp_path: Path):
    check(train(laptop(name, tmp_path / "run")), name)


@pytest.mark.slow
def test_two_steps_of_two_processes(tmp_path: Path):
    """The released form: DDP checks that every parameter gets a gradient, also without losses of the first layers."""
    name = "rego_deformable_detr_two_stage_r50_50ep_released"
    folder = train_in_two(laptop(name, tmp_path / "run"))
    check(folder, name)
    assert "2 processes on cpu" in (folder / "train.log").read_text()
