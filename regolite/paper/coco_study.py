"""The paper's claims on full COCO, as runs for a machine with GPUs: what to run first, and how verdicts follow.

Nothing here was run on COCO. The study consists of the paper's recipes (:mod:`regolite.paper.recipes`), each with
several seeds, and of claims that compare them. :func:`order` lists the runs by **information per GPU hour**: the next
runs are those that raise the expected number of decided claims most per hour that they cost. A claim is decided if its
interval lies in its range, which takes two seeds at least. The probability follows from the paper's difference, and
from a standard deviation between runs that is assumed (:data:`NOISE`), since the paper has no seeds. Runs that several
claims share are counted once.

Verdicts are computed from the ``metrics.jsonl`` of the runs by the rule of chapter 14
(:mod:`regolite.paper.statistics`), whatever is done so far.
"""

from __future__ import annotations

import math
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.stats import nct, t

from regolite.errors import UserError
from regolite.evaluation.run_comparison import Run
from regolite.paper.estimates import TFLOPS
from regolite.paper.experiments import Claim, Side
from regolite.paper.recipes import recipe
from regolite.paper.report import said
from regolite.paper.statistics import Verdict, judge_family

NOISE = 0.3
"""Assumed standard deviation of AP between runs that differ in their seed: what Sparse R-CNN's README reports."""

MARGIN = 0.5
"""Margin of claims without an effect, in AP: on COCO, differences of Table 3 are 0.1 and 0.2."""

MOST_SEEDS = 5

_BASE = "deformable_detr_r50_50ep"
_REGO = f"rego_{_BASE}"
_TWO = "deformable_detr_two_stage_r50_50ep"


def _same(text: str, source: str, ours: str, theirs: str, paper: float | None) -> Claim:
    return Claim(text, source, Side(ours), Side(theirs), paper, "same", MARGIN)


CLAIMS: tuple[Claim, ...] = (
    Claim("REGO ends higher after the same epochs.", "Table 1", Side(_REGO), Side(_BASE), 2.1),
    Claim("Trained with REGO, the base detector alone is better.", "Table 4", Side(_REGO, 0), Side(_BASE), 1.1),
    Claim("REGO at inference adds to that.", "Table 4", Side(_REGO), Side(_REGO, 0), 1.0),
    Claim("With 36 epochs REGO is not behind 50 without it.", "Figure 3",
          Side("rego_deformable_detr_r50_36ep"), Side(_BASE), 1.0, "not less", MARGIN),
    Claim("One stage helps.", "Table 2", Side(f"{_REGO}_1_stage"), Side(_BASE), 1.3),
    Claim("A second stage helps more.", "Table 2", Side(f"{_REGO}_2_stages"), Side(f"{_REGO}_1_stage"), 0.5),
    Claim("A third stage helps more.", "Table 2", Side(_REGO), Side(f"{_REGO}_2_stages"), 0.3),
    _same("A fourth stage hardly matters.", "Table 2", f"{_REGO}_4_stages", _REGO, 0.0),
    Claim("Coarse-to-fine glimpses beat alpha 1, 1, 1.", "section 5.3", Side(_REGO), Side(f"{_REGO}_alpha_1"), 0.6),
    _same("Glimpses 1.5 times as large hardly matter.", "Table 3", _REGO, f"{_REGO}_glimpses_1.5", 0.1),
    _same("Glimpses twice as large hardly matter.", "Table 3", _REGO, f"{_REGO}_glimpses_2", 0.2),
    _same("The released form is as good as the paper's.", "released code", _REGO, f"{_REGO}_released", None),
    Claim("REGO helps two-stage Deformable DETR.", "Table 1", Side(f"rego_{_TWO}"), Side(_TWO), 1.2),
    Claim("REGO helps DETR*.", "Table 1", Side("rego_detr_star_r50_50ep"), Side("detr_star_r50_50ep"), 3.0),
)  # fmt: skip
"""The claims of the study, one family."""


@dataclass(frozen=True)
class Planned:
    """A step of the study: the runs that it adds.

    Attributes:
        claim: the claim that it is for.
        runs: recipes and seeds that are added; empty if earlier steps have them all.
        hours: their GPU hours, estimated.
        chance: probability that the claim is decided after it.
        decided: expected number of decided claims of the whole study after it.
        total: GPU hours up to it.
    """

    claim: Claim
    runs: tuple[tuple[str, int], ...]
    hours: float
    chance: float
    decided: float
    total: float


def chance(claim: Claim, seeds: int, noise: float = NOISE) -> float:
    """Probability that the 95 % interval of a claim lies in its range, if the paper's difference is the true one.

    The power of a paired t test, and for ``same`` of two of them (the sum of both powers minus 1, a lower bound).

    Args:
        claim: the claim; without a published difference, 0 is taken.
        seeds: seeds of both sides; fewer than two have no interval.
        noise: standard deviation of AP between runs.
    """
    if seeds < 2:
        return 0.0
    error, critical, true = noise * math.sqrt(2 / seeds), t.ppf(0.975, seeds - 1), claim.paper or 0.0
    above = true if claim.expects == "more" else true + claim.margin
    power = float(nct.sf(critical, seeds - 1, above / error))
    if claim.expects == "same":
        power += float(nct.sf(critical, seeds - 1, (claim.margin - true) / error)) - 1
    return max(0.0, power)


def hours(name: str, tflops: float = TFLOPS, processes: int = 8) -> float:
    """Estimated GPU hours of one run of a recipe."""
    return recipe(name).estimate(processes, tflops).gpu_hours


def order(tflops: float = TFLOPS, noise: float = NOISE, seeds: int = MOST_SEEDS) -> list[Planned]:
    """The steps of the study, by expected number of claims that they decide per GPU hour.

    A step gives a claim one or more further seeds on both sides. A claim that is decided in 99 of 100 studies gets no
    more, and none gets more than ``seeds``.

    Args:
        tflops: sustained throughput of a GPU.
        noise: standard deviation between runs.
        seeds: most seeds of a recipe.
    """
    names = {side.arm for claim in CLAIMS for side in (claim.ours, claim.theirs)}
    cost = {name: hours(name, tflops) for name in names}
    done = dict.fromkeys(names, 0)
    steps: list[Planned] = []
    total = 0.0

    def decided(counts: Mapping[str, int]) -> float:
        return sum(chance(claim, _seeds(claim, counts), noise) for claim in CLAIMS)

    while True:
        best: tuple[float, Claim, dict[str, int]] | None = None
        for claim in CLAIMS:
            now = _seeds(claim, done)
            for count in range(now + 1, seeds + 1):
                if chance(claim, now, noise) >= 0.99:
                    break
                counts = {**done, **{side.arm: max(done[side.arm], count) for side in (claim.ours, claim.theirs)}}
                price = sum(cost[name] * (counts[name] - done[name]) for name in names)
                gain = (decided(counts) - decided(done)) / price
                if gain > 1e-6 and (best is None or gain > best[0]):
                    best = gain, claim, counts
        if best is None:
            return steps
        _, claim, counts = best
        runs = tuple(
            (name, seed) for seed in range(seeds) for name in _sides(claim) if done[name] <= seed < counts[name]
        )
        added = sum(cost[name] for name, _ in runs)
        total, done = total + added, counts
        steps.append(Planned(claim, runs, added, chance(claim, _seeds(claim, done), noise), decided(done), total))


def _sides(claim: Claim) -> tuple[str, ...]:
    """The recipes of a claim, each once."""
    return tuple(dict.fromkeys((claim.theirs.arm, claim.ours.arm)))


def _seeds(claim: Claim, counts: Mapping[str, int]) -> int:
    """Number of seeds that both sides have."""
    return min(counts[name] for name in _sides(claim))


def command(name: str, seed: int, data: str = "COCO", folder: str = "runs/coco_study", processes: int = 8) -> list[str]:
    """The arguments of ``python -m regolite`` that train a run, and resume it.

    Args:
        name: name of the recipe.
        seed: the seed.
        data: folder of COCO.
        folder: folder of the runs.
        processes: number of processes, one per GPU.
    """
    words = ["train", "--recipe", name, "--data", data, "--output", f"{folder}/{name}/{seed}", "--seed", str(seed)]
    return [*words, "--processes", str(processes), "--resume"]


def conduct(data: str, folder: str, processes: int = 8, tflops: float = TFLOPS) -> None:
    """Train all runs that are missing, in order, one after the other on all GPUs.

    Args:
        data: folder of COCO.
        folder: folder of the runs.
        processes: number of processes, one per GPU.
        tflops: sustained throughput of a GPU, for the order.

    Raises:
        UserError: when a run fails; give the command again to go on with it.
    """
    for step in order(tflops):
        for name, seed in step.runs:
            if not (Path(folder) / name / str(seed) / "model.safetensors").exists():
                words = command(name, seed, data, folder, processes)
                if subprocess.call([sys.executable, "-m", "regolite", *words]):
                    raise UserError(
                        f"{name}, seed {seed}, failed or was stopped: give the command again to go on with it"
                    )


def read(folder: str | Path) -> dict[str, dict[int, dict[str, Any]]]:
    """The results of finished runs by recipe and seed, from their ``metrics.jsonl``.

    Args:
        folder: folder of the runs, as ``FOLDER/RECIPE/SEED``.
    """
    names = {side.arm for claim in CLAIMS for side in (claim.ours, claim.theirs)}
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for name in sorted(names):
        for place in sorted((Path(folder) / name).glob("*")):
            if place.name.isdecimal() and (place / "model.safetensors").exists():  # written at the end of a training
                last = [line for line in Run.read(place).evaluations if line["split"] == "val"][-1]
                found.setdefault(name, {})[int(place.name)] = {"stages": last["stages"]}
    return found


def verdicts(folder: str | Path) -> list[Verdict]:
    """The verdicts on all claims, from the finished runs in a folder."""
    return judge_family(CLAIMS, read(folder))


def as_text(steps: Sequence[Planned], judged: Sequence[Verdict], data: str, folder: str, processes: int) -> str:
    """The plan, how to train its runs, and the verdicts so far."""
    lines = [
        f"{'step':>4}{'GPU hours':>11}{'in all':>9}{'decided':>9}   for the claim, and its chance of being decided"
    ]
    for number, step in enumerate(steps, 1):
        about = f"{step.claim.text} ({step.chance:.0%})"
        lines.append(f"{number:4}{step.hours:11.0f}{step.total:9.0f}{step.decided:9.1f}   {about}")
        seeds: dict[str, list[str]] = {}
        for name, seed in step.runs:
            seeds.setdefault(name, []).append(str(seed))
        lines += [f"{'':36}{name}, seeds {' '.join(numbers)}" for name, numbers in seeds.items()]
    words = command("RECIPE", 0, data, folder, processes)
    notes = (
        f"A run: python -m regolite {' '.join(words)}, with its recipe and seed.",
        "GPU hours are estimates (regolite recipes prints how), of all GPUs together. Decided: expected number of the "
        f"{len(CLAIMS)} claims whose interval lies in their range, before Holm's adjustment, if the paper's "
        f"differences are true and runs have a standard deviation of {NOISE} AP. Both are assumptions.",
        "Verdicts are computed from FOLDER/RECIPE/SEED/metrics.jsonl of the finished runs: AP of the last evaluation "
        "by stage, differences paired by seed, p by Holm over all claims.",
    )
    lines += ["", *(textwrap.fill(note, 112) for note in notes), ""]
    return "\n".join([*lines, *(f"{verdict.claim.text}\n    {said(verdict)}" for verdict in judged)])
