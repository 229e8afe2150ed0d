"""Evaluation of detectors: COCO average precision by stage, confidence intervals and error analysis."""

from __future__ import annotations

from regolite.evaluation.bootstrap import Draws, bootstrap, interval, intervals
from regolite.evaluation.coco import (
    FIGURES,
    Measured,
    average_precision,
    detect_all,
    evaluate,
    measure,
    table_by_stage,
    with_shared_classes,
)
from regolite.evaluation.config import EvaluationConfig
from regolite.evaluation.error_types import KINDS, Judged, judge

__all__ = [
    "FIGURES",
    "KINDS",
    "Draws",
    "EvaluationConfig",
    "Judged",
    "Measured",
    "average_precision",
    "bootstrap",
    "detect_all",
    "evaluate",
    "interval",
    "intervals",
    "judge",
    "measure",
    "table_by_stage",
    "with_shared_classes",
]
