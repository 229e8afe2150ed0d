"""Image reading: one function for all sources, so that an image has the same pixels whatever its source.

::

    read_image("street.jpg")                       # a file, upright as its EXIF orientation says
    read_image("street.jpg", upright=False)        # its stored pixels, which COCO's annotations refer to
    read_image(Image.open("street.png"))           # a PIL image of any mode
    read_image(array)                              # NumPy, height x width x channels, RGB and not OpenCV's BGR
    read_image(tensor)                             # PyTorch, channels x height x width
    read_image(file.read_bytes())                  # the bytes of a file
    [read_image(path) for path in list_images("photos")]   # a folder, or a pattern as "photos/*.jpg"

The result is always an RGB image with 8 bits per channel, without metadata. Transparency is dropped. The bit depth of
deeper pixels is the smallest of 12, 16 and 32 bits that holds the brightest one: many cameras store 12 bits in 16, and
files do not record the true depth.
"""

from __future__ import annotations

import glob
import io
import os
import re
import sys
import warnings
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Shaped, UInt8
from PIL import ExifTags, Image, ImageFile
from torch import Tensor

from regolite.errors import UserError

SUFFIXES = {
    ".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpeg", ".jpg", ".mpo", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp",
}  # fmt: skip
"""Suffixes of image files in a folder or a pattern."""
VIDEO_SUFFIXES = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"}
"""Suffixes of videos, which :mod:`regolite.data.video` reads."""

ImageSource = str | os.PathLike[str] | Image.Image | np.ndarray | Tensor | bytes | bytearray | memoryview
"""The sources that :func:`read_image` accepts."""

BROWSER_SIDE = 1280
"""Longest side in pixels of images for a browser, in which coordinates stay in pixels of the original."""

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The transposition that makes an image upright, by EXIF orientation."""
BITS = (8, 12, 16, 32)  # candidate depths; with more, a dark 16-bit image would be taken for a shallower one
OTHER_ORDER = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}  # Pillow's letters for byte orders
ALMOST = 1e-3  # tolerance for floating-point pixels that rounding moved out of range


def read_image(source: ImageSource, upright: bool = True) -> Image.Image:
    """Read an image.

    Args:
        source: a path, a PIL image of any mode, a NumPy array ``[H, W]`` or ``[H, W, 1 to 4]``, a tensor ``[H, W]`` or
            ``[1 to 4, H, W]``, or the bytes of a file. Arrays and tensors hold grayscale or RGB, with or without alpha:
            integers, or floating-point numbers from 0 to 1 (if the brightest is 2 or more, on the scale of integers).
        upright: apply the EXIF orientation, as viewers do; False keeps the stored pixels.

    Returns:
        The image: RGB, 8 bits per channel, without metadata. Of an animation the first frame, with a warning.

    Raises:
        UserError: no such file, a URL, or not a readable image.
    """
    name = name_of(source)
    if isinstance(source, (np.ndarray, Tensor)):
        return _from_array(_rows_first(source) if isinstance(source, Tensor) else source, name)
    if isinstance(source, (str, os.PathLike)):
        check_path(source)
    elif not isinstance(source, (Image.Image, bytes, bytearray, memoryview)):
        raise UserError(
            f"{type(source).__name__} is not an image: give a path, a PIL image, a NumPy array, a tensor, or the bytes "
            "of a file"
        )
    try:
        with _opened(source) as image:
            lower = _lower_bytes(image)
            image.load()
            if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # a photograph and its previews
                message = f"image {name} has {image.n_frames} frames: only frame {image.tell() + 1} is used"
                warnings.warn(message, stacklevel=2)
            turn = TURNS.get(orientation_of(image)) if upright else None
            rgb = _to_rgb(image, name, lower)
            rgb = rgb if turn is None else rgb.transpose(turn)
    except (UserError, UserWarning):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        size = str(error).split(",")[0]  # the rest warns of attacks
        raise UserError(
            f"image {name} is larger than Pillow's limit ({size}): make it smaller or, if you trust it, set "
            "PIL.Image.MAX_IMAGE_PIXELS = 10**9 first"
        ) from error
    except Exception as error:  # Pillow's decoders can raise almost any exception on a broken file
        raise UserError(f"image {name} cannot be read ({error}): replace the file") from error
    if not all(rgb.size):
        raise UserError(f"image {name} is {rgb.width}x{rgb.height} pixels: it is empty")
    rgb.info = {}  # otherwise the next reader would apply the EXIF orientation again
    return rgb


def _opened(source: str | os.PathLike[str] | Image.Image | bytes | bytearray | memoryview) -> Any:
    """A context manager for a PIL image, which closes only images that are opened here."""
    if isinstance(source, Image.Image):
        return nullcontext(source)
    return Image.open(source if isinstance(source, (str, os.PathLike)) else io.BytesIO(source))


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation of a PIL image, from 1 (upright) to 8; 1 if it is missing or the EXIF data is broken."""
    if image.format == "TIFF":
        return 1  # Pillow applies the orientation of TIFF files itself
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow's parser can raise almost any exception on broken EXIF data
        return 1


def _lower_bytes(image: Image.Image) -> UInt8[np.ndarray, "H W C"] | None:
    """The lower byte of each 16-bit channel, which Pillow drops; None for other images, and for decoded ones.

    Pillow keeps the upper byte. With the byte order reversed, it keeps the lower one.
    """
    if not isinstance(image, ImageFile.ImageFile) or image.fp is None:
        return None
    arguments = image.tile[0][3] if image.tile else ""  # a tile: codec, extents, offset, arguments
    raw_mode = str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments)
    if image.mode not in ("RGB", "RGBA", "RGBX") or not re.search(";16[BLN]$", raw_mode):
        return None
    is_gray = raw_mode.startswith(
        "LA"
    )  # 16-bit gray and alpha read as four 8-bit channels: gray's lower byte is second
    other = "RGBA" if is_gray else raw_mode[:-1] + OTHER_ORDER[raw_mode[-1]]
    position = image.fp.tell()
    image.fp.seek(0)
    file = io.BytesIO(image.fp.read())
    image.fp.seek(position)
    with Image.open(file) as lower:
        lower.seek(image.tell())
        tiles: list[Any] = lower.tile  # of plain tuples in older Pillow
        for n, (*tile, args) in enumerate(tiles):
            args = (other, *args[1:]) if isinstance(args, tuple) else other
            tiles[n] = getattr(type(tiles[n]), "_make", tuple)((*tile, args))
        lower.load()
        found = np.asarray(lower)
    return found[..., 1:2] if is_gray else found


def _to_rgb(image: Image.Image, name: str, lower: UInt8[np.ndarray, "H W C"] | None) -> Image.Image:
    """Convert a PIL image of any mode to RGB, with the lower bytes of 16-bit channels; always a new object."""
    if lower is not None:
        return _from_array((np.asarray(image).astype(np.uint16) << 8) | lower, name)
    if image.mode[0] in "IF":  # Pillow's own conversion clips at 255 instead of scaling
        return _from_array(np.asarray(image), name)
    if image.mode == "La":
        image = image.convert("LA")
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _rows_first(tensor: Tensor) -> Shaped[np.ndarray, "..."]:
    """Convert a tensor to an array with the channels last."""
    tensor = tensor.detach().cpu()
    tensor = tensor.float() if tensor.dtype == torch.bfloat16 else tensor  # NumPy has no bfloat16
    if tensor.dim() != 3:
        return tensor.numpy()  # grayscale, or a wrong shape that the caller reports
    if tensor.shape[0] > 4 and tensor.shape[2] <= 4:
        raise UserError(
            f"tensor of shape {list(tensor.shape)}: give channels x height x width, as tensor.permute(2, 0, 1)"
        )
    return tensor.permute(1, 2, 0).numpy()


def _from_array(array: Shaped[np.ndarray, "..."], name: str) -> Image.Image:
    """Convert an array ``[H, W]`` or ``[H, W, channels]`` to an RGB image."""
    shape = list(array.shape)
    channels = shape[2] if array.ndim == 3 else 1
    if array.ndim not in (2, 3) or not 1 <= channels <= 4:
        hint = ", as array.transpose(1, 2, 0)" if array.ndim == 3 and shape[0] <= 4 else ""
        raise UserError(f"image {name} has shape {shape}: give height x width x 1 to 4 channels{hint}")
    if not array.size:
        raise UserError(f"image {name} has shape {shape}: it is empty")
    colors = array.reshape(*shape[:2], channels)[..., : 3 if channels > 2 else 1]  # without alpha
    return Image.fromarray(np.repeat(_to_bytes(colors, name), 3 // colors.shape[2], axis=2))


def _to_bytes(pixels: Shaped[np.ndarray, "H W C"], name: str) -> UInt8[np.ndarray, "H W C"]:
    """Convert pixels of any type and depth to 8 bits.

    Deeper pixels lose their lowest bits, as in Pillow.
    """
    kind = pixels.dtype.kind
    if kind not in "buif":
        raise UserError(f"image {name} has pixels of type {pixels.dtype}: give integers or floating-point numbers")
    if pixels.dtype == np.uint8:
        return pixels
    if kind == "b":
        return pixels * np.uint8(255)
    low, top = float(pixels.min()), float(pixels.max())
    if not (low >= -ALMOST and top < 2**32) or (kind == "f" and 1 + ALMOST < top < 2):  # NaN too
        valid = "from 0 to 1, or to 255 (undo a normalization first)" if kind == "f" else "from 0"
        raise UserError(f"image {name} has pixels from {low:g} to {top:g}: give numbers {valid}")
    if kind == "f":
        pixels = np.round(pixels.astype(np.float64).clip(0) * (255 if top <= 1 + ALMOST else 1))
        if top <= 1 + ALMOST:
            return pixels.clip(max=255).astype(np.uint8)
        return _to_bytes(pixels.astype(np.int64), name)
    bits = next(bits for bits in BITS if top < 2**bits)
    return (pixels.astype(np.int64) >> (bits - 8)).astype(np.uint8)


def list_images(sources: ImageSource | Iterable[ImageSource]) -> list[ImageSource]:
    """List images, with folders and patterns expanded to files, sorted by name.

    Args:
        sources: one image (see :func:`read_image`) or several. A folder stands for the images in it, without its
            subfolders. A pattern contains ``*``, ``?``, ``[...]`` or ``**``, as ``photos/**/*.jpg``. An array or tensor
            of four dimensions is a batch.

    Raises:
        UserError: a URL, no such file, or no images in a folder or pattern.
    """
    if isinstance(sources, (str, os.PathLike)):
        return [*_files(os.fspath(sources))]
    if isinstance(sources, (np.ndarray, Tensor)):
        return list(sources) if sources.ndim == 4 else [sources]
    if isinstance(sources, (Image.Image, bytes, bytearray, memoryview)) or not isinstance(sources, Iterable):
        return [sources]
    return [image for source in sources for image in list_images(source)]


def _files(text: str) -> list[Path]:
    """The image files of a path: itself, those in a folder, or those that match a pattern."""
    path = Path(text)
    if path.is_dir():
        found = [file for file in path.iterdir() if is_image(file)]
        if not found:
            deeper = path / "**" / "*.jpg"
            raise UserError(
                f"folder {text} has no images (files that end in {', '.join(sorted(SUFFIXES))}): give another, or a "
                f"pattern for those in its subfolders, as {str(deeper)!r}"
            )
        return sorted(found)
    if glob.has_magic(text) and not os.path.isfile(text) and not is_url(text):
        found = [file for file in map(Path, glob.glob(text, recursive=True)) if is_image(file)]
        if not found:
            raise UserError(f"no image matches {text}: check the pattern")
        return sorted(found)
    check_path(text)
    return [path]


def check_path(source: str | os.PathLike[str]) -> None:
    """Check that a path is an image file.

    Raises:
        UserError: a URL, a folder, a video, or no such file.
    """
    text = os.fspath(source)
    if is_url(text):
        raise UserError(f"image {text} is a URL: download it and give the path of the file")
    if os.path.isdir(text):
        raise UserError(f"image {text} is a folder: give a file in it, or its files by regolite.data.list_images")
    if not os.path.isfile(text):
        raise UserError(f"image {text} does not exist: check the path")
    if Path(text).suffix.lower() in VIDEO_SUFFIXES:
        raise UserError(f"{text} is a video: `regolite detect` takes it, and regolite.data.video.read_video its frames")


def check_image(source: ImageSource) -> None:
    """Check an image file by its header, without decoding it.

    Raises:
        UserError: as :func:`read_image`.
    """
    if not isinstance(source, (str, os.PathLike)):
        return
    try:
        check_path(source)
        with Image.open(source):
            pass
    except Exception:  # any error: read_image raises it with a message
        read_image(source)


def jpeg_of(image: Image.Image) -> bytes:
    """An image as JPEG for a browser, with a longest side of at most :data:`BROWSER_SIDE`."""
    small = image.convert("RGB")
    small.thumbnail((BROWSER_SIDE, BROWSER_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "jpeg", quality=85)
    return buffer.getvalue()


def name_of(source: ImageSource) -> str:
    """The name of an image in messages: its path, or the type of its source."""
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    name = getattr(source, "filename", "")  # of a PIL image that was opened
    return os.fspath(name) if name and isinstance(name, (str, os.PathLike)) else f"({type(source).__name__})"


def is_url(text: str) -> bool:
    """Whether a text is a URL; ``Path`` collapses its two slashes into one, and ``C:/`` is a drive."""
    return re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+:/|data:\w+/", text) is not None


def is_image(path: Path) -> bool:
    """Whether a file has the suffix of an image and is not hidden: macOS adds ``._a.jpg`` to ``a.jpg`` in archives."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
