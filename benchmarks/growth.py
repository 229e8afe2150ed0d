"""How cost grows with the image and with the queries: ``python -m benchmarks.growth [--json FILE] [--figure FILE]``.

A training step (forward, loss with matching, backward, AdamW; batch 1, float32, one thread) of DETR, Deformable DETR
and REGO on it, all with ResNet-50, for square images of 320 to 1,333 pixels and for 100 to 900 queries. Each run
has a process of its own. It counts CPU seconds, which other processes disturb less than wall time, and the memory that
training adds to that of the model. Exponents are slopes of straight lines through the logarithms, by least squares: an
exponent of 2 in the side means that cost grows as the number of pixels does.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from tqdm import tqdm

import regolite
from benchmarks.speed import CLASSES, OBJECTS, some_boxes
from regolite.losses import SetLoss
from regolite.training.kernels import fastest_kernels
from regolite.training.metrics import peak_memory
from regolite.types import ImageBatch, Target

MODELS = {"detr_r50": "DETR", "deformable_detr_r50": "Deformable DETR", "rego_deformable_detr_r50": "REGO on it"}
SIDES, QUERIES = (320, 480, 640, 800, 1066, 1333), (100, 300, 600, 900)
SIDE, COUNT = 480, 300
"""The image side while the queries vary, and the queries while the side varies."""


def measure(name: str, side: int, queries: int, steps: int = 2) -> dict[str, float]:
    """CPU seconds of a training step, the least of a few, and the GB by which training raises this process's peak."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = regolite.build(name, CLASSES, weights=None, queries=queries).train().to(memory_format=torch.channels_last)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, 1e-5)
    loss = SetLoss(model.model_config.loss, model.scoring)
    pixels = torch.randn(1, 3, side, side).contiguous(memory_format=torch.channels_last)
    images = ImageBatch(pixels, torch.zeros(1, side, side, dtype=torch.bool), torch.tensor([[side, side]]))
    targets = [Target(torch.randint(CLASSES, (OBJECTS,)), some_boxes(OBJECTS), 0, (side, side))]
    seconds, before = [], psutil.Process().memory_info().rss / 1e9
    with fastest_kernels(torch.device("cpu")):
        for _ in range(steps + 1):
            start = time.process_time()
            loss(model(images), targets)[0].backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.process_time() - start)
    return {"seconds": min(seconds[1:]), "memory": peak_memory(torch.device("cpu")) - before}  # the first step warms up


def exponent(x: list[float], y: list[float]) -> float:
    """The slope of the logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def draw(report: dict[str, Any], file: Path) -> None:
    """Seconds and memory against side and queries, on logarithmic axes, with the exponents."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, NullLocator

    from regolite.plots.drawing import BLUE, SKY, VERMILLION

    figure = Figure(figsize=(9, 6.4), layout="constrained")
    grid = figure.subplots(2, 2)
    texts = {"seconds": "CPU seconds of a training step", "memory": "memory that training adds (GB)"}
    for row, measured in enumerate(("seconds", "memory")):
        for column, (varied, label) in enumerate((("side", "image side (pixels)"), ("queries", "queries"))):
            ax, found = grid[row][column], report[varied]
            for (name, title), color in zip(MODELS.items(), (BLUE, SKY, VERMILLION)):
                x, y = list(map(float, found[name])), [each[measured] for each in found[name].values()]
                ax.plot(x, y, "o-", color=color, label=f"{title} ({exponent(x, y):.2f})")
            ax.set(xscale="log", yscale="log", xlabel=label, ylabel=texts[measured])
            ax.set_xticks(x, [f"{value:.0f}" for value in x])
            ticks = [tick for tick in (0.5, 1, 2, 5, 10, 20, 50, 100) if ax.get_ylim()[0] <= tick <= ax.get_ylim()[1]]
            ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
            for axis in (ax.xaxis, ax.yaxis):
                axis.set_minor_locator(NullLocator())
                axis.set_minor_formatter(NullFormatter())
            ax.legend(title="exponent in brackets", fontsize=8, title_fontsize=8)
    figure.savefig(file, dpi=110)


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to this file too")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw them to this PNG or SVG")
    parser.add_argument("--sides", type=int, nargs="+", default=SIDES, help="image sides")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one[0], *map(int, args.one[1:]))))
        return
    report: dict[str, Any] = {
        "machine": f"{platform.system()} {platform.machine()}", "torch": torch.__version__, "side": {}, "queries": {},
    }  # fmt: skip
    cases = [(varied, name, value) for varied, values in (("side", args.sides), ("queries", QUERIES))
             for name in MODELS for value in values]  # fmt: skip
    for varied, name, value in tqdm(cases, unit="run"):
        words = (value, COUNT) if varied == "side" else (SIDE, value)
        command = [sys.executable, "-m", "benchmarks.growth", "--one", name, *map(str, words)]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        report[varied].setdefault(name, {})[str(value)] = found
    for varied, unit in (("side", "pixels"), ("queries", "queries")):
        for measured, what in (("seconds", "CPU seconds"), ("memory", "GB")):
            print(f"\n{what} of a training step by {unit}")
            for name, title in MODELS.items():
                x, y = list(map(float, report[varied][name])), [v[measured] for v in report[varied][name].values()]
                row = "".join(f"{value:8.2f}" for value in y)
                print(f"{title:18} {row}   exponent {exponent(x, y):.2f}")
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if args.figure:
        draw(report, args.figure)


if __name__ == "__main__":
    main()
