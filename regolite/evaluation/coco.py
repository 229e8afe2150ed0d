"""COCO's average precision of every stage of a detector.

pycocotools computes the figures; faster-coco-eval gives the same ones several times as fast, where it is installed and
asked for. Figures are percentages; one that cannot be computed, since no object has that size, is None.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
from collections.abc import Sequence
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
from regolite.types import ImageBatch, Target, stage_name
from regolite.utils import distributed
from regolite.utils.files import write_atomic
from regolite.utils.modes import evaluating
from regolite.utils.progress import track
from regolite.utils.validation import of_kind, whole

FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


@dataclass(frozen=True)
class Measured:
    """What COCO's evaluation gives.

    Attributes:
        figures: the figures by the names of :data:`FIGURES`, in percent.
        precision: precision at T demands on the overlap (IoU 0.50, 0.55, ..., 0.95), R recalls (0, 0.01, ..., 1) and
            for K categories in the order of their ids; all sizes, 100 detections; nan where a category has no object.
    """

    figures: dict[str, Any]
    precision: Float[np.ndarray, "T R K"]

    @property
    def by_category(self) -> Float[np.ndarray, "K"]:
        """AP of each category in percent; their mean is AP."""
        return 100 * self.precision.mean((0, 1))

    def curve(self, iou: float = 0.5) -> Float[np.ndarray, "R"]:
        """Precision in percent at each recall, the mean over the categories that have objects.

        Args:
            iou: the demand on the overlap, one of the T.
        """
        at = self.precision[round((iou - 0.5) / 0.05)]
        return 100 * at[:, ~np.isnan(at[0])].mean(1)


def average_precision(coco: COCO, results: Sequence[dict[str, Any]], backend: str = "pycocotools") -> dict[str, Any]:
    """COCO's twelve figures for boxes, in percent: the figures of :func:`measure`, which takes the same."""
    return measure(coco, results, backend).figures


def measure(coco: COCO, results: Sequence[dict[str, Any]], backend: str = "pycocotools") -> Measured:
    """COCO's evaluation of boxes.

    Args:
        coco: the ground truth.
        results: detections in COCO's form: ``image_id``, ``category_id``, ``bbox`` (corner, width, height in pixels),
            ``score``.
        backend: ``"pycocotools"`` or ``"faster-coco-eval"``.

    Returns:
        The twelve figures, and the precision that they are means of.

    Raises:
        UserError: when there is no such backend, or it is not installed.
    """
    own_coco, evaluator = backend_of(backend)
    with contextlib.redirect_stdout(io.StringIO()):  # both libraries print whatever they do
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
    """What holds annotations and what evaluates, of a library.

    Raises:
        UserError: when there is no such backend, or it is not installed.
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
    """Evaluate a detector and every stage of it.

    Args:
        model: the detector.
        dataset: images and ground truth. Where it has no transform, images are prepared as the model's
            configuration says.
        stages: how many REGO stages to run; all by default.
        batch_size: images at a time.
        top_k: detections kept of each image.
        backend: see :func:`average_precision`.
        workers: processes that prepare images.
        progress: show a progress bar.
        detections: a file to write the last stage's detections to, in COCO's form, for other tools; none by default.
        draws: how many draws of the images say how sure the figures are, see :mod:`regolite.evaluation.bootstrap`.
        on_broken: ``"stop"`` at an image that cannot be read, or ``"skip"``: leave it out, with its ground truth.

    Returns:
        The figures of the last stage, the number of ``images`` that were measured, and ``stages``: the figures by
        stage, of which number 0 is the base detector. With draws also, as
        :func:`regolite.evaluation.bootstrap.intervals` has them, ``intervals`` and ``classes``. If images were left
        out, ``broken``: what is wrong with each.

    Raises:
        UserError: when the model does not know all of the data's categories or has no such stages, a number makes no
            sense, there is no such backend, an image cannot be read (with ``"skip"``: none, or many in a row), or the
            data has no annotation at all and no file of detections is asked for.
    """
    backend_of(backend)  # now, and not after an hour
    draws = whole("draws", draws, 0)
    of_kind("dataset", dataset, DetectionDataset, "a data set: regolite.data.open_data(FOLDER) gives one")
    if detections is None and not dataset.is_annotated:
        raise UserError(
            f"{getattr(dataset, 'file', 'the data')}: {len(dataset)} images without a single annotation, nothing to "
            "measure: annotate some, or only save the detections"
        )
    if on_broken not in ("stop", "skip"):
        raise UserError(f"on_broken={on_broken!r} is not one of 'stop', 'skip'")
    how = (stages, batch_size, top_k, workers, progress)
    (results, broken), figures = _detect_all(model, dataset, *how, skip=on_broken == "skip"), None
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
    """All that a detector finds in a data set, in COCO's form: one list a stage, number 0 the base detector's.

    Several processes share the batches. A batch holds the same images however many there are, so that they find the
    very same; the first one gets everything, the others nothing.

    Arguments and errors are those of :func:`evaluate`, which measures these lists.
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
    """All that a detector finds, by stage, and what is wrong with images that were skipped, by index."""
    check_stages(model, stages)
    of_kind("dataset", dataset, DetectionDataset, "a data set: regolite.data.open_data(FOLDER) gives one")
    batch_size, top_k = whole("batch_size", batch_size, 1), whole("top_k", top_k, 1)
    workers = whole("workers", workers, 0)
    category_ids = category_ids_of(getattr(model, "model_config", None), dataset)
    dataset, device = prepared(model, dataset), next(model.parameters()).device
    every = torch.arange(len(dataset)).split(batch_size)
    batches = DataLoader(
        _Items(dataset),
        batch_sampler=[batch.tolist() for batch in every[distributed.rank() :: distributed.world_size()]],
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # or a seed for the workers would be drawn from everybody's generator
    )
    results: list[list[list[dict[str, Any]]] | None] = []  # of each batch: of each stage
    broken: dict[int, str] = {}
    with evaluating(model):
        for batch, errors in track(batches, "evaluating", progress and distributed.rank() == 0):
            if errors and not skip:
                raise next(iter(errors.values()))
            broken |= {i: str(error) for i, error in errors.items()}
            if batch is None:  # all of it is broken
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
    broken = {i: said for _, part in shares for i, said in part.items()}
    _check_broken(sorted(broken.items()), len(dataset))
    in_order = [batch for turn in zip_longest(*(part for part, _ in shares)) for batch in turn if batch is not None]
    return [list(chain.from_iterable(stage)) for stage in zip(*in_order)], broken


class _Items(Dataset):
    """The images of a data set with their indices; where one cannot be read, the error that says so."""

    def __init__(self, dataset: DetectionDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, i: int) -> tuple[int, tuple[Float[Tensor, "3 H W"], Target] | UserError]:
        return i, item_or_error(self.dataset, i)


def _collate(items: list[tuple[int, Any]]) -> tuple[tuple[ImageBatch, list[Target]] | None, dict[int, UserError]]:
    """The padded batch of the images that could be read, None for none, and the errors of the others by index."""
    errors = {i: found for i, found in items if isinstance(found, UserError)}
    sound = [found for i, found in items if i not in errors]
    return collate(sound, multiple=32) if sound else None, errors


def _check_broken(broken: list[tuple[int, str]], count: int) -> None:
    """Go on without single images, but not without a disk.

    Raises:
        UserError: all of the images are broken, or as many in a row as no training goes on with.
    """
    rows = zip(broken, broken[TRIES - 1 :])
    if broken and (len(broken) == count or any(last[0] - first[0] == TRIES - 1 for first, last in rows)):
        raise UserError(f"{len(broken)} of {count} images cannot be read, is the disk there? The first: {broken[0][1]}")


def prepared(model: nn.Module, dataset: DetectionDataset) -> DetectionDataset:
    """The data, its images as the model wants them; at full size, and that is said, where nobody says how."""
    config = getattr(model, "model_config", None)
    if dataset.transform is not None:
        return dataset
    if config is None:
        logging.getLogger("regolite").warning(
            "neither the data set has a transform nor the model a model_config: images are taken at full size"
        )
        return dataset
    dataset = copy.copy(dataset)
    dataset.transform = make_transform(config.augment, config.image_size, train=False)
    return dataset


def with_shared_classes(dataset: DetectionDataset, config: ModelConfig) -> DetectionDataset:
    """The data with the classes that the model knows too, by name; under the model's category ids.

    Raises:
        UserError: when they have no class in common.
    """
    shared = [name for name in config.classes if name in dataset.classes]
    if not shared:
        raise UserError(
            f"the data has no class that the model knows: {', '.join(dataset.classes[:5])}, ... against "
            f"{', '.join(config.classes[:5])}, ..."
        )
    return dataset.of_classes(shared, [config.category_ids[config.classes.index(name)] for name in shared])


def category_ids_of(config: ModelConfig | None, dataset: DetectionDataset) -> tuple[int, ...]:
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


def table_by_stage(figures: Mapping[str, Any]) -> str:
    """COCO's figures of every stage as a table of text, in percent.

    Args:
        figures: what :func:`regolite.evaluate` gives, or a line of ``metrics.jsonl`` of an evaluation.
    """
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl")
    rows = ["".join([" " * 14, *(f"{name:>7}" for name in names)])]
    for stage, measured in enumerate(figures["stages"]):
        values = (f"{'-' if measured[n] is None else format(measured[n], '.1f'):>7}" for n in names)
        rows.append("".join([f"{stage_name(stage):14}", *values]))
    return "\n".join(rows)
