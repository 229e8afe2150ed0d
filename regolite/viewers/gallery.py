"""Image selection for the viewers, including uploads; runs the detector once per image."""

from __future__ import annotations

import html
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import ipywidgets
import traitlets
from PIL import Image
from torch import nn

from regolite.data import DetectionDataset, list_images, read_image
from regolite.data.images import jpeg_of
from regolite.errors import UserError
from regolite.inference import detect
from regolite.plots.selection import check_image
from regolite.tracing.recorder import record
from regolite.tracing.trace import Trace

KEPT = 3  # number of traces kept: one of a large DETR takes hundreds of megabytes

Given = str | os.PathLike | Image.Image | DetectionDataset


@dataclass(frozen=True)
class Scene:
    """An image and its trace."""

    name: str
    image: Image.Image
    trace: Trace

    @cached_property
    def jpeg(self) -> bytes:
        """The image as sent to the browser."""
        return jpeg_of(self.image)


@dataclass(frozen=True)
class Source:
    """An image source, and its trace if already recorded."""

    name: str
    open: Callable[[], Image.Image]
    trace: Trace | None = None


def labeled(kind: type, label: str, **more: Any) -> Any:
    """A control with an aligned label."""
    width = more.pop("width", "270px")
    style = {"description_width": "84px"}
    return kind(description=label, style=style, layout=ipywidgets.Layout(width=width, margin="1px"), **more)


class Message(ipywidgets.HTML):
    """A status or error line, hidden if empty."""

    text = traitlets.Unicode("")

    def __init__(self) -> None:
        super().__init__(layout=ipywidgets.Layout(display="none", margin="1px 4px"))

    def say(self, text: str, wrong: bool = True) -> None:
        """Show a line; screen readers announce it."""
        color = "var(--jp-error-color1, #b3261e)" if wrong else "inherit"
        role = "alert" if wrong else "status"
        self.text = text
        self.value = f'<div role="{role}" style="color: {color}; line-height: 1.4">{html.escape(text)}</div>'
        self.layout.display = "block" if text else "none"


class Gallery(ipywidgets.VBox):
    """Image selection from given images, uploads and paths; runs the detector and keeps the last traces.

    Args:
        model: the detector; None to show only a given trace.
        images: paths, PIL images and data sets.
        trace: a trace of the first image, to skip its computation.

    Attributes:
        scene: the selected image with its trace, to be observed; None if there is none.
    """

    scene = traitlets.Any(None)

    def __init__(
        self, model: nn.Module | None = None, images: Sequence[Given] | Given = (), trace: Trace | None = None
    ) -> None:
        self.model = model
        self.sources: dict[int, Source] = dict(enumerate(_sources(images)))
        if trace is not None:
            if not self.sources:
                raise UserError("a trace needs its image: give it as the first of images")
            self.sources[0] = replace(self.sources[0], trace=trace)
        self._next = len(self.sources)
        self._own: list[int] = []  # uploaded images, held only here
        self._scenes: OrderedDict[int, Scene] = OrderedDict()

        self.chooser = labeled(ipywidgets.Dropdown, "Image", width="290px")
        self.upload = ipywidgets.FileUpload(
            accept="image/*", description="Your image", tooltip="a file on your computer",
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
        """Names of the images with kept traces."""
        return [scene.name for scene in self._scenes.values()]

    def _offer(self, chosen: int | None) -> None:
        """Set the options of the drop-down to all images."""
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
                raise UserError(f"{source.name} has no trace, and it can't be computed without a model: give a model")
            else:
                while len(self._scenes) >= KEPT:  # before recording, to free memory
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
            self.upload.value = ()  # frees the second copy of the file
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
                yield Source(Path(given.file_name(i)).name, partial(given.image, i))
        elif isinstance(given, Image.Image):
            name = Path(getattr(given, "filename", "") or f"image {number + 1}").name
            yield Source(name, partial(read_image, given))
        else:
            for path in _files(given):
                yield Source(Path(path).name, partial(read_image, path))


def _files(given: str | os.PathLike) -> list[Any]:
    """The files of a folder or pattern; a missing file is reported when it is selected."""
    try:
        return list_images(given)
    except UserError:
        return [given]


def _decode(name: str, content: bytes) -> Image.Image:
    """An image from the bytes of a file."""
    try:
        return read_image(content)
    except UserError:
        raise UserError(f"{name} can't be read as an image: choose a JPEG or PNG file") from None
