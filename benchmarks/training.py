"""How fast and how large a training step is: ``python -m benchmarks.training [--json FILE]``.

Deformable DETR R50 and REGO on it, 480x640, batch 2, float32, on the CPU, beside Hugging Face's Deformable DETR (the
extra ``transformers``) with the same weights, images and targets:

- training: forward, loss with matching, backward, clipping and AdamW; also without what makes ours fast, one by one;
- inference, batch 1;
- memory: the peak of a process that does nothing but run one of them;
- images: how many a second one worker prepares by DETR's whole augmentation, and which share of a real training is
  spent waiting for them.

Each side has a process of its own, as a training has: memory that is given back and asked for again is a part of what
a step costs, and one process would share it between both. They take turns, step by step, so that whatever else the
machine does slows both; a ratio is the median of the ratios of neighbors. Before anything is timed they must give the
same outputs, losses and gradients. Exit code 1 where they do not.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import torch
from torch import Tensor, nn

import regolite
from benchmarks.speed import CLASSES, OBJECTS, samples_kept, some_boxes
from regolite.data import make_transform, open_data
from regolite.errors import UserError
from regolite.interop import adapt, to_transformers
from regolite.losses import SetLoss
from regolite.models.presets import configure
from regolite.models.rego import Rego, RegoConfig
from regolite.training.batches import EpochBatches, loader
from regolite.training.kernels import fastest_kernels
from regolite.training.metrics import peak_memory
from regolite.types import DetectorOutput, ImageBatch, Target

SIZE, BATCH = (480, 640), 2
PAIRS = {  # ours, and what it is compared with
    "Deformable DETR": ("base", "base of transformers"),
    "REGO on it": ("rego", "rego on transformers"),
    "REGO on it, against Deformable DETR alone": ("rego", "base of transformers"),
    "Deformable DETR, padding hidden": ("base, padding hidden", "base of transformers"),
    "Deformable DETR, samples kept": ("base, samples kept", "base of transformers"),
    "Deformable DETR, channels first": ("base, channels first", "base of transformers"),
    "Deformable DETR, default kernels": ("base, default kernels", "base of transformers"),
}
SAME = [row for row in PAIRS if "alone" not in row and "hidden" not in row]  # the rest differ in more than speed
SIDES = tuple(dict.fromkeys(side for pair in PAIRS.values() for side in pair))
COCO = Path(__file__).parent.parent / "data" / "coco_tiny"


class Side:
    """A model and how it is trained.

    Args:
        name: one of :data:`SIDES`.
    """

    def __init__(self, name: str) -> None:
        self.name, self.theirs = name, "transformers" in name
        torch.manual_seed(0)
        config = configure(
            "deformable_detr_r50",
            weights=None,
            dropout=0.0,
            mask_padding=name == "base, padding hidden",
            label=1.0,  # transformers' loss knows no other weight
        )
        detector = regolite.build(config)
        for layer in detector.modules():  # as in a trained model, every query looks elsewhere
            if isinstance(layer, regolite.models.deformable_attention.DeformableAttention):
                nn.init.normal_(layer.sampling_offsets.weight, std=0.05)
                nn.init.normal_(layer.attention_weights.weight, std=0.05)
        torch.manual_seed(1)
        rego = Rego(detector, RegoConfig(dropout=0.0)) if name.startswith("rego") else None
        self.model = detector if rego is None else rego
        if self.theirs:
            self.model = to_transformers(detector)
            for key, weight in self.model.named_parameters():  # theirs to choose; ours trains the stages 3 to 5
                if ".backbone." in key:
                    weight.requires_grad_(any(f"layer{stage - 1}" in key for stage in (3, 4, 5)))
            self.model.config.auxiliary_loss = True
        if self.theirs and rego is not None:
            rego.detector = adapt(self.model)
            self.model = rego
        self.set_loss = SetLoss(config.loss, detector.scoring)
        self.model.train()
        if not self.theirs and "channels first" not in name:
            self.model.to(memory_format=torch.channels_last)  # as the training loop does
        other_core = patch.object(regolite.models.deformable_attention, "read_and_mix", samples_kept)
        self.core = other_core if "samples kept" in name else contextlib.nullcontext()
        # The kernels of the training loop; those of `detect` and `evaluate`, as theirs, are PyTorch's default.
        self.fast = not self.theirs and "default kernels" not in name
        self.weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(self.weights, 1e-5)

    def loss(self, images: ImageBatch, targets: list[Target]) -> Tensor:
        """The loss of a batch."""
        if isinstance(self.model, Rego) or not self.theirs:
            return self.set_loss(self.model(images), targets)[0]
        labels = [{"class_labels": target.labels, "boxes": target.boxes} for target in targets]
        return self.model(images.pixels, pixel_mask=(~images.mask).long(), labels=labels).loss

    def step(self, images: ImageBatch, targets: list[Target]) -> tuple[float, float]:
        """Train once; the loss and the norm of the gradient."""
        with fastest_kernels(torch.device("cpu")) if self.fast else contextlib.nullcontext():
            with self.core:
                loss = self.loss(images, targets)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(self.weights, 0.1)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss.item(), norm.item()

    def detect(self, images: ImageBatch) -> tuple[Tensor, Tensor]:
        """Logits and boxes of the last layer."""
        if isinstance(self.model, Rego) or not self.theirs:
            with self.core:
                output: DetectorOutput = self.model(images)
            return output.final.logits, output.final.boxes
        output = self.model(images.pixels, pixel_mask=(~images.mask).long())
        return output.logits, output.pred_boxes


def some_batch() -> tuple[ImageBatch, list[Target]]:
    """Images of noise, without padding, and their objects."""
    torch.manual_seed(2)
    mask = torch.zeros(BATCH, *SIZE, dtype=torch.bool)
    images = ImageBatch(torch.randn(BATCH, 3, *SIZE), mask, torch.tensor([SIZE] * BATCH))
    return images, [Target(torch.randint(CLASSES, (OBJECTS,)), some_boxes(OBJECTS), b, SIZE) for b in range(BATCH)]


# --------------------------------------------------------------------------------------------------------- time


def ratio(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """The median seconds of both, and quartiles of the ratio (theirs to ours)."""
    low, middle, high = statistics.quantiles([t / o for o, t in zip(ours, theirs)], n=4)
    medians = {"ours": statistics.median(ours), "theirs": statistics.median(theirs)}
    return {**medians, "ratio": middle, "low": low, "high": high}


def must_agree(what: str, mine: Any, other: Any, tolerance: float) -> None:
    """Stop where a pair does not give the same numbers, relative to the largest of them."""
    for ours, theirs in zip(mine, other):
        ours, theirs = torch.as_tensor(ours), torch.as_tensor(theirs)
        difference = ((ours - theirs).abs().max() / theirs.abs().max()).item()
        if not difference <= tolerance:
            raise SystemExit(f"{what} differ by {difference:.1e}")


class Process:
    """A side in a process of its own, which does what it is asked.

    Args:
        name: one of :data:`SIDES`.
        threads: of PyTorch.
    """

    def __init__(self, name: str, threads: int) -> None:
        command = [sys.executable, "-m", "benchmarks.training", "--side", name, "--threads", str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, what: str) -> Any:
        """Ask for something, and wait for the answer."""
        print(what, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"a process ended while it was asked for: {what}")
        return json.loads(answer)


def serve(name: str) -> None:
    """What such a process does: answer, line by line."""
    side, (images, targets) = Side(name), some_batch()
    one = ImageBatch(images.pixels[:1], images.mask[:1], images.sizes[:1])
    before = psutil.Process().memory_info().rss / 1e9
    for line in sys.stdin:
        what, start = line.strip(), time.perf_counter()
        side.model.train(what == "step")
        if what == "step":
            answer: Any = side.step(images, targets)
        elif what == "weights":
            answer = sum(weight.numel() for weight in side.weights)
        elif what == "memory":
            answer = {"before": before, "peak": peak_memory(torch.device("cpu"))}
        else:
            with torch.inference_mode():
                answer = side.detect(one)
            answer = [tensor.tolist() for tensor in answer] if what == "outputs" else None
        print(json.dumps([time.perf_counter() - start, answer]), flush=True)


def compare(row: str, rounds: int, threads: int) -> dict[str, Any]:
    """Seconds of a training step, batch 2, and of inference, batch 1, of a pair; GB of memory of both."""
    pair = [Process(name, threads) for name in PAIRS[row]]

    def turns(what: str, rounds: int) -> dict[str, float]:
        times: list[list[float]] = [[], []]
        for turn in range(rounds):
            for side in (0, 1) if turn % 2 else (1, 0):
                times[side].append(pair[side].ask(what)[0])
        return ratio(*times)

    same_model = row in SAME
    must_agree(f"{row}: trained weights", *([side.ask("weights")[1]] for side in pair), 0.0 if same_model else 1.0)
    outputs, report = [side.ask("outputs")[1] for side in pair], {}
    if same_model:
        must_agree(f"{row}: outputs", *outputs, 1e-4)
    report["inference"] = turns("detect", 3 * rounds)
    first = [side.ask("step")[1] for side in pair]  # makes the optimizer's state
    if same_model:
        must_agree(f"{row}: losses and gradients", *first, 1e-4)
    report["training"] = turns("step", rounds)
    report["memory"] = dict(zip(("ours", "theirs"), (side.ask("memory")[1] for side in pair)))
    for side in pair:
        side.process.stdin.close()
        side.process.wait()
    return report


# ------------------------------------------------------------------------------------------------------ images


def loading(epochs: int = 3) -> float:
    """Images a second that one worker prepares: reading, DETR's augmentation at full size, padding to batches."""
    dataset = open_data(COCO, "train", make_transform("detr"))
    sizes = torch.tensor([dataset.size(i) for i in range(len(dataset))], dtype=torch.float32)
    rates = []
    for epoch in range(epochs):
        batches = iter(loader(dataset, 0, 1, EpochBatches(sizes[:, 0] / sizes[:, 1], BATCH, 0, epoch), False))
        next(batches)  # the worker has started
        start = time.perf_counter()
        prepared = sum(len(images) for images, *_ in batches)
        rates.append(prepared / (time.perf_counter() - start))
    return statistics.median(rates)


class Enough(Exception):
    """The training has been watched for long enough."""


def waiting(workers: int, steps: int) -> dict[str, float]:
    """The share of the steps' time in which a real training waits for images, and its images a second."""
    lines: list[dict[str, Any]] = []

    def watch(line: dict[str, Any]) -> None:
        if line["kind"] == "train":
            lines.append(line)
        if len(lines) > steps:
            raise Enough

    with tempfile.TemporaryDirectory() as folder:
        config = regolite.RunConfig(
            data=str(COCO), model="rego_deformable_detr_tiny", output=f"{folder}/run", augment="detr", image_size=800,
            batch_size=4, workers=workers, log_every=1, evaluate_every=0, device="cpu",
        )  # fmt: skip
        with contextlib.suppress(Enough):
            regolite.train(config, watch)
    seconds = [line["step_seconds"] for line in lines[1:]]  # in the first one the workers start
    waited = sum(line["step_seconds"] * line["data_wait"] for line in lines[1:])
    return {"waited": waited / sum(seconds), "images_per_second": 4 * len(seconds) / sum(seconds)}


# ----------------------------------------------------------------------------------------------------- the report


def print_ratios(title: str, unit: str, rows: dict[str, dict[str, float]]) -> None:
    """A table of comparisons, in things done per second."""
    print(f"\n{title}\n{'':44} {'transformers':>16} {'regolite':>16} {'ratio':>8} (quartiles)")
    for name, row in rows.items():
        print(
            f"{name:44} {1 / row['theirs']:8.3f} {unit:7} {1 / row['ours']:8.3f} {unit:7} {row['ratio']:7.2f}x "
            f"({row['low']:.2f} to {row['high']:.2f})"
        )


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to this file too")
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each (default 7)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of PyTorch (default: all cores)")
    about = f"which comparisons (default all): {', '.join(map(repr, PAIRS))}"
    parser.add_argument("--only", nargs="+", choices=list(PAIRS), default=list(PAIRS), metavar="ROW", help=about)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error("--rounds must be at least 2")
    torch.set_num_threads(args.threads)
    if args.side:
        return serve(args.side)
    try:
        to_transformers(regolite.build("deformable_detr_r50", weights=None, mask_padding=False))
    except UserError as error:
        raise SystemExit(str(error)) from error
    report: dict[str, Any] = {
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "threads": args.threads,
        "torch": torch.__version__,
        "rounds": args.rounds,
    }
    print(f"{report['machine']}, {args.threads} threads, PyTorch {torch.__version__}; medians of {args.rounds} rounds")

    rows = {row: compare(row, args.rounds, args.threads) for row in args.only}
    report["comparisons"] = rows
    size = f"{SIZE[0]}x{SIZE[1]}"
    print_ratios(f"Training, {size}, batch {BATCH}", "steps/s", {row: found["training"] for row, found in rows.items()})
    print_ratios(f"Inference, {size}, batch 1", "images/s", {row: found["inference"] for row, found in rows.items()})
    print("\nMemory of the process at its peak in GB (and before the first step)")
    for row, found in rows.items():
        theirs, ours = (
            f"{m['peak']:.2f} ({m['before']:.2f})" for m in (found["memory"][k] for k in ("theirs", "ours"))
        )
        print(f"{row:44} {theirs:>16} {ours:>16}")

    report["loading"] = loading()
    print(f"\nOne worker prepares {report['loading']:.1f} images a second by DETR's augmentation (coco_tiny)")
    report["waiting"] = {workers: waiting(workers, 8) for workers in (0, 1)}
    print("Training rego_deformable_detr_tiny on the same images, batch 4, waiting for data takes")
    for workers, row in report["waiting"].items():
        print(f"{workers} workers {100 * row['waited']:9.1f} % of the time ({row['images_per_second']:.1f} images/s)")

    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
