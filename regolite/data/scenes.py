"""Scenes: a synthetic dataset in which the class of some objects depends on context.

Textured shapes lie over a noisy background and overlap each other. A class is a texture and a shape ("striped star"),
recognizable from the object alone, with two exceptions: a **ball of square** and a **ball of star** look the same. The
class of a ball is decided by the nearest square or star, its *decider*. No pixel inside the ball's box reveals it. A
model must look around the box, as REGO's enlarged glimpses do, or let objects attend to each other.

The ground-truth relations are stored in ``decided_by`` of the annotations and in ``Scenes.relations``, so that relation
maps can be scored quantitatively.
"""

from __future__ import annotations

import colorsys
import json
import math
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image, ImageDraw

from regolite.data.dataset import DetectionDataset, Objects
from regolite.errors import UserError
from regolite.utils.validation import fits, plain

TEXTURES = ("striped", "dotted", "checked")
DECIDERS = ("square", "star")
"""The shapes that decide the class of a ball."""


def _polar(radii: list[float]) -> Float[np.ndarray, "P 2"]:
    """Corners at equal angles and the given radii."""
    angles = 2 * math.pi * np.arange(len(radii)) / len(radii)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.array(radii)[:, None]


_ARM = np.array([(1, -0.36), (1, 0.36), (0.36, 0.36)]) * 0.94  # one arm of the cross, up to the next arm
SHAPES = {
    "square": _polar([1.0] * 4),
    "star": _polar([1.0, 0.45] * 5),
    "triangle": _polar([1.0] * 3),
    "cross": np.concatenate(
        [_ARM @ np.array([[cos, sin], [-sin, cos]]) for cos, sin in [(1, 0), (0, 1), (-1, 0), (0, -1)]]
    ),
}
"""Corners of each shape, within a circle of radius 1."""

_EDGE = 2  # pixels of free margin around a ball's box

CLASSES = (*(f"{texture} {shape}" for shape in SHAPES for texture in TEXTURES), *(f"ball of {s}" for s in DECIDERS))


@dataclass(frozen=True)
class Thing:
    """One drawn object; lengths in pixels, angles in radians.

    Attributes:
        shape: a key of ``SHAPES``, or ``ball``.
        texture: one of ``TEXTURES``; a ball has none.
        x: center.
        y: center.
        radius: radius of the circumscribed circle.
        angle: rotation of shape and texture.
        colors: the two RGB colors of the texture, in [0, 255].
        period: period of the texture.
        phase: shift of the texture along its two axes, in periods.
        decider: for a ball, the index in the scene of the thing that decides its class.
    """

    shape: str
    texture: str
    x: float
    y: float
    radius: float
    angle: float = 0.0
    colors: tuple[tuple[float, ...], tuple[float, ...]] = ((225.0,) * 3, (70.0,) * 3)
    period: float = 8.0
    phase: tuple[float, float] = (0.0, 0.0)
    decider: int | None = None

    def stencil(self) -> tuple[tuple[slice, slice], Float[np.ndarray, "n n"]]:
        """The window of the image around the thing (rows, columns), and the coverage of each pixel in [0, 1]."""
        reach = math.ceil(self.radius) + 1
        top, left = math.floor(self.y) - reach, math.floor(self.x) - reach
        side = 2 * reach + 1
        fine = 4  # supersampling factor, for smooth edges
        stencil = Image.new("L", (side * fine, side * fine))
        center = np.array([self.x - left, self.y - top])
        if self.shape == "ball":
            box = np.concatenate([center - self.radius, center + self.radius]) * fine
            ImageDraw.Draw(stencil).ellipse(box.tolist(), fill=255)
        else:
            cos, sin = math.cos(self.angle), math.sin(self.angle)
            corners = SHAPES[self.shape] @ np.array([[cos, sin], [-sin, cos]]) * self.radius + center
            ImageDraw.Draw(stencil).polygon((corners * fine).ravel().tolist(), fill=255)
        cover = np.asarray(stencil.reduce(fine), dtype=np.float32) / 255
        return (slice(top, top + side), slice(left, left + side)), cover

    def paint(self, window: tuple[slice, slice]) -> Float[np.ndarray, "n n 3"]:
        """The thing's color at every pixel of the window, in [0, 255]."""
        rows, columns = window
        y = (np.arange(rows.start, rows.stop, dtype=np.float32) + 0.5 - self.y)[:, None]
        x = (np.arange(columns.start, columns.stop, dtype=np.float32) + 0.5 - self.x)[None]
        if self.shape == "ball":  # lit from the upper left
            blend = 1 - np.hypot(x / self.radius + 0.35, y / self.radius + 0.35) / 1.5
        else:
            cos, sin = math.cos(self.angle), math.sin(self.angle)
            turn = 2 * math.pi / self.period
            u = (x * cos + y * sin) * turn + 2 * math.pi * self.phase[0]
            v = (y * cos - x * sin) * turn + 2 * math.pi * self.phase[1]
            waves = {
                "striped": lambda: np.sin(u),
                "dotted": lambda: np.cos(u) + np.cos(v) - 0.7,
                "checked": lambda: 2 * np.sin(u * 0.75) * np.sin(v * 0.75),
            }
            blend = 0.5 + 1.5 * waves[self.texture]()
        light, dark = (np.array(color, dtype=np.float32) for color in self.colors)
        return dark + (light - dark) * np.clip(blend, 0, 1)[:, :, None]

    def gap(self, other: Thing) -> float:
        """Distance between the circumscribed circles of two things."""
        return math.hypot(self.x - other.x, self.y - other.y) - self.radius - other.radius


@dataclass
class Scene:
    """Things over a background, later ones in front.

    Attributes:
        size: side of the square image in pixels.
        noise: seed of the background.
        things: the objects.
        owner: for each pixel the index of the visible thing, or -1.
    """

    size: int
    noise: tuple[int, ...]
    things: list[Thing] = field(default_factory=list)

    def __post_init__(self) -> None:
        things, self.things = self.things, []
        self.owner = np.full((self.size, self.size), -1)
        self._reserved = np.zeros((self.size, self.size), dtype=bool)  # around balls, where no other thing may lie
        self._areas: list[int] = []
        for thing in things:
            self._add(thing, *thing.stencil())

    def put(self, thing: Thing) -> bool:
        """Add a thing in front unless the scene would become ambiguous; return whether it was added.

        In a valid scene at least 60 % of every thing is visible, 80 % of a decider; nothing touches the box of a ball;
        and every other square or star is clearly farther from a ball than its decider.
        """
        window, cover = thing.stencil()
        solid = cover >= 0.5
        if self._reserved[window][solid].any() or (thing.shape == "ball" and (self.owner[_around(thing)] >= 0).any()):
            return False
        margin = 0.1 * self.size
        if thing.decider is not None:
            limit = thing.gap(self.things[thing.decider]) + margin
            if any(q.shape in DECIDERS and thing.gap(q) < limit for q in self._without(thing.decider)):
                return False
        if thing.shape in DECIDERS:
            for ball in self.things:
                if ball.decider is not None and ball.gap(thing) < ball.gap(self.things[ball.decider]) + margin:
                    return False
        hidden = np.bincount(self.owner[window][solid] + 1, minlength=len(self.things) + 1)[1:]
        seen = np.bincount(self.owner.ravel() + 1, minlength=len(self.things) + 1)[1:] - hidden
        deciding = {ball.decider for ball in self.things}
        least = [area * (0.8 if k in deciding else 0.6) for k, area in enumerate(self._areas)]
        if (seen < least).any():
            return False
        self._add(thing, window, cover)
        return True

    def label(self, k: int) -> int:
        """Class of thing ``k``: its texture and shape, or for a ball the shape of its decider."""
        thing = self.things[k]
        if thing.decider is not None:
            return CLASSES.index(f"ball of {self.things[thing.decider].shape}")
        return CLASSES.index(f"{thing.texture} {thing.shape}")

    def draw(self) -> Image.Image:
        """Render the image."""
        rng = np.random.default_rng(self.noise)
        image = np.zeros((self.size, self.size, 3), dtype=np.float32)
        # color clouds, brightness clouds, spots and grain: cells along a side, channels, least and largest value
        layers = [(3, 3, 90, 150), (6, 1, -45, 45), (self.size // 4, 1, -20, 20), (self.size, 1, -8, 8)]
        for cells, channels, least, most in layers:
            image += _stretch(rng.uniform(least, most, (cells, cells, channels)).astype(np.float32), self.size)
        for thing in self.things:
            window, cover = thing.stencil()
            image[window] += cover[:, :, None] * (thing.paint(window) - image[window])
        return Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))

    def _without(self, k: int) -> list[Thing]:
        return self.things[:k] + self.things[k + 1 :]

    def _add(self, thing: Thing, window: tuple[slice, slice], cover: Float[np.ndarray, "n n"]) -> None:
        solid = cover >= 0.5
        self.owner[window][solid] = len(self.things)
        self._areas.append(int(solid.sum()))
        self.things.append(thing)
        if thing.shape == "ball":
            self._reserved[_around(thing)] = True


def _around(ball: Thing) -> tuple[slice, slice]:
    """A ball's box with a free margin."""
    reach = ball.radius + _EDGE
    starts = (max(0, math.floor(c - reach)) for c in (ball.y, ball.x))
    ends = (math.ceil(c + reach) for c in (ball.y, ball.x))
    rows, columns = zip(starts, ends, strict=True)
    return slice(*rows), slice(*columns)


def _stretch(grid: Float[np.ndarray, "n n c"], size: int) -> Float[np.ndarray, "size size c"]:
    """Upsample a grid of random values to the size of the image (bicubic)."""
    if len(grid) == size:
        return grid
    layers = [
        Image.fromarray(layer).resize((size, size), Image.Resampling.BICUBIC) for layer in np.moveaxis(grid, 2, 0)
    ]
    return np.stack([np.asarray(layer) for layer in layers], axis=2)


def compose(
    rng: np.random.Generator,
    size: int,
    max_objects: int,
    context: float | int,
    noise: tuple[int, ...],
    scale: float | int = 1.0,
    nearer: float | int = 0.0,
) -> Scene:
    """Sample a scene: 2 to ``max_objects`` things, some of them pairs of a ball and its decider.

    Args:
        rng: random numbers.
        size: side of the image in pixels.
        max_objects: most objects, without those that stand nearer to a ball than its decider.
        context: probability of a pair.
        noise: seed of the background.
        scale: factor of the size of all things.
        nearer: probability that a triangle or cross stands nearer to a ball than its decider.
    """
    scene = Scene(size, noise)
    count = int(rng.integers(min(2, max_objects), max_objects + 1))
    pairs = int(rng.binomial(count // 2, context))
    events = rng.permutation([True] * pairs + [False] * (count - 2 * pairs))
    for paired in events.tolist():
        decider = _put_shape(rng, scene, DECIDERS if paired else tuple(SHAPES), scale)
        if paired and decider is not None:
            farther = nearer > 0 and rng.random() < nearer
            ball = _put_ball(rng, scene, decider, scale, farther)
            if farther and ball is not None:
                _put_nearer(rng, scene, ball, scale)
    return scene


def _put_shape(rng: np.random.Generator, scene: Scene, shapes: tuple[str, ...], scale: float | int) -> int | None:
    """Try to place a random thing of one of the shapes; return its index, or None if no valid place was found."""
    size = scene.size
    shape, texture = rng.choice(shapes), rng.choice(TEXTURES)
    radius = 0.09 * size * scale * 2.2 ** rng.random()
    colors = _colors(rng)
    angle, *phase = rng.random(3).tolist()
    period = size * scale * rng.uniform(0.05, 0.075)
    for _ in range(20):
        x, y = rng.uniform(radius + 3, size - radius - 3, 2).tolist()
        thing = Thing(str(shape), str(texture), x, y, radius, 2 * math.pi * angle, colors, period, tuple(phase))
        if scene.put(thing):
            return len(scene.things) - 1
    return None


def _put_ball(rng: np.random.Generator, scene: Scene, decider: int, scale: float | int, farther: bool) -> int | None:
    """Try to place a ball beside its decider, or farther away; return its index, or None.

    The ball depends on the decider's position only, not on its shape.
    """
    beside, size = scene.things[decider], scene.size
    radius = size * scale * rng.uniform(0.06, 0.085)
    gray = rng.uniform(-20, 20)
    colors = ((225.0 + gray,) * 3, (70.0 + gray,) * 3)
    for _ in range(20):
        # the circumscribed circle of the decider stays outside the ball's box, so that no corner reveals its shape
        distance = beside.radius + math.sqrt(2) * (radius + _EDGE) + size * rng.uniform(0, 0.03)
        if farther:
            distance += size * scale * rng.uniform(0.06, 0.12)
        angle = rng.uniform(0, 2 * math.pi)
        x, y = beside.x + distance * math.cos(angle), beside.y + distance * math.sin(angle)
        inside = radius + 3 <= min(x, y) and max(x, y) <= size - radius - 3
        if inside and scene.put(Thing("ball", "", x, y, radius, colors=colors, decider=decider)):
            return len(scene.things) - 1
    return None


def _put_nearer(rng: np.random.Generator, scene: Scene, ball: int, scale: float | int) -> None:
    """Try to place a small triangle or cross nearer to a ball than its decider."""
    size, beside = scene.size, scene.things[ball]
    shape, texture = rng.choice(tuple(s for s in SHAPES if s not in DECIDERS)), rng.choice(TEXTURES)
    radius = size * scale * rng.uniform(0.07, 0.09)
    colors = _colors(rng)
    turn, *phase = rng.random(3).tolist()
    period = size * scale * rng.uniform(0.05, 0.075)
    distance = radius + math.sqrt(2) * (beside.radius + _EDGE)
    for _ in range(40):
        angle = rng.uniform(0, 2 * math.pi)
        x, y = beside.x + distance * math.cos(angle), beside.y + distance * math.sin(angle)
        thing = Thing(str(shape), str(texture), x, y, radius, 2 * math.pi * turn, colors, period, tuple(phase))
        if radius + 3 <= min(x, y) and max(x, y) <= size - radius - 3 and scene.put(thing):
            return


def _colors(rng: np.random.Generator) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """A light and a dark color of different hue, in either order."""
    hue, shift, *saturations = rng.random(4).tolist()
    light = colorsys.hsv_to_rgb(hue, 0.25 + 0.6 * saturations[0], rng.uniform(0.85, 1.0))
    dark = colorsys.hsv_to_rgb((hue + 0.3 + 0.4 * shift) % 1, 0.4 + 0.6 * saturations[1], rng.uniform(0.1, 0.4))
    pair = [tuple(255 * channel for channel in color) for color in (light, dark)]
    first = int(rng.integers(2))
    return pair[first], pair[1 - first]


class Scenes(DetectionDataset):
    """A dataset of synthetic scenes; ``dataset[i]`` is ``(pixels Float[3 H W], Target)``.

    Image ``i`` depends only on the seed, the split, ``i`` and the options, and not on the number of images, the order
    of access or the workers.

    Args:
        num_images: number of images.
        seed: seed of the dataset, at least 0.
        size: side of the square images in pixels.
        max_objects: most objects in an image; the least is 2.
        context: probability that two objects are a ball and its decider; 0 gives no balls, 1 mostly pairs.
        scale: factor of the size of all objects; at 1, half of them are wider than a fifth of the image.
        nearer: probability that a ball stands farther from its decider, with a triangle or cross between the two
            distances, so that the nearest object does not decide.
        transform: called with the image and its boxes and labels (``regolite.data.transforms``); None only
            normalizes. Random crops may remove a decider and keep its ball: prefer transforms without crops.
        split: ``train``, ``val`` or any other name; each split has its own images.

    Attributes:
        classes: names of the classes in the order of the labels.
        category_ids: COCO's id of each class.
        image_ids: COCO's id of each image.

    Raises:
        UserError: an option out of range.
    """

    def __init__(
        self,
        num_images: int,
        seed: int = 0,
        size: int = 128,
        max_objects: int = 8,
        context: float | int = 0.5,
        scale: float | int = 1.0,
        nearer: float | int = 0.0,
        transform: Callable[..., Any] | None = None,
        split: str = "train",
    ) -> None:
        for name, value, low, high in (
            ("number of images", num_images, 1, 10_000_000),
            ("seed", seed, 0, 2**63),
            ("size", size, 64, 4096),
            ("max_objects", max_objects, 1, 50),
            ("context", context, 0, 1),
            ("scale", scale, 0.1, 2),
            ("nearer", nearer, 0, 1),
        ):
            if (
                not fits(plain(value), float if name in ("context", "scale", "nearer") else int)
                or not low <= value <= high
            ):
                raise UserError(f"scenes with {name} {value}: give {low} to {high}")
        self.seed, self.side, self.max_objects, self.context, self.split = seed, size, max_objects, context, split
        self.scale, self.nearer = scale, nearer
        self.transform = transform
        self.classes = CLASSES
        self.category_ids = tuple(range(1, len(CLASSES) + 1))
        self.image_ids = list(range(1, num_images + 1))
        self._latest: tuple[int, Scene] | None = None

    def scene(self, i: int) -> Scene:
        """The scene of image ``i``."""
        i = range(len(self))[i]
        if self._latest is None or self._latest[0] != i:  # cached, since image and objects are read in succession
            seeds = (self.seed, zlib.crc32(self.split.encode()), i)
            rng = np.random.default_rng(seeds)
            self._latest = (
                i,
                compose(rng, self.side, self.max_objects, self.context, (*seeds, 1), self.scale, self.nearer),
            )
        return self._latest[1]

    def image(self, i: int) -> Image.Image:
        """Image ``i`` as PIL RGB, untransformed."""
        return self.scene(i).draw()

    def objects(self, i: int) -> Objects:
        """The annotations of image ``i``: boxes and areas are those of the visible parts."""
        scene = self.scene(i)
        count = len(scene.things)
        first = 100 * self.image_ids[i]
        masks = [scene.owner == k for k in range(count)]
        boxes = np.array([_box(mask) for mask in masks]).reshape(count, 4)
        areas = np.array([mask.sum() for mask in masks], dtype=float)
        labels = np.array([scene.label(k) for k in range(count)], dtype=np.int64)
        decided_by = np.array([-1 if t.decider is None else first + t.decider for t in scene.things], dtype=np.int64)
        return Objects(first + np.arange(count), labels, boxes, areas, np.zeros(count, dtype=bool), decided_by)

    def size(self, i: int) -> tuple[int, int]:
        """Height and width of image ``i`` in pixels, untransformed."""
        return self.side, self.side

    def file_name(self, i: int) -> str:
        """The file name that ``write`` gives image ``i``."""
        return f"{self.split}_{self.image_ids[i]:06d}.png"

    def write(self, folder: str | os.PathLike[str]) -> None:
        """Write the dataset as a COCO-format folder for ``CocoFolder``, ``decided_by`` included.

        Several splits can be written to one folder.
        """
        images, annotations = Path(folder) / "images", Path(folder) / "annotations"
        images.mkdir(parents=True, exist_ok=True)
        annotations.mkdir(exist_ok=True)
        for i in range(len(self)):
            self.image(i).save(images / self.file_name(i))
        text = json.dumps(self.coco.dataset)
        (annotations / f"instances_{self.split}.json").write_text(text, encoding="utf-8")


def _box(mask: Bool[np.ndarray, "h w"]) -> Float[np.ndarray, "4"]:
    """Corner, width and height of the bounding box of a mask."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    return np.array([columns[0], rows[0], columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0]], dtype=float)
