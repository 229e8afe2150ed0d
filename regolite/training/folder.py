"""The folder of a run: what is written where.

``config.json`` the configuration; ``metrics.jsonl`` a line for every logged step and every evaluation; ``train.log``
the same for people; ``model.safetensors`` the last weights; ``best.safetensors`` those with the best AP on the
validation images, by which they were chosen (published figures are those of the last weights); ``checkpoints/`` what a
run needs to go on: the last few, and ``best.pt``; ``figures/`` curves and images; ``lock.json`` which process writes
here (:mod:`regolite.utils.lock`).

A disk that is full ends no run. Lines of metrics wait in memory until they can be written, a checkpoint waits for the
next one's time, and those that are there are kept. Only what is written at the end has to succeed.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import logging
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from regolite.errors import UserError, not_writable
from regolite.utils import distributed
from regolite.utils.files import write_atomic
from regolite.utils.lock import locked
from regolite.utils.progress import Status


@contextlib.contextmanager
def only_writer(path: str | Path) -> Iterator[None]:
    """Hold the lock of a run's folder; of several processes the first one holds it for all.

    Raises:
        UserError: in all processes, when somebody else writes there, or nobody can.
    """
    with contextlib.ExitStack() as held:
        problem = ""
        if distributed.rank() == 0:
            try:
                held.enter_context(locked(path))
            except UserError as error:
                problem = str(error)
        if problem := distributed.from_first(problem):
            raise UserError(problem)
        yield


class RunFolder:
    """The folder of a run.

    Args:
        path: where it is.
        resume: go on with what is there.
        watch: called with every line of metrics when it is written.
        keep: how many checkpoints to keep, apart from the best.

    Raises:
        UserError: when there is a run already and it is not to be resumed, or the folder cannot be written.
    """

    def __init__(
        self, path: str | Path, resume: bool, watch: Callable[[dict[str, Any]], None] | None = None, keep: int = 2
    ) -> None:
        self.path, self.watch, self.keep = Path(path), watch, keep
        self._unwritten = ""  # lines of metrics for which there was no space
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"output {self.path} is a file; give a folder")
        if (self.path / "config.json").exists() and not resume:
            raise UserError(f"{self.path} holds a run already; go on with it (resume) or give another output folder")
        try:
            for folder in (self.path, self.checkpoints, self.figures):
                folder.mkdir(parents=True, exist_ok=True)
            self._check_writable()
        except OSError as error:
            raise not_writable(error, self.path) from error
        self.log = logging.getLogger(f"regolite.run.{self.path.resolve()}")
        self.log.setLevel(logging.INFO)
        self.log.propagate = False
        self.close()  # what an earlier run in this folder left open when it failed
        handler = _LogFile(self.path / "train.log", encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        self.log.addHandler(handler)

    def _check_writable(self) -> None:
        """Try to write wherever the run will, now and not after an hour.

        Raises:
            OSError: something cannot be written.
        """
        for folder in (self.path, self.checkpoints, self.figures, self.path / "tensorboard"):
            if folder.exists():
                try:
                    with tempfile.TemporaryFile(dir=folder) as probe:
                        probe.write(bytes(4096))
                        probe.flush()
                        os.fsync(probe.fileno())  # some file systems notice only now that they are full
                except OSError as error:
                    raise OSError(error.errno, error.strerror, str(folder)) from error  # not the temporary file's name
        for file in (self.metrics, self.path / "train.log"):
            if file.exists():
                open(file, "ab").close()
        for name in ("config.json", "model.safetensors", "best.safetensors"):  # written beside their place and renamed
            if (self.path / name).is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(self.path / name))

    def close(self) -> None:
        """Close ``train.log``."""
        for handler in list(self.log.handlers):
            self.log.removeHandler(handler)
            with contextlib.suppress(OSError):  # a full disk
                handler.close()

    def warn(self, message: str) -> None:
        """Say something, on the screen too; of several processes only the first."""
        if self.log.isEnabledFor(logging.WARNING):
            self.log.warning(message)
            Status.say(f"warning: {message}")

    @property
    def checkpoints(self) -> Path:
        """Where the states are from which a run goes on."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """Where the lines of metrics are."""
        return self.path / "metrics.jsonl"

    @property
    def figures(self) -> Path:
        """Where the images are."""
        return self.path / "figures"

    def write_config(self, config: dict[str, Any]) -> None:
        """Write ``config.json``."""
        write_atomic(self.path / "config.json", json.dumps(config, indent=2).encode())

    def read_config(self) -> dict[str, Any]:
        """What ``config.json`` holds; nothing where there is none, or a damaged one."""
        return read_config(self.path)

    def write_metrics(self, line: dict[str, Any]) -> None:
        """Append a line to ``metrics.jsonl``, now or when there is space again."""
        waiting = bool(self._unwritten)
        self._unwritten += json.dumps(line) + "\n"
        try:
            self._write_lines()
        except OSError as error:
            if not waiting:
                self.warn(
                    f"{self.metrics} cannot be written ({error.strerror}): free some space. The lines wait, and the "
                    "run goes on"
                )
        if self.watch is not None:
            self.watch(line)

    def _write_lines(self) -> None:
        """Append what is unwritten, wholly or not at all."""
        with open(self.metrics, "ab", buffering=0) as file:
            size, data = file.tell(), self._unwritten.encode()
            try:
                while data:  # a nearly full disk takes a part, and then says that it is full
                    data = data[file.write(data) :]
                os.fsync(file.fileno())
            except OSError:
                file.truncate(size)
                raise
        self._unwritten = ""

    def read_metrics(self) -> list[dict[str, Any]]:
        """All lines of ``metrics.jsonl``."""
        text = self.metrics.read_text("utf-8") if self.metrics.exists() else ""
        return [json.loads(line) for line in text.splitlines()]

    def save_state(self, state: dict[str, Any]) -> None:
        """Write a checkpoint to go on from, and keep the last few.

        Raises:
            OSError: when it cannot be written, or the metrics before it cannot; then all others are still there.
        """
        if self._unwritten:
            self._write_lines()
        written = self.metrics.stat().st_size if self.metrics.exists() else 0
        buffer = io.BytesIO()
        torch.save(state | {"metrics": written}, buffer)
        write_atomic(self._state(state["step"]), buffer.getvalue())
        # What is newer was passed over as damaged when the run went on, and must not take the place of a sound one.
        newer = [path for path in self._states() if path > self._state(state["step"])]
        for old in [*newer, *self._states()[len(newer) + self.keep :]]:
            old.unlink()

    def keep_best(self, step: int) -> None:
        """Keep the checkpoint of this step as the best one, ``best.pt``: a second name, and no second file."""
        if not self._state(step).exists():  # there was no space for it
            return
        new = self.checkpoints / ".best.pt.tmp"
        new.unlink(missing_ok=True)
        try:
            os.link(self._state(step), new)
        except OSError:  # not every disk can do that
            shutil.copy2(self._state(step), new)
        os.replace(new, self.checkpoints / "best.pt")
        new.unlink(missing_ok=True)  # it stays where both names are of the same file already

    def load_state(self) -> dict[str, Any] | None:
        """The newest checkpoint, or None where there is none yet.

        A damaged one is passed over for the one before, or the best one at last, and that is said.

        Raises:
            UserError: when every checkpoint is damaged, or gone while the weights are there.
        """
        best = self.checkpoints / "best.pt"
        paths = self._states() + [best] * best.exists()
        for path in paths:
            try:
                state = _read_state(path)
            except Exception as error:  # noqa: BLE001 - whatever a damaged file makes torch raise
                reason = str(error).strip().split("\n")[0] or type(error).__name__
                self.warn(f"checkpoint {path.name} is damaged ({reason}); going on from the one before")
            else:
                return state
        if paths:
            raise UserError(f"no checkpoint in {self.checkpoints} can be read; delete {self.path} to start anew")
        if (self.path / "model.safetensors").exists():
            raise UserError(
                f"{self.path} holds trained weights, but no checkpoint to go on from: put {self.checkpoints} back, or "
                "give another output folder"
            )
        return None

    def last_step(self) -> int | None:
        """The step of the newest checkpoint."""
        return next((int(path.stem.removeprefix("step_")) for path in self._states()), None)

    def clean(self) -> None:
        """Delete what a killed run had begun to write."""
        for folder in (self.path, self.checkpoints):
            for path in folder.glob(".*.tmp"):
                path.unlink(missing_ok=True)

    def _state(self, step: int) -> Path:
        return self.checkpoints / f"step_{step:08d}.pt"

    def _states(self) -> list[Path]:
        """The checkpoints, the newest first."""
        return sorted(self.checkpoints.glob("step_*.pt"), reverse=True)

    def cut_metrics(self, state: dict[str, Any] | None) -> None:
        """Drop the lines of metrics that were written after a checkpoint: the run will write them again.

        Lines from before it that are lost, in a file that was damaged, are no reason to stop: that is said.

        Args:
            state: the checkpoint; None for the beginning of the run.
        """
        size = 0 if state is None else state.get("metrics")
        there = self.metrics.read_bytes() if self.metrics.exists() else b""
        if size is not None and len(there) > size:
            os.truncate(self.metrics, size)
        elif size is not None and len(there) < size:
            if there:
                os.truncate(self.metrics, there.rfind(b"\n") + 1)  # the last line may be torn
            self.warn(
                f"{self.metrics} has lost lines from before the checkpoint: its curves have a gap, the run goes on"
            )


class _LogFile(logging.FileHandler):
    """A log for which a full disk is no error: whoever cannot write a checkpoint says so on the screen."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        pass


def read_config(folder: Path) -> dict[str, Any]:
    """What ``config.json`` in the folder of a run holds; nothing where there is none, or a damaged one."""
    try:
        found = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _read_state(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as file:  # torch.load compares no check sums
        if (name := file.testzip()) is not None:
            raise ValueError(f"the check sum of {name} is wrong")
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict):
        raise ValueError(f"it holds a {type(state).__name__}")
    return state
