"""``DetectionDataset``: the interface of all detection datasets, read from files or synthetic.

It converts from COCO's conventions (its own class ids, ``x, y, width, height`` boxes in pixels of the file, crowds) to
those of the package (contiguous labels, ``cxcywh`` boxes in [0, 1], no crowds). Evaluation uses ``dataset.coco``, in
COCO's conventions.
"""

from __future__ import annotations

import contextlib
import copy
import io
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.ops import box_convert

from regolite.data.transforms import to_pixels
from regolite.errors import UserError, did_you_mean
from regolite.types import Target

TRIES = 20  # consecutive broken images that may be skipped; with more, the disk has failed


@dataclass
class Objects:
    """Annotations of one image or of a whole file as a structure of arrays, instead of a million dictionaries.

    Attributes:
        ids: COCO's annotation ids.
        labels: contiguous class ids.
        boxes: corner, width and height (COCO's ``bbox``) in pixels of the file.
        areas: COCO's ``area``, by which evaluation separates small, medium and large objects.
        crowd: True for a region of many objects; not a training target.
        decided_by: id of the annotation that decides the class of this one, or -1 (``regolite.data.scenes``).
    """

    ids: Int[np.ndarray, "N"]
    labels: Int[np.ndarray, "N"]
    boxes: Float[np.ndarray, "N 4"]
    areas: Float[np.ndarray, "N"]
    crowd: Bool[np.ndarray, "N"]
    decided_by: Int[np.ndarray, "N"]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: Any) -> Objects:
        """The objects at ``rows``: a slice, a mask or indices."""
        columns = (self.ids, self.labels, self.boxes, self.areas, self.crowd, self.decided_by)
        return Objects(*(column[rows] for column in columns))

    def targets(self, height: int | Int[np.ndarray, "N"], width: int | Int[np.ndarray, "N"]) -> Objects:
        """The training targets: boxes clipped to the image (or each to its own image); no crowds, no empty boxes."""
        frame = np.stack([width, height], axis=-1)
        start = np.clip(self.boxes[:, :2], 0, frame)
        extent = np.clip(self.boxes[:, :2] + self.boxes[:, 2:], 0, frame) - start
        clipped = Objects(self.ids, self.labels, np.hstack([start, extent]), self.areas, self.crowd, self.decided_by)
        return clipped[~self.crowd & (extent > 0).all(1)]


class DetectionDataset(Dataset, ABC):
    """Images with COCO ground truth; ``dataset[i]`` is ``(pixels Float[3 H W], Target)``.

    Subclasses implement ``image``, ``objects``, ``size`` and ``file_name``.

    Attributes:
        classes: names of the classes in the order of the labels.
        category_ids: COCO's id of each class.
        image_ids: COCO's id of each image.
        transform: called with the image and its boxes and labels (``regolite.data.transforms``); None only
            normalizes.
    """

    classes: tuple[str, ...]
    category_ids: tuple[int, ...]
    image_ids: list[int]
    transform: Callable[..., Any] | None = None

    @abstractmethod
    def image(self, i: int) -> Image.Image:
        """Image ``i`` as PIL RGB, untransformed."""

    @abstractmethod
    def objects(self, i: int) -> Objects:
        """All annotations of image ``i``, crowds included."""

    @abstractmethod
    def size(self, i: int) -> tuple[int, int]:
        """Height and width of image ``i`` in pixels, untransformed."""

    @abstractmethod
    def file_name(self, i: int) -> str:
        """The file name of image ``i`` in COCO's JSON."""

    def sample(self, i: int) -> tuple[Image.Image, Objects]:
        """Image ``i`` with its annotations, the input of the transform; copy-paste augmentation changes both."""
        return self.image(i), self.objects(i)

    @property
    def is_annotated(self) -> bool:
        """Whether there is any annotation, crowds included."""
        return any(len(self.objects(i)) for i in range(len(self)))

    @property
    def categories(self) -> dict[int, str]:
        """Names of the classes by COCO category id."""
        return dict(zip(self.category_ids, self.classes, strict=True))

    def of_classes(self, classes: Sequence[str], category_ids: Sequence[int] | None = None) -> DetectionDataset:
        """A view of the same images with the objects of these classes only.

        Args:
            classes: names of the classes, in the order of the new labels.
            category_ids: their new category ids; unchanged by default.

        Raises:
            UserError: the dataset lacks one of the classes; the message suggests the closest match.
        """
        return OfClasses(self, classes, category_ids)

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, i: int) -> tuple[Float[Tensor, "3 H W"], Target]:
        i = range(len(self))[i]
        image, objects = self.sample(i)
        size = self.size(i)
        objects = objects.targets(*size)
        corners = box_convert(torch.from_numpy(objects.boxes).float(), "xywh", "xyxy")
        moved = {
            "boxes": tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=size),
            "labels": torch.from_numpy(objects.labels),
        }
        pixels, moved = (self.transform or to_pixels())(image, moved)
        height, width = pixels.shape[-2:]
        boxes = moved["boxes"].as_subclass(Tensor) / torch.tensor([width, height, width, height])
        boxes = box_convert(boxes, "xyxy", "cxcywh")
        return pixels, Target(moved["labels"], boxes, self.image_ids[i], size)

    def relations(self, i: int) -> list[tuple[int, int]]:
        """Ground-truth relations of image ``i``: pairs (decided, decider) of target indices.

        The indices are those of ``self[i][1]`` if the transform drops no object (only random crops do). Empty for data
        without ``decided_by``.
        """
        objects = self.objects(i).targets(*self.size(i))
        place = {identity: n for n, identity in enumerate(objects.ids.tolist())}
        return [(n, place[decider]) for n, decider in enumerate(objects.decided_by.tolist()) if decider in place]

    @cached_property
    def coco(self) -> COCO:
        """Ground truth of these images for pycocotools: COCO's ids, crowds included, no segmentations."""
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for i, image_id in enumerate(self.image_ids):
            height, width = self.size(i)
            images.append({"id": image_id, "file_name": self.file_name(i), "height": height, "width": width})
            annotations += _to_coco(self.objects(i), image_id, self.category_ids)
        coco = COCO()
        coco.dataset = {
            "info": {},
            "licenses": [],
            "images": images,
            "annotations": annotations,
            "categories": [
                {"id": category, "name": name, "supercategory": name}
                for category, name in zip(self.category_ids, self.classes, strict=True)
            ],
        }
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
            coco.createIndex()
        return coco


def item_or_error(dataset: Dataset, i: int) -> tuple[Float[Tensor, "3 H W"], Target] | UserError:
    """``dataset[i]``, or an error that names the image if it cannot be read or transformed."""
    try:
        return dataset[i]
    except UserError as error:
        return error
    except Exception as error:  # for example, in its augmentation
        name = dataset.file_name(i) if isinstance(dataset, DetectionDataset) else f"number {i}"
        named = UserError(f"image {name} cannot be prepared ({type(error).__name__}: {error}): take it out of the data")
        named.__cause__ = error
        return named


def _to_coco(objects: Objects, image_id: int, category_ids: tuple[int, ...]) -> list[dict[str, Any]]:
    """The annotations of one image as COCO dictionaries."""
    columns = (objects.ids, objects.labels, objects.boxes, objects.areas, objects.crowd, objects.decided_by)
    return [
        {
            "id": identity,
            "image_id": image_id,
            "category_id": category_ids[label],
            "bbox": box,
            "area": area,
            "iscrowd": int(crowd),
            **({"decided_by": decider} if decider >= 0 else {}),
        }
        for identity, label, box, area, crowd, decider in zip(*(c.tolist() for c in columns), strict=True)
    ]


class View(DetectionDataset):
    """Base class of datasets that take their images from others; methods delegate unless a subclass overrides them."""

    def place(self, i: int) -> tuple[DetectionDataset, int]:
        """The dataset that image ``i`` comes from, and its index there."""
        raise NotImplementedError

    def image(self, i: int) -> Image.Image:
        """Image ``i`` as PIL RGB, untransformed."""
        dataset, i = self.place(i)
        return dataset.image(i)

    def objects(self, i: int) -> Objects:
        """All annotations of image ``i``, crowds included."""
        dataset, i = self.place(i)
        return dataset.objects(i)

    def sample(self, i: int) -> tuple[Image.Image, Objects]:
        """Image ``i`` with its annotations, from ``sample`` of the underlying dataset."""
        dataset, i = self.place(i)
        return dataset.sample(i)

    def size(self, i: int) -> tuple[int, int]:
        """Height and width of image ``i`` in pixels."""
        dataset, i = self.place(i)
        return dataset.size(i)

    def file_name(self, i: int) -> str:
        """The file name of image ``i``."""
        dataset, i = self.place(i)
        return dataset.file_name(i)


class OfClasses(View):
    """A dataset restricted to some classes; images without any of them stay, with no objects.

    It serves to evaluate a detector on data with more classes than the detector has.

    Args:
        dataset: the dataset.
        classes: names of the classes to keep, in the order of the new labels.
        category_ids: their new category ids; unchanged by default.

    Raises:
        UserError: the dataset lacks one of the classes; the message suggests the closest match.
    """

    def __init__(
        self, dataset: DetectionDataset, classes: Sequence[str], category_ids: Sequence[int] | None = None
    ) -> None:
        for name in classes:
            if name not in dataset.classes:
                raise UserError(f"the data has no class {name!r}; {did_you_mean(name, dataset.classes)}")
        self.dataset = dataset
        self.classes = tuple(classes)
        own_ids = [dataset.category_ids[dataset.classes.index(name)] for name in classes]
        self.category_ids = tuple(own_ids if category_ids is None else category_ids)
        self.image_ids = dataset.image_ids
        self.transform = dataset.transform
        self._label = np.full(len(dataset.classes), -1)  # new label by old one
        self._label[[dataset.classes.index(name) for name in classes]] = np.arange(len(classes))

    def place(self, i: int) -> tuple[DetectionDataset, int]:
        """The dataset, and the same index."""
        return self.dataset, i

    def objects(self, i: int) -> Objects:
        """The annotations of image ``i`` with the kept classes, crowds included."""
        return self._of_classes(self.dataset.objects(i))

    def sample(self, i: int) -> tuple[Image.Image, Objects]:
        """Image ``i`` with its annotations of the kept classes, from ``sample`` of the underlying dataset."""
        image, objects = self.dataset.sample(i)
        return image, self._of_classes(objects)

    def _of_classes(self, objects: Objects) -> Objects:
        labels = self._label[objects.labels]
        kept = copy.copy(objects)
        kept.labels = labels
        return kept[labels >= 0]
