"""Average precision by relative object size: the share of the image that an object covers.

COCO's small, medium and large objects are those of 32 and 96 pixels, whatever the size of the image. What REGO's
glimpses show of an image depends on the relative size instead: at alpha 3, a box of a third of the image's width.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

SIDE = 1000.0
EDGES = (0.0, 0.1, 0.2, 0.4, 1.0)
"""Limits of the bins: the square root of an object's share of the image."""


def ap_by_relative_size(
    coco: COCO, results: Sequence[dict[str, Any]], edges: Sequence[float] = EDGES
) -> list[float | None]:
    """AP of the objects in each bin of relative size, in percent; None for a bin without objects.

    All images are stretched to one square, which changes no IoU; areas then are shares of the image.

    Args:
        coco: the ground truth.
        results: detections in COCO format.
        edges: limits of the bins.
    """
    truth = COCO()
    truth.dataset = {
        "images": list(coco.imgs.values()),
        "categories": list(coco.cats.values()),
        "annotations": [_stretched(coco, one) for one in coco.anns.values()],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        found = truth.loadRes([_stretched(coco, one) for one in results]) if results else COCO()
        evaluation = COCOeval(truth, found, "bbox")
        areas = [[(low * SIDE) ** 2, (high * SIDE) ** 2] for low, high in zip(edges, edges[1:])]
        evaluation.params.areaRng, evaluation.params.areaRngLbl = areas, [str(area) for area in areas]
        evaluation.params.maxDets = [100]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][..., 0]  # [T, R, K, bins]
    known = [precision[..., n][precision[..., n] >= 0] for n in range(len(areas))]
    return [round(100 * float(values.mean()), 4) if len(values) else None for values in known]


def _stretched(coco: COCO, one: dict[str, Any]) -> dict[str, Any]:
    """An annotation or detection on the square."""
    image = coco.imgs[one["image_id"]]
    scale = SIDE / np.array([image["width"], image["height"]] * 2)
    box = (np.array(one["bbox"]) * scale).tolist()
    return {**one, "bbox": box, "area": box[2] * box[3]}
