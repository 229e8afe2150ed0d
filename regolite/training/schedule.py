"""The optimizer and its learning rates: which parameter learns how fast, and when."""

from __future__ import annotations

import math

import torch
from torch import nn

from regolite.models.detector import as_detector
from regolite.training.config import RunConfig

FIRST = 0.04  # factor of the learning rate at the beginning of a warm-up
MOMENTUM = 0.9  # of SGD


def parameter_groups(model: nn.Module, config: RunConfig) -> list[dict]:
    """The optimizer's groups: the backbone, the sampling of deformable attention, and everything else.

    :meth:`Detector.parameter_group` assigns them. The default factors are those of Deformable DETR: the backbone, the
    sampling offsets and the reference points learn ten times as slowly.
    """
    factors = {"backbone": config.backbone_lr_mult, "sampling": config.sampling_lr_mult, "rest": 1.0}
    members: dict[str, list] = {name: [] for name in factors}
    detector = as_detector(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members[detector.parameter_group(name)].append(parameter)
    return [
        {"params": parameters, "lr": config.lr * factors[name], "base_lr": config.lr * factors[name], "name": name}
        for name, parameters in members.items()
        if parameters
    ]


def make_optimizer(model: nn.Module, config: RunConfig, fused: bool | None = None) -> torch.optim.Optimizer:
    """The optimizer of a run, with the groups of :func:`parameter_groups`.

    Args:
        model: the model to train.
        config: the kind of optimizer, learning rates and weight decay.
        fused: whether one kernel updates all parameters; None for PyTorch's default.
    """
    groups, decay = parameter_groups(model, config), config.weight_decay
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=MOMENTUM, weight_decay=decay, fused=fused)
    return torch.optim.AdamW(groups, weight_decay=decay, fused=fused)


def lr_factor(config: RunConfig, epoch: int, progress: float) -> float:
    """The factor of all learning rates.

    Args:
        config: schedule, drops and warm-up.
        epoch: number of the epoch, from 0.
        progress: how much of the run is done, 0 to 1; time where the run is limited by time, else steps.

    Returns:
        ``step``: 1, divided by ten at each drop. ``one_cycle``: up along a cosine in the first tenth (or the warm-up),
        then down along a cosine to zero (Smith, 2018). ``constant``: 1. These two grow linearly during a warm-up. All
        begin with 0.04: a first step with a learning rate of 0 would be wasted.
    """
    if config.schedule == "one_cycle":
        peak = config.warmup or 0.1
        if progress < peak:
            return FIRST + (1 - FIRST) * 0.5 * (1 - math.cos(math.pi * progress / peak))
        return 0.5 * (1 + math.cos(math.pi * (progress - peak) / (1 - peak)))
    warm = FIRST + (1 - FIRST) * min(1.0, progress / config.warmup) if config.warmup else 1.0
    if config.schedule == "constant":
        return warm
    return warm * 0.1 ** sum(epoch >= drop for drop in config.drop_epochs)
