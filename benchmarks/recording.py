"""What recording costs, and what it costs to be able to record: ``python -m benchmarks.recording [--json FILE]``.

- **not recorded**: the forward pass of a model that was never recorded, against that of its copy that was recorded
  before, in turns; the same outputs, bit for bit, and a ratio of 1 but for noise. As a measure of the noise, the same
  for two copies neither of which was ever recorded.
- **recorded**: for an image of 480 x 640 (the laptop sizes: of their own size), how long the forward pass takes with
  everything recorded, and with the decoders and stages alone; how large the trace is, and by how much the peak memory
  of a fresh process rises above that of the same pass without a record.

All weights are random. Exit code 1 where outputs differ.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import regolite
from benchmarks.speed import compare
from regolite.training.metrics import peak_memory
from regolite.types import DetectorOutput, ImageBatch

PRESETS = (
    "detr_r50", "deformable_detr_r50", "rego_deformable_detr_r50",
    "detr_tiny", "deformable_detr_tiny", "rego_deformable_detr_tiny", "rego_anchor_detr_tiny", "rego_smca_tiny",
)  # fmt: skip
CPU = torch.device("cpu")
FREE = ("detr_r50", "rego_deformable_detr_tiny")
SMALL = ("decoder.*", "stage.*")


def model_of(preset: str) -> tuple[nn.Module, ImageBatch]:
    """A model with random weights, and an image for it."""
    torch.manual_seed(0)
    model = regolite.build(preset, weights=None).eval()
    height, width = (480, 640) if preset.endswith("r50") else (192, 256)
    mask = torch.zeros(1, height, width, dtype=torch.bool)
    return model, ImageBatch(torch.randn(1, 3, height, width), mask, torch.tensor([[height, width]]))


def same(one: DetectorOutput, other: DetectorOutput) -> bool:
    """Whether two outputs are equal, bit for bit."""
    pairs = zip(one.by_stage, other.by_stage)
    return all(torch.equal(a.logits, b.logits) and torch.equal(a.boxes, b.boxes) for a, b in pairs)


def free(preset: str, rounds: int) -> dict[str, dict[str, float]]:
    """Forward passes that nobody records: of models that were recorded before, and that never were."""
    never, images = model_of(preset)
    before, other = copy.deepcopy(never), copy.deepcopy(never)
    with torch.inference_mode():
        with regolite.record(before):
            recorded = before(images)
        if not (same(never(images), recorded) and same(recorded, before(images))):
            raise SystemExit(f"{preset}: recording changes the outputs")
        return {
            "recorded before": compare(lambda: never(images), lambda: before(images), rounds),
            "neither": compare(lambda: never(images), lambda: other(images), rounds),
        }


def cost(preset: str, rounds: int, threads: int) -> dict[str, float]:
    """Milliseconds of a pass without a record, with everything recorded, and with the decoders and stages alone."""
    torch.set_num_threads(threads)
    model, images = model_of(preset)

    def recorded(names: Any) -> regolite.Trace:
        with regolite.record(model, names) as trace:
            model(images)
        return trace

    small = [pattern for pattern in SMALL if not pattern.startswith("stage") or preset.startswith("rego")]
    with torch.inference_mode():
        model(images)
        plain = peak_memory(CPU)
        trace = recorded("*")
        row = {"megabytes": size_of(trace) / 1e6, "peak": 1000 * (peak_memory(CPU) - plain)}
        row["megabytes_small"] = size_of(recorded(small)) / 1e6
        del trace
        sides = {"plain": lambda: model(images), "all": lambda: recorded("*"), "small": lambda: recorded(small)}
        times: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(rounds):
            for name, side in sides.items():
                start = time.perf_counter()
                side()
                times[name].append(1000 * (time.perf_counter() - start))
    return row | {name: statistics.median(values) for name, values in times.items()}


def size_of(trace: regolite.Trace) -> int:
    """Bytes of all tensors of a trace."""
    values = (value for name in trace.names() for value in vars(trace[name]).values())
    return sum(value.nbytes for value in values if isinstance(value, Tensor))


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recording", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to this file too")
    parser.add_argument("--rounds", type=int, default=15, help="measurements of each (default 15)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of PyTorch (default: all cores)")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error("--rounds must be at least 2")
    torch.set_num_threads(args.threads)
    report: dict[str, Any] = {
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "threads": args.threads,
        "torch": torch.__version__,
        "rounds": args.rounds,
        "free": {},
        "cost": {},
    }
    print(f"{report['machine']}, {args.threads} threads, PyTorch {torch.__version__}; medians of {args.rounds} rounds")
    titles = ("nobody", "everything", "trace", "peak", "no encoder", "trace")
    print(f"\n{'One image, recorded:':28}" + "".join(f"{title:>14}" for title in titles))
    # A fresh process for each, whose peak of memory is its own; it begins at what this one holds, so they come first.
    for preset in PRESETS:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            row = report["cost"][preset] = pool.submit(cost, preset, args.rounds, args.threads).result()
        units = {"plain": "ms", "all": "ms", "megabytes": "MB", "peak": "MB", "small": "ms", "megabytes_small": "MB"}
        print(f"{preset:28}" + "".join(f"{row[name]:11.1f} {unit}" for name, unit in units.items()))

    print("\nNobody records: time of a copy by that of a model that was never recorded")
    for preset in FREE:
        report["free"][preset] = free(preset, args.rounds)
        for copied, row in report["free"][preset].items():
            print(
                f"{preset:28} copy: {copied:16} {row['ours']:8.1f} ms {row['theirs']:8.1f} ms   "
                f"{row['ratio']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
            )
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
