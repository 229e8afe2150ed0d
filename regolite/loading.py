"""Give me this model: from a checkpoint of regolite, or from a file of weights that others have published."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from regolite import interop
from regolite.checkpoint import EVERYDAY, KEY, read_config
from regolite.errors import UserError
from regolite.models.config import ModelConfig, class_head_names
from regolite.models.presets import build
from regolite.models.rego import Rego
from regolite.utils.devices import choose_device
from regolite.utils.validation import of_kind


def load(path: str | Path = EVERYDAY, device: str | torch.device = "cpu") -> nn.Module:
    """Load a checkpoint: the model that its configuration describes, with its weights, ready to detect.

    Args:
        path: a ``.safetensors`` file that a run has written, or a file that :func:`regolite.interop.load` reads; the
            everyday detector by default.
        device: where to put it.

    Raises:
        UserError: when the file is missing, damaged, holds neither a model of regolite nor a published one, or weights
            of other shapes than its configuration says; and when there is no such device.
    """
    device = choose_device(device)
    of_kind("path", path, (str, os.PathLike), "the path of a file")
    if not _is_ours(path):
        return _published(path).to(device)
    config = read_config(path).without_pretrained()
    _check_size(path, config)
    model = build(config)
    load_weights(model, path)
    return model.to(device).eval()


def load_weights(model: nn.Module, path: str | Path, new_classes: bool = False, new_stages: bool = False) -> list[str]:
    """Load the weights of a checkpoint into a model of the same configuration.

    Args:
        model: the model.
        path: the checkpoint, or a file that :func:`regolite.interop.load` reads.
        new_classes: allow other classes than the checkpoint's. Then the class heads, base detector's and stages', take
            over the rows of the classes that both know by name, and keep the model's own for the others. This is how a
            model is fine-tuned to data of its own.
        new_stages: allow a checkpoint of the base detector alone, where the model is a REGO: then all of REGO keeps the
            weights that it has. This is how REGO is trained on top of a detector that is there.

    Returns:
        The names of the weights of which the model kept some or all.

    Raises:
        UserError: when names or shapes differ; the first of them is named.
    """
    classes, stored = _stored(path)
    own, kept = model.state_dict(), set()
    if new_stages and isinstance(model, Rego) and not any(key.startswith("detector.") for key in stored):
        stored = {f"detector.{key}": value for key, value in stored.items()}
        kept = {key for key in own if not key.startswith("detector.")}
    _check_names(path, set(own) - kept, set(stored), set(own))
    if new_classes and classes != (ours := model.model_config.classes):
        by_class = getattr(model.model_config.detector, "token_queries", False)
        for key in class_head_names(set(own) & set(stored)):
            if own[key].shape[1:] == stored[key].shape[1:]:
                stored[key], is_whole = _rows_by_name(key, own[key], stored[key], ours, classes, by_class)
                kept.update([] if is_whole else [key])
    _check_shapes(path, own, {key: tuple(value.shape) for key, value in stored.items()})
    model.load_state_dict(own | stored)
    return [key for key in own if key in kept]


def _check_size(path: str | Path, config: ModelConfig) -> None:
    """Compare names and shapes of the weights before any memory is taken: a file may ask for any model.

    Raises:
        UserError: when they are not those of the configuration.
    """
    with torch.device("meta"):  # shapes without numbers
        own = build(config).state_dict()
    with safe_open(path, framework="pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 - not a dict
    _check_names(path, set(own), set(shapes), set(own))
    _check_shapes(path, own, shapes)


def _check_names(path: str | Path, wanted: set[str], stored: set[str], known: set[str]) -> None:
    missing, unexpected = sorted(wanted - stored), sorted(stored - known)
    if missing or unexpected:
        raise UserError(
            f"{path} does not fit the model: {len(missing)} weights are missing ({', '.join(missing[:2])}), "
            f"{len(unexpected)} are unknown ({', '.join(unexpected[:2])}); build the model of its own configuration"
        )


def _check_shapes(path: str | Path, own: Mapping[str, Tensor], stored: Mapping[str, tuple[int, ...]]) -> None:
    for key, shape in stored.items():
        if tuple(own[key].shape) != shape:
            raise UserError(
                f"{path} does not fit the model: {key} is {shape} there and {tuple(own[key].shape)} here (another "
                "number of classes or queries?)"
            )


def _rows_by_name(
    key: str, own: Tensor, stored: Tensor, ours: Sequence[str], theirs: Sequence[str], proposals_by_class: bool
) -> tuple[Tensor, bool]:
    """A class head of ours with the checkpoint's rows of the classes that both know, and whether no row is ours.

    Numbers that stand for missing names, and COCO's holes, are no names in common.
    """
    rows = [(i, theirs.index(n)) for i, n in enumerate(ours) if n in theirs and not n.isdigit() and n != "N/A"]
    if (len(own), len(stored)) == (len(ours) + 1, len(theirs) + 1):  # a softmax: the last column is "no object"
        rows.append((len(ours), len(theirs)))
    is_whole = len(rows) == len(own)
    if (
        "proposals" in key.split(".") and not proposals_by_class
    ):  # these know one class only, object, in the first column
        rows, is_whole = [(0, 0)], True
    mixed = own.clone()
    for here, there in rows:
        mixed[here] = stored[there]
    return mixed, is_whole


def _stored(path: str | Path) -> tuple[tuple[str, ...], dict[str, Tensor]]:
    """Names of the classes, and the weights."""
    if not _is_ours(path):
        model = _published(path)
        return model.model_config.classes, model.state_dict()
    classes = read_config(path).classes
    with safe_open(path, framework="pt") as file:
        return classes, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict


def _is_ours(path: str | Path) -> bool:
    """Whether a run of regolite wrote the file, or would have written it were it there and whole."""
    try:
        with safe_open(path, framework="pt") as file:
            return KEY in (file.metadata() or {})
    except (SafetensorError, OSError):
        return Path(path).suffix == ".safetensors" or not Path(path).exists()


def _published(path: str | Path) -> nn.Module:

    return interop.load(path)
