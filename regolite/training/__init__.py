"""Training: the configuration of a run, its loop, its schedule, its folder, its processes."""

from __future__ import annotations

from regolite.training.config import RunConfig
from regolite.training.launch import launch
from regolite.training.loop import train
from regolite.training.state import NonFiniteLoss

__all__ = ["NonFiniteLoss", "RunConfig", "launch", "train"]
