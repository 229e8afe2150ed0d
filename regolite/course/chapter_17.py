"""Notebook 17, a question of your own: small runs, predictions that are written down before, and the checkers.

A study has a :class:`~regolite.paper.experiments.Claim`, two arms, and a prediction. :func:`predict` saves the
prediction in ``mine/prediction.json``; :func:`reveal` judges the claim and seals it.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed

import regolite
from regolite.course import Mistake, exercise
from regolite.course.progress import folder
from regolite.data.scenes import CLASSES
from regolite.errors import UserError
from regolite.models.detector import Detector
from regolite.paper import runner
from regolite.paper.experiments import Arm, Claim
from regolite.paper.statistics import Estimate, Results, Verdict, judge
from regolite.training import RunConfig
from regolite.training.setup import parse_overrides
from regolite.utils.files import write_atomic

TEST = 100
"""Number of test scenes of a small run."""

SMALL: dict[str, Any] = {
    "data": "scenes:192:val=8:size=96:max_objects=4:context=0",
    "epochs": 5,
    "drop_epochs": (4,),
    "log_every": 48,
}
"""Changes to :data:`regolite.paper.experiments.PROTOCOL`: a run takes about a minute of one core."""


MODEL = "rego_deformable_detr_tiny"
"""Preset of small arms: on a base detector without refinement, the stages gain something in so short a run."""


def small_arm(about: str, *overrides: str, model: str = MODEL, **recipe: Any) -> Arm:
    """An arm that trains in about a minute of one core.

    Args:
        about: description in one line.
        overrides: changes of the preset, such as ``"alphas=2.0,1.5,1.0"``.
        model: name of the preset.
        recipe: changes of the protocol, such as ``lr=5e-4``.
    """
    return Arm(about, model, overrides, {**SMALL, **recipe})


def trial(
    name: str,
    arm: Arm,
    seed: int,
    runs: str | Path,
    change: Callable[[Detector], Detector] | None = None,
    test: int = TEST,
) -> dict[str, Any]:
    """Train and evaluate an arm with one seed, or read its result.

    Args:
        name: name of the arm.
        arm: the arm.
        seed: seed of the initial weights, the image order and the augmentation.
        runs: folder of the runs.
        change: changes the model before it is trained, for what no override can change.
        test: number of test scenes.

    Returns:
        The result, as :func:`regolite.paper.runner.run` gives it; with ``change`` without a curve.

    Raises:
        UserError: if the folder holds a run of another configuration.
    """
    if change is None:
        return runner.run(name, arm, seed, runs, test)
    place = Path(runs) / name / str(seed)
    config = RunConfig.of({**arm.settings(), "seed": seed, "output": str(place)})
    about = {**runner.described(config), "test": test, "change": change.__name__}
    result = place / "result.json"
    if result.exists():
        found = json.loads(result.read_text(encoding="utf-8"))
        if found["config"] != about:
            raise UserError(f"{result} is of another configuration: move it away, or give another folder")
        return found
    set_seed(seed)
    start = time.monotonic()
    model = change(regolite.build(config.model, len(CLASSES), **parse_overrides(config.overrides)))
    regolite.train(replace(config, overrides=()), model=model)
    trained = time.monotonic()
    found = {
        "seed": seed,
        "config": about,
        **runner.measure_on_test(model, config.data, test),
        "seconds": {"training": trained - start, "measuring": time.monotonic() - trained},
        "finished": time.strftime("%Y-%m-%d"),
    }
    write_atomic(result, json.dumps(found).encode())
    return found


# ---------------------------------------------------------------------------------------------------- predictions


def predict(
    claim: Claim, low: float | int, high: float | int, reason: str, file: str | Path | None = None
) -> dict[str, Any]:
    """Write down what you expect, before you look at any result.

    Args:
        claim: the claim; its text names the prediction.
        low: with ``high``, an interval in AP that you believe to hold the difference, 19 times in 20.
        high: its upper end.
        reason: why.
        file: where predictions are kept; ``mine/prediction.json`` by default.

    Returns:
        The prediction as it is stored.

    Raises:
        UserError: if the result was already read, the interval is empty, or there is no reason.
    """
    file = Path(file) if file is not None else folder() / "prediction.json"
    stored = _read(file)
    before = stored.get(claim.text)
    if before is not None and before["result"] is not None:
        raise UserError(
            f"the result was read on {before['result']['day']}: a prediction cannot be changed afterwards. State a new "
            "claim, and collect new seeds for it"
        )
    if not low < high:
        raise UserError(f"from {low} to {high} is no interval: give low < high")
    if len(reason.strip()) < 20:
        raise UserError("give a reason in a sentence: it is what you learn from when you are wrong")
    new = {
        "claim": asdict(claim), "low": low, "high": high, "reason": reason, "day": time.strftime("%Y-%m-%d"),
        "result": None,
    }  # fmt: skip
    _write(file, {**stored, claim.text: new})
    return new


def reveal(claim: Claim, results: Results, file: str | Path | None = None) -> Verdict:
    """Judge a claim by its runs, and seal the prediction about it.

    Args:
        claim: the claim, as it was predicted.
        results: results by arm and seed.
        file: where predictions are kept; ``mine/prediction.json`` by default.

    Raises:
        UserError: if nothing was predicted, the claim differs from the predicted one, or the arms share no seed.
    """
    file = Path(file) if file is not None else folder() / "prediction.json"
    stored = _read(file)
    if claim.text not in stored:
        raise UserError(f"nothing was predicted about {claim.text!r}: call predict first, before you look")
    prediction = stored[claim.text]
    if prediction["claim"] != json.loads(json.dumps(asdict(claim))):
        raise UserError("this claim is not the one that was predicted: sides, rule or margin have changed since")
    verdict = judge(claim, results)
    if verdict.difference is None:
        raise UserError("the two arms have no seed in common: run both with the same seeds")
    if prediction["result"] is None:
        found = verdict.difference
        ends = [round(end, 2) if found.bounded else None for end in (found.low, found.high)]
        prediction["result"] = {
            "day": time.strftime("%Y-%m-%d"), "seeds": list(verdict.seeds), "mean": round(found.mean, 2),
            "low": ends[0], "high": ends[1], "verdict": verdict.word,
        }  # fmt: skip
        _write(file, stored)
    return verdict


def _read(file: Path) -> dict[str, Any]:
    """All stored predictions, by the text of their claims."""
    if not file.is_file():
        return {}
    try:
        stored = json.loads(file.read_text("utf-8"))
        for each in stored.values():
            each["result"], each["claim"]  # what is read below
        return dict(stored)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{file} is damaged ({error}): restore it, or begin a new one") from None


def _write(file: Path, stored: Mapping[str, Any]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, (json.dumps(stored, indent=1) + "\n").encode())
    except OSError as error:
        raise UserError(f"{file} cannot be written ({error}): give another file") from None


def settings_of(arm: Arm) -> dict[str, Any]:
    """All settings of an arm by name, its overrides among them; a later override of a name counts."""
    settings = arm.settings()
    overrides = settings.pop("overrides")
    return settings | dict(text.split("=", 1) for text in overrides)


# ------------------------------------------------------------------------------------------------------- checkers


@exercise(
    "17.1",
    "`arm.settings()` has the recipe by name, and among it `overrides`, a tuple of texts like 'queries=20'.",
    "Take the overrides apart, dict(text.split('=', 1) for text in ...), and put them beside the other settings.",
    "names = a.keys() | b.keys(); those differ where a.get(name) != b.get(name), which also finds one-sided settings.",
)
def confounds(answer: Callable[[Arm, Arm], Any]) -> str:
    """The settings in which two arms differ."""
    plain = small_arm("plain")
    tight = small_arm("tighter", "alphas=2.0,1.5,1.0")
    cases = (
        ("alphas only in one arm", plain, tight, "an override that only one of the arms has is a difference, too"),
        ("the other way round", tight, plain, "it must not matter which arm comes first"),
        ("the same arm twice, with other descriptions", plain, replace(plain, about="the same"),
         "descriptions are no settings"),
        ("learning rate", small_arm("a", lr=5e-4), plain, "recipes can differ, not only overrides"),
        ("model", plain, small_arm("b", model="rego_deformable_detr_refined_tiny"), "the preset is a setting"),
        ("overrides in another order", small_arm("a", "stages=2", "levels=3"), small_arm("b", "levels=3", "stages=2"),
         "the order of overrides doesn't matter"),
        ("an override of an override", small_arm("a", "queries=30"), plain,
         "the last override of a name counts; compare names, not places"),
        ("an override repeated", small_arm("a", "queries=20"), plain,
         "an override that repeats the value before it changes nothing"),
        ("an override taken back by a later one", small_arm("a", "queries=30", "queries=20"), plain,
         "the last override of a name counts"),
        ("two things at once", small_arm("a", "alphas=1.0,1.0,1.0", epochs=9), plain, "report all differences"),
    )  # fmt: skip
    for what, a, b, why in cases:
        found = answer(a, b)
        if isinstance(found, str) or not isinstance(found, (set, frozenset, list, tuple)):
            raise Mistake(f"return a set of names, not {type(found).__name__}.")
        names = {str(name) for name in found}
        ours, theirs = settings_of(a), settings_of(b)
        wanted = {name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)}
        if "overrides" in names:
            raise Mistake("take the overrides apart: 'alphas' is the name of a setting, 'overrides' is not.")
        if any("=" in name for name in names):
            raise Mistake("return names, without their values.")
        if names != wanted:
            raise Mistake(f"wrong for two arms that differ like this: {what}. {why[0].upper()}{why[1:]}.")
    return "An arm that differs in one setting tells you about that setting. With two, it tells you about neither."


@exercise(
    "17.2",
    "A wide interval is a vague prediction: its width is part of the score, whether it holds the result or not.",
    "A result outside costs 2 / alpha times its distance from the nearer end: 40 times, for 95 %.",
    "score = (high - low) + 2 / alpha * (max(low - result, 0) + max(result - high, 0))",
)
def interval_score(answer: Callable[..., float]) -> str:
    """The interval score of a prediction (Gneiting and Raftery 2007)."""
    cases = (
        (0.0, 3.0, 2.0, 0.05),
        (0.0, 3.0, 3.5, 0.05),
        (-1.0, 1.0, -1.25, 0.05),
        (0.0, 3.0, 3.5, 0.5),
        (1.0, 2.0, 2.0, 0.1),
    )
    found = [float(answer(*case)) for case in cases]

    def scores(of: Callable[[float, float, float, float, float], float]) -> list[float]:
        """A formula in low, high, result, alpha, and the distance outside, for all cases."""
        return [of(*case, max(case[0] - case[2], 0.0) + max(case[2] - case[1], 0.0)) for case in cases]

    for wrong, problem in (
        (scores(lambda low, high, r, a, out: 2 / a * out),
         "an interval that holds the result costs its width: otherwise the widest one wins."),
        (scores(lambda low, high, r, a, out: high - low),
         "a result outside of the interval costs nothing here: then the narrowest one wins."),
        (scores(lambda low, high, r, a, out: high - low + out),
         "being wrong is too cheap: the distance is multiplied by 2 / alpha."),
        (scores(lambda low, high, r, a, out: high - low + out / a),
         "the factor is 2 / alpha: alpha is shared by both ends."),
        (scores(lambda low, high, r, a, out: low - high - 2 / a * out),
         "a penalty is positive here: the lower, the better."),
        (scores(lambda low, high, r, a, out: high - low + 2 / a * max(r - high, 0.0)),
         "a result below the interval costs as much as one above it."),
        (scores(lambda low, high, r, a, out: high - low + 2 / a * max(low - r, 0.0)),
         "a result above the interval costs as much as one below it."),
        (scores(lambda low, high, r, a, out: high - low + 2 / a * abs(r - (low + high) / 2)),
         "the distance is to the nearer end, not to the center."),
        (scores(lambda low, high, r, a, out: high - low + 40 * out), "the factor depends on alpha."),
    ):  # fmt: skip
        if all(abs(ours - theirs) < 1e-9 for ours, theirs in zip(found, wrong)):
            raise Mistake(problem)
    wanted = scores(lambda low, high, r, a, out: high - low + 2 / a * out)
    if abs(found[0] - wanted[0]) > 1e-6:
        raise Mistake("a result inside the interval costs the width alone.")
    if any(abs(ours - theirs) > 1e-6 for ours, theirs in zip(found, wanted)):
        raise Mistake("the score is the width, plus 2 / alpha times the distance of a result outside.")
    return "Nobody can improve this score by hiding what they believe: it is a proper scoring rule."


PARTS = ("claim", "arms", "prediction", "results", "verdict", "conclusion")


@exercise(
    "17.3",
    "Go through the six parts in their order. The prediction is what predict returned; results come from trial, by arm "
    "and seed.",
    "Run both arms of the claim with the same three or more seeds, and nothing else between them than one setting.",
    "The verdict is judge(claim, results).word. The conclusion gives the mean difference with one decimal, the number "
    "of seeds, and never reads 'undecided' as 'no effect'.",
)
def study(answer: Callable[[], Mapping[str, Any]]) -> str:
    """A whole study: question, prediction, arms, runs, verdict, conclusion."""
    found = answer()
    if not isinstance(found, Mapping) or any(part not in found for part in PARTS):
        raise Mistake(f"return a dictionary with {', '.join(PARTS)}{_lacks(found)}.")
    claim, arms, prediction, results = (found[part] for part in PARTS[:4])
    if not isinstance(arms, Mapping) or not isinstance(results, Mapping):
        raise Mistake("arms and results are dictionaries, by the names of the arms.")
    if not isinstance(claim, Claim):
        raise Mistake("the claim is a Claim of regolite.paper.experiments, so that the rule can judge it.")
    sides = [claim.ours.arm, claim.theirs.arm]
    for name in sides:
        if name not in arms or name not in results:
            raise Mistake(f"the claim compares the arm {name!r}, which is missing in arms or results.")
    _one_change(found, *(arms[name] for name in sides))
    _runs(results, arms, sides)
    _prediction(prediction, claim, [run["finished"] for name in sides for run in results[name].values()])
    verdict = judge(claim, results)
    if found["verdict"] != verdict.word:
        raise Mistake("the verdict isn't the rule's: it is about the whole interval, not about the sign of the mean.")
    assert verdict.difference is not None
    _conclusion(str(found["conclusion"]), verdict)
    return (
        f"A study of {len(verdict.seeds)} seeds, judged by a rule that was fixed before. Publish it, whatever it says."
    )


def _lacks(found: Any) -> str:
    """What a study lacks, as the end of a sentence."""
    if not isinstance(found, Mapping):
        return f"; this is a {type(found).__name__}"
    return f"; it lacks {', '.join(part for part in PARTS if part not in found)}"


def _one_change(found: Mapping[str, Any], ours: Arm, theirs: Arm) -> None:
    """Check that two arms differ in one thing, or that the study says why their comparison is fair."""
    a, b = settings_of(ours), settings_of(theirs)
    changed = sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))
    changed += [f"change {name}" for name in found.get("changes", ())]
    if not changed and ours.model == theirs.model and found["claim"].ours.stage == found["claim"].theirs.stage:
        raise Mistake("the two arms are the same: what is the question?")
    if len(changed) > 1 and len(str(found.get("fair", ""))) < 40:
        raise Mistake(
            f"the arms differ in {', '.join(changed)}: change one thing, or say in a sentence under the key 'fair' "
            "what makes the comparison fair (the same parameters, the same time, ...)."
        )


def _runs(results: Results, arms: Mapping[str, Arm], sides: list[str]) -> None:
    """Check the runs of the two arms."""
    seeds = [set(results[name]) for name in sides]
    if seeds[0] != seeds[1]:
        raise Mistake("both arms need the same seeds: the rule compares them pair by pair.")
    if len(seeds[0]) < 3:
        raise Mistake(f"{len(seeds[0])} seeds give an interval that decides next to nothing: run three or more.")
    for name in sides:
        for run in results[name].values():
            settings = json.loads(json.dumps(arms[name].settings()))  # tuples are lists in the stored results
            if other := sorted(s for s, value in settings.items() if run["config"].get(s, value) != value):
                raise Mistake(
                    f"a run of {name!r} was trained with other settings than the arm has: {', '.join(other)}."
                )
    tests = {(run["config"]["data"], run["config"]["test"]) for name in sides for run in results[name].values()}
    if len(tests) > 1 and len({arms[name].settings()["data"] for name in sides}) == 1:
        raise Mistake("the runs were measured on different test scenes: their AP cannot be compared.")


def _prediction(prediction: Any, claim: Claim, finished: list[str]) -> None:
    """Check that there was a prediction, and that it came first."""
    if not isinstance(prediction, Mapping) or not {"low", "high", "reason", "day", "claim"} <= prediction.keys():
        raise Mistake("the prediction has claim, low, high, reason and day: take what predict returned.")
    if not prediction["low"] < prediction["high"]:
        raise Mistake("the predicted interval is empty.")
    if prediction["claim"] != json.loads(json.dumps(asdict(claim))):
        raise Mistake("the prediction is about another claim: sides, rule or margin have changed since.")
    if prediction["day"] > min(finished):
        raise Mistake("the prediction is younger than the first result: that is a description, not a prediction.")


def _conclusion(text: str, verdict: Verdict) -> None:
    """Check what the study concludes."""
    difference: Estimate = verdict.difference  # type: ignore[assignment]  # checked by the caller
    if len(text) < 60:
        raise Mistake("the conclusion is too short: say what was compared, what came out, and what it doesn't show.")
    if verdict.word == "undecided" and re.search(r"\bno (?:effect|difference)\b|\bdoes(?:n't| not) matter\b", text):
        raise Mistake("'undecided' is not 'no effect': the interval holds 0 and other values, too.")
    if f"{abs(difference.mean):.1f}" not in text:
        raise Mistake("the conclusion lacks the mean difference, with one decimal.")
    if (
        not re.search(rf"(?<![\d.]){len(verdict.seeds)}(?![\d.])", text)
        and _NUMBERS.get(len(verdict.seeds), "?") not in text.lower()
    ):
        raise Mistake("the conclusion lacks the number of seeds.")


_NUMBERS = {3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight", 9: "nine", 10: "ten"}
