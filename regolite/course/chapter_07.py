"""Checkers of notebook 07: measuring detectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regolite.course import Mistake, close, exercise, same_shape

Verdicts = Bool[Tensor, "D"]


def _curve(right: Verdicts, objects: int) -> tuple[Float[Tensor, "D"], Float[Tensor, "D"], Float[Tensor, "D"]]:
    """Precision, its running maximum from the end, and recall after each detection of a ranking."""
    hits = right.double().cumsum(0)
    precision = hits / torch.arange(1, len(right) + 1)
    return precision, precision.flip(0).cummax(0).values.flip(0), hits / objects


def _at_101(right: Verdicts, objects: int) -> float:
    """COCO's AP of a ranking: the mean interpolated precision at 101 recalls."""
    _, envelope, recall = _curve(right, objects)
    reached = torch.searchsorted(recall, torch.from_numpy(np.linspace(0, 1, 101)))
    return float(torch.cat([envelope, envelope.new_zeros(1)])[reached].mean())


def _ranking(length: int, seed: int) -> Verdicts:
    """A ranking with fewer correct detections towards the end; the second one is wrong."""
    drawn = torch.rand(length, generator=torch.Generator().manual_seed(seed))
    right = drawn < torch.linspace(1.0, 0.3, length)
    right[:2] = torch.tensor([True, False])
    return right


@exercise(
    "7.1",
    "Only correct boxes increase the recall, each by 1/N. What is the height of the curve there?",
    "The height is the running maximum of the precision from the end: flip, cummax, flip.",
    "Sum the running maximum over the correct boxes, and divide by N.",
)
def area(answer: Callable[[Verdicts, int], Tensor]) -> str:
    """The area under the interpolated precision."""
    for length, objects, seed in ((7, 6, 0), (12, 10, 1), (30, 25, 2)):
        right = _ranking(length, seed)
        precision, envelope, _ = _curve(right, objects)
        wanted = float(envelope[right].sum() / objects)
        found = torch.as_tensor(answer(right, objects)).double()
        same_shape("the area", found, ())
        for value, known in (
            (precision.mean(), "that is the mean of the precisions over all boxes; only correct boxes add area"),
            (
                precision[right].sum() / objects,
                "that is the area without interpolation: take the best precision at this recall or above",
            ),
            (envelope[right].mean(), "that divides by the number of correct boxes and ignores the missed objects"),
            (_at_101(right, objects), "that is the mean at 101 recalls; compute the exact area"),
        ):
            if abs(float(found) - float(value)) < 1e-9 and abs(float(value) - wanted) > 1e-9:
                raise Mistake(f"{known}.")
        close("the area", found, wanted, 1e-6)
    close(
        "the area of a ranking without a correct box", torch.as_tensor(answer(torch.zeros(3).bool(), 4)).double(), 0.0
    )
    return "The mean at 101 recalls differs from the exact area by less than 1/101 for each step."


@exercise(
    "7.2",
    "What are the intersection and the union of the box and its shifted copy?",
    "The IoU is 0.8 / 1.2. At which of 0.50, 0.55, ..., 0.95 is every box correct?",
    "0.8 / 1.2 is 0.667: at 0.50, 0.55, 0.60 and 0.65 all boxes are correct, at the six others none.",
)
def moved_boxes(prediction: Mapping[str, float | int]) -> str:
    """AP, AP50 and AP75 of boxes whose IoU is two thirds."""
    missing = [name for name in ("AP", "AP50", "AP75") if name not in prediction]
    if missing:
        raise Mistake(f"the prediction lacks {', '.join(missing)}.")
    ap, ap50, ap75 = (float(prediction[name]) for name in ("AP", "AP50", "AP75"))
    if max(ap, ap50) <= 1 and ap > 0:
        raise Mistake("give the values in percent: 100, not 1.")
    if abs(ap50 - 100) > 0.5:
        raise Mistake(f"AP50 is not {ap50:g}: compute the IoU of a box with itself shifted by 0.2 of its width.")
    if abs(ap75) > 0.5:
        raise Mistake(f"AP75 is not {ap75:g}: is the IoU at least 0.75?")
    if abs(ap - 80) < 0.5 or abs(ap - 66.7) < 0.5:
        raise Mistake(f"AP is not {ap:g}: it is not a mean of overlaps; each threshold is passed by all boxes or none.")
    if abs(ap - 50) < 0.5:
        raise Mistake("AP is not 50: that is the mean of AP50 and AP75, and AP is the mean over ten thresholds.")
    if abs(ap - 40) > 0.5:
        raise Mistake(f"AP is not {ap:g}: count the thresholds, of ten, at which the boxes are correct.")
    return "An IoU of 2/3 passes four of ten thresholds. AP rewards exact boxes in steps of 0.05."


@exercise(
    "7.3",
    "An image without objects is not in the mean, whatever its detections.",
    "Concatenate the scores of all images, sort once, and compute one curve; N is the sum over the images.",
    "order = torch.cat(scores).argsort(descending=True); right = torch.cat(right)[order]; then as for the ten boxes.",
)
def pooled(answer: Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[int]], Tensor]) -> str:
    """One ranking for all images, instead of a mean over images."""
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        lengths, objects = (4, 3, 6, 2), (3, 0, 5, 2)
        scores = [torch.rand(n, generator=generator).sort(descending=True).values for n in lengths]
        right = [_ranking(n, 10 * seed + n) if count else torch.zeros(n).bool() for n, count in zip(lengths, objects)]
        right = [r & (r.cumsum(0) <= count) for r, count in zip(right, objects)]
        order = torch.cat(scores).argsort(descending=True)
        wanted = _at_101(torch.cat(right)[order], sum(objects))
        given = [s.clone() for s in scores]
        found = torch.as_tensor(answer(given, right, list(objects))).double()
        same_shape("AP", found, ())
        means = [_at_101(r, count) for r, count in zip(right, objects) if count]
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
                _at_101(torch.cat(right), sum(objects)),
                "the images are concatenated but not sorted by score",
            ),
            (
                _at_101(torch.cat(right)[order.flip(0)], sum(objects)),
                "the ranking is reversed: the highest score comes first",
            ),
        ):
            if abs(float(found) - value) < 1e-9 and abs(value - wanted) > 1e-9:
                raise Mistake(f"{known}.")
        close("AP", found, wanted, 1e-6)
    return "All images share one ranking: a false positive in an empty image lowers the rank of all hits below it."


@exercise(
    "7.4",
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
    "7.5",
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
