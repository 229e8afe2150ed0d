"""Predictions are sealed, small runs resume, and the checkers of notebook 17 name what is wrong."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from regolite.course import Mistake, chapter_17, find
from regolite.course.chapter_17 import predict, reveal, settings_of, small_arm, trial
from regolite.errors import UserError
from regolite.paper import runner
from regolite.paper.experiments import Claim, Side

CLAIM = Claim("Tighter glimpses are better.", "a test", Side("tighter"), Side("paper"))
ARMS = {"paper": small_arm("alphas 3, 2, 1"), "tighter": small_arm("alphas 2, 1.5, 1", "alphas=2.0,1.5,1.0")}
REASON = "Glimpses of three boxes are most of a small image."


def judge(number, answer):
    return find(number).checker(answer)


def refused(number, answer, said):
    with pytest.raises(Mistake, match=said):
        judge(number, answer)


def runs(name, aps, finished="2030-01-02", **config):
    about = {"overrides": list(ARMS[name].settings()["overrides"]), "data": chapter_17.SMALL["data"], "test": 100}
    return {
        seed: {"seed": seed, "config": about | config, "stages": [{"AP": ap}], "finished": finished}
        for seed, ap in enumerate(aps)
    }


def results(ours=(9.0, 9.5, 10.1), theirs=(8.0, 8.1, 8.7), **more):
    return {"tighter": runs("tighter", ours, **more), "paper": runs("paper", theirs, **more)}


class TestPredictions:
    def test_can_be_changed_until_the_result_is_read(self, tmp_path):
        file = tmp_path / "mine" / "prediction.json"
        predict(CLAIM, 0.0, 1.0, REASON, file)
        predict(CLAIM, 0.0, 3.0, REASON, file)
        verdict = reveal(CLAIM, results(), file)
        assert verdict.word == "reproduced"
        stored = json.loads(file.read_text())[CLAIM.text]
        assert stored["high"] == 3.0 and stored["result"]["verdict"] == "reproduced"
        assert stored["result"]["seeds"] == [0, 1, 2] and stored["result"]["mean"] == pytest.approx(1.27, abs=0.01)
        with pytest.raises(UserError, match="cannot be changed afterwards"):
            predict(CLAIM, 1.0, 1.5, REASON, file)
        before = file.read_text()
        reveal(CLAIM, results(ours=(1.0, 1.0, 1.0)), file)
        assert file.read_text() == before, "sealed"

    def test_nothing_is_judged_without_one(self, tmp_path):
        with pytest.raises(UserError, match="nothing was predicted"):
            reveal(CLAIM, results(), tmp_path / "p.json")

    def test_claim_must_stay_the_same(self, tmp_path):
        predict(CLAIM, 0.0, 3.0, REASON, tmp_path / "p.json")
        with pytest.raises(UserError, match="not the one that was predicted"):
            reveal(replace(CLAIM, expects="not less"), results(), tmp_path / "p.json")

    def test_needs_common_seeds(self, tmp_path):
        predict(CLAIM, 0.0, 3.0, REASON, tmp_path / "p.json")
        with pytest.raises(UserError, match="no seed in common"):
            reveal(CLAIM, {"tighter": runs("tighter", (9.0,)), "paper": {}}, tmp_path / "p.json")

    @pytest.mark.parametrize(("low", "high", "reason", "said"), [(1, 1, REASON, "low < high"), (0, 1, "so", "reason")])
    def test_must_say_something(self, tmp_path, low, high, reason, said):
        with pytest.raises(UserError, match=said):
            predict(CLAIM, low, high, reason, tmp_path / "p.json")

    def test_reports_a_damaged_file(self, tmp_path):
        (tmp_path / "p.json").write_text('{"a": 1}')
        with pytest.raises(UserError, match="is damaged"):
            predict(CLAIM, 0, 1, REASON, tmp_path / "p.json")

    def test_are_kept_beside_the_readers_code(self, tmp_path, monkeypatch):
        monkeypatch.setenv("REGOLITE_MINE", str(tmp_path / "mine"))
        predict(CLAIM, 0, 1, REASON)
        assert (tmp_path / "mine" / "prediction.json").is_file()
        monkeypatch.setenv("REGOLITE_MINE", str(tmp_path / "mine" / "prediction.json"))
        with pytest.raises(UserError, match="cannot be written"):
            predict(CLAIM, 0, 1, REASON)


@pytest.mark.slow
def test_trials_change_the_model_and_resume(tmp_path):
    def without_attention(model):
        assert torch.initial_seed() == 3
        for stage in model.stages:
            stage.decoder.layers[0].self_attention.out.weight.data.zero_()
        return model

    arm = runner.smaller(small_arm("smoke", data="scenes:8:val=4:size=64", image_size=64))
    found = trial("x", arm, 3, tmp_path, without_attention, test=4)
    assert len(found["stages"]) == 4 and found["config"]["change"] == "without_attention"
    assert trial("x", arm, 3, tmp_path, without_attention, test=4) == found
    with pytest.raises(UserError, match="another configuration"):
        trial("x", arm, 3, tmp_path, without_attention, test=5)


def one_sided(a, b):
    """Settings of the first arm that the second doesn't have, or not so."""
    return {name for name, value in settings_of(a).items() if value != settings_of(b).get(name)}


def differing(a, b):
    return one_sided(a, b) | one_sided(b, a)


def overrides(arm):
    return dict(text.split("=", 1) for text in arm.settings()["overrides"])


def by_text(a, b):
    """Overrides compared as texts, so that one that is taken back counts."""
    texts = set(a.settings()["overrides"]) ^ set(b.settings()["overrides"])
    recipe = {n for n in a.settings() if n != "overrides" and a.settings()[n] != b.settings()[n]}
    return recipe | {text.split("=")[0] for text in texts}


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda a, b: {n for n in a.settings() if a.settings()[n] != b.settings()[n]}, "take the overrides apart"),
        (one_sided, "only one of the arms"),
        (lambda a, b: one_sided(b, a), "which arm comes first"),
        (lambda a, b: {name for name, _ in overrides(a).items() ^ overrides(b).items()}, "ecipes can differ"),
        (lambda a, b: {"about"} if a.about != b.about else set(), "alphas only"),
        (lambda a, b: "alphas", "a set of names"),
        (lambda a, b: set(a.settings()["overrides"]) ^ set(b.settings()["overrides"]), "without their values"),
        (lambda a, b: differing(a, b) | ({"about"} if a.about != b.about else set()), "alphas only"),
        (lambda a, b: sorted(differing(a, b))[:1], "all differences"),
        (lambda a, b: differing(a, b) - {"model"}, "preset is a setting"),
        (by_text, "taken back by a later one"),
    ],
)  # fmt: skip
def test_confounds(answer, said):
    assert judge("17.1", differing)
    refused("17.1", answer, said)


def score(width=1.0, below=1.0, above=1.0, factor=lambda alpha: 2 / alpha, sign=1.0):
    return lambda low, high, result, alpha=0.05: (
        sign * (width * (high - low) + factor(alpha) * (below * max(low - result, 0) + above * max(result - high, 0)))
    )


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (score(width=0.0), "the widest one wins"),
        (score(below=0.0, above=0.0), "the narrowest one wins"),
        (score(factor=lambda alpha: 1.0), "too cheap"),
        (score(factor=lambda alpha: 1 / alpha), "shared by both ends"),
        (score(sign=-1.0), "the lower, the better"),
        (score(below=0.0), "below the interval"),
        (score(above=0.0), "above the interval"),
        (score(factor=lambda alpha: 40.0), "depends on alpha"),
        (lambda low, high, result, alpha: high - low + 2 / alpha * abs(result - (low + high) / 2), "not to the center"),
        (lambda low, high, result, alpha: 7.0, "costs the width alone"),
        (
            lambda low, high, result, alpha: score()(low, high, result, alpha) + 5 * (result > high),
            "is the width, plus",
        ),
    ],
)
def test_interval_score(answer, said):
    assert judge("17.2", score())
    refused("17.2", answer, said)


CONCLUSION = "With three seeds, tighter glimpses are better by 1.3 AP on small scenes; nothing is shown elsewhere."
NO_EFFECT = "With three seeds there is no effect of glimpses: the mean difference is 0.6 AP on small scenes."


def study(tmp_path, **changes):
    prediction = predict(CLAIM, 0.0, 3.0, REASON, tmp_path / "prediction.json")
    whole = {
        "claim": CLAIM,
        "arms": ARMS,
        "prediction": prediction | {"day": "2030-01-01"},
        "results": results(),
        "verdict": "reproduced",
        "conclusion": CONCLUSION,
    }
    return lambda: {name: value for name, value in (whole | changes).items() if value is not None}


TWO = ARMS | {"tighter": small_arm("two changes", "alphas=2.0,1.5,1.0", epochs=9)}
UNSURE = results(ours=(9.0, 7.5, 10.1))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"verdict": None, "arms": None}, "it lacks arms, verdict"),
        ({"claim": "tighter is better"}, "is a Claim"),
        ({"results": {"tighter": runs("tighter", (9, 9, 9))}}, "'paper', which is missing"),
        ({"arms": ARMS | {"tighter": ARMS["paper"]}}, "the two arms are the same"),
        ({"arms": TWO}, "change one thing"),
        ({"results": results((9.0, 9.5), (8.0, 8.1))}, "2 seeds"),
        ({"results": results((9.0, 9.5, 9.6, 9.9))}, "the same seeds"),
        ({"results": results() | {"paper": runs("paper", (8.0, 8.1, 8.7), test=50)}}, "different test scenes"),
        ({"results": results(overrides=["queries=9"])}, "other settings than the arm has: overrides"),
        ({"results": results(epochs=50)}, "other settings than the arm has: epochs"),
        ({"arms": list(ARMS.values())}, "are dictionaries"),
        ({"prediction": (0.0, 3.0)}, "take what predict returned"),
        ({"results": results(finished="2029-12-31")}, "younger than the first result"),
        ({"prediction": {"low": 0}}, "take what predict returned"),
        ({"claim": replace(CLAIM, margin=2.0)}, "another claim"),
        ({"verdict": "undecided"}, "isn't the rule's"),
        ({"results": UNSURE}, "isn't the rule's"),
        ({"results": UNSURE, "verdict": "undecided", "conclusion": NO_EFFECT}, "is not 'no effect'"),
        ({"conclusion": "It is better."}, "too short"),
        ({"conclusion": CONCLUSION.replace(" by 1.3 AP", "")}, "mean difference"),
        ({"conclusion": CONCLUSION.replace("With three seeds, ", "")}, "number of seeds"),
    ],
)  # fmt: skip
def test_study(tmp_path, changes, said):
    assert judge("17.3", study(tmp_path))
    assert judge(
        "17.3", study(tmp_path, arms=TWO, fair="Both take the same CPU time, which is the budget of the question.")
    )
    refused("17.3", study(tmp_path, **changes), said)


def test_study_must_be_a_dictionary():
    refused("17.3", lambda: ["claim"], "this is a list")
