"""How fast the viewers answer: ``python -m benchmarks.viewers [--json FILE]``.

The time from a changed control to what the browser is sent, of every control of every viewer that suits the detector:
median and longest of some rounds. The goal is 0.2 seconds on two cores once the image is computed. What the image
itself takes, one recorded forward pass, and to come back to one that is kept, stands beside it. The everyday
detector is trained; all other weights are random. The way to the browser is not in it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import regolite
from regolite.viewers.base import Viewer
from regolite.viewers.explorer import Explorer

MODELS = ("everyday detector", "rego_deformable_detr_r50", "detr_r50")
GOAL = 200.0  # milliseconds


def timed(act: Callable[[], Any]) -> float:
    """How long it takes, in milliseconds."""
    start = time.perf_counter()
    act()
    return 1000 * (time.perf_counter() - start)


def values_of(control: Any) -> list[Any]:
    """Two values of a control, to go from one to the other."""
    if hasattr(control, "options"):
        values = [option[1] if isinstance(option, tuple) else option for option in control.options]
    else:
        values = [False, True] if isinstance(control.value, bool) else [control.min, control.max]
    return [values[0], values[-1]]


def answers(viewer: Viewer, rounds: int) -> dict[str, list[float]]:
    """Milliseconds from a changed control to a drawn canvas, control by control."""
    times: dict[str, list[float]] = {}
    viewer.threshold.value = 0.0  # with all boxes that are ever drawn
    for asked in ("object", "point") if hasattr(viewer, "ask") else ("object",):
        if asked == "point":
            viewer.ask.value = "point"
        for name, control in viewer.choices.items():
            for part in getattr(control, "children", [control]):
                one, other = values_of(part)
                if part.disabled or one == other or name == "ask":
                    continue
                for _ in range(rounds):
                    for value in (one, other) if part.value == other else (other, one):
                        spent = timed(lambda part=part, value=value: setattr(part, "value", value))
                        times.setdefault(f"{asked}, {name}", []).append(spent)
    return times


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.viewers", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to this file too")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each (default 5)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of PyTorch (default: all cores)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    report: dict[str, Any] = {"machine": machine, "threads": args.threads, "rounds": args.rounds, "models": {}}
    print(f"{machine}, {args.threads} threads, PyTorch {torch.__version__}; milliseconds")
    shades = np.random.default_rng(0).integers(0, 256, (2, 480, 640, 3), dtype=np.uint8)
    longest = 0.0
    for name in MODELS:
        torch.manual_seed(0)
        model = regolite.load() if name == MODELS[0] else regolite.build(name, weights=None).eval()
        start = time.perf_counter()
        explorer = Explorer(model, [Image.fromarray(s) for s in shades])
        row: dict[str, Any] = {}
        first = 1000 * (time.perf_counter() - start)
        gallery = explorer.gallery
        gallery.chooser.value = 1
        row["back to an image that is kept"] = [
            timed(lambda n=n, chooser=gallery.chooser: setattr(chooser, "value", n)) for n in (0, 1) * args.rounds
        ]
        for viewer in explorer.tabs.children:
            row |= {f"{viewer.title}: {what}": spent for what, spent in answers(viewer, args.rounds).items()}
        print(f"\n{name}: the first image takes {first:.0f} ms in all")
        for what, spent in row.items():
            print(f"  {what:40} median {statistics.median(spent):7.1f}   longest {max(spent):7.1f}")
            longest = max(longest, statistics.median(spent))
        report["models"][name] = {
            what: {"median": statistics.median(spent), "longest": max(spent)} for what, spent in row.items()
        }
    print(f"\nslowest median {longest:.0f} ms: {'within' if longest <= GOAL else 'beyond'} {GOAL:.0f} ms")
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
