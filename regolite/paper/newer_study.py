"""REGO on newer detectors: does it still help on top of denoising, and on an RT-DETR?

Every detector is trained alone and with REGO, on photographs, for the same CPU time and with the same settings. With
REGO a step costs more, so that fewer steps are made: a gain of REGO here is a gain at equal cost. What the detector
inside REGO reaches without its stages is reported too.

- ``cards`` (``regolite data cards``): the two-stage Deformable DETR; the same with DINO's training (query denoising,
  mixed query selection, look forward twice); and the everyday detector (denoising, queries from tokens, one decoder
  layer).
- ``everyday``: RT-DETR of transformers at laptop size, with the backbone and the backbone weights of our own detectors.
  What transformers does in training only (its own denoising) is left out; losses and matching are ours.

REGO has the glimpses and the matching of the everyday preset, which were chosen on ``cards``, and the learning rate is
that of the recipe study, chosen for that preset. Two seeds are weak evidence.
"""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from regolite.data import open_data
from regolite.data.coco import find_annotations
from regolite.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from regolite.errors import UserError, did_you_mean
from regolite.interop import adapt
from regolite.models.backbone import Backbone
from regolite.models.detector import Detector
from regolite.models.presets import build, configure
from regolite.models.rego import Rego
from regolite.paper import queue, runner
from regolite.paper.recipe_study import PROTOCOL, WEIGHTS
from regolite.paper.statistics import read_results
from regolite.training import RunConfig
from regolite.types import ImageBatch
from regolite.utils.devices import constant

SEEDS = (0, 1)
EVERYDAY = configure("rego_deformable_detr_everyday")


@dataclass(frozen=True)
class Pair:
    """A detector, trained alone and with REGO.

    Attributes:
        about: description in one line.
        data: name of the data set.
        minutes: CPU minutes of a run.
        preset: the detector; None for RT-DETR of transformers.
    """

    about: str
    data: str
    minutes: float
    preset: str | None = None


PAIRS: dict[str, Pair] = {
    "two_stage": Pair("two-stage Deformable DETR", "cards", 8.0, "deformable_detr_two_stage_tiny"),
    "dino": Pair("the same with DINO's training", "cards", 8.0, "dino_tiny"),
    "tokens": Pair("the everyday detector", "cards", 8.0, "deformable_detr_everyday"),
    "rt_detr": Pair("RT-DETR of transformers", "everyday", 20.0),
}
ARMS = {f"{prefix}{name}": pair for name, pair in PAIRS.items() for prefix in ("", "rego_")}
"""All arms by name: a detector, and REGO on it."""


def detector(arm: str, num_classes: int) -> Detector:
    """The untrained detector of an arm, with random weights except for the backbone."""
    pair = ARMS[arm]
    base = build(pair.preset, num_classes, weights=WEIGHTS) if pair.preset else rt_detr(num_classes)
    model = base if arm in PAIRS else Rego(base, EVERYDAY.rego)
    assert model.model_config is not None
    loss = replace(model.model_config.loss, stage_matching=EVERYDAY.loss.stage_matching)
    model.model_config = replace(model.model_config, preset=arm, loss=loss, augment="laptop", image_size=256)
    return model


class RtDetrBackbone(nn.Module):
    """Our own backbone as an RT-DETR of transformers calls it: on pixels in [0, 1], without a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.network = Backbone("mobilenet_v2", (3, 4, 5), WEIGHTS, frozen_stages=2, mask_padding=False)

    def forward(self, pixels: Float[Tensor, "B 3 H W"]) -> SimpleNamespace:
        """The maps of strides 8, 16 and 32."""
        mean, deviation = (
            constant(values, pixels.device, pixels.dtype)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD)
        )
        mask = torch.zeros_like(pixels[:, 0], dtype=torch.bool)
        sizes = torch.tensor([pixels.shape[-2:]] * len(pixels))
        maps = self.network(ImageBatch((pixels - mean) / deviation, mask, sizes))
        return SimpleNamespace(feature_maps=[one.tensor for one in maps])


def rt_detr(num_classes: int) -> Detector:
    """RT-DETR of transformers, with the size and the backbone of our own detectors.

    The backbone is put in place of a network of transformers with the same channels.
    """
    import transformers

    channels = [32, 96, 320]
    network = transformers.RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, *channels], depths=[1] * 4, layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    model = transformers.RTDetrForObjectDetection(
        transformers.RTDetrConfig(
            backbone_config=network, num_labels=num_classes, num_queries=100, d_model=128, dropout=0.0, num_denoising=0,
            encoder_hidden_dim=128, encoder_in_channels=channels, decoder_in_channels=[128] * 3,
            encoder_layers=1, decoder_layers=3, encoder_ffn_dim=512, decoder_ffn_dim=512,
        )
    )  # fmt: skip
    model.model.backbone.model = RtDetrBackbone()
    return adapt(model)


def plan(arms: Sequence[str] | None = None, seeds: Sequence[int] | None = None) -> list[tuple[str, int]]:
    """The runs of the study, seed by seed: pairs of arm and seed.

    Args:
        arms: names of the arms; all by default.
        seeds: the seeds; by default :data:`SEEDS`.

    Raises:
        UserError: for an unknown arm; the message suggests the closest one.
    """
    for name in arms or ():
        if name not in ARMS:
            raise UserError(f"the study of newer detectors has no arm {name!r}; {did_you_mean(name, ARMS)}")
    chosen = [arm for arm in ARMS if arms is None or arm in arms]
    return [(arm, seed) for seed in dict.fromkeys(SEEDS if seeds is None else seeds) for arm in chosen]


def conduct(
    data: Mapping[str, str],
    arms: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    folder: str | Path = "runs/experiments/newer",
    results: str | Path = "experiments/results/newer",
    jobs: int = 1,
    small: bool = False,
) -> None:
    """Do the missing runs whose data are there, and write their results to ``ARM.json`` in the folder of results.

    Args:
        data: folders of the data sets by name; runs on others are left out.
        arms: as in :func:`plan`.
        seeds: as in :func:`plan`.
        folder: folder of the runs.
        results: folder of the results.
        jobs: number of simultaneous runs, one core each.
        small: train for a step or two, as a smoke test.

    Raises:
        UserError: if an arm is unknown or data are unusable (before any run starts); if runs failed, after the results
            of the others are written.
        RunStopped: after a signal; the progress of the current runs is saved.
    """
    known = {pair.data: None for pair in PAIRS.values()}
    for name in data:
        if name not in known:
            raise UserError(f"the study of newer detectors has no data set {name!r}; {did_you_mean(name, known)}")
        for split in ("train", "val"):
            open_data(data[name], split)

    def start(arm: str, seed: int) -> subprocess.Popen[bytes]:
        words = (arm, str(seed), str(folder), data[ARMS[arm].data], str(int(small)))
        return queue.spawn(Path(folder) / arm / str(seed), "regolite.paper.newer_study", *words)

    there = [(arm, seed) for arm, seed in plan(arms, seeds) if ARMS[arm].data in data]
    if there:
        queue.work(there, {arm: _about(arm) for arm, _ in there}, start, folder, results, jobs)


def run(arm: str, seed: int, folder: str | Path, root: str | Path, small: bool = False) -> dict[str, Any]:
    """Train an arm with one seed, resume that training, or read its result.

    Args:
        arm: name of the arm.
        seed: seed of the initial weights, the image order and the augmentation.
        folder: folder of all runs.
        root: folder of the data set.
        small: train for a step or two.

    Returns:
        The content of ``result.json``: ``stages``, the validation metrics by stage; ``steps``; ``cpu_seconds`` and
        ``seconds`` of training; the configuration; ``code``, the code version.

    Raises:
        UserError: if the folder holds a run of another configuration.
        RunStopped: as :func:`regolite.train`.
    """
    pair, code = ARMS[arm], runner.code_version()  # before training, during which the code may change
    own = {"data": str(root), "seed": seed, "output": str(Path(folder) / arm / str(seed)), "resume": True}
    config = RunConfig.of({**PROTOCOL, "model": arm, "max_cpu_minutes": 0.01 if small else pair.minutes, **own})
    sums = {
        split: hashlib.sha256(find_annotations(Path(root), split).read_bytes()).hexdigest()[:16]
        for split in ("train", "val")
    }

    def describe(config: RunConfig) -> dict[str, Any]:
        """As :func:`regolite.paper.runner.described`, without this machine's paths."""
        return {**runner.described(config), "model": arm, "data": pair.data, "sha256": sums}

    def measure(lines: list[dict[str, Any]]) -> dict[str, Any]:
        last = [line for line in lines if line["kind"] == "evaluation" and line["split"] == "val"][-1]
        return {
            "stages": [{figure: stage[figure] for figure in runner.FIGURES} for stage in last["stages"]],
            "steps": last["step"],
            "cpu_seconds": last["cpu_seconds"],
            "seconds": {"training": last["seconds"]},
            "code": code,
        }

    classes = len(open_data(root, "train", check_files=False).classes)
    return runner.once(config, describe, measure, lambda: detector(arm, classes))


def compare(results: str | Path) -> dict[str, dict[int, tuple[float, float, float]]]:
    """AP alone, inside REGO and with REGO, by detector and by the seeds of which both runs are there."""
    found = read_results(results, list(ARMS)) if any(Path(results).glob("*.json")) else {}
    pairs = {name: (found.get(name, {}), found.get(f"rego_{name}", {})) for name in PAIRS}
    return {
        name: {
            seed: (alone[seed]["stages"][-1]["AP"], rego[seed]["stages"][0]["AP"], rego[seed]["stages"][-1]["AP"])
            for seed in sorted(set(alone) & set(rego))
        }
        for name, (alone, rego) in pairs.items()
    }


def report(results: str | Path) -> str:
    """The table of the study: AP alone, inside REGO and with REGO, for each detector and seed."""
    lines = [f"{'detector':<30}{'data':<10}{'seed':>5}{'alone':>8}{'inside':>8}{'REGO':>8}{'gain':>8}{'steps':>14}"]
    for name, seeds in compare(results).items():
        pair = PAIRS[name]
        gains = [rego - alone for alone, _, rego in seeds.values()]
        runs = read_results(results, [name, f"rego_{name}"]) if seeds else {}
        for (seed, aps), gain in zip(seeds.items(), gains):
            steps = " / ".join(str(runs[arm][seed]["steps"]) for arm in (name, f"rego_{name}"))
            row = "".join(f"{ap:8.1f}" for ap in aps)
            lines.append(f"{pair.about:<30}{pair.data:<10}{seed:5}{row}{gain:+8.1f}{steps:>14}")
        if len(gains) > 1:
            lines.append(f"{'':<45}{'mean':>24}{np.mean(gains):+8.1f}")
        if not gains:
            lines.append(f"{pair.about:<30}{pair.data:<10}  not run")
    return "\n".join(lines)


def _about(arm: str) -> str:
    return ARMS[arm].about if arm in PAIRS else f"REGO on {ARMS[arm].about}"


def _main(arm: str, seed: str, folder: str, root: str, small: str) -> None:
    """Main function of the processes of :func:`conduct`."""
    run(arm, int(seed), folder, root, bool(int(small)))


if __name__ == "__main__":
    queue.run_process(_main)
