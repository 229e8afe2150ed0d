"""Shared data types.

Conventions of the whole package:

- a **mask** is True on padding;
- **boxes** are ``cxcywh`` (center, width, height) in [0, 1] of the *unpadded* image; ``boxes_xyxy`` are corners in
  pixels of the *original* image, in results;
- **labels** are contiguous class ids 0..K-1; COCO's category ids occur only in ``regolite.data`` and
  ``regolite.evaluation``.

In shapes, B is the batch size, Q the number of queries, C the channels of the transformer, K the number of classes and
N the number of objects in an image.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regolite.errors import UserError
from regolite.utils.validation import fits, plain, share, shown


@dataclass
class ImageBatch:
    """Images of different sizes, padded at the right and at the bottom to one tensor.

    Attributes:
        pixels: normalized pixels, zero on padding.
        mask: True on padding.
        sizes: height and width of each image before padding.
        original_sizes: height and width of each image before resizing, or None if unknown. Models do not use them;
            :func:`regolite.record` does.
    """

    pixels: Float[Tensor, "B 3 H W"]
    mask: Bool[Tensor, "B H W"]
    sizes: Int[Tensor, "B 2"]
    original_sizes: Int[Tensor, "B 2"] | None = None

    def __len__(self) -> int:
        return len(self.pixels)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> ImageBatch:
        """The same batch on another device."""
        pixels, mask, sizes = (t.to(device, non_blocking=non_blocking) for t in (self.pixels, self.mask, self.sizes))
        return ImageBatch(pixels, mask, sizes, self.original_sizes)

    def pin_memory(self) -> ImageBatch:
        """The same batch in pinned memory, for asynchronous copies to a GPU; called by ``DataLoader``."""
        pixels, mask, sizes = (t.pin_memory() for t in (self.pixels, self.mask, self.sizes))
        return ImageBatch(pixels, mask, sizes, self.original_sizes)


@dataclass
class FeatureMap:
    """One level of a feature pyramid.

    Attributes:
        tensor: the features.
        mask: True on cells that are entirely padding.
        stride: input pixels per cell.
    """

    tensor: Float[Tensor, "B C h w"]
    mask: Bool[Tensor, "B h w"]
    stride: int


@dataclass
class Memory:
    """Feature maps as one sequence of tokens, the input of a transformer; S is the number of cells of all levels.

    Attributes:
        tokens: the cells' features.
        positions: their position encoding.
        mask: True on padding, or None without padding.
        shapes: height and width of each level.
    """

    tokens: Float[Tensor, "B S C"]
    positions: Float[Tensor, "B S C"]
    mask: Bool[Tensor, "B S"] | None
    shapes: list[tuple[int, int]]


@dataclass
class Prediction:
    """Class logits and a box of each query, predicted by one decoder layer.

    There are K logits with sigmoid scoring, and K + 1 with softmax scoring, the last of which is "no object".
    """

    logits: Float[Tensor, "B Q K"]
    boxes: Float[Tensor, "B Q 4"]


@dataclass
class DetectorOutput:
    """The output of a detector, in the paper's notation.

    Attributes:
        layers: predictions of the base decoder, layer by layer; the last is O(0) of equation (4).
        queries: hidden states of the last base decoder layer, H_dec(0).
        features: the maps X from which glimpses are cut, finest first.
        proposals: the encoder's predictions (two-stage Deformable DETR), or None.
        stages: for each REGO stage the predictions of its decoder layers; the last of stage i is O(i). Empty without
            REGO.
        references: the queries' initial reference points (x, y) or boxes (cxcywh) relative to the unpadded image,
            or None if they have none.
        proposals_by_class: whether the proposals' logits are of classes; otherwise only the first is used, as "object".
        denoising: the output for noised ground truth in training (:mod:`regolite.denoising`), or None.
        query_mask: True on queries that are padding; None except in ``denoising``.
    """

    layers: list[Prediction]
    queries: Float[Tensor, "B Q C"]
    features: list[FeatureMap]
    proposals: Prediction | None = None
    stages: list[list[Prediction]] = field(default_factory=list)
    proposals_by_class: bool = False
    denoising: DetectorOutput | None = None
    query_mask: Bool[Tensor, "B Q"] | None = None
    references: Float[Tensor, "B Q d"] | None = None

    @property
    def by_stage(self) -> list[Prediction]:
        """O(0), O(1), ..., O(S): the base detector's prediction and each stage's."""
        return [self.layers[-1], *(stage[-1] for stage in self.stages)]

    @property
    def final(self) -> Prediction:
        """The final prediction: the last stage's, or without stages the base detector's."""
        return self.by_stage[-1]


@dataclass
class Target:
    """The objects of one image.

    Attributes:
        labels: contiguous class ids.
        boxes: ``cxcywh`` in [0, 1] of the (transformed, unpadded) image, without crowds.
        image_id: COCO's id of the image.
        size: height and width of the original file in pixels, the frame of ``boxes_xyxy``.
    """

    labels: Int[Tensor, "N"]
    boxes: Float[Tensor, "N 4"]
    image_id: int
    size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Target:
        """The same target on another device."""
        labels, boxes = (t.to(device, non_blocking=non_blocking) for t in (self.labels, self.boxes))
        return Target(labels, boxes, self.image_id, self.size)

    def pin_memory(self) -> Target:
        """The same target in pinned memory."""
        return Target(self.labels.pin_memory(), self.boxes.pin_memory(), self.image_id, self.size)


@dataclass
class Detections:
    """Detected objects of one image, highest-scoring first.

    ``found[0]`` is the highest-scoring one, ``found[:3]`` the first three, ``found[found.labels == 2]`` those of a
    class; each of these is a ``Detections``.

    Attributes:
        scores: confidence in [0, 1].
        labels: contiguous class ids.
        boxes_xyxy: corners in pixels of the original image; they may lie outside of it.
        queries: index of the query of each detection; 0, 1, 2, ... for a detector without queries.
        classes: names of the classes by label, or () if unknown.
        size: height and width of the image in pixels, or None if unknown.
    """

    scores: Float[Tensor, "N"]
    labels: Int[Tensor, "N"]
    boxes_xyxy: Float[Tensor, "N 4"]
    queries: Int[Tensor, "N"]
    classes: tuple[str, ...] = ()
    size: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, rows: Any) -> Detections:
        """Select detections by an index, a slice, several indices or a mask."""
        if isinstance(rows, (int, np.integer)):
            rows = [range(len(self))[rows]]  # which raises the IndexError that ends a loop
        if isinstance(rows, slice):
            rows = list(range(len(self)))[rows]  # PyTorch's slices have no negative step
        rows = torch.as_tensor(rows)
        if rows.dtype.is_floating_point and len(rows.reshape(-1)):
            raise TypeError(f"detections are selected by integers or a mask, not by {rows.dtype}")
        rows = rows if rows.dtype == torch.bool else rows.long().reshape(-1)
        columns = (self.scores, self.labels, self.boxes_xyxy, self.queries)
        scores, labels, boxes, queries = (column[rows] for column in columns)
        return Detections(scores, labels, boxes, queries, self.classes, self.size)

    def above(self, threshold: float) -> Detections:
        """The detections with a score of at least ``threshold``, from 0 to 1.

        Raises:
            UserError: the threshold is out of range.
        """
        threshold = share("threshold", threshold)
        return self[self.scores >= threshold]

    @property
    def class_names(self) -> list[str]:
        """The name of each detection's class.

        Raises:
            UserError: the names of the classes are unknown.
        """
        if len(self) and int(self.labels.max()) >= len(self.classes):
            raise UserError(f"label {int(self.labels.max())} has no name: give the detections all classes")
        return [self.classes[label] for label in self.labels.tolist()]

    def clip(self, size: tuple[int, int] | None = None) -> Detections:
        """Clip the boxes to the image.

        Args:
            size: height and width of the image in pixels; :attr:`size` by default.

        Raises:
            UserError: the size is unknown, or not two numbers of pixels.
        """
        size = size or self.size
        if size is None:
            raise UserError("the size of the image is unknown: give clip((height, width))")
        size = plain(size)
        if not fits(size, tuple[float, ...]) or len(size) != 2 or min(size) < 0:
            raise UserError(f"size={shown(size)} is not (height, width) in pixels")
        height, width = size
        most = self.boxes_xyxy.new_tensor([width, height, width, height])
        return replace(self, boxes_xyxy=self.boxes_xyxy.clamp(min=0).minimum(most))

    # Conversion to and from other libraries.

    def to_supervision(self) -> Any:
        """Convert to ``supervision.Detections``; ``data`` contains class names and queries."""
        supervision = _supervision()
        scores, labels, boxes, queries = self._columns()
        data = {"query": queries} | ({"class_name": np.array(self.class_names, dtype=str)} if self.classes else {})
        return supervision.Detections(boxes, confidence=scores, class_id=labels, data=data)

    @staticmethod
    def from_supervision(given: Any, classes: Sequence[str] = (), size: tuple[int, int] | None = None) -> Detections:
        """Convert from ``supervision.Detections``, sorted by score.

        Args:
            given: with a ``class_id``; without a ``confidence``, as for ground truth, scores are 1.
            classes: names of the classes by label; those in ``given`` by default.
            size: height and width of the image in pixels.

        Raises:
            UserError: there is no ``class_id``.
        """
        if getattr(given, "class_id", None) is None:
            raise UserError("these detections have no class_id: set it, to zeros if there is one class")
        scores = np.ones(len(given)) if given.confidence is None else given.confidence
        names = given.data.get("class_name")
        if not classes and names is not None and len(given):
            known = dict(zip(given.class_id.tolist(), map(str, names)))
            classes = [known.get(label, str(label)) for label in range(max(known) + 1)]
        return _by_score(scores, given.class_id, given.xyxy, given.data.get("query"), classes, size)

    def to_coco(self, image_id: int, category_ids: Sequence[int]) -> list[dict[str, Any]]:
        """Convert to COCO results: ``image_id``, ``category_id``, ``bbox`` (x, y, width, height in pixels), ``score``.

        Args:
            image_id: COCO's id of the image.
            category_ids: COCO's id of each label, as ``model.model_config.category_ids``.

        Raises:
            UserError: a label has no category id.
        """
        if len(self) and int(self.labels.max()) >= len(category_ids):
            raise UserError(f"label {int(self.labels.max())} has no category id: give those of all classes")
        corner, opposite = self.boxes_xyxy[:, :2], self.boxes_xyxy[:, 2:]
        boxes = torch.cat([corner, opposite - corner], 1).tolist()
        return [
            {"image_id": image_id, "category_id": category_ids[label], "bbox": box, "score": score}
            for label, box, score in zip(self.labels.tolist(), boxes, self.scores.tolist())
        ]

    @staticmethod
    def from_coco(
        results: Sequence[Mapping[str, Any]],
        category_ids: Sequence[int],
        classes: Sequence[str] = (),
        size: tuple[int, int] | None = None,
    ) -> Detections:
        """Convert from COCO results or annotations of one image, sorted by score.

        Args:
            results: each with ``category_id``, ``bbox``, and ``score`` (default 1).
            category_ids: COCO's id of each label.
            classes: names of the classes by label.
            size: height and width of the image in pixels.

        Raises:
            UserError: the results are of several images or of a category without a label, or have no valid box.
        """
        images = {result.get("image_id") for result in results}
        if len(images) > 1:
            raise UserError(f"these are results of {len(images)} images: give those of one image_id")
        label_of = {category: label for label, category in enumerate(category_ids)}
        for n, result in enumerate(results, 1):
            if result.get("category_id") not in label_of:
                raise UserError(
                    f"result {n} has category_id {result.get('category_id')}, which is none of category_ids"
                )
            box = plain(result.get("bbox"))
            if not fits(box, tuple[float, ...]) or len(box) != 4:
                raise UserError(f"result {n} has bbox {shown(box)}: give [x, y, width, height] in pixels")
        boxes = np.array([result["bbox"] for result in results], dtype=np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        scores = [result.get("score", 1.0) for result in results]
        return _by_score(scores, [label_of[r["category_id"]] for r in results], boxes, None, classes, size)

    def to_pandas(self) -> Any:
        """Convert to a ``pandas.DataFrame`` with one row per detection; pandas is an optional dependency.

        Columns: ``score``, ``label``, ``class_name`` if names are known, ``xmin``, ``ymin``, ``xmax``, ``ymax`` in
        pixels, ``query``.

        Raises:
            UserError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise UserError("pandas is not installed: pip install pandas") from error
        scores, labels, boxes, queries = self._columns()
        names = {"class_name": self.class_names} if self.classes else {}
        corners = dict(zip(CORNERS, boxes.T))
        return pandas.DataFrame({"score": scores, "label": labels, **names, **corners, "query": queries})

    @staticmethod
    def from_pandas(frame: Any, classes: Sequence[str] = (), size: tuple[int, int] | None = None) -> Detections:
        """Convert from a table with the columns of :meth:`to_pandas`, sorted by score.

        Args:
            frame: a ``pandas.DataFrame`` or any mapping of columns; ``query`` and ``class_name`` may be missing.
            classes: names of the classes by label.
            size: height and width of the image in pixels.

        Raises:
            UserError: a column is missing, or has other values than finite numbers.
        """
        missing = [name for name in ("score", "label", *CORNERS) if name not in frame]
        if missing:
            raise UserError(f"the table has no column {', '.join(missing)}: name its columns as to_pandas does")
        boxes = np.stack([np.asarray(frame[name], dtype=np.float64) for name in CORNERS], axis=1)
        queries = np.asarray(frame["query"]) if "query" in frame else None
        return _by_score(np.asarray(frame["score"]), np.asarray(frame["label"]), boxes, queries, classes, size)

    def _columns(self) -> tuple[np.ndarray, ...]:
        """Scores, labels, boxes and queries as arrays."""
        columns = (self.scores.float(), self.labels, self.boxes_xyxy.float(), self.queries)
        return tuple(column.detach().cpu().numpy() for column in columns)


def stage_name(stage: int) -> str:
    """The name of a stage, 0 for the base detector."""
    return f"stage {stage}" if stage else "base detector"


CORNERS = ("xmin", "ymin", "xmax", "ymax")
"""Column names of the corners of a box."""


def _by_score(
    scores: Any, labels: Any, boxes_xyxy: Any, queries: Any, classes: Sequence[str], size: tuple[int, int] | None
) -> Detections:
    """Detections from array-like columns, highest-scoring first.

    Raises:
        UserError: a column has other values than finite numbers, or another length.
    """
    try:
        columns = [np.asarray(column, dtype=np.float64) for column in (scores, labels, boxes_xyxy)]
    except (TypeError, ValueError) as error:
        raise UserError(f"scores, labels and boxes must be numbers ({error})") from error
    for name, column in zip(("scores", "labels", "boxes"), columns):
        if not np.isfinite(column).all() or len(column) != len(columns[0]):
            raise UserError(f"{name} must be a finite number for each detection: {shown(column.tolist())}")
    scores, boxes = (torch.as_tensor(column, dtype=torch.float32) for column in columns[::2])
    labels = torch.as_tensor(columns[1]).long()
    queries = torch.arange(len(scores)) if queries is None else torch.as_tensor(np.array(queries), dtype=torch.long)
    found = Detections(scores, labels, boxes.reshape(-1, 4), queries, tuple(classes), size)
    return found[scores.argsort(descending=True, stable=True)]


def _supervision() -> Any:
    """The library supervision, without its warning that the optional OpenCV is missing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import supervision
    return supervision
