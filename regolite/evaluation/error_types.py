"""Error analysis: every false detection is assigned one kind of error, and each kind its cost in AP50.

After Bolya, Foley, Hays and Hoffman, "TIDE: A General Toolbox for Identifying Object Detection Errors" (ECCV 2020). A
detection is correct if its IoU with an object of its class is at least 0.5 and no higher-scoring detection matches that
object. A false detection gets the first kind in this table that applies:

============  ======================================================================  ================================
kind          error                                                                   fixed by
============  ======================================================================  ================================
box           the IoU with the nearest object of its class is 0.1 to 0.5              giving it the object's box
class         the IoU with an object of another class is at least 0.5                 giving it the object's class
duplicate     the IoU with a matched object of its class is at least 0.5              removing it
background    no object has an IoU above 0.1                                          removing it
both          otherwise: the IoU with an object of another class is 0.1 to 0.5        removing it
missed        an object without a correct detection, a box error or a class error     removing the object
============  ======================================================================  ================================

Fixing never creates a duplicate: if several detections would match one object, the highest-scoring one does and the
others are removed. The cost of a kind is the increase of AP50 when all errors of that kind, and no others, are fixed.
The costs do not sum to 100 - AP50: fixing two kinds together gains more, or less, than the sum of both.

Simpler than the TIDE toolbox: boxes only, IoU 0.5 only, no successive fixes, no "false positive" and "false negative"
summaries. Detections in a crowd of their class are ignored, as in COCO.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped
from pycocotools import mask
from pycocotools.coco import COCO

KINDS = ("class", "box", "both", "duplicate", "background", "missed")
FOREGROUND, BACKGROUND = 0.5, 0.1


@dataclass(frozen=True)
class GroundTruth:
    """The objects of a dataset as arrays, without crowds.

    Attributes:
        image_ids: COCO's image id of each object.
        categories: COCO's category id.
        boxes: corner, width and height in pixels.
    """

    image_ids: Int[np.ndarray, "M"]
    categories: Int[np.ndarray, "M"]
    boxes: Float[np.ndarray, "M 4"]

    def __len__(self) -> int:
        return len(self.image_ids)


@dataclass(frozen=True)
class Judged:
    """Classified detections as arrays, the highest-scoring first.

    Attributes:
        truth: the ground-truth objects.
        image_ids: COCO's image id of each detection.
        categories: COCO's category id.
        boxes: corner, width and height in pixels.
        scores: confidence.
        kinds: ``"correct"``, one of :data:`KINDS` except the last, or ``"ignored"`` (in a crowd).
        objects: row of ``truth`` that is matched or concerned by the error; -1 for none.
        overlaps: IoU with that object; 0 for none.
    """

    truth: GroundTruth
    image_ids: Int[np.ndarray, "N"]
    categories: Int[np.ndarray, "N"]
    boxes: Float[np.ndarray, "N 4"]
    scores: Float[np.ndarray, "N"]
    kinds: Shaped[np.ndarray, "N"]
    objects: Int[np.ndarray, "N"]
    overlaps: Float[np.ndarray, "N"]

    def __len__(self) -> int:
        return len(self.scores)

    def above(self, threshold: float) -> Judged:
        """The detections of at least this score; kinds never depend on lower-scoring detections."""
        end = int((self.scores >= threshold).sum())
        names = ("image_ids", "categories", "boxes", "scores", "kinds", "objects", "overlaps")
        return replace(self, **{name: getattr(self, name)[:end] for name in names})

    def _touched(self, *kinds: str) -> Bool[np.ndarray, "M"]:
        """For each object, whether a detection of these kinds concerns it."""
        touched = np.zeros(len(self.truth), dtype=bool)
        touched[self.objects[np.isin(self.kinds, kinds)]] = True
        return touched

    @property
    def missed(self) -> Int[np.ndarray, "m"]:
        """The rows of the missed objects."""
        return np.flatnonzero(~self._touched("correct", "class", "box"))

    def counts(self) -> dict[str, int]:
        """The number of correct detections, and of errors of each kind."""
        counted = {kind: int((self.kinds == kind).sum()) for kind in ("correct", *KINDS)}
        return counted | {"missed": len(self.missed)}

    def ap50(self, fixed: str | None = None) -> float:
        """AP at IoU 0.5 in percent, as computed by pycocotools; nan without objects.

        Args:
            fixed: the kind of error to fix first, one of :data:`KINDS`.
        """
        categories, correct, counts = self.categories.copy(), self.kinds == "correct", self.kinds != "ignored"
        wanted = np.ones(len(self.truth), dtype=bool)
        if fixed == "missed":
            wanted[self.missed] = False
        elif fixed is not None:
            wrong = self.kinds == fixed
            counts = counts & ~wrong
            if fixed in ("class", "box"):
                free = np.flatnonzero(wrong & ~self._touched("correct")[self.objects])
                best = free[np.unique(self.objects[free], return_index=True)[1]]  # one per free object
                categories[best] = self.truth.categories[self.objects[best]]
                correct[best] = counts[best] = True
        precisions = [
            _average_precision(correct[counts & (categories == c)], int((self.truth.categories[wanted] == c).sum()))
            for c in np.unique(self.truth.categories[wanted])
        ]
        return 100 * float(np.mean(precisions)) if precisions else float("nan")

    def costs(self) -> dict[str, float]:
        """The increase of AP50, in points, when the errors of each kind are fixed."""
        before = self.ap50()
        return {kind: self.ap50(kind) - before for kind in KINDS}


def judge(coco: COCO, results: Sequence[dict[str, Any]]) -> Judged:
    """Match detections with the ground truth at IoU 0.5, as COCO does, and classify them.

    Args:
        coco: the ground truth.
        results: detections in COCO format, as returned by :func:`regolite.evaluation.detect_all` for one stage. Other
            categories than those of the ground truth are ignored.
    """
    annotations = [one for one in coco.dataset["annotations"] if not one.get("iscrowd", 0)]
    crowds = [one for one in coco.dataset["annotations"] if one.get("iscrowd", 0)]
    truth, crowd = GroundTruth(*_columns(annotations)), GroundTruth(*_columns(crowds))
    results = [one for one in results if one["category_id"] in coco.cats]
    image_ids, categories, boxes = _columns(results)
    scores = np.array([one["score"] for one in results], dtype=float)
    order = np.lexsort((image_ids, -scores))  # the order of pycocotools, ties included
    image_ids, categories, boxes, scores = (column[order] for column in (image_ids, categories, boxes, scores))
    kinds = np.full(len(scores), "background", dtype="<U10")
    objects, overlaps = np.full(len(scores), -1), np.zeros(len(scores))
    rows_of, objects_of, crowds_of = (_by_image(ids) for ids in (image_ids, truth.image_ids, crowd.image_ids))
    none = np.zeros(0, dtype=int)
    for image_id, rows in rows_of.items():
        here, crowded = objects_of.get(image_id, none), crowds_of.get(image_id, none)
        iou = _iou(boxes[rows], truth.boxes[here], crowd=False)
        own = categories[rows][:, None] == truth.categories[here]
        in_crowd = _iou(boxes[rows], crowd.boxes[crowded], crowd=True) >= FOREGROUND
        excused = (in_crowd & (categories[rows][:, None] == crowd.categories[crowded])).any(1)
        kinds[rows], about = _judge_image(iou, own, excused)
        known = about >= 0
        objects[rows[known]] = here[about[known]]
        overlaps[rows[known]] = iou[known, about[known]]
    return Judged(truth, image_ids, categories, boxes, scores, kinds, objects, overlaps)


def _judge_image(
    iou: Float[np.ndarray, "n m"], own: Bool[np.ndarray, "n m"], excused: Bool[np.ndarray, "n"]
) -> tuple[list[str], Int[np.ndarray, "n"]]:
    """The kinds of the detections of one image, the highest-scoring first, and the object that each concerns.

    Args:
        iou: IoU of detections and objects.
        own: whether the object is of the detection's class.
        excused: whether the detection lies in a crowd of its class.
    """
    kinds, about = [], np.full(len(iou), -1)
    if not iou.shape[1]:
        return ["ignored" if one else "background" for one in excused], about
    same, other = np.where(own, iou, 0.0), np.where(own, 0.0, iou)
    free = np.ones(iou.shape[1], dtype=bool)
    for n in range(len(iou)):
        best, nearest, stranger = (int(row.argmax()) for row in (same[n] * free, same[n], other[n]))
        if free[best] and same[n, best] >= FOREGROUND:
            kind, about[n] = "correct", best
            free[best] = False
        elif excused[n]:
            kind = "ignored"
        elif BACKGROUND <= same[n, nearest] < FOREGROUND:
            kind, about[n] = "box", nearest
        elif other[n, stranger] >= FOREGROUND:
            kind, about[n] = "class", stranger
        elif same[n, nearest] >= FOREGROUND:
            kind, about[n] = "duplicate", nearest
        elif other[n, stranger] > BACKGROUND:
            kind, about[n] = "both", stranger
        else:
            kind = "background"
        kinds.append(kind)
    return kinds, about


def _average_precision(correct: Bool[np.ndarray, "n"], objects: int) -> float:
    """The mean over 101 recalls of the interpolated precision."""
    found = np.cumsum(correct)
    precision = found / np.arange(1, len(found) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    at = np.searchsorted(found / objects, np.linspace(0, 1, 101))
    return float(np.append(precision, 0.0)[at].mean())  # precision is 0 at recalls that are not reached


def _columns(
    records: Sequence[dict[str, Any]],
) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "n"], Float[np.ndarray, "n 4"]]:
    """Image, category and box of annotations or detections."""
    ids, categories = (np.array([one[key] for one in records], dtype=int) for key in ("image_id", "category_id"))
    return ids, categories, np.array([one["bbox"] for one in records], dtype=float).reshape(-1, 4)


def _by_image(image_ids: Int[np.ndarray, "n"]) -> dict[int, Int[np.ndarray, "_"]]:
    """The rows of each image, in order."""
    order = np.argsort(image_ids, kind="stable")
    ids, starts = np.unique(image_ids[order], return_index=True)
    return dict(zip(ids.tolist(), np.split(order, starts[1:])))


def _iou(boxes: Float[np.ndarray, "n 4"], others: Float[np.ndarray, "m 4"], crowd: bool) -> Float[np.ndarray, "n m"]:
    """COCO's IoU; for a crowd, the fraction of the box that lies in it."""
    if not len(boxes) or not len(others):
        return np.zeros((len(boxes), len(others)))
    return np.asarray(mask.iou(boxes, others, [int(crowd)] * len(others)))
