"""Checkers of notebook 14, the paper in miniature: intervals, power, equivalence, speed-up, flaws of a study."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import nct, norm, t

from regolite.course import Mistake, exercise

Runs = dict[int, float]
Curve = Sequence[tuple[float, float]]

STUDIES: tuple[dict[str, Any], ...] = (
    {
        "tuned_on": "val",
        "reported_on": "test",
        "reported": "mean",
        "base": {"seeds": [0, 1, 2], "epochs": 50, "learning_rates_tried": 3},
        "ours": {"seeds": [0, 1, 2], "epochs": 50, "learning_rates_tried": 3},
    },
    {
        "tuned_on": "test",
        "reported_on": "test",
        "reported": "mean",
        "base": {"seeds": [0, 1, 2], "epochs": 50, "learning_rates_tried": 3},
        "ours": {"seeds": [2, 1, 0], "epochs": 50, "learning_rates_tried": 3},
    },
    {
        "tuned_on": "val",
        "reported_on": "val",
        "reported": "best",
        "base": {"seeds": [0, 1, 2], "epochs": 36, "learning_rates_tried": 2},
        "ours": {"seeds": [0, 1, 2], "epochs": 50, "learning_rates_tried": 2},
    },
    {
        "tuned_on": "val",
        "reported_on": "test",
        "reported": "mean",
        "base": {"seeds": [0], "epochs": 50, "learning_rates_tried": 1},
        "ours": {"seeds": [0], "epochs": 50, "learning_rates_tried": 6},
    },
    {
        "tuned_on": "val",
        "reported_on": "test",
        "reported": "best",
        "base": {"seeds": [0, 1, 2], "epochs": 50, "learning_rates_tried": 4},
        "ours": {"seeds": [0, 1, 2, 3, 4], "epochs": 50, "learning_rates_tried": 4},
    },
    {
        "tuned_on": "none",
        "reported_on": "val",
        "reported": "mean",
        "base": {"seeds": [0, 1], "epochs": 12, "learning_rates_tried": 1},
        "ours": {"seeds": [5, 6], "epochs": 12, "learning_rates_tried": 1},
    },
)
"""Summaries of fictitious studies."""

FLAWS = {
    "leak": "hyperparameters were tuned on the images of the reported result",
    "best": "the best seed is reported",
    "budget": "the two arms were trained for different numbers of epochs",
    "tuning": "more learning rates were tried for one arm than for the other",
    "seeds": "an arm has fewer than two different seeds, or the arms have different ones",
}
"""Possible flaws of a study."""


def _half(values: Sequence[float]) -> float:
    """Half the width of the 95 % t interval of a mean."""
    n = len(values)
    return float(t.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n))


def _interval(answered: Any, name: str) -> tuple[float, float]:
    """An interval with its ends in order; otherwise raise a Mistake."""
    if not isinstance(answered, (tuple, list)) or len(answered) != 2:
        raise Mistake(f"{name} should be a pair, low and high.")
    low, high = (float(end) for end in answered)
    if low > high:
        raise Mistake(f"{name} goes from {low:.2f} to {high:.2f}: low comes first.")
    return low, high


def _near(found: tuple[float, float], mean: float, half: float) -> bool:
    return math.isclose(found[0], mean - half, abs_tol=2e-3) and math.isclose(found[1], mean + half, abs_tol=2e-3)


@exercise(
    "14.1",
    "Pair by seed, the key of the dictionaries, and use only common seeds. Unpaired, the two means are independent, so "
    "their variances add: s_a^2 / n_a + s_b^2 / n_b, with all runs.",
    "Welch: half = t.ppf(0.975, nu) * sqrt(v_a + v_b) with v = var(ddof=1) / n of each side, and nu = (v_a + v_b)^2 / "
    "(v_a^2 / (n_a - 1) + v_b^2 / (n_b - 1)). No rounding of nu.",
    "Bootstrap: means = differences[rng.integers(n, size=(samples, n))].mean(1), then np.quantile(means, (0.025, "
    "0.975)).",
)
def three_intervals(answer: Callable[[Runs, Runs], Any]) -> str:
    """``answer(ours, theirs)``, AP by seed: the paired, the Welch and the bootstrap interval."""
    cases: tuple[tuple[Runs, Runs], ...] = (
        ({0: 30.1, 1: 33.6, 2: 31.0}, {0: 28.0, 1: 31.1, 2: 29.2}),
        ({2: 25.3, 0: 21.9, 4: 28.8, 1: 24.0}, {0: 20.4, 1: 23.1, 2: 23.7, 3: 19.0, 4: 26.2}),
        (
            {k: v for k, v in enumerate((31.0, 38.5, 27.2, 35.9, 24.8, 33.1, 40.2, 29.5))},
            {k: v for k, v in zip((7, 3, 1, 0, 2, 6, 5, 4), (20.4, 21.3, 21.1, 20.2, 19.6, 20.9, 20.0, 19.3))},
        ),
    )
    for ours, theirs in cases:
        answered = answer(dict(ours), dict(theirs))
        if not isinstance(answered, dict) or set(answered) != {"paired", "welch", "bootstrap"}:
            raise Mistake("return a dictionary with the keys paired, welch and bootstrap.")
        _check_paired(_interval(answered["paired"], "the paired interval"), ours, theirs)
        _check_welch(_interval(answered["welch"], "Welch's interval"), ours, theirs)
        _check_bootstrap(_interval(answered["bootstrap"], "the bootstrap interval"), ours, theirs)
    return (
        "What both runs of a seed share, image order and initial weights, cancels in the paired difference. The "
        "bootstrap of three seeds is just their range: it needs many values."
    )


def _differences(ours: Runs, theirs: Runs) -> list[float]:
    return [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]


def _check_paired(found: tuple[float, float], ours: Runs, theirs: Runs) -> None:
    differences = _differences(ours, theirs)
    mean, n = float(np.mean(differences)), len(differences)
    if _near(found, mean, _half(differences)):
        return
    by_place = [a - b for a, b in zip(ours.values(), theirs.values())]
    spread = float(np.std(differences, ddof=1))
    known = (
        (-mean, _half(differences), "the sign is wrong: ours minus theirs."),
        (float(np.mean(by_place)), _half(by_place), "pairs are formed by position in the dictionary, not by seed."),
        (mean, 1.96 * spread / math.sqrt(n), "1.96 is for the normal distribution: with few seeds use Student's t."),
        (
            mean,
            float(t.ppf(0.975, n - 1) * np.std(differences) / math.sqrt(n)),
            "divide the squares by n - 1, not by n (ddof=1): the mean is estimated from the same runs.",
        ),
        (mean, float(t.ppf(0.975, n - 1)) * spread, "this is for one difference; for their mean divide by sqrt(n)."),
        (
            mean,
            float(t.ppf(0.95, n - 1)) * spread / math.sqrt(n),
            "it leaves out 5 % at each end, so it is a 90 % interval: use t.ppf(0.975, n - 1).",
        ),
        (
            mean,
            float(t.ppf(0.975, n)) * spread / math.sqrt(n),
            "Student's t of n differences has n - 1 degrees of freedom.",
        ),
    )
    for middle, half, message in known:
        if _near(found, middle, half):
            raise Mistake(f"the paired interval: {message}")
    if not math.isclose(sum(found) / 2, mean, abs_tol=2e-3):
        raise Mistake("the paired interval should be centered at the mean difference of the common seeds.")
    raise Mistake("the paired interval has the right center and the wrong width: t.ppf(0.975, n - 1) * s / sqrt(n).")


def _check_welch(found: tuple[float, float], ours: Runs, theirs: Runs) -> None:
    a, b = list(ours.values()), list(theirs.values())
    n_a, n_b = len(a), len(b)
    mean = float(np.mean(a) - np.mean(b))
    v_a, v_b = float(np.var(a, ddof=1)) / n_a, float(np.var(b, ddof=1)) / n_b
    error, freedom = math.sqrt(v_a + v_b), (v_a + v_b) ** 2 / (v_a**2 / (n_a - 1) + v_b**2 / (n_b - 1))
    if _near(found, mean, float(t.ppf(0.975, freedom)) * error):
        return
    pooled = math.sqrt((v_a * n_a * (n_a - 1) + v_b * n_b * (n_b - 1)) / (n_a + n_b - 2) * (1 / n_a + 1 / n_b))
    inner = math.sqrt(float(np.var(a)) / n_a + float(np.var(b)) / n_b)
    for half, message in (
        (_half(a) + _half(b), "the half widths were added, but variances add: take the root of their sum."),
        (
            float(t.ppf(0.975, n_a + n_b - 2)) * error,
            "n_a + n_b - 2 degrees of freedom belong to a pooled variance; the sum of two variances has Welch's own.",
        ),
        (
            float(t.ppf(0.975, n_a + n_b - 2)) * pooled,
            "this is Student's pooled interval, which assumes that both arms vary alike; Welch's does not.",
        ),
        (
            float(t.ppf(0.975, min(n_a, n_b) - 1)) * error,
            "the smaller n - 1 is a cautious bound on the degrees of freedom: compute Welch's nu.",
        ),
        (float(t.ppf(0.975, math.floor(freedom))) * error, "nu need not be whole: do not round it."),
        (1.96 * error, "1.96 is for the normal distribution: with few seeds use Student's t."),
        (float(t.ppf(0.975, freedom)) * inner, "divide the squares by n - 1, not by n (ddof=1)."),
        (float(t.ppf(0.95, freedom)) * error, "that is a 90 % interval: use t.ppf(0.975, nu)."),
    ):
        if _near(found, mean, half):
            raise Mistake(f"Welch's interval: {message}")
    common = ours.keys() & theirs.keys()
    if len(common) < max(n_a, n_b):
        kept = float(np.mean([ours[s] for s in common]) - np.mean([theirs[s] for s in common]))
        if math.isclose(sum(found) / 2, kept, abs_tol=2e-3):
            raise Mistake("Welch's interval: without pairs all runs count, also those of seeds without a partner.")
    if not math.isclose(sum(found) / 2, mean, abs_tol=2e-3):
        raise Mistake("Welch's interval should be centered at the difference of the two means.")
    raise Mistake("Welch's interval has the right center and the wrong width: check v_a, v_b and nu one by one.")


def _check_bootstrap(found: tuple[float, float], ours: Runs, theirs: Runs) -> None:
    differences = np.array(_differences(ours, theirs))
    n, rng = len(differences), np.random.default_rng(1)
    means = differences[rng.integers(n, size=(200_000, n))].mean(1)

    def matches(values: np.ndarray, ends: tuple[float, float] = (0.025, 0.975)) -> bool:
        low, high = np.quantile(values, ends)
        return bool(np.allclose(found, (low, high), atol=0.08 * (high - low)))

    if matches(means):
        return
    a, b = np.array(list(ours.values())), np.array(list(theirs.values()))
    apart = rng.choice(a, size=(50_000, len(a))).mean(1) - rng.choice(b, size=(50_000, len(b))).mean(1)
    for wrong, message in (
        (matches(means, (0.05, 0.95)), "the quantiles 5 % and 95 % give a 90 % interval."),
        (matches(differences), "these are quantiles of the differences: resample them and take *means*."),
        (matches(means - differences.mean()), "the interval is centered at 0: do not subtract the mean."),
        (matches(apart), "both sides were resampled apart: resample the paired differences."),
    ):
        if wrong:
            raise Mistake(f"the bootstrap interval: {message}")
    if _near(found, float(differences.mean()), _half(list(differences))):
        raise Mistake("the bootstrap interval is Student's: resample instead of using t.")
    raise Mistake(
        "the bootstrap interval: draw n of the n differences with replacement, 4000 times, average each draw, and take "
        "the quantiles 0.025 and 0.975."
    )


@exercise(
    "14.2",
    "Increase n from 2 until the power suffices. The critical value t.ppf(0.975, n - 1) and delta depend on n.",
    "Power is the probability of |T| > critical for a noncentral T: nct.sf(critical, n - 1, delta) + "
    "nct.cdf(-critical, n - 1, delta), with delta = effect / spread * sqrt(n).",
    "for n in range(2, 10_000): compute both, and return n at the first power that is large enough.",
)
def seeds_for(answer: Callable[[float, float, float], int]) -> str:
    """``answer(spread, effect, power)``: minimum number of seeds that detects the effect with this probability."""
    for spread, effect, power in ((1.0, 0.5, 0.8), (0.8, 0.5, 0.9), (1.2, 0.3, 0.8), (1.0, 2.1, 0.8), (1.0, 3.0, 0.5)):
        found = answer(spread, effect, power)
        if not isinstance(found, (int, np.integer)):
            raise Mistake(f"the number of seeds should be an int, but is a {type(found).__name__}.")
        ratio = effect / spread
        if found == _seeds(ratio, power):
            continue
        case = f"for a spread of {spread:g}, an effect of {effect:g} and a power of {power:g}, {found}"
        if found < 2:
            raise Mistake(f"{case} is too few: one seed gives no standard deviation.")
        normal = math.ceil(((norm.ppf(0.975) + norm.ppf(power)) / ratio) ** 2)
        for wrong, said in (
            (
                next(n for n in range(2, 10_000) if t.ppf(0.975, n - 1) / math.sqrt(n) < ratio),
                "only makes the interval around the effect exclude 0: half of such studies would fail.",
            ),
            (normal, "is right for a known standard deviation (1.96): few seeds need Student's t."),
            (_seeds(ratio / math.sqrt(2), power), "is for two separate groups: pairs have one list of differences."),
            (_seeds(ratio, power, level=0.95), "is for a one-sided test: 2.5 % on each side."),
            (_seeds(ratio, 0.8), "ignores the power that was asked for."),
            (_seeds(ratio, power) + 1, "is one too many: the first n whose power is large enough."),
            (_seeds(ratio, power) - 1, "is one too few: its power is not large enough yet."),
        ):
            if found == wrong:
                raise Mistake(f"{case} {said}")
        raise Mistake(f"{case} seeds are too {'few' if found < _seeds(ratio, power) else 'many'}.")
    return "Half the effect takes about four times the seeds: three seeds can only show large effects."


def _seeds(ratio: float, power: float, level: float = 0.975) -> int:
    """Minimum number of seeds for an effect of ``ratio`` standard deviations."""
    for n in range(2, 10_000):
        critical, delta = t.ppf(level, n - 1), ratio * math.sqrt(n)
        if nct.sf(critical, n - 1, delta) + nct.cdf(-critical, n - 1, delta) >= power:
            return n
    raise AssertionError("such an effect takes too many seeds")


@exercise(
    "14.3",
    'Where is the whole interval? For "same" it must be between minus the margin and the margin.',
    'It is "different" only if the whole interval is above the margin, or below minus the margin.',
    'same if -margin < low and high < margin; different if low > margin or high < -margin; else "undecided".',
)
def same_or_not(answer: Callable[[Sequence[float], float], str]) -> str:
    """``answer(differences, margin)``: same, different or undecided."""
    cases = (
        ([0.2, -0.1, 0.05], 1.0, "same", ""),
        (
            [2.4, -1.9, 0.3],
            1.0,
            "undecided",
            'the interval contains 0, but extends beyond the margin: "no difference found" is not "no difference".',
        ),
        (
            [0.55, 0.5, 0.6, 0.52],
            1.0,
            "same",
            "the interval excludes 0, but lies within the margin: a significant, but small difference.",
        ),
        (
            [1.3, 0.9, 1.6],
            1.0,
            "undecided",
            "the mean is beyond the margin, but not the whole interval: the interval decides.",
        ),
        ([4.0, 4.2, 3.9], 1.0, "different", ""),
        ([-4.0, -4.2, -3.9], 1.0, "different", "the whole interval is below minus the margin: there are two sides."),
        ([0.1, 0.9, -0.6], 1.0, "undecided", ""),
        ([0.1, 0.9, -0.6], 3.0, "same", ""),
    )
    words = ("same", "different", "undecided")
    for values, margin, wanted, said in cases:
        found = answer(list(values), margin)
        if found not in words:
            raise Mistake(f"the answer should be one of {', '.join(words)}, but is {found!r}.")
        if found != wanted:
            half, mean = _half(values), float(np.mean(values))
            case = f"interval {mean - half:.2f} to {mean + half:.2f} and margin {margin:g}"
            raise Mistake(f"{case}: not {found}. {said[:1].upper()}{said[1:]}".rstrip())
    return "Showing equivalence takes seeds too: as many as showing an effect of the size of the margin."


@exercise(
    "14.4",
    "The goal is the last AP of theirs. At which x does each curve first reach the goal? Once x is the epoch, once "
    "epoch times seconds per epoch.",
    "Interpolate linearly between the last point below the goal and the first at or above it. Curves start at (0, 0).",
    "x = x0 + (goal - y0) / (y1 - y0) * (x1 - x0); the answer is x of theirs divided by x of ours, or 0.0 if ours "
    "never reaches the goal.",
)
def how_much_faster(answer: Callable[[Curve, Curve, float, float], Any]) -> str:
    """``answer(ours, theirs, our_seconds, their_seconds)``: the speed-up in epochs and in time."""
    theirs = [(4.0, 10.0), (8.0, 18.0), (12.0, 22.0), (16.0, 23.0)]
    ours = [(4.0, 15.0), (8.0, 25.0), (12.0, 24.0), (16.0, 28.0)]
    early = [(4.0, 12.0), (8.0, 23.5), (12.0, 23.0), (16.0, 22.0)]
    never = [(4.0, 3.0), (8.0, 9.0), (12.0, 12.0), (16.0, 14.0)]
    for mine, other, our_seconds, their_seconds in (
        (ours, theirs, 30.0, 20.0),
        (never, theirs, 30.0, 20.0),
        (ours, early, 10.0, 25.0),
    ):
        answered = answer(list(mine), list(other), our_seconds, their_seconds)
        if not isinstance(answered, (tuple, list)) or len(answered) != 2:
            raise Mistake("return two numbers: the speed-up in epochs, and in time.")
        _check_faster([float(value) for value in answered], mine, other, our_seconds / their_seconds)
    return (
        "A method that is faster in epochs but not in time has more expensive epochs. And a curve before the learning "
        "rate drop underestimates a run with an earlier drop: hence the arms with other drops."
    )


def _reach(curve: Curve, goal: float, between: bool = True) -> float:
    """The x at which a curve from (0, 0) first reaches a goal, or infinity."""
    x0, y0 = 0.0, 0.0
    for x, y in curve:
        if y >= goal:
            return x0 + (goal - y0) / (y - y0) * (x - x0) if between else x
        x0, y0 = x, y
    return math.inf


def _check_faster(found: list[float], ours: Curve, theirs: Curve, cost: float) -> None:
    goal = theirs[-1][1]
    mine, other = _reach(ours, goal), _reach(theirs, goal)
    by_epochs = other / mine
    wanted = [by_epochs, by_epochs / cost]
    if np.allclose(found, wanted, atol=2e-3):
        return
    if math.isinf(mine):
        raise Mistake(f"ours never reaches {goal:g}: the speed-up is 0.0 in epochs and in time, not {found[0]:.2f}.")
    steps = _reach(theirs, goal, False) / _reach(ours, goal, False)
    for wrong, said in (
        (
            [by_epochs, by_epochs * cost],
            "in time, a more expensive epoch makes ours slower: divide by the ratio of costs.",
        ),
        ([by_epochs] * 2, "the two differ: an epoch of ours does not take the same time as one of theirs."),
        ([mine / other, cost * mine / other], "the ratio is inverted: above 1 means that ours is faster."),
        (
            [steps, steps / cost],
            "interpolate between two points; the curve reaches the goal before the second one.",
        ),
        (
            [theirs[-1][0] / mine, theirs[-1][0] / mine / cost],
            "theirs reaches its last AP earlier: take the first time in both curves.",
        ),
    ):
        if np.allclose(found, wrong, atol=2e-3):
            raise Mistake(said)
    raise Mistake(
        f"for a goal of {goal:g}: find the first x at which each curve crosses it, between two points; once in epochs, "
        "once in epochs times seconds."
    )


@exercise(
    "14.5",
    "Five tests, one per word; each uses one or two entries of the study. Compare sets of seeds, not lists.",
    '"leak": study["tuned_on"] == study["reported_on"]. "best": study["reported"] == "best". "budget" and "tuning": '
    "the two arms differ in an entry.",
    '"seeds": set(ours) != set(theirs) or len(set(ours)) < 2, of their lists of seeds.',
)
def flaws(answer: Callable[[dict[str, Any]], Any]) -> str:
    """``answer(study)``: the set of words for its flaws."""
    rng = np.random.default_rng()
    for study in (*STUDIES, *(_study(rng) for _ in range(40))):
        found = answer({name: dict(part) if isinstance(part, dict) else part for name, part in study.items()})
        if not isinstance(found, (set, frozenset)):
            raise Mistake(f"the answer should be a set of words, but is a {type(found).__name__}.")
        unknown = sorted(map(str, found - FLAWS.keys()))
        if unknown:
            raise Mistake(f"{unknown[0]!r} is not one of the words {', '.join(FLAWS)}.")
        wanted = _flaws(study)
        missing, wrong = sorted(wanted - found), sorted(found - wanted)
        if missing:
            raise Mistake(f"in {_short(study)} you miss {missing[0]!r}: {FLAWS[missing[0]]}.")
        if wrong:
            raise Mistake(f"{_short(study)} does not have the flaw {wrong[0]!r}: {_innocent(study, wrong[0])}.")
    return "None of these is visible in a table of results: look for them in the protocol."


def _study(rng: np.random.Generator) -> dict[str, Any]:
    """A random study, so that no list of answers can be collected."""

    def arm() -> dict[str, Any]:
        seeds = ([0, 1, 2], [2, 0, 1], [0, 1, 2, 3], [0], [1, 1, 1], [5, 6, 7])[
            rng.choice(6, p=[0.4, 0.2, 0.1, 0.1, 0.1, 0.1])
        ]
        return {
            "seeds": list(seeds),
            "epochs": int(rng.choice([36, 50])),
            "learning_rates_tried": int(rng.choice([1, 3])),
        }

    tuned, reported = rng.choice(["val", "test", "none"]), rng.choice(["val", "test"])
    how = rng.choice(["mean", "best"])
    return {"tuned_on": str(tuned), "reported_on": str(reported), "reported": str(how), "base": arm(), "ours": arm()}


def _short(study: Mapping[str, Any]) -> str:
    """A study in words."""
    seeds = f"seeds {study['base']['seeds']} and {study['ours']['seeds']}"
    return f"a study tuned on {study['tuned_on']}, reported on {study['reported_on']}, {seeds}"


def _flaws(study: Mapping[str, Any]) -> set[str]:
    base, ours = study["base"], study["ours"]
    seeds = set(base["seeds"]), set(ours["seeds"])
    return {
        word
        for word, there in {
            "leak": study["tuned_on"] == study["reported_on"],
            "best": study["reported"] == "best",
            "budget": base["epochs"] != ours["epochs"],
            "tuning": base["learning_rates_tried"] != ours["learning_rates_tried"],
            "seeds": seeds[0] != seeds[1] or len(seeds[0]) < 2,
        }.items()
        if there
    }


def _innocent(study: Mapping[str, Any], word: str) -> str:
    """Why a study does not have a flaw."""
    if word == "leak":
        return f"it was tuned on {study['tuned_on']!r} and reported on {study['reported_on']!r}"
    return {
        "best": "the mean is reported",
        "budget": "both arms had the same epochs",
        "tuning": "the same number of learning rates was tried for both",
        "seeds": "both arms have the same seeds, in whatever order",
    }[word]
