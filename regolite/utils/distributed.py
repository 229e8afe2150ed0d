"""Communication between the processes of a distributed run, apart from gradients.

In a single process these functions are no-ops. Messages are numbers and small CPU objects. They are sent by gloo, so
that no GPU is synchronized.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

PATIENCE = timedelta(hours=3)  # timeout of a collective: the other ranks wait while rank 0 evaluates, for example
_groups: dict[object, Any] = {}  # PyTorch annotates a new group as a group or -100


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Rank of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def total(*numbers: float | int) -> list[float]:
    """Sum each number over all processes (all-reduce)."""
    if world_size() == 1:
        return [float(number) for number in numbers]
    sums = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(sums, group=_group())
    return sums.tolist()


def gather(value: T) -> list[T]:
    """Gather the values of all processes on rank 0, in rank order; the other ranks get an empty list."""
    if world_size() == 1:
        return [value]
    values = [value] * world_size() if rank() == 0 else None  # overwritten by gather_object
    dist.gather_object(value, values, group=_group())
    return values or []


def from_first(value: T) -> T:
    """Broadcast the value of rank 0."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, group=_group())
    return values[0]


def _group() -> Any:
    """All processes, connected by gloo."""
    world = dist.group.WORLD
    if world not in _groups:
        _groups.clear()  # groups of an earlier run in this process
        _groups[world] = dist.new_group(backend="gloo", timeout=PATIENCE)
    return _groups[world]
