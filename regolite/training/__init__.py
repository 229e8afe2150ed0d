"""Training: the configuration of a run, its loop, its schedule, its folder."""

from __future__ import annotations

from regolite.training.config import RunConfig
from regolite.training.loop import NonFiniteLoss, train

__all__ = ["NonFiniteLoss", "RunConfig", "train"]
