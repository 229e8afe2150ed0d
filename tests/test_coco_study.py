"""The study on full COCO, planned: chances that hold in simulation, an order that counts shared runs once, verdicts."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from small_runs import train_in_two
from test_recipes_dry_run import laptop

from regolite import UserError
from regolite.cli import main
from regolite.paper import coco_study
from regolite.paper.coco_study import CLAIMS, chance, command, order
from regolite.paper.recipes import RECIPES
from regolite.paper.statistics import Estimate

ROOT = Path(__file__).parents[1]
BASE, REGO = "deformable_detr_r50_50ep", "rego_deformable_detr_r50_50ep"


@pytest.fixture(scope="module")
def hours() -> dict[str, float]:
    """Made-up GPU hours, since counting takes half a minute."""
    return {side.arm: 100.0 for claim in CLAIMS for side in (claim.ours, claim.theirs)}


def test_claims_compare_recipes() -> None:
    for claim in CLAIMS:
        assert {claim.ours.arm, claim.theirs.arm} <= set(RECIPES)
    published = {claim.text: claim.paper for claim in CLAIMS}
    assert published["REGO ends higher after the same epochs."] == pytest.approx(
        RECIPES[REGO].published_ap - RECIPES[BASE].published_ap
    )


@pytest.mark.parametrize("claim", [CLAIMS[n] for n in (0, 3, 5, 7, 10)], ids=lambda claim: claim.text)
@pytest.mark.parametrize("seeds", [2, 5])
def test_the_chance_is_that_of_simulated_studies(claim: coco_study.Claim, seeds: int) -> None:
    rng = np.random.default_rng(0)
    runs = rng.normal(0, coco_study.NOISE, (2, 1500, seeds))
    least = 0.0 if claim.expects == "more" else -claim.margin
    most = claim.margin if claim.expects == "same" else np.inf
    found = [Estimate.of(d) for d in ((claim.paper or 0.0) + runs[0] - runs[1]).tolist()]
    decided = np.mean([least < one.low and one.high < most for one in found])
    exact = claim.expects != "same"  # for two tests it is a lower bound
    assert decided - chance(claim, seeds) < (0.04 if exact else 0.3) and decided > chance(claim, seeds) - 0.04
    assert chance(claim, 1) == 0.0


def test_the_order_decides_most_per_hour_and_counts_shared_runs_once(
    hours: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coco_study, "hours", lambda name, tflops: hours[name])
    steps = order()
    assert {name for name, _ in steps[0].runs} == {BASE, REGO}, "three claims need no more than these two"
    assert len({seed for _, seed in steps[0].runs}) >= 2, "one seed has no interval"
    runs = [run for step in steps for run in step.runs]
    assert len(set(runs)) == len(runs) and max(seed for _, seed in runs) < coco_study.MOST_SEEDS
    assert [step.total for step in steps] == pytest.approx(np.cumsum([step.hours for step in steps]).tolist())
    worth = [(b.decided - a.decided) / b.hours for a, b in zip(steps, steps[1:])]
    assert steps[0].decided / steps[0].hours > max(worth) and all(value > 0 for value in worth)
    monkeypatch.setattr(coco_study, "hours", lambda name, tflops: 1e4 if name == REGO else hours[name])
    assert REGO not in {name for name, _ in order()[0].runs}, "expensive runs come later"


def test_a_run_that_fails_ends_the_study_and_what_is_done_is_left_out(
    tmp_path: Path, hours: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coco_study, "hours", lambda name, tflops: hours[name])
    monkeypatch.setattr(coco_study, "order", lambda tflops: order()[:1])
    called = []
    monkeypatch.setattr(coco_study.subprocess, "call", lambda words: called.append(words[3:]) or len(called) > 1)
    done = tmp_path / BASE / "0"
    done.mkdir(parents=True)
    (done / "model.safetensors").touch()
    with pytest.raises(UserError, match="failed or was stopped: give the command again"):
        coco_study.conduct("COCO", str(tmp_path), 4)
    assert called[0] == command(REGO, 0, "COCO", str(tmp_path), 4) and len(called) == 2


@pytest.mark.slow
def test_two_processes_at_laptop_size_and_the_verdicts_of_their_metrics(
    tmp_path: Path, hours: dict[str, float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(coco_study, "hours", lambda name, tflops: hours[name])
    for name in (BASE, REGO):
        (tmp_path / name).mkdir()
        train_in_two(laptop(name, tmp_path / name / "0"))
    assert main(["coco-study", "--print", "--output", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "undecided with 1 seed, which has no interval" in said and "no runs yet" in said
    assert f"{REGO}, seeds 0 1" in said and "train --recipe RECIPE --data COCO" in said
    for name, ap in ((BASE, 43.8), (REGO, 45.9)):  # as if they had reached the paper's AP, with three seeds
        lines = [json.loads(line) for line in (tmp_path / name / "0" / "metrics.jsonl").read_text().splitlines()]
        for seed, noise in enumerate((0.1, -0.1, 0.05 * (name == REGO))):
            place = tmp_path / name / str(seed)
            if seed:
                shutil.copytree(tmp_path / name / "0", place)
            for stage in lines[-1]["stages"]:
                stage["AP"] = ap + noise
            (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    first = coco_study.verdicts(tmp_path)[0]
    assert first.word == "reproduced" and first.difference.mean == pytest.approx(2.1, abs=0.05)
    (tmp_path / BASE / "2" / "model.safetensors").unlink()
    assert coco_study.verdicts(tmp_path)[0].seeds == (0, 1), "a run that is not finished does not count"


def test_make_prints_it() -> None:
    assert "coco-study" in (ROOT / "Makefile").read_text("utf-8")
    done = subprocess.run(
        [sys.executable, "tasks.py", "coco-study", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and "GPU hour" in done.stdout
