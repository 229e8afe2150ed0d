"""Measuring detectors: COCO's average precision, stage by stage."""

from __future__ import annotations

from regolite.evaluation.bootstrap import Draws, bootstrap, interval, intervals
from regolite.evaluation.coco import (
    FIGURES,
    Measured,
    average_precision,
    detect_all,
    evaluate,
    measure,
    with_shared_classes,
)
from regolite.evaluation.config import EvaluationConfig
from regolite.evaluation.errors import KINDS, Judged, judge
from regolite.evaluation.published_rows import COLUMNS, PUBLISHED, published_rows

__all__ = [
    "COLUMNS",
    "FIGURES",
    "KINDS",
    "PUBLISHED",
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
    "published_rows",
    "with_shared_classes",
]
