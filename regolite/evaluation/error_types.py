"""Where a detector's errors come from: every wrong detection gets one reason, and AP50 says what each reason costs.

After Bolya, Foley, Hays and Hoffman, "TIDE: A General Toolbox for Identifying Object Detection Errors" (ECCV 2020). A
detection is correct if it overlaps an object of its class by an IoU of at least 0.5, and no surer one has taken that
object. Of a wrong one, the first of these that fits is the reason:

============  ======================================================================  ================================
kind          what is the matter                                                      mended by
============  ======================================================================  ================================
box           the nearest object of its class overlaps it by 0.1 to 0.5               giving it the object's box
class         an object of another class overlaps it by 0.5 or more                   giving it the object's class
duplicate     an object of its class overlaps it by 0.5 or more, but was taken        taking it away
background    nothing overlaps it by more than 0.1                                    taking it away
both          what is left: another class's object overlaps it by 0.1 to 0.5          taking it away
missed        an object that no detection found, nor one wrong in box or class alone  leaving the object out
============  ======================================================================  ================================

Fixing never makes a duplicate: where several detections would find one object, the highest-scoring one does and the
others are removed. The cost of a kind is how much AP50 rises when all errors of that kind, and no other, are fixed. The
costs do not add up to what is missing from 100: fixing two kinds together gives more, or less, than each alone.

Simpler than TIDE's own toolbox: boxes alone and no masks, the IoU of 0.5 alone, neither one kind mended after the other
nor the two summaries "false positive" and "false negative". A crowd excuses detections of its class, as in COCO.
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
    """The objects of a data set as columns, crowds left out.

    Attributes:
        image_ids: COCO's id of each one's image.
        categories: COCO's id of its category.
        boxes: corner, width and height in pixels.
    """

    image_ids: Int[np.ndarray, "M"]
    categories: Int[np.ndarray, "M"]
    boxes: Float[np.ndarray, "M 4"]

    def __len__(self) -> int:
        return len(self.image_ids)


@dataclass(frozen=True)
class Judged:
    """Detections as columns, the highest-scoring first, each with what it is.

    Attributes:
        truth: the objects.
        image_ids: COCO's id of each one's image.
        categories: COCO's id of its category.
        boxes: corner, width and height in pixels.
        scores: confidence.
        kinds: ``"correct"``, one of :data:`KINDS` but the last, or ``"ignored"``: in a crowd.
        objects: the row of ``truth`` that it found, or is wrong about; -1 for none.
        overlaps: its IoU with that object; 0 for none.
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
        """Those of at least this score. A surer detection never depends on a less sure one, so the kinds stay."""
        end = int((self.scores >= threshold).sum())
        names = ("image_ids", "categories", "boxes", "scores", "kinds", "objects", "overlaps")
        return replace(self, **{name: getattr(self, name)[:end] for name in names})

    def _touched(self, *kinds: str) -> Bool[np.ndarray, "M"]:
        """For each object, whether a detection of these kinds is about it."""
        touched = np.zeros(len(self.truth), dtype=bool)
        touched[self.objects[np.isin(self.kinds, kinds)]] = True
        return touched

    @property
    def missed(self) -> Int[np.ndarray, "m"]:
        """The rows of the objects that were missed."""
        return np.flatnonzero(~self._touched("correct", "class", "box"))

    def counts(self) -> dict[str, int]:
        """How many detections are correct, and how many errors there are of each kind."""
        counted = {kind: int((self.kinds == kind).sum()) for kind in ("correct", *KINDS)}
        return counted | {"missed": len(self.missed)}

    def ap50(self, mended: str | None = None) -> float:
        """AP at IoU 0.5 in percent, as pycocotools computes it; nan where there are no objects.

        Args:
            mended: the kind of error to mend first, one of :data:`KINDS`.
        """
        categories, correct, counts = self.categories.copy(), self.kinds == "correct", self.kinds != "ignored"
        wanted = np.ones(len(self.truth), dtype=bool)
        if mended == "missed":
            wanted[self.missed] = False
        elif mended is not None:
            wrong = self.kinds == mended
            counts = counts & ~wrong
            if mended in ("class", "box"):
                free = np.flatnonzero(wrong & ~self._touched("correct")[self.objects])
                best = free[np.unique(self.objects[free], return_index=True)[1]]  # one a free object
                categories[best] = self.truth.categories[self.objects[best]]
                correct[best] = counts[best] = True
        precisions = [
            _average_precision(correct[counts & (categories == c)], int((self.truth.categories[wanted] == c).sum()))
            for c in np.unique(self.truth.categories[wanted])
        ]
        return 100 * float(np.mean(precisions)) if precisions else float("nan")

    def costs(self) -> dict[str, float]:
        """By how much AP50 rises, in points, when the errors of a kind are mended."""
        before = self.ap50()
        return {kind: self.ap50(kind) - before for kind in KINDS}


def judge(coco: COCO, results: Sequence[dict[str, Any]]) -> Judged:
    """Match detections with the truth at IoU 0.5, as COCO does, and say of each what it is.

    Args:
        coco: the ground truth.
        results: detections in COCO's form, as :func:`regolite.evaluation.detect_all` gives for a stage. Those of
            categories that the truth does not know are left out.
    """
    annotations = [one for one in coco.dataset["annotations"] if not one.get("iscrowd", 0)]
    crowds = [one for one in coco.dataset["annotations"] if one.get("iscrowd", 0)]
    truth, crowd = GroundTruth(*_columns(annotations)), GroundTruth(*_columns(crowds))
    results = [one for one in results if one["category_id"] in coco.cats]
    image_ids, categories, boxes = _columns(results)
    scores = np.array([one["score"] for one in results], dtype=float)
    order = np.lexsort((image_ids, -scores))  # the order in which pycocotools counts them, ties included
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
    """The kinds of one image's detections, the highest-scoring first, and the object that each is about.

    Args:
        iou: of detections with objects.
        own: whether the object is of the detection's class.
        excused: whether it lies in a crowd of its class.
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
    """The mean over 101 recalls of the best precision at that recall or a higher one."""
    found = np.cumsum(correct)
    precision = found / np.arange(1, len(found) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    at = np.searchsorted(found / objects, np.linspace(0, 1, 101))
    return float(np.append(precision, 0.0)[at].mean())  # recalls that are never reached count 0


def _columns(
    records: Sequence[dict[str, Any]],
) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "n"], Float[np.ndarray, "n 4"]]:
    """Image, category and box of annotations or detections."""
    ids, categories = (np.array([one[key] for one in records], dtype=int) for key in ("image_id", "category_id"))
    return ids, categories, np.array([one["bbox"] for one in records], dtype=float).reshape(-1, 4)


def _by_image(image_ids: Int[np.ndarray, "n"]) -> dict[int, Int[np.ndarray, "_"]]:
    """The rows of each image, in their order."""
    order = np.argsort(image_ids, kind="stable")
    ids, starts = np.unique(image_ids[order], return_index=True)
    return dict(zip(ids.tolist(), np.split(order, starts[1:])))


def _iou(boxes: Float[np.ndarray, "n 4"], others: Float[np.ndarray, "m 4"], crowd: bool) -> Float[np.ndarray, "n m"]:
    """COCO's IoU; of a crowd it is the part of the box that lies in it."""
    if not len(boxes) or not len(others):
        return np.zeros((len(boxes), len(others)))
    return np.asarray(mask.iou(boxes, others, [int(crowd)] * len(others)))
