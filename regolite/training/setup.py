"""What a run needs before its first step: processes, a device, images, a model that knows their classes."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs

from regolite.data import DetectionDataset, Pasted, cut_outs, make_transform, open_data, repeat_rare
from regolite.data.coco import category_differences
from regolite.errors import UserError
from regolite.models.config import ModelConfig, config_of
from regolite.models.detector import Detector
from regolite.models.presets import configure
from regolite.training.config import RunConfig
from regolite.training.environment import from_slurm, launched


def is_to_launch(config: RunConfig, watch: object, model: object) -> bool:
    """Whether this process is to start the processes that train, and not to train itself."""
    os.environ.update(from_slurm())
    there = int(os.environ["WORLD_SIZE"]) if launched() else 1
    if launched() and config.processes not in (1, there):
        raise UserError(f"processes={config.processes}, but {there} have been started; leave it out")
    wanted = max(config.processes, there)
    if config.batch_size % (wanted * config.accumulate):
        raise UserError(
            f"batch_size={config.batch_size} is that of all processes together, and cannot be shared by {wanted} with "
            f"accumulate={config.accumulate}; choose a multiple of {wanted * config.accumulate}"
        )
    if config.processes > 1 and not launched() and not (watch is None and model is None):
        raise UserError(
            "processes that are started know no watch and no model of this one; use processes=1, or save it"
        )
    return config.processes > 1 and not launched()


def make_accelerator(config: RunConfig, has_unused_parameters: bool = False) -> Accelerator:
    """The processes, the device and the precision of a run.

    Args:
        config: the run.
        has_unused_parameters: see :class:`~regolite.models.detector.Detector`.

    Raises:
        UserError: when there is no such device, or it knows no such precision.
    """
    if config.device not in ("auto", "cpu", "cuda", "mps"):
        raise UserError(f"unknown device {config.device!r}; choose auto, cpu, cuda or mps")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device='cuda', but PyTorch sees no CUDA GPU; use device='auto'")
    if config.device == "mps" and not torch.backends.mps.is_available():
        raise UserError("device='mps', but PyTorch sees no Apple GPU; use device='auto'")
    AcceleratorState._reset_state(reset_partial_state=True)  # or the next run in a notebook had to be like the first
    # Accelerate connects processes on a CPU only where it is asked for one: otherwise each would train by itself.
    is_cpu = config.device == "cpu" or not (torch.cuda.is_available() or torch.backends.mps.is_available())
    try:
        together = DistributedDataParallelKwargs(
            gradient_as_bucket_view=True,  # no second copy of the gradient
            find_unused_parameters=has_unused_parameters,  # a search of the graph in every step
        )
        accelerator = Accelerator(cpu=is_cpu, mixed_precision=config.precision, kwargs_handlers=[together])
    except ValueError as error:
        raise UserError(f"precision={config.precision!r} cannot be had here: {error}") from error
    if config.precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("precision='fp16' needs a GPU; use precision='bf16' or 'no'")
    return accelerator


def prepare_data(config: RunConfig, given: Detector | None) -> tuple[DetectionDataset, DetectionDataset, ModelConfig]:
    """Training and validation images, and the configuration of the model with their classes in it."""
    if given is None:
        model = configure(config.model, **parse_overrides(config.overrides))
    elif config.overrides:
        raise UserError(f"overrides ({', '.join(config.overrides)}) change a preset, and a model was given: change it")
    else:
        need = "a model to train must carry its configuration: set its model_config (regolite.configure)"
        model = config_of(given, need)
    size, augment = config.image_size or model.image_size, config.augment or model.augment
    transform, strict = make_transform(augment, size, train=True), config.on_broken == "stop"
    train_set = open_data(config.data, "train", transform, config.limit_images, check_files=strict)
    val_set = open_data(config.data, "val", make_transform(augment, size, train=False), check_files=strict)
    if given is not None and len(model.classes) != len(train_set.classes):
        raise UserError(
            f"the model has {len(model.classes)} classes and {config.data} has {len(train_set.classes)}: make it with "
            f"num_classes={len(train_set.classes)} (regolite.build, regolite.interop.load and adapt take that)"
        )
    model = replace(
        model, augment=augment, image_size=size, classes=train_set.classes, category_ids=train_set.category_ids
    )
    differences = category_differences(train_set.categories, val_set.categories, ("train", "val"))
    if differences:
        some = "; ".join(differences[:3]) + ("; ..." if len(differences) > 3 else "")
        raise UserError(
            f"{config.data}: training and validation annotations name different categories: {some}: give both files "
            "the same list of categories"
        )
    for split, data, lacks in (("train", train_set, "nothing to learn"), ("val", val_set, "nothing to measure")):
        if not data.is_annotated:
            where = getattr(data, "file", f"{config.data}, split {split}")
            raise UserError(f"{where}: {len(data)} images without a single annotation, {lacks}: annotate some of them")
    return train_set, val_set, model


def more_objects_than_queries(model: ModelConfig, data: DetectionDataset) -> str | None:
    """What to say if images have more objects than the detector has queries, each of which stands for one; or None.

    Args:
        model: the detector's configuration.
        data: the training images.
    """
    queries = getattr(model.detector, "queries", None)
    if queries is None or getattr(data, "max_objects", math.inf) <= queries:  # what scenes have
        return None
    counts = {i: count for i in range(len(data)) if (count := len(data.objects(i))) > queries}
    counts = {i: len(data.objects(i).targets(*data.size(i))) for i in counts}  # crowds are no targets
    counts = {i: count for i, count in counts.items() if count > queries}
    if not counts:
        return None
    fullest = max(counts, key=lambda i: counts[i])
    return (
        f"{len(counts)} of {len(data)} training images have more objects than the detector has queries ({queries}), "
        f"up to {counts[fullest]} ({data.file_name(fullest)}): it can't find all of them; set queries={counts[fullest]}"
    )


def resampled(config: RunConfig, train_set: DetectionDataset) -> DetectionDataset:
    """The training images as they are shown: those of rare classes repeated, objects of others pasted onto them."""
    if config.repeat_rare:
        train_set = repeat_rare(train_set, config.repeat_rare, config.seed)
    if not config.copy_paste:
        return train_set
    folder, *_ = config.data.partition(":every=")
    if folder.partition(":")[0] == "scenes":
        raise UserError("copy_paste cuts objects out along masks, and scenes have none: use copy_paste=0")
    return Pasted(train_set, cut_outs(folder, limit=config.limit_images), config.copy_paste)


def parse_overrides(overrides: tuple[str, ...]) -> dict[str, Any]:
    """``queries=50`` to a name and a value; a list is written with commas, as in ``alphas=1,1,1``."""
    parsed = {}
    for text in overrides:
        name, _, value = text.partition("=")
        if not value.strip(","):
            raise UserError(f"override {text!r} has no value; write name=value, as in queries=50")
        parts = tuple(_literal(part) for part in value.split(",") if part)
        parsed[name] = parts if "," in value else parts[0]
    return parsed


def _literal(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
