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
    """Which checkpoint to measure, on what, and how."""

    checkpoint: str = _option("runs/rego/model.safetensors", "weights: of a run, or a published file")
    data: str = _option("data/coco_tiny", "folder in COCO format, or scenes (see regolite.data.open_data)")
    splits: tuple[str, ...] = _option(("val",), "of train, val, test and train+val; the first is looked at closely")
    shared_classes: bool = _option(False, "measure only classes that both the data and the model know, by name")
    output: str = _option("runs/evaluation", "folder of the results")
    stages: int | None = _option(None, "use so many REGO stages; all by default")
    batch_size: int = _option(8, "images at a time")
    image_size: int | None = _option(None, "size of the images; the model's own by default")
    limit_images: int | None = _option(None, "use only the first N images of each split")
    backend: Literal["pycocotools", "faster-coco-eval"] = _option("pycocotools", "what computes the figures")
    threshold: float = _option(0.5, "least score of a detection that counts as an answer, for errors and images")
    images: int = _option(6, "how many error images of each kind")
    save_detections: bool = _option(False, "write the last stage's detections of each split, in COCO's form")
    workers: int = _option(0, "processes that prepare images")
    device: Literal["auto", "cpu", "cuda", "mps"] = _option("auto", "where to compute")

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
        """A configuration from names and values, lists taken for tuples.

        Raises:
            UserError: for an unknown name (the message names the nearest right one) or a wrong value.
        """
        return from_values(EvaluationConfig, values)
