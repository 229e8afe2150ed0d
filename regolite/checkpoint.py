"""Checkpoints: one safetensors file with the weights and the configuration of a model.

safetensors holds tensors and text, so loading a file executes no code. Files are written atomically.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from regolite.errors import UserError
from regolite.interop import adapter  # noqa: F401 - registers the detectors of transformers
from regolite.models.config import ModelConfig, config_of
from regolite.utils.files import write_atomic
from regolite.utils.validation import shown

KEY = "regolite"
WEIGHTS = "model.safetensors"
"""The checkpoint in the folder of a run or of a model from the Hugging Face Hub."""
EVERYDAY = Path(__file__).with_name("weights") / "rego_deformable_detr_everyday.safetensors"
"""The everyday detector: 20 classes of everyday objects in photographs. The default of :func:`regolite.load`."""


def save_model(model: nn.Module, path: str | Path, dtype: torch.dtype | None = None) -> None:
    """Save the weights and the configuration of a model made by :func:`regolite.build`.

    Args:
        model: the model.
        path: the ``.safetensors`` file to write.
        dtype: data type of the weights in the file, ``torch.float16`` for half the size; unchanged by default.

    Raises:
        UserError: the model carries no configuration, as one assembled by hand.
    """
    config = config_of(model)
    state = {  # clones, since safetensors refuses shared tensors, as of tied weights
        key: value.detach().to("cpu", dtype or value.dtype).clone(memory_format=torch.contiguous_format)
        for key, value in model.state_dict().items()
    }
    write_atomic(path, save(state, metadata={KEY: json.dumps(config.to_dict())}))


def weights_file(path: str | Path) -> Path:
    """The checkpoint itself: a file, or ``model.safetensors`` in a folder."""
    return Path(path) / WEIGHTS if Path(path).is_dir() else Path(path)


def read_config(path: str | Path) -> ModelConfig:
    """Read the configuration in a checkpoint.

    Args:
        path: the file, or a folder with ``model.safetensors``.

    Raises:
        UserError: the file does not exist, or is not a regolite checkpoint.
    """
    path = weights_file(path)
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}; give the .safetensors file of a run, or train one")
    try:
        with safe_open(path, framework="pt") as file:
            stored = (file.metadata() or {}).get(KEY)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is not a readable safetensors file ({error}); train it again or copy it again"
        ) from error
    if stored is None:
        raise UserError(f"{path} holds no regolite model; give the .safetensors file of a run")
    try:
        content = json.loads(stored)
        if not isinstance(content, dict):
            raise UserError(f"its configuration is {shown(content)}")
        return ModelConfig.from_dict(content)
    except (ValueError, RecursionError) as error:  # a UserError, invalid JSON, or too deeply nested
        reason = " ".join(str(error).split())
        raise UserError(f"{path} was written by another version of regolite ({reason}); train it again") from error
