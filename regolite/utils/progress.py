"""Progress and remaining time: a bar in a terminal, occasional plain lines elsewhere (notebooks, papermill, log files).

A log file would contain every redraw of a bar. tqdm's Jupyter widget is invisible to papermill and leaves its state in
the stored notebook.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Protocol, TypeVar, runtime_checkable

from tqdm import tqdm

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

EVERY = 15.0  # least seconds between two lines; in long runs a fiftieth of the elapsed time

_BAR = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"


class Status:
    """Shows the progress of a task.

    Args:
        title: name of the task.
        enabled: False shows nothing.
        leave: keep the finished bar on the terminal.
    """

    def __init__(self, title: str, enabled: bool = True, leave: bool = True) -> None:
        self.title = title
        self._bar = tqdm(total=100, desc=title, bar_format=_BAR, disable=None if enabled else True, leave=leave)
        self._lines = enabled and self._bar.disable  # tqdm disables itself without a terminal
        self._start = self._shown = time.monotonic()
        self._first: float | None = None

    def update(self, done: float, text: str = "") -> None:
        """Show the progress.

        Args:
            done: finished fraction, 0 to 1. The first call gives the start: not 0 in a resumed run.
            text: additional text.
        """
        if self._first is None:
            self._first = done
        if not self._lines:
            self._bar.n = round(100 * done, 1)
            self._bar.set_postfix_str(text)
            return
        now = time.monotonic()
        passed = now - self._start
        if now - self._shown >= max(EVERY, passed / 50):
            self._shown = now
            left = _clock(passed * (1 - done) / (done - self._first)) if done > self._first else "?"
            said = ", ".join(filter(None, [f"{self.title} {100 * done:3.0f} %", text]))
            print(f"{said}, {_clock(passed)} passed, {left} left", flush=True)

    @staticmethod
    def say(text: str) -> None:
        """Print a line, above the bar if there is one."""
        tqdm.write(text)

    def close(self) -> None:
        """Remove or finish the bar."""
        self._bar.close()


@runtime_checkable
class SizedIterable(Protocol[T_co]):
    """An iterable with a length, as a list or a ``DataLoader``."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[T_co]: ...


def track(items: SizedIterable[T], title: str, enabled: bool = True) -> Iterator[T]:
    """Iterate over items and show how many are done."""
    status = Status(title, enabled, leave=False)
    status.update(0.0)
    for n, item in enumerate(items, 1):
        yield item
        status.update(n / len(items))
    status.close()


def _clock(seconds: float) -> str:
    return tqdm.format_interval(round(seconds))
