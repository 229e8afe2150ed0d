"""Drawing primitives: colors; images, boxes, labels, heat maps, points and matrices on axes.

Figures are matplotlib ``Figure`` objects outside pyplot, without global state. The colors are the color-blind-safe
palette of Okabe and Ito, with the same meaning in every figure. An image's axes are in pixels of the image, (0, 0) is
its upper left corner.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor

from regolite.data.images import ImageSource, read_image
from regolite.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from regolite.plots.text import as_is, drawable
from regolite.types import Detections

# Okabe and Ito, "Color universal design", 2008.
BLUE, SKY, ORANGE, VERMILLION = "#0072B2", "#56B4E9", "#E69F00", "#D55E00"
GREEN, PURPLE, YELLOW, INK = "#009E73", "#CC79A7", "#F0E442", "#222222"
GRAY = "#6E6E6E"

STAGE_COLORS = (BLUE, SKY, ORANGE, VERMILLION, PURPLE, YELLOW)
"""Base detector, stage 1, stage 2, ...: from cold to warm."""
TRUTH_COLOR = GREEN
CLASS_COLORS = (VERMILLION, SKY, ORANGE, GREEN, PURPLE, BLUE, YELLOW)

ABOVE: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "annotation_clip": False}
"""Arguments of ``Axes.annotate`` for text above a panel: positions are fractions of the axes, offsets are in points."""

DPI = 150
PANEL = 3.3  # width of an image in a figure, in inches

HEAT = LinearSegmentedColormap.from_list("heat", ["#FFFFFF00", "#E69F00B0", "#D55E00F0"])
"""Color map over an image: transparent through orange to vermillion."""


def stage_color(stage: int) -> str:
    """The color of a stage, 0 for the base detector."""
    return STAGE_COLORS[stage % len(STAGE_COLORS)]


def save_figure(figure: Figure, path: str | Path, dpi: int = DPI) -> Path:
    """Write a figure as PNG, byte for byte reproducible.

    Returns:
        The path.
    """
    figure.savefig(path, format="png", dpi=dpi, metadata={"Software": None})  # by default the version of matplotlib
    return Path(path)


def panels(ratio: float, count: int, columns: int | None = None, width: float = PANEL) -> tuple[Figure, list[Axes]]:
    """A figure of equal panels in rows, laid out explicitly because label placement needs exact positions.

    Args:
        ratio: height / width of a panel, limited to between 1/8 and 8.
        count: number of panels.
        columns: panels per row; all by default.
        width: width of a panel in inches; a notebook is about 10 inches wide.
    """
    columns, ratio = columns or count, min(max(ratio, 1 / 8), 8.0)
    rows = -(-count // columns)
    height, gap, head = width * ratio, 0.08, 0.27
    total = (columns * (width + gap) + gap, rows * (height + head) + gap)
    figure = Figure(total, dpi=100)
    axes = []
    for panel in range(count):
        row, column = divmod(panel, columns)
        left, bottom = gap + column * (width + gap), total[1] - (row + 1) * (height + head)
        place = (left / total[0], bottom / total[1], width / total[0], height / total[1])
        axes.append(figure.add_axes(place))
    return figure, axes


def draw_image(ax: Axes, image: ImageSource) -> None:
    """An image on axes in its pixel coordinates, (0, 0) the upper left corner."""
    image = read_image(image)
    width, height = image.size
    ax.imshow(np.asarray(image), extent=(0, width, height, 0), interpolation="antialiased")
    ax.set_anchor("N")
    ax.axis("off")
    ax.apply_aspect()


def to_image(pixels: Float[Tensor, "3 H W"]) -> Image.Image:
    """The network's normalized input as an RGB image."""
    mean, std = (torch.tensor(values, device=pixels.device)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    shades = ((pixels.detach() * std + mean).clamp(0, 1) * 255).round().byte()
    return Image.fromarray(shades.permute(1, 2, 0).cpu().numpy())


def draw_heat(
    ax: Axes,
    image: ImageSource,
    heat: Float[Tensor, "h w"],
    cell: float | None = None,
    peak: float | None = None,
    smooth: bool = False,
) -> None:
    """A heat map over a pale gray image.

    Args:
        ax: where to draw.
        image: the image.
        heat: non-negative values of the cells on the image (padding cut off).
        cell: side of a cell in pixels of the image; by default the map spans the image.
        peak: value of the full color; the map's maximum by default.
        smooth: interpolate between cells.
    """
    heat, image = heat.detach().cpu(), read_image(image)
    gray = np.asarray(image.convert("L"), dtype=np.float32)
    width, height = image.size
    ax.imshow(96 + 0.62 * gray, extent=(0, width, height, 0), cmap="gray", vmin=0, vmax=255)
    rows, columns = heat.shape
    right, bottom = (columns * cell, rows * cell) if cell else (width, height)
    ax.imshow(
        heat.numpy(),
        extent=(0, right, bottom, 0),
        cmap=HEAT,
        vmin=0,
        vmax=peak if peak is not None else max(float(heat.max()), 1e-12),
        interpolation="bilinear" if smooth else "nearest",
    )
    ax.set_xlim(0, width)
    ax.set_ylim(height, 0)
    ax.set_anchor("N")
    ax.axis("off")
    ax.apply_aspect()


def draw_points(
    ax: Axes,
    points: Float[Tensor, "N 2"],
    color: str,
    sizes: Float[Tensor, "N"] | float = 30.0,
    marker: str = "o",
) -> PathCollection:
    """Points on an image with a white outline.

    Args:
        ax: where to draw.
        points: x and y in pixels of the image.
        color: color of the points.
        sizes: area of each, in square points.
        marker: matplotlib marker.
    """
    x, y = points.detach().cpu().unbind(-1)
    area = sizes.detach().cpu() if isinstance(sizes, Tensor) else sizes
    return ax.scatter(x, y, s=area, c=color, marker=marker, edgecolors="white", linewidths=0.8, zorder=4)


def draw_matrix(
    ax: Axes,
    matrix: Float[Tensor, "rows columns"],
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    marked: Sequence[tuple[int, int]] = (),
    decimals: int | None = 2,
) -> None:
    """A matrix as colored cells with their values, light to dark, with chosen cells framed.

    Args:
        ax: where to draw.
        matrix: the values.
        rows: names of the rows.
        columns: names of the columns.
        marked: row and column of the cells to frame.
        decimals: decimals of the values; None hides them.
    """
    values = matrix.detach().cpu().numpy()
    ax.imshow(values, cmap="cividis_r", aspect="auto")
    low, high = float(values.min()), float(values.max())
    for (row, column), value in np.ndenumerate(values) if decimals is not None else ():
        ink = "white" if value > (low + high) / 2 else INK
        ax.text(column, row, f"{value:.{decimals}f}", ha="center", va="center", fontsize=8, color=ink)
    for row, column in marked:
        corner = (column - 0.5, row - 0.5)
        ax.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=VERMILLION, linewidth=2.5, zorder=3))
    ax.set_xticks(range(len(columns or ())), columns or ())
    ax.set_yticks(range(len(rows or ())), rows or ())
    ax.tick_params(length=0, labelsize=8, colors=INK)
    ax.spines[:].set_visible(False)


def draw_title(ax: Axes, title: str, note: str = "", color: str = INK) -> None:
    """A title, and a note at the right, over a colored bar; the note shrinks where it would overlap the title."""
    ax.plot([0, 1], [1, 1], color=color, linewidth=3, transform=ax.transAxes, clip_on=False, solid_capstyle="butt")
    left = ax.annotate(drawable(title), (0, 1), (0, 4), fontsize=9, fontweight="bold", color=INK, **ABOVE, **as_is())
    right = ax.annotate(note, (1, 1), (0, 4), fontsize=7, color=GRAY, ha="right", **ABOVE, **as_is())
    room = ax.get_window_extent().width - left.get_window_extent().width - ax.figure.dpi / 18  # 4 points apart
    size = 7.0
    while note and right.get_window_extent().width > room and size > 5:
        size -= 0.25
        right.set_fontsize(size)  # step by step, since hinted letters do not scale linearly


def draw_objects(
    ax: Axes,
    detections: Detections,
    classes: Sequence[str],
    colors: Sequence[str],
    size: float = 7.0,
    scores: bool = True,
) -> None:
    """Boxes and labels, the highest-scoring on top.

    ``size`` is the font size in points, reduced if there are many objects.
    """
    size *= max(0.7, min(1.0, (8 / max(len(detections), 1)) ** 0.5))
    boxes = detections.boxes_xyxy.tolist()
    for box, color in reversed(list(zip(boxes, colors))):
        draw_box(ax, box, color, 0.2 * size)
    draw_labels(ax, boxes, [label_text(detections, n, classes, scores) for n in range(len(detections))], colors, size)


def draw_labels(
    ax: Axes, boxes_xyxy: Sequence[Sequence[float]], texts: Sequence[str], colors: Sequence[str], size: float = 7.0
) -> None:
    """A label for every box, placed to avoid the labels before it."""
    taken: list[tuple[float, float, float, float]] = []
    for box, text, color in zip(boxes_xyxy, texts, colors):
        taken.append(_draw_label(ax, text, box, color, size, taken))


def label_text(detections: Detections, n: int, classes: Sequence[str], scores: bool = True) -> str:
    """The label text of the ``n``-th detection."""
    label = int(detections.labels[n])
    name = classes[label] if label < len(classes) else f"class {label}"
    return f"{name} {float(detections.scores[n]):.2f}" if scores else name


def draw_box(
    ax: Axes, box_xyxy: Sequence[float], color: str, line: float = 1.6, dashed: bool = False, inset: float = 0.0
) -> None:
    """A box with a white outline for contrast, clipped to the image."""
    width, height = ax.get_xlim()[1], ax.get_ylim()[0]
    x0, x1 = (min(max(x, inset), width - inset) for x in (box_xyxy[0], box_xyxy[2]))
    y0, y1 = (min(max(y, inset), height - inset) for y in (box_xyxy[1], box_xyxy[3]))
    seam = [patheffects.Stroke(linewidth=line + 1.2, foreground="white", alpha=0.7), patheffects.Normal()]
    style: dict[str, Any] = {"linestyle": (0, (4, 2.5))} if dashed else {"path_effects": seam}
    ax.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=color, linewidth=line, **style))


def _draw_label(
    ax: Axes,
    text: str,
    box_xyxy: Sequence[float],
    color: str,
    size: float,
    taken: Sequence[tuple[float, float, float, float]],
) -> tuple[float, float, float, float]:
    """A label at a corner of its box, inside the image, avoiding the labels in ``taken``.

    Returns:
        The label's extent: left, bottom, right, top in dots.
    """
    red, green, blue = to_rgb(color)
    ink = INK if 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 else "white"
    ground = {"boxstyle": "square,pad=0.2", "facecolor": color, "edgecolor": "none", "alpha": 0.85}
    label = ax.text(0, 0, drawable(text), fontsize=size, fontweight="bold", color=ink, bbox=ground, zorder=3, **as_is())
    point, more_lines = ax.figure.dpi / 72, 1.2 * size * text.count("\n")
    width, height = label.get_window_extent().width + 0.4 * size * point, (1.25 * size + more_lines) * point
    frame = ax.get_window_extent()
    (left, top), (right, bottom) = ax.transData.transform([box_xyxy[:2], box_xyxy[2:]])
    edge = 0.1 * size * point  # half of the box's line
    corners = [
        (left - edge, top), (left - edge, top - height), (right - width + edge, top),
        (left - edge, bottom), (left - edge, bottom - height), (right - width + edge, bottom - height),
    ]  # fmt: skip

    def place(corner: tuple[float, float]) -> tuple[float, tuple[float, float, float, float]]:
        """Cost (hidden area of labels, distance moved) and extent of the label at a corner, moved into the image."""
        x = max(frame.x0, min(corner[0], frame.x1 - width))
        y = max(frame.y0, min(corner[1], frame.y1 - height))
        spot = (x, y, x + width, y + height)
        hidden = sum(
            max(0.0, min(spot[2], t[2]) - max(x, t[0])) * max(0.0, min(spot[3], t[3]) - max(y, t[1])) for t in taken
        )
        return hidden + height * math.dist((x, y), corner), spot

    _, spot = min((place(corner) for corner in corners), key=lambda placed: placed[0])
    text_corner = (spot[0] + 0.2 * size * point, spot[1] + 0.3 * size * point)  # baseline of the last line
    x, y = ax.transData.inverted().transform(text_corner)
    label.set_position((x, y))
    return spot


def style_axes(ax: Axes, title: str, x: str = "", y: str = "") -> None:
    """The common style of plots: title at the left, gray axes, horizontal grid lines."""
    ax.set_title(drawable(title), loc="left", fontsize=10, fontweight="bold", color=INK, **as_is())
    ax.set_xlabel(x, fontsize=9, color=GRAY)
    ax.set_ylabel(y, fontsize=9, color=GRAY)
    ax.tick_params(labelsize=8, colors=GRAY)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("#B0B0B0")
    ax.grid(axis="y", color="#E6E6E6", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
