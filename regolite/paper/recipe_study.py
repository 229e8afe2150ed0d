"""The recipe study: which changes of the training recipe help a laptop-size REGO on real images, at equal CPU time.

Every arm is the baseline with one change, trained on two data sets with two seeds. All runs train for the same CPU
time instead of the same number of epochs, because a laptop's budget is time: larger images must make up for fewer
steps. CPU time is that of the single-threaded training process, without evaluation and without waiting for other
processes. Processes on other cores still slow a run down through shared caches, so compare only runs with the same
``--jobs`` on the same machine.

The data sets are folders in COCO format that the caller names: ``cards`` (``regolite data cards``, 248 training images
of playing cards) and ``everyday`` (5,582 training images, the 20 classes of PASCAL VOC on images from COCO and VOC).
Of ``everyday`` every tenth training image is used, as the file lists all images from COCO before those from VOC. Runs
are evaluated on the whole validation split.

There is no arm with copy-paste augmentation (:mod:`regolite.data.paste`), which needs masks; neither data set has them.
"""

from __future__ import annotations

import hashlib
import math
import subprocess
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from regolite.data import open_data
from regolite.data.coco import find_annotations
from regolite.errors import UserError, did_you_mean
from regolite.models.backbone import BUNDLED
from regolite.paper import queue, runner
from regolite.paper.experiments import Side
from regolite.paper.statistics import Results, by_seed, read_results
from regolite.training import RunConfig

MODEL = "rego_deformable_detr_everyday"
"""Preset of the baseline."""

PROTOCOL: dict[str, Any] = {
    "model": MODEL,
    "max_cpu_minutes": 8.0,
    "epochs": 10_000,  # never reached: CPU time is the limit
    "batch_size": 8,
    "lr": 1e-3,
    "backbone_lr_mult": 0.1,
    "sampling_lr_mult": 1.0,
    "schedule": "one_cycle",
    "clip": 0.1,
    "augment": "laptop",
    "image_size": 256,
    "evaluate_every": 0,
    "log_every": 50,
    "checkpoint_minutes": 2.0,
    "keep_checkpoints": 1,
    "device": "cpu",
}
"""Fields of :class:`regolite.RunConfig` of the baseline, except its backbone weights."""

WEIGHTS = "bundled_coco"
"""Weights of the baseline's backbone, a MobileNetV2 trained on COCO."""

DATA = {"cards": 1, "everyday": 10}
"""The data sets, and the stride of the training images: with 10, every tenth is used."""

SEEDS = (0, 1)
BASELINE = "baseline"


@dataclass(frozen=True)
class Change:
    """One change to the baseline.

    Attributes:
        about: description in one line.
        recipe: changes to :data:`PROTOCOL`.
        overrides: overrides of the preset.
        weights: backbone weights; by default those of the baseline.
    """

    about: str
    recipe: dict[str, Any] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()
    weights: str | None = None

    def settings(self, weights: str = WEIGHTS) -> dict[str, Any]:
        """Fields of :class:`regolite.RunConfig`, except data, seed and folder."""
        overrides = (f"weights={self.weights or weights}", *self.overrides)
        return {**PROTOCOL, **self.recipe, "overrides": overrides}


ARMS: dict[str, Change] = {
    BASELINE: Change("baseline"),
    "own_matching": Change("stages matched independently, as in the paper", overrides=("stage_matching=own",)),
    "paper_alphas": Change("glimpses of 3, 2 and 1 boxes, as in the paper", overrides=("alphas=3.0,2.0,1.0",)),
    "no_denoising": Change("no denoising queries", overrides=("denoising=false",)),
    "no_tokens": Change("learned content of queries, proposals of one class", overrides=("token_queries=false",)),
    "plain": Change(
        "learned queries, one-stage, no refinement",
        overrides=("two_stage=false", "refine=false", "token_queries=false", "denoising=false"),
    ),
    "layers_3": Change("3 decoder layers in the base detector, not 1", overrides=("detector.decoder_layers=3",)),
    "imagenet": Change("backbone weights from ImageNet, not COCO", weights="bundled"),
    "lr_5e-4": Change("learning rate 5e-4", {"lr": 5e-4}),
    "size_320": Change("image size 320", {"image_size": 320}),
    "size_384": Change("image size 384", {"image_size": 384}),
    "ema": Change("moving average of the weights, decay 0.998", {"ema": 0.998}),
    "crop": Change("random crops", {"augment": "laptop_crop"}),
    "one_to_many": Change("4 proposals per object", overrides=("proposals_per_object=4",)),
    "queries_50": Change("50 queries", overrides=("queries=50",)),
    "frozen_0": Change("no frozen backbone stages", overrides=("frozen_stages=0",)),
    "backbone_lr_0.3": Change("backbone at 0.3 of the learning rate", {"backbone_lr_mult": 0.3}),
    "l1_2": Change("weight 2 of the L1 loss, not 5", overrides=("l1=2.0",)),
}
"""All arms by name, those with the largest expected effect first."""


# ------------------------------------------------------------------------------------------------------------ runs


def plan(
    arms: Sequence[str] | None = None, data: Iterable[str] = DATA, seeds: Sequence[int] | None = None
) -> list[tuple[str, int]]:
    """The runs of the study, seed by seed: pairs of ``DATA/ARM`` and seed.

    Args:
        arms: names of the arms; all by default.
        data: names of data sets.
        seeds: the seeds; by default :data:`SEEDS`.

    Raises:
        UserError: for an unknown arm or data set; the message suggests the closest one.
    """
    for kind, names, known in (("arm", arms or (), ARMS), ("data set", data, DATA)):
        for name in names:
            if name not in known:
                raise UserError(f"the recipe study has no {kind} {name!r}; {did_you_mean(name, known)}")
    chosen = [arm for arm in ARMS if arms is None or arm in arms]
    names = [name for name in DATA if name in data]
    every_seed = dict.fromkeys(SEEDS if seeds is None else seeds)
    return [(f"{name}/{arm}", seed) for seed in every_seed for arm in chosen for name in names]


def conduct(
    data: Mapping[str, str],
    weights: str = WEIGHTS,
    arms: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    folder: str | Path = "runs/experiments/recipe",
    results: str | Path = "experiments/results/recipe",
    jobs: int = 1,
    small: bool = False,
) -> None:
    """Do all missing runs and write their results to ``DATA/ARM.json`` in the folder of results.

    Args:
        data: folders of the data sets by name; only their runs are done. It may be empty if no run is missing.
        weights: weights of the baseline's backbone: a file, or a name of :data:`regolite.models.backbone.BUNDLED`.
        arms: names of the arms; all by default.
        seeds: the seeds; by default :data:`SEEDS`.
        folder: folder of the runs.
        results: folder of the results.
        jobs: number of simultaneous runs, one core each.
        small: train for a step or two, as a smoke test.

    Raises:
        UserError: if an arm is unknown, or data or weights are missing or unusable (before any run starts); if runs
            failed, after the results of the others are written.
        RunStopped: after a signal; the progress of the current runs is saved.
    """
    pairs = plan(arms, data or DATA, seeds)
    if missing := queue.missing(pairs, results):
        if not data:
            raise UserError(
                f"{len(missing)} runs of the recipe study are missing and need its data sets, folders in COCO format: "
                f"give --data {' '.join(f'{name}=DIR' for name in DATA)}"
            )
        if weights not in BUNDLED and not Path(weights).is_file():
            raise UserError(f"no backbone weights at {weights}; give --weights an existing file, or leave it out")
        for name in data:
            for split in ("train", "val"):
                open_data(_root(name, data), split)

    def start(name: str, seed: int) -> subprocess.Popen[bytes]:
        root = data[name.partition("/")[0]]
        words = (name, str(seed), str(folder), root, weights, str(int(small)))
        return queue.spawn(Path(folder) / name / str(seed), "regolite.paper.recipe_study", *words)

    abouts = {name: ARMS[name.partition("/")[2]].about for name, _ in pairs}
    queue.work(pairs, abouts, start, folder, results, jobs)


def run(
    name: str, seed: int, folder: str | Path, root: str | Path, weights: str = WEIGHTS, small: bool = False
) -> dict[str, Any]:
    """Train an arm on a data set with one seed, resume that training, or read its result.

    Args:
        name: ``DATA/ARM``.
        seed: seed of the initial weights, the image order and the augmentation.
        folder: folder of all runs.
        root: folder of the data set.
        weights: weights of the baseline's backbone.
        small: train for a step or two.

    Returns:
        The content of ``result.json``: ``stages``, the validation metrics by stage; ``steps``; ``images``, the number
        of training images seen, to within a batch; ``cpu_seconds`` and ``seconds`` of training; the configuration;
        ``code``, the code version.

    Raises:
        UserError: if the folder holds a run of another configuration.
        RunStopped: as :func:`regolite.train`.
    """
    data_name, _, arm = name.partition("/")
    settings = ARMS[arm].settings(weights)
    own = {"data": _root(data_name, {data_name: str(root)}), "seed": seed, "resume": True}
    config = RunConfig.of({**settings, **own, "output": str(Path(folder) / name / str(seed))})
    if small:
        config = replace(config, max_cpu_minutes=0.01)
    own_weights = ARMS[arm].weights or weights
    inputs = {split: find_annotations(Path(root), split) for split in ("train", "val")}
    inputs["weights"] = BUNDLED.get(own_weights, Path(own_weights))
    sums = {what: hashlib.sha256(file.read_bytes()).hexdigest()[:16] for what, file in inputs.items()}
    code = runner.code_version()  # before training, during which the code may change

    def describe(config: RunConfig) -> dict[str, Any]:
        """As :func:`regolite.paper.runner.described`, without this machine's paths."""
        about = runner.described(config)
        file, *others = about["overrides"]
        overrides = [f"weights={Path(file.removeprefix('weights=')).name}", *others]
        return {**about, "data": _root(data_name, {data_name: data_name}), "overrides": overrides, "sha256": sums}

    def measure(lines: list[dict[str, Any]]) -> dict[str, Any]:
        last = [line for line in lines if line["kind"] == "evaluation" and line["split"] == "val"][-1]
        count = len(open_data(config.data, "train", check_files=False))
        epochs, batches = divmod(last["step"], math.ceil(count / config.batch_size))
        return {
            "stages": [{figure: stage[figure] for figure in runner.FIGURES} for stage in last["stages"]],
            "steps": last["step"],
            "images": epochs * count + batches * config.batch_size,
            "cpu_seconds": last["cpu_seconds"],
            "seconds": {"training": last["seconds"]},
            "code": code,
        }

    return runner.once(config, describe, measure)


def _root(name: str, data: Mapping[str, str]) -> str:
    """The name of a data set for :func:`regolite.data.open_data`, with the stride of its training images."""
    return data[name] if DATA[name] == 1 else f"{data[name]}:every={DATA[name]}"


# -------------------------------------------------------------------------------------------------------- verdicts

Word = Literal["helps", "hurts", "no clear effect", "too few runs"]

FALSE_ALARMS = 0.08
"""False positive rate of :func:`judge` for a change without any effect, with two seeds on two data sets."""


def read(results: str | Path) -> dict[str, dict[str, dict[int, dict[str, Any]]]]:
    """The available results by data set, arm and seed; data sets without results are left out."""
    folders = {name: Path(results) / name for name in DATA}
    return {
        name: read_results(folder, list(ARMS))
        for name, folder in folders.items()
        if any((folder / f"{arm}.json").exists() for arm in ARMS)
    }


def differences(arm: str, results: Mapping[str, Results]) -> dict[str, dict[int, float]]:
    """AP of an arm's last stage minus that of the baseline with the same seed, by data set and seed."""
    found = {}
    for name, on_data in results.items():
        ours, base = (by_seed(on_data, Side(one)) for one in (arm, BASELINE))
        found[name] = {seed: ours[seed] - base[seed] for seed in ours if seed in base}
    return found


def spreads(results: Mapping[str, Results]) -> dict[str, float]:
    """The range of the baseline's AP over its seeds, by data set; data sets with one seed are left out."""
    values = {name: list(by_seed(on_data, Side(BASELINE)).values()) for name, on_data in results.items()}
    return {name: max(aps) - min(aps) for name, aps in values.items() if len(aps) > 1}


def judge(arm: str, results: Mapping[str, Results]) -> Word:
    """Whether a change helps.

    It ``helps`` if its differences to the baseline, one for each data set and seed, are all above 0 and their mean is
    greater than the spread between the baseline's seeds (mean over the data sets). It ``hurts`` if the same holds with
    the opposite sign. Otherwise it has ``no clear effect``. With fewer than two seeds on a data set there are ``too few
    runs`` for a verdict.

    Two seeds are weak evidence. For a change without effect and normal noise of equal variance, the false positive rate
    is 8 % (:data:`FALSE_ALARMS`; a test simulates it), and these errors are correlated, since all arms share the same
    baseline runs. An effect of one standard deviation between seeds is missed in three of four cases.
    """
    found, spread = differences(arm, results), spreads(results)
    if not found or spread.keys() != found.keys() or any(len(by_seed) < 2 for by_seed in found.values()):
        return "too few runs"
    values = [value for by_seed in found.values() for value in by_seed.values()]
    mean = float(np.mean([np.mean(list(by_seed.values())) for by_seed in found.values()]))
    if abs(mean) <= float(np.mean(list(spread.values()))) or min(values) <= 0 <= max(values):
        return "no clear effect"
    return "helps" if mean > 0 else "hurts"


def report(results: Mapping[str, Results]) -> str:
    """The table of the study: AP of the last stage by data set and seed, differences to the baseline, verdicts."""
    seeds = sorted({seed for on_data in results.values() for arm in on_data.values() for seed in arm})
    width = 8 * len(seeds) + 9
    lines = [
        f"{'':<17}" + "".join(f"{f'{name}: AP':>{width}}" for name in results),
        f"{'arm':<17}" + ("".join(f"{f'seed {seed}':>8}" for seed in seeds) + f"{'diff':>9}") * len(results)
        + "   verdict          change",
    ]  # fmt: skip
    for arm, change in ARMS.items():
        found, row = differences(arm, results), f"{arm:<17}"
        for name, on_data in results.items():
            values, mean = by_seed(on_data, Side(arm)), list(found[name].values())
            row += "".join(f"{values[seed]:8.1f}" if seed in values else f"{'-':>8}" for seed in seeds)
            row += f"{np.mean(mean):+9.1f}" if mean and arm != BASELINE else f"{'':>9}"
        word = "" if arm == BASELINE else judge(arm, results)
        lines.append(f"{row}   {word:<17}{change.about}")
    spread = spreads(results)
    noise = ", ".join(f"{name} {value:.1f}" for name, value in spread.items()) or "unknown with one seed"
    noise += f"; mean {np.mean(list(spread.values())):.1f}" if len(spread) > 1 else ""
    done = Counter(one["code"] for on_data in results.values() for arm in on_data.values() for one in arm.values())
    notes = (
        "AP of the last stage on the validation split, in percent; diff: its mean difference to the baseline with the "
        f"same seed. Spread between the baseline's seeds: {noise}.",
        "A change helps when its differences on all data sets and seeds are above 0 and their mean is greater than "
        "that spread; it hurts when the same holds with the opposite sign. Two seeds are weak evidence: with two "
        f"seeds on two data sets this rule misjudges {FALSE_ALARMS:.0%} of the changes that have no effect, and one "
        "lucky or unlucky baseline run shifts all verdicts together. Confirm with more seeds what you want to rely on.",
        f"{sum(done.values())} runs, by version of the code: {', '.join(f'{c} ({n})' for c, n in done.items())}.",
    )
    return "\n".join([*lines, "", *(textwrap.fill(note, 110) for note in notes)])


def _main(name: str, seed: str, folder: str, root: str, weights: str, small: str) -> None:
    """Main function of the processes of :func:`conduct`."""
    run(name, int(seed), folder, root, weights, bool(int(small)))


if __name__ == "__main__":
    queue.run_process(_main)
