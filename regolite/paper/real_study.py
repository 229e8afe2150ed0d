"""The study on real images: does REGO help converged detectors, and where does it fail?

Chapter 14 asks the paper's questions on scenes of 96 pixels, far from convergence. This study asks them again on
photographs of playing cards (``cards``, 248 to train on) and of everyday objects (``everyday``, a fifth of 5,582). It
follows base detector and REGO until their AP stops rising (``converged_...``), and varies the size of objects
(``objects_...``). Rule, margins and predictions were written down before the first result, in
``experiments/real_images.md``.

- **Fair.** The learning rate is tuned for the base detector alone (arms ``tune_...``), on validation images, with a
  seed that is not used again; REGO uses it too. DETR* is tuned separately.
- **Equal budgets.** Arms train for the same epochs. Two base detectors take as long as REGO in CPU seconds: one with
  eight decoder layers, whose step costs as much, and one with 1.4 times the epochs.
- **Test images** are measured once, by the run that was trained. Tuning measures validation images only. ``everyday``
  has no test split: the even images of its validation split are for tuning, the odd ones for testing.
- **Intervals** are over seeds and images (:mod:`regolite.paper.statistics`): every run keeps AP on the same bootstrap
  samples of the test images.

Runs are ordered by what decides most (:data:`BLOCKS`), so that the study can be stopped at any time.
"""

from __future__ import annotations

import hashlib
import math
import subprocess
import textwrap
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from regolite.data import DetectionDataset, open_data
from regolite.data.coco import find_annotations
from regolite.data.views import OfImages
from regolite.errors import UserError, did_you_mean
from regolite.evaluation.bootstrap import bootstrap
from regolite.evaluation.coco import detect_all, measure
from regolite.evaluation.object_size import EDGES, ap_by_relative_size
from regolite.loading import load
from regolite.paper import queue, runner
from regolite.paper.experiments import SIZES, Claim, Side
from regolite.paper.statistics import (
    LEARNED,
    Estimate,
    Results,
    Verdict,
    by_seed,
    judge_family,
    read_results,
)
from regolite.training import RunConfig

DRAWS = 100
"""Bootstrap samples of the test images that every run keeps."""

TUNING_SEED = 100
RATES: dict[Literal["base", "star"], tuple[float, ...]] = {"base": (1e-3, 5e-4, 2e-3), "star": (1e-4, 3e-4)}
"""Learning rates that are tried, by base detector."""

LONGER = 1.4
"""CPU seconds of a training step with REGO, in those of the base detector, measured side by side."""

# -------------------------------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Setting:
    """Data, protocol and length of the trainings.

    Attributes:
        about: description in one line.
        data: data of :func:`regolite.data.open_data`; ``{root}`` stands for the folder of :attr:`source`.
        epochs: epochs of an arm.
        minutes: CPU minutes of the base detector's run on one core, estimated.
        source: name of a data set that the caller has, if any.
        recipe: further fields of :class:`regolite.RunConfig`.
        laptop: the small detectors of chapter 14 instead of those for photographs.
        test: the images that are measured in the end.
        limit: number of test images, if they are scenes.
    """

    about: str
    data: str
    epochs: int
    minutes: float
    source: str | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    laptop: bool = False
    test: Literal["test", "odd val"] = "test"
    limit: int | None = None


_COMMON: dict[str, Any] = {
    "backbone_lr_mult": 0.1,
    "sampling_lr_mult": 1.0,
    "clip": 0.1,
    "augment": "laptop",
    "evaluate_every": 0,
    "log_every": 50,
    "checkpoint_minutes": 5.0,
    "keep_checkpoints": 1,
    "device": "cpu",
}
_PHOTOGRAPHS = {"batch_size": 8, "image_size": 256}
_SCENES = {"batch_size": 4, "image_size": 96, "lr": 1e-3}
_CURVE = {"schedule": "constant", "ema": 0.99}
"""A constant rate and a moving average of the weights: every point of the curve is a detector one could stop at."""


def _objects(percent: int, scale: float) -> Setting:
    """Scenes whose objects have this median extent."""
    about = f"scenes of 256 pixels, objects of {percent} % of the image's side"
    data = f"scenes:512:val=100:size=256:context=0:max_objects=3:scale={scale}"
    recipe = {**_SCENES, "image_size": 256}
    return Setting(about, data, 12, 8.0, recipe=recipe, laptop=True, limit=300)


SETTINGS: dict[str, Setting] = {
    "cards": Setting("playing cards", "{root}", 40, 15.0, "cards", _PHOTOGRAPHS),
    "everyday": Setting("everyday objects", "{root}:every=5", 12, 21.0, "everyday", _PHOTOGRAPHS, test="odd val"),
    "converged_cards": Setting(
        "playing cards, until AP stops rising", "{root}", 120, 48.0, "cards",
        {**_PHOTOGRAPHS, **_CURVE, "evaluate_every": 5},
    ),
    "converged_scenes": Setting(
        "chapter 14's scenes, until AP stops rising", "scenes:512:val=200:size=96:max_objects=6", 80, 17.0,
        recipe={**_SCENES, **_CURVE, "evaluate_every": 4}, laptop=True, limit=500,
    ),
    "objects_05": _objects(5, 0.21),
    "objects_10": _objects(10, 0.43),
    "objects_20": _objects(20, 0.86),
    "objects_40": _objects(40, 1.72),
}  # fmt: skip
"""All settings by name."""


@dataclass(frozen=True)
class Arm:
    """One way to train one detector.

    Attributes:
        about: description in one line.
        base: the base detector, whose tuned learning rate is used.
        rego: whether REGO is on it.
        overrides: overrides of the preset.
        longer: factor of the epochs.
        cost: CPU time of a step in that of the base detector, estimated.
        lr: the learning rate of a tuning run, which is measured on validation images only.
    """

    about: str
    base: Literal["base", "star"] = "base"
    rego: bool = True
    overrides: tuple[str, ...] = ()
    longer: float = 1.0
    cost: float = LONGER
    lr: float | None = None


_PAPER = ("alphas=3.0,2.0,1.0", "stage_matching=own")  # as in the paper, in place of the everyday preset's own
_STAR_LENGTH = 4.0

ARMS: dict[str, Arm] = {
    "base": Arm("Deformable DETR", rego=False, cost=1.0),
    "rego": Arm("REGO, 3 stages"),
    "base_longer": Arm("Deformable DETR, as long as REGO", rego=False, longer=LONGER, cost=1.0),
    "base_8_layers": Arm("Deformable DETR, 5 more layers", rego=False, overrides=("detector.decoder_layers=8",)),
    "rego_1_stage": Arm("REGO, 1 stage", overrides=("stages=1", "alphas=1.0,"), cost=1.1),
    "rego_2_stages": Arm("REGO, 2 stages", overrides=("stages=2", "alphas=2.0,1.0"), cost=1.25),
    "rego_4_stages": Arm("REGO, 4 stages", overrides=("stages=4", "alphas=4.0,3.0,2.0,1.0"), cost=1.5),
    "rego_alpha_1": Arm("REGO, alpha 1, 1, 1", overrides=("alphas=1.0,1.0,1.0",)),
    "rego_scale_1.5": Arm("REGO, glimpses 1.5 times as large", overrides=("alphas=4.5,3.0,1.5",)),
    "rego_scale_2": Arm("REGO, glimpses twice as large", overrides=("alphas=6.0,4.0,2.0",)),
    "rego_detached": Arm("REGO, no gradient into H_dec(i-1)", overrides=("detach_hidden=True",)),
    "rego_released": Arm("REGO in the form of the released code", overrides=("form=released",)),
    "star": Arm("DETR*, 4 times as long", "star", False, longer=_STAR_LENGTH, cost=0.35),
    "rego_star": Arm("REGO on DETR*, 4 times as long", "star", longer=_STAR_LENGTH, cost=0.65),
    **{
        f"tune_{base}_{rate:g}": Arm(
            f"{'DETR*' if base == 'star' else 'Deformable DETR'}, learning rate {rate:g}", base, False,
            longer=_STAR_LENGTH if base == "star" else 1.0, cost=0.35 if base == "star" else 1.0, lr=rate,
        )
        for base, rates in RATES.items()
        for rate in rates
    },
}  # fmt: skip
"""All arms by name."""

FIVE, THREE = (0, 1, 2, 3, 4), (0, 1, 2)
_TUNE = tuple(f"tune_base_{rate:g}" for rate in RATES["base"])
_TUNE_STAR = tuple(f"tune_star_{rate:g}" for rate in RATES["star"])
_SOME = ("rego_alpha_1", "rego_1_stage", "rego_2_stages")
_REST = ("base_8_layers", "rego_scale_1.5", "rego_scale_2", "rego_4_stages", "rego_detached", "rego_released")
_GLIMPSES = ("rego", "rego_alpha_1")

BLOCKS: tuple[tuple[str, tuple[str, ...], tuple[int, ...]], ...] = (
    ("cards", _TUNE, (TUNING_SEED,)),
    ("cards", ("base", "rego"), FIVE),
    ("cards", ("base_longer",), FIVE),
    ("cards", _SOME, THREE),
    ("converged_scenes", ("base", "rego"), THREE),
    ("converged_cards", ("base", "rego"), THREE),
    ("everyday", _TUNE, (TUNING_SEED,)),
    ("everyday", ("base", "rego"), FIVE),
    ("everyday", ("base_longer",), FIVE),
    ("objects_40", _GLIMPSES, THREE),
    ("objects_10", _GLIMPSES, THREE),
    ("everyday", _SOME, THREE),
    ("cards", _REST, THREE),
    ("objects_20", _GLIMPSES, THREE),
    ("objects_05", _GLIMPSES, THREE),
    ("everyday", _REST, THREE),
    ("cards", _TUNE_STAR, (TUNING_SEED,)),
    ("cards", ("star", "rego_star"), THREE),
    ("everyday", _TUNE_STAR, (TUNING_SEED,)),
    ("everyday", ("star", "rego_star"), THREE),
)
"""Settings, arms and seeds in the order of the queue: what decides most comes first, and arms of a block alternate."""

_ALL = [(setting, arm) for setting, arms, _ in BLOCKS for arm in arms]

CLAIMS: tuple[Claim, ...] = (
    Claim("REGO ends higher after the same epochs.", "Table 1", Side("rego"), Side("base"), 2.1),
    Claim("After the same CPU time REGO is better.", "abstract, of epochs", Side("rego"), Side("base_longer")),
    Claim("Trained with REGO, the base detector alone is better.", "Table 4", Side("rego", 0), Side("base"), 1.1),
    Claim("REGO at inference adds to that.", "Table 4", Side("rego"), Side("rego", 0), 1.0),
    Claim("One stage helps.", "Table 2", Side("rego_1_stage"), Side("base"), 1.3),
    Claim("A second stage helps more.", "Table 2", Side("rego_2_stages"), Side("rego_1_stage"), 0.5),
    Claim("A third stage helps more.", "Table 2", Side("rego"), Side("rego_2_stages"), 0.3),
    Claim("Glimpses from coarse to fine beat alpha 1, 1, 1.", "section 5.3", Side("rego"), Side("rego_alpha_1"), 0.6),
    Claim("REGO is better than five more layers.", "section 5.2, of backbones", Side("rego"), Side("base_8_layers")),
    Claim("A fourth stage hardly matters.", "Table 2", Side("rego_4_stages"), Side("rego"), 0.0, "same"),
    Claim("1.5 times as large hardly matters.", "Table 3", Side("rego"), Side("rego_scale_1.5"), 0.1, "same"),
    Claim("Twice as large hardly matters.", "Table 3", Side("rego"), Side("rego_scale_2"), 0.2, "same"),
    Claim("Gradients into H_dec(i-1) help.", "A.1", Side("rego"), Side("rego_detached")),
    Claim("The released form is as good.", "released code", Side("rego"), Side("rego_released"), None, "same"),
    Claim("REGO helps DETR*.", "Table 1", Side("rego_star"), Side("star"), 3.0),
)
"""The claims, a family for each data set; the converged runs answer the first one again."""


def settings(setting: str, arm: str, lr: float) -> dict[str, Any]:
    """Fields of :class:`regolite.RunConfig`, except data, seed and folder.

    Args:
        setting: name of the setting.
        arm: name of the arm.
        lr: the tuned learning rate; settings with a rate of their own ignore it.
    """
    where, one = SETTINGS[setting], ARMS[arm]
    own: tuple[str, ...]
    if one.base == "star":
        base, own = "detr_star_tiny", ("weights=bundled_coco",)
    elif where.laptop:
        base, own = "deformable_detr_tiny", SIZES
    else:
        base, own = "deformable_detr_everyday", ("detector.decoder_layers=3",)
    overrides = list(own)
    if one.rego:
        overrides += ["rego.ffn_dim=256"] if where.laptop else []
        overrides += _PAPER
    chosen = dict(word.split("=", 1) for word in (*overrides, *one.overrides))  # the arm's own override others
    epochs = round(where.epochs * one.longer)
    drop = {"schedule": "step", "drop_epochs": (round(epochs * 0.8),), "lr": one.lr or lr, "epochs": epochs}
    model = {"model": f"rego_{base}" if one.rego else base, "overrides": tuple("=".join(p) for p in chosen.items())}
    return {**_COMMON, **drop, **where.recipe, **model}


# ------------------------------------------------------------------------------------------------------------- runs


def plan(names: Sequence[str] | None = None, seeds: Sequence[int] | None = None) -> list[tuple[str, int]]:
    """The runs of the study in their order: pairs of ``SETTING/ARM`` and seed.

    Args:
        names: settings, or single arms as ``SETTING/ARM``; all by default. The tuning runs that they need are included.
        seeds: seeds instead of those of :data:`BLOCKS`.

    Raises:
        UserError: for an unknown name; the message suggests the closest one.
    """
    known = [*SETTINGS, *map("/".join, _ALL)]
    for name in names or ():
        if name not in known:
            raise UserError(f"the study on real images has no {name!r}; {did_you_mean(name, known)}")
    wanted = [pair for pair in _ALL if names is None or pair[0] in names or "/".join(pair) in names]
    needed = {(SETTINGS[setting].source, ARMS[arm].base) for setting, arm in wanted}
    pairs = []
    for setting, arms, usual in BLOCKS:
        tuning = usual == (TUNING_SEED,)
        chosen = [arm for arm in arms if (setting, arm) in wanted or (tuning and (setting, ARMS[arm].base) in needed)]
        ours = usual if seeds is None or tuning else tuple(dict.fromkeys(seeds))
        pairs += [(f"{setting}/{arm}", seed) for seed in ours for arm in chosen]
    return pairs


def tuned(setting: str, base: Literal["base", "star"], results: str | Path) -> float | None:
    """The learning rate of a base detector with the highest AP on validation images; None if runs are missing."""
    where = SETTINGS[setting]
    if "lr" in where.recipe:
        return float(where.recipe["lr"])
    folder = Path(results) / (where.source or setting)
    arms = [f"tune_{base}_{rate:g}" for rate in RATES[base]]
    if not all((folder / f"{arm}.json").exists() for arm in arms):
        return None
    found = read_results(folder, arms)
    return max(RATES[base], key=lambda rate: by_seed(found, Side(f"tune_{base}_{rate:g}"))[TUNING_SEED])


def conduct(
    data: Mapping[str, str],
    names: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    folder: str | Path = "runs/experiments/real",
    results: str | Path = "experiments/results/real",
    jobs: int = 1,
    small: bool = False,
) -> None:
    """Do the missing runs whose data are there, and write their results to ``SETTING/ARM.json``.

    Args:
        data: folders of the data sets by name; runs on others are left out.
        names: as in :func:`plan`.
        seeds: as in :func:`plan`.
        folder: folder of the runs.
        results: folder of the results.
        jobs: number of simultaneous runs, one core each.
        small: a few steps on a few images, as a smoke test.

    Raises:
        UserError: if a name is unknown or data are unusable (before any run starts); if runs failed, after the results
            of the others are written.
        RunStopped: after a signal; the progress of the current runs is saved.
    """
    for name in data:
        if name not in {where.source for where in SETTINGS.values()}:
            raise UserError(f"the study on real images has no data set {name!r}; give cards=DIR, everyday=DIR or both")
        for split in {"train", "val", *(w.test for w in SETTINGS.values() if w.source == name)} - {"odd val"}:
            open_data(data[name], split)

    def start(name: str, seed: int) -> subprocess.Popen[bytes]:
        setting, arm = name.split("/")
        lr = tuned(setting, ARMS[arm].base, results) or 0.0  # tuning runs have their own
        words = (name, str(seed), str(folder), data.get(SETTINGS[setting].source or "", ""), str(lr), str(int(small)))
        return queue.spawn(Path(folder) / name / str(seed), "regolite.paper.real_study", *words)

    there = [
        pair for pair in plan(names, seeds) if (source := SETTINGS[pair[0].split("/")[0]].source) in data or not source
    ]
    abouts = {name: ARMS[name.split("/")[1]].about for name, _ in there}
    while there:  # a tuning must be over before a run that uses its result starts
        tuning = there[0][1] == TUNING_SEED
        count = next((n for n, (_, seed) in enumerate(there) if (seed == TUNING_SEED) != tuning), len(there))
        queue.work(there[:count], abouts, start, folder, results, jobs)
        there = there[count:]


def run(name: str, seed: int, folder: str | Path, root: str, lr: float, small: bool = False) -> dict[str, Any]:
    """Train an arm in a setting with one seed, resume that training, or read its result.

    Args:
        name: ``SETTING/ARM``.
        seed: seed of the initial weights, the image order and the augmentation.
        folder: folder of all runs.
        root: folder of the data set; unused for scenes.
        lr: the tuned learning rate.
        small: a few steps on a few images.

    Returns:
        The content of ``result.json``: ``stages``, the figures by stage, with AP by relative object size
        (``by_size``); ``resampled``, AP on bootstrap samples of these images by stage; ``curve``, AP of the validation
        images by epoch with CPU seconds; ``cpu_seconds`` and ``seconds``; the configuration; ``code``, the commit.

    Raises:
        UserError: if the folder holds a run of another configuration.
        RunStopped: as :func:`regolite.train`.
    """
    setting, arm = name.split("/")
    where, place = SETTINGS[setting], Path(folder) / name / str(seed)
    own = {"data": where.data.format(root=root), "seed": seed, "output": str(place), "resume": True}
    config = RunConfig.of({**settings(setting, arm, lr), **own})
    if small:
        config = replace(config, epochs=1, drop_epochs=(1,), limit_images=4, batch_size=2, image_size=64)
    part = "even val" if ARMS[arm].lr else where.test
    code = runner.code_version()  # before training, during which the code may change
    splits = {"train", "val", part.rpartition(" ")[2]} if where.source else ()
    sums = {
        split: hashlib.sha256(find_annotations(Path(root), split).read_bytes()).hexdigest()[:16] for split in splits
    }

    def describe(config: RunConfig) -> dict[str, Any]:
        """As :func:`regolite.paper.runner.described`, without this machine's paths."""
        return {
            **runner.described(config),
            "data": where.data.format(root=where.source),
            "measured": part,
            "sha256": sums,
        }

    def measured(lines: list[dict[str, Any]]) -> dict[str, Any]:
        start = time.monotonic()
        limit = 4 if small else where.limit
        found = figures(load(place / "model.safetensors"), _images(config.data, part, limit), 5 if small else DRAWS)
        curve = {line["step"]: line for line in lines if line["kind"] == "evaluation" and line["split"] == "val"}
        seconds = {"training": max(line["seconds"] for line in lines), "measuring": time.monotonic() - start}
        return {
            "curve": [
                {
                    "epoch": line["epoch"], "step": step, "cpu_seconds": line["cpu_seconds"],
                    "AP": [stage["AP"] for stage in line["stages"]],
                }
                for step, line in sorted(curve.items())
            ],
            **found,
            "cpu_seconds": max(line["cpu_seconds"] for line in curve.values()),
            "seconds": seconds,
            "code": code,
        }  # fmt: skip

    return runner.once(config, describe, measured)


def figures(model: torch.nn.Module, images: DetectionDataset, draws: int = DRAWS) -> dict[str, Any]:
    """What a run keeps of its test images.

    Args:
        model: a trained detector.
        images: the images.
        draws: bootstrap samples of the images; the same for every model.
    """
    truth, by_stage = images.coco, detect_all(model, images, progress=False)
    stages = [
        {**{name: measure(truth, results).figures[name] for name in runner.FIGURES},
         "by_size": ap_by_relative_size(truth, results)}
        for results in by_stage
    ]  # fmt: skip
    drawn = bootstrap(truth, by_stage, draws, progress=False).ap
    resampled = {"images": len(images), "AP": np.round(drawn.T, 3).tolist()}
    return {"stages": stages, "objects": len(truth.getAnnIds()), "resampled": resampled}


def _images(data: str, part: str, limit: int | None) -> DetectionDataset:
    """The images that a run is measured on: a split, or the even or odd images of the validation split."""
    if part == "test":
        return open_data(data, "test", limit=limit)
    every = open_data(data, "val")
    return OfImages(every, list(range(part.startswith("odd"), len(every), 2))[:limit])


# ------------------------------------------------------------------------------------------------------ convergence

GAIN = 1.0
"""AP that a converged detector may still gain over the last fifth of its training."""


@dataclass(frozen=True)
class Convergence:
    """What the learning curves of base detector and REGO say.

    Attributes:
        gains: gain of AP over the last fifth of the training, by arm.
        lead: AP of REGO's last stage minus that of the base detector at the end, on validation images.
        epochs: epochs until the final AP of the base detector with the same seed, by arm; None if it was not reached
            with every seed.
        minutes: the same in CPU minutes.
        sooner: epochs of the base detector minus epochs of REGO; None as above.
    """

    gains: dict[str, Estimate]
    lead: Estimate
    epochs: dict[str, Estimate | None]
    minutes: dict[str, Estimate | None]
    sooner: Estimate | None

    @property
    def converged(self) -> bool:
        """Whether AP has stopped rising in both arms: no clear gain over the last fifth, and less than :data:`GAIN`."""
        return all(gain.bounded and gain.low <= 0 and gain.mean < GAIN for gain in self.gains.values())

    @property
    def answer(self) -> str:
        """Whether REGO accelerates, ends higher, or both."""
        faster = self.sooner is not None and self.sooner.low > 0
        higher = self.lead.low > 0
        if not self.converged:
            return "not converged: the lead may still change"
        words = {(True, True): "both", (True, False): "an acceleration", (False, True): "a higher end"}
        return words.get((faster, higher), "neither can be shown")


def convergence(results: Results) -> Convergence | None:
    """The convergence of ``base`` and ``rego``; None without a common seed.

    The final AP of the base detector is its mean over the last fifth of the curve, which is less noisy than one point.
    """
    arms = ("base", "rego")
    seeds = sorted(set.intersection(*(set(results.get(arm, {})) for arm in arms)))
    if not seeds:
        return None
    curves = {arm: [results[arm][seed]["curve"] for seed in seeds] for arm in arms}
    goals = [_tail(curve) for curve in curves["base"]]
    reached = {
        unit: {arm: [_reach(curve, goal, unit) for curve, goal in zip(curves[arm], goals)] for arm in arms}
        for unit in ("epoch", "cpu_seconds")
    }
    gains = {arm: Estimate.of([_gain(curve) for curve in curves[arm]]) for arm in arms}
    lead = Estimate.of([_tail(curve) - goal for curve, goal in zip(curves["rego"], goals)])

    def estimate(values: Sequence[float | None], unit: float = 1.0) -> Estimate | None:
        known = [value / unit for value in values if value is not None]
        return Estimate.of(known) if len(known) == len(values) else None

    pairs = zip(reached["epoch"]["base"], reached["epoch"]["rego"])
    sooner = estimate([None if a is None or b is None else a - b for a, b in pairs])
    return Convergence(
        gains,
        lead,
        {arm: estimate(reached["epoch"][arm]) for arm in arms},
        {arm: estimate(reached["cpu_seconds"][arm], 60.0) for arm in arms},
        sooner,
    )


def _last_fifth(curve: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The points of the last fifth of a training."""
    return [point for point in curve if point["epoch"] >= 0.8 * curve[-1]["epoch"]]


def _tail(curve: Sequence[Mapping[str, Any]]) -> float:
    """Mean AP of the last stage over the last fifth."""
    return float(np.mean([point["AP"][-1] for point in _last_fifth(curve)]))


def _gain(curve: Sequence[Mapping[str, Any]]) -> float:
    """Gain over the last fifth: the slope of a line through its points, times its length."""
    points = _last_fifth(curve)
    if len(points) < 2:
        return math.inf
    x, y = ([float(p["epoch"]) for p in points], [float(p["AP"][-1]) for p in points])
    gain = float(np.polyfit(x, y, 1)[0]) * (x[-1] - x[0])
    return round(gain, 9)  # what rounding leaves of a flat curve is no gain


def _reach(curve: Sequence[Mapping[str, Any]], goal: float, unit: str) -> float | None:
    """Where a curve from (0, 0) first reaches an AP, with straight lines between points; None if it never does."""
    x0, y0 = 0.0, 0.0
    for point in curve:
        x1, y1 = float(point[unit]), float(point["AP"][-1])
        if y1 >= goal:
            return x0 + (goal - y0) / (y1 - y0) * (x1 - x0) if y1 > y0 else x1
        x0, y0 = x1, y1
    return None


# ------------------------------------------------------------------------------------------------------- the report


def read(results: str | Path) -> dict[str, dict[str, dict[int, dict[str, Any]]]]:
    """The available results by setting, arm and seed; settings without results are left out."""
    folders = {name: Path(results) / name for name in SETTINGS}
    there = {name: [arm for arm in ARMS if (folder / f"{arm}.json").exists()] for name, folder in folders.items()}
    return {name: read_results(folders[name], arms) for name, arms in there.items() if arms}


def verdicts(found: Mapping[str, Results]) -> dict[str, list[Verdict]]:
    """The verdicts on :data:`CLAIMS` by data set; those of one data set are a family."""
    return {name: judge_family(CLAIMS, found.get(name, {})) for name in ("cards", "everyday")}


def sizes(found: Mapping[str, Results]) -> dict[int, Estimate | None]:
    """AP of REGO minus that of REGO with alpha 1, 1, 1, by object size in percent; None if not tested."""
    differences = {}
    for name, percent in ((name, int(name[-2:])) for name in SETTINGS if name.startswith("objects_")):
        ours, theirs = (by_seed(found.get(name, {}), Side(arm)) for arm in _GLIMPSES)
        common = ours.keys() & theirs.keys()
        learned = common and min(np.mean(list(ours.values())), np.mean(list(theirs.values()))) >= LEARNED
        differences[percent] = Estimate.of([ours[seed] - theirs[seed] for seed in sorted(common)]) if learned else None
    return differences


def crossing(differences: Mapping[int, Estimate | None]) -> float | None:
    """Object size, in percent, at which the difference changes its sign; None if it does not."""
    known = [(size, found.mean) for size, found in sorted(differences.items()) if found is not None]
    for (x0, y0), (x1, y1) in zip(known, known[1:]):
        if y0 * y1 < 0:
            return x0 + y0 / (y0 - y1) * (x1 - x0)
    return None


def report(found: Mapping[str, Results], results: str | Path) -> str:
    """All tables of the study, and what is missing of it."""
    blocks = [_claims_table(found)]
    for name in ("converged_scenes", "converged_cards"):
        if (one := convergence(found.get(name, {}))) is not None:
            blocks.append(_convergence_table(SETTINGS[name].about, one))
    blocks.append(_sizes_table(found))
    done = Counter(one["code"] for on_data in found.values() for by_arm in on_data.values() for one in by_arm.values())
    hours = sum(
        sum(one["seconds"].values()) for on_data in found.values() for runs in on_data.values() for one in runs.values()
    ) / 3600  # fmt: skip
    waiting = queue.missing(plan(), results)
    left = sum(minutes(name) for name, _ in waiting) / 60
    notes = f"{sum(done.values())} runs are done, {hours:.1f} hours of one core; {len(waiting)} are missing, about "
    notes += f"{left:.0f} hours. By version of the code: {', '.join(f'{c} ({n})' for c, n in done.items()) or 'none'}."
    return "\n\n".join([*blocks, textwrap.fill(notes, 110)])


def minutes(name: str) -> float:
    """Estimated CPU minutes of a run ``SETTING/ARM``, measuring included."""
    setting, arm = name.split("/")
    return SETTINGS[setting].minutes * ARMS[arm].cost * ARMS[arm].longer + 2


def _claims_table(found: Mapping[str, Results]) -> str:
    lines = [f"{'AP, ours minus theirs, with 95 % intervals and p by Holm':<52}" + f"{'paper':>7}   cards | everyday"]
    for row in zip(*verdicts(found).values()):
        claim = row[0].claim
        paper = "" if claim.paper is None else f"{claim.paper:+.1f}"
        lines.append(f"{claim.text:<52}{paper:>7}   {' | '.join(_cell(verdict) for verdict in row)}")
    return "\n".join(lines)


def _cell(verdict: Verdict) -> str:
    if verdict.difference is None:
        return "no runs yet"
    note = " (not tested)" if verdict.note.startswith("not tested") else ""
    return f"{verdict.difference}, n {len(verdict.seeds)}, p {verdict.adjusted:.2g}: {verdict.word}{note}"


def _convergence_table(about: str, one: Convergence) -> str:
    lines = [f"{about}: {'converged' if one.converged else 'not converged'}; REGO is {one.answer}"]
    for arm, name in (("base", "Deformable DETR"), ("rego", "REGO")):
        epochs, spent = one.epochs[arm], one.minutes[arm]
        when = f"{epochs} epochs, {spent} CPU minutes" if epochs and spent else "not with every seed"
        lines.append(f"  {name}: gain over the last fifth {one.gains[arm]}; the base detector's final AP after {when}")
    return "\n".join([*lines, f"  lead at the end: {one.lead} AP"])


def _sizes_table(found: Mapping[str, Results]) -> str:
    lines = ["alpha 3, 2, 1 minus alpha 1, 1, 1 by object size"]
    differences = sizes(found)
    for percent, one in differences.items():
        lines.append(f"  scenes, objects of {percent:2} % of the side: {one if one else 'no runs yet, or not learned'}")
    if (point := crossing(differences)) is not None:
        lines.append(f"  the sign changes at about {point:.0f} %")
    for name in ("cards", "everyday"):
        for n, (low, high) in enumerate(zip(EDGES, EDGES[1:])):
            pairs = [
                (ours["stages"][-1]["by_size"][n], theirs["stages"][-1]["by_size"][n])
                for seed, ours in found.get(name, {}).get("rego", {}).items()
                if (theirs := found[name].get("rego_alpha_1", {}).get(seed))
            ]
            known = [a - b for a, b in pairs if a is not None and b is not None]
            if known:
                lines.append(f"  {name}, objects of {100 * low:.0f} to {100 * high:.0f} %: {Estimate.of(known)}")
    return "\n".join(lines)


def _main(name: str, seed: str, folder: str, root: str, lr: str, small: str) -> None:
    """Main function of the processes of :func:`conduct`."""
    run(name, int(seed), folder, root, float(lr), bool(int(small)))


if __name__ == "__main__":
    queue.run_process(_main)
