"""What several processes tell each other, apart from gradients.

Everything here works without several processes too, and then does nothing. The messages are numbers and small objects
of the CPU and go by gloo, so that no GPU has to be waited for.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

PATIENCE = timedelta(hours=3)  # how long the others wait while the first evaluates, say
_groups: dict[Any, Any] = {}


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this one, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def total(*numbers: float | int) -> list[float]:
    """The sum of each number over all processes."""
    if world_size() == 1:
        return [float(number) for number in numbers]
    sums = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(sums, group=_group())
    return sums.tolist()


def gather(value: T) -> list[T]:
    """The values of all processes for the first one, in their order; an empty list for the others."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size() if rank() == 0 else None
    dist.gather_object(value, values, group=_group())
    return values or []


def from_first(value: T) -> T:
    """The first process's value, for all."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, group=_group())
    return values[0]


def _group() -> Any:
    """The same processes, connected by gloo."""
    world = dist.group.WORLD
    if world not in _groups:
        _groups.clear()  # those of an earlier run in this process
        _groups[world] = dist.new_group(backend="gloo", timeout=PATIENCE)
    return _groups[world]
