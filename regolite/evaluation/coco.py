"""COCO's average precision of every stage of a detector.

pycocotools computes the figures; faster-coco-eval gives the same ones several times as fast, where it is installed and
asked for. Figures are percentages; one that cannot be computed, since no object has that size, is None.
"""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn
from torch.utils.data import DataLoader

from regolite.data import DetectionDataset, collate, make_transform
from regolite.detection import detections_by_stage
from regolite.errors import UserError
from regolite.presets import ModelConfig
from regolite.progress import track
from regolite.structures import Detections

FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


def average_precision(coco: COCO, results: Sequence[dict[str, Any]], backend: str = "pycocotools") -> dict[str, Any]:
    """COCO's twelve figures for boxes, in percent.

    Args:
        coco: the ground truth.
        results: detections in COCO's form: ``image_id``, ``category_id``, ``bbox`` (corner, width, height in pixels),
            ``score``.
        backend: ``"pycocotools"`` or ``"faster-coco-eval"``.

    Returns:
        The figures by the names of :data:`FIGURES`.

    Raises:
        UserError: when there is no such backend, or it is not installed.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # both libraries print whatever they do
        if backend == "pycocotools":
            evaluator = COCOeval
        elif backend == "faster-coco-eval":
            try:
                from faster_coco_eval import COCO as FasterCOCO
                from faster_coco_eval import COCOeval_faster
            except ImportError as error:
                raise UserError("faster-coco-eval is not installed: pip install faster-coco-eval") from error
            coco, evaluator = FasterCOCO(coco.dataset), COCOeval_faster
        else:
            raise UserError(f"unknown backend {backend!r}; choose 'pycocotools' or 'faster-coco-eval'")
        if results:
            detected = coco.loadRes(list(results))
        else:  # loadRes cannot load an empty list
            detected = type(coco)()
            detected.dataset = {**coco.dataset, "annotations": []}
            detected.createIndex()
        evaluation = evaluator(coco, detected, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {n: None if v < 0 else round(100 * float(v), 4) for n, v in zip(FIGURES, np.asarray(evaluation.stats))}


def to_results(detections: Detections, image_id: int, category_ids: Sequence[int]) -> list[dict[str, Any]]:
    """One picture's detections in COCO's form."""
    corner, opposite = detections.boxes_xyxy[:, :2], detections.boxes_xyxy[:, 2:]
    boxes = torch.cat([corner, opposite - corner], 1).tolist()
    return [
        {"image_id": image_id, "category_id": category_ids[label], "bbox": box, "score": score}
        for label, box, score in zip(detections.labels.tolist(), boxes, detections.scores.tolist())
    ]


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    dataset: DetectionDataset,
    stages: int | None = None,
    batch_size: int = 8,
    top_k: int = 100,
    backend: str = "pycocotools",
    workers: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Evaluate a detector and every stage of it.

    Args:
        model: the detector.
        dataset: pictures and ground truth. Where it has no transform, pictures are prepared as the model's
            configuration says.
        stages: how many REGO stages to run; all by default.
        batch_size: pictures at a time.
        top_k: detections kept of each picture.
        backend: see :func:`average_precision`.
        workers: processes that prepare pictures.
        progress: show a progress bar.

    Returns:
        The figures of the last stage, and ``stages``: the figures by stage, of which number 0 is the base detector.

    Raises:
        UserError: when the model does not know all of the data's categories.
    """
    config = getattr(model, "model_config", None)
    category_ids = _category_ids(config, dataset)
    coco = dataset.coco
    if dataset.transform is None and config is not None:
        dataset = copy.copy(dataset)
        dataset.transform = make_transform(config.augment, config.image_size, train=False)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    batches = DataLoader(
        dataset,
        batch_size,
        num_workers=workers,
        collate_fn=partial(collate, multiple=32),
        generator=torch.Generator(),  # or a seed for the workers would be drawn from everybody's generator
    )
    results: list[list[dict[str, Any]]] = []
    for images, targets in track(batches, "evaluating", progress):
        sizes = torch.tensor([target.size for target in targets])
        found = detections_by_stage(model, images.to(device), sizes, stages, top_k)
        results = results or [[] for _ in found]
        for stage, detections in zip(results, found):
            for one, target in zip(detections, targets):
                stage += to_results(one, target.image_id, category_ids)
    model.train(was_training)
    by_stage = [{"stage": i, **average_precision(coco, r, backend)} for i, r in enumerate(results)]
    return {**{name: by_stage[-1][name] for name in FIGURES}, "images": len(dataset), "stages": by_stage}


def _category_ids(config: ModelConfig | None, dataset: DetectionDataset) -> tuple[int, ...]:
    """COCO's id of each of the model's labels: its own where it has them, the data's where it does not.

    A model may know more than the data, as a published one with a column for every number up to 90; what it finds of
    other categories counts for nothing.
    """
    own, wanted = config.category_ids if config is not None else (), dataset.category_ids
    if set(wanted) <= set(own):
        return own
    if not own or own == tuple(range(len(wanted))):  # numbers of a model that was built without names of classes
        return wanted
    raise UserError(
        f"the data has categories that the model does not know: {sorted(set(wanted) - set(own))}; give the data that "
        "it was trained for"
    )
