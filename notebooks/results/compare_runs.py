"""The runs behind notebook 22: ``python notebooks/results/compare_runs.py``.

Deformable DETR alone, REGO on it, and REGO on it with an earlier drop of the learning rate learn the same 256 drawn
scenes with the same seed, as the three kinds of curves of the paper's Figure 3. Of each run's folder ``config.json``
and ``metrics.jsonl`` are copied to the folder ``compare_runs`` beside this file; the folders themselves stay in
``runs/compare_runs``, from where an interrupted run goes on when the script is started again.

The two runs of REGO are the same, number by number, until the first of them drops its learning rate; what is stored
was trained once up to the ninth epoch and then went on twice. Run one by one, they give the same.

It takes about 25 minutes of one CPU core. The clock of these runs is CPU time, not that of the wall: what else the
machine does meanwhile leaves no trace in their seconds.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import regolite

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).with_suffix("")

RECIPE: dict[str, Any] = {
    "data": "scenes:256:val=64:context=0:max_objects=4",
    "overrides": ["queries=30"],
    "epochs": 20,
    "batch_size": 8,
    "lr": 5e-4,
    "sampling_lr_mult": 1.0,
    "drop_epochs": [16],
    "augment": "laptop",
    "image_size": 128,
    "log_every": 16,
    "checkpoint_minutes": 1.0,
    "device": "cpu",
    "resume": True,
}
RUNS: dict[str, dict[str, Any]] = {
    "base": {"model": "deformable_detr_tiny"},
    "rego": {"model": "rego_deformable_detr_tiny"},
    "rego_early_drop": {"model": "rego_deformable_detr_tiny", "epochs": 14, "drop_epochs": [10]},
}


def main() -> None:
    """Train all, and copy what the notebook reads after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=list(RUNS), choices=list(RUNS))
    only = parser.parse_args().only
    os.chdir(ROOT)
    torch.set_num_threads(1)
    for name in only:
        config = regolite.RunConfig.of(RECIPE | RUNS[name] | {"output": f"runs/compare_runs/{name}"})
        with mock.patch.object(time, "monotonic", time.process_time):
            folder = regolite.train(config)
        (RESULTS / name).mkdir(parents=True, exist_ok=True)
        for file in ("config.json", "metrics.jsonl"):
            shutil.copy(folder / file, RESULTS / name / file)


if __name__ == "__main__":
    main()
