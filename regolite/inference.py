"""Inference: convert predictions to scores, classes and boxes in pixels of the original image."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor, nn

from regolite.boxes import to_pixels
from regolite.data import batch_images, list_images, make_transform, read_image
from regolite.data.images import ImageSource, check_image
from regolite.errors import UserError
from regolite.models.config import config_of
from regolite.models.detector import as_detector
from regolite.types import Detections, DetectorOutput, ImageBatch, Prediction
from regolite.utils.modes import evaluating
from regolite.utils.validation import of_kind, share, whole


@runtime_checkable
class HasDetections(Protocol):
    """A detector that returns detections instead of a :class:`~regolite.types.DetectorOutput`."""

    def detections(self, images: ImageBatch, sizes: Int[Tensor, "B 2"], top_k: int) -> list[Detections]:
        """The highest-scoring detections of each image."""
        ...


def to_detections(
    prediction: Prediction, sizes: Int[Tensor, "B 2"], scoring: str, top_k: int = 100
) -> list[Detections]:
    """The highest-scoring detections of each image, without non-maximum suppression.

    With ``"sigmoid"`` the top pairs of query and class are taken, so a query may give several classes (Deformable
    DETR). With ``"softmax"`` every query gives its best class other than "no object" (DETR).

    Args:
        prediction: logits and boxes.
        sizes: height and width of the original images in pixels.
        scoring: ``"softmax"`` or ``"sigmoid"``.
        top_k: number of detections per image.
    """
    logits = prediction.logits.float()
    boxes = to_pixels(prediction.boxes.float(), sizes.to(prediction.boxes.device))
    if scoring == "sigmoid":
        classes = logits.shape[2]
        scores, flat = logits.sigmoid().flatten(1).topk(min(top_k, logits[0].numel()), dim=1)
        queries, labels = flat // classes, flat % classes
    else:
        best, label = logits.softmax(-1)[..., :-1].max(-1)
        scores, queries = best.topk(min(top_k, best.shape[1]), dim=1)
        labels = label.gather(1, queries)
    chosen = boxes.gather(1, queries[..., None].expand(-1, -1, 4))
    return [Detections(s, c, b, q) for s, c, b, q in zip(scores.cpu(), labels.cpu(), chosen.cpu(), queries.cpu())]


def run(model: nn.Module, images: ImageBatch, stages: int | None = None) -> DetectorOutput:
    """Run any detector; ``stages`` limits the number of REGO stages."""
    return model(images, stages) if as_detector(model).num_stages else model(images)


def scoring_of(model: nn.Module) -> str:
    """How a detector turns logits into scores: ``"softmax"`` or ``"sigmoid"``."""
    return as_detector(model).scoring


def check_stages(model: nn.Module, stages: int | None) -> None:
    """Check that a detector has at least this number of REGO stages; None means all of them.

    Raises:
        UserError: the model is not a detector, or has fewer stages.
    """
    of_kind("model", model, nn.Module, "a detector: regolite.load and regolite.build give one")
    most = as_detector(model).num_stages
    if stages is not None and whole("stages", stages) > most:
        has = f"this model has 0 to {most}" if most else "this model has no REGO: give 0, or leave it out"
        raise UserError(f"stages is {stages}, and {has}")


def detections_by_stage(
    model: nn.Module, images: ImageBatch, sizes: Int[Tensor, "B 2"], stages: int | None = None, top_k: int = 100
) -> list[list[Detections]]:
    """Detect objects in a batch: for each stage, the base detector first, the detections of each image.

    A detector whose output is not a :class:`~regolite.types.DetectorOutput` implements :class:`HasDetections` instead
    and has one stage, see :mod:`regolite.models.baselines`.

    Args:
        model: the detector.
        images: the preprocessed images.
        sizes: height and width of the original images in pixels.
        stages: number of REGO stages; all by default.
        top_k: number of detections per image.
    """
    if isinstance(model, HasDetections):
        return [model.detections(images, sizes, top_k)]
    images = replace(images, original_sizes=sizes)
    return [to_detections(p, sizes, scoring_of(model), top_k) for p in run(model, images, stages).by_stage]


@torch.inference_mode()
def detect(
    model: nn.Module,
    images: ImageSource | Iterable[ImageSource],
    threshold: float | int = 0.3,
    stages: int | None = None,
    top_k: int = 100,
) -> list[Detections]:
    """Detect objects in images of any size.

    Args:
        model: a detector from :func:`regolite.load` or :func:`regolite.build`.
        images: one or several images: any source of :func:`regolite.data.read_image`, and folders and patterns as
            ``photos/*.jpg``, which :func:`regolite.data.list_images` expands. The EXIF orientation of files is applied.
        threshold: least score of a detection, from 0 to 1. Detectors trained with the focal loss have low scores: the
            everyday detector has its best F1 on unseen images at 0.3.
        stages: number of REGO stages, 0 for the base detector only; all by default.
        top_k: most detections per image.

    Returns:
        One :class:`~regolite.types.Detections` per image, highest-scoring first, boxes ``xyxy`` in pixels of the image.

    Raises:
        UserError: a file is missing or is not an image, or a number is out of range.
    """
    threshold, top_k = share("threshold", threshold), whole("top_k", top_k, 1)
    check_stages(model, stages)
    return [by_stage[-1].above(threshold) for by_stage in _detect_each(model, list_images(images), stages, top_k)]


@torch.inference_mode()
def detect_by_stage(
    model: nn.Module, image: ImageSource, threshold: float | int = 0.3, top_k: int = 100
) -> list[Detections]:
    """Detect objects in one image, with the detections of every stage.

    Args:
        model: a detector from :func:`regolite.load` or :func:`regolite.build`.
        image: any source of :func:`regolite.data.read_image`.
        threshold: least score of a detection, from 0 to 1, as in :func:`detect`.
        top_k: most detections per stage.

    Returns:
        One :class:`~regolite.types.Detections` per stage, the base detector's first; the last is the result of
        :func:`detect`.

    Raises:
        UserError: the file is missing or is not an image, or a number is out of range.
    """
    threshold, top_k = share("threshold", threshold), whole("top_k", top_k, 1)
    check_stages(model, None)
    [by_stage] = _detect_each(model, [image], None, top_k)
    return [detections.above(threshold) for detections in by_stage]


def _detect_each(
    model: nn.Module, sources: list[ImageSource], stages: int | None, top_k: int
) -> Iterator[list[Detections]]:
    """The detections by stage of each image, one image at a time."""
    need = "the model does not say how to prepare images: set its model_config (regolite.configure)"
    config, device = config_of(model, need), next(model.parameters()).device
    checked = [_checked(source, number) for number, source in enumerate(sources, 1)]  # all, before the first detection
    transform = make_transform(config.augment, config.image_size, train=False)
    with evaluating(model):
        for source in checked:
            image = read_image(source)  # one at a time: a folder of images may not fit into memory
            batch = batch_images([transform(image)], multiple=32).to(device)
            size = (image.height, image.width)
            found = detections_by_stage(model, batch, torch.tensor([size]), stages, top_k)
            yield [replace(detections, classes=config.classes, size=size) for [detections] in found]


def _checked(source: ImageSource, number: int) -> ImageSource:
    """Check the header of a file, or read an image in memory; errors give the number of the image."""
    if isinstance(source, (str, os.PathLike)):
        check_image(source)
        return source
    try:
        return read_image(source)
    except UserError as error:
        raise UserError(f"number {number} of the images: {error}") from error
