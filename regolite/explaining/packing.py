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
from torch import Tensor

from regolite.errors import UserError
from regolite.tracing.trace import Boxes, Glimpses, References, Sampling, Trace, Weights

MOST = 100
"""Largest number of queries with rows in the large arrays."""

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


def pack(trace: Trace, index: int = 0) -> tuple[dict[str, Any], bytes]:
    """What a trace says of one image, for the page's scripts (``pack.js``).

    Args:
        trace: the trace of a detector with queries; what it lacks, the page does not show.
        index: image of the batch.

    Returns:
        The header without names and texts, and the arrays.

    Raises:
        UserError: the trace has no predictions.
    """
    height, width = trace.frame.original[index].tolist()
    layers = _of_kind(trace, "decoder.*.boxes", Boxes)
    if not layers:
        raise UserError("the trace has no decoder.*.boxes: record a detector with queries, and its predictions")
    predictions = [*layers, *trace.by_stage[1:]]
    size = torch.tensor([float(width), float(height)])
    arrays = Arrays()
    scores, labels = (torch.stack(values) for values in zip(*(boxes.best(index) for boxes in predictions)))
    arrays.add("boxes", torch.stack([boxes.boxes[index] for boxes in predictions]))
    arrays.add("scores", scores)
    arrays.add("labels", labels)
    if "references" in trace:
        [references] = _of_kind(trace, "references", References)
        arrays.add("references", references.references[index])
    header: dict[str, Any] = {
        "version": 1, "width": width, "height": height, "layers": len(layers), "stages": len(predictions) - len(layers),
        "strides": [], "maps": [], "glimpse_strides": [], "alphas": [],
    }  # fmt: skip

    reads = [trace[name] for name in trace.names("decoder.*.cross")]
    sampled = [record for record in reads if isinstance(record, Sampling)]
    dense: list[Weights] = [record for record in reads if isinstance(record, Weights)]
    relations = _relations(trace)
    queries = _queries(scores, sampled, dense, [record for _, record in relations], index)
    arrays.add("queries", queries)
    if len(sampled) == len(layers):
        header["strides"] = list(sampled[0].strides)
        arrays.add("points", torch.stack([record.points(index)[queries] / size for record in sampled]))
        arrays.add("weights", torch.stack([record.weights[index, queries] for record in sampled]))
        arrays.add("origins", torch.stack([record.reference_points(index)[queries, 0] / size for record in sampled]))
    elif len(dense) == len(layers):
        header["strides"] = list(dense[0].strides)
        for level, (rows, columns) in enumerate(dense[0].shapes):
            _, right, bottom, _ = dense[0].extent(level, index)
            header["maps"].append({"rows": rows, "columns": columns, "right": right / width, "bottom": bottom / height})
        weights = torch.stack([_mean(record, queries, index) for record in dense])
        peaks = weights.amax(-1)
        arrays.add("cells", weights / peaks.clamp(min=1e-12)[..., None], bits=8)
        arrays.add("peaks", peaks)
    glimpses = _of_kind(trace, "stage.*.glimpses", Glimpses)
    if glimpses and len(glimpses) == header["stages"]:
        regions = torch.stack([record.boxes_xyxy(index) for record in glimpses])
        header["glimpse_strides"] = list(glimpses[0].strides)
        header["alphas"] = [_alpha(boxes, region, index) for boxes, region in zip(trace.by_stage, regions)]
        arrays.add("regions", regions / size.repeat(2))
        arrays.add("region_levels", torch.stack([record.level[index] for record in glimpses]), bits=8)
    header["relations"] = [place for place, _ in relations]
    if relations:
        arrays.add("relations", torch.stack([_mean(record, queries, index) for _, record in relations]))
    return {**header, "arrays": arrays.layout}, arrays.content


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


def _queries(
    scores: Tensor, sampled: list[Sampling], dense: list[Weights], relations: list[Weights], index: int
) -> Tensor:
    """The queries with the highest scores in any layer or stage, as many as there is room for."""
    count = scores.shape[1]
    row = sum(6 * record.weights[index, 0].numel() + 4 for record in sampled)
    row += sum(sum(math.prod(shape) for shape in record.shapes) + 2 for record in dense)
    row += 2 * count * len(relations)
    return scores.amax(0).argsort(descending=True, stable=True)[: max(1, min(MOST, ROOM // max(row, 1)))]


def _mean(record: Weights, queries: Tensor, index: int) -> Tensor:
    """The weights of queries, mean over the heads."""
    return torch.stack([record.of(query, None, index) for query in queries.tolist()])


def _alpha(boxes: Boxes, regions: Tensor, index: int) -> float:
    """By how much the glimpses of a stage are larger than the boxes before it."""
    before = boxes.boxes_xyxy(index)
    ratios = (regions[:, 2:] - regions[:, :2]) / (before[:, 2:] - before[:, :2]).clamp(min=1e-6)
    return round(ratios.nan_to_num().median().item(), 2)
