"""From runs to verdicts: differences by seed, their intervals, and what they say about a claim.

Two arms with the same seed saw the same images in the same order and began with the same base detector. So they are
compared seed by seed: the mean of the differences, with Student's interval of 95 %. It tells how far the mean would
move with other seeds; the 500 test scenes are the same for all. An interval of three seeds is wide, 2.5 times the
spread of the differences, and one that does not hold 0 means something all the same.

With twenty-odd claims at 95 %, about one interval in twenty misses the truth by chance alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy.stats import t

from regolite.errors import UserError
from regolite.paper.experiments import ARMS, Claim, Experiment, Side

MOST_SEEDS = 100
Results = Mapping[str, Mapping[int, Mapping[str, Any]]]
"""Results of runs by arm and seed."""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its interval.

    Attributes:
        values: one a seed.
        mean: of them.
        low: end of the interval of 95 %; minus infinity with one seed.
        high: its other end.
    """

    values: tuple[float, ...]
    mean: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Estimate:
        """Student's interval of the mean; at least one value."""
        mean = float(np.mean(values))
        half = _half(float(np.std(values, ddof=1)), len(values)) if len(values) > 1 else math.inf
        return Estimate(tuple(values), mean, mean - half, mean + half)

    def __str__(self) -> str:
        """Mean and interval."""
        interval = f" [{self.low:+.1f}, {self.high:+.1f}]" if len(self.values) > 1 else ""
        return f"{self.mean:+.1f}{interval}"


@dataclass(frozen=True)
class Verdict:
    """What the runs say about a claim.

    Attributes:
        claim: the claim.
        seeds: those that both sides have.
        difference: ours minus theirs, seed by seed; None without a common seed.
        word: the verdict.
        seeds_needed: where it is undecided, how many seeds it would take if mean and spread stayed as they are; None
            where more than 100 would be, or one seed says nothing about the spread.
    """

    claim: Claim
    seeds: tuple[int, ...]
    difference: Estimate | None
    word: Literal["reproduced", "not reproduced", "undecided"]
    seeds_needed: int | None = None


def read_results(folder: str | Path, arms: Sequence[str] | None = None) -> dict[str, dict[int, dict[str, Any]]]:
    """The results that are there.

    Args:
        folder: of the files that :func:`regolite.paper.queue.conduct` writes.
        arms: which ones; all by default.

    Raises:
        UserError: when a file is damaged, or there is none.
    """
    files = {arm: Path(folder) / f"{arm}.json" for arm in (ARMS if arms is None else arms)}
    found = {}
    for arm, file in files.items():
        if file.exists():
            try:
                found[arm] = {run["seed"]: run for run in json.loads(file.read_text(encoding="utf-8"))["runs"]}
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise UserError(f"{file} holds no results ({error}): take it from the repository again") from error
    if not found:
        raise UserError(f"{folder} holds no results; `python -m regolite experiment all` makes them")
    return found


def figure(run: Mapping[str, Any], side: Side) -> float | None:
    """The figure of one run that a side names; None where the run has none."""
    if side.metric in ("relation", "chance", "nearest"):
        relations = run["relations"]
        if relations is None:
            return None
        return relations["stages"][side.stage] if side.metric == "relation" else relations[side.metric]
    stage = run["stages"][side.stage]
    if side.metric in ("correct", "precise"):
        counted = sum(stage["by_iou"]) if side.metric == "correct" else stage["by_iou"][-1]
        return 100 * counted / run["objects"]
    return stage[side.metric]


def by_seed(results: Results, side: Side) -> dict[int, float]:
    """A side's figure for every seed that has it."""
    figures = {seed: figure(run, side) for seed, run in sorted(results.get(side.arm, {}).items())}
    return {seed: value for seed, value in figures.items() if value is not None}


def estimate(results: Results, side: Side) -> Estimate | None:
    """Mean and interval of a side; None without runs."""
    values = list(by_seed(results, side).values())
    return Estimate.of(values) if values else None


def judge(claim: Claim, results: Results) -> Verdict:
    """Compare the two sides of a claim, seed by seed.

    ``more`` is reproduced where the whole interval lies above 0, ``same`` where it lies within the margin on both sides
    of 0, ``not less`` where it lies above minus the margin. Not reproduced is what lies wholly outside; all else is
    undecided.
    """
    ours, theirs = by_seed(results, claim.ours), by_seed(results, claim.theirs)
    seeds = tuple(sorted(ours.keys() & theirs.keys()))
    if not seeds:
        return Verdict(claim, (), None, "undecided")
    found = Estimate.of([ours[seed] - theirs[seed] for seed in seeds])
    least, most = {
        "more": (0.0, math.inf), "same": (-claim.margin, claim.margin), "not less": (-claim.margin, math.inf),
    }[claim.expects]  # fmt: skip
    if least < found.low and found.high < most:
        return Verdict(claim, seeds, found, "reproduced")
    if found.high < least or most < found.low:
        return Verdict(claim, seeds, found, "not reproduced")
    return Verdict(claim, seeds, found, "undecided", _seeds_needed(found, (least, most)))


def judge_all(experiment: Experiment, results: Results) -> list[Verdict]:
    """The verdicts on all claims of an experiment."""
    return [judge(claim, results) for claim in experiment.claims]


def minutes(results: Results, arms: Sequence[str]) -> float:
    """How long the runs of some arms took, training and measuring, added up; each had one core."""
    return sum(sum(run["seconds"].values()) for arm in arms for run in results.get(arm, {}).values()) / 60


def _half(spread: float, count: int) -> float:
    """Half the width of Student's interval of 95 %."""
    return float(t.ppf(0.975, count - 1)) * spread / math.sqrt(count)


def _seeds_needed(found: Estimate, limits: tuple[float, float]) -> int | None:
    """How many seeds until the interval no longer holds the limit that is nearest to the mean."""
    if len(found.values) < 2:
        return None
    distance = min(abs(found.mean - limit) for limit in limits)
    spread = float(np.std(found.values, ddof=1))
    counts = range(len(found.values) + 1, MOST_SEEDS + 1)
    return next((count for count in counts if _half(spread, count) < distance), None)
