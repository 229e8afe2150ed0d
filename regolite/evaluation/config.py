"""The configuration of an evaluation: the parameters of notebook 21."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from typing import Any, Literal

from regolite.errors import UserError
from regolite.utils.validation import Checked, from_values


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class EvaluationConfig(Checked):
    """Checkpoint, data and options of an evaluation."""

    checkpoint: str = _option("runs/rego/model.safetensors", "weights: of a run, or a published file")
    data: str = _option("data/coco_tiny", "folder in COCO format, or scenes (see regolite.data.open_data)")
    splits: tuple[str, ...] = _option(("val",), "of train, val, test and train+val; the first is analyzed in detail")
    shared_classes: bool = _option(False, "evaluate only classes that data and model share by name")
    output: str = _option("runs/evaluation", "folder of the results")
    stages: int | None = _option(None, "number of REGO stages; all by default")
    batch_size: int = _option(8, "images per batch")
    image_size: int | None = _option(None, "size of the images; the model's own by default")
    limit_images: int | None = _option(None, "use only the first N images of each split")
    backend: Literal["pycocotools", "faster-coco-eval"] = _option("pycocotools", "what computes the figures")
    threshold: float = _option(0.5, "least score of a detection in the error analysis and in images")
    images: int = _option(6, "number of example images of each kind of error")
    save_detections: bool = _option(False, "write the last stage's detections of each split in COCO format")
    workers: int = _option(0, "number of DataLoader workers")
    device: Literal["auto", "cpu", "cuda", "mps"] = _option("auto", "device")

    def __post_init__(self) -> None:
        """Check the values, one by one."""
        super().__post_init__()
        for name in ("batch_size", "image_size", "limit_images", "images"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise UserError(f"{name}={getattr(self, name)} must be greater than 0")
        for name in ("stages", "workers"):
            if getattr(self, name) is not None and getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)} must not be negative")
        if not 0 <= self.threshold <= 1:
            raise UserError(f"threshold={self.threshold} must be between 0 and 1")
        if self.backend == "faster-coco-eval" and importlib.util.find_spec("faster_coco_eval") is None:
            raise UserError("backend='faster-coco-eval' is not installed: pip install faster-coco-eval")
        known = {"train", "val", "test", "train+val"}
        if not self.splits or not set(self.splits) <= known or len(set(self.splits)) < len(self.splits):
            raise UserError(f"splits={list(self.splits)} must be some of {', '.join(sorted(known))}, each once")

    @staticmethod
    def of(values: dict[str, Any]) -> EvaluationConfig:
        """Build a configuration from names and values; lists become tuples.

        Raises:
            UserError: an unknown name (the message suggests the closest match) or an invalid value.
        """
        return from_values(EvaluationConfig, values)
