"""What a run measures of itself between two lines of ``metrics.jsonl``."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from regolite.errors import UserError

T = TypeVar("T")

# What depends on the clock and the machine; all else is the same in every run of a configuration.
MEASURED = ("seconds", "cpu_seconds", "images_per_second", "step_seconds", "data_wait", "memory_gb")


class Meter:
    """Means of the metrics since the last line.

    Attributes:
        images: images seen, by all processes.
        steps: steps done.
        skipped: steps that the optimizer left out, since float16 had overflown; their gradient has no norm.
        waited: seconds of waiting for images.
        worked: seconds of all else that belongs to steps.
        sums: sums of the losses by name.
        norms: sum of the norms of the gradient.
    """

    def __init__(
        self,
        images: float = 0.0,
        steps: int = 0,
        skipped: int = 0,
        waited: float = 0.0,
        worked: float = 0.0,
        sums: dict[str, float] | None = None,
        norms: Tensor | float | None = None,
    ) -> None:
        self.images, self.steps, self.skipped, self.waited, self.worked = images, steps, skipped, waited, worked
        self.sums, self.norms = dict(sums or {}), norms

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that a resumed run writes the same means."""
        return dict(vars(self))

    def add(
        self, values: dict[str, float], norm: Tensor | None, skipped: bool, images: float, waited: float, worked: float
    ) -> None:
        """Count a step."""
        self.images, self.steps, self.skipped = self.images + images, self.steps + 1, self.skipped + skipped
        self.waited, self.worked = self.waited + waited, self.worked + worked
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        if norm is not None and not skipped:
            self.norms = norm.detach() + (0.0 if self.norms is None else self.norms)

    def line(self, step: int, epoch: int, seconds: float, lr: float, device: torch.device) -> dict[str, Any]:
        """A line of metrics: means over the steps."""
        means = {name: round(total / self.steps, 5) for name, total in self.sums.items()}
        took, counted = self.waited + self.worked, self.steps - self.skipped
        return {
            "kind": "train",
            "step": step,
            "epoch": epoch,
            "seconds": round(seconds, 2),
            "lr": lr,
            "loss": means.pop("loss"),
            "gradient_norm": None if self.norms is None else round(float(self.norms) / counted, 5),
            **({"skipped_steps": self.skipped} if self.skipped else {}),
            "images_per_second": round(self.images / took, 2),
            "step_seconds": round(took / self.steps, 4),
            "data_wait": round(self.waited / took, 4),
            "memory_gb": round(peak_memory(device), 3),
            "terms": means,
        }


def timed(items: Iterable[T]) -> Iterator[tuple[float, T]]:
    """Every item, and how many seconds it was waited for."""
    iterator = iter(items)
    while True:
        start = time.perf_counter()
        try:
            item = next(iterator)
        except StopIteration:
            return
        yield time.perf_counter() - start, item


def peak_memory(device: torch.device) -> float:
    """The most memory in use so far, in GB (10^9 bytes): of the GPU, or of this process where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset / 1e9
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


class TensorBoard:
    """A watcher of a run that writes every line of metrics for TensorBoard too.

    Args:
        folder: where TensorBoard is to find them.
        watch: another watcher, called after this one.

    Raises:
        UserError: when TensorBoard is not installed.
    """

    def __init__(self, folder: Path, watch: Callable[[dict[str, Any]], None] | None = None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError("tensorboard=True needs TensorBoard: pip install 'regolite[tensorboard]'") from error
        self.folder, self.watch, self._kind = folder, watch, SummaryWriter
        self._writer: SummaryWriter | None = None

    def __call__(self, line: dict[str, Any]) -> None:
        """Write a line, now: a run that is killed has lost nothing."""
        step = line["step"]
        if self._writer is None:  # what a resumed run writes again takes the place of what is there
            self._writer = self._kind(str(self.folder), purge_step=step)
        prefix = line["kind"] if line["kind"] == "train" else f"{line['kind']}/{line.get('split', '')}"
        stages = {f"stage {stage['stage']}": stage for stage in line.get("stages", [])}
        for name, value in _scalars(prefix, {**line, **stages}):
            self._writer.add_scalar(name, value, step)
        self._writer.flush()
        if self.watch is not None:
            self.watch(line)

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()


def _scalars(prefix: str, values: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """All numbers by name, those of nested dictionaries too."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _scalars(f"{prefix}/{name}", value)
        elif isinstance(value, (int, float)) and name not in ("step", "stage"):
            yield f"{prefix}/{name}", value
