"""The folder of a run: what is written where.

``config.json`` the configuration; ``metrics.jsonl`` a line for every logged step and every evaluation; ``train.log``
the same for people; ``model.safetensors`` the last weights; ``best.safetensors`` those with the best AP on the
validation pictures; ``checkpoints/`` what a run needs to go on; ``figures/`` curves and pictures.
"""

from __future__ import annotations

import io
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from regolite.checkpoint import write_atomic
from regolite.errors import UserError

KEEP = 2


class RunFolder:
    """The folder of a run.

    Args:
        path: where it is.
        resume: go on with what is there.
        watch: called with every line of metrics when it is written.

    Raises:
        UserError: when there is a run already and it is not to be resumed.
    """

    def __init__(self, path: str | Path, resume: bool, watch: Callable[[dict[str, Any]], None] | None = None) -> None:
        self.path, self.watch = Path(path), watch
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"output {self.path} is a file; give a folder")
        if (self.path / "config.json").exists() and not resume:
            raise UserError(f"{self.path} holds a run already; go on with it (resume) or give another output folder")
        for folder in (self.path, self.checkpoints, self.figures):
            folder.mkdir(parents=True, exist_ok=True)
        self.log = logging.getLogger(f"regolite.run.{self.path.resolve()}")
        self.log.setLevel(logging.INFO)
        self.log.propagate = False
        self.close()  # what an earlier run in this folder left open when it failed
        handler = logging.FileHandler(self.path / "train.log", encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        self.log.addHandler(handler)

    def close(self) -> None:
        """Close ``train.log``."""
        for handler in list(self.log.handlers):
            self.log.removeHandler(handler)
            handler.close()

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
        """Where the pictures are."""
        return self.path / "figures"

    def write_config(self, config: dict[str, Any]) -> None:
        """Write ``config.json``."""
        write_atomic(self.path / "config.json", json.dumps(config, indent=2).encode())

    def write_metrics(self, line: dict[str, Any]) -> None:
        """Append a line to ``metrics.jsonl``."""
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self.watch is not None:
            self.watch(line)

    def read_metrics(self) -> list[dict[str, Any]]:
        """All lines of ``metrics.jsonl``."""
        text = self.metrics.read_text("utf-8") if self.metrics.exists() else ""
        return [json.loads(line) for line in text.splitlines()]

    def save_state(self, state: dict[str, Any]) -> None:
        """Write a checkpoint to go on from, and keep the last few."""
        written = self.metrics.stat().st_size if self.metrics.exists() else 0
        buffer = io.BytesIO()
        torch.save(state | {"metrics": written}, buffer)
        write_atomic(self.checkpoints / f"step_{state['step']:08d}.pt", buffer.getvalue())
        for old in sorted(self.checkpoints.glob("step_*.pt"))[:-KEEP]:
            old.unlink()

    def load_state(self) -> dict[str, Any] | None:
        """The newest checkpoint, or None where there is none yet.

        A damaged one is passed over for the one before, and that is said. Lines of metrics that were written after the
        checkpoint are dropped: the run will write them again.

        Raises:
            UserError: when every checkpoint is damaged.
        """
        paths = sorted(self.checkpoints.glob("step_*.pt"), reverse=True)
        for path in paths:
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:  # noqa: BLE001 - whatever a damaged file makes torch raise
                self.log.warning("checkpoint %s is damaged (%s); going on from the one before", path.name, error)
            else:
                self._cut_metrics(state.get("metrics"))
                return state
        if paths:
            raise UserError(f"no checkpoint in {self.checkpoints} can be read; delete {self.path} to start anew")
        self._cut_metrics(0)
        return None

    def _cut_metrics(self, size: int | None) -> None:
        """Keep so many bytes of the metrics."""
        if size is not None and self.metrics.exists() and self.metrics.stat().st_size > size:
            os.truncate(self.metrics, size)
