"""The numbers of a page: what a trace says of one image, quantized, with a JSON header that describes the arrays.

============================  ==========================================================================================
``boxes``, ``scores``,        predictions of the decoder's layers, then of the stages, ``[P, Q, 4]`` (``cxcywh`` as
``labels``                    fractions of the image) and ``[P, Q]``
``references``                initial references of the queries, ``[Q, 2]`` or ``[Q, 4]``, as the boxes
``queries``                   the K queries that the large arrays below have rows for, highest-scoring first
``points``, ``weights``,      deformable cross-attention of the decoder: ``[D, K, M, L, N, 2]`` as fractions of
``origins``                   the image, ``[D, K, M, L, N]``, and the reference points ``[D, K, 2]``
``cells``, ``peaks``          dense cross-attention, mean over heads: weights ``[D, K, S]`` as shares of their maximum
                              ``[D, K]``
``regions``,                  the glimpses of the stages, ``[S, Q, 4]`` (``xyxy`` as fractions of the image), and the
``region_levels``             level of each, ``[S, Q]``
``relations``                 attention among queries, mean over heads, ``[E, K, Q]``; ``relations`` of the header names
                              stage and layer of each of the E
============================  ==========================================================================================

An array is stored as unsigned integers of 8 or 16 bits: ``value = low + step * code``. For boxes the error is at most
1/131,070 of the range of the coordinates: together 0.05 pixels in an image of 4,000 pixels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from regolite.errors import UserError
from regolite.tracing.trace import AttentionMap, Boxes, Glimpses, References, Sampling, Trace, Weights

MOST = 100
"""Largest number of queries with rows in the large arrays."""

BITS = {"cells": 8, "region_levels": 8}
"""Bits of a number, where it is not 16."""

ROOM = 2_800_000
"""Bytes of the large arrays; fewer queries get rows in a model with many heads, layers or cells."""


class Arrays:
    """Quantized arrays in one block of bytes, and where each of them lies.

    Attributes:
        layout: for each array its kind, shape, first byte, and how codes become values.
    """

    def __init__(self) -> None:
        self.layout: dict[str, dict[str, Any]] = {}
        self._parts: list[bytes] = []
        self._size = 0

    def add(self, name: str, values: Tensor, bits: int = 16) -> None:
        """Append an array; integers are stored exactly, other numbers on a grid over their range."""
        values = values.double().nan_to_num() if values.is_floating_point() else values
        low, high = (values.min().item(), values.max().item()) if values.numel() else (0, 0)
        low, step = (low, (high - low) / (2**bits - 1)) if values.is_floating_point() else (0, 1)
        codes = (values - low) / (step or 1.0)
        content = codes.round().numpy().astype(f"<u{bits // 8}").tobytes()
        content += bytes(len(content) % 2)  # arrays of 16 bits begin at even bytes
        self.layout[name] = {
            "kind": f"uint{bits}", "shape": list(values.shape), "low": low, "step": step, "at": self._size,
        }  # fmt: skip
        self._parts.append(content)
        self._size += len(content)

    @property
    def content(self) -> bytes:
        """The block of bytes."""
        return b"".join(self._parts)


def pack(trace: Trace, index: int = 0, most: int = MOST) -> tuple[dict[str, Any], bytes]:
    """What a trace says of one image, for the page's scripts (``pack.js``).

    Args:
        trace: the trace of a detector with queries; what it lacks, the page does not show.
        index: image of the batch.
        most: largest number of queries with rows in the large arrays; there may be less room.

    Returns:
        The header without names and texts, and the arrays.

    Raises:
        UserError: the trace has no predictions.
    """
    header, arrays = _header(trace, index), Arrays()
    queries = ranked(trace, index)[: min(most, _room(trace, index))]
    for name, values in arrays_of(trace, queries, index).items():
        arrays.add(name, values, BITS.get(name, 16))
    return {**header, "arrays": arrays.layout}, arrays.content


def ranked(trace: Trace, index: int = 0) -> Int[Tensor, "Q"]:
    """All queries, by their highest score in any layer or stage.

    Raises:
        UserError: the trace has no predictions.
    """
    scores = torch.stack([boxes.best(index)[0] for boxes in _predictions(trace)])
    return scores.amax(0).argsort(descending=True)


def arrays_of(trace: Trace, queries: Int[Tensor, "K"], index: int = 0) -> dict[str, Tensor]:
    """The arrays of one image, not quantized; ``torch.export`` can trace this function.

    Args:
        trace: the trace of a detector with queries.
        queries: those that the large arrays have rows for.
        index: image of the batch.

    Raises:
        UserError: the trace has no predictions.
    """
    size = trace.frame.original[index].flip(0)
    scores, labels = (torch.stack(values) for values in zip(*(boxes.best(index) for boxes in _predictions(trace))))
    boxes = torch.stack([boxes.boxes[index] for boxes in _predictions(trace)])
    arrays = {"boxes": boxes, "scores": scores, "labels": labels, "queries": queries}
    for record in _of_kind(trace, "references", References):
        arrays["references"] = record.references[index]
    sampled, dense = _reads(trace)
    if sampled:
        arrays["points"] = torch.stack([record.points(index)[queries] / size for record in sampled])
        arrays["weights"] = torch.stack([record.weights[index, queries] for record in sampled])
        arrays["origins"] = torch.stack([record.reference_points(index)[queries, 0] / size for record in sampled])
    elif dense:
        weights = torch.stack([_mean(record, queries, index) for record in dense])
        arrays["peaks"] = weights.amax(-1)
        arrays["cells"] = weights / arrays["peaks"].clamp(min=1e-12)[..., None]
    if glimpses := _glimpses(trace):
        arrays["regions"] = torch.stack([record.boxes_xyxy(index) for record in glimpses]) / size.repeat(2)
        arrays["region_levels"] = torch.stack([record.level[index] for record in glimpses])
    if relations := _relations(trace):
        arrays["relations"] = torch.stack([_mean(record, queries, index) for _, record in relations])
    return arrays


def _header(trace: Trace, index: int) -> dict[str, Any]:
    """What the page has to know beside the arrays: sizes, numbers of layers and stages, strides, maps, alphas."""
    height, width = trace.frame.original[index].tolist()
    layers = len(trace.names("decoder.*.boxes"))
    (sampled, dense), glimpses = _reads(trace), _glimpses(trace)
    maps = []
    for level, (rows, columns) in enumerate(dense[0].shapes if dense else ()):
        _, right, bottom, _ = dense[0].extent(level, index)
        maps.append({"rows": rows, "columns": columns, "right": right / width, "bottom": bottom / height})
    return {
        "version": 1, "width": width, "height": height,
        "layers": layers, "stages": len(_predictions(trace)) - layers,
        "strides": list((sampled or dense)[0].strides) if sampled or dense else [], "maps": maps,
        "glimpse_strides": list(glimpses[0].strides) if glimpses else [],
        "alphas": [_alpha(boxes, record, index) for boxes, record in zip(trace.by_stage, glimpses)],
        "relations": [place for place, _ in _relations(trace)],
    }  # fmt: skip


def _predictions(trace: Trace) -> list[Boxes]:
    """Those of the decoder's layers, then those of the stages."""
    layers = _of_kind(trace, "decoder.*.boxes", Boxes)
    if not layers:
        raise UserError("the trace has no decoder.*.boxes: record a detector with queries, and its predictions")
    return [*layers, *trace.by_stage[1:]]


def _reads(trace: Trace) -> tuple[list[Sampling], list[Weights]]:
    """Cross-attention of every layer of the decoder, deformable or dense; both empty if not every layer has it."""
    reads = [trace[name] for name in trace.names("decoder.*.cross")]
    sampled = [record for record in reads if isinstance(record, Sampling)]
    dense: list[Weights] = [record for record in reads if isinstance(record, Weights)]
    layers = len(trace.names("decoder.*.boxes"))
    return sampled if len(sampled) == layers else [], dense if len(dense) == layers else []


def _glimpses(trace: Trace) -> list[Glimpses]:
    """The glimpses of every stage; none if not every stage has them."""
    found = _of_kind(trace, "stage.*.glimpses", Glimpses)
    return found if len(found) == len(trace.by_stage) - 1 else []


def _of_kind(trace: Trace, pattern: str, kind: type) -> list[Any]:
    return [trace[name] for name in trace.names(pattern) if isinstance(trace[name], kind)]


def _relations(trace: Trace) -> list[tuple[tuple[int, int], Weights]]:
    """Attention among queries with its stage and layer: self-attention of the base decoder, relations of the stages."""
    found: list[tuple[tuple[int, int], Weights]] = []
    for name in [*trace.names("decoder.*.self"), *trace.names("stage.*.relations.*")]:
        record, words = trace[name], name.split(".")
        if isinstance(record, Weights):
            place = (0, int(words[1])) if words[0] == "decoder" else (int(words[1]), int(words[3]))
            found.append((place, record))
    return found


def _room(trace: Trace, index: int) -> int:
    """For how many queries there is room in the large arrays."""
    sampled, dense = _reads(trace)
    row = sum(6 * record.weights[index, 0].numel() + 4 for record in sampled)
    row += sum(sum(math.prod(shape) for shape in record.shapes) + 2 for record in dense)
    row += sum(2 * record.weights.shape[-1] for _, record in _relations(trace))
    return max(1, min(MOST, ROOM // max(row, 1)))


def _mean(record: Weights, queries: Tensor, index: int) -> Tensor:
    """The weights of queries, mean over the heads."""
    if isinstance(record, AttentionMap):
        return record.weights[index][:, queries].mean(0)
    return torch.stack([record.of(query, None, index) for query in queries.tolist()])


def _alpha(boxes: Boxes, glimpses: Glimpses, index: int) -> float:
    """By how much the glimpses of a stage are larger than the boxes before it."""
    before, regions = boxes.boxes_xyxy(index), glimpses.boxes_xyxy(index)
    ratios = (regions[:, 2:] - regions[:, :2]) / (before[:, 2:] - before[:, :2]).clamp(min=1e-6)
    return round(ratios.nan_to_num().median().item(), 2)
