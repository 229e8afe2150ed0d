"""regolite: REGO, the recurrent glimpse-based decoder, and the detection transformers that it stands on.

The public face::

    model = regolite.build("rego_deformable_detr_tiny", num_classes=80)   # or regolite.load("model.safetensors")
    [found] = regolite.detect(model, "picture.jpg", threshold=0.5)
    folder = regolite.train(regolite.RunConfig(data="data/coco_tiny", output="runs/mine"))
    figures = regolite.evaluate(model, dataset)
    model = regolite.Rego(detector, stages=3)                             # REGO on a detector of your own
    model = regolite.published.load("detr-r50-e632da11.pth")              # weights that others have published
"""

from __future__ import annotations

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
    "UserError",
    "build",
    "configure",
    "detect",
    "evaluate",
    "load",
    "presets",
    "published",
    "train",
]

__version__ = "0.1.0"
