"""One run: an arm, trained with one seed and evaluated on the test scenes; and the result file of an arm.

A run's folder, ``ARM/SEED``, holds its training (:mod:`regolite.training.folder`) and finally ``result.json``.
:func:`merge` collects the results of an arm, with the configuration, in the small file ``ARM.json``; run folders can
then be deleted. A run with a result is never trained again.
"""

from __future__ import annotations

import json
import platform
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed
from pycocotools.coco import COCO

from regolite.data import Scenes, open_data
from regolite.data.scenes import DECIDERS
from regolite.errors import UserError
from regolite.evaluation.coco import detect_all, measure
from regolite.evaluation.error_types import judge
from regolite.evaluation.relations import BASE, relation_score
from regolite.loading import load
from regolite.models.detector import Detector, as_detector
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
    """Train and evaluate an arm with one seed, resume that, or read its result.

    Args:
        name: name of the arm.
        arm: the arm.
        seed: seed of the initial weights, the image order and the augmentation.
        folder: folder of all runs.
        test: number of test scenes.

    Returns:
        The content of ``result.json``.

    Raises:
        UserError: if the folder holds a run of another configuration.
        RunStopped: as :func:`regolite.train`.
    """
    place = Path(folder) / name / str(seed)
    config = RunConfig.of({**arm.settings(), "seed": seed, "output": str(place), "resume": True})

    def measured(lines: list[dict[str, Any]]) -> dict[str, Any]:
        model = load(place / "model.safetensors")
        start = time.monotonic()
        on_test = measure_on_test(model, config.data, test)
        curve = {line["step"]: line for line in lines if line["kind"] == "evaluation" and line["split"] == "val"}
        return {
            "curve": [
                {"epoch": line["epoch"], "step": step, "AP": [stage["AP"] for stage in line["stages"]]}
                for step, line in sorted(curve.items())
            ],
            **on_test,
            "seconds": {"training": max(line["seconds"] for line in lines), "measuring": time.monotonic() - start},
        }

    return once(config, lambda config: {**described(config), "test": test}, measured)


def once(
    config: RunConfig,
    describe: Callable[[RunConfig], dict[str, Any]],
    measure: Callable[[list[dict[str, Any]]], dict[str, Any]],
    build: Callable[[], Detector] | None = None,
) -> dict[str, Any]:
    """Train and evaluate, resume that, or read the result.

    Args:
        config: configuration of the training, with ``resume`` set.
        describe: gives the part of a configuration that affects the results.
        measure: gives the results of the trained model in ``config.output``, from its lines of metrics.
        build: makes the untrained model; by default the preset of the configuration is trained.

    Returns:
        The content of ``result.json`` in ``config.output``.

    Raises:
        UserError: if the folder holds a run of another configuration.
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
    if build is None:
        train(config)
    else:
        set_seed(config.seed)
        train(config, model=build())
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
    """The part of a configuration that affects the results, without seed, output, saving and evaluation."""
    apart = {"seed", "output", "resume", "checkpoint_minutes", "keep_checkpoints"}
    apart |= {"evaluate_every", "evaluate_start", "log_every", "tensorboard"}
    return json.loads(json.dumps({name: value for name, value in config.to_dict().items() if name not in apart}))


def measure_on_test(model: torch.nn.Module, data: str, test: int) -> dict[str, Any]:
    """Metrics of every stage on the test scenes, and the relation score.

    Args:
        model: a trained detector.
        data: scenes, as for :func:`regolite.data.open_data`; the split ``test`` is used.
        test: number of scenes.

    Returns:
        ``stages``, the metrics by stage; ``objects``, their number in the test scenes; ``relations``, the relation
        score with chance and the nearest object (:mod:`regolite.evaluation.relations`), None if no ball was found.
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
    """The stored metrics of one stage.

    Args:
        truth: the ground truth.
        results: detections in COCO's format.

    Returns:
        COCO metrics in percent, ``balls`` and ``others`` (the mean AP of the classes that a neighbor decides, and of
        the others), and ``by_iou``: the number of correct detections by IoU, in the bins of Figure 4.
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
    """The relation scores of the base detector and each stage in percent; None if the model finds no ball."""
    try:
        figures, _ = relation_score(model, scenes)
    except UserError:
        return None
    maps = {row["name"]: round(100 * row["score"]["mean"], 2) for row in figures["maps"]}
    count = as_detector(model).num_stages
    names = (BASE, *(f"stage.{i}.relations.*" for i in range(1, count + 1)))
    references = {name: round(100 * figures[name]["mean"], 2) for name in ("chance", "nearest")}
    return {"cases": figures["cases"], **references, "stages": [maps.get(name) for name in names]}


def merge(name: str, about: str, results: Iterable[dict[str, Any]], file: str | Path) -> dict[str, Any]:
    """Add results of an arm to its file.

    Args:
        name: name of the arm.
        about: its description.
        results: results of :func:`run`.
        file: the file, which need not exist.

    Returns:
        The content of the file: the arm, its description, and its runs by seed.

    Raises:
        UserError: if the file holds runs of another configuration.
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
    """The same arm on 32 scenes for two epochs, as a smoke test or demonstration; its results are meaningless."""
    drop = {"drop_epochs": (1,), "epochs": 2}
    return replace(arm, recipe={**arm.recipe, **drop, "data": "scenes:32:val=8:size=96:max_objects=6"})


def code_version() -> str:
    """The package's commit, marked if files are modified; without git its version."""
    command = ["git", "--no-optional-locks", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return version("regolite")
    return done.stdout.strip()


def _check(before: dict[str, Any], now: dict[str, Any], where: Path) -> None:
    """Raise UserError for a run of another configuration."""
    problem = f"{where} holds a run of another configuration"
    refuse(changes(before, now), problem, "move it away, or give another folder")


def _mean(values: np.ndarray) -> float | None:
    known = values[~np.isnan(values)]
    return round(float(known.mean()), 4) if len(known) else None
