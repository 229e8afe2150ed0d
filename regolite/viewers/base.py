"""Base class of the viewers: canvas, object selection, score threshold, saving."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ipywidgets
from matplotlib.figure import Figure
from torch import nn

from regolite.errors import UserError
from regolite.plots.detections import THRESHOLD
from regolite.plots.drawing import BLUE, DPI
from regolite.plots.selection import class_name
from regolite.tracing.trace import Boxes, Trace
from regolite.viewers.canvas import ImageCanvas
from regolite.viewers.gallery import Gallery, Given, Message, Scene, labeled

MOST = 50  # maximum number of boxes that are drawn: more would hide the image
ALL = -1  # value of "mean of all heads" or "all levels" in drop-downs, where None means no selection


class Viewer(ipywidgets.VBox):
    """Base class of the viewers: images, a canvas, controls beside it, a save button.

    Subclasses implement :meth:`lacks` (can a trace be shown?), :meth:`fit` (set the options of the controls) and
    :meth:`draw` (the state of the canvas).

    Args:
        model: the detector; None to show only a given trace.
        images: paths, PIL images and data sets to choose from.
        trace: a trace of the first image, to skip its computation.
        gallery: a gallery shared by several viewers; it replaces the other arguments.
    """

    title = ""
    """Title of the tab; in lower case the default name of saved files."""

    def __init__(
        self,
        model: nn.Module | None = None,
        images: Sequence[Given] | Given = (),
        trace: Trace | None = None,
        *,
        gallery: Gallery | None = None,
    ) -> None:
        self.gallery = gallery or Gallery(model, images, trace)
        self.canvas = ImageCanvas(layout=ipywidgets.Layout(flex="1 1 340px", max_width="680px", margin="0 12px 0 0"))
        self.object = labeled(ipywidgets.Dropdown, "Object")
        self.threshold = labeled(
            ipywidgets.FloatSlider, "Least score", value=THRESHOLD, max=1.0, step=0.01, readout_format=".2f"
        )
        self.layer = labeled(ipywidgets.IntSlider, "Layer")
        self.head = labeled(ipywidgets.Dropdown, "Head")
        self.stage = labeled(ipywidgets.IntSlider, "Stage")
        self.level = labeled(ipywidgets.Dropdown, "Level")
        self.file = labeled(ipywidgets.Text, "Save as", value=f"{self.title.lower()}.png", continuous_update=False)
        self.button = ipywidgets.Button(
            description="Save PNG", icon="download", layout=ipywidgets.Layout(width="178px", margin="1px 1px 1px 93px")
        )
        self.saved = Message()
        self.message = Message()
        self._muted = False
        self.choices = self.controls()
        controls = [*self.choices.values(), self.file, self.button, self.saved]
        side = ipywidgets.VBox(controls, layout=ipywidgets.Layout(flex="0 0 280px"))
        body = ipywidgets.HBox([self.canvas, side], layout=ipywidgets.Layout(flex_flow="row wrap"))
        own = [] if gallery else [self.gallery]
        super().__init__([*own, self.message, body], layout=ipywidgets.Layout(max_width="1000px"))

        self.add_class("rg-viewer")  # canvas.js keeps key presses in here from the notebook
        for control in self.choices.values():
            for part in control.children if isinstance(control, ipywidgets.Box) else [control]:
                part.observe(lambda _: self._changed(), "value")
        self.canvas.observe(lambda change: self._picked(change["new"]), "picked")
        self.canvas.observe(lambda change: self._clicked(change["new"]), "clicked")
        self.button.on_click(lambda _: self._save())
        self.gallery.observe(lambda _: self._new_scene(), "scene")
        self._new_scene()

    # Implemented by subclasses.

    def controls(self) -> dict[str, ipywidgets.Widget]:
        """The controls beside the image, by name, in display order."""
        raise NotImplementedError

    def lacks(self, trace: Trace) -> str:
        """A sentence on what the trace lacks for this viewer; empty if nothing."""
        raise NotImplementedError

    def fit(self, scene: Scene) -> None:
        """Set the options of the controls to those of the scene."""
        raise NotImplementedError

    def draw(self, scene: Scene) -> dict[str, Any]:
        """The attributes of the canvas."""
        raise NotImplementedError

    def draw_figure(self, scene: Scene) -> Figure:
        """The static figure of the current settings."""
        raise NotImplementedError

    @property
    def settings(self) -> dict[str, Any]:
        """The current settings, by keyword of the figures."""
        scene, choices = self.gallery.scene, {}
        for name, control in self.choices.items():
            if hasattr(control, "value"):
                value = control.value
                value = None if name in ("head", "level") and value == ALL else value
                choices["query" if name == "object" else name] = value
        return {"viewer": self.title.lower(), "image": scene.name if scene else None, **choices, "index": 0}

    def figure(self) -> Figure:
        """The current view as a matplotlib figure.

        Raises:
            UserError: if there is no image yet, or its trace lacks what this viewer shows.
        """
        scene = self.gallery.scene
        if scene is None:
            raise UserError("there is no image yet: choose one")
        if self.lacks(scene.trace):
            raise UserError(self.lacks(scene.trace))
        return self.draw_figure(scene)

    def save(self, path: str | os.PathLike) -> Path:
        """Write :meth:`figure` as PNG, with the settings as JSON in its text field ``regolite``.

        Args:
            path: path of the file; a number is appended if it exists.

        Returns:
            The path of the file.

        Raises:
            UserError: if there is no figure, or the file cannot be written.
        """
        figure = self.figure()
        first = Path(path).with_suffix(".png")
        file, number = first, 1
        while file.exists():
            number += 1
            file = first.with_stem(f"{first.stem}_{number}")
        try:
            figure.savefig(file, dpi=DPI, metadata={"Software": None, "regolite": json.dumps(self.settings)})
        except OSError as error:
            raise UserError(f"{file} can't be written: {error.strerror or error}") from error
        return file

    # Event handlers.

    @contextmanager
    def _silenced(self) -> Iterator[None]:
        """Set controls without redrawing after each change."""
        before, self._muted = self._muted, True
        try:
            yield
        finally:
            self._muted = before

    def _new_scene(self) -> None:
        scene = self.gallery.scene
        missing = self.lacks(scene.trace) if scene else ""
        for control in (*self.choices.values(), self.file, self.button):
            for part in getattr(control, "children", [control]):
                part.disabled = scene is None or bool(missing)
        self.message.say(missing)
        if scene is None:
            return
        with self._silenced():
            label = f"{scene.name}, {scene.image.width} x {scene.image.height} pixels"
            self.canvas.show_image(scene.image, scene.jpeg, label)
            self.object.options = ()  # objects of the previous image
        if not missing:
            self._changed()

    def _changed(self) -> None:
        """Redraw with the current settings."""
        scene = self.gallery.scene
        if self._muted or scene is None or self.lacks(scene.trace):
            return
        with self._silenced():
            self.saved.say("")
            try:
                self.fit(scene)
                self.canvas.show(**self.draw(scene), settings=json.dumps(self.settings))
            except UserError as error:
                self.message.say(str(error))

    def _picked(self, index: int) -> None:
        """Select the object whose box was picked."""
        if not self._muted and 0 <= index < len(self.object.options):
            self.object.value = self.object.options[index][1]

    def _clicked(self, point: list) -> None:
        """Handle a selected point; the base class ignores it."""

    def _save(self) -> None:
        try:
            self.saved.say(f"Saved {self.save(self.file.value.strip() or self.title.lower()).resolve()}", wrong=False)
        except UserError as error:
            self.saved.say(str(error))

    # Shared by several viewers.

    def fit_objects(self, trace: Trace, boxes: Boxes, keep: bool = False) -> None:
        """Set the options of the object control: those above the threshold, best first, or else the best alone.

        Args:
            trace: the trace.
            boxes: predictions of a stage.
            keep: keep the current selection, whatever its score.
        """
        scores, labels = boxes.best()
        order = scores.argsort(descending=True, stable=True)[:MOST]
        chosen = order[scores[order] >= self.threshold.value].tolist()
        self.message.say("")
        if not chosen:
            best, least = scores.max().item(), self.threshold.value
            self.message.say(f"No object has a score of {least:.2f} or more: showing the best, {best:.2f}.", False)
            chosen = order[:1].tolist()
        now = self.object.value
        if keep and now is not None and now < len(scores) and now not in chosen:
            chosen.append(now)
        names = [f"{q}: {class_name(trace, int(labels[q]))} {scores[q]:.2f}" for q in chosen]
        offer(self.object, list(zip(names, chosen)))

    def draw_objects(self, boxes: Boxes, color: str) -> list[dict[str, Any]]:
        """The boxes of the selectable objects, in their order."""
        places = boxes.boxes_xyxy().tolist()
        chosen = self.object.value
        return [
            {"box": rounded(places[q]), "label": name, "color": BLUE if q == chosen else color}
            for name, q in self.object.options
        ]

    @property
    def picked(self) -> int:
        """Index of the selected object among the selectable ones."""
        return [query for _, query in self.object.options].index(self.object.value)


def offer(control: ipywidgets.Dropdown, options: list[tuple[str, int]]) -> None:
    """Set the options of a drop-down, keeping its value if possible."""
    now = control.value
    if list(control.options) != options:
        control.options = options
    values = [value for _, value in options]
    control.value = now if now in values else values[0]


def span(control: ipywidgets.IntSlider, count: int, default: int) -> None:
    """Set a slider's range to 0, ..., count - 1; ``default`` is its first value, and its value if out of range."""
    first = not hasattr(control, "fitted")
    control.fitted = True
    if control.max != count - 1:
        value = default if first or control.value > count - 1 else control.value
        control.max = count - 1
        control.value = value
    elif first:
        control.value = default
    control.disabled = count < 2


def rounded(numbers: Sequence[float]) -> list[float]:
    """Coordinates with two decimals, to keep messages to the browser short."""
    return [round(float(number), 2) for number in numbers]
