"""Figures: detections, stages, attention, curves and average precision.

The inputs are a model's outputs, traces of :func:`regolite.record`, and ``metrics.jsonl``.
"""

from __future__ import annotations

from regolite.plots.attention import attention_figure, sampling_figure
from regolite.plots.curves import plot_ap_by_stage, plot_curves
from regolite.plots.detections import draw_detections, draw_ground_truth, draw_stages, ground_truth
from regolite.plots.drawing import (
    draw_box,
    draw_heat,
    draw_image,
    draw_matrix,
    draw_objects,
    draw_points,
    draw_title,
    panels,
    save_figure,
    stage_color,
    style_axes,
    to_image,
)
from regolite.plots.entropy import EntropyByEpoch, entropies, entropy_by_layer, entropy_figure
from regolite.plots.error_analysis import errors_figure, verdicts
from regolite.plots.run import draw_run
from regolite.plots.stages import related, relations_figure, stages_figure

__all__ = [
    "EntropyByEpoch",
    "attention_figure",
    "draw_box",
    "draw_detections",
    "draw_heat",
    "draw_matrix",
    "draw_objects",
    "draw_image",
    "draw_points",
    "draw_run",
    "draw_stages",
    "draw_title",
    "draw_ground_truth",
    "entropies",
    "entropy_by_layer",
    "entropy_figure",
    "errors_figure",
    "ground_truth",
    "panels",
    "plot_ap_by_stage",
    "plot_curves",
    "related",
    "relations_figure",
    "sampling_figure",
    "save_figure",
    "stage_color",
    "stages_figure",
    "style_axes",
    "to_image",
    "verdicts",
]
