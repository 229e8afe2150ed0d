"""Load models from regolite checkpoints and from published weight files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from regolite import interop
from regolite.checkpoint import EVERYDAY, KEY, read_config, weights_file
from regolite.errors import UserError
from regolite.models.config import ModelConfig, class_head_names, config_of
from regolite.models.detector import Detector, as_detector
from regolite.models.presets import build
from regolite.models.up_detr import PatchDetr, PatchDetrConfig, detection_weights
from regolite.utils.devices import choose_device
from regolite.utils.validation import of_kind


def load(path: str | Path = EVERYDAY, device: str | torch.device = "cpu") -> Detector:
    """Load a model with its weights, in evaluation mode.

    Args:
        path: a ``.safetensors`` file written by a run, a folder with ``model.safetensors`` (of a run, or of
            :func:`regolite.save_pretrained`), or a file that :func:`regolite.interop.load` reads; the everyday detector
            by default.
        device: device of the model.

    Raises:
        UserError: the file is missing or damaged, holds neither a regolite model nor a published one, or its weights
            do not fit its configuration; or there is no such device.
    """
    device = choose_device(device)
    of_kind("path", path, (str, os.PathLike), "the path of a file")
    path = weights_file(path)
    if not _is_ours(path):
        return interop.load(path).to(device)
    config = read_config(path).without_pretrained()
    _check_size(path, config)
    model = build(config)
    load_weights(model, path)
    return model.to(device).eval()


def load_weights(model: nn.Module, path: str | Path, new_classes: bool = False, new_stages: bool = False) -> list[str]:
    """Load the weights of a checkpoint into a model of the same configuration.

    Args:
        model: the model.
        path: the checkpoint as in :func:`load`.
        new_classes: allow other classes than the checkpoint's, for fine-tuning on custom data. The class heads of the
            base detector and of the stages take the rows of classes with the same name, and keep the model's own rows
            for the others. A pre-trained UP-DETR has no classes: of its file the detector inside is taken.
        new_stages: allow a checkpoint of the base detector for a REGO model, to train REGO on top of a trained
            detector. All of REGO keeps its own weights.

    Returns:
        The names of the weights that the model kept wholly or partly.

    Raises:
        UserError: names or shapes differ; the message gives the first difference.
    """
    path = weights_file(path)
    classes, stored = _stored(path)
    own = model.state_dict()
    kept: set[str] = set()
    if new_classes and _is_pretext(path) and not isinstance(model, PatchDetr):
        stored = detection_weights(stored)
        kept = set(class_head_names(own))
    if new_stages and as_detector(model).num_stages and not any(key.startswith("detector.") for key in stored):
        stored = {f"detector.{key}": value for key, value in stored.items()}
        kept |= {key for key in own if not key.startswith("detector.")}
    _check_names(path, set(own) - kept, set(stored), set(own))
    if new_classes and classes != (ours := config_of(model).classes):
        by_class = getattr(config_of(model).detector, "proposals_by_class", False)
        for key in class_head_names(set(own) & set(stored)):
            if own[key].shape[1:] == stored[key].shape[1:]:
                stored[key], is_whole = _rows_by_name(key, own[key], stored[key], ours, classes, by_class)
                kept.update([] if is_whole else [key])
    _check_shapes(path, own, {key: tuple(value.shape) for key, value in stored.items()})
    model.load_state_dict(own | stored)
    return [key for key in own if key in kept]


def _check_size(path: str | Path, config: ModelConfig) -> None:
    """Compare names and shapes of the weights before memory is allocated: a file can request a model of any size.

    Raises:
        UserError: the weights do not fit the configuration.
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
    """Copy the checkpoint's rows of the shared classes into our class head; also return whether no row remains ours.

    Numbers that stand for missing names, and the unused ids of COCO ("N/A"), are not shared names.
    """
    rows = [(i, theirs.index(n)) for i, n in enumerate(ours) if n in theirs and not n.isdigit() and n != "N/A"]
    if (len(own), len(stored)) == (len(ours) + 1, len(theirs) + 1):  # softmax: the last row is "no object"
        rows.append((len(ours), len(theirs)))
    is_whole = len(rows) == len(own)
    if "proposals" in key.split(".") and not proposals_by_class:  # the only class is "object", in the first row
        rows, is_whole = [(0, 0)], True
    mixed = own.clone()
    for here, there in rows:
        mixed[here] = stored[there]
    return mixed, is_whole


def _stored(path: str | Path) -> tuple[tuple[str, ...], dict[str, Tensor]]:
    """Class names and weights of a file."""
    if not _is_ours(path):
        model = interop.load(path)
        return config_of(model).classes, model.state_dict()
    classes = read_config(path).classes
    with safe_open(path, framework="pt") as file:
        return classes, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict


def _is_pretext(path: str | Path) -> bool:
    """Whether the file is the checkpoint of a pre-training (:mod:`regolite.models.up_detr`)."""
    return _is_ours(path) and isinstance(read_config(path).detector, PatchDetrConfig)


def _is_ours(path: str | Path) -> bool:
    """Whether the file is a regolite checkpoint; a missing or damaged .safetensors file is taken for one."""
    try:
        with safe_open(path, framework="pt") as file:
            return KEY in (file.metadata() or {})
    except (SafetensorError, OSError):
        return Path(path).suffix == ".safetensors" or not Path(path).exists()
