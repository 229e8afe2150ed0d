"""What may change when a run is resumed: little, and it is listed here.

A checkpoint keeps the configuration of its run and a fingerprint of the annotations that it was trained on. A resumed
run must have the same, apart from the fields in :data:`MAY_CHANGE`; otherwise the result would be neither that of the
old configuration nor that of the new one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from regolite.data import DetectionDataset
from regolite.errors import UserError
from regolite.models.config import ModelConfig
from regolite.training.config import RunConfig

_MACHINE = ("device", "precision", "processes", "accumulate", "activation_checkpointing", "workers")
_WATCHING = (
    "log_every", "tensorboard", "evaluate_every", "evaluate_start", "evaluate_train", "checkpoint_minutes",
    "keep_checkpoints",
)  # fmt: skip
_NEW_LENGTH = "the schedule is recomputed for the new length of the run"

MAY_CHANGE: dict[str, str | None] = {
    **dict.fromkeys(("output", "resume")),
    **dict.fromkeys(_MACHINE + _WATCHING, ""),
    "data": "the annotations are the same",
    "on_broken": "from here on",
    "patience": "from here on",
    "lr": "the new learning rate holds from here on",
    "epochs": _NEW_LENGTH,
    "max_minutes": _NEW_LENGTH,
    "max_cpu_minutes": _NEW_LENGTH,
}
"""Fields of :class:`RunConfig` that may change, with what the log says of it; None for nothing.

``epochs`` may only grow. A field that is not listed here must not change.
"""

OF_MODEL = ("model", "overrides", "augment", "image_size")
"""Fields of :class:`RunConfig` that only make the model's configuration, and are compared there."""

HINTS = {
    "batch_size": "for less memory keep the batch size, and use accumulate or activation_checkpointing",
    "epochs": "epochs may grow, but not shrink",
}

DEFAULTS = json.loads(json.dumps(RunConfig().to_dict()))
"""What a field had before it was added: configurations of earlier versions lack it."""

SHOWN = 8  # changed fields that a message names

Changes = dict[str, tuple[Any, Any]]


def describe_run(
    config: RunConfig, model: ModelConfig, train_set: DetectionDataset, val_set: DetectionDataset
) -> dict[str, Any]:
    """What a checkpoint keeps of its run, as JSON holds it.

    Returns:
        ``run`` and ``model``, the configurations, and ``data``, the :func:`fingerprint` of each split.
    """
    data = {"train": fingerprint(train_set), "val": fingerprint(val_set)}
    return json.loads(json.dumps({"run": config.to_dict(), "model": model.to_dict(), "data": data}))


def fingerprint(dataset: DetectionDataset) -> dict[str, Any]:
    """What the annotations of a data set are recognized by.

    Returns:
        ``images`` and ``objects``, their numbers, and ``sha256`` of classes, category ids, and each image's id, file
        name, size and objects. Where the images are, what is in their files, and outlines do not count.
    """
    digest, objects = hashlib.sha256(json.dumps([dataset.classes, dataset.category_ids]).encode()), 0
    for i in range(len(dataset)):
        one = dataset.objects(i)
        digest.update(json.dumps([dataset.image_ids[i], dataset.file_name(i), dataset.size(i), len(one)]).encode())
        for column in (one.labels, one.boxes, one.areas, one.crowd):
            digest.update(column.tobytes())
        objects += len(one)
    return {"images": len(dataset), "objects": objects, "sha256": digest.hexdigest()}


def compare_runs(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> tuple[list[str], list[str]]:
    """Compare the run in a folder with the one that is to go on there.

    Args:
        before: of the checkpoint, by :func:`describe_run`; parts of it may be missing in those of earlier versions.
        now: the same of the present run.
        folder: of the run.

    Returns:
        The changes that are allowed, for the log, and what ``before`` does not say, for a warning.

    Raises:
        UserError: for every other change; the message names the fields with their values.
    """
    known = {part: before[part] for part in ("run", "model", "data") if isinstance(before.get(part), dict)}
    names = {"run": "which configuration", "model": "which model", "data": "which annotations"}
    unknown = [name for part, name in names.items() if part not in known]
    changed: Changes = {}
    if "run" in known:
        changed = changes(known["run"], {name: now["run"][name] for name in now["run"] if name not in OF_MODEL})
    allowed = {name: values for name, values in changed.items() if name in MAY_CHANGE and not _is_shorter(name, values)}
    refused = {name: values for name, values in changed.items() if name not in allowed}
    of_model = _changes_of_model(known["model"], now, folder) if "model" in known else {}
    of_data = _changes_of_data(known.get("data", {}), now["data"])
    what = "another model" if of_model else "another configuration" if refused else "other annotations"
    if of_data and "data" in changed:
        refused["data"] = changed["data"]
    hints = [HINTS[name] for name in refused if name in HINTS]
    fix = "go on with the values that it was begun with, or give another output folder"
    if not of_model:
        fix += f" (checkpoint={folder / 'model.safetensors'} starts a new run from these weights)"
    fix = "; ".join([fix, *hints])
    refuse({**of_model, **refused, **of_data}, f"{folder} holds a run of {what}", fix)
    said = {name: text(name, values) for name, values in allowed.items() if MAY_CHANGE[name] is not None}
    return [f"{change} ({MAY_CHANGE[name]})" if MAY_CHANGE[name] else change for name, change in said.items()], unknown


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Changes:
    """The fields of a configuration whose values differ from an earlier one: old and new value of each."""
    pairs = {name: (before.get(name, DEFAULTS.get(name)), value) for name, value in now.items()}
    return {name: (old, new) for name, (old, new) in pairs.items() if old != new}


def refuse(changed: Changes, what: str, fix: str) -> None:
    """Refuse to mix two configurations.

    Args:
        changed: the fields that differ.
        what: the beginning of the message.
        fix: how to go on.

    Raises:
        UserError: if there is any such field.
    """
    if changed:
        said = [text(name, values) for name, values in changed.items()]
        more = [f"and {len(said) - SHOWN} more"] if len(said) > SHOWN else []
        raise UserError(f"{what} ({', '.join(said[:SHOWN] + more)}): {fix}")


def text(name: str, values: tuple[Any, Any]) -> str:
    """A change in words."""
    return f"{name}={values[0]!r}, now {values[1]!r}"


def _is_shorter(name: str, values: tuple[Any, Any]) -> bool:
    """Whether a change takes away epochs."""
    return name == "epochs" and not (isinstance(values[0], int) and values[0] < values[1])


def _changes_of_model(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> Changes:
    """The fields of the model's configuration that differ; those of its parts as ``detector.queries``.

    Raises:
        UserError: the classes differ, or the configuration is that of another version.
    """
    try:
        old = json.loads(json.dumps(ModelConfig.from_dict(dict(before)).to_dict()))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"the run in {folder} is that of another version of regolite ({error}): go on with that version, or give "
            "another output folder"
        ) from error
    new = now["model"]
    classes = [dict(zip(model["category_ids"], model["classes"])) for model in (old, new)]
    if list(classes[0].items()) != list(classes[1].items()):
        differ = {str(id): (classes[0].get(id), classes[1].get(id)) for id in {**classes[0], **classes[1]}}
        differ = {f"category {id}": values for id, values in differ.items() if values[0] != values[1]}
        refuse(
            differ,
            f"{folder} holds a run on other categories than those of {now['run']['data']}",
            "go on with the data that it was begun with, or give another output folder",
        )
    if old["preset"] != new["preset"]:  # nearly everything else differs, too
        return {"model": (old["preset"], new["preset"])}
    flat_old, flat_new = dict(_flat(old)), dict(_flat(new))
    pairs = {name: (flat_old.get(name), flat_new.get(name)) for name in {**flat_old, **flat_new}}
    return {name: (old, new) for name, (old, new) in pairs.items() if old != new}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The fields of a nested configuration, with the names of their parts before them."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _changes_of_data(before: Mapping[str, Any], now: Mapping[str, Any]) -> Changes:
    """The splits whose annotations differ."""

    def short(one: Mapping[str, Any]) -> str:
        return f"{one.get('images')} images, {one.get('objects')} objects, SHA-256 {str(one.get('sha256'))[:8]}"

    differ = {split: (before[split], now[split]) for split in now if split in before and before[split] != now[split]}
    return {f"{split} annotations": (short(old), short(new)) for split, (old, new) in differ.items()}
