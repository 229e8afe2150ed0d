"""The cost of an arm: time of a training step and multiply-adds, for comparisons at equal cost, not equal epochs.

The arms take turns, one step each, so that other load on the machine affects all of them. Like the experiments, the
measurement uses one core.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from regolite.data import collate, make_transform, open_data
from regolite.evaluation.complexity import count
from regolite.losses import SetLoss
from regolite.models.presets import build, configure
from regolite.paper.experiments import ARMS
from regolite.training import RunConfig
from regolite.training.schedule import make_optimizer
from regolite.training.setup import parse_overrides
from regolite.utils.files import write_atomic
from regolite.utils.progress import track


def costs(arms: Sequence[str], rounds: int = 30) -> dict[str, dict[str, float]]:
    """Measure arms side by side.

    Args:
        arms: names of the arms.
        rounds: number of steps of each arm, after two warm-up steps.

    Returns:
        For each arm ``step``, the median time of a training step in seconds, without data loading; ``relative``, the
        median over the rounds of its step time divided by the first arm's; ``macs``, multiply-adds of one image;
        ``parameters``.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        steps = [_Step(arm) for arm in arms]
        times = np.array([[step() for step in steps] for _ in track(range(rounds + 2), "measuring steps")])[2:]
    finally:
        torch.set_num_threads(before)
    relative = np.median(times / times[:, :1], 0)
    return {
        arm: {"step": float(seconds), "relative": float(ratio), "macs": step.macs, "parameters": step.parameters}
        for arm, seconds, ratio, step in zip(arms, np.median(times, 0), relative, steps)
    }


def measure(file: str | Path, arms: Sequence[str] | None = None, rounds: int = 30) -> dict[str, Any]:
    """Measure arms, by default all, and write the result to a JSON file."""
    found = {"arms": costs(list(ARMS) if arms is None else arms, rounds), "rounds": rounds, "torch": torch.__version__}
    write_atomic(file, (json.dumps(found, indent=1) + "\n").encode())
    return found


class _Step:
    """Runs training steps of an arm on a fixed batch."""

    def __init__(self, arm: str) -> None:
        config = RunConfig.of({**ARMS[arm].settings(), "output": ""})
        settings = configure(
            config.model, augment=config.augment, image_size=config.image_size, **parse_overrides(config.overrides)
        )
        data = open_data(config.data, transform=make_transform(settings.augment, settings.image_size, train=True))
        torch.manual_seed(0)
        self.images, self.targets = collate([data[i] for i in range(config.batch_size)], multiple=32)
        self.model = build(settings, num_classes=len(data.classes)).to(memory_format=torch.channels_last)
        cost = count(self.model, settings.image_size, settings.image_size)
        self.macs, self.parameters = cost.with_reading, cost.parameters
        scoring = self.model.scoring
        assert isinstance(scoring, str)  # true of every detector
        self.loss = SetLoss(settings.loss, scoring)
        self.optimizer = make_optimizer(self.model, config)
        self.clip = config.clip

    def __call__(self) -> float:
        """Run a step; return its time in seconds."""
        self.model.train()
        start = time.perf_counter()
        self.optimizer.zero_grad()
        self.loss(self.model(self.images), self.targets)[0].backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        return time.perf_counter() - start
