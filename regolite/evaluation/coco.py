"""COCO average precision of every stage of a detector.

Figures are computed by pycocotools, or by the optional backend faster-coco-eval, which gives the same figures several
times faster. Figures are percentages; a figure without objects of its size is None.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from regolite.data import DetectionDataset, collate, make_transform
from regolite.data.dataset import TRIES, item_or_error
from regolite.data.views import OfImages
from regolite.errors import UserError
from regolite.evaluation.bootstrap import intervals
from regolite.inference import check_stages, detections_by_stage
from regolite.models.config import ModelConfig
from regolite.models.detector import as_detector
from regolite.types import ImageBatch, Target, stage_name
from regolite.utils import distributed
from regolite.utils.files import write_atomic
from regolite.utils.modes import evaluating
from regolite.utils.progress import track
from regolite.utils.validation import of_kind, whole

FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


@dataclass(frozen=True)
class Measured:
    """The result of a COCO evaluation.

    Attributes:
        figures: the figures by the names of :data:`FIGURES`, in percent.
        precision: precision at T IoU thresholds (0.50, 0.55, ..., 0.95) and R recalls (0, 0.01, ..., 1), of K
            categories in the order of their ids; all sizes, 100 detections; nan if a category has no object.
    """

    figures: dict[str, Any]
    precision: Float[np.ndarray, "T R K"]

    @property
    def by_category(self) -> Float[np.ndarray, "K"]:
        """AP of each category in percent; their mean is AP."""
        return 100 * self.precision.mean((0, 1))

    def curve(self, iou: float = 0.5) -> Float[np.ndarray, "R"]:
        """The precision-recall curve in percent, averaged over the categories with objects.

        Args:
            iou: the IoU threshold, one of the T.
        """
        at = self.precision[round((iou - 0.5) / 0.05)]
        return 100 * at[:, ~np.isnan(at[0])].mean(1)


def average_precision(coco: COCO, results: Sequence[dict[str, Any]], backend: str = "pycocotools") -> dict[str, Any]:
    """COCO's twelve figures for boxes, in percent: the figures of :func:`measure` with the same arguments."""
    return measure(coco, results, backend).figures


def measure(coco: COCO, results: Sequence[dict[str, Any]], backend: str = "pycocotools") -> Measured:
    """Evaluate boxes as COCO does.

    Args:
        coco: the ground truth.
        results: detections in COCO format: ``image_id``, ``category_id``, ``bbox`` (corner, width, height in pixels),
            ``score``.
        backend: ``"pycocotools"`` or ``"faster-coco-eval"``.

    Returns:
        The twelve figures, and the precision from which they are computed.

    Raises:
        UserError: the backend is unknown or not installed.
    """
    own_coco, evaluator = backend_of(backend)
    with contextlib.redirect_stdout(io.StringIO()):  # both libraries print their progress
        if own_coco is not COCO:
            coco = own_coco(coco.dataset)
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
    values = zip(FIGURES, np.asarray(evaluation.stats))
    precision = np.asarray(evaluation.eval["precision"])[..., 0, -1]  # all sizes, most detections
    return Measured(
        {name: None if value < 0 else round(100 * float(value), 4) for name, value in values},
        np.where(precision < 0, np.nan, precision),
    )


def backend_of(name: str) -> tuple[Any, Any]:
    """The annotation class and the evaluation class of a backend.

    Raises:
        UserError: the backend is unknown or not installed.
    """
    if name == "pycocotools":
        return COCO, COCOeval
    if name != "faster-coco-eval":
        raise UserError(f"unknown backend {name!r}; choose 'pycocotools' or 'faster-coco-eval'")
    try:
        from faster_coco_eval import COCO as FasterCOCO
        from faster_coco_eval import COCOeval_faster
    except ImportError as error:
        raise UserError("faster-coco-eval is not installed: pip install faster-coco-eval") from error
    return FasterCOCO, COCOeval_faster


def evaluate(
    model: nn.Module,
    dataset: DetectionDataset,
    stages: int | None = None,
    batch_size: int = 8,
    top_k: int = 100,
    backend: str = "pycocotools",
    workers: int = 0,
    progress: bool = True,
    detections: str | Path | None = None,
    draws: int = 0,
    on_broken: str = "stop",
) -> dict[str, Any]:
    """Evaluate every stage of a detector.

    Args:
        model: the detector.
        dataset: images and ground truth. Without a transform, images are prepared as in the model's configuration.
        stages: number of REGO stages; all by default.
        batch_size: images per batch.
        top_k: detections per image.
        backend: see :func:`measure`.
        workers: number of DataLoader workers.
        progress: show a progress bar.
        detections: file for the last stage's detections in COCO format; not written by default.
        draws: number of bootstrap samples for confidence intervals, see :mod:`regolite.evaluation.bootstrap`.
        on_broken: ``"stop"`` at an image that cannot be read, or ``"skip"`` it with its ground truth.

    Returns:
        The figures of the last stage, the number of evaluated ``images``, and ``stages``: the figures by stage, the
        base detector's first. With ``draws`` also ``intervals`` and ``classes``, see
        :func:`regolite.evaluation.bootstrap.intervals`. If images were skipped, ``broken``: an error message for each.

    Raises:
        UserError: the model lacks categories of the data or has fewer stages, a number is out of range, the backend is
            unavailable, an image cannot be read (with ``"skip"``: all images, or many in a row), or the data has no
            annotations and ``detections`` is not given.
    """
    backend_of(backend)  # fail now, not after an hour
    draws = whole("draws", draws, 0)
    of_kind("dataset", dataset, DetectionDataset, "a dataset: regolite.data.open_data(FOLDER) gives one")
    if detections is None and not dataset.is_annotated:
        raise UserError(
            f"{getattr(dataset, 'file', 'the data')}: {len(dataset)} images without a single annotation, nothing to "
            "measure: annotate some, or only save the detections"
        )
    if on_broken not in ("stop", "skip"):
        raise UserError(f"on_broken={on_broken!r} is not one of 'stop', 'skip'")
    if detections is not None and Path(detections).is_dir():
        raise UserError(f"detections={detections} is a folder: give a file")
    figures: dict[str, Any] = {}
    results, broken = _detect_all(
        model, dataset, stages, batch_size, top_k, workers, progress, skip=on_broken == "skip"
    )
    if distributed.rank() == 0:
        if broken:
            dataset = OfImages(dataset, [i for i in range(len(dataset)) if i not in broken])
        if detections is not None:
            write_atomic(detections, json.dumps(results[-1]).encode())
        by_stage = [{"stage": i, **average_precision(dataset.coco, r, backend)} for i, r in enumerate(results)]
        figures = {**{name: by_stage[-1][name] for name in FIGURES}, "images": len(dataset), "stages": by_stage}
        if broken:
            figures["broken"] = [broken[i] for i in sorted(broken)]
        if draws:
            figures |= intervals(dataset.coco, results, draws, progress=progress)
    return distributed.from_first(figures)


def detect_all(
    model: nn.Module,
    dataset: DetectionDataset,
    stages: int | None = None,
    batch_size: int = 8,
    top_k: int = 100,
    workers: int = 0,
    progress: bool = True,
) -> list[list[dict[str, Any]]]:
    """Detections of a detector in a dataset, in COCO format: one list per stage, the base detector's first.

    In a distributed run the processes share the batches. The composition of the batches is independent of the number of
    processes, so the results are identical. Rank 0 gets all results, the other ranks none.

    Arguments and errors are those of :func:`evaluate`.
    """
    return _detect_all(model, dataset, stages, batch_size, top_k, workers, progress, skip=False)[0]


@torch.inference_mode()
def _detect_all(
    model: nn.Module,
    dataset: DetectionDataset,
    stages: int | None,
    batch_size: int,
    top_k: int,
    workers: int,
    progress: bool,
    skip: bool,
) -> tuple[list[list[dict[str, Any]]], dict[int, str]]:
    """Detections by stage, and error messages of the skipped images by index."""
    check_stages(model, stages)
    of_kind("dataset", dataset, DetectionDataset, "a dataset: regolite.data.open_data(FOLDER) gives one")
    batch_size, top_k = whole("batch_size", batch_size, 1), whole("top_k", top_k, 1)
    workers = whole("workers", workers, 0)
    category_ids = category_ids_of(as_detector(model).model_config, dataset)
    dataset, device = prepared(model, dataset), next(model.parameters()).device
    every = torch.arange(len(dataset)).split(batch_size)
    batches = DataLoader(
        _Items(dataset),
        batch_sampler=[batch.tolist() for batch in every[distributed.rank() :: distributed.world_size()]],
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # otherwise the workers' seed would be drawn from the global generator
    )
    results: list[list[list[dict[str, Any]]] | None] = []  # by batch and stage
    broken: dict[int, str] = {}
    with evaluating(model):
        for batch, errors in track(batches, "evaluating", progress and distributed.rank() == 0):
            if errors and not skip:
                raise next(iter(errors.values()))
            broken |= {i: str(error) for i, error in errors.items()}
            if batch is None:  # all images are broken
                results.append(None)
                continue
            images, targets = batch
            sizes = torch.tensor([target.size for target in targets])
            by_stage = detections_by_stage(model, images.to(device, non_blocking=True), sizes, stages, top_k)
            results.append(
                [
                    [
                        line
                        for found, target in zip(stage, targets)
                        for line in found.to_coco(target.image_id, category_ids)
                    ]
                    for stage in by_stage
                ]
            )
    shares = distributed.gather((results, broken))
    broken = {i: message for _, part in shares for i, message in part.items()}
    _check_broken(sorted(broken.items()), len(dataset))
    in_order = [batch for turn in zip_longest(*(part for part, _ in shares)) for batch in turn if batch is not None]
    return [list(chain.from_iterable(stage)) for stage in zip(*in_order)], broken


class _Items(Dataset):
    """The items of a dataset with their indices; an error in place of an image that cannot be read."""

    def __init__(self, dataset: DetectionDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, i: int) -> tuple[int, tuple[Float[Tensor, "3 H W"], Target] | UserError]:
        return i, item_or_error(self.dataset, i)


def _collate(items: list[tuple[int, Any]]) -> tuple[tuple[ImageBatch, list[Target]] | None, dict[int, UserError]]:
    """The padded batch of the readable images, or None, and the errors of the others by index."""
    errors = {i: found for i, found in items if isinstance(found, UserError)}
    sound = [found for i, found in items if i not in errors]
    return collate(sound, multiple=32) if sound else None, errors


def _check_broken(broken: list[tuple[int, str]], count: int) -> None:
    """Tolerate single broken images, but not a failed disk.

    Raises:
        UserError: all images are broken, or :data:`regolite.data.dataset.TRIES` in a row.
    """
    rows = zip(broken, broken[TRIES - 1 :])
    if broken and (len(broken) == count or any(last[0] - first[0] == TRIES - 1 for first, last in rows)):
        raise UserError(f"{len(broken)} of {count} images cannot be read, is the disk there? The first: {broken[0][1]}")


def prepared(model: nn.Module, dataset: DetectionDataset) -> DetectionDataset:
    """The dataset with the model's evaluation transform, unless it has one; with neither, full size and a warning."""
    config = as_detector(model).model_config
    if dataset.transform is not None:
        return dataset
    if config is None:
        logging.getLogger("regolite").warning(
            "neither the dataset has a transform nor the model a model_config: images are used at full size"
        )
        return dataset
    dataset = copy.copy(dataset)
    dataset.transform = make_transform(config.augment, config.image_size, train=False)
    return dataset


def with_shared_classes(dataset: DetectionDataset, config: ModelConfig) -> DetectionDataset:
    """The dataset restricted to the classes that the model shares by name, with the model's category ids.

    Raises:
        UserError: data and model have no class in common.
    """
    shared = [name for name in config.classes if name in dataset.classes]
    if not shared:
        raise UserError(
            f"the data has no class that the model knows: {', '.join(dataset.classes[:5])}, ... against "
            f"{', '.join(config.classes[:5])}, ..."
        )
    return dataset.of_classes(shared, [config.category_ids[config.classes.index(name)] for name in shared])


def category_ids_of(config: ModelConfig | None, dataset: DetectionDataset) -> tuple[int, ...]:
    """COCO's category id of each label: the model's own, or the data's if the model has only generic class numbers.

    A model may have more categories than the data, as published models with one logit for every id up to 90; detections
    of other categories are ignored.

    Raises:
        UserError: the data has categories that the model lacks.
    """
    own, wanted = config.category_ids if config is not None else (), dataset.category_ids
    if set(wanted) <= set(own):
        return own
    if not own or own == tuple(range(len(wanted))):  # a model built without class names
        return wanted
    raise UserError(
        f"the data has categories that the model does not know: {sorted(set(wanted) - set(own))}; give the data that "
        "it was trained for"
    )


def table_by_stage(figures: Mapping[str, Any]) -> str:
    """Format COCO's figures of every stage as a text table, in percent.

    Args:
        figures: the result of :func:`regolite.evaluate`, or an evaluation line of ``metrics.jsonl``.
    """
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl")
    rows = ["".join([" " * 14, *(f"{name:>7}" for name in names)])]
    for stage, measured in enumerate(figures["stages"]):
        values = (f"{'-' if measured[n] is None else format(measured[n], '.1f'):>7}" for n in names)
        rows.append("".join([f"{stage_name(stage):14}", *values]))
    return "\n".join(rows)
