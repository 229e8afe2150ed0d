"""The training loop: one for the notebook, the command line, one device and many.

Read :func:`train` from top to bottom. What belongs to distribution, mixed precision and devices is Accelerate's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from regolite.baselines import BaselineConfig
from regolite.checkpoint import class_head_names, load_weights, save_model
from regolite.data import DetectionDataset, make_transform, open_data
from regolite.errors import UserError
from regolite.evaluation import evaluate
from regolite.losses import SetLoss
from regolite.matching import NonFinitePrediction
from regolite.presets import ModelConfig, build, configure
from regolite.progress import Status
from regolite.structures import DetectorOutput, Target
from regolite.training.batches import EpochBatches, loader
from regolite.training.config import RunConfig
from regolite.training.folder import RunFolder
from regolite.training.schedule import lr_factor, parameter_groups


class NonFiniteLoss(UserError):
    """The loss became infinite or not a number; the message names its terms, or the predictions that are."""


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        step: optimiser steps done.
        epoch: number of the running epoch, from 0.
        batch: batches of this epoch done.
        seconds: time spent, over all sessions of the run.
        best: best AP on the validation pictures, -1 before the first evaluation.
        evaluated: the step of the last evaluation on each split.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    seconds: float = 0.0
    best: float = -1.0
    evaluated: dict[str, int] = field(default_factory=dict)


def train(
    config: RunConfig, watch: Callable[[dict[str, Any]], None] | None = None, model: nn.Module | None = None
) -> Path:
    """Train a model.

    Args:
        config: what to train, on what, and how.
        watch: called with every line of metrics when it is written; what it raises ends the run.
        model: train this detector, in place, and not a new one of the preset ``config.model``. It must carry its
            ``model_config`` (as those of :func:`regolite.load` and :func:`regolite.published.adapt`, and REGO on them)
            and have as many classes as the data, whose names it takes over. To go on with its run, give it again: the
            weights of the checkpoint are loaded into it.

    Returns:
        The folder of the run, see :mod:`regolite.training.folder`.

    Raises:
        UserError: when something in the configuration can't be had.
        NonFiniteLoss: when the loss stops being a number; the last checkpoint stays.
    """
    accelerator = _accelerator(config)
    device = accelerator.device
    train_set, val_set, model_config = _prepare_data(config, model)
    config = replace(config, model=model_config.preset)
    folder = RunFolder(config.output, config.resume, watch)
    set_seed(config.seed)
    if model is None:
        model = build(model_config)
    else:
        model.model_config = model_config
    model.to(device)
    if config.checkpoint is not None:
        anew = load_weights(model, config.checkpoint, new_classes=True, new_stages=True)
        heads = class_head_names(anew)
        what = ["classes that it does not name"] * bool(heads) + ["all of REGO"] * (len(anew) > len(heads))
        if what:
            folder.log.info("weights are those of %s, but these start anew: %s", config.checkpoint, ", ".join(what))
    if device.type in ("cpu", "cuda"):
        model.to(memory_format=torch.channels_last)
    set_loss = SetLoss(model_config.loss, model.scoring)
    optimizer = torch.optim.AdamW(parameter_groups(model, config), weight_decay=config.weight_decay)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema)) if config.ema else None
    progress, window = _restore(folder, model, optimizer, average) if config.resume else (Progress(), _Window())
    folder.write_config({"run": config.to_dict(), "model": model_config.to_dict()})
    _announce(folder, config, model, train_set, progress)

    trained, optimizer = accelerator.prepare(model, optimizer)
    evaluated = average.module if average is not None else model
    sizes = torch.tensor([train_set.size(i) for i in range(len(train_set))], dtype=torch.float32)
    shapes = sizes[:, 0] / sizes[:, 1]
    steps_per_epoch = math.ceil(len(train_set) / config.batch_size)
    total_steps = config.epochs * steps_per_epoch
    clock = _Clock(progress.seconds)
    saved = time.monotonic()

    def done() -> float:
        """How much of the run is done: by steps or by time, whichever ends first."""
        by_time = clock.seconds / (60 * config.max_minutes) if config.max_minutes else 0.0
        return min(1.0, max(progress.step / total_steps, by_time))

    status = Status(model_config.preset, accelerator.is_main_process)
    status.update(done())
    while done() < 1.0:
        batches = EpochBatches(
            shapes, config.batch_size, config.seed, progress.epoch, progress.batch,
            accelerator.process_index, accelerator.num_processes,
        )  # fmt: skip
        model.train()
        for images, targets in loader(train_set, config.seed, config.workers, batches, device.type == "cuda"):
            factor = lr_factor(config, progress.epoch, done())
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor
            targets = [target.to(device, non_blocking=True) for target in targets]
            objects = torch.tensor(float(sum(len(t) for t in targets)), device=device)
            objects = accelerator.reduce(objects, "mean").item()

            # What a step draws (dropout) depends on its number and the process alone, not on how the run came to it.
            torch.manual_seed(hash((config.seed, progress.step, accelerator.process_index)) % 2**63)
            output = trained(images.to(device, non_blocking=True))
            loss, terms = _finite_loss(set_loss, output, targets, objects, progress, folder)
            optimizer.zero_grad()
            accelerator.backward(loss)
            norm = accelerator.clip_grad_norm_(model.parameters(), config.clip) if config.clip else None
            optimizer.step()
            if average is not None:
                average.update_parameters(model)

            progress.step, progress.batch, progress.seconds = progress.step + 1, progress.batch + 1, clock.seconds
            window.add(loss, terms, norm, len(targets) * accelerator.num_processes)
            status.update(done(), f"epoch {progress.epoch}, loss {loss.item():.2f}")
            if progress.step % config.log_every == 0:
                _log(folder, window.line(progress, optimizer.param_groups[-1]["lr"]), accelerator)
                window = _Window()
            if time.monotonic() - saved > 60 * config.checkpoint_minutes:
                _save(folder, model, optimizer, average, evaluated, progress, window, accelerator)
                saved = time.monotonic()
            if done() >= 1.0 and progress.batch < steps_per_epoch:
                break  # in the middle of an epoch; one that has ended is counted below
        else:
            progress.epoch, progress.batch = progress.epoch + 1, 0
            if config.evaluate_every and progress.epoch % config.evaluate_every == 0 and done() < 1.0:
                _evaluate(folder, evaluated, val_set, "val", progress, accelerator)
    status.close()

    progress.seconds = clock.seconds
    _save(folder, model, optimizer, average, evaluated, progress, window, accelerator)
    _evaluate(folder, evaluated, val_set, "val", progress, accelerator)
    if config.evaluate_train:
        plain = make_transform(model_config.augment, model_config.image_size, train=False)
        train_set.transform = plain
        _evaluate(folder, evaluated, train_set, "train", progress, accelerator)
    _save(folder, model, optimizer, average, evaluated, progress, window, accelerator)
    if accelerator.is_main_process:
        from regolite.inspect import draw_run  # here, so that nobody else waits for matplotlib

        draw_run(folder.path, evaluated, {"val": val_set, "train": train_set})
    accelerator.end_training()
    folder.close()
    return folder.path


def _accelerator(config: RunConfig) -> Accelerator:
    if config.device not in ("auto", "cpu", "cuda", "mps"):
        raise UserError(f"unknown device {config.device!r}; choose auto, cpu, cuda or mps")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device='cuda', but PyTorch sees no CUDA GPU; use device='auto'")
    if config.device == "mps" and not torch.backends.mps.is_available():
        raise UserError("device='mps', but PyTorch sees no Apple GPU; use device='auto'")
    AcceleratorState._reset_state(reset_partial_state=True)  # or the next run in a notebook had to be like the first
    try:
        accelerator = Accelerator(cpu=config.device == "cpu", mixed_precision=config.precision)
    except ValueError as error:
        raise UserError(f"precision={config.precision!r} cannot be had here: {error}") from error
    if config.precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("precision='fp16' needs a GPU; use precision='bf16' or 'no'")
    return accelerator


def _prepare_data(config: RunConfig, given: nn.Module | None) -> tuple[DetectionDataset, DetectionDataset, ModelConfig]:
    """Training and validation pictures, and the configuration of the model with their classes in it."""
    if given is None:
        model = configure(config.model, **parse_overrides(config.overrides))
    elif getattr(given, "model_config", None) is None:
        raise UserError("a model to train must carry its configuration: set its model_config (regolite.configure)")
    elif config.overrides:
        raise UserError(f"overrides ({', '.join(config.overrides)}) change a preset, and a model was given: change it")
    else:
        model = given.model_config
    if isinstance(model.detector, BaselineConfig):
        raise UserError(f"{model.preset} is a baseline, which is measured and not trained here; train a DETR")
    size, augment = config.image_size or model.image_size, config.augment or model.augment
    train_set = open_data(config.data, "train", make_transform(augment, size, train=True), config.limit_images)
    val_set = open_data(config.data, "val", make_transform(augment, size, train=False))
    if given is not None and len(model.classes) != len(train_set.classes):
        raise UserError(
            f"the model has {len(model.classes)} classes and {config.data} has {len(train_set.classes)}: make it with "
            f"num_classes={len(train_set.classes)} (regolite.build, regolite.published.load and adapt take that)"
        )
    model = replace(
        model, augment=augment, image_size=size, classes=train_set.classes, category_ids=train_set.category_ids
    )
    if val_set.category_ids != train_set.category_ids:
        raise UserError(f"{config.data}: training and validation annotations name different categories")
    return train_set, val_set, model


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


def _finite_loss(
    set_loss: SetLoss,
    output: DetectorOutput,
    targets: list[Target],
    objects: float,
    progress: Progress,
    folder: RunFolder,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and its terms, or one error that says what of it is not finite."""
    try:
        loss, terms = set_loss(output, targets, objects)
        if torch.isfinite(loss):
            return loss, terms
        bad = [name for name, value in terms.items() if not torch.isfinite(value)]
        message = (
            f"these terms of the loss are not finite: {', '.join(bad)}. Lower the learning rate, clip the gradient, "
            "or train without mixed precision"
        )
    except NonFinitePrediction as error:
        message = str(error)
    message = f"training stopped at step {progress.step}: {message}"
    folder.log.error(message)
    raise NonFiniteLoss(message)


def _announce(folder: RunFolder, config: RunConfig, model: nn.Module, data: DetectionDataset, at: Progress) -> None:
    count = sum(p.numel() for p in model.parameters())
    folder.log.info(
        "%s %s (%.2f M parameters) on %d pictures of %s, seed %d, PyTorch %s",
        "going on with" if at.step else "training", config.model, count / 1e6, len(data), config.data, config.seed,
        torch.__version__,
    )  # fmt: skip


def _log(folder: RunFolder, line: dict[str, Any], accelerator: Accelerator) -> None:
    if not accelerator.is_main_process:
        return
    folder.write_metrics(line)
    folder.log.info(
        "step %d epoch %d loss %.3f lr %.2e %.1f pictures/s",
        *(line[k] for k in ("step", "epoch", "loss", "lr", "images_per_second")),
    )


def _evaluate(
    folder: RunFolder,
    model: nn.Module,
    dataset: DetectionDataset,
    split: str,
    progress: Progress,
    accelerator: Accelerator,
) -> None:
    if not accelerator.is_main_process or progress.evaluated.get(split) == progress.step:
        return
    progress.evaluated[split] = progress.step
    figures = evaluate(model, dataset, batch_size=8)
    where = {"kind": "evaluation", "split": split, "step": progress.step, "epoch": progress.epoch}
    folder.write_metrics({**where, "seconds": progress.seconds, **figures})
    by_stage = ", ".join(f"{s['AP'] or 0.0:.1f}" for s in figures["stages"])
    folder.log.info("step %d AP on %s by stage: %s", progress.step, split, by_stage)
    Status.say(f"step {progress.step}, AP on {split} by stage, the base detector first: {by_stage}")
    if split == "val" and (figures["AP"] or 0.0) > progress.best:
        progress.best = figures["AP"] or 0.0
        save_model(model, folder.path / "best.safetensors")


def _save(
    folder: RunFolder,
    model: nn.Module,
    optimizer: Any,
    average: AveragedModel | None,
    evaluated: nn.Module,
    progress: Progress,
    window: _Window,
    accelerator: Accelerator,
) -> None:
    if not accelerator.is_main_process:
        return
    bad = [name for name, value in model.state_dict().items() if not torch.isfinite(value).all()]
    if bad:  # the loss was finite and its gradient was not: the next step would say so, but too late for the checkpoint
        message = (
            f"training stopped at step {progress.step}: {len(bad)} weights are not finite ({bad[0]}, ...). Lower "
            "the learning rate, clip the gradient, or train without mixed precision"
        )
        folder.log.error(message)
        raise NonFiniteLoss(message)
    folder.save_state(
        {
            **vars(progress),
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "average": average.state_dict() if average is not None else None,
            "window": window.state(),
        }
    )
    save_model(evaluated, folder.path / "model.safetensors")


def _restore(
    folder: RunFolder, model: nn.Module, optimizer: torch.optim.Optimizer, average: AveragedModel | None
) -> tuple[Progress, _Window]:
    state = folder.load_state()
    if state is None:
        return Progress(), _Window()
    try:
        model.load_state_dict(state["model"])
        chosen = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        optimizer.load_state_dict(state["optimizer"])
        for group, choice in zip(optimizer.param_groups, chosen):
            group.update(choice)  # learning rates are the configuration's, which may have changed
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{folder.path} holds a run of another model ({str(error).splitlines()[0]})") from error
    if average is not None and state["average"] is not None:
        average.load_state_dict(state["average"])
    progress = Progress(**{name: state[name] for name in vars(Progress()) if name in state})
    return progress, _Window(**state.get("window", {}))


class _Clock:
    """Seconds of the run, those of earlier sessions included."""

    def __init__(self, before: float) -> None:
        self._start = time.monotonic() - before

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start


class _Window:
    """Means of the metrics since the last line."""

    def __init__(
        self, seconds: float = 0.0, images: int = 0, steps: int = 0, sums: dict[str, Tensor] | None = None
    ) -> None:
        self.start, self.images, self.steps = time.monotonic() - seconds, images, steps
        self.sums = sums or {}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that a resumed run writes the same means."""
        seconds = time.monotonic() - self.start
        return {"seconds": seconds, "images": self.images, "steps": self.steps, "sums": self.sums}

    def add(self, loss: Tensor, terms: dict[str, Tensor], norm: Tensor | None, images: int) -> None:
        self.images, self.steps = self.images + images, self.steps + 1
        values = {"loss": loss, **terms} | ({"gradient_norm": norm} if norm is not None else {})
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()

    def line(self, progress: Progress, lr: float) -> dict[str, Any]:
        means = {name: round(float(total) / self.steps, 5) for name, total in self.sums.items()}
        loss, norm = means.pop("loss"), means.pop("gradient_norm", None)
        return {
            "kind": "train",
            "step": progress.step,
            "epoch": progress.epoch,
            "seconds": round(progress.seconds, 2),
            "lr": lr,
            "loss": loss,
            "gradient_norm": norm,
            "images_per_second": round(self.images / (time.monotonic() - self.start), 2),
            "terms": means,
        }
