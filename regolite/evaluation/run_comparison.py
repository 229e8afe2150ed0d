"""Comparison of training runs: results, training cost and differences in settings, read from their folders.

A run is read from its ``config.json`` and ``metrics.jsonl`` (:mod:`regolite.training.folder`), without weights. If the
last line is incomplete, since the run was killed or is still writing, it is left out and reported in :attr:`Run.notes`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from regolite.errors import UserError
from regolite.models.config import ModelConfig
from regolite.models.presets import build
from regolite.utils.validation import Checked, from_values

AXES = ("epochs", "hours", "images")
"""Measures of training cost."""


@dataclass(frozen=True)
class Point:
    """A measured value with the training cost up to that evaluation.

    Attributes:
        value: the figure, in percent; nan if it could not be computed.
        step: optimizer steps.
        epochs: epochs, fractional within an epoch.
        hours: wall time of the run, evaluations included.
        images: images seen. For runs of earlier versions, steps times batch size, although the last step of an epoch
            may have had fewer images.
    """

    value: float
    step: int
    epochs: float
    hours: float
    images: int


@dataclass(frozen=True)
class Run:
    """A training run, read from its folder.

    Attributes:
        folder: the folder.
        label: its name in tables and figures.
        config: the fields of its :class:`~regolite.training.RunConfig`.
        model: the fields of its :class:`~regolite.models.config.ModelConfig`.
        training: the log lines of training steps.
        evaluations: the log lines of evaluations, all splits.
        notes: defects of its files that could be tolerated.
    """

    folder: Path
    label: str
    config: Mapping[str, Any]
    model: Mapping[str, Any]
    training: tuple[Mapping[str, Any], ...]
    evaluations: tuple[Mapping[str, Any], ...]
    notes: tuple[str, ...] = ()

    @staticmethod
    def read(folder: str | Path, label: str | None = None) -> Run:
        """Read a run.

        Args:
            folder: the folder of the run.
            label: its name; the folder's by default.

        Raises:
            UserError: the folder holds no run, or a file is damaged.
        """
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            there = "has no config.json" if folder.is_dir() else "does not exist"
            raise UserError(f"{folder} is not the folder of a run, it {there}; give the output folder of a training")
        try:
            stored = json.loads((folder / "config.json").read_text("utf-8"))
            config, model = dict(stored["run"]), dict(stored["model"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{folder / 'config.json'} is damaged ({error!r}); copy it again") from error
        lines, notes = _read_lines(folder / "metrics.jsonl")
        by_kind = {kind: tuple(line for line in lines if line["kind"] == kind) for kind in ("train", "evaluation")}
        label = label or folder.resolve().name
        return Run(folder, label, config, model, by_kind["train"], by_kind["evaluation"], notes)

    @property
    def preset(self) -> str:
        """The preset of the model."""
        return str(self.config.get("model", self.model.get("preset")))

    @cached_property
    def parameters(self) -> int | None:
        """Number of parameters, or None if the configuration is from an incompatible version of regolite."""
        try:
            config = ModelConfig.from_dict(dict(self.model)).without_pretrained()
            with torch.device("meta"):  # shapes without data: nothing is allocated
                return sum(p.numel() for p in build(config).parameters())
        except (KeyError, TypeError, ValueError, AttributeError):
            return None

    @property
    def hours(self) -> float:
        """Wall time of the run up to its last line."""
        return max((float(line["seconds"]) for line in self._lines), default=0.0) / 3600

    @property
    def steps_per_epoch(self) -> int | None:
        """Optimizer steps per epoch, or None before the end of the first one."""
        # During epoch e, e * steps < step <= (e + 1) * steps; the evaluation after it has equality.
        bounds = [line["step"] // line["epoch"] for line in self._lines if line["epoch"] > 0]
        return min(bounds) if bounds else None

    @property
    def epochs(self) -> float:
        """Completed epochs, fractional within an epoch."""
        return max((self.epochs_at(line) for line in self._lines), default=0.0)

    @property
    def drops(self) -> tuple[int, ...]:
        """The epochs after which the step schedule reduced the learning rate."""
        if self.config.get("schedule") != "step":
            return ()
        return tuple(drop for drop in self.config["drop_epochs"] if 0 < drop < self.epochs)

    def epochs_at(self, line: Mapping[str, Any]) -> float:
        """Completed epochs when a line was written."""
        per_epoch = self.steps_per_epoch
        return line["step"] / per_epoch if per_epoch else float(line["epoch"])

    def stages(self, split: str = "val") -> int:
        """Number of evaluated REGO stages."""
        return min(len(line["stages"]) for line in self._measured(split)) - 1

    def points(self, metric: str = "AP", stage: int | None = None, split: str = "val") -> list[Point]:
        """A figure over the course of training.

        Args:
            metric: AP, AP50, AP75, APs, APm or APl.
            stage: the stage, 0 for the base detector; the last by default.
            split: the evaluated images, ``val`` or ``train``.

        Raises:
            UserError: the run has no evaluation on the split, or fewer stages.
        """
        lines, last = self._measured(split), self.stages(split)
        if stage is not None and not 0 <= stage <= last:
            has = f"stages 0 to {last}" if last else "only stage 0, the base detector"
            raise UserError(f"stage={stage}: the run {self.label!r} has {has}; leave stage out for each run's last one")
        where = last if stage is None else stage
        return [self._point(line, line["stages"][where][metric]) for line in lines]

    def curve(
        self, x: str, metric: str = "AP", stage: int | None = None, split: str = "val"
    ) -> tuple[list[float], list[float]]:
        """The figure as two lists: training cost (one of :data:`AXES`) and values."""
        points = self.points(metric, stage, split)
        return [float(getattr(point, x)) for point in points], [point.value for point in points]

    def best(self, metric: str = "AP", stage: int | None = None, split: str = "val") -> Point:
        """The evaluation with the highest value, the first one if there is a tie."""
        points = self.points(metric, stage, split)
        return max(points, key=lambda point: -math.inf if math.isnan(point.value) else point.value)

    def reaches(self, value: float, metric: str = "AP", stage: int | None = None, split: str = "val") -> Point | None:
        """The first evaluation with at least this value, or None."""
        return next((point for point in self.points(metric, stage, split) if point.value >= value), None)

    def losses(self, decoder: str, term: str, smoothing: int = 1) -> tuple[list[float], list[float]]:
        """A loss term of a decoder's last layer over the course of training.

        Args:
            decoder: ``base`` or ``stage1``, ``stage2``, ...
            term: ``label``, ``l1`` or ``giou``.
            smoothing: window of a trailing moving average, in lines; 1 for no smoothing.

        Returns:
            Epochs and values; empty if the run has no such term.
        """
        lines = [line for line in self.training if f"{decoder}/{term}" in line["terms"]]
        values = [float(line["terms"][f"{decoder}/{term}"]) for line in lines]
        means = [float(np.mean(values[max(0, n + 1 - smoothing) : n + 1])) for n in range(len(values))]
        return [self.epochs_at(line) for line in lines], means

    @property
    def _lines(self) -> tuple[Mapping[str, Any], ...]:
        return self.training + self.evaluations

    def _measured(self, split: str) -> list[Mapping[str, Any]]:
        lines = [line for line in self.evaluations if line["split"] == split]
        if not lines:
            what = "validation" if split == "val" else "training"
            raise UserError(
                f"the run {self.label!r} ({self.folder}) has no evaluation on the {what} images; let it train on to "
                "its first one, or leave it out"
            )
        return lines

    def _point(self, line: Mapping[str, Any], value: float | None) -> Point:
        images = line.get("images_seen", line["step"] * int(self.config["batch_size"]))
        value = math.nan if value is None else float(value)
        return Point(value, line["step"], self.epochs_at(line), line["seconds"] / 3600, images)


@dataclass(frozen=True)
class Comparison(Checked):
    """Runs and figure of a comparison: the parameters of notebook 22."""

    runs: tuple[str, ...] = field(metadata={"help": "folders of runs"})
    labels: tuple[str, ...] = field(default=(), metadata={"help": "their names; those of the folders by default"})
    base: str | None = field(default=None, metadata={"help": "label of the run to compare with; the first by default"})
    metric: Literal["AP", "AP50", "AP75", "APs", "APm", "APl"] = field(default="AP", metadata={"help": "which figure"})
    stage: int | None = field(default=None, metadata={"help": "which stage, 0 the base detector; each run's last"})
    split: Literal["val", "train"] = field(default="val", metadata={"help": "on which images"})
    smoothing: int = field(default=1, metadata={"help": "lines of metrics whose mean is drawn in curves of the loss"})

    def __post_init__(self) -> None:
        """Check the values, one by one."""
        super().__post_init__()
        if not self.runs:
            raise UserError("runs is empty; give the folders of at least one run")
        if self.labels and len(self.labels) != len(self.runs):
            raise UserError(f"{len(self.labels)} labels for {len(self.runs)} runs; give one for each, or none at all")
        if self.smoothing < 1:
            raise UserError(f"smoothing={self.smoothing} must be at least 1")

    @staticmethod
    def of(values: Mapping[str, Any]) -> Comparison:
        """Build a comparison from names and values; lists become tuples.

        Raises:
            UserError: an unknown name (the message suggests the closest match) or a value of the wrong type.
        """
        return from_values(Comparison, dict(values))

    @property
    def figure(self) -> dict[str, Any]:
        """The compared figure, as keyword arguments of the methods of :class:`Run`."""
        return {"metric": self.metric, "stage": self.stage, "split": self.split}

    def read(self) -> list[Run]:
        """Read the runs, the base of the comparison first.

        Raises:
            UserError: a run cannot be read or lacks the evaluation or stage, or ``base`` is not a label.
        """
        labels = self.labels or tuple(Path(folder).resolve().name for folder in self.runs)
        if len(set(labels)) < len(labels):
            raise UserError(f"two runs have the same name ({', '.join(labels)}); give labels that differ")
        if self.base is not None and self.base not in labels:
            raise UserError(f"base={self.base!r} is none of the runs; choose from {', '.join(labels)}")
        runs = [Run.read(folder, label) for folder, label in zip(self.runs, labels)]
        for run in runs:
            run.points(**self.figure)  # raises now, not in the middle of a plot
        return sorted(runs, key=lambda run: run.label != (self.base or labels[0]))


# ------------------------------------------------------------------------------------------------------ in tables


def rows(runs: Sequence[Run], metric: str = "AP", stage: int | None = None, split: str = "val") -> list[dict[str, Any]]:
    """The runs as JSON content, one dictionary per run.

    ``best`` is the highest value of the chosen stage, chosen on the very images on which it is measured, and
    ``by_stage`` the values of all stages at that evaluation. ``last`` is the value of the last weights, which is what
    papers publish.
    ``reaches`` is the first evaluation at which a run reaches the first run's best value, with the ratios of training
    cost: an ``epochs_ratio`` of 0.72 means 28% fewer epochs, the "acceleration" of the paper's section 5.2. It is None
    if the value is not reached.

    Args:
        runs: the runs, the base of the comparison first.
        metric: AP, AP50, AP75, APs, APm or APl.
        stage: the stage; each run's last by default.
        split: the evaluated images.
    """
    goal = runs[0].best(metric, stage, split)
    table = []
    for run in runs:
        best, there = run.best(metric, stage, split), run.reaches(goal.value, metric, stage, split)
        by_stage = [run.points(metric, i, split) for i in range(run.stages(split) + 1)]
        at = [point.step for point in by_stage[0]].index(best.step)
        table.append(
            {
                "label": run.label,
                "folder": str(run.folder),
                "preset": run.preset,
                "parameters": run.parameters,
                "epochs": run.epochs,
                "batch_size": run.config["batch_size"],
                "lr": run.config["lr"],
                "hours": run.hours,
                "best": _json(best),
                "last": _json(run.points(metric, stage, split)[-1]),
                "by_stage": [_number(points[at].value) for points in by_stage],
                "reaches": None if there is None else _json(there) | _ratios(there, goal),
                "notes": list(run.notes),
            }
        )
    return table


def as_text(table: Sequence[Mapping[str, Any]], metric: str = "AP") -> str:
    """Format the result of :func:`rows` as two text tables: the runs, and the cost of reaching the first run's best."""
    unit, per_hour = time_unit(max(row["hours"] for row in table))
    wide = max(len(row["label"]) for row in table)
    model = max(len(row["preset"]) for row in table)
    head = f"{'run':{wide}}  {'model':{model}}  {'M param.':>8} {'epochs':>7} {'batch':>6} {'lr':>8} {unit:>8}"
    lines = [f"{head}   last  best {metric}, by stage"]
    for row in table:
        parameters = "-" if row["parameters"] is None else f"{row['parameters'] / 1e6:.2f}"
        stages = " ".join("-" if value is None else f"{value:.1f}" for value in row["by_stage"])
        lines.append(
            f"{row['label']:{wide}}  {row['preset']:{model}}  {parameters:>8} {row['epochs']:>7.4g} "
            f"{row['batch_size']:>6} {row['lr']:>8.0e} {row['hours'] * per_hour:>8.1f}  "
            f"{_text(row['last']['value']):>5}  {stages}"
        )
    goal = table[0]["best"]
    lines += [
        f"last: {metric} of the last weights, as papers publish it; best: chosen by {metric} on the evaluated images",
        "",
        f"to reach {metric} {_text(goal['value'])}, the best of {table[0]['label']} (share: of what that took)",
    ]
    lines.append(f"{'run':{wide}}  {'epochs':>7} {'share':>6}  {unit:>8} {'share':>6}  {'images':>10} {'share':>6}")
    for row in table:
        there = row["reaches"]
        if there is None:
            lines.append(f"{row['label']:{wide}}  not reached, best {_text(row['best']['value'])}")
            continue
        shares = {axis: _percent(there[f"{axis}_ratio"]) for axis in AXES}
        lines.append(
            f"{row['label']:{wide}}  {there['epochs']:>7.4g} {shares['epochs']:>6}  "
            f"{there['hours'] * per_hour:>8.1f} {shares['hours']:>6}  {there['images']:>10,} {shares['images']:>6}"
        )
    return "\n".join(lines)


def differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    """The settings in which runs differ: the value of each run as text, by setting.

    Settings of the model have the prefix ``model.``. A missing setting is ``-``. The output folder and the ``resume``
    option are ignored.
    """
    ignored = {"output", "resume", "model.preset"}
    settings = [{**run.config, "model.": run.model} for run in runs]
    found: dict[str, list[str]] = {}

    def collect(name: str, values: Sequence[Any]) -> None:
        if all(isinstance(value, Mapping) for value in values):
            for key in dict.fromkeys(key for value in values for key in value):
                inner = f"{name}{key}" if not name or name.endswith(".") else f"{name}.{key}"
                collect(inner, [value.get(key, _MISSING) for value in values])
        elif name not in ignored and any(value != values[0] for value in values):
            found[name] = [_setting(value) for value in values]

    collect("", settings)
    return found


def differences_as_text(runs: Sequence[Run]) -> str:
    """Format the result of :func:`differences` as a text table."""
    found = {"": [run.label for run in runs], **differences(runs)}
    if len(found) == 1:
        return "the runs have the same settings"
    columns = [list(found), *map(list, zip(*found.values()))]
    wide = [max(map(len, column)) for column in columns]
    return "\n".join("  ".join(f"{c:{w}}" for c, w in zip(cells, wide)).rstrip() for cells in zip(*columns))


def summary(table: Sequence[Mapping[str, Any]], metric: str = "AP") -> str:
    """Summarize the result of :func:`rows` in sentences."""
    unit, per_hour = time_unit(max(row["hours"] for row in table))
    base, *others = table
    lines = [
        f"{base['label']}: best {metric} {_text(base['best']['value'])} after {base['best']['epochs']:.4g} of "
        f"{base['epochs']:.4g} epochs and {base['best']['hours'] * per_hour:.1f} {unit}."
    ]
    goal = base["best"]["value"]
    for row in others:
        best, there = row["best"], row["reaches"]
        line = f"{row['label']}: best {metric} {_text(best['value'])} after {best['epochs']:.4g} of "
        line += f"{row['epochs']:.4g} epochs"
        if goal is not None and best["value"] is not None:
            gain = round(best["value"], 1) - round(goal, 1)  # the difference of what is written
            more = "as much as" if round(gain, 1) == 0 else f"{abs(gain):.1f} {'more' if gain > 0 else 'less'} than"
            line += f", {more} {base['label']}"
        if there is None:
            line += f". It does not reach {base['label']}'s {_text(goal)}."
        else:
            line += (
                f". It reaches {_text(goal)} after {there['epochs']:.4g} epochs: "
                f"{_change(there['epochs_ratio'], 'fewer')} epochs, {_change(there['hours_ratio'], 'less')} time."
            )
        lines.append(line)
    return "\n".join(lines + [note for row in table for note in row["notes"]])


def time_unit(hours: float) -> tuple[str, float]:
    """The time unit and its number per hour: minutes for runs of less than two hours."""
    return ("hours", 1.0) if hours >= 2 else ("minutes", 60.0)


# ------------------------------------------------------------------------------------------------------- details

_MISSING = object()


def _read_lines(path: Path) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    """The lines of ``metrics.jsonl``, and a note if the last one is incomplete."""
    if not path.is_file():
        raise UserError(f"{path} does not exist: the run has not logged anything yet; let it train on, or leave it out")
    texts = path.read_text("utf-8", errors="replace").splitlines()
    lines = []
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
            if line["kind"] in ("train", "evaluation"):  # a later version may write more
                lines.append(line | {"step": int(line["step"]), "epoch": int(line["epoch"])})
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            if number < len(texts):
                raise UserError(
                    f"line {number} of {path} is damaged; delete that line, or copy the file again"
                ) from error
            return lines, (f"{path}: the last line (line {number}) is cut off and left out.",)
    return lines, ()


def _json(point: Point) -> dict[str, Any]:
    return {**vars(point), "value": _number(point.value)}


def _number(value: float) -> float | None:
    """A JSON value: None for nan."""
    return None if math.isnan(value) else value


def _ratios(point: Point, other: Point) -> dict[str, float | None]:
    """The ratios of training cost of two points."""
    pairs = {f"{axis}_ratio": (getattr(point, axis), getattr(other, axis)) for axis in AXES}
    return {name: a / b if b else None for name, (a, b) in pairs.items()}


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _percent(ratio: float | None) -> str:
    return "-" if ratio is None else f"{100 * ratio:.0f}%"


def _change(ratio: float | None, less: str) -> str:
    """A ratio as text: ``28% fewer``."""
    percent = round(100 * ((ratio or 1.0) - 1))
    return "the same" if percent == 0 else f"{abs(percent)}% {'more' if percent > 0 else less}"


def _setting(value: Any) -> str:
    """A setting as text; a group of settings is abbreviated to its first one."""
    if value is _MISSING:
        return "-"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={_setting(inner)}" for key, inner in list(value.items())[:1])
    if isinstance(value, (list, tuple)):
        return " ".join(map(_setting, value)) or "none"
    if isinstance(value, float):
        return f"{value:g}"
    words = {None: "none", True: "yes", False: "no"}
    return words[value] if value is None or isinstance(value, bool) else str(value)
