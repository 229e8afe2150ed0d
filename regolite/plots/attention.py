"""Attention over the image: attention weights as a heat map, deformable attention as its sampling points.

::

    with regolite.record(model) as trace:
        [found] = regolite.detect(model, image)
    attention_figure(image, trace, query=int(found.queries[0]))

Attention shows where a layer has read, but does not explain its prediction; notebook 13 tests this.
"""

from __future__ import annotations

import itertools
from typing import Any

import matplotlib
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from regolite.data.images import ImageSource
from regolite.errors import UserError
from regolite.plots.drawing import BLUE, HEAT, INK, draw_heat, stage_color
from regolite.plots.selection import (
    Attention,
    Point,
    Several,
    check_image,
    draw_cross,
    draw_note,
    draw_query_box,
    draw_scale,
    grid,
    heads_of,
    looks,
    several,
    shown,
    within,
)
from regolite.tracing.trace import AttentionMap, Sampling, Trace

WEIGHT = matplotlib.colormaps["magma_r"]
"""Color map of point weights: light (low) to dark (high), readable without telling hues apart."""


def attention_figure(
    image: ImageSource,
    trace: Trace,
    *,
    query: Several = None,
    point: Point | None = None,
    layer: Several = None,
    head: Several = None,
    level: int | None = None,
    index: int = 0,
) -> Figure:
    """The attention weights of decoder queries, or of one encoder cell, over the image.

    One panel for each query, layer and head. A deeper color is a larger weight; each panel's scale ends at its largest
    weight. Deformable attention, whose points lie between cells, is converted to cell weights (:func:`as_attention`).

    Args:
        image: the image, as the detector was given it.
        trace: the trace of :func:`regolite.record`.
        query: decoder queries, one or several, drawn with their boxes; by default that of the highest-scoring object.
        point: instead of a query, x and y in pixels of the image: the self-attention of the encoder cell there (on
            the finest map).
        layer: layers, one or several, counted from 0; the last by default.
        head: heads, one or several; by default the mean over the heads.
        level: one feature level; by default the sum over all.
        index: which image of the batch.

    Raises:
        UserError: if the image is not the trace's, or the trace has no such query, layer, head or level.
    """
    image = check_image(image, trace, index)
    table = looks(trace, query, point, layer, index)
    heads = [None] if head is None else several(head)
    figure, axes, width = grid(image, len(table), len(table[0]) * len(heads))
    for ax, (look, number) in zip(axes, itertools.product(itertools.chain(*table), heads)):
        _check_choice(look.record, number, level)
        record, asked = look.record, look.number
        if isinstance(record, Sampling):
            record, asked = as_attention(record, asked), 0
        heat = record.over_image(asked, number, level, index)
        peak = max(float(heat.max()), 1e-12)
        draw_heat(ax, image, heat, peak=peak)
        if look.boxes is not None:
            draw_query_box(ax, trace, look.boxes, look.number, index, stage_color(0))
        if look.point is not None:
            draw_cross(ax, torch.tensor([float(x) for x in look.point]), BLUE)
        note = shown(*_note(look.record, number, level))
        draw_scale(ax, _title(look.who, look.layer, number), note, HEAT, peak, width)
    return figure


def as_attention(sampling: Sampling, query: int) -> AttentionMap:
    """The deformable attention of one query as dense attention: every point reads its four nearest cells.

    A cell's weight is the sum, over all points, of the point's weight times the cell's bilinear interpolation weight.
    Points outside the maps read zeros, so the weights may sum to slightly less than 1.

    Returns:
        The attention map of this one query, which has number 0.
    """
    places, weights = sampling.locations[:, query], sampling.weights[:, query]  # [B, M, L, K, 2] and [B, M, L, K]
    by_level = []
    for level, shape in enumerate(sampling.shapes):
        # The output is linear in the cells, so a cell's weight is the derivative of the output.
        with torch.inference_mode(False), torch.enable_grad():
            cells = torch.zeros(weights[..., 0, 0].numel(), 1, *shape, requires_grad=True)
            at = places[:, :, level].flatten(0, 1)[:, None]
            read = F.grid_sample(cells, 2 * at - 1, align_corners=False)[:, 0, 0]  # [B * M, K]
            (share,) = torch.autograd.grad(read, cells, weights[:, :, level].flatten(0, 1))
        by_level.append(share.flatten(1).view(*weights.shape[:2], 1, -1))
    return AttentionMap(torch.cat(by_level, -1), sampling.shapes, None, sampling.frame)


def sampling_figure(
    image: ImageSource,
    trace: Trace,
    *,
    query: Several = None,
    point: Point | None = None,
    layer: Several = None,
    head: Several = None,
    level: int | None = None,
    index: int = 0,
) -> Figure:
    """The sampling points of deformable attention on the image (as Figure 6 of Deformable DETR).

    One panel for each query and layer, and for each head if heads are chosen. A point's color is its weight (weights
    sum to 1 over the levels and points of a head); its size is larger on coarser levels. The cross is the reference
    point, the box is the query's prediction in this layer. A padded image may have a second cross: padding is counted
    in whole cells, so a coarse level has a different reference point.

    Args:
        image: the image, as the detector was given it.
        trace: the trace of a deformable detector.
        query: decoder queries, one or several; by default that of the highest-scoring object.
        point: instead of a query, x and y in pixels of the image: the encoder cell there (on the finest map).
        layer: layers, one or several, counted from 0; the last by default.
        head: heads, one or several, one panel each; by default the points of all heads in one panel.
        level: one feature level; by default all.
        index: which image of the batch.

    Raises:
        UserError: if the image is not the trace's, the trace has no such query, layer, head or level, or the attention
            is dense.
    """
    image = check_image(image, trace, index)
    table = looks(trace, query, point, layer, index)
    if not all(isinstance(look.record, Sampling) for look in itertools.chain(*table)):
        raise UserError("this detector's attention is dense and samples no points: attention_figure draws it")
    heads = [None] if head is None else several(head)
    figure, axes, width = grid(image, len(table), len(table[0]) * len(heads))
    for ax, (look, number) in zip(axes, itertools.product(itertools.chain(*table), heads)):
        record = look.record
        assert isinstance(record, Sampling)  # checked above
        _check_choice(record, number, level)
        chosen_heads = slice(None) if number is None else slice(number, number + 1)
        levels = range(len(record.shapes)) if level is None else [level]
        points = record.points(index)[look.number, chosen_heads, levels]  # [M, L, K, 2]
        weights = record.weights[index, look.number, chosen_heads, levels]
        sizes = torch.tensor([12.0 + 12.0 * n for n in levels])[:, None].expand_as(weights)
        peak = max(float(weights.max()), 1e-12)
        order = weights.flatten().argsort()  # large weights last, on top
        x, y = points.flatten(0, 2)[order].unbind(-1)

        draw_heat(ax, image, torch.zeros(1, 1))  # the pale image
        style: dict[str, Any] = {
            "cmap": WEIGHT,
            "vmin": 0,
            "vmax": peak,
            "edgecolors": INK,
            "linewidths": 0.4,
            "zorder": 4,
        }
        ax.scatter(x, y, s=sizes.flatten()[order], c=weights.flatten()[order], **style)
        if look.boxes is not None:
            draw_query_box(ax, trace, look.boxes, look.number, index, stage_color(0))
        for reference in record.reference_points(index)[look.number].unique(dim=0):
            draw_cross(ax, reference, stage_color(0) if look.point is None else INK)
        outside = ((x < 0) | (y < 0) | (x > image.width) | (y > image.height)).sum().item()
        if outside:
            draw_note(ax, f"{outside} of {len(x)} points lie outside the image")
        note = shown(*_note(record, number, level, together=True))
        draw_scale(ax, _title(look.who, look.layer, number), note, WEIGHT, peak, width)
    return figure


def _check_choice(record: Attention, head: int | None, level: int | None) -> None:
    if head is not None:
        within("head", head, heads_of(record))
    if level is not None:
        within("level", level, len(record.shapes))


def _title(who: str, layer: int, head: int | None) -> str:
    return f"{who}, layer {layer}" + ("" if head is None else f", head {head}")


def _note(record: Attention, head: int | None, level: int | None, together: bool = False) -> tuple[str, str]:
    """The heads and levels of a panel, where there are several."""
    heads = "" if head is not None else f"{heads_of(record)} heads" if together else f"mean of {heads_of(record)} heads"
    if len(record.shapes) == 1:
        return heads, ""
    return heads, f"{len(record.shapes)} levels" if level is None else f"level {level}"
