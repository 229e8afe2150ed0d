"""Checkers of notebook 14, the paper in miniature: paired intervals, seeds, equivalence, cost, flaws of a study."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import norm, t

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
    "seeds": "an arm has one seed only, or the arms have different seeds",
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
    "Pair by seed, the key of the dictionaries, and use only common seeds. This gives one list of differences; compute "
    "its interval as in the chapter.",
    "Unpaired, the two means are independent, so their variances add: s_1^2 / n_1 + s_2^2 / n_2, with all runs.",
    "half = t.ppf(0.975, n_1 + n_2 - 2) * sqrt(var(ours, ddof=1) / n_1 + var(theirs, ddof=1) / n_2)",
)
def two_intervals(answer: Callable[[Runs, Runs], Any]) -> str:
    """``answer(ours, theirs)``, AP by seed: the paired interval and the unpaired one."""
    cases: tuple[tuple[Runs, Runs], ...] = (
        ({0: 30.1, 1: 33.6, 2: 31.0}, {0: 28.0, 1: 31.1, 2: 29.2}),
        ({2: 25.3, 0: 21.9, 4: 28.8, 1: 24.0}, {0: 20.4, 1: 23.1, 2: 23.7, 3: 19.0, 4: 26.2}),
    )
    for ours, theirs in cases:
        answered = answer(dict(ours), dict(theirs))
        if not isinstance(answered, (tuple, list)) or len(answered) != 2:
            raise Mistake("return two intervals: the paired one, then the unpaired one.")
        paired, unpaired = _interval(answered[0], "the paired interval"), _interval(answered[1], "the unpaired one")
        _check_paired(paired, ours, theirs)
        _check_unpaired(unpaired, ours, theirs)
    return (
        "Variation that both runs of a seed share, from image order and initial weights, cancels in the difference; in "
        "the unpaired interval it counts as noise, twice."
    )


def _check_paired(found: tuple[float, float], ours: Runs, theirs: Runs) -> None:
    common = sorted(ours.keys() & theirs.keys())
    differences = [ours[seed] - theirs[seed] for seed in common]
    mean, n = float(np.mean(differences)), len(common)
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
    wanted = f"{mean - _half(differences):.2f} to {mean + _half(differences):.2f}"
    raise Mistake(f"the paired interval of seeds {common} is {wanted}, not {found[0]:.2f} to {found[1]:.2f}.")


def _check_unpaired(found: tuple[float, float], ours: Runs, theirs: Runs) -> None:
    a, b = list(ours.values()), list(theirs.values())
    mean = float(np.mean(a) - np.mean(b))
    error = math.sqrt(np.var(a, ddof=1) / len(a) + np.var(b, ddof=1) / len(b))
    if _near(found, mean, float(t.ppf(0.975, len(a) + len(b) - 2)) * error):
        return
    if _near(found, mean, _half(a) + _half(b)):
        raise Mistake(
            "the unpaired interval: the half widths were added, but variances add: take the root of their sum."
        )
    if _near(found, mean, float(t.ppf(0.975, min(len(a), len(b)) - 1)) * error):
        raise Mistake("the unpaired interval: two lists have n_1 + n_2 - 2 degrees of freedom.")
    if _near(found, mean, 1.96 * error):
        raise Mistake("the unpaired interval: 1.96 is for the normal distribution: with few seeds use Student's t.")
    common = ours.keys() & theirs.keys()
    if len(common) < max(len(a), len(b)):
        kept = float(np.mean([ours[s] for s in common]) - np.mean([theirs[s] for s in common]))
        if math.isclose(sum(found) / 2, kept, abs_tol=2e-3):
            raise Mistake("the unpaired interval: without pairs all runs count, also those of seeds without a partner.")
    half = float(t.ppf(0.975, len(a) + len(b) - 2)) * error
    wanted = f"{mean - half:.2f} to {mean + half:.2f}"
    raise Mistake(f"the unpaired interval is {wanted}, not {found[0]:.2f} to {found[1]:.2f}.")


@exercise(
    "14.2",
    "The half width of the interval of n seeds is t.ppf(0.975, n - 1) * spread / sqrt(n). One seed has no interval.",
    "t depends on n, so there is no closed formula: increase n from 2 until the half width is below the effect.",
    "next(n for n in range(2, 10_000) if t.ppf(0.975, n - 1) * spread / math.sqrt(n) < effect)",
)
def seeds_for(answer: Callable[[float, float], int]) -> str:
    """``answer(spread, effect)``: minimum number of seeds whose interval around the effect excludes 0."""
    for spread, effect in ((1.0, 2.0), (1.0, 1.0), (0.8, 0.5), (1.2, 0.3), (0.2, 5.0)):
        found = answer(spread, effect)
        if not isinstance(found, (int, np.integer)):
            raise Mistake(f"the number of seeds should be an int, but is a {type(found).__name__}.")
        wanted = next(n for n in range(2, 10_000) if t.ppf(0.975, n - 1) * spread / math.sqrt(n) < effect)
        if found == wanted:
            continue
        case = f"for a spread of {spread:g} and an effect of {effect:g}"
        normal = max(2, math.floor((norm.ppf(0.975) * spread / effect) ** 2) + 1)
        if found < 2:
            raise Mistake(f"{case}: {found} is too few, one seed gives no standard deviation.")
        if found == normal:
            raise Mistake(f"{case}: {found} is right for 1.96, the normal distribution; few seeds need Student's t.")
        if found == next(n for n in range(2, 10_000) if 2 * t.ppf(0.975, n - 1) * spread / math.sqrt(n) < effect):
            raise Mistake(f"{case}: the distance from the mean to 0 is half the interval, not the whole.")
        if found == next((n for n in range(2, 10_000) if t.ppf(0.975, n - 1) * spread < effect), None):
            raise Mistake(f"{case}: the standard error of a mean is the spread of one difference / sqrt(n).")
        raise Mistake(f"{case} it takes {wanted} seeds, not {found}.")
    return "Half the effect takes about four times the seeds: three seeds can only show large effects."


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
            raise Mistake(f"{case}: {wanted}, not {found}. {said[:1].upper()}{said[1:]}".rstrip())
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
        f"ours reaches {goal:g} after {mine:.2f} epochs, theirs after {other:.2f}, and an epoch of ours takes "
        f"{cost:g} times as long: ({wanted[0]:.3f}, {wanted[1]:.3f}), not ({found[0]:.3f}, {found[1]:.3f})."
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
    for number, study in enumerate(STUDIES, start=1):
        found = answer({name: dict(part) if isinstance(part, dict) else part for name, part in study.items()})
        if not isinstance(found, (set, frozenset)):
            raise Mistake(f"the answer should be a set of words, but is a {type(found).__name__}.")
        unknown = sorted(map(str, found - FLAWS.keys()))
        if unknown:
            raise Mistake(f"{unknown[0]!r} is not one of the words {', '.join(FLAWS)}.")
        wanted = _flaws(study)
        missing, wrong = sorted(wanted - found), sorted(found - wanted)
        if missing:
            raise Mistake(f"in study {number} you miss {missing[0]!r}: {FLAWS[missing[0]]}.")
        if wrong:
            raise Mistake(f"study {number} does not have the flaw {wrong[0]!r}: {_innocent(study, wrong[0])}.")
    return "None of these is visible in a table of results: look for them in the protocol."


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
