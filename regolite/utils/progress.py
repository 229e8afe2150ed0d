"""Progress and time left: a bar in a terminal; elsewhere (notebooks, papermill, log files) a plain line now and then.

A bar redraws itself, which only a terminal shows well: a log file holds every redrawing, and the widget that takes its
place in Jupyter is invisible to papermill and leaves its state in the stored notebook.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

EVERY = 15.0  # seconds between two lines, and later a fiftieth of the time passed: a long run shall not fill pages

_BAR = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"


class Status:
    """How far a piece of work has come.

    Args:
        title: what is being done.
        enabled: show anything at all.
        leave: leave the full bar on the terminal at the end.
    """

    def __init__(self, title: str, enabled: bool = True, leave: bool = True) -> None:
        self.title = title
        self._bar = tqdm(total=100, desc=title, bar_format=_BAR, disable=None if enabled else True, leave=leave)
        self._lines = enabled and self._bar.disable  # tqdm disables itself where there is no terminal
        self._start = self._shown = time.monotonic()
        self._first: float | None = None

    def update(self, done: float, text: str = "") -> None:
        """Show how far it is.

        Args:
            done: finished part, 0 to 1. The first is where the work starts: not 0 in a run that is resumed.
            text: what else to say.
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
        """Print a line, above the bar where there is one."""
        tqdm.write(text)

    def close(self) -> None:
        """End it."""
        self._bar.close()


def track(items: Any, title: str, enabled: bool = True) -> Iterator[Any]:
    """The items of something that has a length, while showing how many are done."""
    status = Status(title, enabled, leave=False)
    status.update(0.0)
    for n, item in enumerate(items, 1):
        yield item
        status.update(n / len(items))
    status.close()


def _clock(seconds: float) -> str:
    return tqdm.format_interval(round(seconds))
