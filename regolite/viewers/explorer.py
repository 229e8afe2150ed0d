"""Look inside a detector, live in a notebook: pick an image, click what is in it, choose layer, head, stage, level.

::

    Explorer(model, images=["image.jpg", dataset])

An image is computed once: one recorded forward pass (:func:`regolite.record`), whose trace all viewers read. Every
other choice only draws again, from the trace. An :class:`Explorer` has a tab for each viewer that suits the detector:

- :class:`AttentionViewer`: where a query looks, or a cell of the encoder, as heat on the cells;
- :class:`SamplingViewer`: the points at which deformable attention reads;
- :class:`StageViewer`: one object's way through the stages of REGO, with its glimpses;
- :class:`RelationViewer`: which other objects an object asks.

They work alone too, each with its own choice of images. ``figure()`` gives what a viewer shows as a matplotlib
figure, for print and for places where nothing is live; "Save PNG" writes that figure, its settings within.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import ipywidgets
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from regolite.errors import UserError
from regolite.plots import attention, stages
from regolite.plots.drawing import CLASS_COLORS, INK, ORANGE, SKY, stage_color
from regolite.plots.selection import Look, class_name, heads_of, last_stage, looks, predictions
from regolite.tracing.trace import AttentionMap, Sampling, Trace, Weights
from regolite.types import stage_name
from regolite.viewers.base import ALL, Viewer, offer, rounded, span
from regolite.viewers.canvas import heat_of
from regolite.viewers.gallery import Gallery, Given, Scene, labeled

# --------------------------------------------------------------------------------------- where queries and cells look


class AskingViewer(Viewer):
    """Viewers in which an object is asked, or the cell of the encoder under a point."""

    def controls(self) -> dict[str, ipywidgets.Widget]:  # noqa: D102 (said above)
        self.ask = labeled(ipywidgets.Dropdown, "Ask", options=[("an object", "object"), ("a point", "point")])
        self.x = labeled(ipywidgets.BoundedIntText, "Point: x", width="160px")
        self.y = labeled(ipywidgets.BoundedIntText, "y", width="106px")
        self.y.style.description_width = "24px"
        return {
            "threshold": self.threshold, "ask": self.ask, "object": self.object,
            "point": ipywidgets.HBox([self.x, self.y]), "layer": self.layer, "head": self.head, "level": self.level,
        }  # fmt: skip

    def names(self, trace: Trace) -> list[str]:
        """The layers that are asked now."""
        return trace.names("encoder.*" if self.ask.value == "point" else "decoder.*.cross")

    @property
    def point(self) -> tuple[float, float] | None:
        """The point that is asked: the middle of its pixel; None where an object is."""
        return (self.x.value + 0.5, self.y.value + 0.5) if self.ask.value == "point" else None

    @property
    def settings(self) -> dict[str, Any]:  # noqa: D102
        settings = super().settings
        asked = {"query": None} if self.point else {"point": None}
        return settings | {"point": self.point} | asked

    def fit(self, scene: Scene) -> None:  # noqa: D102
        trace = scene.trace
        width, height = scene.image.size
        self.x.max, self.y.max = width - 1, height - 1
        if not self.canvas.clicked:  # a new image: its middle
            self.x.value, self.y.value = width // 2, height // 2
        if not self.names(trace):  # a trace without its encoder, or without its decoder
            self.ask.value = "object" if self.ask.value == "point" else "point"
        at_point = self.ask.value == "point"
        self.object.disabled, self.x.disabled, self.y.disabled = at_point, not at_point, not at_point
        self.fit_objects(trace, predictions(trace, last_stage(trace)))
        names = self.names(trace)
        span(self.layer, len(names), len(names) - 1)
        asked = trace[names[self.layer.value]]
        heads = heads_of(asked)
        offer(self.head, [(self.all_heads.format(heads), ALL), *((str(head), head) for head in range(heads))])
        levels = [(f"{n} (stride {stride})", n) for n, stride in enumerate(asked.strides)]
        offer(self.level, [("all", ALL), *levels] if len(levels) > 1 else levels)
        self.level.disabled = len(levels) < 2

    def look(self, scene: Scene) -> Look:
        """Who looks, in which layer, by which attention."""
        query = None if self.point else self.object.value
        layer = self.layer.value
        [[look]] = looks(scene.trace, query, self.point, layer, 0)
        return look

    def draw(self, scene: Scene) -> dict[str, Any]:  # noqa: D102
        look = self.look(scene)
        boxes = self.draw_objects(predictions(scene.trace, last_stage(scene.trace)), SKY)
        clicked = [self.x.value + 0.5, self.y.value + 0.5]
        there = self.canvas.clicked
        if len(there) == 2 and [int(n) for n in there] == [self.x.value, self.y.value]:
            clicked = there  # as it came from the browser, which may be further by now
        if self.point:
            boxes = [box | {"color": SKY} for box in boxes]
        picked = -1 if self.point else self.picked
        asks = {"asks": bool(scene.trace.names("encoder.*")), "pointing": self.point is not None}
        return {"boxes": boxes, "picked": picked, "clicked": clicked, **asks, **self.draw_look(look)}

    def draw_look(self, look: Look) -> dict[str, Any]:
        """The heat or the points of one who looks."""
        raise NotImplementedError

    def who(self, look: Look) -> str:
        """Who looks, in words."""
        head = self.head.value
        heads = self.all_heads.format(heads_of(look.record)) + " heads" if head == ALL else f"head {head}"
        where = "encoder" if look.point else "decoder"
        who = f"The cell at ({self.x.value}, {self.y.value})" if look.point else f"Query {self.object.label}"
        return f"{who}, {where} layer {look.layer}, {heads}"

    def _picked(self, index: int) -> None:
        if not self._quiet and index >= 0:
            with self._quietly():
                self.ask.value = "object"
                if index < len(self.object.options):
                    self.object.value = self.object.options[index][1]
            self._changed()

    def _clicked(self, point: list) -> None:
        if not self._quiet and len(point) == 2:
            with self._quietly():
                self.ask.value = "point"
                self.x.value, self.y.value = (int(n) for n in point)
            self._changed()

    def _figure_choices(self) -> dict[str, Any]:
        asked = {"point": self.point} if self.point else {"query": self.object.value}
        head, level = (None if c.value == ALL else c.value for c in (self.head, self.level))
        return asked | {"layer": self.layer.value, "head": head, "level": level}


class AttentionViewer(AskingViewer):
    """Where an object's query looks, or a cell of the encoder: heat on the cells.

    Deformable attention, which reads between cells, is shown as the weights that cells get by it.
    """

    title = "Attention"
    all_heads = "mean of {}"

    def controls(self) -> dict[str, ipywidgets.Widget]:  # noqa: D102
        self.smooth = labeled(ipywidgets.Checkbox, "Smooth", indent=True)
        return super().controls() | {"smooth": self.smooth}

    def lacks(self, trace: Trace) -> str:  # noqa: D102
        return "" if trace.names("decoder.*.cross") else "The trace has no attention of the decoder to the image."

    def draw_look(self, look: Look) -> dict[str, Any]:  # noqa: D102
        record, number = look.record, look.number
        if isinstance(record, Sampling):
            record, number = attention.as_attention(record, number), 0
        head = None if self.head.value == ALL else self.head.value
        level = None if self.level.value == ALL else self.level.value
        heat = _on_cells(record, number, head, level)
        _, right, bottom, _ = record.extent(level or 0)
        # Cells that begin beyond the image are padding: they must not set the scale either.
        high, wide = bottom / heat.shape[0], right / heat.shape[1]
        heat = heat[: math.ceil(self.canvas.height / high), : math.ceil(self.canvas.width / wide)]
        right, bottom = wide * heat.shape[1], high * heat.shape[0]
        entropy = float(torch.special.entr(record.of(number, head)).sum())
        even = math.log(len(record.of(number, head)))
        caption = (
            f"{self.who(look)}: the most that a cell gets is {float(heat.max()):.3f}; entropy {entropy:.2f} of at most "
            f"{even:.2f} nats."
        )
        return {**heat_of(heat, (right, bottom)), "smooth": self.smooth.value, "caption": caption}

    def draw_figure(self, scene: Scene) -> Figure:  # noqa: D102
        return attention.attention_figure(scene.image, scene.trace, **self._figure_choices())


def _on_cells(record: Weights, query: int, head: int | None, level: int | None) -> Float[Tensor, "h w"]:
    """The weights on one map, or on the cells of the finest, where those of coarser cells are spread evenly.

    It is :meth:`Weights.over_image`, a number a cell instead of a number a pixel.
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


class SamplingViewer(AskingViewer):
    """The points at which deformable attention reads the image: large and clear where it takes much."""

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
        width, height = self.canvas.width, self.canvas.height
        largest = 0.016 * max(width, height)
        peak = max(float(weights[list(heads)][:, list(levels)].max()), 1e-12)
        points, outside = [], 0
        for head in heads:
            for level in levels:
                color = CLASS_COLORS + (INK,)
                color = color[(level if self.color.value == "level" else head) % len(color)]
                for (x, y), weight in zip(places[head, level].tolist(), weights[head, level].tolist()):
                    share = weight / peak
                    outside += not (0 <= x <= width and 0 <= y <= height)
                    r = largest * max(share, 0.02) ** 0.5  # the area shows the weight
                    points.append({"x": round(x, 2), "y": round(y, 2), "r": round(r, 2), "shape": "dot",
                                   "opacity": round(0.3 + 0.7 * share, 3), "color": color})  # fmt: skip
        dots = len(points)
        points.sort(key=lambda point: point["r"])  # the heaviest last, over the others
        for x, y in one.reference_points()[0].unique(dim=0).tolist():
            points.append({"x": round(x, 2), "y": round(y, 2), "r": largest, "opacity": 1.0, "color": INK,
                           "shape": "cross"})  # fmt: skip
        crosses = "Cross: reference point" if len(points) == dots + 1 else "Crosses: reference points, by level"
        by_level = self.color.value == "level"
        colors, shown = CLASS_COLORS + (INK,), (levels if by_level else heads)
        names = [f"level {n} (stride {record.strides[n]})" if by_level else f"head {n}" for n in shown]
        total = float(weights[list(heads)][:, list(levels)].sum()) / len(heads)
        note = f"; {outside} of {dots} lie outside the image" if outside else ""
        caption = f"{self.who(look)}: these points hold {100 * total:.0f} % of the weight{note}. {crosses}."
        legend = [[colors[n % len(colors)], name] for n, name in zip(shown, names)]
        return {"points": points, "legend": legend, "caption": caption}

    def draw_figure(self, scene: Scene) -> Figure:  # noqa: D102
        return attention.sampling_figure(scene.image, scene.trace, **self._figure_choices())


# ------------------------------------------------------------------------------------------------- stages, relations


class StageViewer(Viewer):
    """One object's way through the stages of REGO: its box in each of them, and the glimpse that each stage took."""

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
        return "This model has no stages: it is a detector without REGO, or its stages were not recorded."

    def fit(self, scene: Scene) -> None:  # noqa: D102
        last = last_stage(scene.trace)
        span(self.stage, last + 1, last)
        self.fit_objects(scene.trace, predictions(scene.trace, self.stage.value), keep=True)

    def draw(self, scene: Scene) -> dict[str, Any]:  # noqa: D102
        trace, stage, query = scene.trace, self.stage.value, self.object.value
        found = [predictions(trace, number) for number in range(last_stage(trace) + 1)]
        said = []
        for number, boxes in enumerate(found):
            scores, labels = boxes.best()
            said.append(f"{stage_name(number)}: {class_name(trace, int(labels[query]))} {scores[query]:.2f}")
        boxes = [box | {"color": stage_color(stage)} for box in self.draw_objects(found[stage], SKY)]
        boxes[self.picked]["tag"] = said[stage].split(": ")[1]
        if self.path.value:
            for number in range(stage):
                place = found[number].boxes_xyxy()[query].tolist()
                boxes.append({"box": rounded(place), "label": said[number], "color": stage_color(number),
                              "fixed": True})  # fmt: skip
        caption = f"Query {query}: " + ", ".join(word.replace(":", "") for word in said[: stage + 1]) + "."
        if self.glimpse.value and stage:
            glimpses = trace[f"stage.{stage}.glimpses"]
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
    """Which other objects an object asks: in a stage of REGO, or by the self-attention of the base decoder."""

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
        return "The trace has no attention from query to query."

    def fit(self, scene: Scene) -> None:  # noqa: D102
        trace, last = scene.trace, last_stage(scene.trace)
        span(self.stage, last + 1, last)
        stage = self.stage.value
        self.fit_objects(trace, predictions(trace, max(stage - 1, 0)), keep=True)
        names = trace.names(f"stage.{stage}.relations.*" if stage else "decoder.*.self")
        span(self.layer, len(names), len(names) - 1)
        record = trace[names[self.layer.value]]
        heads = heads_of(record) if isinstance(record, AttentionMap) else 1
        offer(self.head, [(f"mean of {heads}", ALL), *((str(head), head) for head in range(heads))])

    def draw(self, scene: Scene) -> dict[str, Any]:  # noqa: D102
        trace, query, choices = scene.trace, self.object.value, self._figure_choices()
        top = choices.pop("top")
        stage = choices["stage"]
        found = stages.related(trace, **choices)
        before = predictions(trace, max(stage - 1, 0))
        places = before.boxes_xyxy().tolist()
        labels = [class_name(trace, label) for label in before.best()[1].tolist()]
        boxes = self.draw_objects(before, SKY)
        at = {q: number for number, (_, q) in enumerate(self.object.options)}
        lines, said = [], []
        for other, weight in zip(found.queries[:top].tolist(), found.weights[:top].tolist()):
            word = f"{labels[other]} {100 * weight:.0f} %"
            said.append(word)
            if other not in at:  # more objects than are offered
                at[other] = len(boxes)
                boxes.append({"box": rounded(places[other]), "label": labels[other], "fixed": True})
            boxes[at[other]] |= {"color": ORANGE, "tag": word}
            ends = [*_middle(places[query], scene.image), *_middle(places[other], scene.image)]
            lines.append({"ends": rounded(ends), "width": round(1 + 16 * weight, 2), "color": ORANGE})
        boxes[self.picked]["tag"] = labels[query]
        rest = float(found.weights[top:].sum())
        who = f"{stage_name(stage).capitalize()}, layer {choices['layer']}: {labels[query]} (query {query}) asks"
        caption = f"{who} {', '.join(said) or 'no other object'}; itself {100 * found.itself:.0f} %, "
        caption += f"further objects {100 * rest:.0f} %, no object {100 * found.nothing:.0f} %."
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
    """The middle of that part of a box that lies in the image."""
    x0, x1 = (min(max(x, 0.0), float(image.width)) for x in (box[0], box[2]))
    y0, y1 = (min(max(y, 0.0), float(image.height)) for y in (box[1], box[3]))
    return (x0 + x1) / 2, (y0 + y1) / 2


# ------------------------------------------------------------------------------------------------------ all together


class Explorer(ipywidgets.VBox):
    """All viewers that suit a detector, a tab each, over one choice of images.

    Args:
        model: the detector; None where a trace is all there is.
        images: paths, PIL images and data sets to choose from.
        trace: what was recorded of the first image, so that it need not be computed.

    Attributes:
        viewers: all four, by title; also those that the detector has no use for.
        tabs: those that suit it.
    """

    def __init__(
        self, model: nn.Module | None = None, images: Sequence[Given] | Given = (), trace: Trace | None = None
    ) -> None:
        self.gallery = Gallery(model, images, trace)
        kinds = (AttentionViewer, SamplingViewer, StageViewer, RelationViewer)
        self.viewers = {kind.title: kind(gallery=self.gallery) for kind in kinds}
        self.tabs = ipywidgets.Tab()
        super().__init__([self.gallery, self.tabs], layout=ipywidgets.Layout(max_width="1040px"))
        self.add_class("rg-viewer")
        self.gallery.observe(lambda _: self._suit(), "scene")
        self._suit()

    def __repr__(self) -> str:
        """What stands in a stored notebook, where nothing is live."""
        return f"Explorer of {len(self.gallery.sources)} images"

    @property
    def viewer(self) -> Viewer:
        """The viewer whose tab is open."""
        return self.tabs.children[self.tabs.selected_index or 0]

    def figure(self) -> Figure:
        """What the open tab shows, as a matplotlib figure."""
        return self.viewer.figure()

    def _suit(self) -> None:
        scene = self.gallery.scene
        fit = [v for v in self.viewers.values() if scene is None or not v.lacks(scene.trace)]
        if list(self.tabs.children) != fit:
            self.tabs.children = fit
            self.tabs.titles = [viewer.title for viewer in fit]
            self.tabs.selected_index = 0 if fit else None
