"""Measuring detectors: COCO's average precision, stage by stage."""

from __future__ import annotations

from regolite.evaluation.coco import FIGURES, average_precision, evaluate

__all__ = ["FIGURES", "average_precision", "evaluate"]
