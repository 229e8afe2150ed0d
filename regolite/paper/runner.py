"""One run: an arm, trained with one seed and measured on the test scenes; and the file that collects the runs.

A run has a folder, ``ARM/SEED``, which holds its training (:mod:`regolite.training.folder`) and, at the end,
``result.json``. :func:`merge` gathers the results of an arm in one file, ``ARM.json``, with the configuration: these
files are small and stay, folders can be deleted. A run whose result is there is never trained again.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools.coco import COCO

from regolite.data import Scenes, open_data
from regolite.data.scenes import DECIDERS
from regolite.errors import UserError
from regolite.evaluation.coco import detect_all, measure
from regolite.evaluation.error_types import judge
from regolite.evaluation.relations import BASE, relation_score
from regolite.loading import load
from regolite.models.rego import Rego
from regolite.paper.experiments import TEST, Arm
from regolite.training import RunConfig, train
from regolite.training.folder import read_config
from regolite.training.resume import changes, refuse
from regolite.utils.files import write_atomic

BINS = (0.5, 0.6, 0.7, 0.8, 0.9)
"""Lower ends of the IoU bins of Figure 4."""

FIGURES = ("AP", "AP50", "AP75", "APs", "APm")
LIBRARIES = ("torch", "torchvision", "numpy", "pycocotools", "regolite")


def run(name: str, arm: Arm, seed: int, folder: str | Path, test: int = TEST) -> dict[str, Any]:
    """Train an arm with one seed and measure it, or go on with that, or read what came out.

    Args:
        name: of the arm.
        arm: what to train.
        seed: of the first weights, of the order and of the changes of images.
        folder: of all runs.
        test: how many test scenes.

    Returns:
        The result, as ``result.json`` holds it.

    Raises:
        UserError: when the folder holds a run of another configuration.
        RunStopped: as :func:`regolite.train`.
    """
    place = Path(folder) / name / str(seed)
    config = RunConfig.of({**arm.settings(), "seed": seed, "output": str(place), "resume": True})

    def measured(lines: list[dict[str, Any]]) -> dict[str, Any]:
        model = load(place / "model.safetensors")
        begun = time.monotonic()
        on_test = measure_on_test(model, config.data, test)
        curve = {line["step"]: line for line in lines if line["kind"] == "evaluation" and line["split"] == "val"}
        return {
            "curve": [
                {"epoch": line["epoch"], "step": step, "AP": [stage["AP"] for stage in line["stages"]]}
                for step, line in sorted(curve.items())
            ],
            **on_test,
            "seconds": {"training": max(line["seconds"] for line in lines), "measuring": time.monotonic() - begun},
        }

    return once(config, lambda config: {**described(config), "test": test}, measured)


def once(
    config: RunConfig,
    describe: Callable[[RunConfig], dict[str, Any]],
    measure: Callable[[list[dict[str, Any]]], dict[str, Any]],
) -> dict[str, Any]:
    """Train and measure, or go on with that, or read what came out.

    Args:
        config: of the training; ``resume`` must be set.
        describe: what of a configuration decides the figures.
        measure: makes the figures of the trained model in ``config.output`` from its lines of metrics.

    Returns:
        The result, as ``result.json`` in ``config.output`` holds it.

    Raises:
        UserError: when the folder holds a run of another configuration.
        RunStopped: as :func:`regolite.train`.
    """
    place, about = Path(config.output), describe(config)
    result = place / "result.json"
    if result.exists():
        found = json.loads(result.read_text(encoding="utf-8"))
        _check(found["config"], about, result)
        return found
    if "run" in (before := read_config(place)):
        _check(describe(RunConfig.of(before["run"])), about, place)
    train(config)
    lines = [json.loads(line) for line in (place / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    found = {
        "seed": config.seed,
        "config": about,
        **measure(lines),
        "versions": {library: version(library) for library in LIBRARIES} | {"python": platform.python_version()},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} thread",
        "finished": time.strftime("%Y-%m-%d"),
    }
    write_atomic(result, json.dumps(found).encode())
    return found


def described(config: RunConfig) -> dict[str, Any]:
    """What of a configuration decides the figures: not the seed, nor where and when the run is saved and looked at."""
    apart = {"seed", "output", "resume", "checkpoint_minutes", "keep_checkpoints"}
    apart |= {"evaluate_every", "evaluate_start", "log_every", "tensorboard"}
    return json.loads(json.dumps({name: value for name, value in config.to_dict().items() if name not in apart}))


def measure_on_test(model: torch.nn.Module, data: str, test: int) -> dict[str, Any]:
    """The figures of every stage on held-out scenes, and how well relations point at deciders.

    Args:
        model: a trained detector.
        data: scenes, as for :func:`regolite.data.open_data`; the split ``test`` of them is measured.
        test: how many.

    Returns:
        ``stages``, the figures by stage; ``objects`` in the test scenes; ``relations``, the relation score with chance
        and the nearest object (:mod:`regolite.evaluation.relations`), None where no ball was found.
    """
    scenes = open_data(data, "test", limit=test)
    truth = scenes.coco
    stages = [stage_figures(truth, results) for results in detect_all(model, scenes)]
    return {
        "stages": stages,
        "objects": len(truth.getAnnIds()),
        "relations": relations(model, scenes) if isinstance(scenes, Scenes) else None,
    }


def stage_figures(truth: COCO, results: list[dict[str, Any]]) -> dict[str, Any]:
    """What is kept of one stage.

    Args:
        truth: the objects.
        results: detections in COCO's form.

    Returns:
        COCO's figures in percent, ``balls`` and ``others`` (the mean AP of the classes that a neighbor decides, and
        of the rest), and ``by_iou``: correct detections by their overlap, in the bins of Figure 4.
    """
    measured = measure(truth, results)
    names = [truth.cats[category]["name"] for category in truth.getCatIds()]
    decided = np.array([name in {f"ball of {shape}" for shape in DECIDERS} for name in names])
    judged = judge(truth, results)
    overlaps = judged.overlaps[judged.kinds == "correct"]
    return {
        **{name: measured.figures[name] for name in FIGURES},
        "balls": _mean(measured.by_category[decided]),
        "others": _mean(measured.by_category[~decided]),
        "by_iou": np.histogram(overlaps, (*BINS, 1.0 + 1e-6))[0].tolist(),
    }


def relations(model: torch.nn.Module, scenes: Scenes) -> dict[str, Any] | None:
    """The relation score of the base detector and of each stage, in percent; None where the model finds no ball."""
    try:
        figures, _ = relation_score(model, scenes)
    except UserError:
        return None
    maps = {row["name"]: round(100 * row["score"]["mean"], 2) for row in figures["maps"]}
    count = len(model.stages) if isinstance(model, Rego) else 0
    wanted = (BASE, *(f"stage.{i}.relations.*" for i in range(1, count + 1)))
    rivals = {name: round(100 * figures[name]["mean"], 2) for name in ("chance", "nearest")}
    return {"cases": figures["cases"], **rivals, "stages": [maps.get(name) for name in wanted]}


def merge(name: str, about: str, results: Iterable[dict[str, Any]], file: str | Path) -> dict[str, Any]:
    """Write the results of an arm into its file, beside those that are there.

    Args:
        name: of the arm.
        about: what it is.
        results: of :func:`run`.
        file: the file, new or not.

    Returns:
        What the file holds now: the arm, its configuration, and its runs by seed.

    Raises:
        UserError: when the file holds runs of another configuration.
    """
    file = Path(file)
    before = json.loads(file.read_text(encoding="utf-8"))["runs"] if file.exists() else []
    runs: dict[int, dict[str, Any]] = {}
    for one in (*before, *results):
        if runs:
            _check(next(iter(runs.values()))["config"], one["config"], file)
        runs[one["seed"]] = one
    document = {"arm": name, "about": about, "runs": [runs[seed] for seed in sorted(runs)]}
    if document["runs"] != before:
        write_atomic(file, (json.dumps(document, indent=1) + "\n").encode())
    return document


def smaller(arm: Arm) -> Arm:
    """The same arm on 32 scenes for two epochs: to see that it runs, or to watch it; its figures mean nothing."""
    drop = {"drop_epochs": (1,), "epochs": 2}
    return replace(arm, recipe={**arm.recipe, **drop, "data": "scenes:32:val=8:size=96:max_objects=6"})


def _check(before: dict[str, Any], now: dict[str, Any], where: Path) -> None:
    """Refuse to mix runs of two configurations."""
    what = f"{where} holds a run of another configuration"
    refuse(changes(before, now), what, "move it away, or give another folder")


def _mean(values: np.ndarray) -> float | None:
    known = values[~np.isnan(values)]
    return round(float(known.mean()), 4) if len(known) else None
