"""Safe reading of third-party weight files: no code in a file is executed.

A ``.pth`` file is a pickle, and unpickling can run code. PyTorch's ``weights_only`` reader builds tensors and plain
containers only. ``argparse.Namespace`` is allowed in addition: the authors' training scripts store their options in it.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from regolite.errors import UserError

# Entries of a state dict from batch normalization and the FLOP counter `thop`; the authors' code skips them too.
NO_WEIGHTS = ("num_batches_tracked", "total_params", "total_ops")


@dataclass(frozen=True)
class Weights:
    """The content of a weight file.

    Attributes:
        tensors: the weights by name.
        options: the options of the training script (``nheads``, ``dilation``, ...), empty if the file has none.
        source: name of the source in error messages.
    """

    tensors: dict[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    source: str = "the state dict"


def read(source: str | os.PathLike[str] | Mapping[str, Any]) -> Weights:
    """Read weights.

    Args:
        source: a ``.pth`` or ``.safetensors`` file, or the content of one: a state dict, or a training checkpoint with
            the state dict under ``"model"`` and the options under ``"args"``.

    Raises:
        UserError: the file does not exist, is damaged, holds no state dict, or would run code when unpickled.
    """
    if isinstance(source, Mapping):
        name, content = "the state dict", source
    else:
        path = Path(source)
        name = str(path)
        if not path.is_file():
            raise UserError(f"no weights at {path}; give a .pth or .safetensors file, or a state dict")
        if path.stat().st_size == 0:
            raise UserError(f"{path} is empty; copy it again")
        content = _safetensors(path) if path.suffix == ".safetensors" else _pickled(path)

    options: Any = {}
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        content, options = content["model"], content.get("args", {})
    options = vars(options) if isinstance(options, argparse.Namespace) else options
    tensors = dict(content) if isinstance(content, Mapping) else {}
    if not tensors or not all(isinstance(key, str) and isinstance(t, Tensor) for key, t in tensors.items()):
        raise UserError(f"{name} holds no state dict, which has a tensor for every name; save model.state_dict()")
    if all(key.startswith("module.") for key in tensors):  # DistributedDataParallel's
        tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
    tensors = {key: value for key, value in tensors.items() if key.split(".")[-1] not in NO_WEIGHTS}
    return Weights(tensors, dict(options) if isinstance(options, Mapping) else {}, name)


def _safetensors(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
            options = json.loads((file.metadata() or {}).get("args", "{}"))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a readable safetensors file ({error}); copy it again") from error
    return {"model": tensors, "args": options}


def _pickled(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        code = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if code is not None:
            raise UserError(
                f"{path} holds more than weights, and reading {code[1]} from it could run code; if you trust the file, "
                "save its state dict only"
            ) from error
        reason = (str(error).splitlines() or [""])[0][:100]
        raise UserError(
            f"{path} is damaged or not a PyTorch file ({type(error).__name__}: {reason}); copy it again"
        ) from error
