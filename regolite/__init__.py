"""regolite: REGO, the recurrent glimpse-based decoder, and the detection transformers that it stands on.

The public face::

    model = regolite.load()                                               # the everyday detector, or load("FILE")
    model = regolite.build("rego_deformable_detr_everyday", num_classes=80)  # a new one, to train
    [found] = regolite.detect(model, "image.jpg", threshold=0.5)
    folder = regolite.train(regolite.RunConfig(data="data/coco_tiny", output="runs/mine"))
    figures = regolite.evaluate(model, dataset)
    model = regolite.Rego(detector, stages=3)                             # REGO on a detector of your own
    model = regolite.interop.load("detr-r50-e632da11.pth")              # weights that others have published
    with regolite.record(model) as trace:                                 # look inside: attention, glimpses, boxes
        regolite.detect(model, "image.jpg")
    regolite.explain(model, "image.jpg").save("image.html")             # the same as one interactive page
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

# Threads of PyTorch that wait for each other keep their cores busy. Where other programs want these cores, that takes
# most of the time: a training step becomes several times as slow as its share of the machine allows. So they spin
# briefly and then sleep. OpenMP reads this when PyTorch is imported; a choice of the user's own stays.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # GNU's OpenMP, in PyTorch's packages for Linux: iterations
os.environ.setdefault("KMP_BLOCKTIME", "1")  # LLVM's and Intel's, elsewhere: milliseconds

if TYPE_CHECKING:
    from regolite import interop
    from regolite.errors import UserError
    from regolite.evaluation.coco import evaluate
    from regolite.explaining import explain
    from regolite.exporting import export
    from regolite.hub import from_pretrained, push_to_hub, save_pretrained
    from regolite.inference import detect
    from regolite.loading import load
    from regolite.models.presets import build, configure, presets
    from regolite.models.rego import Rego, RegoConfig
    from regolite.tracing.recorder import record
    from regolite.tracing.trace import Trace
    from regolite.training.config import RunConfig
    from regolite.training.loop import train

__version__ = "0.1.0"

# Imported on first use: the command line answers `--help` without waiting for PyTorch.
_MODULES = {
    "Rego": "models.rego",
    "RegoConfig": "models.rego",
    "RunConfig": "training.config",
    "Trace": "tracing.trace",
    "UserError": "errors",
    "build": "models.presets",
    "configure": "models.presets",
    "detect": "inference",
    "evaluate": "evaluation.coco",
    "explain": "explaining",
    "export": "exporting",
    "from_pretrained": "hub",
    "interop": "interop",
    "load": "loading",
    "presets": "models.presets",
    "push_to_hub": "hub",
    "record": "tracing.recorder",
    "save_pretrained": "hub",
    "train": "training.loop",
}

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
    "explain",
    "export",
    "from_pretrained",
    "interop",
    "load",
    "presets",
    "push_to_hub",
    "record",
    "save_pretrained",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_MODULES[name]}")
    value = module if name == "interop" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
