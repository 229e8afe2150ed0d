"""The training loop: one for the notebook, the command line, one device and many.

Read :func:`train` from top to bottom. What belongs to distribution, mixed precision and devices is Accelerate's.
"""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from regolite import processes
from regolite.baselines import BaselineConfig
from regolite.checkpoint import class_head_names, load_weights, save_model
from regolite.data import DetectionDataset, make_transform, open_data
from regolite.errors import UserError
from regolite.evaluation import evaluate
from regolite.losses import SetLoss
from regolite.matching import NonFinitePrediction
from regolite.presets import ModelConfig, build, configure
from regolite.progress import Status
from regolite.signals import stop
from regolite.structures import DetectorOutput, Target
from regolite.training.batches import EpochBatches, Part, loader, steps
from regolite.training.config import RunConfig
from regolite.training.folder import RunFolder
from regolite.training.launch import from_slurm, launch, launched
from regolite.training.metrics import TensorBoard, Window, timed
from regolite.training.recompute import keep, recompute
from regolite.training.schedule import lr_factor, parameter_groups

T = TypeVar("T")


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
        broken: how often a picture could not be read and another took its place.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    seconds: float = 0.0
    best: float = -1.0
    evaluated: dict[str, int] = field(default_factory=dict)
    broken: int = 0


@stop
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
        RunStopped: after Ctrl-C, SIGTERM, SIGHUP or SIGUSR1; the step is finished and saved, see
            :mod:`regolite.signals`.
    """
    if _is_to_launch(config, watch, model):
        return launch(config)
    accelerator = _accelerator(config)
    device = accelerator.device
    train_set, val_set, model_config = _prepare_data(config, model)
    config = replace(config, model=model_config.preset)
    if config.tensorboard and accelerator.is_main_process:
        watch = TensorBoard(Path(config.output) / "tensorboard", watch)
    folder = _folder(config, watch, accelerator)
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
    fused = True if device.type == "cuda" else None  # one kernel for all weights
    optimizer = torch.optim.AdamW(parameter_groups(model, config), weight_decay=config.weight_decay, fused=fused)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema)) if config.ema else None
    progress, window = Progress(), Window()
    if config.resume:
        _check_categories(folder, config, model_config)
        progress, window = _restore(folder, model, optimizer, average, accelerator)
    if accelerator.is_main_process:
        folder.write_config({"run": config.to_dict(), "model": model_config.to_dict()})
        _announce(folder, config, model, train_set, progress, accelerator)

    if config.recompute:
        recompute(model)
    trained, optimizer = accelerator.prepare(model, optimizer)
    evaluated = average.module if average is not None else model
    sizes = torch.tensor([train_set.size(i) for i in range(len(train_set))], dtype=torch.float32)
    shapes = sizes[:, 0] / sizes[:, 1]
    steps_per_epoch = math.ceil(len(train_set) / config.batch_size)
    total_steps = config.epochs * steps_per_epoch
    clock = _Clock(progress.seconds)
    saved = time.monotonic()

    def done() -> float:
        """How much of the run is done: by steps or by time, whichever ends first; the same in every process."""
        by_time = progress.seconds / (60 * config.max_minutes) if config.max_minutes else 0.0
        return min(1.0, max(progress.step / total_steps, by_time))

    def save() -> str:
        """Save, and say what keeps it from being saved."""
        return _save(folder, model, optimizer, average, evaluated, progress, window, accelerator)

    status = Status(model_config.preset, accelerator.is_main_process)
    status.update(done())
    named: set[str] = set()  # pictures that could not be read
    stop.hold()
    while done() < 1.0:
        batches = EpochBatches(
            shapes, config.batch_size, config.seed, progress.epoch, progress.batch,
            accelerator.process_index, accelerator.num_processes, config.accumulate,
        )  # fmt: skip
        model.train()
        loaded = loader(train_set, config.seed, config.workers, batches, device.type == "cuda", config.on_broken)
        for waited, parts in timed(_or_save(steps(loaded, batches), folder, save)):
            begun = time.perf_counter()
            factor = lr_factor(config, progress.epoch, done())
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor
            # What a step draws (dropout) depends on its number and the process alone, not on how the run came to it.
            torch.manual_seed(hash((config.seed, progress.step, accelerator.process_index)) % 2**63)
            optimizer.zero_grad()
            losses, pictures = _backward(trained, set_loss, parts, accelerator, progress, folder)
            norm = accelerator.clip_grad_norm_(model.parameters(), config.clip) if config.clip else None
            optimizer.step()
            if average is not None:
                average.update_parameters(model)

            progress.step, progress.batch = progress.step + 1, progress.batch + 1
            broken = [message for part in parts for message in part.broken * part.counts]
            seconds, asked, skipped = processes.total(clock.seconds, stop.asked or 0, len(broken))
            progress.seconds = seconds / accelerator.num_processes  # one time for all: it says when to end
            if skipped:
                progress.broken += int(skipped)
                _name(folder, broken, named)
            took = time.perf_counter() - begun
            window.add(losses, norm, accelerator.optimizer_step_was_skipped, pictures, waited, took)
            status.update(done(), f"epoch {progress.epoch}, loss {losses['loss']:.2f}")
            if progress.step % config.log_every == 0:
                rate = optimizer.param_groups[-1]["lr"]
                line = window.line(progress.step, progress.epoch, progress.seconds, rate, device)
                _log(folder, line | ({"broken_pictures": progress.broken} if progress.broken else {}), accelerator)
                window = Window()
            if time.monotonic() - saved > 60 * config.checkpoint_minutes:
                _save_or_go_on(folder, save)
                saved = time.monotonic()
            if asked:
                status.close()
                _stop(folder, save(), progress)  # who is asked to stop stops all
            if done() >= 1.0 and progress.batch < steps_per_epoch:
                break  # in the middle of an epoch; one that has ended is counted below
        else:
            ends = config.evaluate_every and (progress.epoch + 1) % config.evaluate_every == 0 and done() < 1.0
            if ends:  # saved as the last step of its epoch: whoever goes on from here evaluates again
                _save_or_go_on(folder, save)
                saved = time.monotonic()
            progress.epoch, progress.batch = progress.epoch + 1, 0
            if ends:
                with stop.at_once(_where(folder, progress, "while evaluating ")):
                    _evaluate(folder, evaluated, val_set, "val", progress, accelerator, config.workers)
    status.close()

    if progress.batch == steps_per_epoch:  # as it was saved after the last step of the run
        progress.epoch, progress.batch = progress.epoch + 1, 0
    progress.seconds = clock.seconds
    _save_the_end(folder, save)
    with stop.at_once(_where(folder, progress, "while evaluating ")):
        _evaluate(folder, evaluated, val_set, "val", progress, accelerator, config.workers)
        if config.evaluate_train:
            plain = make_transform(model_config.augment, model_config.image_size, train=False)
            train_set.transform = plain
            _evaluate(folder, evaluated, train_set, "train", progress, accelerator, config.workers)
    _save_the_end(folder, save)
    if accelerator.is_main_process:
        from regolite.inspect import draw_run  # here, so that nobody else waits for matplotlib

        with stop.at_once(_where(folder, progress, "while drawing the figures ")):
            draw_run(folder.path, evaluated, {"val": val_set, "train": train_set})
    accelerator.unwrap_model(trained, keep_fp32_wrapper=False)  # a model that was given is given back as it was
    keep(model)
    accelerator.end_training()
    if isinstance(folder.watch, TensorBoard):
        folder.watch.close()
    folder.close()
    return folder.path


def _is_to_launch(config: RunConfig, watch: object, model: object) -> bool:
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


def _accelerator(config: RunConfig) -> Accelerator:
    if config.device not in ("auto", "cpu", "cuda", "mps"):
        raise UserError(f"unknown device {config.device!r}; choose auto, cpu, cuda or mps")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device='cuda', but PyTorch sees no CUDA GPU; use device='auto'")
    if config.device == "mps" and not torch.backends.mps.is_available():
        raise UserError("device='mps', but PyTorch sees no Apple GPU; use device='auto'")
    AcceleratorState._reset_state(reset_partial_state=True)  # or the next run in a notebook had to be like the first
    try:
        together = DistributedDataParallelKwargs(gradient_as_bucket_view=True)  # no second copy of the gradient
        accelerator = Accelerator(
            cpu=config.device == "cpu", mixed_precision=config.precision, kwargs_handlers=[together]
        )
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
    transform, strict = make_transform(augment, size, train=True), config.on_broken == "stop"
    train_set = open_data(config.data, "train", transform, config.limit_images, check_files=strict)
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


def _backward(
    trained: nn.Module,
    set_loss: SetLoss,
    parts: list[Part],
    accelerator: Accelerator,
    progress: Progress,
    folder: RunFolder,
) -> tuple[dict[str, float], float]:
    """The gradient of a batch, done by all processes and each of them in parts.

    Every part's loss is divided by the objects of the whole batch, so that losses and gradients sum up to the batch's.

    Returns:
        The loss and its terms by name, and the number of pictures, all of the whole batch.
    """
    whole = processes.total(sum(part.objects for part in parts), sum(part.pictures for part in parts))
    sums: Counter[str] = Counter()
    for part in parts:
        images = part.images.to(accelerator.device, non_blocking=True)
        targets = [target.to(accelerator.device, non_blocking=True) for target in part.targets]
        with nullcontext() if part is parts[-1] else accelerator.no_sync(trained):
            loss, numbers = _finite_loss(set_loss, trained(images), targets, whole, progress, folder)
            # Processes are given the mean of their gradients, and here the sum is wanted.
            accelerator.backward(loss * (part.counts * accelerator.num_processes))
        sums.update({name: part.counts * number for name, number in numbers.items()})
    return dict(zip(sums, processes.total(*sums.values()))), whole[1]


def _finite_loss(
    set_loss: SetLoss,
    output: DetectorOutput,
    targets: list[Target],
    whole: list[float],
    progress: Progress,
    folder: RunFolder,
) -> tuple[Tensor, dict[str, float]]:
    """The loss; it and its terms as numbers. Or one error that says what of it is not finite."""
    try:
        loss, terms = set_loss(output, targets, *whole)
        numbers = torch.stack([loss.detach(), *(term.detach() for term in terms.values())]).tolist()  # one transfer
        if math.isfinite(numbers[0]):
            return loss, dict(zip(["loss", *terms], numbers))
        bad = [name for name, number in zip(terms, numbers[1:]) if not math.isfinite(number)]
        message = (
            f"these terms of the loss are not finite: {', '.join(bad)}. Lower the learning rate, clip the gradient, "
            "or train without mixed precision"
        )
    except NonFinitePrediction as error:
        message = str(error)
    message = f"training stopped at step {progress.step}: {message}"
    folder.log.error(message)
    raise NonFiniteLoss(message)


def _folder(config: RunConfig, watch: Callable[[dict[str, Any]], None] | None, accelerator: Accelerator) -> RunFolder:
    """The folder of the run; only the first process writes there, but what goes wrong."""
    folder = RunFolder(config.output, config.resume, watch, config.keep_checkpoints)
    if accelerator.is_main_process:
        folder.clean()
    else:
        folder.log.setLevel("ERROR")
    accelerator.wait_for_everyone()  # or the others would find a run that the first has begun
    return folder


def _announce(
    folder: RunFolder,
    config: RunConfig,
    model: nn.Module,
    data: DetectionDataset,
    at: Progress,
    accelerator: Accelerator,
) -> None:
    count = sum(p.numel() for p in model.parameters())
    folder.log.info(
        "%s %s (%.2f M parameters) on %d pictures of %s, seed %d, PyTorch %s",
        "going on with" if at.step else "training", config.model, count / 1e6, len(data), config.data, config.seed,
        torch.__version__,
    )  # fmt: skip
    folder.log.info(
        "%d pictures a step, learning rate %g: %d processes on %s, each with %d parts of %d pictures, precision %s",
        config.batch_size, config.lr, accelerator.num_processes, accelerator.device.type, config.accumulate,
        config.batch_size // (accelerator.num_processes * config.accumulate), config.precision,
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
    workers: int = 0,
) -> None:
    if progress.evaluated.get(split) == progress.step:
        return
    progress.evaluated[split] = progress.step
    figures = evaluate(model, dataset, batch_size=8, workers=workers)
    if not accelerator.is_main_process:
        return
    where = {"kind": "evaluation", "split": split, "step": progress.step, "epoch": progress.epoch}
    folder.write_metrics({**where, "seconds": progress.seconds, **figures})
    by_stage = ", ".join(f"{s['AP'] or 0.0:.1f}" for s in figures["stages"])
    folder.log.info("step %d AP on %s by stage: %s", progress.step, split, by_stage)
    Status.say(f"step {progress.step}, AP on {split} by stage, the base detector first: {by_stage}")
    if split == "val" and (figures["AP"] or 0.0) > progress.best:
        try:
            save_model(model, folder.path / "best.safetensors")
            folder.keep_best(progress.step)
            progress.best = figures["AP"] or 0.0
        except OSError as error:
            folder.warn(f"the best weights so far cannot be written ({error.strerror}): free some space")


def _save(
    folder: RunFolder,
    model: nn.Module,
    optimizer: Any,
    average: AveragedModel | None,
    evaluated: nn.Module,
    progress: Progress,
    window: Window,
    accelerator: Accelerator,
) -> str:
    """Write a checkpoint, or say what keeps it from being written; the older ones stay, and the run can go on."""
    if not accelerator.is_main_process:
        return ""
    bad = [name for name, value in model.state_dict().items() if not torch.isfinite(value).all()]
    if bad:  # the loss was finite and its gradient was not: the next step would say so, but too late for the checkpoint
        message = (
            f"training stopped at step {progress.step}: {len(bad)} weights are not finite ({bad[0]}, ...). Lower "
            "the learning rate, clip the gradient, or train without mixed precision"
        )
        folder.log.error(message)
        raise NonFiniteLoss(message)
    state = {
        **vars(progress),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "average": average.state_dict() if average is not None else None,
        "window": window.state(),
        "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
    }
    try:
        folder.save_state(state)
        save_model(evaluated, folder.path / "model.safetensors")
    except OSError as error:
        last = folder.last_step()
        kept = "there is no checkpoint yet" if last is None else f"the checkpoint of step {last} is kept"
        what = "model.safetensors" if last == progress.step else f"step {progress.step}"
        return f"{what} cannot be saved ({error.strerror}), {kept}"
    return ""


def _or_save(items: Iterator[T], folder: RunFolder, save: Callable[[], str]) -> Iterator[T]:
    """The items; where one cannot be had, a broken picture say, what is done is saved before the error passes."""
    try:
        yield from items
    except Exception:
        _save_or_go_on(folder, save)
        raise


def _save_or_go_on(folder: RunFolder, save: Callable[[], str]) -> None:
    """Save; where that fails the run goes on, since there may be space the next time."""
    if problem := save():
        folder.warn(f"{problem}: free some space at {folder.path}. The run goes on")


def _save_the_end(folder: RunFolder, save: Callable[[], str]) -> None:
    """Save what the run was for; without it the run has failed."""
    if problem := save():
        raise UserError(f"the run ends, and {problem}: free some space at {folder.path} and resume it")


def _where(folder: RunFolder, progress: Progress, doing: str = "") -> str:
    """Where a run stands that is saved."""
    return f"{doing}after step {progress.step}, which is saved in {folder.path}"


def _stop(folder: RunFolder, problem: str, progress: Progress) -> NoReturn:
    """End the run, as somebody has asked for."""
    stop.so_far = f"after step {progress.step}: {problem}" if problem else _where(folder, progress)
    folder.log.info("stopped %s", stop.so_far)
    folder.close()
    stop.leave()


def _name(folder: RunFolder, messages: list[str], named: set[str]) -> None:
    """Name pictures that could not be read, each one once."""
    for message in chain.from_iterable(processes.gather(messages)):
        if message not in named:
            named.add(message)
            folder.warn(f"{message}. Another takes its place")


def _check_categories(folder: RunFolder, config: RunConfig, model: ModelConfig) -> None:
    """A class head of the right size would take any categories."""
    before = folder.read_config().get("model", {}).get("category_ids")
    if before is not None and tuple(before) != model.category_ids:
        raise UserError(
            f"{folder.path} holds a run on other categories than those of {config.data}: go on with the data that it "
            "was begun with, or give another output folder"
        )


def _restore(
    folder: RunFolder,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: AveragedModel | None,
    accelerator: Accelerator,
) -> tuple[Progress, Window]:
    state = folder.load_state()
    if state is None:
        return Progress(), Window()
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
    if accelerator.scaler is not None and state.get("scaler"):
        accelerator.scaler.load_state_dict(state["scaler"])
    progress = Progress(**{name: state[name] for name in vars(Progress()) if name in state})
    return progress, Window(**state.get("window", {}))


class _Clock:
    """Seconds of the run, those of earlier sessions included."""

    def __init__(self, before: float) -> None:
        self._start = time.monotonic() - before

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start
