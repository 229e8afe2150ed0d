"""The order of the pictures: the same for any number of processes and workers, and for a run that was interrupted."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from regolite.data import collate

STRIDE = 32  # batches are padded to whole cells of the coarsest map of a backbone


class SeededItems(Dataset):
    """Pictures whose augmentation depends on seed, epoch and index alone, not on what was drawn before."""

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, key: tuple[int, int]):
        epoch, index = key
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(hash((self.seed, epoch, index)) % 2**63)
            return self.dataset[index]


class EpochBatches(Sampler):
    """Batches of one epoch, each picture once, in an order that seed and epoch decide.

    Pictures of like shape share a batch: a wide and a tall one together would be padded to a square, and up to half of
    the work would be done on padding. The order is shuffled, sorted by shape in pools of some batches, and the batches
    are shuffled again.

    Args:
        shapes: height by width of every picture.
        batch_size: pictures per step, over all processes; one batch of an epoch may be smaller.
        seed: seed of the order.
        epoch: number of the epoch.
        skip: batches that an interrupted run has seen already.
        rank: number of this process.
        processes: how many share the batches.
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
    ) -> None:
        self.shapes, self.batch_size, self.seed, self.epoch, self.skip = shapes, batch_size, seed, epoch, skip
        self.rank, self.processes = rank, processes

    def __len__(self) -> int:
        return -(-len(self.shapes) // self.batch_size) - self.skip

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(hash((self.seed, self.epoch)) % 2**63)
        order = torch.randperm(len(self.shapes), generator=generator)
        batches: list[Tensor] = []
        for pool in order.split(self.POOL * self.batch_size):
            batches += pool[self.shapes[pool].argsort(stable=True)].split(self.batch_size)
        for number in torch.randperm(len(batches), generator=generator).tolist()[self.skip :]:
            batch = batches[number]
            # Every process takes at least one picture, even of a batch smaller than their number.
            own = batch[self.rank :: self.processes] if len(batch) > self.rank else batch[:1]
            yield [(self.epoch, int(i)) for i in own]


def loader(dataset: Dataset, seed: int, workers: int, batches: EpochBatches, pin_memory: bool) -> DataLoader:
    """The padded batches of one epoch."""
    return DataLoader(
        SeededItems(dataset, seed),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=partial(collate, multiple=STRIDE),
        pin_memory=pin_memory,
    )
