"""The study of newer detectors: pairs that differ in REGO alone, an RT-DETR with our backbone, a table that adds up."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from regolite import RunConfig, UserError
from regolite.cli import main
from regolite.models.backbone import Backbone
from regolite.models.detector import Detector
from regolite.paper import newer_study, queue, runner
from regolite.paper.newer_study import ARMS, EVERYDAY, PAIRS, SEEDS, detector, plan, report, rt_detr
from regolite.types import ImageBatch

ROOT = Path(__file__).parents[1]
TINY = ROOT / "data" / "coco_tiny"


@pytest.mark.parametrize("name", [name for name, pair in PAIRS.items() if pair.preset])
def test_arms_of_a_pair_differ_in_rego_alone(name: str) -> None:
    alone, rego = (detector(arm, 6).model_config for arm in (name, f"rego_{name}"))
    assert alone.rego is None and rego.rego == EVERYDAY.rego
    assert replace(rego, rego=None, preset=name) == alone
    assert alone.detector.weights == "bundled_coco" and alone.loss.stage_matching == "base"


def test_dino_differs_from_two_stage_in_its_training() -> None:
    one, other = (detector(name, 6).model_config.detector for name in ("two_stage", "dino"))
    assert replace(one, denoising=True, mixed_queries=True, look_forward_twice=True) == other


class TestRtDetr:
    pytest.importorskip("transformers")

    def test_the_backbone_is_ours_and_takes_pixels_that_are_not_normalized(self) -> None:
        theirs = rt_detr(3).eval()
        ours = Backbone("mobilenet_v2", (3, 4, 5), "bundled_coco").eval()
        normalized = torch.randn(2, 3, 64, 96)
        batch = ImageBatch(normalized, torch.zeros(2, 64, 96, dtype=torch.bool), torch.tensor([[64, 96]] * 2))
        seen: list[torch.Tensor] = []
        theirs.model.model.backbone.model.register_forward_hook(lambda module, args, out: seen.extend(out.feature_maps))
        with torch.no_grad():
            theirs(batch)
            for one, other in zip(seen, ours(batch), strict=True):
                torch.testing.assert_close(one, other.tensor, rtol=1e-4, atol=1e-4)

    def test_rego_reads_its_pyramid(self) -> None:
        model = detector("rego_rt_detr", 20)
        assert model.num_stages == 3 and model.base_detector.feature_channels == [128] * 3
        assert model.model_config.loss.stage_matching == "base"
        groups = {model.parameter_group(name) for name, _ in model.named_parameters()}
        assert groups == {"backbone", "sampling", "rest"}


def test_the_plan_goes_seed_by_seed() -> None:
    assert plan() == [(arm, seed) for seed in SEEDS for arm in ARMS]
    assert plan(["dino"], [4, 4]) == [("dino", 4)]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--arms", "rego_dinos"], "no arm 'rego_dinos'; did you mean 'rego_dino'"),
        (["--data", f"card={TINY}"], "no data set 'card'; did you mean 'cards'"),
        (["--data", "cards=nowhere"], "data folder nowhere does not exist"),
        (["--data", "cards"], "--data cards: write NAME=DIR"),
    ],
)
def test_wrong_input_is_one_clear_error(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "spawn", lambda *_: pytest.fail("started"))
    assert main(["experiment", "newer", *words, "--results", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert said in captured.err and captured.err.count("\n") == 1


def test_a_run_trains_its_arm_and_says_what_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[RunConfig, Detector]] = []

    def train(config: RunConfig, model: Detector) -> None:
        given.append((config, model))
        stages = [{"stage": i, **dict.fromkeys(runner.FIGURES, 10.0 + i)} for i in range(4)]
        line = {"kind": "evaluation", "split": "val", "step": 5, "seconds": 900.0, "cpu_seconds": 480.5}
        place = Path(config.output)
        place.mkdir(parents=True)
        (place / "config.json").write_text(json.dumps({"run": config.to_dict()}))
        (place / "metrics.jsonl").write_text(json.dumps({**line, "stages": stages}) + "\n")

    monkeypatch.setattr(runner, "train", train)
    found = newer_study.run("rego_dino", 1, tmp_path, TINY)
    [(config, model)] = given
    assert (config.max_cpu_minutes, config.seed, config.resume) == (8.0, 1, True)
    assert model.model_config.detector.denoising and model.num_stages == 3
    assert model.num_logits == 80, "a class for each of the data"
    assert [stage["AP"] for stage in found["stages"]] == [10, 11, 12, 13] and found["steps"] == 5
    assert found["config"]["data"] == "cards" and str(ROOT) not in json.dumps(found)
    assert newer_study.run("rego_dino", 1, tmp_path, TINY) == found and len(given) == 1
    (tmp_path / "dino").mkdir()
    (tmp_path / "rego_dino" / "1").rename(tmp_path / "dino" / "1")
    with pytest.raises(UserError, match="holds a run of another configuration"):
        newer_study.run("dino", 1, tmp_path, TINY)


def test_the_table_compares_runs_of_one_seed(tmp_path: Path) -> None:
    def write(arm: str, **aps: list[float]) -> None:
        runs: list[dict[str, Any]] = [
            {"seed": int(seed[1:]), "steps": 100 * len(values), "stages": [{"AP": ap} for ap in values]}
            for seed, values in aps.items()
        ]
        (tmp_path / f"{arm}.json").write_text(json.dumps({"arm": arm, "runs": runs}))

    assert report(tmp_path).count("not run") == len(PAIRS)
    write("dino", s0=[30.0], s1=[32.0], s2=[50.0])
    write("rego_dino", s0=[31.0, 33.0, 35.0, 36.0], s1=[20.0, 25.0, 28.0, 30.0])
    rows = [line.split()[-8:] for line in report(tmp_path).splitlines()]
    assert rows[2][1:] == ["0", "30.0", "31.0", "36.0", "+6.0", "100", "/", "400"][1:]
    assert rows[3][2:5] == ["20.0", "30.0", "-2.0"]
    assert rows[4] == ["mean", "+2.0"], "the seed that only one of them has is left out"
    assert sum("not" in row for row in rows) == len(PAIRS) - 1
