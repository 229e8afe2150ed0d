"""Does it learn at all: ``python -m benchmarks.overfit [--minutes 10]``.

The everyday preset memorises eight photographs of coco_tiny, from the bundled backbone: AP of at least 95 on those
eight, measured on the images that it learns from. Detection transformers have a name for staying at AP 0 on small
data; a model, a matching or a loss with a mistake in it does, and this run shows it within minutes.

It prints the AP of every stage against the minutes, ends as soon as the target is reached, and exits with code 1 where
it is not.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from regolite import RunConfig, train
from regolite.data import CocoFolder

DATA = Path(__file__).parents[1] / "data" / "coco_tiny"

# Small batches take more steps in the same time, and images of one shape share a batch, with little padding. The
# images never change: what is asked for is memory. All parts but the backbone learn at the full rate, since there is
# no time for the slow ones to follow.
RECIPE = {
    "model": "rego_deformable_detr_everyday",
    "overrides": ("queries=50",),
    "image_size": 256,
    "augment": "none",
    "batch_size": 4,
    "lr": 5e-4,
    "backbone_lr_mult": 0.1,
    "sampling_lr_mult": 1.0,
    "clip": 0.1,
    "schedule": "one_cycle",
    "warmup": 0.05,
    "evaluate_every": 30,
}


class Reached(Exception):
    """The target is reached: nothing is left to do."""


def copy_images(count: int, folder: Path) -> None:
    """The first images of coco_tiny with objects, as a data folder that validates on what it trains on."""
    chosen = CocoFolder(DATA, "train", limit=count, keep_empty=False)
    (folder / "images").mkdir(parents=True)
    (folder / "annotations").mkdir()
    for i in range(len(chosen)):
        shutil.copy(chosen.path(i), folder / "images")
    for split in ("train", "val"):
        text = json.dumps(chosen.coco.dataset)
        (folder / "annotations" / f"instances_{split}.json").write_text(text, encoding="utf-8")


def overfit(minutes: float, images: int, target: float, seed: int, folder: Path) -> dict[str, Any]:
    """Train until the target is reached or the time is over, and print the course of it.

    Returns:
        ``reached``, ``minutes``, ``AP`` and the ``course``: minutes and AP by stage of every evaluation.
    """
    start, course, terminal = time.monotonic(), [], sys.stdout

    def watch(line: dict[str, Any]) -> None:
        if line["kind"] != "evaluation":
            return
        passed = (time.monotonic() - start) / 60
        by_stage = [stage["AP"] for stage in line["stages"]]
        course.append({"minutes": round(passed, 2), "step": line["step"], "AP": by_stage})
        shown = "".join(f"{ap:8.1f}" for ap in by_stage)
        print(f"{passed:7.1f} {line['step']:7d} {shown}", file=terminal, flush=True)
        if line["AP"] >= target:
            raise Reached

    copy_images(images, folder / "data")
    config = RunConfig(
        **RECIPE,
        data=str(folder / "data"),
        output=str(folder / "run"),
        epochs=1_000_000,
        max_minutes=0.95 * minutes,  # the learning rate is back at zero by then, and the last evaluation takes a moment
        checkpoint_minutes=1e6,
        seed=seed,
    )
    print(f"minutes    step   AP of stage 0 (the base detector), 1, 2, ... on {images} images", flush=True)
    with contextlib.suppress(Reached), contextlib.redirect_stdout(io.StringIO()):  # one table, not two
        train(config, watch)
    best = max(course, key=lambda row: row["AP"][-1])
    return {"reached": best["AP"][-1] >= target, "minutes": best["minutes"], "AP": best["AP"][-1], "course": course}


def main() -> int:
    """Run, report, and give back the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overfit", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="time to learn in (default 10)")
    parser.add_argument("--images", type=int, default=8, help="images to learn (default 8)")
    parser.add_argument("--target", type=float, default=95.0, help="AP to reach (default 95)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and the order (default 0)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of PyTorch (default: all cores)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the course to this file too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        result = overfit(args.minutes, args.images, args.target, args.seed, Path(folder))
    if args.json is not None:
        machine = {"threads": args.threads, "torch": torch.__version__, "recipe": RECIPE}
        args.json.write_text(json.dumps(result | machine, indent=2) + "\n", encoding="utf-8")
    verdict = "reached" if result["reached"] else "NOT reached"
    print(
        f"AP {args.target:g} on {args.images} images {verdict}: {result['AP']:.1f} at {result['minutes']:.1f} minutes"
    )
    return 0 if result["reached"] else 1


if __name__ == "__main__":
    sys.exit(main())
