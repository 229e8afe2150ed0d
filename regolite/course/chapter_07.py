"""Checkers of notebook 07: measuring detectors."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regolite.course import Mistake, close, exercise, same_shape
from regolite.data.dataset import Objects
from regolite.types import Detections

RECALLS = torch.from_numpy(np.linspace(0, 1, 101))  # pycocotools' own numbers: k / 100 differs in the last bit
THRESHOLDS = np.linspace(0.5, 0.95, 10)
RANGES = {"AP": (0.0, 1e10), "APs": (0.0, 32.0**2), "APm": (32.0**2, 96.0**2), "APl": (96.0**2, 1e10)}

Verdicts = Bool[Tensor, "D"]


# ------------------------------------------------------------------------------------------------------- references


def claim(overlap: Float[Tensor, "D G"], threshold: float) -> Int[Tensor, "D"]:
    """COCO's greedy matching: which object each detection claims; -1 for none.

    Args:
        overlap: IoU of the detections, the highest-scoring first, with the objects of their class.
        threshold: the least IoU.
    """
    claimed = torch.full((overlap.shape[0],), -1)
    taken = torch.zeros(overlap.shape[1], dtype=torch.bool)
    for d, row in enumerate(overlap):
        allowed = (row >= threshold) & ~taken
        if allowed.any():
            claimed[d] = torch.where(allowed, row, -1.0).argmax()
            taken[claimed[d]] = True
    return claimed


def precision_at_recalls(right: Verdicts, objects: int) -> Float[Tensor, "101"]:
    """The interpolated precision of a ranking at 101 recalls; its mean is COCO's AP of one class.

    Args:
        right: whether each detection is a true positive, the highest-scoring first.
        objects: number of objects N.
    """
    hits = right.double().cumsum(0)
    precision = hits / torch.arange(1, len(right) + 1)
    envelope = precision.flip(0).cummax(0).values.flip(0)
    first = torch.searchsorted(hits / objects, RECALLS)  # the first rank with that recall
    return torch.cat([envelope, envelope.new_zeros(1)])[first]


def coco_figures(
    found: Sequence[Detections], objects: Sequence[Objects], num_classes: int, faults: Collection[str] = ()
) -> dict[str, float]:
    """COCO's AP, AP50, AP75, APs, APm and APl in percent, as pycocotools computes them; nan without objects.

    Args:
        found: the detections of each image, boxes in pixels.
        objects: the annotations of each image.
        num_classes: number of classes K.
        faults: names of rules to break (:data:`FAULTS`); with them the checker recognizes misconceptions.
    """
    if "per_image" in faults:
        each = [coco_figures([f], [o], num_classes) for f, o in zip(found, objects)]
        columns = {name: [one[name] for one in each if not math.isnan(one[name])] for name in each[0]}
        return {name: float(np.mean(column)) if column else math.nan for name, column in columns.items()}
    figures: dict[str, Float[np.ndarray, "*n"]] = {}
    for name, (low, high) in RANGES.items():
        table = np.full((10, num_classes), np.nan)
        for label in range(num_classes):
            judged = [_judge(f, o, label, low, high, faults) for f, o in zip(found, objects)]
            scores = np.concatenate([scores for scores, _, _ in judged])
            count = sum(count for _, _, count in judged)
            if count and not ("skip_undetected" in faults and not len(scores)):
                verdicts = np.concatenate([verdicts for _, verdicts, _ in judged], 1)  # [10, D]
                order = np.argsort(-scores, kind="stable") if "unsorted" not in faults else np.arange(len(scores))
                table[:, label] = [_average_precision(row[order], count, faults) for row in verdicts]
            elif "absent_zero" in faults:
                table[:, label] = 0.0
        if name == "AP":
            figures |= {"AP": table, "AP50": table[0], "AP75": table[5]}
        else:
            figures[name] = table
    percent = 1 if "fraction" in faults else 100
    means = {n: np.nan if np.isnan(t).all() else float(np.nanmean(t)) for n, t in figures.items()}
    return {name: percent * value for name, value in means.items()}


def _judge(
    found: Detections, objects: Objects, label: int, low: float, high: float, faults: Collection[str]
) -> tuple[Float[np.ndarray, "D"], Int[np.ndarray, "10 D"], int]:
    """Scores and verdicts (1 right, -1 false, 0 ignored) of one class in one image, and how many objects count."""
    mine = found.labels.numpy() == label
    objects = objects[objects.labels == label] if "any_class" not in faults else objects
    scores = found.scores.numpy()[mine]
    order = np.argsort(-scores, kind="stable")[: None if "no_limit" in faults else 100]
    boxes, scores = found.boxes_xyxy.numpy().astype(float)[mine][order], scores[order]
    boxes = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)
    areas = objects.boxes[:, 2:].prod(1) if "box_area" in faults else objects.areas
    outside = (areas < low) | (areas > high)
    if dropped := {"drop_crowd", "drop_outside"} & set(faults):
        keep = np.ones(len(objects), dtype=bool)
        keep &= ~objects.crowd if "drop_crowd" in dropped else True
        keep &= ~outside if "drop_outside" in dropped else True
        objects, outside = objects[keep], outside[keep]
    ignored = outside | (objects.crowd & ("crowd_counts" not in faults))
    overlap = _overlap(boxes, objects, "crowd_iou" in faults)
    area = boxes[:, 2:].prod(1)
    beyond = (area < low) | (area > high) if "keep_unmatched" not in faults else np.zeros(len(area), dtype=bool)
    verdicts = np.array([_verdicts(overlap, t, ignored, objects.crowd, beyond, faults) for t in THRESHOLDS])
    counted = ~objects.crowd if "count_outside" in faults else ~ignored
    return scores, verdicts, int(counted.sum())


def _overlap(boxes: Float[np.ndarray, "D 4"], objects: Objects, plain: bool) -> Float[np.ndarray, "D G"]:
    """IoU; of a crowd, unless ``plain``, the fraction of the detection that lies in it."""
    truth = objects.boxes
    corner = np.maximum(boxes[:, None, :2], truth[:, :2])
    opposite = np.minimum((boxes[:, :2] + boxes[:, 2:])[:, None], truth[:, :2] + truth[:, 2:])
    shared = (opposite - corner).clip(0).prod(-1)
    own = boxes[:, 2:].prod(-1)[:, None]
    union = own + truth[:, 2:].prod(-1) - shared
    return shared / np.where(objects.crowd & (not plain), own, union)


def _verdicts(
    overlap: Float[np.ndarray, "D G"],
    threshold: float,
    ignored: Bool[np.ndarray, "G"],
    crowd: Bool[np.ndarray, "G"],
    beyond: Bool[np.ndarray, "D"],
    faults: Collection[str],
) -> Int[np.ndarray, "D"]:
    """The verdict of each detection, the highest-scoring first, at one threshold."""
    reusable = np.zeros_like(crowd) if "crowd_once" in faults else crowd
    reusable = np.ones_like(crowd) if "reuse" in faults else reusable
    taken = np.zeros(len(crowd), dtype=bool)
    verdicts = np.where(beyond, 0, -1)
    for d, row in enumerate(overlap):
        enough = row > threshold if "strict" in faults else row >= threshold
        if "voc" in faults and len(row):
            enough &= row == row.max()
        allowed = enough & (~taken | reusable)
        if (allowed & ~ignored).any() and "best_overlap" not in faults:
            allowed &= ~ignored
        if allowed.any():
            g = int(np.where(allowed, row, -1.0).argmax())
            taken[g] = True
            verdicts[d] = (-1 if "claim_ignored" in faults else 0) if ignored[g] else 1
    return verdicts


def _average_precision(verdicts: Int[np.ndarray, "D"], count: int, faults: Collection[str] = ()) -> float:
    """AP of one class at one threshold."""
    counted = verdicts if "false_ignored" in faults else verdicts[verdicts != 0]
    right = torch.from_numpy(counted == 1)
    if "no_envelope" in faults:
        hits = right.double().cumsum(0)
        precision = torch.cat([hits / torch.arange(1, len(right) + 1), hits.new_zeros(1)])
        return float(precision[torch.searchsorted(hits / count, RECALLS)].mean())
    return float(precision_at_recalls(right, count).mean())


# ----------------------------------------------------------------------------------------------------------- checkers


@exercise(
    "7.1",
    "One loop over the detections in their order, and one mask [G] of the objects that are taken.",
    "allowed = (row >= threshold) & ~taken. If nothing is allowed, the detection claims nothing.",
    "claimed[d] = torch.where(allowed, row, -1.0).argmax(), and that object is taken from now on.",
)
def check_claim(answer: Callable[[Tensor, float], Tensor]) -> str:
    """Greedy matching of detections and objects."""
    cases = [
        ([[0.9, 0.1], [0.2, 0.7], [0.1, 0.3]], 0.5),
        ([[0.9], [0.8], [0.6]], 0.5),  # duplicates
        ([[0.9, 0.0], [0.7, 0.6]], 0.5),  # the best object is taken, another one is free
        ([[0.6, 0.55], [0.9, 0.2]], 0.5),  # the greedy assignment is not the optimal one
        ([[0.5, 0.2], [0.75, 0.5]], 0.5),  # exactly at the threshold
        ([[0.6, 0.8, 0.7]], 0.5),
    ]
    generator = torch.Generator().manual_seed(7)
    tensors = [(torch.tensor(rows), t) for rows, t in cases]
    tensors += [(torch.rand(8, 5, generator=generator), t) for t in (0.5, 0.75)]
    for overlap, threshold in tensors:
        found = answer(overlap.clone(), threshold)
        if isinstance(found, Tensor) and found.dtype == torch.bool:
            raise Mistake("return the index of the claimed object, -1 for none, not whether there is one.")
        same_shape("the claims", found, (overlap.shape[0],))
        wanted = claim(overlap, threshold)
        if found.tolist() == wanted.tolist():
            continue
        best, which = overlap.max(1)
        reused = torch.where(best >= threshold, which, -1)
        free = claim(overlap, threshold) * 0 - 1
        for d in range(len(overlap)):  # the best object or none, as Pascal VOC does it
            free[d] = reused[d] if reused[d] not in free[:d] else -1
        by_object = torch.full_like(wanted, -1)
        for g, column in enumerate(overlap.T):
            rest = torch.where(by_object < 0, column, -1.0)
            if rest.max() >= threshold:
                by_object[rest.argmax()] = g
        for value, known in (
            (claim(overlap, threshold + 1e-6), "an IoU of exactly the threshold is enough"),
            (reused, "an object may be claimed only once: remember which ones are taken"),
            (
                free,
                "if its best object is taken, a detection may claim the best of the free ones (Pascal VOC counts it as "
                "false, COCO does not)",
            ),
            (
                by_object,
                "the detections choose, in the order of their scores, and not the objects: a later detection may "
                "overlap more and still gets nothing",
            ),
            (torch.where(wanted < 0, 0, wanted), "a detection that claims nothing gets -1"),
        ):
            if found.tolist() == value.tolist():
                raise Mistake(f"{known}.")
        rows = [[round(v, 2) for v in row] for row in overlap.tolist()]
        raise Mistake(f"for the overlaps {rows} at {threshold} the claims should not be {found.tolist()}.")
    none = answer(torch.zeros(3, 0), 0.5)
    same_shape("the claims in an image without objects", none, (3,))
    if none.tolist() != [-1, -1, -1]:
        raise Mistake("without objects nothing can be claimed: the claims should be -1.")
    return "Greedy by score, not optimal: a detector is held to the box that it is most confident of."


def _ranking(length: int, seed: int) -> Verdicts:
    """A ranking with fewer correct detections towards the end; the second one is wrong."""
    drawn = torch.rand(length, generator=torch.Generator().manual_seed(seed))
    right = drawn < torch.linspace(1.0, 0.3, length)
    right[:2] = torch.tensor([True, False])
    return right


def _at(heights: Float[Tensor, "D"], ranks: Int[Tensor, "101"]) -> Float[Tensor, "101"]:
    """The heights at some ranks, 0 beyond the last one."""
    return torch.cat([heights, heights.new_zeros(1)])[ranks]


@exercise(
    "7.2",
    "Three steps: precision and recall from a cumulative sum; the running maximum from the end; the 101 recalls.",
    "For the running maximum: flip, cummax, flip. For each recall, torch.searchsorted gives the first rank with it.",
    "A recall that is never reached gets the index D: append a 0 to the maxima before you index.",
)
def check_precision(answer: Callable[[Verdicts, int], Tensor]) -> str:
    """Interpolated precision at 101 recalls."""
    for length, objects, seed in ((6, 4, 6), (12, 10, 1), (30, 25, 2), (40, 17, 3)):
        right = _ranking(length, seed)
        right &= right.cumsum(0) <= objects
        found = answer(right.clone(), objects)
        if not isinstance(found, Tensor) or found.numel() == 1:
            raise Mistake("return the 101 precisions as a tensor, not their mean.")
        same_shape("the precisions", found, (101,))
        wanted = precision_at_recalls(right, objects)
        hits = right.double().cumsum(0)
        precision, recall = hits / torch.arange(1, length + 1), hits / objects
        first = torch.searchsorted(recall, RECALLS)
        envelope = precision.flip(0).cummax(0).values.flip(0)
        own = torch.searchsorted(hits / hits[-1], RECALLS)
        for value, known in (
            (
                _at(precision, first),
                "this is the precision itself: at each recall take the best at this recall or above",
            ),
            (
                _at(precision.cummax(0).values, first),
                "the running maximum starts at the wrong end: what counts is the best precision at this rank or later",
            ),
            (_at(envelope, own), "recall is divided by the true positives, not by all N objects: missed objects count"),
            (
                envelope[first.clamp(max=length - 1)],
                "at recalls that the ranking never reaches, the precision is 0",
            ),
            (
                _at(envelope, torch.searchsorted(recall, RECALLS, right=True)),
                "a rank whose recall equals r counts for r (searchsorted with right=False)",
            ),
        ):
            if torch.allclose(found.double(), value, atol=1e-9) and not torch.allclose(value, wanted, atol=1e-9):
                raise Mistake(f"{known}.")
        close("the precision", found.double(), wanted, 1e-6)
    nothing = answer(torch.zeros(3).bool(), 4)
    close("the precision of a ranking without a true positive", nothing.double(), torch.zeros(101).double())
    return "Their mean is AP of one class at one IoU threshold."


@exercise(
    "7.3",
    "An image without objects is not in the mean, whatever its detections.",
    "Concatenate the scores of all images, sort once, and compute one curve; N is the sum over the images.",
    "order = torch.cat(scores).argsort(descending=True); right = torch.cat(right)[order]; then as for the ten boxes.",
)
def pooled(answer: Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[int]], Tensor]) -> str:
    """One ranking for all images, instead of a mean over images."""

    def at_101(right: Verdicts, objects: int) -> float:
        return float(precision_at_recalls(right, objects).mean())

    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        lengths, objects = (4, 3, 6, 2), (3, 0, 5, 2)
        scores = [torch.rand(n, generator=generator).sort(descending=True).values for n in lengths]
        right = [_ranking(n, 10 * seed + n) if count else torch.zeros(n).bool() for n, count in zip(lengths, objects)]
        right = [r & (r.cumsum(0) <= count) for r, count in zip(right, objects)]
        order = torch.cat(scores).argsort(descending=True)
        wanted = at_101(torch.cat(right)[order], sum(objects))
        given = [s.clone() for s in scores]
        found = torch.as_tensor(answer(given, right, list(objects))).double()
        same_shape("AP", found, ())
        means = [at_101(r, count) for r, count in zip(right, objects) if count]
        filled = [k for k, count in enumerate(objects) if count]
        some = torch.cat([scores[k] for k in filled]).argsort(descending=True)
        for value, known in (
            (
                sum(means) / len(means),
                "that is still a mean of one AP per image: false positives in empty images cost nothing",
            ),
            (
                sum(means) / len(lengths),
                "that is a mean of one AP per image with 0 for empty ones, even without false positives",
            ),
            (
                at_101(torch.cat(right), sum(objects)),
                "the images are concatenated but not sorted by score",
            ),
            (
                at_101(torch.cat(right)[order.flip(0)], sum(objects)),
                "the ranking is reversed: the highest score comes first",
            ),
            (
                at_101(torch.cat([right[k] for k in filled])[some], sum(objects)),
                "the images without objects are left out of the ranking, and their false positives with them",
            ),
        ):
            if abs(float(found) - value) < 1e-9 and abs(value - wanted) > 1e-9:
                raise Mistake(f"{known}.")
        close("AP", found, wanted, 1e-6)
    return "All images share one ranking: a false positive in an empty image lowers the rank of all hits below it."


FAULTS = {
    "fraction": "give the figures in percent: 100 for a perfect detector.",
    "no_envelope": "the precision is not interpolated: at each recall take the best precision at this recall or above.",
    "strict": "an IoU of exactly the threshold is enough.",
    "voc": "if its best object is taken, a detection may claim the best of the free ones.",
    "reuse": "an object is claimed more than once: a second detection of it is a false positive.",
    "unsorted": "the detections of a class are not sorted by score over all images.",
    "per_image": "this is a mean of one AP per image: pool the detections of all images into one ranking per class.",
    "any_class": "a detection may only claim objects of its own class.",
    "absent_zero": "a class without objects has no AP: leave it out of the mean instead of counting it as 0.",
    "skip_undetected": "a class with objects but without detections has AP 0, and belongs to the mean.",
    "no_limit": "at most 100 detections per image and class are evaluated, the highest-scoring ones.",
    "box_area": "the size of an object is its annotated area (the outline's), not the area of its box.",
    "drop_outside": "objects of other sizes are dropped, so that detections of them are false positives: ignore both.",
    "keep_unmatched": "a detection that claims nothing and has itself another size is ignored, not a false positive.",
    "best_overlap": "a detection takes an ignored object only if no object that counts is left for it.",
    "count_outside": "objects of other sizes do not count among the N objects of a size.",
    "claim_ignored": "a detection that claims an ignored object leaves the ranking; here it is a false positive.",
    "crowd_counts": "a crowd does not count among the N objects, and detections in it are not true positives.",
    "drop_crowd": "crowds are dropped, so that detections in them are false positives: ignore these detections.",
    "crowd_iou": "the overlap with a crowd is the fraction of the detection's own area that lies inside.",
    "crowd_once": "a crowd can be claimed by any number of detections.",
    "false_ignored": "ignored detections leave the ranking; here they count as false positives.",
}
"""Misconceptions about COCO's rules, and what the checker says."""


def _annotated(rows: Sequence[tuple[Any, ...]]) -> Objects:
    """Annotations from rows of class, box (corner, width, height), area, and whether it is a crowd."""
    boxes = np.array([row[1] for row in rows], dtype=float).reshape(-1, 4)
    return Objects(
        np.arange(len(rows)),
        np.array([row[0] for row in rows], dtype=int),
        boxes,
        np.array([row[2] if len(row) > 2 and row[2] else math.prod(row[1][2:]) for row in rows], dtype=float),
        np.array([len(row) > 3 and row[3] for row in rows], dtype=bool),
        np.full(len(rows), -1),
    )


def _detected(rows: Sequence[tuple[Any, ...]]) -> Detections:
    """Detections from rows of score, class and box (corner, width, height)."""
    boxes = torch.tensor([(x, y, x + w, y + h) for _, _, (x, y, w, h) in rows], dtype=torch.float).reshape(-1, 4)
    labels = torch.tensor([label for _, label, _ in rows], dtype=torch.long)
    scores = torch.tensor([score for score, _, _ in rows], dtype=torch.float)
    return Detections(scores, labels, boxes, torch.arange(len(rows)))


def coco_cases() -> dict[str, tuple[list[Detections], list[Objects], int]]:
    """Small evaluations, the simplest first, by what they test: detections and objects of each image, and K."""
    big = (0, 0, 100, 100)
    near = [(0, big), (0, (40, 0, 100, 100)), (0, (200, 0, 100, 100)), (0, (0, 300, 100, 100))]
    one = [
        (0.9, 0, big), (0.8, 0, (15, 0, 100, 100)), (0.7, 0, (200, 0, 50, 100)), (0.95, 0, (400, 400, 50, 50)),
        (0.6, 0, (2, 0, 100, 100)), (0.5, 0, (0, 300, 75, 100)), (0.4, 0, (0, 300, 100, 96)),
    ]  # fmt: skip
    first = ([(0.6, 0, big), (0.3, 0, (300, 0, 40, 40))], [(0, big), (0, (200, 200, 60, 60))])
    empty: tuple[list[Any], list[Any]] = ([(0.9, 0, (10, 10, 50, 50)), (0.2, 0, (90, 90, 50, 50))], [])
    last = ([(0.5, 0, (200, 200, 60, 58)), (0.55, 0, (10, 10, 30, 30))], [(0, (200, 200, 60, 60))])
    classes = [
        ([(0.9, 0, big), (0.8, 1, (3, 0, 100, 100)), (0.7, 2, (200, 0, 90, 90)), (0.3, 1, (300, 300, 60, 60))],
         [(0, big), (1, (300, 300, 60, 60)), (3, (500, 0, 50, 50))]),
        ([(0.6, 0, (0, 0, 80, 100)), (0.5, 0, (200, 0, 100, 100))], [(0, big), (1, (200, 0, 100, 100))]),
    ]  # fmt: skip
    sizes = [
        ([(0.9, 0, (0, 0, 200, 200)), (0.85, 0, (300, 0, 20, 20)), (0.8, 0, (500, 0, 60, 60)),
          (0.7, 0, (0, 400, 150, 150)), (0.6, 0, (400, 400, 25, 25)), (0.5, 0, (300, 300, 25, 26)),
          (0.45, 0, (600, 300, 36, 36)), (0.4, 0, (700, 0, 30, 30))],
         [(0, (0, 0, 200, 200), 9000), (0, (300, 0, 20, 20)), (0, (500, 0, 60, 60), 900),
          (0, (300, 300, 25, 25)), (0, (600, 300, 36, 38)), (0, (600, 304, 32, 30)), (0, (702, 0, 30, 30))]),
        ([(0.65, 0, (0, 0, 100, 100)), (0.3, 0, (200, 0, 40, 40))], [(0, big), (0, (200, 0, 42, 40))]),
    ]  # fmt: skip
    crowds = [
        ([(0.9, 0, (10, 10, 40, 40)), (0.85, 0, (100, 100, 40, 40)), (0.8, 0, (600, 0, 50, 50)),
          (0.7, 0, (250, 250, 40, 40)), (0.6, 0, (330, 0, 60, 60)), (0.5, 0, (0, 0, 400, 380))],
         [(0, (0, 0, 400, 400), 100_000, True), (0, (600, 0, 50, 50)), (0, (250, 250, 40, 52)), (0, (800, 0, 50, 50))]),
    ]  # fmt: skip
    many = [(0.9 - 0.004 * n, 0, (40.0 * n, 0, 30, 30)) for n in range(130)]
    rows = [(0, (40.0 * n, 0, 30, 30)) for n in (0, 3, 50, 110, 120)]
    drawn = [_drawn(seed) for seed in range(6)]
    cases: dict[str, tuple[list[Any], int]] = {
        "one image and one class": ([(one, near)], 1),
        "several images": ([first, empty, last], 1),
        "several classes": (classes, 5),
        "objects of different sizes": (sizes, 1),
        "a crowd": (crowds, 1),
        "more than 100 detections": ([(many, rows)], 1),
        "everything together": (drawn, 4),
    }
    return {
        name: ([_detected(d) for d, _ in images], [_annotated(o) for _, o in images], k)
        for name, (images, k) in cases.items()
    }


def _drawn(seed: int) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
    """Random detections and objects of one image."""
    random = np.random.default_rng(seed)
    objects: list[tuple[Any, ...]] = []
    for n in range(8):
        x, y, w, h = random.uniform((0, 0, 15, 15), (500, 400, 160, 160)).tolist()
        crowd = n == 7 and seed % 2 == 0
        objects.append((int(random.integers(3)), (x, y, w * (1 + 2 * crowd), h), 0.6 * w * h, crowd))
    found = []
    for label, (x, y, w, h), *_ in [*objects, *objects, *objects[5:]]:
        shift = random.normal(0, 0.12, 4) * (w, h, w, h)
        box = (x + shift[0], y + shift[1], max(5.0, w + shift[2]), max(5.0, h + shift[3]))
        found.append((float(random.uniform()), int(random.integers(3)) if random.uniform() < 0.2 else label, box))
    return found, objects


@exercise(
    "7.4",
    "Work inside out: one class in one image at one threshold first. Its three verdicts are right, false, ignored.",
    "A detection prefers objects that count: allowed = (row >= t) & (~taken | crowd); if (allowed & ~ignored).any(), "
    "restrict allowed to these. It is right if the claimed object counts, and ignored if not.",
    "N counts the objects that are not ignored. Leave ignored detections out of the ranking, then use Exercise 7.2.",
    "A class without objects that count is NaN in a table [10, K] per size; np.nanmean of it is the figure.",
)
def check_coco(answer: Callable[[Sequence[Detections], Sequence[Objects], int], dict[str, float]]) -> str:
    """COCO's six AP figures."""
    cases = coco_cases()
    for what, case in cases.items():
        figures, wanted = _figures_of(answer, case), coco_figures(*case)
        if _agree(figures, wanted):
            continue
        suspects = [fault for fault in FAULTS if _agree(figures, coco_figures(*case, {fault}))]
        suspects = [fault for fault in suspects if not _agree(coco_figures(*case, {fault}), wanted)]
        for other in cases.values():  # several may explain one case
            if len(suspects) > 1:
                with contextlib.suppress(Exception):
                    figures_there = _figures_of(answer, other)
                    still = [fault for fault in suspects if _agree(figures_there, coco_figures(*other, {fault}))]
                    suspects = still or suspects
        if suspects:
            raise Mistake(f"with {what}: {FAULTS[suspects[0]]}")
        name = next(n for n in wanted if not _agree({n: figures[n]}, {n: wanted[n]}))
        raise Mistake(
            f"with {what}, {name} should be {wanted[name]:.2f}, but is {figures[name]:.2f}. The data is "
            f'coco_cases()["{what}"] of regolite.course.chapter_07.'
        )
    return "Your evaluator gives pycocotools' figures. Run it on real detections below."


def _figures_of(
    answer: Callable[[Sequence[Detections], Sequence[Objects], int], dict[str, float]],
    case: tuple[list[Detections], list[Objects], int],
) -> dict[str, float]:
    """The learner's six figures of one case."""
    found, objects, classes = case
    given = [Detections(d.scores.clone(), d.labels.clone(), d.boxes_xyxy.clone(), d.queries) for d in found]
    figures = answer(given, list(objects), classes)
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl")
    if not isinstance(figures, dict) or set(figures) != set(names):
        raise Mistake(f"return a dict of the six figures {', '.join(names)}.")
    if any(not torch.equal(g.boxes_xyxy, f.boxes_xyxy) for g, f in zip(given, found)):
        raise Mistake("the boxes that you are given were changed in place.")
    return {name: float(figures[name]) for name in names}


def _agree(one: dict[str, float], other: dict[str, float]) -> bool:
    return all(np.allclose(one[name], other[name], rtol=0, atol=1e-4, equal_nan=True) for name in one)


@exercise(
    "7.5",
    "Sort by score; then every rank is one threshold, and TP and FP are cumulative sums.",
    "2 TP + FP + FN is n + N at rank n: all detections plus all objects.",
    "f1 = 2 * right[order].cumsum(0) / (torch.arange(1, D + 1) + objects); the score at its argmax.",
)
def best_threshold(answer: Callable[[Tensor, Tensor, int], Tensor | float]) -> str:
    """The score above which F1 is best."""
    precise = "that maximizes precision alone: it keeps one detection and misses the rest"
    everything = "that keeps everything: it maximizes recall alone"
    early = "the cumulative sums are taken before sorting by score"
    given: list[float] = []
    right_ones: list[float] = []
    known: dict[str, list[float]] = {precise: [], everything: [], early: []}
    for length, objects, seed in ((8, 5, 3), (20, 14, 4), (40, 30, 5)):
        scores = torch.rand(length, generator=torch.Generator().manual_seed(seed))
        order = scores.argsort(descending=True)
        right = torch.empty(length, dtype=torch.bool)
        right[order] = _ranking(length, seed)
        hits, unsorted = right[order].double().cumsum(0), right.double().cumsum(0)
        said = torch.arange(1, length + 1)
        found = torch.as_tensor(answer(scores.clone(), right.clone(), objects)).float()
        same_shape("the threshold", found, ())
        if not (scores == found).any():
            raise Mistake(f"the threshold {float(found):.4f} is not one of the scores.")
        given.append(float(found))
        right_ones.append(float(scores[order][(2 * hits / (said + objects)).argmax()]))
        known[precise].append(float(scores[order][(hits / said).argmax()]))
        known[everything].append(float(scores.min()))
        known[early].append(float(scores[(2 * unsorted / (said + objects)).argmax()]))
    for what, values in known.items():
        if given == values:
            raise Mistake(f"{what}.")
    close("the thresholds of three rankings", torch.tensor(given), torch.tensor(right_ones), 1e-6)
    return "F1 gives an operating point; AP does not, since it measures the whole ranking without a threshold."


@exercise(
    "7.6",
    "For each detection: which object does it overlap most, and by how much? overlap.max(1) gives both.",
    "torch.where(best >= 0.5, truth_labels[which], labels), and unchanged labels without objects.",
)
def relabel(answer: Callable[[Int[Tensor, "D"], Float[Tensor, "D G"], Int[Tensor, "G"]], Tensor]) -> str:
    """Every detection that overlaps an object gets the object's class."""
    overlap = torch.tensor([[0.9, 0.1, 0.6], [0.3, 0.5, 0.2], [0.49, 0.2, 0.0], [0.0, 0.7, 0.8], [0.0, 0.0, 0.0]])
    labels, truth = torch.tensor([7, 8, 9, 5, 2]), torch.tensor([5, 4, 6])
    given = labels.clone()
    found = answer(given, overlap.clone(), truth.clone())
    same_shape("the labels", found, (5,))
    if not torch.equal(given, labels):
        raise Mistake("the input labels were changed in place; create new ones.")
    wanted = torch.tensor([5, 4, 9, 6, 2])
    if torch.equal(found, labels):
        raise Mistake("no label is changed.")
    for value, known in (
        ([5, 4, 5, 6, 5], "detections with a maximum overlap below 0.5 should keep their class"),
        ([5, 8, 9, 6, 2], "an overlap of exactly 0.5 is at least 0.5"),
        ([0, 1, 9, 2, 2], "that is the number of the object; its class is truth_labels of that number"),
    ):
        if found.tolist() == value:
            raise Mistake(f"{known}.")
    if not torch.equal(found, wanted):
        raise Mistake(f"the labels {labels.tolist()} should become {wanted.tolist()}, not {found.tolist()}.")
    alone = answer(labels.clone(), torch.zeros(5, 0), torch.zeros(0, dtype=torch.long))
    same_shape("the labels in an image without objects", alone, (5,))
    if not torch.equal(alone, labels):
        raise Mistake("in an image without objects the labels should not change.")
    return "Now measure both oracles: the gain of each is the cost of one type of error."
