"""The decider benchmark on several detectors: detectors of transformers and of this package, trained on scenes.

``regolite experiment relations`` trains what is missing and prints the table of
:mod:`regolite.evaluation.relation_benchmark`. All detectors are of laptop size, train on the same scenes, half of whose
balls have a nearer object than their decider, and are measured on scenes with and without such objects. Families
converge at different speeds, so each has its own number of epochs; AP is reported, and a detector that does not find
balls has no relations to score. The arm ``shipped`` is the shipped scenes detector, which was trained without nearer
objects; it takes no training.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regolite.data import open_data
from regolite.errors import UserError, did_you_mean
from regolite.evaluation.coco import detect_all, measure
from regolite.evaluation.relation_benchmark import as_text, benchmark
from regolite.evaluation.relations import relation_score
from regolite.evaluation.removal import removal
from regolite.interop import adapt
from regolite.loading import load
from regolite.models.detector import Detector
from regolite.models.presets import build
from regolite.paper import queue, runner
from regolite.training import RunConfig
from regolite.utils.files import write_atomic

SCENES = "scenes:2000:val=100:size=128:max_objects=6"
TRAINED_ON = f"{SCENES}:context=0.6:nearer=0.5"
TESTS = {"plain": f"{SCENES}:context=0.6", "nearer": f"{SCENES}:context=0.6:nearer=1"}
"""Test scenes: the decider mostly nearest, and never if an object could be put nearer."""

LIMIT = 150
"""Number of test scenes of each kind."""

SHIPPED = Path(__file__).parents[2] / "data" / "checkpoints" / "rego_deformable_detr_scenes.safetensors"

PROTOCOL: dict[str, Any] = {
    "data": TRAINED_ON,
    "batch_size": 8,
    "lr": 5e-4,
    "backbone_lr_mult": 1.0,  # nothing is pretrained
    "sampling_lr_mult": 1.0,
    "clip": 0.1,
    "schedule": "one_cycle",
    "augment": "laptop",
    "image_size": 128,
    "evaluate_every": 0,
    "log_every": 50,
    "checkpoint_minutes": 5.0,
    "keep_checkpoints": 1,
    "device": "cpu",
}
"""Fields of :class:`regolite.RunConfig` that all trainings share."""


@dataclass(frozen=True)
class Arm:
    """A detector of the benchmark.

    Attributes:
        about: description in one line.
        build: makes the untrained detector; None for the shipped one.
        epochs: length of its training.
        minutes: CPU minutes of its training on one core, estimated.
    """

    about: str
    build: Callable[[], Detector] | None
    epochs: int = 0
    minutes: float = 0.0


def _of_transformers(name: str) -> Callable[[], Detector]:
    """A small detector of transformers with random weights."""

    def make() -> Detector:
        import transformers

        multi_scale = name not in ("Detr", "ConditionalDetr")
        network = {"embedding_size": 32, "hidden_sizes": [32, 64, 128, 256], "depths": [1] * 4, "layer_type": "basic"}
        kind = transformers.RTDetrResNetConfig if name == "RTDetr" else transformers.ResNetConfig
        outputs = ["stage2", "stage3", "stage4"] if multi_scale else ["stage4"]
        sizes: dict[str, Any] = {
            "d_model": 128, "encoder_layers": 2, "decoder_layers": 3, "encoder_ffn_dim": 512, "decoder_ffn_dim": 512,
            "encoder_attention_heads": 8, "decoder_attention_heads": 8, "num_queries": 30, "num_labels": 14,
            "dropout": 0.0, "backbone_config": kind(**network, out_features=outputs),
        }  # fmt: skip
        if name == "RTDetr":
            sizes |= {"encoder_hidden_dim": 128, "encoder_in_channels": [64, 128, 256], "num_denoising": 0}
            sizes |= {"decoder_in_channels": [128] * 3, "encoder_layers": 1}
        config = getattr(transformers, f"{name}Config")(**sizes)
        return adapt(transformers.AutoModelForObjectDetection.from_config(config))

    return make


ARMS: dict[str, Arm] = {
    "shipped": Arm("the shipped REGO on Deformable DETR, trained without nearer objects", None, minutes=8.0),
    "rego_deformable_detr": Arm(
        "REGO on Deformable DETR", lambda: build("rego_deformable_detr_scenes", 14), 40, 45.0
    ),
    "deformable_detr_hf": Arm("Deformable DETR of transformers", _of_transformers("DeformableDetr"), 60, 60.0),
    "rt_detr_hf": Arm("RT-DETR of transformers", _of_transformers("RTDetr"), 60, 45.0),
    "conditional_detr_hf": Arm("Conditional DETR of transformers", _of_transformers("ConditionalDetr"), 120, 60.0),
    "detr_hf": Arm("DETR of transformers", _of_transformers("Detr"), 300, 150.0),
}  # fmt: skip
"""All detectors by name, in the order of the queue."""


def conduct(
    names: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    folder: str | Path = "runs/experiments/relations",
    results: str | Path = "experiments/results/relations",
    jobs: int = 1,
    small: bool = False,
) -> None:
    """Do all missing runs and write their results to ``ARM.json`` in the folder of results.

    Args:
        names: names of the arms; all by default.
        seeds: the seeds; 0 by default.
        folder: folder of the runs.
        results: folder of the results.
        jobs: number of simultaneous runs, one core each.
        small: two steps and a few scenes, as a smoke test.

    Raises:
        UserError: for an unknown arm, and if runs failed, after the results of the others are written.
        RunStopped: after a signal; the progress of the current runs is saved.
    """
    for name in names or ():
        if name not in ARMS:
            raise UserError(f"the relation study has no arm {name!r}; {did_you_mean(name, ARMS)}")
    chosen = [name for name in ARMS if names is None or name in names]
    pairs = [(name, seed) for seed in dict.fromkeys(seeds or (0,)) for name in chosen if seed == 0 or ARMS[name].build]

    def start(name: str, seed: int) -> subprocess.Popen[bytes]:
        words = (name, str(seed), str(folder), str(int(small)))
        return queue.spawn(Path(folder) / name / str(seed), "regolite.paper.relation_study", *words)

    queue.work(pairs, {name: ARMS[name].about for name in chosen}, start, folder, results, jobs)


def run(name: str, seed: int, folder: str | Path, small: bool = False) -> dict[str, Any]:
    """Train a detector with one seed, resume that training, or read its result.

    Args:
        name: name of the arm.
        seed: seed of the initial weights, the image order and the augmentation.
        folder: folder of all runs.
        small: two steps and a few scenes.

    Returns:
        The content of ``result.json``: ``stages``, AP by stage on the plain test scenes; ``benchmark``, for each of
        :data:`TESTS` the figures of :func:`regolite.evaluation.relation_benchmark.benchmark`, or None if the detector
        finds no ball together with its decider; seconds, configuration, and the commit (``code``).

    Raises:
        UserError: if the folder holds a run of another configuration.
        RunStopped: as :func:`regolite.train`.
    """
    arm, place, limit = ARMS[name], Path(folder) / name / str(seed), 12 if small else LIMIT
    code, tests = runner.code_version(), {"tests": [f"{data}, {limit} images" for data in TESTS.values()]}
    if arm.build is None:
        start = time.monotonic()
        found = {"seed": seed, "config": {"checkpoint": SHIPPED.name, **tests}, **measured(load(SHIPPED), limit)}
        found |= {"seconds": {"measuring": time.monotonic() - start}, "code": code}
        place.mkdir(parents=True, exist_ok=True)
        write_atomic(place / "result.json", json.dumps(found).encode())
        return found
    own = {"epochs": arm.epochs, "seed": seed, "output": str(place), "resume": True}
    own |= {"epochs": 1, "limit_images": 16} if small else {}
    config = RunConfig.of({**PROTOCOL, **own})

    def describe(config: RunConfig) -> dict[str, Any]:
        """As :func:`regolite.paper.runner.described`; a model was given, so its name says more than a preset."""
        return {**runner.described(config), "model": name, **tests}

    def measure_trained(lines: list[dict[str, Any]]) -> dict[str, Any]:
        start = time.monotonic()
        found = measured(load(place / "model.safetensors"), limit)
        seconds = {"training": max(line["seconds"] for line in lines), "measuring": time.monotonic() - start}
        return {**found, "seconds": seconds, "code": code}

    return runner.once(config, describe, measure_trained, arm.build)


def measured(model: Detector, limit: int) -> dict[str, Any]:
    """AP by stage and the figures of the benchmark, on test scenes."""
    plain = open_data(TESTS["plain"], "test", limit=limit)
    stages = [{"AP": measure(plain.coco, found).figures["AP"]} for found in detect_all(model, plain, progress=False)]
    return {"stages": stages, "benchmark": {name: _benchmark(model, data, limit) for name, data in TESTS.items()}}


def _benchmark(model: Detector, data: str, limit: int) -> dict[str, Any] | None:
    scenes = open_data(data, "test", limit=limit)
    try:
        _, cases = relation_score(model, scenes, progress=False)
    except UserError:
        return None
    return benchmark(model, scenes, cases, removal(model, scenes, cases, progress=False), progress=False)


def report(results: str | Path) -> str:
    """The tables of all detectors that are done."""
    blocks = []
    for name, arm in ARMS.items():
        file = Path(results) / f"{name}.json"
        for one in json.loads(file.read_text("utf-8"))["runs"] if file.exists() else ():
            aps = ", ".join(f"{stage['AP']:.1f}" for stage in one["stages"])
            blocks.append(f"{arm.about}, seed {one['seed']}: AP by stage {aps}")
            blocks += [_block(kind, figures) for kind, figures in one["benchmark"].items()]
    return "\n\n".join(blocks) or "no detector is measured yet"


def _block(kind: str, figures: Mapping[str, Any] | None) -> str:
    text = "finds no ball together with its decider" if figures is None else as_text(dict(figures))
    return f"Scenes: {kind}\n{text}"


def _main(name: str, seed: str, folder: str, small: str) -> None:
    """Main function of the processes of :func:`conduct`."""
    run(name, int(seed), folder, bool(int(small)))


if __name__ == "__main__":
    queue.run_process(_main)
