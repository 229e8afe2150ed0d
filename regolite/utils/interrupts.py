"""Signals that ask a run to end: Ctrl-C, and what Slurm, systemd and the closing of a terminal send.

A run finishes its step, saves, and raises :class:`RunStopped`. Where a step is not running there is nothing to finish,
and it is raised at once. A signal that was ignored when the run began (`nohup`, `&`) stays ignored.

A notebook's kernel and a process of torchrun have nobody who sends them a signal when papermill or torchrun is killed.
So they watch their parent process, and take its end for a SIGTERM.

SIGUSR1 is there for Slurm: ``sbatch --signal=USR1@120`` sends it two minutes before the time is up. Under torchrun,
which does not pass it on, that is ``--signal=TERM@120``.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
import types
from collections.abc import Iterator
from typing import Any, NoReturn

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)
)  # Windows has the first two
POLL = 0.5  # seconds between two looks at the parent process
ONE = 1.0  # seconds in which two Ctrl-C are one: torchrun passes on what the terminal has sent to everybody


class RunStopped(KeyboardInterrupt):
    """A signal has ended a run, and what it had done is saved.

    A ``KeyboardInterrupt``, so that no ``except Exception`` takes it for an error.

    Attributes:
        what: what ended it, after which step, and where it is saved.
        signum: number of the signal; the command line exits with 128 more, as a shell does.
    """

    def __init__(self, what: str, signum: int) -> None:
        super().__init__(what, signum)
        self.what, self.signum = what, signum

    def __str__(self) -> str:
        """What happened, and how to go on from Python."""
        return f"{self.what}; go on with resume=True"


class StopSignals(contextlib.ContextDecorator):
    """Catches the signals while a function runs that it decorates: signals belong to the process, and so does this.

    Attributes:
        asked: the signal that has come, or None.
        so_far: what a message says of where the run stands.
    """

    def __init__(self) -> None:
        self.asked: int | None = None
        self.so_far = ""
        self._holds, self._since = False, 0.0
        self._before: dict[int, Any] = {}
        self._parent: int | None = None
        self._left = threading.Event()

    def __enter__(self) -> StopSignals:
        self.asked, self.so_far, self._holds = None, "before the first step", False
        if threading.current_thread() is threading.main_thread():  # Python delivers signals to no other
            before = {number: signal.getsignal(number) for number in SIGNALS}
            self._before = {n: handler for n, handler in before.items() if handler not in (signal.SIG_IGN, None)}
            for number in self._before:
                signal.signal(number, self._handle)
            if signal.SIGTERM in self._before and _is_kept():
                self._parent, self._left = os.getppid(), threading.Event()
                _hold_poller(self._parent)
                threading.Thread(target=self._watch, args=(self._parent, self._left), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
        self._left.set()
        self._parent = None
        _hold_poller(None)

    def hold(self) -> None:
        """From here on a signal waits until :meth:`leave` is called, or :meth:`at_once` entered."""
        self._holds = True

    @contextlib.contextmanager
    def at_once(self, so_far: str) -> Iterator[None]:
        """A part of the run with nothing to save: it ends here, if a signal has come or comes."""
        self.so_far = so_far
        if self.asked is not None:
            self.leave()
        self._holds = False
        yield
        self._holds = True

    def leave(self) -> NoReturn:
        """End the run.

        Raises:
            RunStopped: always.
        """
        signum = self.asked or signal.SIGTERM  # where another process was asked, and not this one
        name = "Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name
        if self._parent is not None and os.getppid() != self._parent:  # whichever of the processes noticed it first
            name = "the end of its parent process"
        raise RunStopped(f"stopped by {name} {self.so_far}", signum)

    def _watch(self, parent: int, left: threading.Event) -> None:
        while not left.wait(POLL):
            if os.getppid() != parent:
                os.kill(os.getpid(), signal.SIGTERM)
                return

    def _handle(self, signum: int, frame: object) -> None:
        now = time.monotonic()
        if self.asked is None:
            self.asked, self._since = signum, now
            if not self._holds:
                self.leave()
            if signum == signal.SIGINT and os.environ.get("RANK", "0") == "0":
                # Not by print, which the signal may have interrupted.
                os.write(2, b"\nfinishing the step, then saving; Ctrl-C once more leaves at once\n")
        elif signum == signal.SIGINT and now - self._since > ONE:
            raise KeyboardInterrupt


stop = StopSignals()


def _is_kept() -> bool:
    """Whether this process is a notebook's kernel, or one that torchrun has started."""
    return "TORCHELASTIC_RUN_ID" in os.environ or ("JPY_PARENT_PID" in os.environ and "ipykernel" in sys.modules)


def _hold_poller(parent: int | None) -> None:
    """Keep ipykernel from ending the kernel, in the middle of a step, as soon as its parent process is gone.

    Args:
        parent: the parent process that it shall see for now; None for the real one.
    """
    poller = sys.modules.get("ipykernel.parentpoller")
    if poller is not None:
        poller.os = os if parent is None else types.SimpleNamespace(getppid=lambda: parent, _exit=os._exit)


def leave_signals_to_parent(worker: int = 0) -> None:
    """For processes that prepare images: Ctrl-C and Slurm reach them too, and they are needed for one more step.

    A SIGTERM of the training process itself, by which PyTorch ends a worker that does not end, is obeyed. Only Linux
    says who has sent a signal; elsewhere workers end with the first.
    """
    for number in SIGNALS:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_obey, args=(os.getppid(),), daemon=True).start()


def _obey(parent: int) -> NoReturn:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
        pass
    os._exit(0)


def end_with_starter() -> None:
    """Ask this process to end, as Slurm would, when the one that has started it is gone."""

    def wait() -> None:
        os.read(0, 1)  # of a pipe into which nobody writes: this returns when its other end is closed
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()
