"""Properties of a model inferred from the names and shapes in its state dict."""

from __future__ import annotations

import torch
from torch import Tensor

from regolite.errors import UserError
from regolite.models.backbone import WEIGHTS, Backbone
from regolite.utils.weight_files import Weights


def count(weights: Weights, prefix: str) -> int:
    """Number of modules called ``prefix0.``, ``prefix1.``, ..."""
    numbers = (key.removeprefix(prefix).split(".")[0] for key in weights.tensors if key.startswith(prefix))
    return len({number for number in numbers if number.isdigit()})


def tensor(weights: Weights, name: str) -> Tensor:
    """A weight whose shape determines the model.

    Raises:
        UserError: the weight is missing.
    """
    if name not in weights.tensors:
        raise UserError(f"{weights.source} misses {name}; give the whole state dict")
    return weights.tensors[name]


def backbone(weights: Weights, prefix: str) -> str:
    """The backbone, by the names and shapes of its weights.

    Raises:
        UserError: no backbone of regolite is similar.
    """
    found = {(key.removeprefix(prefix), t.shape) for key, t in weights.tensors.items() if key.startswith(prefix)}
    differences: dict[str, int] = {}
    for name in ("tiny", *WEIGHTS):
        with torch.device("meta"):  # shapes without numbers
            body = Backbone(name).body
        differences[name] = len(found ^ {(key, value.shape) for key, value in body.state_dict().items()})
        if not differences[name]:
            return name
    nearest = min(differences, key=lambda name: differences[name])  # loading it will report the differences
    if differences[nearest] > len(found) / 2:
        raise UserError(f"{weights.source} has a backbone that regolite lacks; it knows {', '.join(differences)}")
    return nearest
