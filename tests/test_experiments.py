"""The experiments: that arms can be compared, that runs are resumable and repeatable, and that verdicts follow."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import psutil
import pytest
import torch
from accelerate.utils import set_seed
from forked import REGOLITE, Forked
from scipy.stats import ttest_1samp, ttest_ind, ttest_rel

from regolite import RunConfig, UserError
from regolite.cli import main
from regolite.data import open_data
from regolite.models.presets import build, configure
from regolite.paper import cost, queue, report, runner, statistics
from regolite.paper.experiments import ARMS, EXPERIMENTS, PROTOCOL, Claim, Side, experiment
from regolite.paper.statistics import Estimate, judge
from regolite.training.metrics import MEASURED
from regolite.training.setup import parse_overrides

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "experiments" / "results"
ONE = {"lr": 1e-3, "epochs": 1, "drop_epochs": (1,), "evaluate_every": 1, "data": "scenes:8:val=4:size=64"}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arms that train for two steps on small images, in this process."""
    for name in ("base", "rego"):
        arm = replace(ARMS[name], recipe={**ONE, "image_size": 64})
        monkeypatch.setitem(ARMS, name, arm)
    monkeypatch.setattr("regolite.plots.run.draw_run", lambda *_: [])


def model_of(arm: str) -> torch.nn.Module:
    config = RunConfig.of({**ARMS[arm].settings(), "output": "x"})
    return build(configure(config.model, **parse_overrides(config.overrides)), num_classes=14)


# ------------------------------------------------------------------------------------------------------ the table


@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_is_a_configuration(arm: str) -> None:
    config = RunConfig.of({**ARMS[arm].settings(), "output": "x"})
    settings = configure(config.model, **parse_overrides(config.overrides))
    assert settings.detector.dim == 64
    assert config.drop_epochs[0] * 5 // 4 == config.epochs, "a fifth of the training comes after the drop"


def test_arms_share_the_protocol_but_for_what_they_are_named_for() -> None:
    for name, arm in ARMS.items():
        changed = {field for field, value in PROTOCOL.items() if arm.settings()[field] != value} - {"evaluate_every"}
        assert changed <= ({"lr"} if "_lr_" in name or "star" in name else {"epochs", "drop_epochs"}), name
        assert not changed or "_lr_" in name or "star" in name or "drop" in name or name == "base_longer", name
    assert ARMS["star"].recipe == ARMS["rego_star"].recipe


def test_claims_compare_arms_of_their_experiment() -> None:
    for name, one in EXPERIMENTS.items():
        assert len(set(one.arms)) == len(one.arms)
        for claim in one.claims:
            assert {claim.ours.arm, claim.theirs.arm} <= set(one.arms), name
    assert set(ARMS) == {arm for one in EXPERIMENTS.values() for arm in one.arms}, "no arm without an experiment"


def test_with_the_same_seed_rego_begins_with_the_same_base_detector() -> None:
    states = []
    for arm in ("base", "rego"):
        set_seed(3)
        model = model_of(arm)
        states.append((model if arm == "base" else model.detector).state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_an_unknown_experiment_is_named_with_the_nearest() -> None:
    with pytest.raises(UserError, match="unknown experiment 'stage'; did you mean 'stages'"):
        experiment("stage")


# ------------------------------------------------------------------------------------------------------- one run


def test_a_run_can_be_repeated_and_is_not_repeated_without_need(
    tmp_path: Path, tiny: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = runner.run("rego", ARMS["rego"], 1, tmp_path / "a", test=6)
    again = runner.run("rego", ARMS["rego"], 1, tmp_path / "b", test=6)
    for name in ("config", "curve", "stages", "objects", "relations"):
        assert first[name] == again[name], name
    assert len(first["stages"]) == 4 and first["curve"][-1]["epoch"] == 1

    monkeypatch.setattr(runner, "train", lambda config: pytest.fail("trained again"))
    assert runner.run("rego", ARMS["rego"], 1, tmp_path / "a", test=6) == first


def test_another_configuration_in_the_same_folder_is_refused(tmp_path: Path, tiny: None) -> None:
    runner.run("base", ARMS["base"], 0, tmp_path, test=4)
    other = replace(ARMS["base"], recipe={**ARMS["base"].recipe, "lr": 0.5})
    with pytest.raises(UserError, match="holds a run of another configuration .*lr=0.001, now 0.5.*move it away"):
        runner.run("base", other, 0, tmp_path, test=4)
    (tmp_path / "base" / "0" / "result.json").unlink()
    with pytest.raises(UserError, match="holds a run of another configuration"):
        runner.run("base", other, 0, tmp_path, test=4)


def test_figures_of_a_stage() -> None:
    """Objects as detections: those shifted by a tenth of their width have an IoU of 9/11."""
    scenes = open_data("scenes:6:size=96:context=1", "test")
    truth = scenes.coco
    results = []
    for number, one in enumerate(truth.loadAnns(truth.getAnnIds())):
        x, y, width, height = one["bbox"]
        shift = 0.1 * width if number % 2 else 0.0
        box = [x + shift, y, width, height]
        results.append({"image_id": one["image_id"], "category_id": one["category_id"], "bbox": box, "score": 0.9})
    count = len(results)
    figures = runner.stage_figures(truth, results)
    assert figures["by_iou"] == [0, 0, 0, count // 2, count - count // 2]
    balls = {category for category, one in truth.cats.items() if one["name"].startswith("ball of")}
    figures = runner.stage_figures(truth, [one for one in results if one["category_id"] in balls])
    assert figures["others"] == 0.0 and figures["balls"] > 50
    assert runner.stage_figures(truth, [])["AP"] == 0.0


def test_merging_keeps_what_is_there_and_refuses_a_mixture(tmp_path: Path) -> None:
    file = tmp_path / "base.json"
    runner.merge("base", "about", [{"seed": 2, "config": {"lr": 1}, "x": 1}], file)
    found = runner.merge("base", "about", [{"seed": 0, "config": {"lr": 1}, "x": 2}], file)
    assert (
        [one["seed"] for one in found["runs"]]
        == [0, 2]
        == [one["seed"] for one in json.loads(file.read_text())["runs"]]
    )
    with pytest.raises(UserError, match=r"base\.json holds a run of another configuration \(lr=1, now 2\)"):
        runner.merge("base", "about", [{"seed": 1, "config": {"lr": 2}}], file)
    assert len(json.loads(file.read_text())["runs"]) == 2


# ------------------------------------------------------------------------------------------------------ the queue


def test_the_plan_takes_each_arm_once_and_seeds_in_turn() -> None:
    pairs = queue.plan(["convergence", "inference"])
    assert len(set(pairs)) == len(pairs)
    assert [seed for _, seed in pairs] == sorted(seed for _, seed in pairs)
    assert ("rego", 4) in pairs and ("base_longer", 3) not in pairs
    assert {seed for _, seed in queue.plan(["query"], [7, 7])} == {7}
    assert {arm for arm, _ in queue.plan(["all"])} == set(ARMS)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="links to folders need rights there")
def test_the_chapter_runs_an_experiment_again(tmp_path: Path) -> None:
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "data").symlink_to(ROOT / "data")
    chapter, done = ROOT / "notebooks" / "14_paper_in_miniature.ipynb", tmp_path / "14.ipynb"
    words = [sys.executable, "-m", "papermill", str(chapter), str(done), "--cwd", str(tmp_path / "notebooks")]
    words += ["-p", "results", str(RESULTS), "-p", "rerun", "inference", "--no-progress-bar"]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": path, "JUPYTER_PREFER_ENV_PATH": "1"}
    finished = subprocess.run(words, env=env, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-2000:]
    [cell] = [cell for cell in nbformat.read(done, as_version=4).cells if "if rerun:" in cell.source]
    said = "".join(output.text for output in cell.outputs if output.output_type == "stream")
    assert "REGO at inference adds to that" in said and "undecided with 1 seed" in said
    again = statistics.read_results(tmp_path / "runs" / "experiments_small" / "results")
    assert set(again) == {"base", "rego"} and set(again["rego"]) == {0}


def test_a_run_that_fails_is_named_and_the_others_are_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = {"base": None, "rego": {"seed": 0, "config": {}, "stages": [{"AP": 1.0}]}}

    def start(arm: str, seed: int, folder: Path, small: bool) -> subprocess.Popen[bytes]:
        place = folder / arm / str(seed)
        place.mkdir(parents=True)
        (place / queue.STDERR_FILE).write_text("a warning\nno more space\n")
        if results[arm]:
            (place / "result.json").write_text(json.dumps(results[arm]))
        return subprocess.Popen([sys.executable, "-c", f"raise SystemExit({int(results[arm] is None)})"])

    monkeypatch.setattr(queue, "_start", start)
    with pytest.raises(UserError, match="1 of 2 runs failed, the others are done: base, seed 0: no more space"):
        queue.conduct(["inference"], [0], tmp_path / "runs", tmp_path / "results", jobs=2)
    assert set(statistics.read_results(tmp_path / "results")) == {"rego"}


def small_experiment(place: Path) -> list[str]:
    words = ["experiment", "encoder", "--small", "--seeds", "0", "--jobs", "2"]
    return [*words, "--output", str(place / "runs"), "--results", str(place / "results")]


def left_by(place: Path) -> dict[str, Any]:
    """Results, metrics and weights of an experiment, without what depends on the clock."""
    left: dict[str, Any] = {}
    for file in sorted(place.rglob("*")):
        name = file.relative_to(place).as_posix()
        if file.suffix == ".safetensors":
            left[name] = hashlib.sha256(file.read_bytes()).hexdigest()
        elif file.name == "metrics.jsonl":
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            left[name] = [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]
        elif file.parent.name == "results" or file.name == "result.json":
            found = json.loads(file.read_text())
            for one in found.get("runs", [found]):
                del one["seconds"], one["finished"]
            left[name] = json.dumps(found)
    return left


def do_small_experiment(place: Path) -> None:
    """Do or resume it in this process, whose runs are forked; :func:`queue.spawn` is for the one that is stopped."""

    def start(arm: str, seed: int, folder: Path, small: bool) -> Forked:
        code = "import sys; from regolite.paper import queue; queue._main(*sys.argv[1:])"
        return Forked(code, arm, str(seed), str(folder), str(int(small)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(queue, "_start", start)
        assert main(small_experiment(place)) == 0


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("uninterrupted")
    with open(place / "said.txt", "w") as file, contextlib.redirect_stdout(file):
        do_small_experiment(place)
    return place


@pytest.mark.slow
def test_small_runs_leave_results_and_a_second_call_does_nothing(
    uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = (uninterrupted / "said.txt").read_text()
    assert "rego, seed 0: AP by stage" in said and "which has no interval" in said
    results = statistics.read_results(uninterrupted / "results")
    assert set(results) == {"rego", "rego_encoder"} and set(results["rego"]) == {0}
    monkeypatch.setattr(queue, "_start", lambda *_: pytest.fail("started again"))
    assert main(small_experiment(uninterrupted)) == 0


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM to send")
@pytest.mark.parametrize(
    ("by", "file"),  # when the file is there: in training, or in measuring at its end
    [
        ("SIGTERM", "metrics.jsonl"),
        ("SIGKILL", "metrics.jsonl"),
        ("SIGTERM", "model.safetensors"),
        ("SIGKILL to all", "model.safetensors"),
    ],
)
def test_a_stopped_queue_stops_its_runs_and_they_go_on_to_the_same_bytes(
    tmp_path: Path, by: str, file: str, uninterrupted: Path
) -> None:
    (tmp_path / "results").mkdir()
    shutil.copy(uninterrupted / "results" / "rego_encoder.json", tmp_path / "results")  # done, so only rego is left
    process = Forked(REGOLITE, *small_experiment(tmp_path))
    place = tmp_path / "runs" / "rego" / "0"
    wait_for(lambda: (place / file).exists())  # so there is something to save
    time.sleep(random.uniform(0, 0.5))  # other moments every time
    runs = psutil.Process(process.pid).children()
    process.send_signal(getattr(signal, by.partition(" ")[0]))
    for run_of_it in runs if by == "SIGKILL to all" else []:
        run_of_it.kill()
    assert process.wait(60) != 0, "it was too late"
    wait_for(lambda: not any(is_alive(run) for run in runs))
    if by != "SIGKILL to all":
        assert any((place / "checkpoints").iterdir())
    do_small_experiment(tmp_path)
    wanted = {name: left for name, left in left_by(uninterrupted).items() if not name.startswith("runs/rego_encoder")}
    assert left_by(tmp_path) == wanted and len(wanted) >= 5


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # it has just ended
        return False


def wait_for(what: Any) -> None:
    for _ in range(1800):
        if what():
            return
        time.sleep(0.1)
    pytest.fail("waited for three minutes")


# ----------------------------------------------------------------------------------------------------- statistics


def results_of(**arms: list[float]) -> dict[str, dict[int, dict[str, Any]]]:
    return {arm: {seed: {"stages": [{"AP": ap}]} for seed, ap in enumerate(aps)} for arm, aps in arms.items()}


def claim(expects: str = "more", margin: float = 1.0) -> Claim:
    return Claim("It helps.", "Table 0", Side("rego"), Side("base"), None, expects, margin)


def test_the_interval_is_that_of_a_paired_t_test() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(20, 5, 6), rng.normal(15, 5, 6)
    found = judge(claim(), results_of(rego=ours.tolist(), base=theirs.tolist())).difference
    low, high = ttest_rel(ours, theirs).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((low, high))


@pytest.mark.parametrize(
    ("expects", "differences", "word"),
    [
        ("more", [5.0, 6.0, 7.0], "reproduced"),
        ("more", [-5.0, -6.0, -7.0], "not reproduced"),
        ("more", [-1.0, 0.5, 3.0], "undecided"),
        ("same", [0.1, -0.1, 0.0], "reproduced"),
        ("same", [5.0, 6.0, 7.0], "not reproduced"),
        ("same", [-5.0, -6.0, -7.0], "not reproduced"),
        ("same", [0.9, 1.0, 1.1], "not reproduced"),  # a difference, and not shown to be within the margin
        ("same", [0.5, 0.55, 0.6], "reproduced"),  # a difference, but within the margin
        ("same", [-2.0, 0.1, 2.0], "undecided"),
        ("not less", [5.0, 6.0, 7.0], "reproduced"),
        ("not less", [-0.1, 0.0, 0.1], "reproduced"),
        ("not less", [-5.0, -6.0, -7.0], "not reproduced"),
        ("not less", [-3.0, 0.0, 3.0], "undecided"),
    ],
)
def test_verdicts(expects: str, differences: list[float], word: str) -> None:
    rego = [20 + d for d in differences]
    assert judge(claim(expects), results_of(rego=rego, base=[20.0] * 3)).word == word


def test_where_the_paper_finds_no_effect_a_large_one_is_not_reproduced() -> None:
    """A claim of indifference must fail in both directions, however small the paper's difference is."""
    indifferent = [c for one in EXPERIMENTS.values() for c in one.claims if c.paper is not None and "hardly" in c.text]
    assert len(indifferent) == 3 and all(c.expects == "same" and abs(c.paper) < c.margin for c in indifferent)
    judged = statistics.judge_all(statistics.read_results(RESULTS))
    assert [verdict.word for verdict in judged["scale"]] == ["not reproduced"] * 2
    [fourth] = [verdict for verdict in judged["stages"] if verdict.claim.ours.arm == "rego_4_stages"]
    assert fourth.word == "not reproduced" and fourth.difference.low < -fourth.claim.margin < fourth.difference.high < 0


def test_the_interval_is_compared_with_the_papers_difference() -> None:
    published = Claim("It helps.", "Table 0", Side("rego"), Side("base"), 2.0)
    for ours, covers in (([1.0, 2.0, 3.0], True), ([5.0, 5.1, 5.2], False), ([2.0], None)):
        verdict = judge(published, results_of(rego=ours, base=[0.0] * len(ours)))
        assert verdict.covers_paper is covers
        assert ("side the interval)" in report.said(verdict)) is (covers is not None)
    assert judge(claim(), results_of(rego=[1.0, 2.0], base=[0.0, 0.0])).covers_paper is None
    assert judge(published, {}).covers_paper is None


def test_how_many_seeds_an_undecided_claim_would_take() -> None:
    differences = [-1.0, 0.5, 3.0]
    verdict = judge(claim(), results_of(rego=[20 + d for d in differences], base=[20.0] * 3))
    mean, spread = np.mean(differences), np.std(differences, ddof=1)

    def decided(count: int) -> bool:
        """With so many values of just this mean and spread."""
        values = np.resize([1.0, -1.0], count - count % 2).tolist() + [0.0] * (count % 2)
        values = mean + spread * np.array(values) / np.std(values, ddof=1)
        return Estimate.of(values.tolist()).low > 0

    assert decided(verdict.seeds_needed) and not decided(verdict.seeds_needed - 1)
    assert judge(claim(), results_of(rego=[21.0, 19.0], base=[20.0] * 2)).seeds_needed is None
    assert "more than 100 seeds" in report.said(judge(claim(), results_of(rego=[21.0, 19.0], base=[20.0] * 2)))


def test_p_is_twice_that_of_one_sided_t_tests() -> None:
    differences = [0.9, -0.2, 0.4, 0.7]
    found, above = Estimate.of(differences), ttest_1samp(differences, 0, alternative="greater").pvalue
    assert found.p(0.0, math.inf) == pytest.approx(2 * above)
    least = ttest_1samp(differences, -2, alternative="greater").pvalue
    most = ttest_1samp(differences, 2, alternative="less").pvalue
    assert found.p(-2.0, 2.0) == pytest.approx(2 * max(least, most))
    assert (found.p(0.0, math.inf) < 0.05) == (found.low > 0)
    assert Estimate.of([1.0]).p(0.0, math.inf) == 1.0
    assert Estimate.of([1.0, 1.0]).p(0.0, math.inf) == 0.0 and Estimate.of([1.0, 1.0]).p(1.0, math.inf) == 1.0


def test_arms_without_common_seeds_are_compared_by_welch() -> None:
    ours, theirs = [20.0, 24.0, 23.0], [15.0, 15.5, 14.8, 15.2]
    results = results_of(rego=ours)
    results["base"] = {10 + seed: {"stages": [{"AP": ap}]} for seed, ap in enumerate(theirs)}
    verdict, wanted = judge(claim(), results), ttest_ind(ours, theirs, equal_var=False)
    interval = wanted.confidence_interval(0.95)
    assert (verdict.difference.low, verdict.difference.high) == pytest.approx((interval.low, interval.high))
    assert verdict.difference.freedom == pytest.approx(wanted.df) and verdict.p == pytest.approx(wanted.pvalue)
    assert "by Welch's interval" in report.said(verdict)


def test_holm_by_hand_and_its_error_rate() -> None:
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    rng = np.random.default_rng(0)
    families = rng.uniform(size=(2000, 10))  # claims without any effect
    wrong = np.mean([min(statistics.holm(ps)) < 0.05 for ps in families.tolist()])
    assert wrong == pytest.approx(0.05, abs=0.015) and np.mean(families.min(1) < 0.05) > 0.3


def test_a_family_of_claims_is_adjusted_together() -> None:
    results = results_of(rego=[22.0, 23.5, 22.4], base=[20.0] * 3, other=[20.0, 20.9, 19.2])
    noise = [Claim(str(n), "", Side("other"), Side("base")) for n in range(20)]
    alone, among = judge(claim(), results), statistics.judge_family([claim(), *noise], results)[0]
    assert alone.word == "reproduced" and alone.adjusted == alone.p
    assert among.word == "undecided" and among.adjusted == pytest.approx(21 * among.p) and among.seeds_needed > 3
    without_runs = [replace(one, ours=Side("missing")) for one in noise]
    unfinished = statistics.judge_family([claim(), *without_runs], results)[0]
    assert unfinished.adjusted == pytest.approx(21 * unfinished.p), "a study that is not finished is judged as strictly"


def test_a_rival_that_has_not_learned_tests_nothing() -> None:
    verdict = judge(claim(), results_of(rego=[25.0, 26.0, 27.0], base=[0.3, 0.4, 0.5]))
    assert verdict.word == "undecided" and "has AP 0.4 and has not learned" in report.said(verdict)


def resampled_results(rng: np.random.Generator, seeds: int, images: int) -> dict[str, Any]:
    """Two arms without a difference, whose seeds and images both vary; the same samples of images for all runs."""
    samples = rng.integers(images, size=(100, images))
    results: dict[str, Any] = {"rego": {}, "base": {}}
    by_image = {arm: rng.normal(20, 8, images) for arm in results}  # an image is easier for one arm than for the other
    for arm, runs in results.items():
        for seed in range(seeds):
            values = by_image[arm] + rng.normal(0, 1) + rng.normal(0, 4, images)
            drawn = {"images": images, "AP": [values[samples].mean(1).tolist()]}
            runs[seed] = {"stages": [{"AP": values.mean()}], "resampled": drawn}
    return results


def test_intervals_over_seeds_and_images_keep_their_promise() -> None:
    """Those over seeds alone are too narrow for other images, and so are percentiles when seeds are resampled too."""
    rng, covered = np.random.default_rng(0), []
    for _ in range(300):
        results = resampled_results(rng, seeds=3, images=60)
        both = judge(claim(), results).difference
        ours, theirs = ([run["stages"][0]["AP"] for run in results[arm].values()] for arm in ("rego", "base"))
        alone = Estimate.of(np.subtract(ours, theirs).tolist())
        rows = [
            np.subtract(results["rego"][seed]["resampled"]["AP"][0], results["base"][seed]["resampled"]["AP"][0])
            for seed in range(3)
        ]
        seeds = rng.integers(3, size=(100, 3))
        hierarchical = np.quantile(np.array(rows).T[np.arange(100)[:, None], seeds].mean(1), (0.025, 0.975))
        intervals = ((both.low, both.high), (alone.low, alone.high), hierarchical)
        covered.append([low < 0 < high for low, high in intervals])
    both, alone, hierarchical = np.mean(covered, axis=0)
    assert both >= 0.93 and alone < 0.9 and hierarchical < 0.93


def test_only_seeds_that_both_sides_have_are_compared() -> None:
    results = results_of(rego=[5.0, 6.0, 7.0, 100.0], base=[0.0, 0.0, 0.0])
    assert judge(claim(), results).seeds == (0, 1, 2)
    single = judge(claim(), results_of(rego=[9.0], base=[0.0]))
    assert single.word == "undecided" and math.isinf(single.difference.low) and single.seeds_needed is None
    assert judge(claim(), {}).difference is None


def test_damaged_and_missing_results_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no results; `python -m regolite experiment all`"):
        statistics.read_results(tmp_path)
    (tmp_path / "base.json").write_text("{")
    with pytest.raises(UserError, match=r"base\.json holds no results .*take it from the repository"):
        statistics.read_results(tmp_path)


# ----------------------------------------------------------------------------------------------------------- cost


def test_costs_are_counted_and_measured() -> None:
    found = cost.costs(["base", "rego", "base_8_layers"], rounds=1)
    assert found["base"]["relative"] == 1.0
    assert found["base"]["parameters"] == sum(p.numel() for p in model_of("base").parameters())
    assert found["rego"]["macs"] > found["base"]["macs"] and found["base_8_layers"]["macs"] > found["base"]["macs"]
    assert all(one["step"] > 0 for one in found.values())


# -------------------------------------------------------------------------------------------- what is in the folder


@pytest.mark.parametrize("arm", ARMS)
def test_committed_results_are_those_of_the_table(arm: str) -> None:
    runs = statistics.read_results(RESULTS, [arm])[arm]
    assert set(runs) >= set(ARMS[arm].seeds)
    config = RunConfig.of({**ARMS[arm].settings(), "output": "x"})
    wanted = {**runner.described(config), "test": 500}
    for seed, one in runs.items():
        newer = {"max_cpu_minutes": None, "copy_paste": 0.0, "repeat_rare": 0.0, "patience": 0, "optimizer": "adamw"}
        config = {**newer, **one["config"]}  # fields that were added after these results
        assert config == wanted, f"{arm}, seed {seed}: another configuration"
        assert one["versions"] and one["seconds"]["training"] > 0


def test_the_page_of_measurements_says_what_the_results_say() -> None:
    text = (
        (ROOT / "book" / "docs" / "measurements.md")
        .read_text(encoding="utf-8")
        .split("## Does REGO help?")[1]
        .split("\n## ")[0]
    )
    results = statistics.read_results(RESULTS)
    verdicts = [verdict for several in statistics.judge_all(results).values() for verdict in several]
    words = [verdict.word for verdict in verdicts]
    counts = [words.count(word) for word in ("reproduced", "not reproduced", "undecided")]
    chapter = nbformat.read(ROOT / "notebooks" / "14_paper_in_miniature.ipynb", as_version=4)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for place in (text, readme):
        assert "{} are reproduced, {} are not, {} are undecided".format(*counts) in " ".join(place.split())
    prose = " ".join(cell.source for cell in chapter.cells if cell.cell_type == "markdown")
    assert "{} are reproduced in direction, {} are not, {} are undecided".format(*counts) in prose
    shown = "".join(
        output.text
        for cell in chapter.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if output.output_type == "stream"
    )
    assert "{} reproduced, {} not reproduced, {} undecided of {} claims".format(*counts, len(words)) in shown
    for verdict in verdicts:
        assert report.said(verdict) in shown, f"chapter 14 stores another verdict on {verdict.claim.text!r}"
    runs = sum(len(by_seed) for by_seed in results.values())
    hours = statistics.minutes(results, list(ARMS)) / 60
    assert f"{runs} runs, {hours:.1f} hours of one core" in " ".join(text.split())

    known = set()
    for verdict in verdicts:
        found = verdict.difference
        for one in (found, Estimate((), -found.mean, found.error, found.freedom)):
            known.add((f"{one}, {len(verdict.seeds)} seeds", verdict.word))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) > 5
    assert {(ours, word) for _, ours, _, word in rows[2:]} <= known


def test_the_command_lists_experiments_and_refuses_unknown_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["experiment", "--results", str(RESULTS)]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in EXPERIMENTS) and "hours of one core in all" in said
    assert main(["experiment", "stagse"]) == 2
    assert "did you mean 'stages'" in capsys.readouterr().err
