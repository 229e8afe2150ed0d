"""Records of one forward pass: attention, sampling points, glimpses and boxes by name.

:func:`regolite.record` returns a :class:`Trace`. Names are the same for all detectors; each detector has those that
apply. Layers are numbered from 0, as in PyTorch; stages from 1, as in the paper, where stage 0 is the base detector.

==================================  ====================================================================================
``proposals``                       the encoder's own :class:`Boxes` (two-stage Deformable DETR, RT-DETR)
``encoder.{layer}``                 self-attention of the cells: :class:`AttentionMap`, :class:`Sampling` (deformable
                                    attention) or :class:`RowColumnMap` (Anchor DETR)
``references``                      initial references of the queries: :class:`References`
``decoder.{layer}.self``            self-attention of the queries: :class:`AttentionMap`
``decoder.{layer}.cross``           cross-attention to the image, of the same kinds as ``encoder.{layer}``
``decoder.{layer}.boxes``           predictions of the layer: :class:`Boxes`
``stage.{i}.glimpses``              the regions of the glimpses of stage i: :class:`Glimpses`
``stage.{i}.encoder.{layer}``       self-attention of the hidden states, if the stage has encoder layers
``stage.{i}.decoder.{layer}.self``  self-attention of the glimpse decoder
``stage.{i}.relations.{layer}``     its cross-attention from glimpses to queries of stage i - 1, Q x Q
``stage.{i}.boxes.{layer}``         predictions of its layers: :class:`Boxes`; the last is O(i)
==================================  ====================================================================================

Fields have the coordinates of the network. Methods return **image coordinates**, x and y in pixels of the original
image: they undo padding and resizing. Cell (row, column) of a map of stride s covers s x s pixels of the network's
input, the first at (s * row, s * column).
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regolite.boxes import to_pixels
from regolite.errors import UserError, did_you_mean


@dataclass(frozen=True, eq=False)
class Frame:
    """Sizes of the images of a batch: original, as input of the network, and padded.

    Attributes:
        padded: height and width of the padded batch.
        sizes: height and width of each image in the batch, before padding.
        original: height and width of each image before resizing. If unknown, as in ``model(images)``, they are
            ``sizes``, and image coordinates are pixels of the network's input.
    """

    padded: tuple[int, int]
    sizes: Int[Tensor, "B 2"]
    original: Int[Tensor, "B 2"]

    def to_image(self, points: Float[Tensor, "*n 2"], image: int = 0) -> Float[Tensor, "*n 2"]:
        """Convert points x, y from pixels of the network's input to pixels of the original image."""
        return points * (self.original[image] / self.sizes[image]).flip(0)

    def to_network(self, points: Float[Tensor, "*n 2"], image: int = 0) -> Float[Tensor, "*n 2"]:
        """Convert points x, y from pixels of the original image to pixels of the network's input."""
        return points * (self.sizes[image] / self.original[image]).flip(0)

    def strides(self, shapes: Sequence[tuple[int, int]]) -> tuple[int, ...]:
        """Pixels of the network's input per cell of maps of these heights and widths, finest first."""
        strides: list[int] = []
        for shape in shapes:
            # A map of one cell may have any large stride; but every level is coarser than the previous one.
            stride = 2 * strides[-1] if strides else 1
            while any(-(-side // stride) > cells for side, cells in zip(self.padded, shape)):
                stride *= 2
            strides.append(stride)
        return tuple(strides)


class OnCells:
    """Records on the cells of one or several maps, concatenated as tokens of the transformer, finest map first.

    ``shapes`` are the heights and widths of the maps; it is empty for attention among queries.
    """

    shapes: tuple[tuple[int, int], ...]
    frame: Frame

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels of the network's input per cell of each map."""
        return self.frame.strides(self.shapes)

    def centers(self, image: int = 0) -> Float[Tensor, "S 2"]:
        """The center of every cell, in pixels of the original image; cells on padding lie outside it."""
        centers = []
        for (height, width), stride in zip(self._maps(), self.strides):
            y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
            centers.append(stride * torch.stack([x, y], -1).flatten(0, 1))
        return self.frame.to_image(torch.cat(centers), image)

    def cell_at(self, x: float | int, y: float | int, level: int = 0, image: int = 0) -> int:
        """The token index of the cell at a point of the original image; in an encoder, also its query index.

        Args:
            x: in pixels of the original image.
            y: in pixels of the original image.
            level: index of the map.
            image: index in the batch.

        Raises:
            UserError: the point is outside the image.
        """
        height, width = self.frame.original[image].tolist()
        if not (0 <= x < width and 0 <= y < height):
            raise UserError(f"the point ({x:g}, {y:g}) is outside the image of {width} x {height} pixels")
        maps = self._maps()
        column, row = (
            (self.frame.to_network(torch.tensor([float(x), float(y)]), image) / self.strides[level]).long().tolist()
        )
        rows, columns = maps[level]
        # Rounding can move a point at the edge one cell too far.
        return sum(h * w for h, w in maps[:level]) + min(row, rows - 1) * columns + min(column, columns - 1)

    def extent(self, level: int = 0, image: int = 0) -> tuple[float, float, float, float]:
        """Left, right, bottom and top of a map in pixels of the original image, the ``extent`` of ``imshow``.

        A map with padding, or with cells across the edge of the image, extends beyond the image.
        """
        (height, width), stride = self._maps()[level], self.strides[level]
        corner = torch.tensor([float(stride * width), float(stride * height)])
        right, bottom = self.frame.to_image(corner, image).tolist()
        return 0.0, right, bottom, 0.0

    def _maps(self) -> tuple[tuple[int, int], ...]:
        if not self.shapes:
            raise UserError("attention among queries has no cells of an image; use the boxes of the queries")
        return self.shapes


class Weights(OnCells):
    """Attention weights of each head on cells or queries; those of one query sum to 1."""

    if TYPE_CHECKING:  # a field of some subclasses, a property of others

        @property
        def weights(self) -> Float[Tensor, "B M Q S"]:
            """The weights of all queries."""
            ...

    def of(self, query: int, head: int | None = None, image: int = 0) -> Float[Tensor, "S"]:
        """The weights of one query for one head, or the mean over the heads."""
        by_head = self.weights[image, :, query]
        return by_head.mean(0) if head is None else by_head[head]

    def heat(self, query: int, head: int | None = None, level: int = 0, image: int = 0) -> Float[Tensor, "h w"]:
        """The weights of one query on one map including padding; :meth:`extent` is its extent for drawing."""
        maps = self._maps()
        return self.of(query, head, image).split([h * w for h, w in maps])[level].view(maps[level])

    def over_image(
        self, query: int, head: int | None = None, level: int | None = None, image: int = 0
    ) -> Float[Tensor, "height width"]:
        """The weights of one query at every pixel of the original image: those of the pixel's cell.

        Args:
            query: index of the query.
            head: one head; by default the mean over the heads.
            level: one map; by default the sum over all, in which the weight of a coarse cell is distributed evenly over
                the cells of the finest map that it covers.
            image: index in the batch.
        """
        height, width = self.frame.original[image].tolist()
        scale = self.frame.sizes[image] / self.frame.original[image]  # of height and width
        y, x = ((torch.arange(n) + 0.5) * factor for n, factor in zip((height, width), scale))
        total = torch.zeros(height, width)
        for number, stride in enumerate(self.strides):
            if level in (None, number):
                heat = self.heat(query, head, number, image)
                rows, columns = ((n / stride).long().clamp(max=end - 1) for n, end in zip((y, x), heat.shape))
                share = (self.strides[0] / stride) ** 2 if level is None else 1.0
                total += share * heat[rows][:, columns]
        return total

    def entropy(self) -> Float[Tensor, "B M Q"]:
        """Entropy of the weights of each head and query in nats: 0 for one cell, log S for uniform weights."""
        return torch.special.entr(self.weights).sum(-1)


@dataclass(frozen=True, eq=False)
class AttentionMap(Weights):
    """Dense attention.

    Attributes:
        weights: of Q queries on S keys, for each head; they sum to 1 over S. SMCA's decoder attends to each level
            separately and then weights the levels: the record is the product. In its encoder layers whose cells attend
            to their own level only, the weight of other levels is 0.
        shapes: heights and widths of the maps of the keys; empty for attention among queries.
        mask: True on hidden cells (padding), or None.
        frame: the images.
    """

    weights: Float[Tensor, "B M Q S"]
    shapes: tuple[tuple[int, int], ...]
    mask: Bool[Tensor, "B S"] | None
    frame: Frame


@dataclass(frozen=True, eq=False)
class RowColumnMap(Weights):
    """Row-column decoupled attention (Anchor DETR): the weight of a cell is that of its column times that of its row.

    Attributes:
        columns: weights of the columns, which sum to 1.
        rows: weights of the rows, which sum to 1.
        shapes: height and width of the one map.
        mask: True on hidden cells (padding).
        frame: the images.
    """

    columns: Float[Tensor, "B M Q w"]
    rows: Float[Tensor, "B M Q h"]
    shapes: tuple[tuple[int, int], ...]
    mask: Bool[Tensor, "B S"] | None
    frame: Frame

    @property
    def weights(self) -> Float[Tensor, "B M Q S"]:
        """The weights of the cells, a large tensor for a large map."""
        return (self.rows[..., None] * self.columns[..., None, :]).flatten(-2)

    def of(self, query: int, head: int | None = None, image: int = 0) -> Float[Tensor, "S"]:
        """The weights of one query for one head, or the mean over the heads."""
        rows, columns = self.rows[image, :, query], self.columns[image, :, query]
        by_head = (rows[..., None] * columns[:, None]).flatten(1)
        return by_head.mean(0) if head is None else by_head[head]

    def entropy(self) -> Float[Tensor, "B M Q"]:
        """Entropy of the weights of each head and query in nats: the sum of those of columns and rows."""
        return torch.special.entr(self.columns).sum(-1) + torch.special.entr(self.rows).sum(-1)


@dataclass(frozen=True, eq=False)
class Sampling(OnCells):
    """Deformable attention: sampling locations and weights.

    Attributes:
        locations: x and y in [0, 1] of the padded map, for each head, level and point.
        weights: they sum to 1 over levels and points.
        references: the reference points, x and y (d = 2) or boxes ``cxcywh`` (d = 4), in the same frame.
        shapes: heights and widths of the levels.
        frame: the images.
    """

    locations: Float[Tensor, "B Q M L K 2"]
    weights: Float[Tensor, "B Q M L K"]
    references: Float[Tensor, "B Q L d"]
    shapes: tuple[tuple[int, int], ...]
    frame: Frame

    def points(self, image: int = 0) -> Float[Tensor, "Q M L K 2"]:
        """Sampling locations x and y in pixels of the original image; some lie outside it."""
        return self._to_image(self.locations[image], self._spans()[:, None], image)

    def reference_points(self, image: int = 0) -> Float[Tensor, "Q L 2"]:
        """The reference points, or centers of the reference boxes, in pixels of the original image."""
        return self._to_image(self.references[image, ..., :2], self._spans(), image)

    def level_weights(self) -> Float[Tensor, "B Q M L"]:
        """The weight of each level for each head and query."""
        return self.weights.sum(-1)

    def entropy(self) -> Float[Tensor, "B M Q"]:
        """Entropy of the weights of each head and query in nats: 0 for one point, log(L K) for uniform weights."""
        return torch.special.entr(self.weights).sum((-2, -1)).transpose(1, 2)

    def _spans(self) -> Float[Tensor, "L 2"]:
        """Width and height of the levels in pixels of the network's input."""
        return torch.tensor([(float(s * w), float(s * h)) for (h, w), s in zip(self.shapes, self.strides)])

    def _to_image(self, relative: Tensor, spans: Tensor, image: int) -> Tensor:
        return self.frame.to_image(relative * spans, image)


@dataclass(frozen=True, eq=False)
class Glimpses:
    """The regions of a stage's glimpses. The level of each is chosen by its size.

    Attributes:
        regions: enlarged boxes, ``xyxy`` in pixels of the network's input.
        level: index of the map of each region, finest first.
        strides: stride of every map.
        frame: the images.
    """

    regions: Float[Tensor, "B Q 4"]
    level: Int[Tensor, "B Q"]
    strides: tuple[int, ...]
    frame: Frame

    def boxes_xyxy(self, image: int = 0) -> Float[Tensor, "Q 4"]:
        """The regions, ``xyxy`` in pixels of the original image; they may reach beyond it."""
        return self.frame.to_image(self.regions[image].unflatten(-1, (2, 2)), image).flatten(1)


@dataclass(frozen=True, eq=False)
class Boxes:
    """Predictions of a layer for each query.

    Attributes:
        logits: K columns with ``"sigmoid"``, K + 1 with ``"softmax"``, the last being "no object". Deformable DETR's
            proposals have one column, "object".
        boxes: ``cxcywh`` in [0, 1] of the unpadded image.
        scoring: how logits become scores.
        frame: the images.
    """

    logits: Float[Tensor, "B Q columns"]
    boxes: Float[Tensor, "B Q 4"]
    scoring: Literal["softmax", "sigmoid"]
    frame: Frame

    @property
    def scores(self) -> Float[Tensor, "B Q K"]:
        """The score of every class, in [0, 1]."""
        return self.logits.sigmoid() if self.scoring == "sigmoid" else self.logits.softmax(-1)[..., :-1]

    def best(self, image: int = 0) -> tuple[Float[Tensor, "Q"], Int[Tensor, "Q"]]:
        """The score and the label of each query's best class."""
        scores, labels = self.scores[image].max(-1)
        return scores, labels

    def boxes_xyxy(self, image: int = 0) -> Float[Tensor, "Q 4"]:
        """The boxes, ``xyxy`` in pixels of the original image."""
        return to_pixels(self.boxes, self.frame.original)[image]


@dataclass(frozen=True, eq=False)
class References:
    """Initial references of the queries: learned points or boxes, or the encoder's proposals.

    Attributes:
        references: x and y (d = 2) or ``cxcywh`` (d = 4), in [0, 1] of the unpadded image.
        frame: the images.
    """

    references: Float[Tensor, "B Q d"]
    frame: Frame

    def points(self, image: int = 0) -> Float[Tensor, "Q 2"]:
        """The points, or centers of the boxes, in pixels of the original image."""
        return self.references[image, :, :2] * self.frame.original[image].flip(0)


Record = AttentionMap | RowColumnMap | Sampling | Glimpses | Boxes | References
KINDS = {kind.__name__: kind for kind in (AttentionMap, RowColumnMap, Sampling, Glimpses, Boxes, References)}


class Trace:
    """Records of one forward pass by name; see :mod:`regolite.tracing.trace` for the names.

    Args:
        records: by name, in the order of computation.
        frame: the images; None until a model has run.
        classes: names of the classes, if the model has them.
    """

    def __init__(
        self, records: dict[str, Record] | None = None, frame: Frame | None = None, classes: tuple[str, ...] = ()
    ) -> None:
        self._records: dict[str, Record] = {}
        self._frame: Frame | None = None
        self.classes: tuple[str, ...] = ()
        if frame is not None:
            self.fill(records or {}, frame, classes)

    def fill(self, records: dict[str, Record], frame: Frame, classes: tuple[str, ...]) -> None:
        """Set the records after the model has run."""
        self._records, self._frame, self.classes = dict(records), frame, classes

    @property
    def filled(self) -> bool:
        """Whether a model has run."""
        return self._frame is not None

    @property
    def frame(self) -> Frame:
        """The images.

        Raises:
            UserError: nothing has been recorded yet.
        """
        if self._frame is None:
            raise UserError("nothing is recorded yet: run the model inside the record, on one image or batch")
        return self._frame

    def names(self, pattern: str = "*") -> list[str]:
        """The names that match a pattern, as ``"decoder.*.cross"``; all by default."""
        return [name for name in self._records if fnmatchcase(name, pattern)]

    def __contains__(self, name: str) -> bool:
        return name in self._records

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, name: str) -> Record:
        """The record of this name.

        Raises:
            UserError: there is no such name; the message suggests the nearest one.
        """
        if name not in self._records:
            _ = self.frame  # raises if nothing has been recorded
            raise UserError(f"the trace has no {name!r}; {did_you_mean(name, self._records)}")
        return self._records[name]

    def __repr__(self) -> str:
        lines = [f"Trace of {len(self)} records"]
        for name, record in self._records.items():
            tensor = next(value for value in vars(record).values() if isinstance(value, Tensor))
            lines.append(f"  {name:28} {type(record).__name__:13} {tuple(tensor.shape)}")
        return "\n".join(lines)

    @property
    def by_stage(self) -> list[Boxes]:
        """O(0), O(1), ..., O(S): the last recorded boxes of the base decoder and of each stage."""
        last = {}
        for name, record in self._records.items():
            if isinstance(record, Boxes) and name != "proposals":
                last[name.split(".")[1] if name.startswith("stage.") else "0"] = record
        return list(last.values())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one ``.npz`` file: an array ``name/field`` for each tensor, and a description in JSON."""
        arrays: dict[str, np.ndarray] = {"frame/sizes": self.frame.sizes.numpy()}
        arrays["frame/original"] = self.frame.original.numpy()
        described: dict[str, Any] = {}
        for name, record in self._records.items():
            described[name] = {"kind": type(record).__name__}
            for field in fields(record):
                value = getattr(record, field.name)
                if isinstance(value, Tensor):
                    arrays[f"{name}/{field.name}"] = value.numpy()
                elif field.name != "frame":
                    described[name][field.name] = value
        text = {"padded": self.frame.padded, "classes": self.classes, "records": described}
        arrays["trace"] = np.array(json.dumps(text))
        with open(path, "wb") as file:  # an open file, since NumPy adds a suffix to paths that lack it
            np.savez(file, **arrays)  # type: ignore[arg-type]  # numpy's stub gives all keywords the type of allow_pickle

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Trace:
        """Read a file of :meth:`save`; nothing in the file is executed.

        Raises:
            UserError: there is no such file, or it contains no trace.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                text = json.loads(str(file["trace"]))
                tensors = {name: torch.from_numpy(file[name]) for name in file.files if name != "trace"}
            frame = Frame(tuple(text["padded"]), tensors["frame/sizes"], tensors["frame/original"])
            records = {}
            for name, described in text["records"].items():
                kind = KINDS[described.pop("kind")]
                own = {f.name: tensors.get(f"{name}/{f.name}") for f in fields(kind)}
                records[name] = kind(**(own | {k: _tuples(v) for k, v in described.items()} | {"frame": frame}))
        except FileNotFoundError:
            raise UserError(f"no trace at {os.fspath(path)}; give the file that Trace.save wrote") from None
        except (
            OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, RecursionError, zipfile.BadZipFile,
        ) as error:  # fmt: skip
            raise UserError(
                f"{os.fspath(path)} holds no trace ({error}); give the file that Trace.save wrote"
            ) from error
        return Trace(records, frame, tuple(text["classes"]))


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
