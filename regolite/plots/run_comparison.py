"""The figures of notebook 22: several runs in one image, told apart by color, by dashes and by marker."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from regolite.evaluation.run_comparison import AXES, Run, time_unit
from regolite.plots.drawing import BLUE, GRAY, GREEN, INK, ORANGE, PURPLE, SKY, VERMILLION, stage_color, style_axes
from regolite.plots.text import label_as_is, legend_as_is
from regolite.types import stage_name

COLORS = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY, INK)
DASHES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "P")
STAGE_MARKERS = ("o", "s", "^", "D", "P", "X")
TERMS = {"label": "class", "l1": "box, L1", "giou": "box, GIoU"}
"""The terms of the set loss."""


def run_style(number: int) -> dict[str, Any]:
    """How the lines of a run look: 140 runs are told apart, the first four by their dashes alone."""
    return {
        "color": COLORS[number % len(COLORS)],
        "linestyle": DASHES[number % len(DASHES)],
        "marker": MARKERS[number % len(MARKERS)],
        "markersize": 3.5,
        "linewidth": 1.6,
    }


def plot_convergence(
    runs: Sequence[Run], metric: str = "AP", stage: int | None = None, split: str = "val", axes: Sequence[str] = AXES
) -> Figure:
    """A figure against epochs, hours and images seen, a line a run (as Figure 3 of the paper).

    A hollow triangle marks where the learning rate was divided by ten, a gray line the first run's best.

    Args:
        runs: the runs, the one to compare with first.
        metric: AP, AP50, AP75, APs, APm or APl.
        stage: which stage; each run's last by default.
        split: on which images.
        axes: what to draw it against, of :data:`~regolite.evaluation.run_comparison.AXES`.
    """
    unit, per_hour = time_unit(max(run.hours for run in runs))
    names = {"epochs": "epochs", "hours": unit, "images": "images seen"}
    figure = Figure((3.3 * len(axes) + 0.2, 3.7), dpi=100, layout="constrained")
    of = "" if stage is None else f" of {'the ' * (stage == 0)}{stage_name(stage)}"
    goal = runs[0].best(metric, stage, split).value
    for ax, axis in zip(np.atleast_1d(figure.subplots(1, len(axes), sharey=True)), axes):
        scale = per_hour if axis == "hours" else 1.0
        style_axes(ax, f"{metric}{of} by {names[axis]}", names[axis])
        for number, run in enumerate(runs):
            x, y = run.curve(axis, metric, stage, split)
            ax.plot([scale * value for value in x], y, label=label_as_is(run.label), **run_style(number))
            _mark_drops(ax, run, [scale * value for value in x], y, run.curve("epochs", metric, stage, split)[0])
        if not math.isnan(goal):
            ax.axhline(goal, color=GRAY, linewidth=1, zorder=1, label=f"best of {runs[0].label}: {goal:.1f}")
        if any(run.drops for run in runs):
            ax.plot([], [], "v", markerfacecolor="white", markeredgecolor=INK, label="learning rate ÷ 10")
        if axis == "hours":
            ax.xaxis.set_major_locator(MaxNLocator(nbins=6))
        _from_zero(ax)
    _legend(figure, ax)
    return figure


def plot_stages(runs: Sequence[Run], metric: str = "AP", split: str = "val") -> Figure:
    """A figure of every stage against epochs, a panel a run.

    Args:
        runs: the runs.
        metric: AP, AP50, AP75, APs, APm or APl.
        split: on which images.
    """
    columns = min(3, len(runs))
    height = -(-len(runs) // columns)
    figure = Figure((3.3 * columns + 0.2, 2.9 * height + 0.6), dpi=100, layout="constrained")
    panels = figure.subplots(height, columns, sharex=True, sharey=True, squeeze=False).flat
    for run, ax in itertools.zip_longest(runs, panels):
        if run is None:
            ax.set_visible(False)
            continue
        style_axes(ax, run.label, "epochs")
        for stage in range(run.stages(split) + 1):
            look = {"color": stage_color(stage), "linestyle": DASHES[stage % 4], "marker": STAGE_MARKERS[stage % 6]}
            ax.plot(*run.curve("epochs", metric, stage, split), **look, markersize=3.5, label=stage_name(stage))
    panels = [ax for ax in figure.axes if ax.get_visible()]
    _from_zero(*panels)
    panels[0].set_ylabel(metric, fontsize=9, color=GRAY)
    _legend(figure, max(panels, key=lambda ax: len(ax.lines)))
    return figure


def plot_losses(runs: Sequence[Run], stage: int | None = None, smoothing: int = 1) -> Figure:
    """The terms of the loss in the last layer of one stage against epochs, a line a run.

    Args:
        runs: the runs.
        stage: which stage, 0 the base detector; each run's last by default.
        smoothing: lines of metrics whose mean a point is.
    """
    figure = Figure((3.3 * len(TERMS) + 0.2, 3.5), dpi=100, layout="constrained")
    for ax, (term, name) in zip(figure.subplots(1, len(TERMS)), TERMS.items()):
        style_axes(ax, f"Loss: {name}", "epochs")
        for number, run in enumerate(runs):
            last = len(run.evaluations[-1]["stages"]) - 1 if run.evaluations else 0
            chosen = last if stage is None else stage
            x, y = run.losses(f"stage{chosen}" if chosen else "base", term, smoothing)
            ax.plot(x, y, label=label_as_is(run.label), **{**run_style(number), "marker": ""})
        _from_zero(ax)
    _legend(figure, ax)
    return figure


def _mark_drops(ax: Axes, run: Run, x: Sequence[float], y: Sequence[float], epochs: Sequence[float]) -> None:
    """Triangles on a run's line where its learning rate dropped."""
    for drop in run.drops:
        if epochs[0] <= drop <= epochs[-1]:
            point = np.interp(drop, epochs, x), np.interp(drop, epochs, y)
            color = next(line.get_color() for line in ax.lines if line.get_label() == label_as_is(run.label))
            ax.plot(*point, "v", markersize=9, markerfacecolor="white", markeredgecolor=color, zorder=4)


def _from_zero(*axes: Axes) -> None:
    """Both axes of all panels from 0 to a little more than the largest value."""
    drawn = [point for ax in axes for line in ax.lines for point in line.get_xydata() if np.isfinite(point).all()]
    right, top = np.max(drawn, axis=0) if drawn else (0, 0)
    for ax in axes:
        ax.set_xlim(0, 1.04 * right or 1)
        ax.set_ylim(0, 1.08 * top or 1)


def _legend(figure: Figure, ax: Axes) -> None:
    """One legend below all panels, with lines long enough to show their dashes."""
    handles, labels = ax.get_legend_handles_labels()
    inches = 0.75 + 0.075 * max(map(len, labels))  # of an entry, about
    columns = max(1, min(len(labels), int(figure.get_figwidth() / inches)))
    legend = figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9, handlelength=3.2
    )
    legend_as_is(legend)
