"""The study on real images: fair arms, an order in which any prefix is useful, and figures that are what they say."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from regolite import RunConfig, UserError
from regolite.cli import main
from regolite.data import open_data
from regolite.evaluation.coco import average_precision
from regolite.evaluation.object_size import ap_by_relative_size
from regolite.models.presets import configure
from regolite.paper import queue, real_study
from regolite.paper.real_study import ARMS, BLOCKS, CLAIMS, SETTINGS, TUNING_SEED, convergence, crossing, plan, tuned
from regolite.paper.statistics import Estimate
from regolite.training.setup import parse_overrides

ROOT = Path(__file__).parents[1]
TINY = ROOT / "data" / "coco_tiny"
RESULTS = ROOT / "experiments" / "results" / "real"
PAIRS = sorted({(setting, arm) for setting, arms, _ in BLOCKS for arm in arms})


def config_of(setting: str, arm: str) -> RunConfig:
    return RunConfig.of(real_study.settings(setting, arm, 1e-3))


# -------------------------------------------------------------------------------------------------------- the table


@pytest.mark.parametrize(("setting", "arm"), PAIRS)
def test_an_arm_is_a_configuration(setting: str, arm: str) -> None:
    config = config_of(setting, arm)
    model = configure(config.model, **parse_overrides(config.overrides))
    assert (model.rego is not None) == ARMS[arm].rego
    assert config.schedule == "constant" or config.drop_epochs[0] == pytest.approx(0.8 * config.epochs, abs=0.5)
    if arm == "rego":
        assert (model.rego.ratios, model.loss.stage_matching) == ((3.0, 2.0, 1.0), "own")


@pytest.mark.parametrize("setting", SETTINGS)
def test_arms_differ_in_nothing_but_what_they_are_named_for(setting: str) -> None:
    base = asdict(config_of(setting, "base"))
    for arm in {arm for where, arm in PAIRS if where == setting and ARMS[arm].base == "base"}:
        ours = asdict(config_of(setting, arm))
        changed = {name for name in ours if ours[name] != base[name]} - {"model", "overrides"}
        assert changed == ({"epochs", "drop_epochs"} if arm == "base_longer" else set()) | (
            {"lr"} if ARMS[arm].lr and ARMS[arm].lr != base["lr"] else set()
        )


def test_what_decides_most_comes_first() -> None:
    pairs = plan()
    assert len(set(pairs)) == len(pairs) and {name for name, _ in pairs} == {"/".join(pair) for pair in PAIRS}
    for source in ("cards", "everyday"):
        ours = [(name.split("/")[1], seed) for name, seed in pairs if name.startswith(f"{source}/")]
        assert all(seed == TUNING_SEED for _, seed in ours[:3]), "the base detector is tuned before anything else"
        assert ours[3:7] == [("base", 0), ("rego", 0), ("base", 1), ("rego", 1)], "pairs are complete seed by seed"
        star = ours.index(("star", 0))
        assert {arm for arm, seed in ours[:star] if seed == TUNING_SEED} >= {"tune_star_0.0001", "tune_star_0.0003"}


def test_named_runs_bring_the_tuning_that_they_need() -> None:
    tuning = {f"cards/tune_base_{rate:g}" for rate in real_study.RATES["base"]}
    assert {name for name, _ in plan(["converged_cards"])} == tuning | {"converged_cards/base", "converged_cards/rego"}
    assert [seed for name, seed in plan(["cards/rego"], [7]) if name == "cards/rego"] == [7]
    assert not any("tune" in name for name, _ in plan(["objects_10"]))
    with pytest.raises(UserError, match="has no 'cards/reg'; did you mean 'cards/rego'"):
        plan(["cards/reg"])


def test_claims_compare_arms_that_both_data_sets_have() -> None:
    for source in ("cards", "everyday"):
        there = {arm for setting, arm in PAIRS if setting == source}
        assert {side.arm for claim in CLAIMS for side in (claim.ours, claim.theirs)} <= there


# -------------------------------------------------------------------------------------------------------- the runs


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Five images with all three splits."""
    place = tmp_path / "data"
    (place / "images").mkdir(parents=True)
    (place / "annotations").mkdir()
    whole = json.loads((TINY / "annotations" / "instances_val.json").read_text("utf-8"))
    images = whole["images"][:5]
    ids = {image["id"] for image in images}
    for image in images:
        shutil.copy(TINY / "images" / image["file_name"], place / "images")
    part = {**whole, "images": images, "annotations": [a for a in whole["annotations"] if a["image_id"] in ids]}
    for split in ("train", "val", "test"):
        (place / "annotations" / f"instances_{split}.json").write_text(json.dumps(part), "utf-8")
    return place


def test_the_queue_tunes_then_trains_and_a_second_call_does_nothing(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[tuple[str, ...]] = []

    def spawn(place: Path, module: str, *words: str) -> subprocess.Popen[bytes]:
        assert module == "regolite.paper.real_study"
        started.append((words[0], words[1], words[4]))
        real_study._main(*words)
        return subprocess.Popen([sys.executable, "-c", ""])

    monkeypatch.setattr(queue, "spawn", spawn)
    monkeypatch.setattr("regolite.plots.run.draw_run", lambda *_: [])
    rates = {"base": (1e-3, 5e-4)}
    monkeypatch.setattr(real_study, "RATES", rates)
    monkeypatch.setattr(
        real_study, "BLOCKS", (("cards", ("tune_base_0.001", "tune_base_0.0005"), (100,)), ("cards", ("rego",), (0,)))
    )
    words = ["experiment", "real", "--data", f"cards={photographs}", "--small"]
    words += ["--output", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    assert main(words) == 0
    assert [one[:2] for one in started] == [
        ("cards/tune_base_0.001", "100"), ("cards/tune_base_0.0005", "100"), ("cards/rego", "0")
    ]  # fmt: skip
    results = tmp_path / "results" / "real"
    assert float(started[-1][2]) == tuned("cards", "base", results)
    found = real_study.read(results)["cards"]
    assert found["tune_base_0.001"][100]["config"]["measured"] == "even val", "tuning never sees a test image"
    one = found["rego"][0]
    assert one["config"]["measured"] == "test" and one["config"]["data"] == "cards"
    assert len(one["stages"]) == 4 == len(one["resampled"]["AP"]) and len(one["resampled"]["AP"][0]) == 5
    assert one["cpu_seconds"] > 0 and one["code"] and str(tmp_path) not in json.dumps(one)
    assert set(one["config"]["sha256"]) == {"train", "val", "test"}
    assert main(words) == 0 and len(started) == 3
    assert main(["experiment", "real", *words[-4:]]) == 0 and len(started) == 3, "without data or arms, only the tables"
    assert "REGO ends higher after the same epochs." in capsys.readouterr().out


def test_data_are_checked_before_anything_runs(photographs: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no data set 'card'"):
        real_study.conduct({"card": str(photographs)}, folder=tmp_path, results=tmp_path)
    (photographs / "annotations" / "instances_test.json").unlink()
    with pytest.raises(UserError, match="test"):
        real_study.conduct({"cards": str(photographs)}, folder=tmp_path, results=tmp_path)


def test_even_and_odd_images_share_nothing() -> None:
    even, odd = (real_study._images(str(TINY), part, None).image_ids for part in ("even val", "odd val"))
    assert not set(even) & set(odd) and len(even) + len(odd) == len(open_data(TINY, "val"))


def test_committed_results_come_from_code_that_held_the_rule() -> None:
    """Rule, margins and predictions were committed before the runs, and are still the same."""
    if not RESULTS.is_dir():
        pytest.skip("no run is stored yet")
    for runs in (one for by_arm in real_study.read(RESULTS).values() for one in by_arm.values()):
        for code in {one["code"] for one in runs.values()}:
            changed = [
                "git",
                "diff",
                "--quiet",
                code.removesuffix("-dirty"),
                "HEAD",
                "--",
                "experiments/real_images.md",
            ]
            assert subprocess.run(changed, cwd=ROOT).returncode in (0, 128), f"{code} had another rule"


# ------------------------------------------------------------------------------------------------------ the figures


def test_relative_size_does_not_depend_on_the_pixels() -> None:
    """Perfect detections of all objects but the smallest: every other bin has AP 100."""
    truth = open_data(TINY, "val").coco
    areas = {i: image["width"] * image["height"] for i, image in truth.imgs.items()}
    share = {i: np.sqrt(a["bbox"][2] * a["bbox"][3] / areas[a["image_id"]]) for i, a in truth.anns.items()}
    perfect = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 0.9}
        for i, a in truth.anns.items()
        if share[i] >= 0.1 and not a["iscrowd"]
    ]
    small, *others = ap_by_relative_size(truth, perfect)
    assert small == 0.0 and others == pytest.approx([100.0] * 3)
    assert ap_by_relative_size(truth, perfect, (0.0, 1.0)) == [pytest.approx(average_precision(truth, perfect)["AP"])]
    assert ap_by_relative_size(truth, [], (0.0, 1.0)) == [0.0]
    assert ap_by_relative_size(truth, perfect, (0.0, 1e-6)) == [None]


def curve(*aps: float, seconds: float = 60.0) -> dict[str, Any]:
    points = [{"epoch": n, "cpu_seconds": seconds * n, "AP": [0.0, ap]} for n, ap in enumerate(aps, 1)]
    return {"curve": points}


def test_convergence_of_planted_curves() -> None:
    base = [curve(5, 10, 15, 20, 25, 30, 30, 30, 30 + d, 30) for d in (0.0, 0.2, 0.1)]
    rego = [curve(10, 20, 30, 35, 38, 38, 38, 38, 38 + d, 38, seconds=90) for d in (0.0, 0.2, -0.1)]
    found = convergence({"base": dict(enumerate(base)), "rego": dict(enumerate(rego))})
    assert found.converged and found.answer == "both"
    assert found.epochs["rego"].mean == pytest.approx(3.0, abs=0.02)
    assert found.epochs["base"].mean == pytest.approx(6.0, abs=3.0)
    assert found.minutes["rego"].mean == pytest.approx(4.5, abs=0.03)
    assert found.lead.mean == pytest.approx(8.0, abs=0.1)
    assert convergence({"base": {0: base[0]}, "rego": {1: rego[0]}}) is None


def test_a_curve_that_rises_is_not_converged() -> None:
    rising = {n: curve(*(3.0 * k for k in range(10))) for n in range(3)}
    found = convergence({"base": rising, "rego": rising})
    assert not found.converged and found.answer.startswith("not converged")
    slower = {n: curve(*(2.0 * k for k in range(10))) for n in range(3)}
    assert convergence({"base": rising, "rego": slower}).epochs["rego"] is None, "never reached"
    assert "not with every seed" in real_study._convergence_table("", convergence({"base": rising, "rego": slower}))


def test_the_sign_changes_between_sizes() -> None:
    assert crossing({5: Estimate.of([4.0]), 10: None, 20: Estimate.of([2.0]), 40: Estimate.of([-2.0])}) == 30.0
    assert crossing({5: Estimate.of([4.0]), 40: Estimate.of([2.0])}) is None


@pytest.mark.parametrize(("name", "wanted"), [("objects_05", 0.05), ("objects_10", 0.1), ("objects_40", 0.4)])
def test_objects_have_the_size_that_a_setting_is_named_for(name: str, wanted: float) -> None:
    scenes = open_data(SETTINGS[name].data, "train", limit=60)
    boxes = np.concatenate([scenes.objects(i).boxes for i in range(60)])
    assert np.median(np.sqrt(boxes[:, 2] * boxes[:, 3]) / 256) == pytest.approx(wanted, rel=0.1)


def test_verdicts_of_made_up_runs(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)

    def run(ap: float) -> dict[str, Any]:
        drawn = {"images": 67, "AP": (ap + rng.normal(0, 1, (4, 50))).tolist()}
        stages = [{"AP": ap + rng.normal(0, 0.2), "by_size": [None, ap, ap, ap]} for _ in range(4)]
        return {"stages": stages, "resampled": drawn, "seconds": {"training": 60.0}, "code": "abc"}

    means = {"base": 40.0, "rego": 60.0, "rego_alpha_1": 62.0, "star": 0.5, "rego_star": 30.0}
    found = {"cards": {arm: {seed: run(ap) for seed in range(3)} for arm, ap in means.items()}}
    first, *_, last = real_study.verdicts(found)["cards"]
    assert first.word == "reproduced" and first.note == "over seeds and images"
    assert last.claim.ours.arm == "rego_star" and last.word == "undecided" and "not tested" in last.note
    said = real_study.report(found, tmp_path)
    assert "REGO helps DETR*." in said and "(not tested)" in said and "cards, objects of 10 to 20 %" in said
    assert f"{len(plan())} are missing" in said
