"""Verdicts on claims: intervals of differences, p values, and the rule.

**Interval.** Two arms with the same seed see the same images in the same order and start from the same base detector.
They are compared by the mean of their differences by seed, with its 95 % t interval (:meth:`Estimate.of`). Arms without
two seeds in common are compared by Welch's interval, which has its own degrees of freedom (:meth:`Estimate.welch`).

**Images.** An interval over seeds is about other seeds and the same test images. Where runs hold AP on bootstrap
samples of the test images (``resampled``), the variance of the mean difference over these samples is added
(:func:`image_variance`), and the interval is about other images as well. All runs share their test images, so a sample
is drawn for all seeds at once: the images are crossed with the seeds, and more seeds do not average their effect out.

**Rule.** p is the probability of such data if the claim were false. It is twice the one-sided p, so that p < 0.05 is
the same as a 95 % interval inside the range of the claim: above 0 for ``more``, above minus the margin for ``not
less``, within the margin on both sides for ``same`` (two one-sided tests, TOST). All claims of a study are one family,
and Holm's method adjusts their p (:func:`holm`). A claim is

- **reproduced** if its adjusted p is below 0.05;
- **not reproduced** if its 95 % interval shows the opposite: for ``more``, less; for ``same`` and ``not less``, a
  difference where the claim has none (or no loss), unless the interval lies in the range of the claim. This is not
  adjusted: a correction that turns losses into undecided claims would flatter;
- **undecided** otherwise, and always if the detector that it is compared with has not learned (:data:`LEARNED`).

A verdict is about the direction of an effect, or about a margin. It says nothing about its size:
:attr:`Verdict.covers_paper` tells whether the interval contains the paper's difference.
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
from regolite.paper.experiments import ARMS, EXPERIMENTS, Claim, Experiment, Side

MOST_SEEDS = 100
LEVEL = 0.05
"""A claim is reproduced if its p, adjusted for the number of claims, is below this."""

LEARNED = 2.0
"""Least mean AP of the side that a claim compares with; below, it has not learned and the claim is not tested."""

Results = Mapping[str, Mapping[int, Mapping[str, Any]]]
"""Results of runs, by arm and seed."""


@dataclass(frozen=True)
class Estimate:
    """An estimated mean or difference of means, with its 95 % confidence interval.

    Attributes:
        values: one value per seed; empty for a difference without pairs.
        mean: the estimate.
        error: its standard error; infinity if unknown, as with one seed.
        freedom: degrees of freedom of the error.
    """

    values: tuple[float, ...]
    mean: float
    error: float = math.inf
    freedom: float = math.inf

    @staticmethod
    def of(values: Sequence[float], image_variance: float = 0.0, images: int = 0) -> Estimate:
        """The mean of at least one value and its t interval.

        Args:
            values: one value per seed.
            image_variance: variance of the mean between samples of the test images; 0 for an interval over seeds alone.
            images: number of test images, for the degrees of freedom of this variance.
        """
        count, mean = len(values), float(np.mean(values))
        if count < 2:
            return Estimate(tuple(values), mean)
        parts = [(float(np.var(values, ddof=1)) / count, count - 1.0)]
        parts += [(image_variance, images - 1.0)] if image_variance else []
        return Estimate(tuple(values), mean, *_error(parts))

    @staticmethod
    def welch(ours: Sequence[float], theirs: Sequence[float]) -> Estimate:
        """The difference of two means without pairs, with Welch's interval; at least two values each."""
        parts = [(float(np.var(values, ddof=1)) / len(values), len(values) - 1.0) for values in (ours, theirs)]
        return Estimate((), float(np.mean(ours) - np.mean(theirs)), *_error(parts))

    @property
    def bounded(self) -> bool:
        """Whether there is an interval."""
        return math.isfinite(self.error)

    @property
    def low(self) -> float:
        """Lower end of the interval; minus infinity without one."""
        return self.mean - self.half

    @property
    def high(self) -> float:
        """Upper end of the interval; infinity without one."""
        return self.mean + self.half

    @property
    def half(self) -> float:
        """Half the width of the interval; infinity without one."""
        return float(t.ppf(1 - LEVEL / 2, self.freedom)) * self.error if self.bounded else math.inf

    def p(self, least: float, most: float) -> float:
        """Twice the larger one-sided p of the two tests that the true value is above ``least`` and below ``most``."""
        if not self.bounded:
            return 1.0
        distance = min(self.mean - least, most - self.mean)
        if self.error == 0:
            return 0.0 if distance > 0 else 1.0
        return min(1.0, 2 * float(t.sf(distance / self.error, self.freedom)))

    def __str__(self) -> str:
        """Mean and interval."""
        interval = f" [{self.low:+.1f}, {self.high:+.1f}]" if self.bounded else ""
        return f"{self.mean:+.1f}{interval}"


@dataclass(frozen=True)
class Verdict:
    """The verdict on a claim.

    Attributes:
        claim: the claim.
        seeds: the seeds of both sides; without pairs, of either.
        difference: ours minus theirs; None without runs to compare.
        word: the verdict.
        p: probability of such data if the claim were false; see the module docstring.
        adjusted: p, adjusted for the family of claims by Holm's method.
        seeds_needed: if undecided, the number of seeds needed for a verdict at the current mean and standard deviation;
            None if more than 100, or unknown.
        note: what limits the comparison, if anything.
    """

    claim: Claim
    seeds: tuple[int, ...]
    difference: Estimate | None
    word: Literal["reproduced", "not reproduced", "undecided"] = "undecided"
    p: float = 1.0
    adjusted: float = 1.0
    seeds_needed: int | None = None
    note: str = ""

    @property
    def covers_paper(self) -> bool | None:
        """Whether the interval contains the paper's difference; None without a published one or without an interval."""
        if self.claim.paper is None or self.difference is None or not self.difference.bounded:
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


def compare(claim: Claim, results: Results) -> tuple[tuple[int, ...], Estimate | None, str]:
    """The seeds of a comparison, the difference of its sides, and a note on what limits it."""
    ours, theirs = by_seed(results, claim.ours), by_seed(results, claim.theirs)
    seeds = tuple(sorted(ours.keys() & theirs.keys()))
    if len(seeds) < 2 and min(len(ours), len(theirs)) > 1:
        found = Estimate.welch(list(ours.values()), list(theirs.values()))
        return tuple(sorted(ours.keys() | theirs.keys())), found, "without pairs, by Welch's interval"
    if not seeds:
        return (), None, ""
    variance, images = image_variance(claim, results, seeds)
    found = Estimate.of([ours[seed] - theirs[seed] for seed in seeds], variance, images)
    return seeds, found, "over seeds and images" if images else ""


def image_variance(claim: Claim, results: Results, seeds: Sequence[int]) -> tuple[float, int]:
    """Variance of the mean difference between samples of the test images, and the number of these images.

    Runs hold ``resampled``: AP on the same bootstrap samples of the test images, by stage. Both are 0 if a run has
    none, or if the claim is not about AP.
    """
    if (claim.ours.metric, claim.theirs.metric) != ("AP", "AP"):
        return 0.0, 0
    runs = [(results[claim.ours.arm][seed], results[claim.theirs.arm][seed]) for seed in seeds]
    if any("resampled" not in run for pair in runs for run in pair):
        return 0.0, 0
    differences = [
        np.subtract(a["resampled"]["AP"][claim.ours.stage], b["resampled"]["AP"][claim.theirs.stage]) for a, b in runs
    ]  # [seeds, samples]
    return float(np.var(np.mean(differences, axis=0), ddof=1)), runs[0][0]["resampled"]["images"]


def holm(ps: Sequence[float]) -> list[float]:
    """Adjust the p values of a family by Holm's step-down method (1979), which controls the familywise error rate.

    The smallest of m is multiplied by m, the next by m - 1, and so on; none becomes smaller than the one before it.
    """
    order = np.argsort(ps, kind="stable")
    steps = np.maximum.accumulate(np.asarray(ps)[order] * np.arange(len(ps), 0, -1)).clip(max=1.0)
    return [float(p) for p in steps[np.argsort(order)]]


def judge_family(claims: Sequence[Claim], results: Results) -> list[Verdict]:
    """The verdicts on the claims of a study, by the rule in the module docstring.

    Args:
        claims: all claims of the study, which share the familywise error rate. Those without runs count too, so
            that a study that is not finished is judged as strictly as it will be.
        results: results by arm and seed.
    """
    compared = [compare(claim, results) for claim in claims]
    ps = [1.0 if found is None else found.p(*_range(claim)) for claim, (_, found, _) in zip(claims, compared)]
    return [
        _verdict(claim, *one, p, adjusted, results) for claim, one, p, adjusted in zip(claims, compared, ps, holm(ps))
    ]


def judge(claim: Claim, results: Results) -> Verdict:
    """The verdict on a claim that is a family of its own, as in a study with one question."""
    return judge_family([claim], results)[0]


def judge_all(results: Results, experiments: Mapping[str, Experiment] = EXPERIMENTS) -> dict[str, list[Verdict]]:
    """The verdicts on all claims of a study by experiment, all of them one family."""
    verdicts = iter(judge_family([claim for one in experiments.values() for claim in one.claims], results))
    return {name: [next(verdicts) for _ in one.claims] for name, one in experiments.items()}


def minutes(results: Results, arms: Sequence[str]) -> float:
    """Total minutes of the runs of some arms, training and evaluation, with one core each."""
    return sum(sum(run["seconds"].values()) for arm in arms for run in results.get(arm, {}).values()) / 60


def _error(parts: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Standard error and degrees of freedom (Welch-Satterthwaite) of a sum of independent variances.

    Args:
        parts: variances of means, each with its degrees of freedom.
    """
    total = sum(variance for variance, _ in parts)
    if total == 0:
        return 0.0, parts[0][1]
    return math.sqrt(total), total**2 / sum(variance**2 / freedom for variance, freedom in parts)


def _range(claim: Claim) -> tuple[float, float]:
    """Where the difference must lie if the claim is true."""
    return {
        "more": (0.0, math.inf), "same": (-claim.margin, claim.margin), "not less": (-claim.margin, math.inf),
    }[claim.expects]  # fmt: skip


def _verdict(
    claim: Claim,
    seeds: tuple[int, ...],
    found: Estimate | None,
    note: str,
    p: float,
    adjusted: float,
    results: Results,
) -> Verdict:
    """The verdict on a claim with its p values."""
    if found is None:
        return Verdict(claim, seeds, None)
    rival = [value for seed, value in by_seed(results, claim.theirs).items() if seed in seeds]
    if claim.theirs.metric == "AP" and np.mean(rival) < LEARNED:
        note = f"not tested: what it is compared with has AP {np.mean(rival):.1f} and has not learned"
        return Verdict(claim, seeds, found, p=p, adjusted=adjusted, note=note)
    if adjusted < LEVEL:
        return Verdict(claim, seeds, found, "reproduced", p, adjusted, note=note)
    opposite = found.high < 0 or (claim.expects == "same" and found.low > 0)
    if opposite and p >= LEVEL:
        return Verdict(claim, seeds, found, "not reproduced", p, adjusted, note=note)
    needed = _seeds_needed(found, claim, adjusted / p)
    return Verdict(claim, seeds, found, "undecided", p, adjusted, needed, note)


def _seeds_needed(found: Estimate, claim: Claim, factor: float) -> int | None:
    """Number of seeds until a verdict, if mean and standard deviation between seeds stay the same.

    Args:
        found: the difference, paired by seed.
        claim: the claim.
        factor: factor of Holm's adjustment.
    """
    if len(found.values) < 2:
        return None
    least, most = _range(claim)
    spread = float(np.std(found.values, ddof=1))
    for count in range(len(found.values) + 1, MOST_SEEDS + 1):
        then = Estimate((), found.mean, spread / math.sqrt(count), count - 1.0)
        opposite = then.high < 0 or (claim.expects == "same" and then.low > 0)
        p = then.p(least, most)
        if p * factor < LEVEL or (opposite and p >= LEVEL):
            return count
    return None
