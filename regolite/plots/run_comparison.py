"""The figures of notebook 22: several runs in one figure, distinguished by color, line style and marker."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
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
    """The line style of a run: 140 distinct styles; the first four differ in their dashes alone."""
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
    """A metric against epochs, hours and images seen, one line per run (as Figure 3 of the paper).

    A hollow triangle marks a learning rate drop by a factor of ten, a gray line the first run's best value.

    Args:
        runs: the runs, the baseline first.
        metric: AP, AP50, AP75, APs, APm or APl.
        stage: which stage; each run's last by default.
        split: the evaluated split.
        axes: the x axes, of :data:`~regolite.evaluation.run_comparison.AXES`.
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
    """A metric of every stage against epochs, one panel per run.

    Args:
        runs: the runs.
        metric: AP, AP50, AP75, APs, APm or APl.
        split: the evaluated split.
    """
    columns = min(3, len(runs))
    height = -(-len(runs) // columns)
    figure = Figure((3.3 * columns + 0.2, 2.9 * height + 0.6), dpi=100, layout="constrained")
    axes = figure.subplots(height, columns, sharex=True, sharey=True, squeeze=False).flatten().tolist()
    for ax in axes[len(runs) :]:
        ax.set_visible(False)
    panels: list[Axes] = axes[: len(runs)]
    for run, ax in zip(runs, panels):
        style_axes(ax, run.label, "epochs")
        for stage in range(run.stages(split) + 1):
            look: dict[str, Any] = {
                "color": stage_color(stage),
                "linestyle": DASHES[stage % 4],
                "marker": STAGE_MARKERS[stage % 6],
            }
            ax.plot(*run.curve("epochs", metric, stage, split), **look, markersize=3.5, label=stage_name(stage))

    _from_zero(*panels)
    panels[0].set_ylabel(metric, fontsize=9, color=GRAY)
    _legend(figure, max(panels, key=lambda ax: len(ax.lines)))
    return figure


def plot_losses(runs: Sequence[Run], stage: int | None = None, smoothing: int = 1) -> Figure:
    """The loss terms of the last layer of one stage against epochs, one line per run.

    Args:
        runs: the runs.
        stage: which stage, 0 the base detector; each run's last by default.
        smoothing: number of metrics lines averaged into a point.
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
    """Triangles on a run's line at its learning rate drops."""
    for drop in run.drops:
        if epochs[0] <= drop <= epochs[-1]:
            point = np.interp(drop, epochs, x), np.interp(drop, epochs, y)
            color = next(line.get_color() for line in ax.lines if line.get_label() == label_as_is(run.label))
            ax.plot(*point, "v", markersize=9, markerfacecolor="white", markeredgecolor=color, zorder=4)


def _points(line: Line2D) -> Float[np.ndarray, "n 2"]:
    """The finite points of a line."""
    points = np.asarray(line.get_xydata())
    return points[np.isfinite(points).all(1)]


def _from_zero(*axes: Axes) -> None:
    """Set both axes of all panels to start at 0 and end just above the largest value."""
    drawn = [point for ax in axes for line in ax.lines for point in _points(line)]
    right, top = np.max(drawn, axis=0) if drawn else (0, 0)
    for ax in axes:
        ax.set_xlim(0, 1.04 * right or 1)
        ax.set_ylim(0, 1.08 * top or 1)


def _legend(figure: Figure, ax: Axes) -> None:
    """One legend below all panels, with handles long enough to show the dashes."""
    handles, labels = ax.get_legend_handles_labels()
    inches = 0.75 + 0.075 * max(map(len, labels))  # approximate width of an entry
    columns = max(1, min(len(labels), int(figure.get_figwidth() / inches)))
    legend = figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9, handlelength=3.2
    )
    legend_as_is(legend)
