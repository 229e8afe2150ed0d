"""What a recorder keeps of one forward pass: attention, sampling points, glimpses, boxes, each under a name.

A :class:`Trace` is made by :func:`regolite.record`. Its names are the same for every detector; a detector has those
that make sense for it. Layers count from 0, as PyTorch counts modules; stages count from 1, as in the paper, where
stage 0 is the base detector.

==================================  ====================================================================================
``proposals``                       the encoder's own :class:`Boxes` (two-stage Deformable DETR, RT-DETR)
``encoder.{layer}``                 self-attention of the cells: :class:`AttentionMap`, :class:`Sampling` (deformable
                                    attention) or :class:`RowColumnMap` (Anchor DETR)
``references``                      where the queries start: :class:`References`
``decoder.{layer}.self``            self-attention of the queries: :class:`AttentionMap`
``decoder.{layer}.cross``           how queries look at the image, of the same kinds as ``encoder.{layer}``
``decoder.{layer}.boxes``           what the layer predicts: :class:`Boxes`
``stage.{i}.glimpses``              the regions that stage i looks at again: :class:`Glimpses`
``stage.{i}.encoder.{layer}``       self-attention of the hidden states, in a stage that has encoder layers
``stage.{i}.decoder.{layer}.self``  self-attention of the glimpse decoder
``stage.{i}.relations.{layer}``     its cross-attention: which queries of stage i - 1 each glimpse asks, Q x Q
``stage.{i}.boxes.{layer}``         what its layers predict: :class:`Boxes`; the last is O(i)
==================================  ====================================================================================

Numbers are kept as the network has them. **Image coordinates**, x and y in pixels of the original image, are what
methods give: they undo padding and resizing. A cell is drawn where its stride puts it: cell (row, column) of a map of
stride s covers s x s pixels of the network's input, the first of them at (s * row, s * column).
"""

from __future__ import annotations

import difflib
import json
import os
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regolite.boxes import to_pixels
from regolite.errors import UserError


@dataclass(frozen=True, eq=False)
class Frame:
    """The images of a batch: as they are, as the network got them, and the padded tensor that holds them.

    Attributes:
        padded: height and width of the batch, which all its images share.
        sizes: height and width of each image in the batch, before padding.
        original: height and width of each image as it came. Where nobody told, as in ``model(images)``, those of
            ``sizes``: then image coordinates are pixels of the network's input.
    """

    padded: tuple[int, int]
    sizes: Int[Tensor, "B 2"]
    original: Int[Tensor, "B 2"]

    def to_image(self, points: Float[Tensor, "*n 2"], image: int = 0) -> Float[Tensor, "*n 2"]:
        """Points x, y in pixels of the network's input, in pixels of the original image."""
        return points * (self.original[image] / self.sizes[image]).flip(0)

    def to_network(self, points: Float[Tensor, "*n 2"], image: int = 0) -> Float[Tensor, "*n 2"]:
        """The way back."""
        return points * (self.sizes[image] / self.original[image]).flip(0)

    def strides(self, shapes: Sequence[tuple[int, int]]) -> tuple[int, ...]:
        """Pixels of the network's input per cell of maps of these heights and widths, finest first."""
        strides: list[int] = []
        for shape in shapes:
            # A map of one cell may have any large stride; but every level is coarser than the one before.
            stride = 2 * strides[-1] if strides else 1
            while any(-(-side // stride) > cells for side, cells in zip(self.padded, shape)):
                stride *= 2
            strides.append(stride)
        return tuple(strides)


class OnCells:
    """Whatever lies on the cells of one or several maps, in one row as the transformer reads them, finest map first.

    ``shapes`` are the heights and widths of the maps; there are none where queries look at queries.
    """

    shapes: tuple[tuple[int, int], ...]
    frame: Frame

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels of the network's input per cell, map by map."""
        return self.frame.strides(self.shapes)

    def centers(self, image: int = 0) -> Float[Tensor, "S 2"]:
        """The center of every cell, in pixels of the original image; cells on padding lie outside it."""
        centers = []
        for (height, width), stride in zip(self._maps(), self.strides):
            y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
            centers.append(stride * torch.stack([x, y], -1).flatten(0, 1))
        return self.frame.to_image(torch.cat(centers), image)

    def cell_at(self, x: float | int, y: float | int, level: int = 0, image: int = 0) -> int:
        """The number of the cell in which a point of the original image lies: its place among tokens.

        Where cells are what asks, in an encoder, it is the query of this point.

        Args:
            x: in pixels of the original image.
            y: in pixels of the original image.
            level: of which map.
            image: of the batch.

        Raises:
            UserError: when the point is outside the image.
        """
        height, width = self.frame.original[image].tolist()
        if not (0 <= x < width and 0 <= y < height):
            raise UserError(f"the point ({x:g}, {y:g}) is outside the image of {width} x {height} pixels")
        maps = self._maps()
        column, row = (
            (self.frame.to_network(torch.tensor([float(x), float(y)]), image) / self.strides[level]).long().tolist()
        )
        rows, columns = maps[level]
        # Rounding can put a point at the very edge one cell too far.
        return sum(h * w for h, w in maps[:level]) + min(row, rows - 1) * columns + min(column, columns - 1)

    def extent(self, level: int = 0, image: int = 0) -> tuple[float, float, float, float]:
        """Left, right, bottom and top of a whole map in pixels of the original image, as ``imshow`` wants it.

        A map with padding, or whose cells do not end where the image ends, reaches beyond the image.
        """
        (height, width), stride = self._maps()[level], self.strides[level]
        corner = torch.tensor([float(stride * width), float(stride * height)])
        right, bottom = self.frame.to_image(corner, image).tolist()
        return 0.0, right, bottom, 0.0

    def _maps(self) -> tuple[tuple[int, int], ...]:
        if not self.shapes:
            raise UserError("here queries look at queries: there are no cells of an image; their boxes say where")
        return self.shapes


class Weights(OnCells):
    """Attention to cells or to queries: who looks at whom, by head. The weights of one who looks sum to 1."""

    weights: Float[Tensor, "B M Q S"]

    def of(self, query: int, head: int | None = None, image: int = 0) -> Float[Tensor, "S"]:
        """The weights of one query, of one head, or the mean over the heads."""
        by_head = self.weights[image, :, query]
        return by_head.mean(0) if head is None else by_head[head]

    def heat(self, query: int, head: int | None = None, level: int = 0, image: int = 0) -> Float[Tensor, "h w"]:
        """The weights of one query on one map, padding included; :meth:`extent` says where to draw it."""
        maps = self._maps()
        return self.of(query, head, image).split([h * w for h, w in maps])[level].view(maps[level])

    def over_image(
        self, query: int, head: int | None = None, level: int | None = None, image: int = 0
    ) -> Float[Tensor, "height width"]:
        """The weights of one query at every pixel of the original image: those of the cell that it lies in.

        Args:
            query: who looks.
            head: one head; by default the mean over the heads.
            level: one map; by default the sum over all, where a coarse cell's weight is spread evenly over the cells of
                the finest map that it covers.
            image: of the batch.
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
        """How widely each head of each query looks, in nats: 0 at one cell, log S evenly at all."""
        return torch.special.entr(self.weights).sum(-1)


@dataclass(frozen=True, eq=False)
class AttentionMap(Weights):
    """Dense attention.

    Attributes:
        weights: of everything that looks (Q) at everything that is looked at (S), by head; they sum to 1 over S.
            SMCA's decoder attends to each level by itself and then weighs the levels: the product is kept. In those of
            its encoder layers whose cells look at their own level alone, the weight of other levels is 0.
        shapes: heights and widths of the maps whose cells are looked at; empty where queries look at queries.
        mask: True on cells that nobody may look at (padding), or None.
        frame: the images.
    """

    weights: Float[Tensor, "B M Q S"]
    shapes: tuple[tuple[int, int], ...]
    mask: Bool[Tensor, "B S"] | None
    frame: Frame


@dataclass(frozen=True, eq=False)
class RowColumnMap(Weights):
    """Row-column decoupled attention (Anchor DETR): the weight of a cell is its column's times its row's.

    Attributes:
        columns: weights of the columns, which sum to 1.
        rows: weights of the rows, which sum to 1.
        shapes: height and width of the one map.
        mask: True on cells that nobody may look at (padding).
        frame: the images.
    """

    columns: Float[Tensor, "B M Q w"]
    rows: Float[Tensor, "B M Q h"]
    shapes: tuple[tuple[int, int], ...]
    mask: Bool[Tensor, "B S"] | None
    frame: Frame

    @property
    def weights(self) -> Float[Tensor, "B M Q S"]:
        """The weights of the cells, multiplied out; large where the map is."""
        return (self.rows[..., None] * self.columns[..., None, :]).flatten(-2)

    def of(self, query: int, head: int | None = None, image: int = 0) -> Float[Tensor, "S"]:
        """The weights of one query, of one head, or the mean over the heads."""
        rows, columns = self.rows[image, :, query], self.columns[image, :, query]
        by_head = (rows[..., None] * columns[:, None]).flatten(1)
        return by_head.mean(0) if head is None else by_head[head]

    def entropy(self) -> Float[Tensor, "B M Q"]:
        """How widely each head of each query looks, in nats: of a product it is the sum."""
        return torch.special.entr(self.columns).sum(-1) + torch.special.entr(self.rows).sum(-1)


@dataclass(frozen=True, eq=False)
class Sampling(OnCells):
    """Deformable attention: where each query reads the maps, and with which weight.

    Attributes:
        locations: x and y in [0, 1] of the padded map, by head, level and point.
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
        """Where the maps are read, x and y in pixels of the original image; some points lie outside it."""
        return self._to_image(self.locations[image], self._spans()[:, None], image)

    def reference_points(self, image: int = 0) -> Float[Tensor, "Q L 2"]:
        """The reference points, or centers of the reference boxes, in pixels of the original image."""
        return self._to_image(self.references[image, ..., :2], self._spans(), image)

    def level_weights(self) -> Float[Tensor, "B Q M L"]:
        """How much each head of each query takes from each level."""
        return self.weights.sum(-1)

    def entropy(self) -> Float[Tensor, "B M Q"]:
        """How evenly each head of each query weighs its points, in nats: 0 for one point alone, log(L K) at most."""
        return torch.special.entr(self.weights).sum((-2, -1)).transpose(1, 2)

    def _spans(self) -> Float[Tensor, "L 2"]:
        """Width and height of the levels in pixels of the network's input."""
        return torch.tensor([(float(s * w), float(s * h)) for (h, w), s in zip(self.shapes, self.strides)])

    def _to_image(self, relative: Tensor, spans: Tensor, image: int) -> Tensor:
        return self.frame.to_image(relative * spans, image)


@dataclass(frozen=True, eq=False)
class Glimpses:
    """The regions that a stage looks at again. Each is read from one level, which its size chooses.

    Attributes:
        regions: enlarged boxes, ``xyxy`` in pixels of the network's input.
        level: the number of the map that each region is read from, finest first.
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
    """What a layer predicts, query by query.

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
    """Where queries start: learned points or boxes, or the encoder's proposals.

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
    """What was recorded of one forward pass, by name; see :mod:`regolite.tracing.trace` for the names.

    Args:
        records: by name, in the order in which an image passes through the detector.
        frame: the images; None until a model has run.
        classes: names of the classes, where the model knows them.
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
        """What the recorder does when the model has run."""
        self._records, self._frame, self.classes = dict(records), frame, classes

    @property
    def filled(self) -> bool:
        """Whether a model has run."""
        return self._frame is not None

    @property
    def frame(self) -> Frame:
        """The images.

        Raises:
            UserError: when nothing was recorded yet.
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
        """What was recorded under a name.

        Raises:
            UserError: when there is no such name; the message says which comes nearest.
        """
        if name not in self._records:
            _ = self.frame  # which says so where nothing is recorded at all
            raise UserError(f"the trace has no {name!r}; {nearest(name, self._records)}")
        return self._records[name]

    def __repr__(self) -> str:
        lines = [f"Trace of {len(self)} records"]
        for name, record in self._records.items():
            tensor = next(value for value in vars(record).values() if isinstance(value, Tensor))
            lines.append(f"  {name:28} {type(record).__name__:13} {tuple(tensor.shape)}")
        return "\n".join(lines)

    @property
    def by_stage(self) -> list[Boxes]:
        """O(0), O(1), ..., O(S): the last boxes of the base decoder and of each stage, those of them that were kept."""
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
            np.savez(file, **arrays)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Trace:
        """Read what :meth:`save` has written; nothing in the file is executed.

        Raises:
            UserError: when there is no such file, or it holds no trace.
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


def nearest(name: str, known: Sequence[str] | dict[str, Any]) -> str:
    """A hint at the known name that comes nearest to one that is not known."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known)}"


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
