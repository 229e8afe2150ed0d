"""Video files, frame by frame, by PyAV, the Python binding of FFmpeg.

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

import av
from av.error import FFmpegError
from PIL import Image

from regolite.errors import UserError

CLOCK = Fraction(1, 90_000)  # seconds: the unit of times in the videos that are written, as in MPEG


@dataclass(frozen=True)
class Frame:
    """One image of a video.

    Attributes:
        image: RGB, upright: phones store how they were held, as they do with photographs.
        seconds: when it is shown.
    """

    image: Image.Image
    seconds: float


def read_video(path: str | os.PathLike[str]) -> Iterator[Frame]:
    """The frames of a video, one by one: only one of them is in memory.

    Raises:
        UserError: no such file, or no video, or a frame that cannot be decoded.
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
        self.path, self._container, self._last = Path(path), None, -1

    def add(self, frame: Frame) -> None:
        """Write a frame; the first decides the size of the video, whose sides must be even."""
        image = frame.image
        if self._container is None:
            self._container = av.open(os.fspath(self.path), "w", format="mp4")
            codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
            self._stream = self._container.add_stream(codec, rate=30, options={"crf": "20"})
            self._stream.width, self._stream.height = (side + side % 2 for side in image.size)
            self._stream.pix_fmt = "yuv420p"  # what every player knows
            self._stream.codec_context.time_base = CLOCK
        new = av.VideoFrame.from_image(image.crop((0, 0, self._stream.width, self._stream.height)))
        self._last = max(self._last + 1, round(frame.seconds / CLOCK))
        new.pts, new.time_base = self._last, CLOCK
        self._container.mux(self._stream.encode(new))

    def close(self) -> None:
        """Write what is still to be written."""
        if self._container is not None:
            self._container.mux(self._stream.encode())
            self._container.close()
            self._container = None

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
