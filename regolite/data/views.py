"""Datasets derived from others: a subset of the images, repeated images, or a concatenation."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from regolite.data.coco import category_differences
from regolite.data.dataset import DetectionDataset, Objects, View
from regolite.errors import UserError


class OfImages(View):
    """A subset of the images of a dataset; an index may be repeated.

    Args:
        dataset: the dataset.
        indices: indices of its images.
    """

    def __init__(self, dataset: DetectionDataset, indices: Sequence[int]) -> None:
        self.dataset, self.indices = dataset, list(indices)
        self.classes, self.category_ids, self.transform = dataset.classes, dataset.category_ids, dataset.transform
        self.image_ids = [dataset.image_ids[i] for i in self.indices]

    def place(self, i: int) -> tuple[DetectionDataset, int]:
        """The dataset, and the index of image ``i`` in it."""
        return self.dataset, self.indices[i]


def repeat_rare(dataset: DetectionDataset, share: float, seed: int = 0) -> OfImages:
    """Repeat images of rare classes: repeat factor sampling (Gupta et al., LVIS, CVPR 2019, section 5.1).

    The repeat factor of a class that occurs in a fraction f of the images is max(1, sqrt(share / f)); an image takes
    the largest factor of its classes. Factors are rounded stochastically, so that their expectation is exact.

    Args:
        dataset: the dataset.
        share: classes in less than this fraction of the images are rare.
        seed: seed of the stochastic rounding.
    """
    present = [np.unique(objects.labels[~objects.crowd]) for objects in map(dataset.objects, range(len(dataset)))]
    images = np.bincount(np.concatenate(present), minlength=len(dataset.classes))
    factors = np.sqrt(share * len(dataset) / images.clip(1)).clip(1)
    repeats = np.array([factors[labels].max(initial=1.0) for labels in present])
    whole = np.floor(repeats).astype(int)
    more = np.random.default_rng(seed).random(len(dataset)) < repeats - whole
    return OfImages(dataset, np.repeat(np.arange(len(dataset)), whole + more).tolist())


class Joined(View):
    """Concatenation of datasets with the same classes.

    Annotations are renumbered, since separate files may use the same ids.

    Args:
        datasets: the datasets, at least one.
        limit: use only the first ``limit`` images.

    Raises:
        UserError: the datasets differ in their classes, or share an image id.
    """

    def __init__(self, datasets: Sequence[DetectionDataset], limit: int | None = None) -> None:
        first = datasets[0]
        self.classes, self.category_ids, self.transform = first.classes, first.category_ids, first.transform
        for other in datasets[1:]:
            if (other.classes, other.category_ids) != (self.classes, self.category_ids):
                differences = category_differences(first.categories, other.categories, ("the first", "another"))
                what = differences[0] if differences else "their order"
                raise UserError(
                    f"datasets of different classes cannot be joined ({what}): give them the same categories"
                )
        self._places = [(dataset, i) for dataset in datasets for i in range(len(dataset))][:limit]
        self.image_ids = [dataset.image_ids[i] for dataset, i in self._places]
        if len(set(self.image_ids)) < len(self.image_ids):
            twice = next(i for n, i in enumerate(self.image_ids) if i in self.image_ids[:n])
            raise UserError(f"image {twice} is in two of the datasets: take it out of one, or give it another id")
        counts = [len(dataset.objects(i)) for dataset, i in self._places]
        self._first_ids = [0, *accumulate(counts)]

    def place(self, i: int) -> tuple[DetectionDataset, int]:
        """The dataset that image ``i`` comes from, and its index there."""
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
