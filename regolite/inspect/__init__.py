"""Looking at detectors: figures of detections, stages, curves and average precision; what happens inside, live.

Models know nothing of this room; it reads their outputs, what :func:`regolite.record` saw in them, and the lines of
``metrics.jsonl``.
"""

from __future__ import annotations

import importlib
from typing import Any

from regolite.inspect.drawing import (
    draw_box,
    draw_heat,
    draw_matrix,
    draw_objects,
    draw_picture,
    draw_points,
    draw_title,
    panels,
    stage_colour,
    stage_name,
    style_axes,
    to_picture,
)
from regolite.inspect.entropy import EntropyByEpoch, entropies, entropy_by_layer, entropy_figure
from regolite.inspect.figures import (
    draw_detections,
    draw_run,
    draw_stages,
    draw_truth,
    ground_truth,
    plot_ap_by_stage,
    plot_curves,
    save_figure,
    table_by_stage,
)
from regolite.inspect.looking import attention_figure, sampling_figure
from regolite.inspect.notebook import begin, show
from regolite.inspect.stages import related, relations_figure, stages_figure
from regolite.inspect.verdicts import errors_figure, verdicts

__all__ = [
    "AttentionViewer",
    "EntropyByEpoch",
    "Explorer",
    "RelationViewer",
    "SamplingViewer",
    "StageViewer",
    "attention_figure",
    "begin",
    "draw_box",
    "draw_detections",
    "draw_heat",
    "draw_matrix",
    "draw_objects",
    "draw_picture",
    "draw_points",
    "draw_run",
    "draw_stages",
    "draw_title",
    "draw_truth",
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
    "show",
    "stage_colour",
    "stage_name",
    "stages_figure",
    "style_axes",
    "table_by_stage",
    "to_picture",
    "verdicts",
]


def __getattr__(name: str) -> Any:
    """The viewers, loaded when they are asked for: they need widgets, which a training does not."""
    if name in ("Explorer", "AttentionViewer", "SamplingViewer", "StageViewer", "RelationViewer"):
        return getattr(importlib.import_module("regolite.inspect.viewers"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
