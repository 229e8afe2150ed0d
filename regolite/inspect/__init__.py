"""Looking at detectors: figures of detections, stages, curves and average precision.

Models know nothing of this room; it reads their outputs and the lines of ``metrics.jsonl``.
"""

from __future__ import annotations

from regolite.inspect.figures import (
    draw_detections,
    draw_run,
    draw_stages,
    draw_truth,
    ground_truth,
    plot_ap_by_stage,
    plot_curves,
    save_figure,
    stage_colour,
    stage_name,
    table_by_stage,
)

__all__ = [
    "draw_detections",
    "draw_run",
    "draw_stages",
    "draw_truth",
    "ground_truth",
    "plot_ap_by_stage",
    "plot_curves",
    "save_figure",
    "stage_colour",
    "stage_name",
    "table_by_stage",
]
