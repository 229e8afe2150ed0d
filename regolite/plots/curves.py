"""Training curves, and average precision by stage."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from regolite.plots.drawing import GRAY, INK, stage_color, style_axes
from regolite.types import stage_name


def plot_curves(metrics: Sequence[Mapping[str, Any]]) -> Figure:
    """The training curves of a run: loss, loss by decoder, learning rate, AP by stage.

    Args:
        metrics: the lines of ``metrics.jsonl``.
    """
    train = [line for line in metrics if line["kind"] == "train"]
    figure = Figure((9.6, 6.2), dpi=100, layout="constrained")
    total, by_decoder, rate, precision = figure.subplots(2, 2).flat
    steps = [line["step"] for line in train]
    mark: dict[str, Any] = {"marker": "o", "markersize": 3} if len(train) < 30 else {}

    style_axes(total, "Loss, all decoder layers together", "step")
    total.plot(steps, [line["loss"] for line in train], color=INK, **mark)

    style_axes(by_decoder, "Loss of the last layer, by stage", "step")
    decoders = {name for line in train for name in _by_decoder(line["terms"])}
    for name in sorted(decoders):  # "base", "stage1", ...
        stage = int(name.removeprefix("stage")) if name != "base" else 0
        values = [_by_decoder(line["terms"]).get(name, math.nan) for line in train]
        style = {"linestyle": ("-", "--", "-.", ":")[stage % 4], "color": stage_color(stage)}
        by_decoder.plot(steps, values, label=stage_name(stage), **style, **mark)
    style_axes(rate, "Learning rate", "step")
    rate.plot(steps, [line["lr"] for line in train], color=INK, **mark)
    rate.yaxis.set_major_formatter("{x:g}")

    style_axes(precision, "AP by stage (%)", "step")
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "val": ("validation images", {"marker": "o"}),
        "train": ("training images", {"marker": "D", "markerfacecolor": "white", "linestyle": ""}),
    }
    for split, (label, mark) in kinds.items():
        lines = [line for line in metrics if line["kind"] == "evaluation" and line["split"] == split]
        for stage in range(max((len(line["stages"]) for line in lines), default=0)):
            values = [_number(line["stages"][stage]["AP"]) for line in lines]
            precision.plot([line["step"] for line in lines], values, color=stage_color(stage), markersize=5, **mark)
        if lines:
            precision.plot([], [], color=GRAY, markersize=5, label=label, **mark)

    for ax in (total, by_decoder, rate, precision):
        drawn = [point for line in ax.lines for point in line.get_xydata() if np.isfinite(point).all()]
        right, top = np.max(drawn, axis=0) if drawn else (0, 0)
        ax.set_xlim(0, 1.04 * right or 1)
        ax.set_ylim(0, max(1.08 * top, 1.0 if ax is precision else 0.0) or 1)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(frameon=False, fontsize=8)
    return figure


def plot_ap_by_stage(figures: Mapping[str, Any], title: str, names: Sequence[str] = ("AP", "AP50", "AP75")) -> Figure:
    """COCO metrics of every stage as bars.

    Args:
        figures: the result of :func:`regolite.evaluate`, or an evaluation line of ``metrics.jsonl``.
        title: title of the figure.
        names: names of the metrics.
    """
    figure = Figure((1.6 + 1.6 * len(names), 3.6), dpi=100, layout="constrained")
    ax = figure.subplots()
    stages = figures["stages"]
    style_axes(ax, title, "")
    wide = 0.8 / len(stages)
    for stage, measured in enumerate(stages):
        at = [n - 0.4 + wide * (stage + 0.5) for n in range(len(names))]
        values = [_number(measured[name]) for name in names]
        bars = ax.bar(at, values, 0.92 * wide, color=stage_color(stage), label=stage_name(stage))
        ax.bar_label(bars, ["–" if math.isnan(v) else f"{v:.1f}" for v in values], fontsize=8, color=INK, padding=2)
    ax.set_xticks(range(len(names)), names)
    ax.tick_params(axis="x", length=0, labelsize=10)
    ax.set_ylim(0, max(1.0, 1.12 * ax.get_ylim()[1]))
    ax.set_ylabel("%", fontsize=9, color=GRAY)
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(stages), frameon=False, fontsize=9)
    return figure


def _by_decoder(terms: Mapping[str, float]) -> dict[str, float]:
    """The loss of the last layer of each decoder: ``base`` and ``stage2``, not ``base.1`` or ``proposals``."""
    sums: dict[str, float] = {}
    for name, value in terms.items():
        decoder = name.split("/")[0]
        if decoder == "base" or decoder.removeprefix("stage").isdigit():
            sums[decoder] = sums.get(decoder, 0.0) + value
    return sums


def _number(value: float | None) -> float:
    return math.nan if value is None else value
