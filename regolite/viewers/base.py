"""What all viewers have in common: a canvas, an object to choose, a threshold, a file to save to."""

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

MOST = 50  # boxes that are drawn: a hundred would hide the image, and nobody tabs through them
ALL = -1  # in drop-downs, whose None means that nothing is chosen: the mean of all heads, or all levels


class Viewer(ipywidgets.VBox):
    """What all viewers share: images, a canvas, controls beside it, a button that saves.

    A viewer says by :meth:`lacks` whether a trace has what it shows, by :meth:`fit` which choices a trace offers, and
    by :meth:`draw` what the canvas shows of the present choices.

    Args:
        model: the detector; None where a trace is all there is.
        images: paths, PIL images and data sets to choose from.
        trace: what was recorded of the first image, so that it need not be computed.
        gallery: images that several viewers share, instead of all that.
    """

    title = ""
    """Name of the tab, and in small letters of the file that is saved."""

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
        self._quiet = False
        self.choices = self.controls()
        beside = [*self.choices.values(), self.file, self.button, self.saved]
        side = ipywidgets.VBox(beside, layout=ipywidgets.Layout(flex="0 0 280px"))
        body = ipywidgets.HBox([self.canvas, side], layout=ipywidgets.Layout(flex_flow="row wrap"))
        own = [] if gallery else [self.gallery]
        super().__init__([*own, self.message, body], layout=ipywidgets.Layout(max_width="1000px"))

        self.add_class("rg-viewer")  # for canvas.js: keys pressed in here are not the notebook's
        for control in self.choices.values():
            for part in control.children if isinstance(control, ipywidgets.Box) else [control]:
                part.observe(lambda _: self._changed(), "value")
        self.canvas.observe(lambda change: self._picked(change["new"]), "picked")
        self.canvas.observe(lambda change: self._clicked(change["new"]), "clicked")
        self.button.on_click(lambda _: self._save())
        self.gallery.observe(lambda _: self._new_scene(), "scene")
        self._new_scene()

    # What a viewer is.

    def controls(self) -> dict[str, ipywidgets.Widget]:
        """The controls beside the image, by name, in their order."""
        raise NotImplementedError

    def lacks(self, trace: Trace) -> str:
        """What a trace lacks that this viewer needs, as a sentence; nothing where it has all."""
        raise NotImplementedError

    def fit(self, scene: Scene) -> None:
        """Set the choices that the controls offer to those that there are."""
        raise NotImplementedError

    def draw(self, scene: Scene) -> dict[str, Any]:
        """What the canvas shows: its attributes."""
        raise NotImplementedError

    def draw_figure(self, scene: Scene) -> Figure:
        """The static figure of the present choices."""
        raise NotImplementedError

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that is chosen, by the names that the figures use."""
        scene, choices = self.gallery.scene, {}
        for name, control in self.choices.items():
            if hasattr(control, "value"):
                value = control.value
                value = None if name in ("head", "level") and value == ALL else value
                choices["query" if name == "object" else name] = value
        return {"viewer": self.title.lower(), "image": scene.name if scene else None, **choices, "index": 0}

    def figure(self) -> Figure:
        """What is shown, as a matplotlib figure.

        Raises:
            UserError: when there is no image yet, or the detector has nothing that this viewer shows.
        """
        scene = self.gallery.scene
        if scene is None:
            raise UserError("there is no image yet: choose one")
        if self.lacks(scene.trace):
            raise UserError(self.lacks(scene.trace))
        return self.draw_figure(scene)

    def save(self, path: str | os.PathLike) -> Path:
        """Write :meth:`figure` as PNG, with the settings in its text field ``regolite``, as JSON.

        Args:
            path: of the file; where there is one already, a number is added to its name.

        Returns:
            The path of the file.
        """
        figure = self.figure()
        wanted = Path(path).with_suffix(".png")
        file, number = wanted, 1
        while file.exists():
            number += 1
            file = wanted.with_stem(f"{wanted.stem}_{number}")
        try:
            figure.savefig(file, dpi=DPI, metadata={"Software": None, "regolite": json.dumps(self.settings)})
        except OSError as error:
            raise UserError(f"{file} can't be written: {error.strerror or error}") from error
        return file

    # What happens.

    @contextmanager
    def _quietly(self) -> Iterator[None]:
        """Set controls without drawing at each of them."""
        before, self._quiet = self._quiet, True
        try:
            yield
        finally:
            self._quiet = before

    def _new_scene(self) -> None:
        scene = self.gallery.scene
        reason = self.lacks(scene.trace) if scene else ""
        for control in (*self.choices.values(), self.file, self.button):
            for part in getattr(control, "children", [control]):
                part.disabled = scene is None or bool(reason)
        self.message.say(reason)
        if scene is None:
            return
        with self._quietly():
            label = f"{scene.name}, {scene.image.width} x {scene.image.height} pixels"
            self.canvas.show_image(scene.image, scene.jpeg, label)
            self.object.options = ()  # whoever was chosen is in another image
        if not reason:
            self._changed()

    def _changed(self) -> None:
        """Draw again, of what is chosen now."""
        scene = self.gallery.scene
        if self._quiet or scene is None or self.lacks(scene.trace):
            return
        with self._quietly():
            self.saved.say("")
            try:
                self.fit(scene)
                self.canvas.show(**self.draw(scene), settings=json.dumps(self.settings))
            except UserError as error:
                self.message.say(str(error))

    def _picked(self, index: int) -> None:
        """Somebody picked a box."""
        if not self._quiet and 0 <= index < len(self.object.options):
            self.object.value = self.object.options[index][1]

    def _clicked(self, point: list) -> None:
        """Somebody asked for a point; only some viewers answer."""

    def _save(self) -> None:
        try:
            self.saved.say(f"Saved {self.save(self.file.value.strip() or self.title.lower()).resolve()}", wrong=False)
        except UserError as error:
            self.saved.say(str(error))

    # What several of them need.

    def fit_objects(self, trace: Trace, boxes: Boxes, keep: bool = False) -> None:
        """Offer what was found, best first; the best alone where nothing is above the threshold.

        Args:
            trace: what was recorded.
            boxes: of which stage.
            keep: offer the object that is chosen now, whatever its score.
        """
        scores, labels = boxes.best()
        order = scores.argsort(descending=True, stable=True)[:MOST]
        chosen = order[scores[order] >= self.threshold.value].tolist()
        self.message.say("")
        if not chosen:
            best, least = scores.max().item(), self.threshold.value
            self.message.say(f"Nothing has a score of {least:.2f} or more: this is the best, of {best:.2f}.", False)
            chosen = order[:1].tolist()
        now = self.object.value
        if keep and now is not None and now < len(scores) and now not in chosen:
            chosen.append(now)
        names = [f"{q}: {class_name(trace, int(labels[q]))} {scores[q]:.2f}" for q in chosen]
        offer(self.object, list(zip(names, chosen)))

    def draw_objects(self, boxes: Boxes, color: str) -> list[dict[str, Any]]:
        """The boxes of the objects that are offered, in their order."""
        places = boxes.boxes_xyxy().tolist()
        chosen = self.object.value
        return [
            {"box": rounded(places[q]), "label": name, "color": BLUE if q == chosen else color}
            for name, q in self.object.options
        ]

    @property
    def picked(self) -> int:
        """The number of the chosen object among those that are offered."""
        return [query for _, query in self.object.options].index(self.object.value)


def offer(control: ipywidgets.Dropdown, options: list[tuple[str, int]]) -> None:
    """Let a drop-down offer these, and keep what is chosen if it is among them."""
    now = control.value
    if list(control.options) != options:
        control.options = options
    values = [value for _, value in options]
    control.value = now if now in values else values[0]


def span(control: ipywidgets.IntSlider, count: int, fresh: int) -> None:
    """Let a slider go over 0, ..., count - 1; ``fresh`` is where it stands the first time, or when it is too far."""
    first = not hasattr(control, "fitted")
    control.fitted = True
    if control.max != count - 1:
        stands = fresh if first or control.value > count - 1 else control.value
        control.max = count - 1
        control.value = stands
    elif first:
        control.value = fresh
    control.disabled = count < 2


def rounded(numbers: Sequence[float]) -> list[float]:
    """Places with two decimals: what is sent to the browser need not be longer."""
    return [round(float(number), 2) for number in numbers]
