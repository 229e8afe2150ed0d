"""Reading and writing video files frame by frame with PyAV, the Python binding of FFmpeg.

::

    with VideoWriter("found.mp4") as writer:
        for frame in read_video("street.mp4"):
            [found] = regolite.detect(model, frame.image)
            writer.add(Frame(draw_detections(frame.image, found, found.classes), frame.seconds))
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

import av
from av.container import OutputContainer
from av.error import FFmpegError
from av.video.stream import VideoStream
from PIL import Image

from regolite.errors import UserError

CLOCK = Fraction(1, 90_000)  # seconds: the time base of written videos, as in MPEG


@dataclass(frozen=True)
class Frame:
    """One frame of a video.

    Attributes:
        image: RGB, upright: the rotation stored by phones is applied.
        seconds: presentation time.
    """

    image: Image.Image
    seconds: float


def read_video(path: str | os.PathLike[str]) -> Iterator[Frame]:
    """Iterate over the frames of a video, with one frame in memory at a time.

    Raises:
        UserError: no such file, not a video, or a frame that cannot be decoded.
    """
    if not os.path.isfile(path):
        raise UserError(f"video {os.fspath(path)} does not exist: check the path")
    count = 0
    try:
        with av.open(os.fspath(path)) as container:
            if not container.streams.video:
                raise UserError(f"video {os.fspath(path)} has no images: give another file")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"  # decode on all cores
            rate = stream.average_rate or 25
            for count, frame in enumerate(container.decode(stream), 1):
                image = frame.to_image()
                if frame.rotation:
                    image = image.rotate(frame.rotation, expand=True)
                yield Frame(image, float((count - 1) / rate) if frame.time is None else frame.time)
    except FFmpegError as error:
        where = f"cannot be read after {count} frames" if count else "cannot be read"
        raise UserError(f"video {os.fspath(path)} {where} ({error.strerror}): replace the file") from error
    if not count:
        raise UserError(f"video {os.fspath(path)} has no images: give another file")


class VideoWriter:
    """Writes an MP4 file without sound; close it, or use it in a ``with`` statement.

    Args:
        path: the file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path, self._last = Path(path), -1
        self._output: tuple[OutputContainer, VideoStream] | None = None

    def add(self, frame: Frame) -> None:
        """Write a frame; the first one sets the size of the video, rounded up to even sides."""
        image = frame.image
        if self._output is None:
            self._output = self._open(*image.size)
        container, stream = self._output
        new = av.VideoFrame.from_image(image.crop((0, 0, stream.width, stream.height)))
        self._last = max(self._last + 1, round(frame.seconds / CLOCK))
        new.pts, new.time_base = self._last, CLOCK
        container.mux(stream.encode(new))

    def close(self) -> None:
        """Flush the encoder and close the file."""
        if self._output is not None:
            container, stream = self._output
            container.mux(stream.encode())
            container.close()
            self._output = None

    def _open(self, width: int, height: int) -> tuple[OutputContainer, VideoStream]:
        container = av.open(os.fspath(self.path), "w", format="mp4")
        codec: Literal["libx264", "mpeg4"] = "libx264" if "libx264" in av.codecs_available else "mpeg4"
        stream = container.add_stream(codec, rate=30, options={"crf": "20"})
        stream.width, stream.height = width + width % 2, height + height % 2
        stream.pix_fmt = "yuv420p"  # supported by every player
        stream.codec_context.time_base = CLOCK
        return container, stream

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
