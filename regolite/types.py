"""The few types that every room speaks.

Conventions, everywhere in the package:

- a **mask** is True on padding;
- **boxes** are ``cxcywh`` (center, width, height) in [0, 1] of the *unpadded* image; ``boxes_xyxy`` are corners in
  pixels of the *original* image, for people;
- **labels** are contiguous class ids 0..K-1; COCO's own ids exist only at the border (``regolite.data``,
  ``regolite.evaluation``).

In the shapes, B is the batch, Q the queries, C the width of the transformer, K the classes, N the objects of an image.
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


@dataclass
class ImageBatch:
    """Images of different sizes, padded at the right and the bottom to one tensor.

    Attributes:
        pixels: normalized pixels, zero on padding.
        mask: True on padding.
        sizes: height and width of each image before padding.
        original_sizes: height and width of each image before it was resized, or None where nobody has told. No model
            reads them: they are for people who look inside.
    """

    pixels: Float[Tensor, "B 3 H W"]
    mask: Bool[Tensor, "B H W"]
    sizes: Int[Tensor, "B 2"]
    original_sizes: Int[Tensor, "B 2"] | None = None

    def __len__(self) -> int:
        return len(self.pixels)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> ImageBatch:
        """The same batch on another device."""
        moved = (t.to(device, non_blocking=non_blocking) for t in (self.pixels, self.mask, self.sizes))
        return ImageBatch(*moved, self.original_sizes)

    def pin_memory(self) -> ImageBatch:
        """The same batch in pinned memory, from which a GPU can fetch it by itself; a ``DataLoader`` asks for it."""
        pinned = (t.pin_memory() for t in (self.pixels, self.mask, self.sizes))
        return ImageBatch(*pinned, self.original_sizes)


@dataclass
class FeatureMap:
    """One level of a feature pyramid.

    Attributes:
        tensor: the features.
        mask: True on cells that lie wholly on padding.
        stride: pixels of the input per cell.
    """

    tensor: Float[Tensor, "B C h w"]
    mask: Bool[Tensor, "B h w"]
    stride: int


@dataclass
class Memory:
    """Feature maps laid out as one row of tokens, as transformers read them; S is the number of cells of all levels.

    Attributes:
        tokens: the cells' features.
        positions: their position encoding.
        mask: True on padding, or None where there is none.
        shapes: height and width of each level.
    """

    tokens: Float[Tensor, "B S C"]
    positions: Float[Tensor, "B S C"]
    mask: Bool[Tensor, "B S"] | None
    shapes: list[tuple[int, int]]


@dataclass
class Prediction:
    """What one decoder layer says about every query: class logits and a box.

    ``logits`` has K columns where classes are scored by sigmoids, and K + 1 where they are scored by a softmax whose
    last column is "no object".
    """

    logits: Float[Tensor, "B Q K"]
    boxes: Float[Tensor, "B Q 4"]


@dataclass
class DetectorOutput:
    """Everything a detector computed, in the paper's names.

    Attributes:
        layers: predictions of the base decoder, layer by layer; the last is O(0) of equation (4).
        queries: hidden states of the last base decoder layer, H_dec(0).
        features: the maps X that glimpses are cut from, finest first.
        proposals: the encoder's own predictions (two-stage Deformable DETR), one class each, or None.
        stages: for each REGO stage the predictions of its decoder layers; the last of stage i is O(i). Empty when the
            detector has no REGO or it is switched off.
        proposals_by_class: the proposals' logits tell classes, and not only "object" in the first of them.
        denoising: what became of noised ground truth, in training (:mod:`regolite.denoising`), or None.
        query_mask: True on queries that are padding, or None where there are none, as in all but ``denoising``.
    """

    layers: list[Prediction]
    queries: Float[Tensor, "B Q C"]
    features: list[FeatureMap]
    proposals: Prediction | None = None
    stages: list[list[Prediction]] = field(default_factory=list)
    proposals_by_class: bool = False
    denoising: DetectorOutput | None = None
    query_mask: Bool[Tensor, "B Q"] | None = None

    @property
    def by_stage(self) -> list[Prediction]:
        """O(0), O(1), ..., O(S): the base detector's prediction and each stage's."""
        return [self.layers[-1], *(stage[-1] for stage in self.stages)]

    @property
    def final(self) -> Prediction:
        """The detector's answer: the last stage's prediction, or the base detector's where there are no stages."""
        return self.by_stage[-1]


@dataclass
class Target:
    """The objects of one image.

    Attributes:
        labels: contiguous class ids.
        boxes: ``cxcywh`` in [0, 1] of the (transformed, unpadded) image. Crowds are left out.
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
    """Detected objects of one image, best first.

    ``found[0]`` is the best of them, ``found[:3]`` the first three, ``found[found.labels == 2]`` those of a class; each
    is a ``Detections`` again.

    Attributes:
        scores: confidence in [0, 1].
        labels: contiguous class ids.
        boxes_xyxy: corners in pixels of the original image; they may reach over its edges.
        queries: which query made each detection; 0, 1, 2, ... where a detector has no queries.
        classes: names of the classes by label, or () where they are not known.
        size: height and width of the image in pixels, or None where it is not known.
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
        """Some of the detections, by an index, a slice, several indices or a mask."""
        if isinstance(rows, (int, np.integer)):
            rows = [range(len(self))[rows]]  # which raises the IndexError that ends a loop
        if not isinstance(rows, slice):
            rows = torch.as_tensor(rows)
            rows = rows if rows.dtype == torch.bool else rows.long()
        columns = (self.scores, self.labels, self.boxes_xyxy, self.queries)
        return Detections(*(column[rows] for column in columns), self.classes, self.size)

    def above(self, threshold: float) -> Detections:
        """The detections whose score is at least ``threshold``."""
        return self[self.scores >= threshold]

    @property
    def class_names(self) -> list[str]:
        """The name of each detection's class.

        Raises:
            UserError: the names of the classes are not known.
        """
        if len(self) and int(self.labels.max()) >= len(self.classes):
            raise UserError(f"label {int(self.labels.max())} has no name: give the detections all classes")
        return [self.classes[label] for label in self.labels.tolist()]

    def clip(self, size: tuple[int, int] | None = None) -> Detections:
        """The same with boxes that end at the image's edges.

        Args:
            size: height and width of the image in pixels; what the detections know by default.

        Raises:
            UserError: when neither says the size.
        """
        size = size or self.size
        if size is None:
            raise UserError("these detections do not know the size of their image: give clip((height, width))")
        height, width = size
        most = self.boxes_xyxy.new_tensor([width, height, width, height])
        return replace(self, boxes_xyxy=self.boxes_xyxy.clamp(min=0).minimum(most))

    # To and from other libraries.

    def to_supervision(self) -> Any:
        """As ``supervision.Detections``, for its annotators, trackers and metrics; ``data`` keeps names and queries."""
        supervision = _supervision()
        scores, labels, boxes, queries = self._columns()
        data = {"query": queries} | ({"class_name": np.array(self.class_names, dtype=str)} if self.classes else {})
        return supervision.Detections(boxes, confidence=scores, class_id=labels, data=data)

    @staticmethod
    def from_supervision(given: Any, classes: Sequence[str] = (), size: tuple[int, int] | None = None) -> Detections:
        """From ``supervision.Detections``, sorted by score.

        Args:
            given: with a ``class_id``; without a ``confidence``, as of ground truth, scores are 1.
            classes: names of the classes by label; those that ``given`` tells by default.
            size: height and width of the image in pixels.

        Raises:
            UserError: there is no ``class_id``.
        """
        if given.class_id is None:
            raise UserError("these detections have no class_id: set it, to zeros if there is one class")
        scores = np.ones(len(given)) if given.confidence is None else given.confidence
        names = given.data.get("class_name")
        if not classes and names is not None and len(given):
            known = dict(zip(given.class_id.tolist(), map(str, names)))
            classes = [known.get(label, str(label)) for label in range(max(known) + 1)]
        return _by_score(scores, given.class_id, given.xyxy, given.data.get("query"), classes, size)

    def to_coco(self, image_id: int, category_ids: Sequence[int]) -> list[dict[str, Any]]:
        """As COCO's results: ``image_id``, ``category_id``, ``bbox`` (corner, width, height in pixels), ``score``.

        Args:
            image_id: COCO's id of the image.
            category_ids: COCO's id of each label, as ``model.model_config.category_ids``.
        """
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
        """From COCO's results, or annotations, of one image, sorted by score.

        Args:
            results: each with ``category_id``, ``bbox``, and a ``score`` (1 where it has none).
            category_ids: COCO's id of each label.
            classes: names of the classes by label.
            size: height and width of the image in pixels.

        Raises:
            UserError: for results of several images, or of a category that has no label.
        """
        images = {result.get("image_id") for result in results}
        if len(images) > 1:
            raise UserError(f"these are results of {len(images)} images: give those of one image_id")
        label_of = {category: label for label, category in enumerate(category_ids)}
        for result in results:
            if result["category_id"] not in label_of:
                raise UserError(f"a result has category_id {result['category_id']}, which is none of category_ids")
        boxes = np.array([result["bbox"] for result in results], dtype=np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        scores = [result.get("score", 1.0) for result in results]
        return _by_score(scores, [label_of[r["category_id"]] for r in results], boxes, None, classes, size)

    def to_pandas(self) -> Any:
        """As a ``pandas.DataFrame``, a row a detection; pandas is no requirement of regolite.

        The columns: ``score``, ``label``, ``class_name`` where names are known, ``xmin``, ``ymin``, ``xmax``, ``ymax``
        in pixels, ``query``.

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
        """From a table with the columns of :meth:`to_pandas`, sorted by score.

        Args:
            frame: a ``pandas.DataFrame`` or any mapping of columns; ``query`` and ``class_name`` may be missing.
            classes: names of the classes by label.
            size: height and width of the image in pixels.

        Raises:
            UserError: a column is missing.
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
"""What a table calls the corners of a box."""


def _by_score(
    scores: Any, labels: Any, boxes_xyxy: Any, queries: Any, classes: Sequence[str], size: tuple[int, int] | None
) -> Detections:
    """Detections from columns of any kind, best first."""
    scores, boxes = (torch.as_tensor(np.array(column), dtype=torch.float32) for column in (scores, boxes_xyxy))
    labels = torch.as_tensor(np.array(labels), dtype=torch.long)
    queries = torch.arange(len(scores)) if queries is None else torch.as_tensor(np.array(queries), dtype=torch.long)
    found = Detections(scores, labels, boxes.reshape(-1, 4), queries, tuple(classes), size)
    return found[scores.argsort(descending=True, stable=True)]


def _supervision() -> Any:
    """The library supervision, without its warning that OpenCV is missing: it does well without."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import supervision
    return supervision
