"""The folder of a run: what is written where.

``config.json`` the configuration; ``metrics.jsonl`` a line for every logged step and every evaluation; ``train.log`` the
same for people; ``model.safetensors`` the last weights; ``best.safetensors`` those with the best AP on the validation
pictures; ``checkpoints/`` what a run needs to go on; ``figures/`` curves and pictures.
"""

from __future__ import annotations

import io
import json
import logging
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

    Raises:
        UserError: when there is a run already and it is not to be resumed.
    """

    def __init__(self, path: str | Path, resume: bool) -> None:
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"output {self.path} is a file; give a folder")
        if (self.path / "config.json").exists() and not resume:
            raise UserError(f"{self.path} holds a run already; go on with it (resume) or give another output folder")
        for folder in (self.path, self.checkpoints, self.figures):
            folder.mkdir(parents=True, exist_ok=True)
        self.log = logging.getLogger(f"regolite.run.{self.path.resolve()}")
        self.log.setLevel(logging.INFO)
        self.log.propagate = False
        self.log.handlers = [logging.FileHandler(self.path / "train.log")]
        self.log.handlers[0].setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))

    @property
    def checkpoints(self) -> Path:
        """Where the states are from which a run goes on."""
        return self.path / "checkpoints"

    @property
    def figures(self) -> Path:
        """Where the pictures are."""
        return self.path / "figures"

    def write_config(self, config: dict[str, Any]) -> None:
        """Write ``config.json``."""
        write_atomic(self.path / "config.json", json.dumps(config, indent=2).encode())

    def write_metrics(self, line: dict[str, Any]) -> None:
        """Append a line to ``metrics.jsonl``."""
        with open(self.path / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """All lines of ``metrics.jsonl``."""
        file = self.path / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def cut_metrics(self, step: int) -> None:
        """Drop the lines after ``step``: an interrupted run wrote them, and will write them again."""
        lines = [json.dumps(line) for line in self.read_metrics() if line["step"] <= step]
        write_atomic(self.path / "metrics.jsonl", "".join(line + "\n" for line in lines).encode())

    def save_state(self, state: dict[str, Any]) -> None:
        """Write a checkpoint to go on from, and keep the last few."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomic(self.checkpoints / f"step_{state['step']:08d}.pt", buffer.getvalue())
        for old in sorted(self.checkpoints.glob("step_*.pt"))[:-KEEP]:
            old.unlink()

    def load_state(self) -> dict[str, Any] | None:
        """The newest checkpoint, or None. A damaged one is passed over for the one before, and that is said."""
        for path in sorted(self.checkpoints.glob("step_*.pt"), reverse=True):
            try:
                return torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:  # noqa: BLE001 - whatever a damaged file makes torch raise
                self.log.warning("checkpoint %s is damaged (%s); going on from the one before", path.name, error)
        return None
