"""Results as text: completed runs, metrics of the arms, verdicts on the claims."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from regolite.paper.experiments import ARMS, EXPERIMENTS, Experiment, Side
from regolite.paper.statistics import Results, Verdict, estimate, judge_all, minutes

UNITS = {"correct": "per 100 objects", "precise": "per 100 objects", "relation": "points"}


def overview(results: Results) -> str:
    """All experiments with their progress."""
    lines = [f"{'experiment':<15}{'runs':>9}{'hours':>7}   question"]
    for name, one in EXPERIMENTS.items():
        total = sum(len(ARMS[arm].seeds) for arm in one.arms)
        done = sum(len(set(results.get(arm, {})) & set(ARMS[arm].seeds)) for arm in one.arms)
        hours = minutes(results, one.arms) / 60
        lines.append(f"{name:<15}{f'{done}/{total}':>9}{hours:7.1f}   {one.question}")
    hours = minutes(results, list(ARMS)) / 60
    lines += ["", f"{hours:.1f} hours of one core in all, counting arms of several experiments once."]
    return "\n".join(lines)


def as_text(experiment: Experiment, results: Results) -> str:
    """The arms of an experiment and the verdicts on its claims."""
    lines = [experiment.question, "", _row("", "seeds", ("AP", "AP50", "AP75", "balls", "others"))]
    for arm in experiment.arms:
        if not results.get(arm):
            lines.append(f"{ARMS[arm].about:<40}{'none yet':>8}")
            continue
        figures = (estimate(results, Side(arm, metric=m)) for m in ("AP", "AP50", "AP75", "balls", "others"))
        values = ["-" if found is None else f"{found.mean:.1f}" for found in figures]
        lines.append(_row(ARMS[arm].about, str(len(results[arm])), values))
    [verdicts] = [found for name, found in judge_all(results).items() if EXPERIMENTS[name] is experiment]
    for verdict in verdicts:
        lines += ["", *textwrap.wrap(f"{verdict.claim.text} ({verdict.claim.source})", 100), f"    {said(verdict)}"]
    return "\n".join(lines)


def said(verdict: Verdict) -> str:
    """A verdict in one line."""
    if verdict.difference is None:
        return "no runs yet"
    unit = UNITS.get(verdict.claim.ours.metric, "AP")
    paper = "" if verdict.claim.paper is None else f", the paper {verdict.claim.paper:+.1f}"
    if verdict.covers_paper is not None:
        paper += " (inside the interval)" if verdict.covers_paper else " (outside the interval)"
    count, needed = len(verdict.seeds), ""
    if not verdict.difference.bounded:
        return f"undecided with 1 seed, which has no interval: {verdict.difference} {unit}{paper}"
    evidence = f", p {_p(verdict.p)}, by Holm {_p(verdict.adjusted)}"
    note = f" ({verdict.note})" if verdict.note else ""
    if verdict.word == "undecided" and not note.startswith(" (not tested"):
        needed = f"; it would take {verdict.seeds_needed or 'more than 100'} seeds"
    return f"{verdict.word} with {count} seeds{note}: {verdict.difference} {unit}{evidence}{paper}{needed}"


def _p(p: float) -> str:
    """A p value with one significant digit, two below 0.1."""
    return "< 0.0001" if p < 1e-4 else f"{p:.2g}" if p < 0.1 else f"{p:.1f}"


def _row(name: str, seeds: str, values: Sequence[str]) -> str:
    return f"{name:<40}{seeds:>8}" + "".join(f"{value:>9}" for value in values)
