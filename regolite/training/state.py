"""What a run is made of between two steps: how it is saved, and how it goes on from there.

A run that cannot be saved goes on all the same: there may be space the next time. Only at its end it has failed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from accelerate import Accelerator
from torch.optim.swa_utils import AveragedModel

from regolite.checkpoint import save_model
from regolite.errors import UserError
from regolite.models.detector import Detector, as_detector
from regolite.training.folder import RunFolder
from regolite.training.metrics import Meter
from regolite.training.resume import compare_runs
from regolite.utils.interrupts import stop
from regolite.utils.validation import fits, shown

T = TypeVar("T")


class NonFiniteLoss(UserError):
    """The loss became infinite or not a number; the message names its terms, or the predictions that are."""


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        step: optimizer steps done.
        epoch: number of the running epoch, from 0.
        batch: batches of this epoch done.
        images: images trained on, over all epochs and processes.
        seconds: time spent, over all sessions of the run.
        cpu_seconds: CPU time of training, over all sessions of the run; the mean over all processes.
        best: best AP on the validation images, -1 before the first evaluation.
        stale: evaluations on the validation images since then.
        evaluated: the step of the last evaluation on each split.
        broken: how often an image could not be read and another took its place.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    images: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    best: float = -1.0
    stale: int = 0
    evaluated: dict[str, int] = field(default_factory=dict)
    broken: int = 0


class State:
    """All that changes while a run trains, and the folder where it is kept.

    Args:
        folder: where checkpoints are written.
        model: what learns.
        optimizer: how it learns.
        average: the moving average of its weights, if there is one.
        accelerator: the processes; the first of them writes.
        config: what checkpoints keep of the configuration and the data, see
            :func:`regolite.training.resume.describe_run`.

    Attributes:
        progress: how far the run has come.
        meter: the metrics since the last line.
    """

    def __init__(
        self,
        folder: RunFolder,
        model: Detector,
        optimizer: torch.optim.Optimizer,
        average: AveragedModel | None,
        accelerator: Accelerator,
        config: dict[str, Any],
    ) -> None:
        self.config = config
        self.folder, self.model, self.optimizer, self.average = folder, model, optimizer, average
        self.accelerator, self.progress, self.meter = accelerator, Progress(), Meter()

    @property
    def evaluated(self) -> Detector:
        """The model that the run is for: the average where there is one."""
        return self.model if self.average is None else as_detector(self.average.module)

    def where(self, doing: str = "") -> str:
        """Where a run stands that is saved, for a message."""
        return f"{doing}after step {self.progress.step}, which is saved in {self.folder.path}"

    def fail(self, reason: str) -> NoReturn:
        """End a run whose numbers are none.

        Raises:
            NonFiniteLoss: always.
        """
        message = f"training stopped at step {self.progress.step}: {reason}"
        self.folder.log.error(message)
        raise NonFiniteLoss(message)

    # ------------------------------------------------------------------------------------------------------- saving

    def save(self) -> str:
        """Write a checkpoint, or say what keeps it from being written; the older ones stay."""
        if not self.accelerator.is_main_process:
            return ""
        bad = [name for name, value in self.model.state_dict().items() if not torch.isfinite(value).all()]
        if bad:  # the loss was finite and its gradient was not: the next step would say so, too late for the checkpoint
            self.fail(
                f"{len(bad)} weights are not finite ({bad[0]}, ...). Lower the learning rate, clip the gradient, or "
                "train without mixed precision"
            )
        scaler = self.accelerator.scaler
        state = {
            **vars(self.progress),
            "config": self.config,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "meter": self.meter.state(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        try:
            self.folder.save_state(state)
            save_model(self.evaluated, self.folder.path / "model.safetensors")
        except OSError as error:
            last = self.folder.last_step()
            kept = "there is no checkpoint yet" if last is None else f"the checkpoint of step {last} is kept"
            what = "model.safetensors" if last == self.progress.step else f"step {self.progress.step}"
            return f"{what} cannot be saved ({error.strerror}), {kept}"
        return ""

    def save_or_go_on(self) -> None:
        """Save, or warn."""
        if problem := self.save():
            self.folder.warn(f"{problem}: free some space at {self.folder.path}. The run goes on")

    def save_the_end(self) -> None:
        """Save what the run was for.

        Raises:
            UserError: when that is not possible.
        """
        if problem := self.save():
            raise UserError(f"the run ends, and {problem}: free some space at {self.folder.path} and resume it")

    def save_and_leave(self) -> NoReturn:
        """End the run, as a signal has asked for.

        Raises:
            RunStopped: always.
        """
        problem = self.save()
        stop.so_far = f"after step {self.progress.step}: {problem}" if problem else self.where()
        self.folder.log.info("stopped %s", stop.so_far)
        self.folder.close()
        stop.leave()

    @contextmanager
    def saved_before_errors(self) -> Iterator[None]:
        """Where something fails, memory runs out say, what is done is saved before the error passes.

        Not for what changes the weights: a step that is half done must not be saved.
        """
        try:
            yield
        except NonFiniteLoss:
            raise
        except Exception:
            self.save_or_go_on()
            raise

    def items_saved_before_errors(self, items: Iterator[T]) -> Iterator[T]:
        """The items; where one cannot be had, a broken image say, what is done is saved before the error passes."""
        with self.saved_before_errors():
            yield from items

    # --------------------------------------------------------------------------------------------------- going on

    def restore(self) -> None:
        """Go on from the newest checkpoint, where there is one. Changes of the configuration are logged.

        Raises:
            UserError: when the run in the folder is another one: of another configuration, model or data set. Nothing
                in the folder is changed then.
        """
        state = self.folder.load_state()
        if state is None:
            self.folder.cut_metrics(None)
            return
        _check(state, self.folder.checkpoints)
        before = state.get("config") or self.folder.read_config()  # older checkpoints leave it to config.json
        changed, unknown = compare_runs(before, self.config, self.folder.path)
        if (self.average is None) != (state["average"] is None):  # where the configuration is lost
            has = "no moving average" if state["average"] is None else "a moving average"
            raise UserError(
                f"{self.folder.path} holds a run with {has} of the weights: go on with the ema that it was begun with, "
                "or give another output folder"
            )
        if unknown:
            self.folder.warn(
                f"the checkpoint in {self.folder.path}, of an earlier version, does not say {' and '.join(unknown)} it "
                "was made with: make sure that they are the same"
            )
        for change in changed:
            self.folder.log.info("changed since the run began: %s", change)
        groups = self.optimizer.param_groups
        try:
            self.model.load_state_dict(state["model"])
            chosen = [{key: value for key, value in group.items() if key != "params"} for group in groups]
            self.optimizer.load_state_dict(state["optimizer"])
            for group, choice in zip(self.optimizer.param_groups, chosen):
                group.update(choice)  # learning rates are the configuration's, which may have changed
            if self.average is not None:
                self.average.load_state_dict(state["average"])
            if self.accelerator.scaler is not None and state.get("scaler"):
                self.accelerator.scaler.load_state_dict(state["scaler"])
            self.meter = Meter(**state.get("meter", {}))
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:  # as PyTorch finds it
            raise UserError(
                f"{self.folder.path} holds a run of another model ({str(error).splitlines()[0]})"
            ) from error
        self.folder.cut_metrics(state)
        self.progress = Progress(**{name: state[name] for name in vars(Progress()) if name in state})


_KINDS: dict[str, type] = {
    **{name: type(value) for name, value in vars(Progress()).items()},
    **dict.fromkeys(("model", "optimizer", "meter", "config"), dict),
    "metrics": int,
}
"""The type of each value in a checkpoint that the run computes with."""


def _check(state: dict[str, Any], folder: Path) -> None:
    """Check the values of a checkpoint, which anybody may have written; earlier versions lack some.

    Raises:
        UserError: a value has another type, or a number is negative.
    """
    for name, kind in _KINDS.items():
        value = state.get(name, kind())
        is_valid = fits(value, kind)
        if is_valid and name == "evaluated":
            is_valid = all(fits(step, int) for step in value.values())
        if not is_valid or (kind is not dict and name != "best" and value < 0):
            raise UserError(
                f"a checkpoint in {folder} has {name}={shown(value)}, which no run has written: delete it, or give "
                "another output folder"
            )
