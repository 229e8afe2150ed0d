"""The order of the images: the same for any number of processes and workers, and for a run that was interrupted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from regolite.data import DetectionDataset, collate
from regolite.data.dataset import TRIES, item_or_error
from regolite.errors import UserError
from regolite.types import ImageBatch, Target
from regolite.utils.interrupts import leave_signals_to_parent
from regolite.utils.seeds import AUGMENTATION, ORDER, derive_seed

STRIDE = 32  # batches are padded to whole cells of the coarsest map of a backbone


class SeededItems(Dataset):
    """Images whose augmentation depends on seed, epoch and index alone, not on what was drawn before.

    The place of an image that cannot be read is taken by the next one of the data set that can: so a step has as many
    images as it would have, and which ones depends on nothing but the data. That one is then seen twice an epoch.

    Args:
        dataset: the images.
        seed: seed of the augmentation.
        on_broken: ``"stop"`` lets the error pass that says what cannot be read, ``"skip"`` takes another image.
    """

    def __init__(self, dataset: DetectionDataset, seed: int, on_broken: str = "stop") -> None:
        self.dataset, self.seed, self.on_broken = dataset, seed, on_broken

    def __getitem__(self, key: tuple[int, int]) -> tuple[Float[Tensor, "3 H W"], Target, list[str]]:
        """An image, its objects, and what could not be read in its place."""
        epoch, index = key
        broken: list[str] = []
        while len(broken) < TRIES:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(derive_seed(self.seed, AUGMENTATION, epoch, index))
                i = (index + len(broken)) % len(self.dataset)
                found = item_or_error(self.dataset, i)
            if not isinstance(found, UserError):
                return *found, broken
            if self.on_broken == "stop":
                raise found
            broken.append(str(found))
        raise UserError(f"{TRIES} images in a row cannot be read, is the disk there? The first: {broken[0]}")


class EpochBatches(Sampler):
    """Batches of one epoch, each image once, in an order that seed and epoch decide.

    Images of like shape share a batch: a wide and a tall one together would be padded to a square, and up to half of
    the work would be done on padding. The order is shuffled, sorted by shape in pools of some batches, and the batches
    are shuffled again.

    Args:
        shapes: height by width of every image.
        batch_size: images per step, over all processes; one batch of an epoch may be smaller.
        seed: seed of the order.
        epoch: number of the epoch.
        skip: batches that an interrupted run has seen already.
        rank: number of this process.
        processes: how many share every batch.
        parts: in how many parts each of them does its share, one after another.
    """

    POOL = 16

    def __init__(
        self,
        shapes: Float[Tensor, "N"],
        batch_size: int,
        seed: int,
        epoch: int,
        skip: int = 0,
        rank: int = 0,
        processes: int = 1,
        parts: int = 1,
    ) -> None:
        self.shapes, self.batch_size, self.seed, self.epoch, self.skip = shapes, batch_size, seed, epoch, skip
        self.rank, self.processes, self.parts = rank, processes, parts

    def __len__(self) -> int:
        return (-(-len(self.shapes) // self.batch_size) - self.skip) * self.parts

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in self.whole():
            for part in range(self.parts):
                own = batch[part * self.processes + self.rank :: self.processes * self.parts]
                # Nobody is left without an image, even by a batch smaller than their number; see `steps`.
                yield [(self.epoch, i) for i in own or batch[:1]]

    def whole(self) -> list[list[int]]:
        """The batches of all processes together."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, ORDER, self.epoch))
        order = torch.randperm(len(self.shapes), generator=generator)
        batches: list[Tensor] = []
        for pool in order.split(self.POOL * self.batch_size):
            batches += pool[self.shapes[pool].argsort(stable=True)].split(self.batch_size)
        shuffled = torch.randperm(len(batches), generator=generator).tolist()
        return [batches[number].tolist() for number in shuffled[self.skip :]]


def loader(
    dataset: DetectionDataset, seed: int, workers: int, batches: EpochBatches, pin_memory: bool, on_broken: str = "stop"
) -> DataLoader:
    """The padded batches of one epoch: images, their objects, and what could not be read."""
    return DataLoader(
        SeededItems(dataset, seed, on_broken),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
        worker_init_fn=leave_signals_to_parent,
    )


def _collate(
    items: list[tuple[Float[Tensor, "3 _h _w"], Target, list[str]]],
) -> tuple[ImageBatch, list[Target], list[str]]:
    images, targets = collate([(pixels, target) for pixels, target, _ in items], multiple=STRIDE)
    return images, targets, [message for *_, broken in items for message in broken]


@dataclass
class Part:
    """What a process does at once: its share of a batch, or one of several parts of that.

    Attributes:
        images: the images.
        targets: their objects.
        broken: what could not be read, and has another image in its place.
        counts: 1, or 0 where the batch has too few images for everybody: then this is one that another process has
            too. It is done all the same, since the others wait for everybody's gradient, and counts for nothing.
    """

    images: ImageBatch
    targets: list[Target]
    broken: list[str]
    counts: int

    @property
    def num_images(self) -> int:
        """The number of images that count."""
        return self.counts * len(self.targets)

    @property
    def num_objects(self) -> int:
        """The number of objects that count."""
        return self.counts * sum(len(target) for target in self.targets)


def steps(loaded: DataLoader, batches: EpochBatches) -> Iterator[list[Part]]:
    """For each step of an epoch, the parts that this process does.

    Args:
        loaded: the :func:`loader` of these batches.
        batches: the batches.
    """
    items = iter(loaded)
    for batch in batches.whole():
        numbers = [part * batches.processes + batches.rank for part in range(batches.parts)]
        parts = []
        for number in numbers:
            images, targets, broken = next(items)
            parts.append(Part(images, targets, broken, int(number < len(batch))))
        yield parts
