"""Data sets made of others: some classes of one, some images of one, or several in a row."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from regolite.data.coco import category_differences
from regolite.data.dataset import DetectionDataset, Objects, View
from regolite.errors import UserError


class OfImages(View):
    """Some images of a data set, each as often as it is named.

    Args:
        dataset: the data set.
        indices: which of its images.
    """

    def __init__(self, dataset: DetectionDataset, indices: Sequence[int]) -> None:
        self.dataset, self.indices = dataset, list(indices)
        self.classes, self.category_ids, self.transform = dataset.classes, dataset.category_ids, dataset.transform
        self.image_ids = [dataset.image_ids[i] for i in self.indices]

    def place(self, i: int) -> tuple[DetectionDataset, int]:
        """The data set, and the index of image ``i`` in it."""
        return self.dataset, self.indices[i]


def repeat_rare(dataset: DetectionDataset, share: float, seed: int = 0) -> OfImages:
    """Show images of rare classes more often: repeat factor sampling (Gupta et al., LVIS, CVPR 2019, section 5.1).

    An image is repeated by the factor of its rarest class, sqrt(share / f) for a class in the share f of the images,
    and 1 at least. A fraction is rounded up or down at random, with the probability that gives the factor on average.

    Args:
        dataset: the data set.
        share: classes in fewer than this share of the images are rare.
        seed: of the rounding.
    """
    present = [np.unique(objects.labels[~objects.crowd]) for objects in map(dataset.objects, range(len(dataset)))]
    images = np.bincount(np.concatenate(present), minlength=len(dataset.classes))
    factors = np.sqrt(share * len(dataset) / images.clip(1)).clip(1)
    wanted = np.array([factors[labels].max(initial=1.0) for labels in present])
    whole = np.floor(wanted).astype(int)
    more = np.random.default_rng(seed).random(len(dataset)) < wanted - whole
    return OfImages(dataset, np.repeat(np.arange(len(dataset)), whole + more).tolist())


class Joined(View):
    """Several data sets of the same classes in a row, as one.

    Annotations are numbered anew, since files that were written apart may give the same number twice.

    Args:
        datasets: the data sets, at least one.
        limit: use only the first so many images.

    Raises:
        UserError: when they differ in their classes, or share an image.
    """

    def __init__(self, datasets: Sequence[DetectionDataset], limit: int | None = None) -> None:
        first = datasets[0]
        self.classes, self.category_ids, self.transform = first.classes, first.category_ids, first.transform
        for other in datasets[1:]:
            if (other.classes, other.category_ids) != (self.classes, self.category_ids):
                differences = category_differences(first.categories, other.categories, ("the first", "another"))
                said = differences[0] if differences else "their order"
                raise UserError(
                    f"data sets of different classes cannot be joined ({said}): give them the same categories"
                )
        self._places = [(dataset, i) for dataset in datasets for i in range(len(dataset))][:limit]
        self.image_ids = [dataset.image_ids[i] for dataset, i in self._places]
        if len(set(self.image_ids)) < len(self.image_ids):
            twice = next(i for n, i in enumerate(self.image_ids) if i in self.image_ids[:n])
            raise UserError(f"image {twice} is in two of the data sets: take it out of one, or give it another id")
        counts = [len(dataset.objects(i)) for dataset, i in self._places]
        self._first_ids = [0, *accumulate(counts)]

    def place(self, i: int) -> tuple[DetectionDataset, int]:
        """The data set that image ``i`` comes from, and its index there."""
        return self._places[i]

    def objects(self, i: int) -> Objects:
        """All annotations of image ``i``, crowds included."""
        dataset, place = self._places[i]
        return self._renumbered(i, dataset.objects(place))

    def _renumbered(self, i: int, objects: Objects) -> Objects:
        ids = self._first_ids[i] + 1 + np.arange(len(objects))
        new = {-1: -1, **dict(zip(objects.ids.tolist(), ids.tolist()))}
        renumbered = copy.copy(objects)
        renumbered.ids = ids
        renumbered.decided_by = np.array([new[decider] for decider in objects.decided_by.tolist()], dtype=np.int64)
        return renumbered
