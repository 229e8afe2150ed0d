"""Weights on disk: one safetensors file that carries the configuration of its model.

safetensors holds tensors and text, so loading a file executes nothing. Files are written beside their place and
renamed, so that an interrupted write leaves the old file whole.
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
from regolite.models.config import ModelConfig
from regolite.utils.files import write_atomic
from regolite.utils.validation import shown

KEY = "regolite"
EVERYDAY = Path(__file__).with_name("weights") / "rego_deformable_detr_everyday.safetensors"
"""The everyday detector: 20 classes of everyday objects in photographs. It is what is loaded where nothing is named."""


def save_model(model: nn.Module, path: str | Path, dtype: torch.dtype | None = None) -> None:
    """Save the weights and the configuration of a model made by :func:`regolite.build`.

    Args:
        model: the model.
        path: the ``.safetensors`` file to write.
        dtype: type of the weights in the file, ``torch.float16`` for half the size; by default their own.

    Raises:
        UserError: when the model does not carry its configuration, as one that was put together by hand.
    """
    if getattr(model, "model_config", None) is None:
        raise UserError("a checkpoint carries the model's configuration: make the model with regolite.build")
    state = {  # clones, since safetensors takes no two names of one tensor, as tied weights have
        key: value.detach().to("cpu", dtype or value.dtype).clone(memory_format=torch.contiguous_format)
        for key, value in model.state_dict().items()
    }
    write_atomic(path, save(state, metadata={KEY: json.dumps(model.model_config.to_dict())}))


def read_config(path: str | Path) -> ModelConfig:
    """The configuration in a checkpoint.

    Raises:
        UserError: when there is no such file, or it is no checkpoint of regolite.
    """
    if not Path(path).is_file():
        raise UserError(f"no checkpoint at {path}; give the .safetensors file of a run, or train one")
    try:
        with safe_open(path, framework="pt") as file:
            stored = (file.metadata() or {}).get(KEY)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is no readable safetensors file ({error}); train it again or copy it anew") from error
    if stored is None:
        raise UserError(f"{path} holds no regolite model; give the .safetensors file of a run")
    try:
        content = json.loads(stored)
        if not isinstance(content, dict):
            raise UserError(f"its configuration is {shown(content)}")
        return ModelConfig.from_dict(content)
    except (ValueError, RecursionError) as error:  # a UserError, no JSON, or too many brackets in each other
        reason = " ".join(str(error).split())
        raise UserError(f"{path} was written by another version of regolite ({reason}); train it again") from error
