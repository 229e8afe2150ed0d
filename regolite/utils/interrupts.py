"""Termination signals: Ctrl-C, and the signals sent by Slurm, systemd and a closing terminal.

A run finishes its step, saves, and raises :class:`RunStopped`. Outside a step it raises at once. A signal that was
ignored when the run began (`nohup`, `&`) stays ignored.

Notebook kernels and torchrun workers receive no signal when papermill or torchrun is killed. They therefore watch their
parent process and treat its end as a SIGTERM.

SIGUSR1 is for Slurm: ``sbatch --signal=USR1@120`` sends it two minutes before the time limit. torchrun does not forward
it; use ``--signal=TERM@120`` there.
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
POLL = 0.5  # seconds between two checks of the parent process
DEBOUNCE = 1.0  # seconds in which a second Ctrl-C is a duplicate: torchrun forwards what every process already received


class RunStopped(KeyboardInterrupt):
    """A signal has stopped a run after its state was saved.

    It derives from ``KeyboardInterrupt``, so that no ``except Exception`` catches it.

    Attributes:
        what: the reason, the last step, and where the state is saved.
        signum: number of the signal; the command line exits with 128 + ``signum``, as shells do.
    """

    def __init__(self, what: str, signum: int) -> None:
        super().__init__(what, signum)
        self.what, self.signum = what, signum

    def __str__(self) -> str:
        """The reason, and how to resume from Python."""
        return f"{self.what}; go on with resume=True"


class StopSignals(contextlib.ContextDecorator):
    """Catches termination signals while the decorated function runs. Signals are per process, hence one instance.

    Attributes:
        asked: the signal received, or None.
        so_far: progress of the run, for the message.
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
        if threading.current_thread() is threading.main_thread():  # Python handles signals in the main thread only
            before = {number: signal.getsignal(number) for number in SIGNALS}
            self._before = {n: handler for n, handler in before.items() if handler not in (signal.SIG_IGN, None)}
            for number in self._before:
                signal.signal(number, self._handle)
            if signal.SIGTERM in self._before and _has_launcher():
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
        """Defer signals from here on, until :meth:`leave` is called or :meth:`at_once` is entered."""
        self._holds = True

    @contextlib.contextmanager
    def at_once(self, so_far: str) -> Iterator[None]:
        """A part of the run with nothing to save: a signal, pending or new, ends the run at once."""
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
        signum = self.asked or signal.SIGTERM  # None if only another process received the signal
        name = "Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name
        if self._parent is not None and os.getppid() != self._parent:  # whichever process noticed it first
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
                # print is not reentrant, and the signal may have interrupted one.
                os.write(2, b"\nfinishing the step, then saving; Ctrl-C once more leaves at once\n")
        elif signum == signal.SIGINT and now - self._since > DEBOUNCE:
            raise KeyboardInterrupt


stop = StopSignals()


def _has_launcher() -> bool:
    """Whether this process is a notebook kernel or was started by torchrun."""
    return "TORCHELASTIC_RUN_ID" in os.environ or ("JPY_PARENT_PID" in os.environ and "ipykernel" in sys.modules)


def _hold_poller(parent: int | None) -> None:
    """Keep ipykernel from killing the kernel in the middle of a step when its parent process ends.

    Args:
        parent: the parent process id that ipykernel's poller sees; None for the real one.
    """
    poller = sys.modules.get("ipykernel.parentpoller")
    if poller is not None:
        fake = types.SimpleNamespace(getppid=lambda: parent, _exit=os._exit)
        vars(poller)["os"] = os if parent is None else fake


def leave_signals_to_parent(worker: int = 0) -> None:
    """Make DataLoader workers ignore signals, so that the current step can finish.

    A SIGTERM from the training process itself, by which PyTorch terminates a worker that hangs, is obeyed. Only Linux
    reports the sender of a signal; elsewhere the first signal ends a worker.
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
    """Send this process a SIGTERM, as Slurm would, when the process that started it ends."""

    def wait() -> None:
        os.read(0, 1)  # standard input is a pipe without writes: this returns when its other end is closed
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()
