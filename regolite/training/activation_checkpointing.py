"""Activation checkpointing: less memory for more time.

Training keeps what every layer has computed until its gradient is computed. Here a layer of a transformer keeps its
inputs alone, and is run once more when its gradient is wanted (Chen et al., "Training Deep Nets with Sublinear Memory
Cost", 2016): the very same numbers, dropout included, for about a third more computation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import is_dataclass
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from regolite.models.detector import as_detector


def checkpoint_activations(model: nn.Module) -> None:
    """Checkpoint the activations of the transformer layers; the backbone's layers keep fewer activations.

    Do not copy the model before :func:`keep_all_activations`.
    """
    for layer in as_detector(model).transformer_layers():
        # An attribute of the instance, which hides the method of its class.
        vars(layer)["forward"] = partial(_recomputed, layer.forward)


def keep_all_activations(model: nn.Module) -> None:
    """Stop checkpointing."""
    for layer in as_detector(model).transformer_layers():
        vars(layer).pop("forward", None)


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a layer, and run it again when its gradient is computed.

    PyTorch restores the random state, which dropout needs, on the devices of the tensors among the arguments. It finds
    none in a dataclass such as :class:`~regolite.types.Memory`, so that the tensors inside are arguments too.
    """
    inside = [list(vars(value).values()) for value in (*args, *kwargs.values()) if is_dataclass(value)]
    return checkpoint(lambda _, *given, **named: forward(*given, **named), inside, *args, use_reentrant=False, **kwargs)
