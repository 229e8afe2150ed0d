"""Models in the form of the Hugging Face Hub: a folder with ``model.safetensors``, ``config.json`` and a model card.

``model.safetensors`` is a complete checkpoint (:mod:`regolite.checkpoint`). ``config.json`` repeats its configuration
for readers and for the Hub, which counts downloads of this file; loading does not read it.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from torch import nn

import regolite
from regolite.checkpoint import WEIGHTS, save_model
from regolite.errors import UserError
from regolite.evaluation import table_by_stage
from regolite.loading import load
from regolite.models.config import ModelConfig, config_of
from regolite.models.detector import Detector, as_detector
from regolite.utils.files import write_atomic
from regolite.utils.validation import of_kind, shown

CONFIG, CARD = "config.json", "README.md"


def save_pretrained(
    model: nn.Module, folder: str | Path, metrics: Mapping[str, Any] | None = None, license: str | None = None
) -> Path:
    """Save a model with its configuration and a model card.

    Args:
        model: a model made by :func:`regolite.build` or :func:`regolite.load`.
        folder: the folder, which is created; its files of these three names are replaced.
        metrics: the result of :func:`regolite.evaluate`, for the card.
        license: license of the weights, as ``"apache-2.0"``, for the card; by default none is named.

    Returns:
        The folder, which :func:`from_pretrained`, :func:`regolite.load` and ``--checkpoint`` take.

    Raises:
        UserError: the model carries no configuration, or ``folder`` is a file.
    """
    config, folder = config_of(model), Path(folder)
    if folder.is_file():
        raise UserError(f"{folder} is a file: give a folder")
    card = _card(config, as_detector(model), metrics, license)
    save_model(model, folder / WEIGHTS)
    about = {"library_name": "regolite", "regolite_version": regolite.__version__, **config.to_dict()}
    write_atomic(folder / CONFIG, (json.dumps(about, indent=2) + "\n").encode())
    write_atomic(folder / CARD, card.encode())
    return folder


def from_pretrained(name: str | Path, revision: str | None = None, device: str | torch.device = "cpu") -> Detector:
    """Load a model from a folder or from the Hugging Face Hub, in evaluation mode.

    Args:
        name: a folder of :func:`save_pretrained` or of a run, or the name of a repository, ``"owner/name"``. An
            existing folder takes precedence. Downloads are cached, and then found offline.
        revision: branch, tag or commit of the repository; the newest one by default.
        device: device of the model.

    Raises:
        UserError: there is no such folder or repository, the Hub cannot be reached, or the files hold no model of this
            package.
    """
    of_kind("name", name, (str, Path), "a folder or the name of a repository")
    if Path(name).is_dir():
        return load(name, device)
    wanted = [WEIGHTS, CONFIG, CARD]  # nothing else is needed, whatever the repository holds
    try:
        folder = huggingface_hub.snapshot_download(_repository(name), revision=revision, allow_patterns=wanted)
    except Exception as error:  # of several libraries
        raise UserError(f"can't get {name} from the Hugging Face Hub: {_reason(error)}") from error
    return load(folder, device)


def push_to_hub(
    model: nn.Module,
    name: str,
    metrics: Mapping[str, Any] | None = None,
    license: str | None = None,
    private: bool = False,
) -> str:
    """Upload a model to the Hugging Face Hub, as the user who has logged in by ``hf auth login``.

    Args:
        model: the model.
        name: the repository, ``"owner/name"``, which is created if there is none.
        metrics: see :func:`save_pretrained`.
        license: see :func:`save_pretrained`.
        private: whether a new repository is private.

    Returns:
        The address of the upload.

    Raises:
        UserError: as :func:`save_pretrained`, or the Hub refuses or cannot be reached.
    """
    name = _repository(name)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder, metrics, license)
        try:
            huggingface_hub.create_repo(name, private=private, exist_ok=True)
            return str(huggingface_hub.upload_folder(repo_id=name, folder_path=folder))
        except Exception as error:  # of several libraries
            raise UserError(f"can't upload {name} to the Hugging Face Hub: {_reason(error)}") from error


def _repository(name: str | Path) -> str:
    """The name of a repository.

    Raises:
        UserError: it has another form.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        raise UserError(f"{shown(str(name))} is neither a folder nor the name of a repository, owner/name")
    return str(name)


def _reason(error: Exception) -> str:
    """The first line of an error of the Hub."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _card(config: ModelConfig, detector: Detector, metrics: Mapping[str, Any] | None, license: str | None) -> str:
    """The model card: what it is, its classes, its metrics and license if they are known, and how to load it."""
    parameters = sum(parameter.numel() for parameter in detector.parameters()) / 1e6
    stages = f"with {detector.num_stages} stages of REGO" if detector.num_stages else "without REGO"
    lines = [
        "---", "library_name: regolite", "pipeline_tag: object-detection",
        *([f"license: {license.lower()}"] if license else []), "---", "",
        f"# {config.preset}", "",
        f"An object detector of the preset `{config.preset}`, {stages}: {parameters:.1f} M parameters, images of",
        f"{config.image_size} pixels, {len(config.classes)} classes.", "",
        "```python", "import regolite", "",
        'model = regolite.from_pretrained("owner/name")  # or the folder',
        '[found] = regolite.detect(model, "photo.jpg")', "```", "",
        "## Classes", "", f"{', '.join(config.classes)}.", "",
        "## Metrics", "",
    ]  # fmt: skip
    if metrics is None:
        lines.append("Not measured.")
    else:
        lines += [f"COCO's average precision in percent, on {metrics['images']} images:", ""]
        lines += ["```text", table_by_stage(metrics), "```"]
    return "\n".join([*lines, "", "## License", "", f"Of the weights: {license or 'not stated'}.", ""])
