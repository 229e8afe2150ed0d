"""The choice of an image, for viewers: one of those that were given, or one's own. The detector runs here, once."""

from __future__ import annotations

import html
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import ipywidgets
import traitlets
from PIL import Image
from torch import nn

from regolite.data import DetectionDataset, list_images, read_image
from regolite.errors import UserError
from regolite.inference import detect
from regolite.plots.selection import check_image
from regolite.tracing.recorder import record
from regolite.tracing.trace import Trace
from regolite.viewers.canvas import jpeg_of

KEPT = 3  # images whose traces are kept: that of a large DETR takes hundreds of megabytes

Given = str | os.PathLike | Image.Image | DetectionDataset


@dataclass(frozen=True)
class Scene:
    """An image, and what happened inside the detector that looked at it."""

    name: str
    image: Image.Image
    trace: Trace

    @cached_property
    def jpeg(self) -> bytes:
        """The image as browsers get it."""
        return jpeg_of(self.image)


@dataclass(frozen=True)
class Source:
    """Where an image comes from, and its trace, where somebody has it already."""

    name: str
    open: Callable[[], Image.Image]
    trace: Trace | None = None


def labeled(kind: type, label: str, **more: Any) -> Any:
    """A control with its label, all of them aligned."""
    width = more.pop("width", "270px")
    style = {"description_width": "84px"}
    return kind(description=label, style=style, layout=ipywidgets.Layout(width=width, margin="1px"), **more)


class Message(ipywidgets.HTML):
    """A line that says what is being done, or what went wrong; gone when there is nothing to say."""

    text = traitlets.Unicode("")

    def __init__(self) -> None:
        super().__init__(layout=ipywidgets.Layout(display="none", margin="1px 4px"))

    def say(self, text: str, wrong: bool = True) -> None:
        """Show a line; screen readers read it out."""
        color = "var(--jp-error-color1, #b3261e)" if wrong else "inherit"
        role = "alert" if wrong else "status"
        self.text = text
        self.value = f'<div role="{role}" style="color: {color}; line-height: 1.4">{html.escape(text)}</div>'
        self.layout.display = "block" if text else "none"


class Gallery(ipywidgets.VBox):
    """The choice of an image: one of those that were given, or one's own; it runs the detector and keeps the traces.

    Args:
        model: the detector; None where a trace is all there is.
        images: paths, PIL images and data sets.
        trace: what was recorded of the first image, so that it need not be computed.

    Attributes:
        scene: the image that is looked at, with its trace; None before there is one. Observe it.
    """

    scene = traitlets.Any(None)

    def __init__(
        self, model: nn.Module | None = None, images: Sequence[Given] | Given = (), trace: Trace | None = None
    ) -> None:
        self.model = model
        self.sources: dict[int, Source] = dict(enumerate(_sources(images)))
        if trace is not None:
            if not self.sources:
                raise UserError("a trace is shown over its image: give that too, as the first of images")
            self.sources[0] = replace(self.sources[0], trace=trace)
        self._next = len(self.sources)
        self._own: list[int] = []  # images that were uploaded, which only we hold
        self._scenes: OrderedDict[int, Scene] = OrderedDict()

        self.chooser = labeled(ipywidgets.Dropdown, "Image", width="290px")
        self.upload = ipywidgets.FileUpload(
            accept="image/*", description="Your image", tooltip="a file of your computer",
            layout=ipywidgets.Layout(width="140px"),
        )  # fmt: skip
        self.path = ipywidgets.Text(
            description="or its path", placeholder="image.jpg", continuous_update=False,
            style={"description_width": "70px"}, layout=ipywidgets.Layout(width="260px"),
        )  # fmt: skip
        self.message = Message()
        row = ipywidgets.HBox([self.chooser, self.upload, self.path])
        row.layout.flex_flow = "row wrap"
        super().__init__([row, self.message])
        self._offer(0 if self.sources else None)
        self.chooser.observe(lambda change: self._choose(change["new"]), "value")
        self.upload.observe(lambda change: self._uploaded(change["new"]), "value")
        self.path.observe(lambda change: self._named(change["new"]), "value")
        self._choose(self.chooser.value)

    @property
    def kept(self) -> list[str]:
        """Names of the images whose traces are kept."""
        return [scene.name for scene in self._scenes.values()]

    def _offer(self, chosen: int | None) -> None:
        """Let the drop-down offer all images there are."""
        options = [("no image yet", None)] if not self.sources else []
        self.chooser.options = options + [(source.name, number) for number, source in self.sources.items()]
        self.chooser.value = chosen

    def _choose(self, number: int | None) -> None:
        if number is None:
            return self.message.say("Choose an image: a file of your own, or its path.", wrong=False)
        try:
            self.scene = self._compute(number)
            self.message.say("")
        except UserError as error:
            self.message.say(str(error))

    def _compute(self, number: int) -> Scene:
        if number not in self._scenes:
            source = self.sources[number]
            self.message.say(f"computing {source.name} ...", wrong=False)
            image, trace = source.open(), source.trace
            if trace is not None:
                check_image(image, trace, 0)
            elif self.model is None:
                raise UserError(f"{source.name} has no trace, and without a model it can't be computed: give a model")
            else:
                while len(self._scenes) >= KEPT:  # before, so that there is room
                    self._scenes.popitem(last=False)
                with record(self.model) as trace:
                    detect(self.model, image)
            self._scenes[number] = Scene(source.name, image, trace)
            while len(self._scenes) > KEPT:
                self._scenes.popitem(last=False)
        self._scenes.move_to_end(number)
        return self._scenes[number]

    def _uploaded(self, files: Sequence[Any]) -> None:
        if not files:
            return
        file = files[0]
        try:
            image = _decode(file["name"], bytes(file["content"]))
        except UserError as error:
            return self.message.say(str(error))
        finally:
            self.upload.value = ()  # it would keep the file a second time
        self._own.append(self._next)
        while len(self._own) > KEPT:
            old = self._own.pop(0)
            del self.sources[old]
            self._scenes.pop(old, None)
        self._add(Source(file["name"], lambda: image))

    def _named(self, path: str) -> None:
        path = path.strip()
        if not path:
            return
        try:
            read_image(path)
        except UserError as error:
            return self.message.say(str(error))
        known = [number for number, source in self.sources.items() if source.name == path]
        if known:
            self.chooser.value = known[0]
        else:
            self._add(Source(path, lambda: read_image(path)))

    def _add(self, source: Source) -> None:
        number, self._next = self._next, self._next + 1
        self.sources[number] = source
        self._offer(number)


def _sources(images: Sequence[Given] | Given) -> Iterator[Source]:
    if isinstance(images, (str, os.PathLike, Image.Image, DetectionDataset)):
        images = [images]
    for number, given in enumerate(images):
        if isinstance(given, DetectionDataset):
            for i in range(len(given)):
                yield Source(Path(given.file_name(i)).name, lambda given=given, i=i: given.image(i))
        elif isinstance(given, Image.Image):
            name = Path(getattr(given, "filename", "") or f"image {number + 1}").name
            yield Source(name, lambda given=given: read_image(given))
        else:
            for path in _files(given):
                yield Source(Path(path).name, lambda path=path: read_image(path))


def _files(given: str | os.PathLike) -> list[Any]:
    """The files of a folder or pattern; what cannot be found is said when it is chosen."""
    try:
        return list_images(given)
    except UserError:
        return [given]


def _decode(name: str, content: bytes) -> Image.Image:
    """An image from the bytes of a file."""
    try:
        return read_image(content)
    except UserError:
        raise UserError(f"{name} is no image that can be read: choose a JPEG or PNG file") from None
