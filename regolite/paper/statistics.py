"""Verdicts on claims from paired differences by seed and their confidence intervals.

Two arms with the same seed see the same images in the same order and start from the same base detector. They are
therefore compared by the mean of the differences by seed, with its 95 % t interval. The interval covers the variation
between seeds; the 500 test scenes are the same for all runs. With three seeds its half-width is 2.5 times the standard
deviation of the differences, but an interval without 0 is still significant.

A verdict is about the direction of an effect, or about a margin. It says nothing about its size:
:attr:`Verdict.covers_paper` tells whether the interval contains the paper's difference.

With more than twenty claims at 95 %, expect about one interval to miss the true difference by chance.
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
"""Results of runs, by arm and seed."""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95 % confidence interval.

    Attributes:
        values: one value per seed.
        mean: their mean.
        low: lower end of the interval; minus infinity with one seed.
        high: upper end of the interval; infinity with one seed.
    """

    values: tuple[float, ...]
    mean: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Estimate:
        """The mean and its t interval, of at least one value."""
        mean = float(np.mean(values))
        half = _half(float(np.std(values, ddof=1)), len(values)) if len(values) > 1 else math.inf
        return Estimate(tuple(values), mean, mean - half, mean + half)

    def __str__(self) -> str:
        """Mean and interval."""
        interval = f" [{self.low:+.1f}, {self.high:+.1f}]" if len(self.values) > 1 else ""
        return f"{self.mean:+.1f}{interval}"


@dataclass(frozen=True)
class Verdict:
    """The verdict on a claim.

    Attributes:
        claim: the claim.
        seeds: the seeds of both sides.
        difference: ours minus theirs, by seed; None without a common seed.
        word: the verdict.
        seeds_needed: if undecided, the number of seeds needed for a verdict at the current mean and standard deviation;
            None if more than 100, or unknown with one seed.
    """

    claim: Claim
    seeds: tuple[int, ...]
    difference: Estimate | None
    word: Literal["reproduced", "not reproduced", "undecided"]
    seeds_needed: int | None = None

    @property
    def covers_paper(self) -> bool | None:
        """Whether the interval contains the paper's difference; None without a published one or without an interval."""
        if self.claim.paper is None or self.difference is None or len(self.seeds) < 2:
            return None
        return self.difference.low <= self.claim.paper <= self.difference.high


def read_results(folder: str | Path, arms: Sequence[str] | None = None) -> dict[str, dict[int, dict[str, Any]]]:
    """The available results.

    Args:
        folder: folder of the files written by :func:`regolite.paper.queue.conduct`.
        arms: names of the arms; all by default.

    Raises:
        UserError: if a file is damaged, or there is none.
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
    """The metric of a side in one run; None if the run has none."""
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
    """The metric of a side, by seed."""
    figures = {seed: figure(run, side) for seed, run in sorted(results.get(side.arm, {}).items())}
    return {seed: value for seed, value in figures.items() if value is not None}


def estimate(results: Results, side: Side) -> Estimate | None:
    """Mean and interval of a side's metric; None without runs."""
    values = list(by_seed(results, side).values())
    return Estimate.of(values) if values else None


def judge(claim: Claim, results: Results) -> Verdict:
    """Compare the two sides of a claim by seed.

    ``more`` is reproduced if the whole interval lies above 0, ``same`` if it lies within the margin on both sides of 0,
    ``not less`` if it lies above minus the margin. A claim is not reproduced if the whole interval lies outside this
    range, and otherwise undecided.
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
    """Total minutes of the runs of some arms, training and evaluation, with one core each."""
    return sum(sum(run["seconds"].values()) for arm in arms for run in results.get(arm, {}).values()) / 60


def _half(spread: float, count: int) -> float:
    """Half the width of the 95 % t interval."""
    return float(t.ppf(0.975, count - 1)) * spread / math.sqrt(count)


def _seeds_needed(found: Estimate, limits: tuple[float, float]) -> int | None:
    """Number of seeds until the interval excludes the limit nearest to the mean."""
    if len(found.values) < 2:
        return None
    distance = min(abs(found.mean - limit) for limit in limits)
    spread = float(np.std(found.values, ddof=1))
    counts = range(len(found.values) + 1, MOST_SEEDS + 1)
    return next((count for count in counts if _half(spread, count) < distance), None)
