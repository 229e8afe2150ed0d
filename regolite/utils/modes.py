"""Training and evaluation mode: whoever changes it for a while puts it back, whatever happens meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Leave every module of a model in the mode in which it is now; parts of it may be in others than the whole."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Evaluation mode for a while; gives the model's device."""
    with modes_kept(model):
        yield next(model.eval().parameters()).device
