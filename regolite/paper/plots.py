"""The figures of notebook 14: learning curves, final metrics, claims, IoU histograms and relations.

All show the results of every seed besides the means. Arms without runs are left out, so that figures can be drawn while
experiments are running.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import patheffects
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from regolite.paper.experiments import Claim, Side
from regolite.paper.runner import BINS
from regolite.paper.statistics import Estimate, Results, Verdict, by_seed
from regolite.plots.drawing import BLUE, GRAY, GREEN, INK, ORANGE, PURPLE, SKY, VERMILLION, stage_color, style_axes
from regolite.types import stage_name

COLORS = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY)
MARKERS = ("o", "s", "^", "D", "P", "v")
SEED_MARKERS = ("o", "s", "^", "D", "P")
AGAINST = {
    "epochs": "epochs",
    "minutes": "minutes of one core",
    "multiply-adds": "multiply-adds of the forward passes, in 10¹²",
}
"""The x axes of learning curves, and their labels."""

WORDS = {"reproduced": (GREEN, "o"), "not reproduced": (VERMILLION, "s"), "undecided": (GRAY, "D")}
"""Color and marker of each verdict."""

PALE = "#DCEFE8"  # color of the range where an interval must lie
LINEAR = 3  # a symmetric logarithmic axis is linear up to this difference
LABELS = 284  # width of the column of claims, in points


# ------------------------------------------------------------------------------------------------------- learning


def plot_learning(
    results: Results,
    groups: Mapping[str, Sequence[str]],
    against: Sequence[str] = ("epochs",),
    costs: Mapping[str, Mapping[str, float]] | None = None,
    inside: bool = True,
) -> Figure:
    """AP on the validation scenes during training (Figure 3): thin lines are seeds, thick lines are their means.

    Hollow triangles mark learning rate drops; dashed lines are the base detector inside REGO.

    Args:
        results: results of the arms.
        groups: arms by legend label; those of one label share a color.
        against: the x axes, of :data:`AGAINST`, one panel each.
        costs: ``step`` and ``macs`` of each arm (:func:`regolite.paper.cost.costs`), needed for all axes but epochs;
            arms without them are left out.
        inside: draw the base detector inside REGO too.
    """
    drawn = [name for name in against if name == "epochs" or costs]
    figure = Figure((max(6.4, 3.2 * len(drawn)), 4.2), dpi=100, layout="constrained")
    handles: list[Line2D] = []
    for ax, axis in zip(np.atleast_1d(figure.subplots(1, max(len(drawn), 1), sharey=True)), drawn):
        style_axes(ax, f"AP by {axis}", AGAINST[axis])
        handles = []
        for number, (name, arms) in enumerate(groups.items()):
            color, marker = COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)]
            done = [arm for arm in arms if results.get(arm) and (axis == "epochs" or arm in (costs or {}))]
            for arm in done:
                _draw_curves(ax, results[arm], axis, (costs or {}).get(arm), color, marker, inside)
            if done:
                handles.append(Line2D([], [], label=name, markersize=4, color=color, marker=marker))
        ax.set_xlim(left=0)
        ax.set_ylim(bottom=0)
    marks = [Line2D([], [], label="learning rate ÷ 10", linestyle="", marker="v", markersize=9, color=INK,
                    markerfacecolor="white")]  # fmt: skip
    if inside and any(len(_points(run, 0)[1]) for arms in groups.values() for arm in arms
                      for run in results.get(arm, {}).values() if len(run["stages"]) > 1):  # fmt: skip
        marks.append(Line2D([], [], label="base detector inside REGO", linestyle="--", color=INK))
    _legend(figure, [*handles, *marks])
    return figure


def _draw_curves(
    ax: Axes,
    runs: Mapping[int, Mapping[str, Any]],
    axis: str,
    cost: Mapping[str, float] | None,
    color: str,
    marker: str,
    inside: bool,
) -> None:
    """The learning curves of one arm."""
    some = next(iter(runs.values()))
    epochs, _, steps = _points(some, -1)
    batch = some["config"]["batch_size"]
    scale = {"epochs": 1.0} | (
        {"minutes": cost["step"] / 60, "multiply-adds": cost["macs"] * batch / 1e12} if cost else {}
    )
    x = [scale[axis] * value for value in (epochs if axis == "epochs" else steps)]
    for run in runs.values():
        ax.plot(x, _points(run, -1)[1], color=color, linewidth=0.7, alpha=0.45)
    mean = np.mean([_points(run, -1)[1] for run in runs.values()], axis=0)
    ax.plot(x, mean, linewidth=2.2, markersize=4, color=color, marker=marker)
    if inside and len(some["stages"]) > 1:
        base = np.mean([_points(run, 0)[1] for run in runs.values()], axis=0)
        ax.plot(x, base, color=color, linewidth=1.4, linestyle="--")
    for drop in some["config"]["drop_epochs"]:
        place = np.interp(drop, epochs, x), np.interp(drop, epochs, mean)
        ax.plot(*place, "v", markersize=9, markerfacecolor="white", markeredgecolor=color, zorder=4)


def _points(run: Mapping[str, Any], stage: int) -> tuple[list[float], list[float], list[int]]:
    """Epochs, AP of a stage (NaN if not measurable) and steps of a run's evaluations."""
    curve = run["curve"]
    values = [math.nan if p["AP"][stage] is None else p["AP"][stage] for p in curve]
    return [float(p["epoch"]) for p in curve], values, [p["step"] for p in curve]


# ----------------------------------------------------------------------------------------------------------- arms


def plot_arms(results: Results, panels: Mapping[str, Mapping[str, Side]]) -> Figure:
    """Final metrics of arms: a small mark for every seed, and the mean with its 95 % t interval.

    Thin lines join the marks of one seed: if they are parallel, paired differences vary less than the seeds.

    Args:
        results: results of the arms.
        panels: by title, the sides by row label. Rows without runs are left out.
    """
    count = max((sum(bool(by_seed(results, side)) for side in rows.values()) for rows in panels.values()), default=0)
    figure = Figure((min(9.6, 3.2 + 3.2 * len(panels)), 1.5 + 0.42 * max(count, 2)), dpi=100, layout="constrained")
    seeds: set[int] = set()
    axes = np.atleast_1d(figure.subplots(1, len(panels)))
    for ax, (title, rows) in zip(axes, panels.items()):
        style_axes(ax, title)
        ax.grid(visible=False)
        ax.grid(axis="x", color="#E6E6E6", linewidth=0.8)
        there = {name: values for name, side in rows.items() if (values := by_seed(results, side))}
        for seed in sorted({seed for values in there.values() for seed in values}):
            points = [(values[seed], row) for row, values in enumerate(there.values()) if seed in values]
            ax.plot(*zip(*points), color="#B8B8B8", linewidth=0.8, zorder=1)
            marker = SEED_MARKERS[seed % len(SEED_MARKERS)]
            ax.plot(*zip(*points), marker, color="white", markeredgecolor=GRAY, markersize=5, zorder=2)
            seeds.add(seed)
        for row, values in enumerate(there.values()):
            found = Estimate.of(list(values.values()))
            if len(values) > 1:
                ax.plot([found.low, found.high], [row + 0.24] * 2, color=BLUE, linewidth=2.4, solid_capstyle="butt")
            ax.plot(found.mean, row + 0.24, "|", color=BLUE, markersize=13, markeredgewidth=2.4)
            end = found.high if len(values) > 1 else found.mean
            seam = [patheffects.Stroke(linewidth=2.5, foreground="white"), patheffects.Normal()]
            ax.annotate(f"{found.mean:.1f}", (end, row + 0.24), (6, 0), textcoords="offset points", va="center",
                        fontsize=8, color=INK, path_effects=seam)  # fmt: skip
        ax.set_yticks(range(len(there)), list(there))
        ax.tick_params(axis="y", length=0, labelcolor=INK)
        ax.set_ylim(len(there) - 0.2 if there else 1, -0.5)
        ax.margins(x=0.12)
        ax.xaxis.set_major_locator(MaxNLocator(nbins=6))
        if ax is not axes[0] and list(there) == [label.get_text() for label in axes[0].get_yticklabels()]:
            ax.set_yticklabels([])
    marks = [Line2D([], [], linestyle="", marker=SEED_MARKERS[seed % len(SEED_MARKERS)], color="white",
                    markeredgecolor=GRAY, label=f"seed {seed}") for seed in sorted(seeds)]  # fmt: skip
    _legend(figure, [*marks, Line2D([], [], color=BLUE, linewidth=2.4, label="mean, 95 % interval")])
    return figure


# --------------------------------------------------------------------------------------------------------- claims


def plot_claims(verdicts: Mapping[str, Iterable[Verdict]]) -> Figure:
    """A forest plot: for every claim the difference with its interval, the range that it must lie in, and the verdict.

    A claim is reproduced only if the whole interval lies in the pale green range: above 0, or within the margin. A
    hollow diamond is the paper's difference, on COCO. An arrow marks an interval that extends beyond the axis; one seed
    has no interval. With large differences the axis is logarithmic beyond 3, so that small ones remain readable.

    Args:
        verdicts: verdicts by experiment.
    """
    rows: list[str | Verdict] = []
    for name, several in verdicts.items():
        rows += [name, *several]
    judged = [(row.claim, row.difference) for row in rows if isinstance(row, Verdict) and row.difference is not None]
    heights = np.cumsum([0.0, *(0.7 if isinstance(row, str) else 1.0 for row in rows)])
    figure = Figure((9.6, 1.3 + 0.36 * heights[-1]), dpi=100)
    tall = figure.get_figheight()
    ax = figure.add_axes((0.42, 0.8 / tall, 0.425, 1 - 0.95 / tall))
    style_axes(ax, "", "difference in points, ours less theirs, paired by seed")
    left, right = _range(judged)
    for row, place in zip(rows, heights):
        if isinstance(row, str):
            ax.annotate(row, (left, place + 0.05), (-LABELS, 0), textcoords="offset points", va="center", fontsize=9,
                        fontweight="bold", color=INK, annotation_clip=False)  # fmt: skip
        else:
            _draw_claim(ax, row, place, left, right)
    ax.axvline(0, color=INK, linewidth=1)
    if max(-left, right) > 3 * LINEAR:
        ax.set_xscale("symlog", linthresh=LINEAR, linscale=1.6)
        ticks = [tick for tick in (-30, -10, -LINEAR, -2, -1, 0, 1, 2, LINEAR, 10, 30) if left < tick < right]
        ax.set_xticks(ticks, [str(tick) for tick in ticks])
        ax.minorticks_off()
    else:
        ax.xaxis.set_major_locator(MaxNLocator(nbins=8))
    ax.set_xlim(left, right)
    ax.set_ylim(heights[-1] - 0.3, -0.6)
    ax.set_yticks([])
    ax.grid(visible=False)
    ax.spines["left"].set_visible(False)
    handles: list[Artist] = [
        Line2D([], [], color=color, marker=marker, label=word) for word, (color, marker) in WORDS.items()
    ]
    handles += [Line2D([], [], linestyle="", marker="d", color="white", markeredgecolor=INK, markersize=7,
                       label="paper, on COCO"), Patch(color=PALE, label="reproduced only if all in here")]  # fmt: skip
    figure.legend(handles=handles, loc="lower center", ncols=len(handles), frameon=False, fontsize=8.5)
    return figure


def _draw_claim(ax: Axes, verdict: Verdict, row: float, left: float, right: float) -> None:
    claim, found = verdict.claim, verdict.difference
    low = 0.0 if claim.expects == "more" else -claim.margin
    high = claim.margin if claim.expects == "same" else right
    ax.fill_between([max(low, left), min(high, right)], row - 0.42, row + 0.42, color=PALE, linewidth=0, zorder=0)
    beside: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": 8, "annotation_clip": False}
    ax.annotate(textwrap.fill(claim.text, 62), (left, row), (-LABELS, 0), color=INK, linespacing=0.95, **beside)
    color, marker = WORDS[verdict.word]
    word = verdict.word if found is not None else "no runs yet"
    ax.annotate(f"{word} ({len(verdict.seeds)})", (right, row), (8, 0), color=color, fontweight="bold", **beside)
    if claim.paper is not None:
        ax.plot(claim.paper, row, "d", color="white", markeredgecolor=INK, markersize=7, zorder=3)
    if found is None:
        return
    if found.bounded:
        ends = max(found.low, left), min(found.high, right)
        ax.plot(ends, [row, row], color=color, linewidth=2, solid_capstyle="butt", zorder=2)
        for end, beyond, arrow in ((left, found.low < left, "<"), (right, found.high > right, ">")):
            if beyond:
                ax.plot(end, row, arrow, color=color, markersize=6, clip_on=False, zorder=2)
    ax.plot(found.mean, row, marker, color=color, markersize=6, markeredgecolor="white", zorder=4)


def _range(judged: Sequence[tuple[Claim, Estimate]]) -> tuple[float, float]:
    """The ends of the axis, from all means, margins and differences of the paper, and intervals not much wider."""
    points = [0.0, *(found.mean for _, found in judged), *(s * claim.margin for claim, _ in judged for s in (-1, 1)),
              *(claim.paper for claim, _ in judged if claim.paper is not None)]  # fmt: skip
    low, high = min(points), max(points)
    wide = 0.35 * (high - low) + 0.5
    ends = [end for _, found in judged for end in (found.low, found.high) if low - wide < end < high + wide]
    low, high = min([low, *ends]), max([high, *ends])
    edge = 0.04 * (high - low) + 0.1
    return low - edge, high + edge


# ------------------------------------------------------------------------------------------- overlaps and relations


def plot_overlaps(results: Results, rows: Mapping[str, Side]) -> Figure:
    """Correct detections by IoU (Figure 4), per 100 objects: bars are means, lines are intervals over seeds.

    Args:
        results: results of the arms.
        rows: arm and stage of each group of bars, by name; the color is the stage's, or gray for an arm without REGO.
    """
    figure = Figure((9.0, 3.9), dpi=100, layout="constrained")
    ax = figure.subplots()
    style_axes(ax, "Correct detections by IoU with their object", "IoU", "per 100 objects")
    there = {name: side for name, side in rows.items() if results.get(side.arm)}
    wide = 0.84 / max(len(there), 1)
    for number, (name, side) in enumerate(there.items()):
        runs = results[side.arm].values()
        stages = len(next(iter(runs))["stages"])
        color = GRAY if stages == 1 else stage_color(side.stage % stages)
        shares = np.array([_shares(run, side.stage) for run in runs])  # [seeds, bins]
        at = np.arange(len(BINS)) - 0.42 + wide * (number + 0.5)
        ax.bar(at, shares.mean(0), 0.9 * wide, color=color, label=name)
        _intervals(ax, at, shares)
        ink = INK if color in (SKY, ORANGE, PURPLE) else "white"
        for x, share in zip(at, shares.mean(0)):
            ax.annotate(
                f"{share:.0f}", (x, 0), (0, 3), textcoords="offset points", ha="center", fontsize=7.5, color=ink
            )
    ax.set_xticks(range(len(BINS)), [f"{low:.1f} to {low + 0.1:.1f}" for low in BINS])
    ax.tick_params(axis="x", length=0)
    ax.set_ylim(bottom=0)
    _legend(figure, ax.get_legend_handles_labels()[0])
    return figure


def plot_relations(results: Results, arms: Mapping[str, str]) -> Figure:
    """How often the most related object decides a ball's class (A.3): by stage, with chance and the nearest object.

    Args:
        results: results of the arms.
        arms: arms with REGO by title, one panel each. Those without runs or without balls are left out.
    """
    there = {title: [run["relations"] for run in results.get(arm, {}).values() if run["relations"]]
             for title, arm in arms.items()}  # fmt: skip
    there = {title: relations for title, relations in there.items() if relations}
    figure = Figure((max(5.0, min(9.6, 3.2 * len(there))), 3.8), dpi=100, layout="constrained")
    handles: list[Any] = []
    for ax, (title, relations) in zip(
        np.atleast_1d(figure.subplots(1, max(len(there), 1), sharey=True)), there.items()
    ):
        style_axes(ax, title, "", "% of the balls" if not handles else "")
        scores = np.array([[math.nan if s is None else s for s in one["stages"]] for one in relations])
        at = np.arange(scores.shape[1])
        ax.bar(at, scores.mean(0), 0.62, color=[stage_color(stage) for stage in range(len(at))])
        _intervals(ax, at, scores)
        for row in scores:
            ax.plot(at, row, "o", color="white", markeredgecolor=INK, markersize=4, zorder=4)
        handles = [
            ax.axhline(
                np.mean([one[rival] for one in relations]), color=INK, linestyle=dashes, linewidth=1.2, label=name
            )
            for rival, dashes, name in (("nearest", "-.", "the nearest object"), ("chance", ":", "chance"))
        ]
        ax.set_xticks(at, [stage_name(int(stage)).replace(" ", "\n", 1) for stage in at])
        ax.tick_params(axis="x", length=0, labelcolor=INK)
        ax.set_ylim(0, 100)
    seed = Line2D([], [], linestyle="", marker="o", color="white", markeredgecolor=INK, markersize=4, label="a seed")
    _legend(figure, [*handles, seed])
    return figure


def _shares(run: Mapping[str, Any], stage: int) -> list[float]:
    """Correct detections of a stage in each bin of IoU, per 100 objects."""
    return [100 * count / run["objects"] for count in run["stages"][stage]["by_iou"]]


def _intervals(ax: Axes, at: np.ndarray, values: np.ndarray) -> None:
    """The t interval of each column's mean, if there are several rows."""
    if len(values) > 1:
        for x, column in zip(at, values.T):
            found = Estimate.of(column.tolist())
            ax.plot([x, x], [found.low, found.high], color=INK, linewidth=1.2, zorder=3)


def _legend(figure: Figure, handles: Sequence[Any]) -> None:
    """One legend below all panels."""
    inches = 0.7 + 0.075 * max((len(str(handle.get_label())) for handle in handles), default=0)
    columns = max(1, min(len(handles), int(figure.get_figwidth() / inches)))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=8.5)
