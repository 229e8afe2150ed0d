"""Import and export of published weights and of models of Hugging Face's transformers.

::

    model = interop.load("detr-r50-e632da11.pth")          # the authors' weights: recognized, converted, ready
    model = interop.load("r50_deformable_detr.pth", num_classes=3)   # new class heads, to fine-tune
    interop.save(model, "for_their_code.pth")              # export: their names and file format
    detector = interop.from_transformers(hugging_face_model)         # export: to_transformers(detector)
    model = Rego(interop.adapt(hugging_face_model), stages=3)        # REGO on a detector of transformers

In the authors' code padding influences an image, so an imported model has ``mask_padding=False`` and reproduces their
outputs exactly. A model that was trained here with ``mask_padding=True`` has the same outputs there for a single image,
and nearly the same in a padded batch.
"""

from __future__ import annotations

import io
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from regolite.errors import UserError
from regolite.interop import anchor_detr, conditional_detr, deformable_detr, detr, rego, smca
from regolite.interop.adapter import adapt
from regolite.interop.keys import from_theirs, to_theirs
from regolite.interop.transformers import from_transformers, to_transformers
from regolite.models.baselines import COCO_CLASSES
from regolite.models.config import DETECTORS, ModelConfig, class_head_names, config_of
from regolite.models.detector import Detector
from regolite.models.presets import build, configure, presets
from regolite.utils.files import write_atomic
from regolite.utils.validation import whole
from regolite.utils.weight_files import Weights, read

__all__ = ["adapt", "from_transformers", "load", "save", "state_dict", "to_transformers"]

FORMS = {
    "detr": detr,
    "deformable_detr": deformable_detr,
    "rego": rego,
    "conditional_detr": conditional_detr,
    "anchor_detr": anchor_detr,
    "smca": smca,
}
TAGS = {
    "resnet50": "r50", "resnet101": "r101", "resnext101_32x8d": "x101", "resnext101_64x4d": "x101",
    "mobilenet_v2": "tiny", "tiny": "scenes",
}  # fmt: skip
COCO_COLUMNS = ("N/A", *COCO_CLASSES)  # the index of a class is its COCO id, 1 to 90 with gaps


def load(
    source: str | os.PathLike[str] | Mapping[str, Any],
    form: str | None = None,
    num_classes: int | None = None,
    **overrides: Any,
) -> Detector:
    """A regolite detector with published weights and the same outputs as the authors' code.

    The configuration is inferred from names and shapes of the weights, and from the options that the authors' training
    scripts save with them. **Published files of DETR contain no options**, and three settings cannot be inferred from
    weights: ``dilated=True`` (DC5), ``heads`` (8 by default), and the number of proposals of a two-stage model
    (``queries``, 300 by default). Give them if they differ: ``load("detr-r50-dc5-f0fb7ef5.pth", dilated=True)``.

    Args:
        source: a ``.pth`` or ``.safetensors`` file, or a state dict. Nothing in a file is executed.
        form: the expected form, a name in :data:`FORMS`, as ``"detr"``; recognized by default.
        num_classes: None keeps the class heads. A number other than theirs replaces all class heads by new ones, with a
            warning, and keeps the other weights: an initialization for fine-tuning.
        **overrides: fields of the configuration, as in :func:`regolite.configure`; they override inferred values.

    Returns:
        The detector in evaluation mode. If it has 91 classes, their indices are COCO's category ids, and unused ids are
        called "N/A".

    Raises:
        UserError: the file does not exist, would run code when read, is damaged or contains another model, or weights
            are missing, unknown or of a wrong shape; the message names them.
    """
    weights = read(source)
    chosen = _recognize(weights, form)
    if "heads" in overrides:  # the number of sampling points depends on it
        weights = replace(weights, options=weights.options | {"nheads": overrides["heads"]})
    family, classes, fields = chosen.describe(weights)
    wanted = whole("num_classes", num_classes) if num_classes is not None else classes
    fields |= {"category_ids": tuple(range(wanted))}
    if wanted == classes and classes - len(COCO_COLUMNS) in (0, 1):  # SMCA has an unused logit for "no object"
        fields |= {"classes": (*COCO_COLUMNS, "N/A")[:classes]}
    fields |= overrides
    model = build(configure(_preset(family, fields), **fields), wanted)

    own, pairs = model.state_dict(), chosen.pairs(config_of(model))
    fresh = set(class_head_names(own)) if wanted != classes else set()
    heads = {name for pair in pairs for ours, theirs in pair.names(own) if ours[0] in fresh for name in theirs}
    unused = getattr(chosen, "UNUSED", ())
    found = from_theirs(
        {name: tensor for name, tensor in weights.tensors.items() if name not in heads and not name.startswith(unused)},
        pairs,
        {name: tensor for name, tensor in own.items() if name not in fresh},
        weights.source,
    )
    model.load_state_dict(own | found)
    if fresh:
        names = sorted({name.rpartition(".")[0] for name in fresh})
        logging.getLogger("regolite").warning(
            "%s: %d class heads for %d classes are replaced by new ones for %d: %s",
            *(weights.source, len(names), classes, wanted, ", ".join(names)),
        )
    return model.eval()


def state_dict(detector: nn.Module) -> dict[str, Tensor]:
    """The weights of a detector by the authors' names, for a strict ``load_state_dict`` in their code.

    Their scripts build the model from options, which :func:`save` stores with the weights, and derive the number of
    classes from the name of the data set, 91 for COCO. For another number, change that line of their script.

    Args:
        detector: a detector of one of the :data:`FORMS`; a REGO must have the form ``released`` and a Deformable DETR.

    Raises:
        UserError: the authors' code has no such model.
    """
    config = _config(detector)
    return to_theirs(detector.state_dict(), _form(config).pairs(config))


def save(detector: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a detector for the authors' code, atomically.

    A ``.pth`` file stores the weights under ``"model"``, where the authors' scripts expect them, and under ``"args"``
    the options with which these scripts build the model (``--nheads``, ``--num_queries``, ...). A ``.safetensors`` file
    stores the weights, and the options as JSON in its metadata.

    Args:
        detector: as for :func:`state_dict`.
        path: the ``.pth`` or ``.safetensors`` file.

    Raises:
        UserError: the file name has another suffix; see also :func:`state_dict`.
    """
    path = Path(path)
    if path.suffix not in (".pth", ".safetensors"):
        raise UserError(f"{path}: give a name that ends in .pth or .safetensors")
    config = _config(detector)
    weights = {name: tensor.cpu().contiguous() for name, tensor in state_dict(detector).items()}
    options = _form(config).options(config)
    if path.suffix == ".safetensors":
        write_atomic(path, to_safetensors(weights, metadata={"args": json.dumps(options)}))
    else:
        buffer = io.BytesIO()
        torch.save({"model": weights, "args": options}, buffer)
        write_atomic(path, buffer.getvalue())


def _recognize(weights: Weights, form: str | None) -> Any:
    """The module of :data:`FORMS` that recognizes these weights."""
    if form is not None and form not in FORMS:
        raise UserError(f"unknown form {form!r}; choose one of {', '.join(FORMS)}")
    # In reverse order, since the names of SMCA's weights include those of DETR's.
    found = next((name for name in reversed(FORMS) if FORMS[name].recognize(weights)), None)
    if found is None:
        names = set(weights.tensors)
        if {"conv1.weight", "fc.weight"} <= names:
            hint = "it is a ResNet: a detector takes it as its backbone by regolite.build(..., weights=FILE)"
        elif any(name.startswith(("backbone.body.", "detector.")) for name in names):
            hint = "it is a checkpoint of a run of regolite, which regolite.load reads"
        elif any(name.startswith("model.backbone.") for name in names):
            hint = "it is a model of transformers: load it there and give it to regolite.interop.from_transformers"
        else:
            hint = "it begins with " + ", ".join(list(weights.tensors)[:3])
        raise UserError(f"{weights.source} holds no published detector of the forms {', '.join(FORMS)}; {hint}")
    if form not in (None, found):
        raise UserError(f"{weights.source} has the form {found!r} and not {form!r}; leave form out, or give this one")
    return FORMS[found]


def _preset(family: str, fields: Mapping[str, Any]) -> str:
    """The preset of a family with this backbone, of DC5 if it exists."""
    tag = TAGS.get(fields["backbone"], "r50")
    dc5 = f"{family}_dc5_{tag}"
    return dc5 if fields.get("dilated") and dc5 in presets() else f"{family}_{tag}"


def _config(detector: nn.Module) -> ModelConfig:
    return config_of(detector, "the export needs the model's configuration: make the model with regolite.build")


def _form(config: ModelConfig) -> Any:
    """The module of :data:`FORMS` whose code can build this model."""
    kinds = {kind: name for name, (kind, _) in DETECTORS.items()}
    form = FORMS.get("rego" if config.rego is not None else kinds.get(type(config.detector), ""))
    if form is None or not form.holds(config):
        there = f", which has {form.TITLE}" if form is not None else ""
        raise UserError(f"{config.preset}, as configured, can't run in published code{there}")
    return form
