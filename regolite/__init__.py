"""regolite: REGO, the recurrent glimpse-based decoder, and the detection transformers that it stands on.

The public face::

    model = regolite.load()                                               # the everyday detector, or load("FILE")
    model = regolite.build("rego_deformable_detr_everyday", num_classes=80)  # a new one, to train
    [found] = regolite.detect(model, "picture.jpg", threshold=0.5)
    folder = regolite.train(regolite.RunConfig(data="data/coco_tiny", output="runs/mine"))
    figures = regolite.evaluate(model, dataset)
    model = regolite.Rego(detector, stages=3)                             # REGO on a detector of your own
    model = regolite.published.load("detr-r50-e632da11.pth")              # weights that others have published
    with regolite.record(model) as trace:                                 # look inside: attention, glimpses, boxes
        regolite.detect(model, "picture.jpg")
"""

from __future__ import annotations

import os
from typing import Any

# Threads of PyTorch that wait for each other keep their cores busy. Where other programs want these cores, that takes
# most of the time: a training step becomes several times as slow as its share of the machine allows. So they spin
# briefly and then sleep. OpenMP reads this when PyTorch is imported; a choice of the user's own stays.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # GNU's OpenMP, in PyTorch's packages for Linux: iterations
os.environ.setdefault("KMP_BLOCKTIME", "1")  # LLVM's and Intel's, elsewhere: milliseconds

from regolite import published
from regolite.checkpoint import load
from regolite.detection import detect
from regolite.errors import UserError
from regolite.evaluation import evaluate
from regolite.presets import build, configure, presets
from regolite.rego import Rego, RegoConfig
from regolite.training import RunConfig, train

__all__ = [
    "Rego",
    "RegoConfig",
    "RunConfig",
    "Trace",
    "UserError",
    "build",
    "configure",
    "detect",
    "evaluate",
    "load",
    "presets",
    "published",
    "record",
    "train",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """``record`` and ``Trace`` on first use: their room also draws, and nobody else waits for matplotlib."""
    if name in ("Trace", "record"):
        from regolite.inspect import recorder

        return getattr(recorder, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
