"""Confidence intervals of average precision: the bootstrap over images (Efron, 1979).

The images are resampled with replacement and evaluated some hundred times; the spread of the results estimates the
sampling error. All stages are evaluated on the same samples, so that the intervals of their differences are narrower
than those of the figures.
"""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from regolite.errors import UserError
from regolite.utils.progress import track
from regolite.utils.validation import whole


@dataclass(frozen=True)
class Draws:
    """Average precision of every bootstrap sample, in percent; the mean over recalls.

    Attributes:
        precision: for D bootstrap samples, S stages, T IoU thresholds (0.50, 0.55, ..., 0.95) and K categories in the
            order of their ids; nan if a sample has no object of a category.
    """

    precision: Float[np.ndarray, "D S T K"]

    @property
    def ap(self) -> Float[np.ndarray, "D S"]:
        """AP of every bootstrap sample and stage."""
        return np.nanmean(self.precision, (2, 3))

    @property
    def ap50(self) -> Float[np.ndarray, "D S"]:
        """AP50 of every bootstrap sample and stage."""
        return np.nanmean(self.precision[:, :, 0], 2)

    @property
    def ap50_by_category(self) -> Float[np.ndarray, "D S K"]:
        """AP50 of every bootstrap sample, stage and category."""
        return self.precision[:, :, 0]


def interval(values: Float[np.ndarray, "D *n"], confidence: float = 0.95) -> tuple[Any, Any]:
    """The confidence interval by the percentile bootstrap.

    Args:
        values: one value per bootstrap sample.
        confidence: confidence level.
    """
    tail = 50 * (1 - confidence)
    return np.nanpercentile(values, tail, axis=0), np.nanpercentile(values, 100 - tail, axis=0)


def bootstrap(
    coco: COCO, by_stage: Sequence[Sequence[dict[str, Any]]], draws: int = 200, seed: int = 0, progress: bool = True
) -> Draws:
    """Evaluate detections on bootstrap samples of the images.

    Args:
        coco: the ground truth.
        by_stage: the detections of each stage in COCO format, as returned by :func:`regolite.evaluation.detect_all`.
        draws: number of bootstrap samples.
        seed: seed of the sampling.
        progress: show a progress bar.
    """
    draws = whole("draws", draws, 1)
    evaluations = [_matched(coco, results) for results in by_stage]
    images = len(coco.getImgIds())
    generator = np.random.default_rng(seed)
    chosen = [generator.integers(images, size=images) for _ in range(draws)]
    return Draws(
        np.array([[_precision(e, rows) for e in evaluations] for rows in track(chosen, "drawing images", progress)])
    )


def intervals(
    coco: COCO, by_stage: Sequence[Sequence[dict[str, Any]]], draws: int = 200, seed: int = 0, progress: bool = True
) -> dict[str, Any]:
    """95 % confidence intervals of AP and AP50 by stage, of the gain of the last stage, and by class.

    Arguments are those of :func:`bootstrap`.

    Returns:
        ``intervals``: the number of ``draws``, the bounds of ``AP`` and ``AP50`` of each stage, and of ``AP_gain`` and
        ``AP50_gain``, last stage minus base detector. ``classes``: for each class with objects its ``name``, its number
        of ``objects``, ``AP50`` of the last stage, and the bounds ``AP50_interval``. All in percent.

    Raises:
        UserError: the ground truth has no object.
    """
    if not any(len(coco.getAnnIds(catIds=[category], iscrowd=False)) for category in coco.cats):
        raise UserError("the data has no object of the model's classes: there is nothing to measure")
    drawn = bootstrap(coco, by_stage, draws, seed, progress)
    last = _matched(coco, by_stage[-1])
    ap50 = _precision(last, np.arange(len(last.params.imgIds)))[0]  # of the original images

    def bounds(values: Float[np.ndarray, "D"]) -> list[float]:
        return [round(float(bound), 4) for bound in interval(values)]

    by_figure: dict[str, Any] = {"draws": draws}
    for name, values in (("AP", drawn.ap), ("AP50", drawn.ap50)):
        by_figure[name] = [bounds(values[:, stage]) for stage in range(len(by_stage))]
        by_figure[f"{name}_gain"] = bounds(values[:, -1] - values[:, 0])
    classes = [
        {
            "name": coco.cats[category]["name"],
            "objects": len(coco.getAnnIds(catIds=[category], iscrowd=False)),
            "AP50": round(float(ap50[k]), 4),
            "AP50_interval": bounds(drawn.ap50_by_category[:, -1, k]),
        }
        for k, category in enumerate(sorted(coco.cats))
        if not np.isnan(ap50[k])
    ]
    return {"intervals": by_figure, "classes": classes}


def as_text(figures: dict[str, Any]) -> str:
    """Format the intervals of :func:`regolite.evaluate` as text tables."""
    found = figures["intervals"]
    rows = [f"95 % intervals of {found['draws']} draws of the images, in percent", "", f"{'':20}{'AP':^22}{'AP50':^22}"]
    for n, stage in enumerate(figures["stages"]):
        cells = (f"{stage[name]:5.1f}  ({found[name][n][0]:.1f} to {found[name][n][1]:.1f})" for name in ("AP", "AP50"))
        rows.append(f"{f'stage {n}' if n else 'base detector':20}" + "".join(f"{cell:22}" for cell in cells))
    if len(figures["stages"]) > 1:
        first, *_, last = figures["stages"]
        cells = (
            "{:+5.1f}  ({:+.1f} to {:+.1f})".format(last[name] - first[name], *found[f"{name}_gain"])
            for name in ("AP", "AP50")
        )
        rows.append(f"{'last stage less base':20}" + "".join(f"{cell:22}" for cell in cells))
    rows += ["", f"{'class':20}{'objects':>7}   AP50 of the last stage"]
    rows += [
        "{name:20}{objects:7}   {AP50:5.1f}  ({AP50_interval[0]:.1f} to {AP50_interval[1]:.1f})".format(**c)
        for c in sorted(figures["classes"], key=lambda c: -c["AP50"])
    ]
    return "\n".join(rows)


def _matched(coco: COCO, results: Sequence[dict[str, Any]]) -> COCOeval:
    """Match detections with the ground truth by image; a bootstrap sample only reweights these matches."""
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(coco, coco.loadRes(list(results)) if results else COCO(), "bbox")
        evaluation.params.areaRng, evaluation.params.areaRngLbl = evaluation.params.areaRng[:1], ["all"]
        evaluation.params.maxDets = [100]
        evaluation.evaluate()
    return evaluation


def _precision(evaluation: COCOeval, rows: Int[np.ndarray, "I"]) -> Float[np.ndarray, "T K"]:
    """Average precision of the images with indices ``rows``, in percent."""
    images = len(evaluation.params.imgIds)
    drawn = copy.copy(evaluation)
    by_category = [evaluation.evalImgs[start : start + images] for start in range(0, len(evaluation.evalImgs), images)]
    drawn.evalImgs = [category[row] for category in by_category for row in rows]
    drawn.params = drawn._paramsEval = copy.copy(evaluation.params)
    drawn.params.imgIds = list(range(images))  # a repeated image counts as several images
    with contextlib.redirect_stdout(io.StringIO()):
        drawn.accumulate()
    precision = drawn.eval["precision"][..., 0, 0]  # [T, R, K]
    return 100 * np.where(precision < 0, np.nan, precision).mean(1)
