"""The recipe study: arms that differ in one thing, runs that are never repeated, and a rule that keeps its promise."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from regolite import RunConfig, UserError
from regolite.cli import main
from regolite.models.backbone import BUNDLED
from regolite.models.presets import configure
from regolite.paper import queue, recipe_study, runner
from regolite.paper.recipe_study import ARMS, BASELINE, DATA, FALSE_ALARMS, SEEDS, judge, plan
from regolite.training.setup import parse_overrides

ROOT = Path(__file__).parents[1]
TINY = ROOT / "data" / "coco_tiny"


def config_of(arm: str) -> RunConfig:
    return RunConfig.of(ARMS[arm].settings())


# ------------------------------------------------------------------------------------------------------- the table


@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_is_the_baseline_with_one_change(arm: str) -> None:
    ours, base = (asdict(config_of(one)) for one in (arm, BASELINE))
    ours_set, base_set = (parse_overrides(one.pop("overrides")) for one in (ours, base))
    changed = [name for name in ours if ours[name] != base[name]]
    changed += [name for name in ours_set if ours_set[name] != base_set.get(name)]
    # Tokens and denoising need two stages, and two stages refine: without them, four fields change at once.
    assert len(changed) == (4 if arm == "plain" else arm != BASELINE)


def test_every_change_reaches_the_training() -> None:
    """Not two arms train the same model in the same way, whatever the defaults of the preset are."""
    seen = []
    for arm in ARMS:
        config = config_of(arm)
        model = configure(config.model, **parse_overrides(config.overrides))
        seen.append((model.detector, model.rego, model.loss, {**config.to_dict(), "model": "", "overrides": ()}))
    assert all(seen.count(one) == 1 for one in seen)


def test_runs_are_ended_by_cpu_time_alone() -> None:
    for arm in ARMS:
        config = config_of(arm)
        assert (config.max_cpu_minutes, config.max_minutes, config.workers) == (8.0, None, 0)
        assert config.epochs == 10_000 and config.device == "cpu"


def test_the_plan_goes_seed_by_seed_in_the_order_of_the_table() -> None:
    pairs = plan()
    assert len(pairs) == len(set(pairs)) == len(ARMS) * len(DATA) * len(SEEDS)
    assert [seed for _, seed in pairs] == sorted(seed for _, seed in pairs)
    assert pairs[:3] == [("cards/baseline", 0), ("everyday/baseline", 0), (f"cards/{list(ARMS)[1]}", 0)]
    assert plan(["ema", BASELINE], ["everyday"], [3]) == [("everyday/baseline", 3), ("everyday/ema", 3)]


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match="no arm 'size_32'; did you mean 'size_320'"):
        plan(["size_32"])
    with pytest.raises(UserError, match="no data set 'card'; did you mean 'cards'"):
        plan(data=["card"])


# -------------------------------------------------------------------------------------------------------- the runs


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """The trainings, which leave nothing but metrics."""
    configs: list[RunConfig] = []

    def train(config: RunConfig) -> None:
        configs.append(config)
        stages = [{"stage": i, **dict.fromkeys(runner.FIGURES, 10.0 + i)} for i in range(4)]
        line = {"kind": "evaluation", "split": "val", "step": 5, "seconds": 900.0, "cpu_seconds": 720.5}
        place = Path(config.output)
        place.mkdir(parents=True, exist_ok=True)
        (place / "config.json").write_text(json.dumps({"run": config.to_dict()}))
        (place / "metrics.jsonl").write_text(json.dumps({**line, "stages": stages}) + "\n")

    monkeypatch.setattr(runner, "train", train)
    return configs


def test_a_run_says_what_it_was_without_paths_of_the_machine(tmp_path: Path, trained: list[RunConfig]) -> None:
    weights = tmp_path / "body.safetensors"
    weights.write_bytes(b"weights")
    found = recipe_study.run("everyday/size_320", 1, tmp_path / "runs", TINY, str(weights))
    assert trained[0].data == f"{TINY}:every=10" and trained[0].overrides == (f"weights={weights}",)
    assert [stage["AP"] for stage in found["stages"]] == [10, 11, 12, 13]
    assert (found["seed"], found["steps"], found["cpu_seconds"]) == (1, 5, 720.5)
    assert found["seconds"] == {"training": 900.0} and found["code"]
    assert found["images"] == 2 * 13 + 8, "a tenth of 126 images, two steps an epoch"
    assert found["config"]["data"] == "everyday:every=10"
    assert found["config"]["overrides"] == ["weights=body.safetensors"]
    assert set(found["config"]["sha256"]) == {"train", "val", "weights"}
    assert str(ROOT) not in json.dumps(found) and str(tmp_path) not in json.dumps(found)


def test_a_finished_run_is_not_trained_again_and_another_one_is_refused(
    tmp_path: Path, trained: list[RunConfig]
) -> None:
    first = recipe_study.run("cards/ema", 0, tmp_path, TINY)
    assert recipe_study.run("cards/ema", 0, tmp_path, TINY) == first and len(trained) == 1
    with pytest.raises(UserError, match="holds a run of another configuration .*overrides"):
        recipe_study.run("cards/ema", 0, tmp_path, TINY, str(BUNDLED["bundled"]))
    (tmp_path / "cards" / "ema" / "0" / "result.json").unlink()
    recipe_study.run("cards/ema", 0, tmp_path, TINY)
    assert [config.resume for config in trained] == [True, True], "a killed run goes on where it was"


def test_a_queue_does_what_is_missing(
    tmp_path: Path, trained: list[RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []

    def spawn(place: Path, module: str, *words: str) -> subprocess.Popen[bytes]:
        assert module == "regolite.paper.recipe_study"
        started.append(words[:2])
        recipe_study._main(*words)
        return subprocess.Popen([sys.executable, "-c", ""])

    monkeypatch.setattr(queue, "spawn", spawn)
    data, places = {"cards": str(TINY), "everyday": str(TINY)}, (tmp_path / "runs", tmp_path / "results")
    recipe_study.conduct({"cards": str(TINY)}, recipe_study.WEIGHTS, [BASELINE], None, *places)
    recipe_study.conduct(data, recipe_study.WEIGHTS, [BASELINE, "ema"], None, *places)
    names = ["cards/baseline"] * 2 + ["everyday/baseline", "cards/ema", "everyday/ema"] * 2
    assert [name for name, _ in started] == names
    assert [seed for _, seed in started] == ["0", "1", *"000111"]
    recipe_study.conduct({}, recipe_study.WEIGHTS, [BASELINE, "ema"], None, *places)
    assert len(started) == 8, "what is done needs neither data nor time"
    found = recipe_study.read(tmp_path / "results")
    assert {name: {arm: set(one) for arm, one in on_data.items()} for name, on_data in found.items()} == {
        name: {BASELINE: {0, 1}, "ema": {0, 1}} for name in DATA
    }


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "72 runs of the recipe study are missing and need its data sets, folders in COCO format: give --data"),
        (["--data", "cards=nowhere"], "data folder nowhere does not exist"),
        (["--data", "cards"], "--data cards: write NAME=DIR"),
        (["--data", f"card={TINY}"], "no data set 'card'; did you mean 'cards'?"),
        (["--data", f"cards={TINY}", "--weights", "nowhere"], "no backbone weights at nowhere; give --weights"),
        (["--arms", "emma"], "no arm 'emma'; did you mean 'ema'?"),
    ],
)
def test_wrong_input_is_one_clear_error(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "spawn", lambda *_: pytest.fail("started"))
    assert main(["experiment", "recipe", *words, "--results", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert said in captured.err and captured.err.count("\n") == 1 and captured.out == ""


def test_options_of_the_study_are_refused_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["experiment", "stages", "--arms", "ema"]) == 2
    assert "options of the studies newer, real, recipe and relations" in capsys.readouterr().err


@pytest.mark.slow
def test_small_runs_train_and_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["experiment", "recipe", "--small", "--data", f"everyday={TINY}", "--arms", BASELINE, "--seeds", "0"]
    words += ["--output", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "everyday/baseline, seed 0: AP by stage" in said and "1 runs, by version of the code" in said
    [one] = recipe_study.read(tmp_path / "results" / "recipe")["everyday"][BASELINE].values()
    assert len(one["stages"]) == 4 and one["steps"] >= 1 and one["cpu_seconds"] > 0.6
    monkeypatch.setattr(queue, "spawn", lambda *_: pytest.fail("started again"))
    assert main(words) == 0


# ---------------------------------------------------------------------------------------------------- the verdicts


def results_of(**arms: list[list[float]]) -> dict[str, dict[str, dict[int, dict[str, Any]]]]:
    """Results from AP by arm, data set and seed."""
    return {
        name: {
            arm: {seed: {"stages": [{"AP": 0.0}, {"AP": ap}], "code": "abc"} for seed, ap in enumerate(aps[place])}
            for arm, aps in arms.items()
            if aps[place]
        }
        for place, name in enumerate(DATA)
    }


BASE = [[20.0, 21.0], [5.0, 5.2]]  # spreads of 1.0 and 0.2: 0.6 in the mean


@pytest.mark.parametrize(
    ("ours", "word"),
    [
        ([[21.0, 22.0], [5.3, 5.5]], "helps"),
        ([[20.8, 21.8], [5.3, 5.5]], "no clear effect"),  # a mean of 0.55
        ([[23.0, 24.0], [4.9, 5.5]], "no clear effect"),  # worse with one seed
        ([[23.0, 24.0], [4.0, 4.2]], "no clear effect"),  # worse on one data set
        ([[23.0, 24.0], [5.0, 5.5]], "no clear effect"),  # no better with one seed
        ([[19.0, 20.0], [4.7, 4.9]], "hurts"),
        ([[19.0, 20.0], [5.3, 4.2]], "no clear effect"),
        ([[25.0, 26.0], [9.0]], "too few runs"),
        ([[25.0, 26.0], []], "too few runs"),
        ([[], []], "too few runs"),
    ],
)
def test_verdicts(ours: list[list[float]], word: str) -> None:
    assert judge("ema", results_of(baseline=BASE, ema=ours)) == word


def test_no_verdict_without_the_baseline() -> None:
    assert judge("ema", results_of(ema=BASE)) == "too few runs"
    assert judge("ema", results_of(ema=BASE, baseline=[[1.0], [1.0]])) == "too few runs"
    assert judge("ema", {}) == "too few runs"


def test_one_data_set_alone_can_be_judged() -> None:
    results = results_of(baseline=BASE, ema=[[23.0, 24.0], []])
    assert judge("ema", {"cards": results["cards"]}) == "helps"


@pytest.mark.parametrize(("effect", "said"), [(0.0, FALSE_ALARMS), (1.0, 0.27)])
def test_how_often_the_rule_speaks(effect: float, said: float) -> None:
    """Noise of standard deviation 1 in every run: false alarms without an effect, and what is found of a small one."""
    rng, count = np.random.default_rng(0), 4000
    words = []
    for _ in range(count):
        base, ours = rng.normal(size=(2, 2, 2))
        words.append(judge("ema", results_of(baseline=base.tolist(), ema=(ours + effect).tolist())))
    wanted = [word for word in words if word == "helps" or (word == "hurts" and effect == 0)]
    assert len(wanted) / count == pytest.approx(said, abs=0.02)


def test_the_report_shows_runs_differences_and_doubt() -> None:
    results = results_of(baseline=BASE, ema=[[22.0, 24.0], [6.0, 6.0]], crop=[[19.0], []])
    text = recipe_study.report(results)
    row = {line.split()[0]: line.split() for line in text.splitlines() if line.split()[:1]}
    assert row["baseline"][1:5] == ["20.0", "21.0", "5.0", "5.2"]
    assert row["ema"][1:8] == ["22.0", "24.0", "+2.5", "6.0", "6.0", "+0.9", "helps"]
    assert row["crop"][1:9] == ["19.0", "-", "-1.0", "-", "-", "too", "few", "runs"]
    assert set(ARMS) <= set(row)
    flat = " ".join(text.split())
    assert "cards 1.0, everyday 0.2; mean 0.6" in flat and "Two seeds are weak evidence" in flat
    assert "9 runs, by version of the code: abc (9)" in flat
