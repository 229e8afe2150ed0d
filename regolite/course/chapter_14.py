"""Notebook 14, the paper in miniature: paired intervals, how many seeds, "the same", cost, and flaws of a study."""

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
"""Studies as a reader of their papers would note them down."""

FLAWS = {
    "leak": "what was chosen was chosen on the images that the figure is reported on",
    "best": "the best seed is reported",
    "budget": "the two arms were trained for different numbers of epochs",
    "tuning": "more learning rates were tried for one arm than for the other",
    "seeds": "an arm has one seed only, or the arms have different seeds",
}
"""What can be wrong with a study."""


def _half(values: Sequence[float]) -> float:
    """Half of Student's interval of 95 % of a mean."""
    n = len(values)
    return float(t.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n))


def _interval(answered: Any, name: str) -> tuple[float, float]:
    """Two ends in order, or a Mistake."""
    if not isinstance(answered, (tuple, list)) or len(answered) != 2:
        raise Mistake(f"{name} should be two ends, low and high.")
    low, high = (float(end) for end in answered)
    if low > high:
        raise Mistake(f"{name} begins at {low:.2f} and ends at {high:.2f}: low comes first.")
    return low, high


def _near(found: tuple[float, float], mean: float, half: float) -> bool:
    return math.isclose(found[0], mean - half, abs_tol=2e-3) and math.isclose(found[1], mean + half, abs_tol=2e-3)


@exercise(
    "14.1",
    "Pair by the seed, which is the key of the dictionaries, and use only the seeds that both have. Then there is one "
    "list of differences, and its interval is that of the chapter.",
    "Unpaired, the two means vary independently, so their variances add: s_1^2 / n_1 + s_2^2 / n_2, all runs counted.",
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
            raise Mistake("give two intervals: the paired one, then the unpaired one.")
        paired, unpaired = _interval(answered[0], "the paired interval"), _interval(answered[1], "the unpaired one")
        _check_paired(paired, ours, theirs)
        _check_unpaired(unpaired, ours, theirs)
    return (
        "What is common to both runs of a seed, the order of the images and the first weights, drops out of the "
        "difference; unpaired, it counts as noise, twice."
    )


def _check_paired(found: tuple[float, float], ours: Runs, theirs: Runs) -> None:
    common = sorted(ours.keys() & theirs.keys())
    differences = [ours[seed] - theirs[seed] for seed in common]
    mean, n = float(np.mean(differences)), len(common)
    if _near(found, mean, _half(differences)):
        return
    by_place = [a - b for a, b in zip(ours.values(), theirs.values())]
    spread = float(np.std(differences, ddof=1))
    knows = (
        (-mean, _half(differences), "the sign is turned: ours less theirs."),
        (float(np.mean(by_place)), _half(by_place), "pairs are made by place in the dictionary, not by seed."),
        (mean, 1.96 * spread / math.sqrt(n), "1.96 is the normal distribution's: for so few seeds take Student's t."),
        (
            mean,
            float(t.ppf(0.975, n - 1) * np.std(differences) / math.sqrt(n)),
            "divide the squares by n - 1, not by n (ddof=1): the mean was taken from the same runs.",
        ),
        (mean, float(t.ppf(0.975, n - 1)) * spread, "the spread of one difference; that of their mean is / sqrt(n)."),
        (
            mean,
            float(t.ppf(0.95, n - 1)) * spread / math.sqrt(n),
            "5 % are left out at each end, so this is an interval of 90 %: t.ppf(0.975, n - 1).",
        ),
        (
            mean,
            float(t.ppf(0.975, n)) * spread / math.sqrt(n),
            "Student's t of n differences has n - 1 degrees of freedom.",
        ),
    )
    for middle, half, said in knows:
        if _near(found, middle, half):
            raise Mistake(f"the paired interval: {said}")
    wanted = f"{mean - _half(differences):.2f} to {mean + _half(differences):.2f}"
    raise Mistake(f"the paired interval of seeds {common} goes from {wanted}, yours {found[0]:.2f} to {found[1]:.2f}.")


def _check_unpaired(found: tuple[float, float], ours: Runs, theirs: Runs) -> None:
    a, b = list(ours.values()), list(theirs.values())
    mean = float(np.mean(a) - np.mean(b))
    error = math.sqrt(np.var(a, ddof=1) / len(a) + np.var(b, ddof=1) / len(b))
    if _near(found, mean, float(t.ppf(0.975, len(a) + len(b) - 2)) * error):
        return
    if _near(found, mean, _half(a) + _half(b)):
        raise Mistake("the unpaired interval: the two half widths are added; variances add, so take the root of a sum.")
    if _near(found, mean, float(t.ppf(0.975, min(len(a), len(b)) - 1)) * error):
        raise Mistake("the unpaired interval: two lists have n_1 + n_2 - 2 degrees of freedom.")
    if _near(found, mean, 1.96 * error):
        raise Mistake("the unpaired interval: 1.96 is the normal distribution's: for so few seeds take Student's t.")
    common = ours.keys() & theirs.keys()
    if len(common) < max(len(a), len(b)):
        kept = float(np.mean([ours[s] for s in common]) - np.mean([theirs[s] for s in common]))
        if math.isclose(sum(found) / 2, kept, abs_tol=2e-3):
            raise Mistake(
                "the unpaired interval: nothing is paired here, so all runs count, also of seeds without a partner."
            )
    half = float(t.ppf(0.975, len(a) + len(b) - 2)) * error
    wanted = f"{mean - half:.2f} to {mean + half:.2f}"
    raise Mistake(f"the unpaired interval goes from {wanted}, yours {found[0]:.2f} to {found[1]:.2f}.")


@exercise(
    "14.2",
    "The half width of the interval of n seeds is t.ppf(0.975, n - 1) * spread / sqrt(n). One seed has no interval.",
    "t depends on n, so there is no formula to solve: count n up from 2 until the half width is below the effect.",
    "next(n for n in range(2, 10_000) if t.ppf(0.975, n - 1) * spread / math.sqrt(n) < effect)",
)
def seeds_for(answer: Callable[[float, float], int]) -> str:
    """``answer(spread, effect)``: least seeds for which the interval around the effect does not hold 0."""
    for spread, effect in ((1.0, 2.0), (1.0, 1.0), (0.8, 0.5), (1.2, 0.3), (0.2, 5.0)):
        found = answer(spread, effect)
        if not isinstance(found, (int, np.integer)):
            raise Mistake(f"a number of seeds is an int, and yours is a {type(found).__name__}.")
        wanted = next(n for n in range(2, 10_000) if t.ppf(0.975, n - 1) * spread / math.sqrt(n) < effect)
        if found == wanted:
            continue
        case = f"for a spread of {spread:g} and an effect of {effect:g}"
        normal = max(2, math.floor((norm.ppf(0.975) * spread / effect) ** 2) + 1)
        if found < 2:
            raise Mistake(f"{case}: {found} is too few, one seed says nothing about the spread.")
        if found == normal:
            raise Mistake(f"{case}: {found} is right for 1.96, the normal distribution's; few seeds need Student's t.")
        if found == next(n for n in range(2, 10_000) if 2 * t.ppf(0.975, n - 1) * spread / math.sqrt(n) < effect):
            raise Mistake(f"{case}: from the mean to 0 it is half an interval, not a whole one.")
        if found == next((n for n in range(2, 10_000) if t.ppf(0.975, n - 1) * spread < effect), None):
            raise Mistake(f"{case}: the spread of a mean is that of one difference / sqrt(n).")
        raise Mistake(f"{case} it takes {wanted} seeds, and not {found}.")
    return "Half the effect takes about four times the seeds: three seeds can show large effects only."


@exercise(
    "14.3",
    'Where does the whole interval lie? "same" needs it between minus the margin and the margin.',
    "It is different only where the whole interval lies above the margin, or below minus the margin.",
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
            'the interval holds 0, but reaches beyond the margin: "no difference found" is not "no difference".',
        ),
        (
            [0.55, 0.5, 0.6, 0.52],
            1.0,
            "same",
            "the interval does not hold 0, but lies within the margin: a difference that is sure, and small.",
        ),
        (
            [1.3, 0.9, 1.6],
            1.0,
            "undecided",
            "the mean lies beyond the margin, and the interval does not all: it is the interval that decides.",
        ),
        ([4.0, 4.2, 3.9], 1.0, "different", ""),
        ([-4.0, -4.2, -3.9], 1.0, "different", "it lies wholly below minus the margin: there are two sides."),
        ([0.1, 0.9, -0.6], 1.0, "undecided", ""),
        ([0.1, 0.9, -0.6], 3.0, "same", ""),
    )
    words = ("same", "different", "undecided")
    for values, margin, wanted, said in cases:
        found = answer(list(values), margin)
        if found not in words:
            raise Mistake(f"the answer is one of {', '.join(words)}, and yours is {found!r}.")
        if found != wanted:
            half, mean = _half(values), float(np.mean(values))
            case = f"interval {mean - half:.2f} to {mean + half:.2f} and margin {margin:g}"
            raise Mistake(f"{case}: {wanted}, not {found}. {said[:1].upper()}{said[1:]}".rstrip())
    return "To show that nothing changes takes seeds too: as many as for an effect of the size of the margin."


@exercise(
    "14.4",
    "The goal is the last AP of theirs. Then one question twice: at which x does a curve first reach the goal? Once x "
    "is the epoch, once epoch times seconds of an epoch.",
    "Between the last point below the goal and the first at or above it, go along the straight line. Curves begin at "
    "(0, 0).",
    "x = x0 + (goal - y0) / (y1 - y0) * (x1 - x0); the answer is x of theirs by x of ours, and 0.0 where ours never "
    "reaches the goal.",
)
def how_much_faster(answer: Callable[[Curve, Curve, float, float], Any]) -> str:
    """``answer(ours, theirs, our_seconds, their_seconds)``: how many times sooner, by epochs and by time."""
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
            raise Mistake("give two numbers: how many times sooner by epochs, and by time.")
        _check_faster([float(value) for value in answered], mine, other, our_seconds / their_seconds)
    return (
        "A method that is faster by epochs and not by time has bought its epochs. And a curve before the drop of the "
        "learning rate shows less than the run would reach with an earlier one: hence the arms with other drops."
    )


def _reach(curve: Curve, goal: float, between: bool = True) -> float:
    """Where a curve from (0, 0) first reaches a goal; infinity where it never does."""
    x0, y0 = 0.0, 0.0
    for x, y in curve:
        if y >= goal:
            return x0 + (goal - y0) / (y - y0) * (x - x0) if between else x
        x0, y0 = x, y
    return math.inf


def _check_faster(found: list[float], ours: Curve, theirs: Curve, dearer: float) -> None:
    goal = theirs[-1][1]
    mine, other = _reach(ours, goal), _reach(theirs, goal)
    by_epochs = other / mine
    wanted = [by_epochs, by_epochs / dearer]
    if np.allclose(found, wanted, atol=2e-3):
        return
    if math.isinf(mine):
        raise Mistake(f"ours never reaches {goal:g}: 0.0 times as fast, by epochs and by time, and not {found[0]:.2f}.")
    steps = _reach(theirs, goal, False) / _reach(ours, goal, False)
    for wrong, said in (
        (
            [by_epochs, by_epochs * dearer],
            "by time, a dearer epoch makes ours slower: the ratio is multiplied the wrong way.",
        ),
        ([by_epochs] * 2, "time is not epochs: an epoch of ours takes another time than one of theirs."),
        ([mine / other, dearer * mine / other], "the ratio is turned: above 1 means that ours is sooner."),
        (
            [steps, steps / dearer],
            "between two points go along the line; the curve reaches the goal before the next one.",
        ),
        (
            [theirs[-1][0] / mine, theirs[-1][0] / mine / dearer],
            "theirs has its last AP earlier already: look for the first time in both curves.",
        ),
    ):
        if np.allclose(found, wrong, atol=2e-3):
            raise Mistake(said)
    raise Mistake(
        f"ours reaches {goal:g} after {mine:.2f} epochs, theirs after {other:.2f}, and an epoch of ours takes "
        f"{dearer:g} times as long: ({wanted[0]:.3f}, {wanted[1]:.3f}), not ({found[0]:.3f}, {found[1]:.3f})."
    )


@exercise(
    "14.5",
    "Five tests, one a word; each looks at one or two entries of the study. Compare the sets of seeds, not the lists.",
    '"leak": study["tuned_on"] == study["reported_on"]. "best": study["reported"] == "best". "budget" and "tuning": '
    "the two arms differ in an entry.",
    '"seeds": set(ours) != set(theirs) or len(set(ours)) < 2, of their lists of seeds.',
)
def flaws(answer: Callable[[dict[str, Any]], Any]) -> str:
    """``answer(study)``: the set of words for what is wrong."""
    for number, study in enumerate(STUDIES, start=1):
        found = answer({name: dict(part) if isinstance(part, dict) else part for name, part in study.items()})
        if not isinstance(found, (set, frozenset)):
            raise Mistake(f"give a set of words, and not a {type(found).__name__}.")
        unknown = sorted(map(str, found - FLAWS.keys()))
        if unknown:
            raise Mistake(f"{unknown[0]!r} is none of the words {', '.join(FLAWS)}.")
        wanted = _flaws(study)
        missing, wrong = sorted(wanted - found), sorted(found - wanted)
        if missing:
            raise Mistake(f"in study {number} you miss {missing[0]!r}: {FLAWS[missing[0]]}.")
        if wrong:
            raise Mistake(f"in study {number} nothing is wrong of the kind {wrong[0]!r}: {_innocent(study, wrong[0])}.")
    return "None of these can be seen in a table of results: they stand in the protocol, or nowhere."


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
        "tuning": "as many learning rates were tried for both",
        "seeds": "both arms have the same seeds, in whatever order",
    }[word]
