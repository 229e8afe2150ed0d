"""The training loop: one for the notebook, the command line, one device and many.

Read :func:`train` from top to bottom. What belongs to distribution, mixed precision and devices is Accelerate's.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from regolite.checkpoint import save_model
from regolite.data import DetectionDataset, make_transform
from regolite.errors import UserError
from regolite.evaluation import evaluate
from regolite.loading import load_weights
from regolite.losses import OwnLoss, SetLoss
from regolite.matching import NonFinitePrediction
from regolite.models.config import ModelConfig, class_head_names, config_of
from regolite.models.detector import Detector
from regolite.models.presets import build
from regolite.training.activation_checkpointing import checkpoint_activations, keep_all_activations
from regolite.training.batches import EpochBatches, Part, loader, steps
from regolite.training.config import RunConfig
from regolite.training.folder import RunFolder, only_writer
from regolite.training.kernels import fastest_kernels
from regolite.training.launch import launch
from regolite.training.metrics import Meter, TensorBoard, timed
from regolite.training.resume import describe_run
from regolite.training.schedule import lr_factor, make_optimizer
from regolite.training.setup import is_to_launch, make_accelerator, more_objects_than_queries, prepare_data, resampled
from regolite.training.state import State
from regolite.types import Target
from regolite.utils import distributed
from regolite.utils.interrupts import stop
from regolite.utils.modes import modes_kept
from regolite.utils.progress import Status
from regolite.utils.seeds import STEP, derive_seed
from regolite.utils.validation import of_kind, shown


@stop
def train(
    config: RunConfig, watch: Callable[[dict[str, Any]], None] | None = None, model: Detector | None = None
) -> Path:
    """Train a model.

    Args:
        config: what to train, on what, and how.
        watch: called with every line of metrics when it is written; what it raises ends the run.
        model: train this detector, in place, and not a new one of the preset ``config.model``. It must carry its
            ``model_config`` (as those of :func:`regolite.load` and :func:`regolite.interop.adapt`, and REGO on them)
            and have as many classes as the data, whose names it takes over. To go on with its run, give it again: the
            weights of the checkpoint are loaded into it.

    Returns:
        The folder of the run, see :mod:`regolite.training.folder`.

    Raises:
        UserError: when something in the configuration can't be had, when the run to resume is another one
            (:mod:`regolite.training.resume`), or when another process writes to its folder.
        NonFiniteLoss: when the loss stops being a number; the last checkpoint stays.
        RunStopped: after Ctrl-C, SIGTERM, SIGHUP or SIGUSR1; the step is finished and saved, see
            :mod:`regolite.utils.interrupts`.
    """
    of_kind("config", config, RunConfig, "a RunConfig: write RunConfig(...), or RunConfig.of({...})")
    if not config.output.strip():
        raise UserError(f"output={config.output!r} is no folder: give output")
    if watch is not None and not callable(watch):
        raise UserError(f"watch={shown(watch)} is not a function: give one that takes a line of metrics")
    if model is not None:
        of_kind("model", model, Detector, "a Detector: regolite.build, regolite.load and interop.adapt return one")
    if is_to_launch(config, watch, model):
        return launch(config)
    accelerator = make_accelerator(config, model is not None and model.has_unused_parameters)
    train_set, val_set, model_config = prepare_data(config, model)
    shown_set = resampled(config, train_set)
    config = replace(config, model=model_config.preset)
    if config.tensorboard and accelerator.is_main_process:
        watch = TensorBoard(Path(config.output) / "tensorboard", watch)
    with only_writer(config.output), nullcontext() if model is None else modes_kept(model):
        folder = _folder(config, watch, accelerator)
        return _train(config, model_config, model, folder, accelerator, train_set, shown_set, val_set)


class _Clock:
    """Seconds of the run by one of Python's clocks, those of earlier sessions included."""

    def __init__(self, before: float, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._start = now, now() - before

    @property
    def seconds(self) -> float:
        return self._now() - self._start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens meanwhile does not count."""
        begun = self._now()
        yield
        self._start += self._now() - begun


@dataclass
class TrainingRun:
    """The state of a run between steps.

    Attributes:
        config: its configuration.
        state: what a checkpoint saves: the model, its optimizer, its moving average, its progress.
        trained: the model as Accelerate has prepared it.
        criterion: the loss.
        train_set: the training images.
        shown_set: the same, with images of rare classes repeated.
        val_set: the validation images.
        clock: seconds of wall time, pauses excluded.
        cpu_clock: seconds of CPU time, pauses excluded.
        status: the progress bar.
        broken: messages about images that could not be read.
        saved: time of the last checkpoint.
    """

    config: RunConfig
    state: State
    trained: nn.Module
    criterion: SetLoss | OwnLoss
    train_set: DetectionDataset
    shown_set: DetectionDataset
    val_set: DetectionDataset
    clock: _Clock
    cpu_clock: _Clock
    status: Status
    broken: set[str] = field(default_factory=set)
    saved: float = field(default_factory=time.monotonic)

    @cached_property
    def aspect_ratios(self) -> Float[Tensor, "N"]:
        """Height by width of each training image: a batch holds images of similar shapes."""
        sizes = torch.tensor([self.shown_set.size(i) for i in range(len(self.shown_set))], dtype=torch.float32)
        return sizes[:, 0] / sizes[:, 1]

    @cached_property
    def steps_per_epoch(self) -> int:
        """Number of batches in an epoch; the last one may be smaller."""
        return math.ceil(len(self.shown_set) / self.config.batch_size)

    @property
    def done(self) -> float:
        """The share of the run that is done, by steps or by time, whichever is more; the same in every process."""
        config, progress = self.config, self.state.progress
        by_step = progress.step / (config.epochs * self.steps_per_epoch)
        by_time = progress.seconds / (60 * config.max_minutes) if config.max_minutes else 0.0
        by_cpu_time = progress.cpu_seconds / (60 * config.max_cpu_minutes) if config.max_cpu_minutes else 0.0
        return min(1.0, max(by_step, by_time, by_cpu_time))

    @property
    def is_over(self) -> bool:
        """Whether the run is done, or has not improved for ``patience`` evaluations."""
        return self.done >= 1.0 or bool(self.config.patience and self.state.progress.stale >= self.config.patience)

    def save(self) -> None:
        """Write a checkpoint; a disk that is full for a while does not end the run."""
        self.state.save_or_go_on()
        self.saved = time.monotonic()


def _train(
    config: RunConfig,
    model_config: ModelConfig,
    model: Detector | None,
    folder: RunFolder,
    accelerator: Accelerator,
    train_set: DetectionDataset,
    shown_set: DetectionDataset,
    val_set: DetectionDataset,
) -> Path:
    """Train with all that :func:`train` has prepared; no other process writes to the folder."""
    set_seed(config.seed)
    model = _model(config, model_config, model, accelerator.device, folder)
    fused = True if accelerator.device.type == "cuda" else None  # one kernel for all weights
    optimizer = make_optimizer(model, config, fused)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema)) if config.ema else None
    described = describe_run(config, model_config, train_set, val_set)
    state = State(folder, model, optimizer, average, accelerator, described)
    if config.resume:
        state.restore()
    progress = state.progress
    if accelerator.is_main_process:
        folder.write_config({"run": described["run"], "model": described["model"]})
        _announce(config, state, len(shown_set))
        if said := more_objects_than_queries(model_config, train_set):
            folder.warn(said)

    if config.activation_checkpointing:
        checkpoint_activations(model)
    trained, state.optimizer = accelerator.prepare(model, optimizer)
    clock, cpu_clock = _Clock(progress.seconds), _Clock(progress.cpu_seconds, time.process_time)
    status, criterion = Status(model_config.preset, accelerator.is_main_process), model.criterion(model_config.loss)
    run = TrainingRun(config, state, trained, criterion, train_set, shown_set, val_set, clock, cpu_clock, status)

    if config.evaluate_start and progress.step == 0:
        with cpu_clock.paused():
            _evaluate(state, val_set, "val", config, run.broken)
    status.update(run.done)
    stop.hold()
    while not run.is_over:
        train_epoch(run)
    status.close()
    return _finish(run)


def train_epoch(run: TrainingRun) -> None:
    """Train for an epoch, from the batch after the last one on, or until the time of the run is over."""
    config, state, progress, accelerator = run.config, run.state, run.state.progress, run.state.accelerator
    batches = EpochBatches(
        run.aspect_ratios, config.batch_size, config.seed, progress.epoch, progress.batch,
        accelerator.process_index, accelerator.num_processes, config.accumulate,
    )  # fmt: skip
    pinned = accelerator.device.type == "cuda"
    loaded = loader(run.shown_set, config.seed, config.workers, batches, pinned, config.on_broken)
    state.model.train()
    for waited, parts in timed(state.items_saved_before_errors(steps(loaded, batches))):
        begun = time.perf_counter()
        losses, images, norm = train_step(run, parts)
        progress.step, progress.batch = progress.step + 1, progress.batch + 1
        progress.images += round(images)
        asked = _share(run, parts)
        took = time.perf_counter() - begun
        state.meter.add(losses, norm, accelerator.optimizer_step_was_skipped, images, waited, took)
        run.status.update(run.done, f"epoch {progress.epoch}, loss {losses['loss']:.2f}")
        if progress.step % config.log_every == 0:
            _log(state, state.optimizer.param_groups[-1]["lr"])
        if time.monotonic() - run.saved > 60 * config.checkpoint_minutes:
            run.save()
        if asked:  # a signal that one process has received stops all of them
            run.status.close()
            state.save_and_leave()
        if run.done >= 1.0 and progress.batch < run.steps_per_epoch:
            return  # in the middle of the epoch

    evaluates = config.evaluate_every and (progress.epoch + 1) % config.evaluate_every == 0 and run.done < 1.0
    if evaluates:  # saved as the last step of its epoch: a run that resumes here evaluates again
        run.save()
    progress.epoch, progress.batch = progress.epoch + 1, 0
    if evaluates:
        with stop.at_once(state.where("while evaluating ")), run.cpu_clock.paused():
            _evaluate(state, run.val_set, "val", config, run.broken)


def train_step(run: TrainingRun, parts: list[Part]) -> tuple[dict[str, float], float, Tensor | None]:
    """One step of the optimizer.

    Args:
        run: the run.
        parts: this process's share of the batch.

    Returns:
        The loss and its terms by name and the number of images, both of the whole batch, and the norm of the gradient
        if it is clipped.
    """
    config, state, accelerator = run.config, run.state, run.state.accelerator
    factor = lr_factor(config, state.progress.epoch, run.done)
    for group in state.optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    # Dropout and noise depend on the number of the step and the process alone, not on where the run was resumed.
    torch.manual_seed(derive_seed(config.seed, STEP, state.progress.step, accelerator.process_index))
    state.optimizer.zero_grad()
    with fastest_kernels(accelerator.device), state.saved_before_errors():
        losses, images = _backward(run.trained, run.criterion, parts, state)
    norm = accelerator.clip_grad_norm_(state.model.parameters(), config.clip) if config.clip else None
    state.optimizer.step()
    if state.average is not None:
        state.average.update_parameters(state.model)
    return losses, images, norm


def _share(run: TrainingRun, parts: list[Part]) -> int:
    """Share times, signals and broken images among the processes after a step; returns the signal, 0 for none."""
    progress, count = run.state.progress, run.state.accelerator.num_processes
    broken = [message for part in parts for message in part.broken * part.counts]
    totals = distributed.total(run.clock.seconds, run.cpu_clock.seconds, stop.asked or 0, len(broken))
    seconds, cpu_seconds, asked, skipped = totals
    progress.seconds, progress.cpu_seconds = seconds / count, cpu_seconds / count  # all processes end together
    if skipped:
        progress.broken += int(skipped)
        _name(run.state.folder, broken, run.broken)
    return int(asked)


def _finish(run: TrainingRun) -> Path:
    """Save, evaluate and draw what the run has come to; returns its folder."""
    config, state, progress, folder = run.config, run.state, run.state.progress, run.state.folder
    if run.done < 1.0 and state.accelerator.is_main_process:
        why = f"stopped early after step {progress.step}: no better AP on val in {progress.stale} evaluations"
        folder.log.info(why)
        Status.say(why)
    if progress.batch == run.steps_per_epoch:  # as it was saved after the last step of the run
        progress.epoch, progress.batch = progress.epoch + 1, 0
    progress.seconds = run.clock.seconds
    state.save_the_end()
    with stop.at_once(state.where("while evaluating ")):
        _evaluate(state, run.val_set, "val", config, run.broken)
        if config.evaluate_train:
            recipe = config_of(state.model)
            run.train_set.transform = make_transform(recipe.augment, recipe.image_size, train=False)
            _evaluate(state, run.train_set, "train", config, run.broken)
    state.save_the_end()
    if state.accelerator.is_main_process:
        with stop.at_once(state.where("while drawing the figures ")):
            _draw(state, {"val": run.val_set, "train": run.train_set})
    # A model that was given is given back as it was.
    state.accelerator.unwrap_model(run.trained, keep_fp32_wrapper=False)
    keep_all_activations(state.model)
    state.accelerator.end_training()
    if isinstance(folder.watch, TensorBoard):
        folder.watch.close()
    folder.close()
    return folder.path


def _folder(config: RunConfig, watch: Callable[[dict[str, Any]], None] | None, accelerator: Accelerator) -> RunFolder:
    """The folder of the run; only the first process writes there, but what goes wrong."""
    folder = RunFolder(config.output, config.resume, watch, config.keep_checkpoints)
    if accelerator.is_main_process:
        folder.clean()
    else:
        folder.log.setLevel("ERROR")
    accelerator.wait_for_everyone()  # or the others would find a run that the first has begun
    return folder


def _model(
    config: RunConfig, model_config: ModelConfig, given: Detector | None, device: torch.device, folder: RunFolder
) -> Detector:
    """The model to train, with the weights that it starts from."""
    model = build(model_config) if given is None else given
    model.model_config = model_config
    model.to(device)
    if config.checkpoint is not None and not (config.resume and folder.last_step()):
        anew = load_weights(model, config.checkpoint, new_classes=True, new_stages=True)
        heads = class_head_names(anew)
        what = ["classes that it does not name"] * bool(heads) + ["all of REGO"] * (len(anew) > len(heads))
        if what:
            folder.log.info("weights are those of %s, but these start anew: %s", config.checkpoint, ", ".join(what))
    if device.type in ("cpu", "cuda"):
        model.to(memory_format=torch.channels_last)
    return model


def _announce(config: RunConfig, state: State, images: int) -> None:
    accelerator, log, progress = state.accelerator, state.folder.log, state.progress
    so_far = f"going on after step {progress.step} ({progress.images} images seen) with"
    log.info(
        "%s %s (%.2f M parameters) on %d images of %s, seed %d, PyTorch %s",
        so_far if progress.step else "training", config.model,
        sum(p.numel() for p in state.model.parameters()) / 1e6, images, config.data, config.seed, torch.__version__,
    )  # fmt: skip
    log.info(
        "%d images a step, learning rate %g: %d processes on %s, each with %d parts of %d images, precision %s",
        config.batch_size, config.lr, accelerator.num_processes, accelerator.device.type, config.accumulate,
        config.batch_size // (accelerator.num_processes * config.accumulate), config.precision,
    )  # fmt: skip


def _backward(
    trained: nn.Module, criterion: SetLoss | OwnLoss, parts: list[Part], state: State
) -> tuple[dict[str, float], float]:
    """The gradient of a batch, done by all processes and each of them in parts.

    Every part's loss is divided by the objects of the whole batch, so that losses and gradients sum up to the batch's.

    Returns:
        The loss and its terms by name, and the number of images, all of the whole batch.
    """
    accelerator = state.accelerator
    whole = distributed.total(sum(part.num_objects for part in parts), sum(part.num_images for part in parts))
    sums: Counter[str] = Counter()
    for part in parts:
        images = part.images.to(accelerator.device, non_blocking=True)
        targets = [target.to(accelerator.device, non_blocking=True) for target in part.targets]
        with nullcontext() if part is parts[-1] else accelerator.no_sync(trained):
            output = trained(images, targets=targets) if state.model.takes_targets else trained(images)
            loss, numbers = _finite_loss(criterion, output, targets, whole, state)
            # Processes are given the mean of their gradients, and here the sum is wanted.
            accelerator.backward(loss * (part.counts * accelerator.num_processes))
        sums.update({name: part.counts * number for name, number in numbers.items()})
    return dict(zip(sums, distributed.total(*sums.values()))), whole[1]


def _finite_loss(
    criterion: SetLoss | OwnLoss, output: Any, targets: list[Target], whole: list[float], state: State
) -> tuple[Tensor, dict[str, float]]:
    """The loss; it and its terms as numbers. Or one error that says what of it is not finite."""
    try:
        loss, terms = criterion(output, targets, *whole)
    except NonFinitePrediction as error:
        state.fail(str(error))
    numbers = torch.stack([loss.detach(), *(term.detach() for term in terms.values())]).tolist()  # one transfer
    if not math.isfinite(numbers[0]):
        bad = [name for name, number in zip(terms, numbers[1:]) if not math.isfinite(number)]
        state.fail(
            f"these terms of the loss are not finite: {', '.join(bad)}. Lower the learning rate, clip the gradient, "
            "or train without mixed precision"
        )
    return loss, dict(zip(["loss", *terms], numbers))


def _log(state: State, lr: float) -> None:
    progress = state.progress
    line = state.meter.line(progress.step, progress.epoch, progress.seconds, lr, state.accelerator.device)
    state.meter = Meter()
    if not state.accelerator.is_main_process:
        return
    line["images_seen"] = progress.images  # unlike steps, comparable between batch sizes
    state.folder.write_metrics(line | ({"broken_images": progress.broken} if progress.broken else {}))
    state.folder.log.info(
        "step %d epoch %d images %d loss %.3f lr %.2e %.1f images/s",
        *(line[k] for k in ("step", "epoch", "images_seen", "loss", "lr", "images_per_second")),
    )


def _name(folder: RunFolder, messages: list[str], named: set[str]) -> None:
    """Name images that could not be read, each one once."""
    for message in chain.from_iterable(distributed.gather(messages)):
        if message not in named:
            named.add(message)
            folder.warn(f"{message}. Another takes its place")


def _evaluate(state: State, dataset: DetectionDataset, split: str, config: RunConfig, named: set[str]) -> None:
    progress = state.progress
    if progress.evaluated.get(split) == progress.step:
        return
    is_first = split not in progress.evaluated
    progress.evaluated[split] = progress.step
    figures = evaluate(state.evaluated, dataset, batch_size=8, workers=config.workers, on_broken=config.on_broken)
    if broken := figures.pop("broken", []):
        figures["broken_images"] = len(broken)
        if not named.issuperset(broken):
            named.update(broken)
            said = f"{len(broken)} of {len(dataset)} images of {split} are left out when it is evaluated: {broken[0]}"
            state.folder.warn(said + "; ..." * (len(broken) > 1))
    if state.accelerator.is_main_process:
        _write_figures(state, figures, split, is_first)
    progress.best, progress.stale = distributed.from_first((progress.best, progress.stale))


def _write_figures(state: State, figures: dict[str, Any], split: str, is_first: bool) -> None:
    """Write what an evaluation has found, and keep the weights if they are the best so far."""
    progress, folder = state.progress, state.folder
    where = {"kind": "evaluation", "split": split, "step": progress.step, "epoch": progress.epoch}
    spent = {"seconds": progress.seconds, "cpu_seconds": progress.cpu_seconds, "images_seen": progress.images}
    folder.write_metrics({**where, **spent, **figures})
    by_stage = ", ".join("-" if s["AP"] is None else f"{s['AP']:.1f}" for s in figures["stages"])
    folder.log.info("step %d images %d AP on %s by stage: %s", progress.step, progress.images, split, by_stage)
    Status.say(f"step {progress.step}, AP on {split} by stage, the base detector first: {by_stage}")
    if split != "val":
        return
    if figures["AP"] is None:
        if is_first:
            folder.warn("AP on val cannot be measured, since no object there counts: there is no best.safetensors")
        return
    if figures["AP"] <= progress.best:
        progress.stale += 1
        return
    progress.stale = 0
    try:
        save_model(state.evaluated, folder.path / "best.safetensors")
        folder.keep_best(progress.step)
        progress.best = figures["AP"]
    except OSError as error:
        folder.warn(f"the best weights so far cannot be written ({error.strerror}): free some space")


def _draw(state: State, datasets: dict[str, DetectionDataset]) -> None:
    """Draw what the run has come to; it is done, whatever becomes of its figures."""
    try:
        from regolite.plots.run import draw_run  # here, so that nobody else waits for matplotlib

        draw_run(state.folder.path, state.evaluated, datasets)
    except Exception as error:  # whatever fonts, names and disks make of it
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        state.folder.warn(f"the run is done, and its figures cannot be drawn ({reason})")
