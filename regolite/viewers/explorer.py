"""Explore a detector in a notebook: select an image, object or point, layer, head, stage and level.

::

    Explorer(model, images=["image.jpg", dataset])

Each image takes one recorded forward pass (:func:`regolite.record`); all views are drawn from its trace. An
:class:`Explorer` has a tab for each viewer that applies to the detector:

- :class:`AttentionViewer`: the attention of a query or an encoder cell as a heat map;
- :class:`SamplingViewer`: the sampling points of deformable attention;
- :class:`StageViewer`: one object through the stages of REGO, with its glimpses;
- :class:`RelationViewer`: an object's attention to other objects.

Each viewer also works alone. ``figure()`` returns the current view as a matplotlib figure; "Save PNG" writes it to a
file with its settings.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ipywidgets
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from regolite.errors import UserError
from regolite.explaining import page_of
from regolite.models.detector import as_detector
from regolite.plots import attention, stages
from regolite.plots.drawing import CLASS_COLORS, INK, ORANGE, SKY, stage_color
from regolite.plots.selection import (
    Look,
    attention_of,
    class_name,
    heads_of,
    last_stage,
    looks,
    predictions,
    record_of,
)
from regolite.tracing.trace import Glimpses, Sampling, Trace, Weights
from regolite.types import stage_name
from regolite.viewers.base import ALL, Viewer, offer, rounded, span
from regolite.viewers.canvas import heat_of
from regolite.viewers.gallery import Gallery, Given, Scene, labeled

# ------------------------------------------------------------------------------------------- attention to the image


class ImageAttentionViewer(Viewer):
    """Base class of the viewers of one query's attention: that of an object, or of the encoder cell at a point."""

    all_heads: str
    """Label of the choice of all heads, with ``{}`` for their number."""

    def controls(self) -> dict[str, ipywidgets.Widget]:  # noqa: D102 (documented in the base class)
        self.ask = labeled(ipywidgets.Dropdown, "Ask", options=[("an object", "object"), ("a point", "point")])
        self.x = labeled(ipywidgets.BoundedIntText, "Point: x", width="160px")
        self.y = labeled(ipywidgets.BoundedIntText, "y", width="106px")
        self.y.style.description_width = "24px"
        return {
            "threshold": self.threshold, "ask": self.ask, "object": self.object,
            "point": ipywidgets.HBox([self.x, self.y]), "layer": self.layer, "head": self.head, "level": self.level,
        }  # fmt: skip

    def names(self, trace: Trace) -> list[str]:
        """The trace names of the layers to choose from."""
        return trace.names("encoder.*" if self.ask.value == "point" else "decoder.*.cross")

    @property
    def point(self) -> tuple[float, float] | None:
        """The center of the selected point's pixel; None if an object is selected."""
        return (self.x.value + 0.5, self.y.value + 0.5) if self.ask.value == "point" else None

    @property
    def settings(self) -> dict[str, Any]:  # noqa: D102
        settings = super().settings
        unused = {"query": None} if self.point else {"point": None}
        return settings | {"point": self.point} | unused

    def fit(self, scene: Scene) -> None:  # noqa: D102
        trace = scene.trace
        width, height = scene.image.size
        self.x.max, self.y.max = width - 1, height - 1
        if not self.canvas.clicked:  # a new image: its center
            self.x.value, self.y.value = width // 2, height // 2
        if not self.names(trace):  # a trace without its encoder, or without its decoder
            self.ask.value = "object" if self.ask.value == "point" else "point"
        at_point = self.ask.value == "point"
        self.object.disabled, self.x.disabled, self.y.disabled = at_point, not at_point, not at_point
        self.fit_objects(trace, predictions(trace, last_stage(trace)))
        names = self.names(trace)
        span(self.layer, len(names), len(names) - 1)
        record = attention_of(trace, names[self.layer.value])
        heads = heads_of(record)
        offer(self.head, [(self.all_heads.format(heads), ALL), *((str(head), head) for head in range(heads))])
        levels = [(f"{n} (stride {stride})", n) for n, stride in enumerate(record.strides)]
        offer(self.level, [("all", ALL), *levels] if len(levels) > 1 else levels)
        self.level.disabled = len(levels) < 2

    def look(self, scene: Scene) -> Look:
        """The selected query or cell and its attention."""
        query = None if self.point else self.object.value
        layer = self.layer.value
        [[look]] = looks(scene.trace, query, self.point, layer, 0)
        return look

    def draw(self, scene: Scene) -> dict[str, Any]:  # noqa: D102
        look = self.look(scene)
        boxes = self.draw_objects(predictions(scene.trace, last_stage(scene.trace)), SKY)
        clicked = [self.x.value + 0.5, self.y.value + 0.5]
        last = self.canvas.clicked
        if len(last) == 2 and [int(n) for n in last] == [self.x.value, self.y.value]:
            clicked = last  # unchanged: the browser may have moved on
        if self.point:
            boxes = [box | {"color": SKY} for box in boxes]
        picked = -1 if self.point else self.picked
        asks = {"asks": bool(scene.trace.names("encoder.*")), "pointing": self.point is not None}
        return {"boxes": boxes, "picked": picked, "clicked": clicked, **asks, **self.draw_look(look)}

    def draw_look(self, look: Look) -> dict[str, Any]:
        """The canvas attributes of an attention."""
        raise NotImplementedError

    def who(self, look: Look) -> str:
        """The query or cell, layer and head, for the caption."""
        head = self.head.value
        heads = self.all_heads.format(heads_of(look.record)) + " heads" if head == ALL else f"head {head}"
        where = "encoder" if look.point else "decoder"
        who = f"The cell at ({self.x.value}, {self.y.value})" if look.point else f"Query {self.object.label}"
        return f"{who}, {where} layer {look.layer}, {heads}"

    def _picked(self, index: int) -> None:
        if not self._muted and index >= 0:
            with self._silenced():
                self.ask.value = "object"
                if index < len(self.object.options):
                    self.object.value = self.object.options[index][1]
            self._changed()

    def _clicked(self, point: list[float]) -> None:
        if not self._muted and len(point) == 2:
            with self._silenced():
                self.ask.value = "point"
                self.x.value, self.y.value = (int(n) for n in point)
            self._changed()

    def _figure_choices(self) -> dict[str, Any]:
        selected = {"point": self.point} if self.point else {"query": self.object.value}
        head, level = (None if c.value == ALL else c.value for c in (self.head, self.level))
        return selected | {"layer": self.layer.value, "head": head, "level": level}


class AttentionViewer(ImageAttentionViewer):
    """The attention of an object's query, or of an encoder cell, as a heat map.

    Deformable attention is converted to cell weights (:func:`regolite.plots.attention.as_attention`).
    """

    title = "Attention"
    all_heads = "mean of {}"

    def controls(self) -> dict[str, ipywidgets.Widget]:  # noqa: D102
        self.smooth = labeled(ipywidgets.Checkbox, "Smooth", indent=True)
        return super().controls() | {"smooth": self.smooth}

    def lacks(self, trace: Trace) -> str:  # noqa: D102
        return "" if trace.names("decoder.*.cross") else "The trace has no decoder cross-attention."

    def draw_look(self, look: Look) -> dict[str, Any]:  # noqa: D102
        record: Weights
        if isinstance(look.record, Sampling):
            record, number = attention.as_attention(look.record, look.number), 0
        else:
            record, number = look.record, look.number
        head = None if self.head.value == ALL else self.head.value
        level = None if self.level.value == ALL else self.level.value
        heat = _on_cells(record, number, head, level)
        _, right, bottom, _ = record.extent(level or 0)
        # Cells outside the image are padding and must not affect the scale.
        high, wide = bottom / heat.shape[0], right / heat.shape[1]
        heat = heat[: math.ceil(self.canvas.height / high), : math.ceil(self.canvas.width / wide)]
        right, bottom = wide * heat.shape[1], high * heat.shape[0]
        entropy = float(torch.special.entr(record.of(number, head)).sum())
        largest = math.log(len(record.of(number, head)))
        caption = (
            f"{self.who(look)}: largest weight of a cell {float(heat.max()):.3f}; entropy {entropy:.2f} of at most "
            f"{largest:.2f} nats."
        )
        return {**heat_of(heat, (right, bottom)), "smooth": self.smooth.value, "caption": caption}

    def draw_figure(self, scene: Scene) -> Figure:  # noqa: D102
        return attention.attention_figure(scene.image, scene.trace, **self._figure_choices())


def _on_cells(record: Weights, query: int, head: int | None, level: int | None) -> Float[Tensor, "h w"]:
    """The weights on one map, or their sum on the finest map, where coarser cells are spread evenly.

    This is :meth:`Weights.over_image` with one value per cell instead of per pixel.
    """
    if level is not None:
        return record.heat(query, head, level)
    total = record.heat(query, head, 0).clone()
    for number, stride in list(enumerate(record.strides))[1:]:
        times = stride // record.strides[0]
        heat = record.heat(query, head, number) / times**2
        fine = heat.repeat_interleave(times, 0).repeat_interleave(times, 1)[: total.shape[0], : total.shape[1]]
        total[: fine.shape[0], : fine.shape[1]] += fine
    return total


class SamplingViewer(ImageAttentionViewer):
    """The sampling points of deformable attention, larger and more opaque with their weight."""

    title = "Sampling"
    all_heads = "all {}"

    def controls(self) -> dict[str, ipywidgets.Widget]:  # noqa: D102
        self.color = labeled(ipywidgets.Dropdown, "Color by", options=["level", "head"])
        return super().controls() | {"color": self.color}

    def lacks(self, trace: Trace) -> str:  # noqa: D102
        if any(isinstance(trace[name], Sampling) for name in trace.names("decoder.*.cross")):
            return ""
        return "This detector's attention is dense and samples no points: AttentionViewer shows it."

    def draw_look(self, look: Look) -> dict[str, Any]:  # noqa: D102
        record = look.record
        if not isinstance(record, Sampling):
            raise UserError("this layer's attention is dense and samples no points: AttentionViewer shows it")
        q = slice(look.number, look.number + 1)
        one = replace(record, locations=record.locations[:, q], weights=record.weights[:, q],
                      references=record.references[:, q])  # fmt: skip
        places, weights = one.points()[0], one.weights[0, 0]  # [M, L, K, 2] and [M, L, K]
        heads = range(len(weights)) if self.head.value == ALL else [self.head.value]
        levels = range(len(record.shapes)) if self.level.value == ALL else [self.level.value]
        by_level = self.color.value == "level"
        width, height = self.canvas.width, self.canvas.height
        largest = 0.016 * max(width, height)
        peak = max(float(weights[list(heads)][:, list(levels)].max()), 1e-12)
        points: list[dict[str, Any]] = []
        outside = 0
        colors = (*CLASS_COLORS, INK)
        for head in heads:
            for level in levels:
                color = colors[(level if by_level else head) % len(colors)]
                for (x, y), weight in zip(places[head, level].tolist(), weights[head, level].tolist()):
                    share = weight / peak
                    outside += not (0 <= x <= width and 0 <= y <= height)
                    r = largest * max(share, 0.02) ** 0.5  # the area is proportional to the weight
                    points.append({"x": round(x, 2), "y": round(y, 2), "r": round(r, 2), "shape": "dot",
                                   "opacity": round(0.3 + 0.7 * share, 3), "color": color})  # fmt: skip
        dots = len(points)
        points.sort(key=lambda point: point["r"])  # large weights last, on top
        for x, y in one.reference_points()[0].unique(dim=0).tolist():
            points.append({"x": round(x, 2), "y": round(y, 2), "r": largest, "opacity": 1.0, "color": INK,
                           "shape": "cross"})  # fmt: skip
        crosses = "Cross: reference point" if len(points) == dots + 1 else "Crosses: reference points, by level"
        shown = levels if by_level else heads
        names = [f"level {n} (stride {record.strides[n]})" if by_level else f"head {n}" for n in shown]
        total = float(weights[list(heads)][:, list(levels)].sum()) / len(heads)
        note = f"; {outside} of {dots} lie outside the image" if outside else ""
        caption = f"{self.who(look)}: these points have {100 * total:.0f} % of the weight{note}. {crosses}."
        legend = [[colors[n % len(colors)], name] for n, name in zip(shown, names)]
        return {"points": points, "legend": legend, "caption": caption}

    def draw_figure(self, scene: Scene) -> Figure:  # noqa: D102
        return attention.sampling_figure(scene.image, scene.trace, **self._figure_choices())


# ------------------------------------------------------------------------------------------------- stages, relations


class StageViewer(Viewer):
    """One object through the stages of REGO: its box and glimpse in each stage."""

    title = "Stages"

    def controls(self) -> dict[str, ipywidgets.Widget]:  # noqa: D102
        self.glimpse = labeled(ipywidgets.Checkbox, "Its glimpse", value=True, indent=True)
        self.path = labeled(ipywidgets.Checkbox, "Its path", value=True, indent=True)
        return {
            "threshold": self.threshold, "stage": self.stage, "object": self.object,
            "glimpse": self.glimpse, "path": self.path,
        }  # fmt: skip

    def lacks(self, trace: Trace) -> str:  # noqa: D102
        if trace.names("stage.*.glimpses"):
            return ""
        return "The trace has no stages: the detector has no REGO, or its stages were not recorded."

    def fit(self, scene: Scene) -> None:  # noqa: D102
        last = last_stage(scene.trace)
        span(self.stage, last + 1, last)
        self.fit_objects(scene.trace, predictions(scene.trace, self.stage.value), keep=True)

    def draw(self, scene: Scene) -> dict[str, Any]:  # noqa: D102
        trace, stage, query = scene.trace, self.stage.value, self.object.value
        by_stage = [predictions(trace, number) for number in range(last_stage(trace) + 1)]
        found = []
        for predicted in by_stage:
            scores, labels = predicted.best()
            found.append(f"{class_name(trace, int(labels[query]))} {scores[query]:.2f}")
        boxes = [box | {"color": stage_color(stage)} for box in self.draw_objects(by_stage[stage], SKY)]
        boxes[self.picked]["tag"] = found[stage]
        if self.path.value:
            for number in range(stage):
                place = by_stage[number].boxes_xyxy()[query].tolist()
                boxes.append({"box": rounded(place), "label": f"{stage_name(number)}: {found[number]}",
                              "color": stage_color(number), "fixed": True})  # fmt: skip
        parts = [f"{stage_name(number)} {text}" for number, text in enumerate(found[: stage + 1])]
        caption = f"Query {query}: {', '.join(parts)}."
        if self.glimpse.value and stage:
            glimpses = record_of(trace, f"stage.{stage}.glimpses", Glimpses)
            level = int(glimpses.level[0, query])
            name = f"glimpse of stage {stage}, read from level {level} (stride {glimpses.strides[level]})"
            place = glimpses.boxes_xyxy()[query].tolist()
            boxes.append({"box": rounded(place), "label": name, "color": stage_color(stage), "fixed": True,
                          "dashed": True})  # fmt: skip
            caption += f" Dashed: {name}."
        legend = [[stage_color(number), stage_name(number)] for number in range(stage + 1)]
        return {"boxes": boxes, "picked": self.picked, "legend": legend, "caption": caption}

    def draw_figure(self, scene: Scene) -> Figure:  # noqa: D102
        return stages.stages_figure(scene.image, scene.trace, query=self.object.value)


class RelationViewer(Viewer):
    """An object's attention to other objects, in a stage of REGO or the self-attention of the base decoder."""

    title = "Relations"

    def controls(self) -> dict[str, ipywidgets.Widget]:  # noqa: D102
        self.top = labeled(ipywidgets.IntSlider, "Related", value=4, min=1, max=10)
        return {
            "threshold": self.threshold, "stage": self.stage, "object": self.object, "layer": self.layer,
            "head": self.head, "top": self.top,
        }  # fmt: skip

    def lacks(self, trace: Trace) -> str:  # noqa: D102
        if trace.names("decoder.*.self"):
            return ""
        return "The trace has no attention between queries."

    def fit(self, scene: Scene) -> None:  # noqa: D102
        trace, last = scene.trace, last_stage(scene.trace)
        span(self.stage, last + 1, last)
        stage = self.stage.value
        self.fit_objects(trace, predictions(trace, max(stage - 1, 0)), keep=True)
        names = trace.names(f"stage.{stage}.relations.*" if stage else "decoder.*.self")
        span(self.layer, len(names), len(names) - 1)
        heads = heads_of(attention_of(trace, names[self.layer.value]))
        offer(self.head, [(f"mean of {heads}", ALL), *((str(head), head) for head in range(heads))])

    def draw(self, scene: Scene) -> dict[str, Any]:  # noqa: D102
        trace, query, choices = scene.trace, self.object.value, self._figure_choices()
        top = choices.pop("top")
        stage = choices["stage"]
        found = stages.related(trace, **choices)
        previous = predictions(trace, max(stage - 1, 0))
        places = previous.boxes_xyxy().tolist()
        labels = [class_name(trace, label) for label in previous.best()[1].tolist()]
        boxes = self.draw_objects(previous, SKY)
        at = {q: number for number, (_, q) in enumerate(self.object.options)}
        lines, parts = [], []
        for other, weight in zip(found.queries[:top].tolist(), found.weights[:top].tolist()):
            text = f"{labels[other]} {100 * weight:.0f} %"
            parts.append(text)
            if other not in at:  # not selectable
                at[other] = len(boxes)
                boxes.append({"box": rounded(places[other]), "label": labels[other], "fixed": True})
            boxes[at[other]] |= {"color": ORANGE, "tag": text}
            ends = [*_middle(places[query], scene.image), *_middle(places[other], scene.image)]
            lines.append({"ends": rounded(ends), "width": round(1 + 16 * weight, 2), "color": ORANGE})
        boxes[self.picked]["tag"] = labels[query]
        rest = float(found.weights[top:].sum())
        who = f"{stage_name(stage).capitalize()}, layer {choices['layer']}: {labels[query]} (query {query}) attends to"
        caption = f"{who} {', '.join(parts) or 'no other object'}; itself {100 * found.itself:.0f} %, "
        caption += f"other objects {100 * rest:.0f} %, no object {100 * found.nothing:.0f} %."
        return {"boxes": boxes, "picked": self.picked, "lines": lines, "caption": caption}

    def draw_figure(self, scene: Scene) -> Figure:  # noqa: D102
        return stages.relations_figure(scene.image, scene.trace, **self._figure_choices())

    def _figure_choices(self) -> dict[str, Any]:
        head = None if self.head.value == ALL else self.head.value
        return {
            "query": self.object.value, "stage": self.stage.value, "layer": self.layer.value, "head": head,
            "threshold": self.threshold.value, "top": self.top.value,
        }  # fmt: skip


def _middle(box: Sequence[float], image: Image.Image) -> tuple[float, float]:
    """The center of the part of a box inside the image."""
    x0, x1 = (min(max(x, 0.0), float(image.width)) for x in (box[0], box[2]))
    y0, y1 = (min(max(y, 0.0), float(image.height)) for y in (box[1], box[3]))
    return (x0 + x1) / 2, (y0 + y1) / 2


# --------------------------------------------------------------------------------------------------------- all viewers


class Explorer(ipywidgets.VBox):
    """All viewers that apply to a detector, as tabs with a common image selection.

    Args:
        model: the detector; None to show only a given trace.
        images: paths, PIL images and data sets to choose from.
        trace: a trace of the first image, to skip its computation.

    Attributes:
        viewers: all four viewers by title, also those without a tab.
        tabs: the viewers that apply to the detector.
    """

    def __init__(
        self, model: nn.Module | None = None, images: Sequence[Given] | Given = (), trace: Trace | None = None
    ) -> None:
        self.gallery = Gallery(model, images, trace)
        kinds: tuple[type[Viewer], ...] = (AttentionViewer, SamplingViewer, StageViewer, RelationViewer)
        self.viewers: dict[str, Viewer] = {kind.title: kind(gallery=self.gallery) for kind in kinds}
        self.tabs = ipywidgets.Tab()
        super().__init__([self.gallery, self.tabs], layout=ipywidgets.Layout(max_width="1040px"))
        self.add_class("rg-viewer")
        self.gallery.observe(lambda _: self._update_tabs(), "scene")
        self._update_tabs()

    def __repr__(self) -> str:
        """The text in a stored notebook without a live widget."""
        return f"Explorer of {len(self.gallery.sources)} images"

    @property
    def viewer(self) -> Viewer:
        """The viewer whose tab is open."""
        return self.tabs.children[self.tabs.selected_index or 0]

    def figure(self) -> Figure:
        """The view of the open tab as a matplotlib figure."""
        return self.viewer.figure()

    def save_html(self, path: str | os.PathLike[str]) -> Path:
        """Write the page of the selected image (:mod:`regolite.explaining`): it shows the same without a kernel.

        Returns:
            The path of the file, over an existing one.

        Raises:
            UserError: there is no image yet, its trace lacks predictions, or the file cannot be written.
        """
        scene, model = self.gallery.scene, self.gallery.model
        if scene is None:
            raise UserError("there is no image yet: choose one")
        config = None if model is None else as_detector(model).model_config
        return page_of(scene.image, scene.trace, scene.name, model="" if config is None else config.preset).save(path)

    def _update_tabs(self) -> None:
        scene = self.gallery.scene
        fit = [v for v in self.viewers.values() if scene is None or not v.lacks(scene.trace)]
        if list(self.tabs.children) != fit:
            self.tabs.children = fit
            self.tabs.titles = [viewer.title for viewer in fit]
            self.tabs.selected_index = 0 if fit else None
