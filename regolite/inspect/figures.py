"""Figures: detections on pictures stage by stage, the curves of a run, average precision by stage.

Every figure is a matplotlib ``Figure`` of its own, outside pyplot: nothing global is set and nothing stays open. A
notebook shows one as it shows any value; :func:`save_figure` writes it as PNG. The colours are those of Okabe and Ito,
which people with any kind of colour vision tell apart; a stage has the same colour in every figure.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor, nn

from regolite.boxes import enlarge
from regolite.data import DetectionDataset
from regolite.detection import detect_by_stage
from regolite.rego import Rego
from regolite.structures import Detections

# Okabe and Ito, "Color universal design", 2008.
BLUE, SKY, ORANGE, VERMILLION = "#0072B2", "#56B4E9", "#E69F00", "#D55E00"
GREEN, PURPLE, YELLOW, INK = "#009E73", "#CC79A7", "#F0E442", "#222222"
GREY = "#6E6E6E"

STAGE_COLOURS = (BLUE, SKY, ORANGE, VERMILLION, PURPLE, YELLOW)
"""Base detector, stage 1, stage 2, ...: from cold to warm."""
TRUTH_COLOUR = GREEN
CLASS_COLOURS = (VERMILLION, SKY, ORANGE, GREEN, PURPLE, BLUE, YELLOW)

DPI = 150
PANEL = 3.3  # width of a picture in a figure, in inches
THRESHOLD = 0.3  # least score of a box that is drawn: lower than in use, so that a young model shows what it believes


def stage_colour(stage: int) -> str:
    """The colour of a stage, 0 for the base detector."""
    return STAGE_COLOURS[stage % len(STAGE_COLOURS)]


def stage_name(stage: int) -> str:
    """The name of a stage, 0 for the base detector."""
    return f"stage {stage}" if stage else "base detector"


def save_figure(figure: Figure, path: str | Path, dpi: int = DPI) -> Path:
    """Write a figure as PNG; the same figure gives the same bytes.

    Returns:
        The path.
    """
    figure.savefig(path, format="png", dpi=dpi, metadata={"Software": None})  # the version of matplotlib otherwise
    return Path(path)


# ----------------------------------------------------------------------------------------------------- pictures


def draw_detections(
    picture: Image.Image, detections: Detections, classes: Sequence[str], scores: bool = True
) -> Image.Image:
    """A copy of a picture with the detections drawn in, in colours of their classes.

    Args:
        picture: the picture.
        detections: what was found in it.
        classes: names of the classes by label.
        scores: write the scores too.

    Returns:
        A picture of the same size, RGB; lines and letters grow with it.
    """
    # With 64 dots an inch width / dpi * dpi is exact, so the copy has the very size of the picture.
    dpi, (width, height) = 64, picture.size
    figure = Figure((width / dpi, height / dpi), dpi=dpi)
    canvas = FigureCanvasAgg(figure)
    ax = figure.add_axes((0, 0, 1, 1))
    _show(ax, picture)
    colours = [CLASS_COLOURS[label % len(CLASS_COLOURS)] for label in detections.labels.tolist()]
    pixels = max(9.0, 0.026 * math.sqrt(width * height))  # height of the letters
    _draw_objects(ax, detections, classes, colours, 72 / dpi * pixels, scores)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def draw_stages(
    picture: Image.Image,
    by_stage: Sequence[Detections],
    classes: Sequence[str],
    truth: Detections | None = None,
    alphas: Sequence[float] | None = None,
    threshold: float = THRESHOLD,
    columns: int | None = None,
) -> Figure:
    """The detections of the base detector and of every stage, side by side (as Figure 5 of the paper).

    Args:
        picture: the picture.
        by_stage: what each stage found, from :func:`regolite.detection.detect_by_stage`, 0 the base detector.
        classes: names of the classes by label.
        truth: the true objects (:func:`ground_truth`), drawn in a panel of their own.
        alphas: enlarging ratios alpha(1), ..., alpha(S). With them every stage's panel shows, dashed, where the stage
            looked for the most confident object of the last stage: R(O_box(i-1), alpha(i)) of equation (7). It needs
            the object's box one stage before, so ``by_stage`` should hold detections of all scores.
        threshold: least score of a detection that is drawn.
        columns: panels in a row; all by default.
    """
    panels = len(by_stage) + (truth is not None)
    figure, axes = _grid(picture.height / picture.width, panels, columns or panels)
    size = 7.0
    for stage, (ax, detections) in enumerate(zip(axes, by_stage)):
        _show(ax, picture)
        note = ""
        region = _glimpse(by_stage, stage, alphas, threshold)
        if region is not None:
            _draw_box(ax, region, stage_colour(stage), 0.2 * size, dashed=True, inset=0.004 * max(picture.size))
            note = f"dashed: its glimpse, α = {alphas[stage - 1]:g}"
        _title(ax, stage_name(stage).capitalize(), note, stage_colour(stage))
        shown = detections.above(threshold)
        _draw_objects(ax, shown, classes, [stage_colour(stage)] * len(shown), size)
        if not len(shown):
            best = f" (best: {_text(detections, 0, classes)})" if len(detections) else ""
            said = ax.text(0.5, 0.5, f"nothing above {threshold:g}{best}", transform=ax.transAxes, fontsize=size)
            ground = {"facecolor": INK, "edgecolor": "none", "alpha": 0.75, "pad": 4}
            said.set(color="white", ha="center", va="center", bbox=ground)
    if truth is not None:
        _show(axes[-1], picture)
        _title(axes[-1], "Ground truth", "", TRUTH_COLOUR)
        _draw_objects(axes[-1], truth, classes, [TRUTH_COLOUR] * len(truth), size, scores=False)
    return figure


def draw_truth(dataset: DetectionDataset, indices: Sequence[int], columns: int = 4) -> Figure:
    """Some pictures of a data set with their true objects; crowds are left out.

    Args:
        dataset: the data set.
        indices: which pictures.
        columns: pictures in a row.
    """
    # A frame for pictures of different shapes: that of the highest, but no higher than wide.
    ratio = max(dataset.size(i)[0] / dataset.size(i)[1] for i in indices)
    figure, axes = _grid(min(ratio, 1.0), len(indices), min(columns, len(indices)))
    for ax, i in zip(axes, indices):
        truth = ground_truth(dataset, i)
        _show(ax, dataset.image(i))
        _title(ax, dataset.file_name(i), f"{len(truth)} objects", TRUTH_COLOUR)
        colours = [CLASS_COLOURS[label % len(CLASS_COLOURS)] for label in truth.labels.tolist()]
        _draw_objects(ax, truth, dataset.classes, colours, 7.0, scores=False)
    return figure


def ground_truth(dataset: DetectionDataset, i: int) -> Detections:
    """The true objects of picture ``i`` of a data set, as detections of score 1; crowds are left out."""
    objects = dataset.objects(i).targets(*dataset.size(i))
    boxes = torch.from_numpy(objects.boxes).float()
    boxes_xyxy = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
    count = len(objects)
    return Detections(torch.ones(count), torch.from_numpy(objects.labels), boxes_xyxy, torch.full((count,), -1))


def _grid(ratio: float, panels: int, columns: int) -> tuple[Figure, list[Axes]]:
    """A figure of panels ``ratio`` times as high as wide; laid out by hand, since labels need exact places."""
    rows = -(-panels // columns)
    height, gap, head = PANEL * ratio, 0.08, 0.27
    total = (columns * (PANEL + gap) + gap, rows * (height + head) + gap)
    figure = Figure(total, dpi=100)
    axes = []
    for panel in range(panels):
        row, column = divmod(panel, columns)
        left, bottom = gap + column * (PANEL + gap), total[1] - (row + 1) * (height + head)
        place = (left / total[0], bottom / total[1], PANEL / total[0], height / total[1])
        axes.append(figure.add_axes(place))
    return figure, axes


def _show(ax: Axes, picture: Image.Image) -> None:
    """A picture on axes in its own pixels, (0, 0) its corner."""
    width, height = picture.size
    ax.imshow(np.asarray(picture.convert("RGB")), extent=(0, width, height, 0), interpolation="antialiased")
    ax.set_anchor("N")
    ax.axis("off")
    ax.apply_aspect()


def _title(ax: Axes, title: str, note: str, colour: str) -> None:
    """A line of text over a bar of the panel's colour."""
    ax.plot([0, 1], [1, 1], color=colour, linewidth=3, transform=ax.transAxes, clip_on=False, solid_capstyle="butt")
    above = {"xycoords": "axes fraction", "textcoords": "offset points", "annotation_clip": False}
    ax.annotate(title, (0, 1), (0, 4), fontsize=9, fontweight="bold", color=INK, **above)
    ax.annotate(note, (1, 1), (0, 4), fontsize=7, color=GREY, ha="right", **above)


def _draw_objects(
    ax: Axes,
    detections: Detections,
    classes: Sequence[str],
    colours: Sequence[str],
    size: float,
    scores: bool = True,
) -> None:
    """Boxes and labels; the best come last, over the others.

    ``size`` is that of the letters, in points; they are smaller where there are many.
    """
    size *= max(0.7, min(1.0, (8 / max(len(detections), 1)) ** 0.5))
    boxes = detections.boxes_xyxy.tolist()
    for box, colour in reversed(list(zip(boxes, colours))):
        _draw_box(ax, box, colour, 0.2 * size)
    taken: list[tuple[float, float, float, float]] = []
    for n, (box, colour) in enumerate(zip(boxes, colours)):
        taken.append(_draw_label(ax, _text(detections, n, classes, scores), box, colour, size, taken))


def _text(detections: Detections, n: int, classes: Sequence[str], scores: bool = True) -> str:
    name = classes[int(detections.labels[n])]
    return f"{name} {float(detections.scores[n]):.2f}" if scores else name


def _draw_box(
    ax: Axes, box_xyxy: Sequence[float], colour: str, line: float, dashed: bool = False, inset: float = 0.0
) -> None:
    """A box with a light seam, so that it stands out on any ground; kept inside the picture."""
    width, height = ax.get_xlim()[1], ax.get_ylim()[0]
    x0, x1 = (min(max(x, inset), width - inset) for x in (box_xyxy[0], box_xyxy[2]))
    y0, y1 = (min(max(y, inset), height - inset) for y in (box_xyxy[1], box_xyxy[3]))
    seam = [patheffects.Stroke(linewidth=line + 1.2, foreground="white", alpha=0.7), patheffects.Normal()]
    style = {"linestyle": (0, (4, 2.5))} if dashed else {"path_effects": seam}
    ax.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=line, **style))


def _draw_label(
    ax: Axes,
    text: str,
    box_xyxy: Sequence[float],
    colour: str,
    size: float,
    taken: Sequence[tuple[float, float, float, float]],
) -> tuple[float, float, float, float]:
    """A label at a corner of its box, inside the picture and off the labels that are there already.

    Returns:
        The place it took: left, bottom, right, top in dots.
    """
    red, green, blue = to_rgb(colour)
    ink = INK if 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 else "white"
    ground = {"boxstyle": "square,pad=0.2", "facecolor": colour, "edgecolor": "none", "alpha": 0.85}
    label = ax.text(0, 0, text, fontsize=size, fontweight="bold", color=ink, bbox=ground, zorder=3)
    point = ax.figure.dpi / 72
    width, height = label.get_window_extent().width + 0.4 * size * point, 1.25 * size * point
    frame = ax.get_window_extent()
    (left, top), (right, bottom) = ax.transData.transform([box_xyxy[:2], box_xyxy[2:]])
    edge = 0.1 * size * point  # half of the box's line
    corners = [
        (left - edge, top), (left - edge, top - height), (right - width + edge, top),
        (left - edge, bottom), (left - edge, bottom - height), (right - width + edge, bottom - height),
    ]  # fmt: skip

    def place(corner: tuple[float, float]) -> tuple[float, tuple[float, float, float, float]]:
        """The label at a corner, moved into the picture; first what speaks against it: labels hidden, way moved."""
        x = max(frame.x0, min(corner[0], frame.x1 - width))
        y = max(frame.y0, min(corner[1], frame.y1 - height))
        spot = (x, y, x + width, y + height)
        hidden = sum(
            max(0.0, min(spot[2], t[2]) - max(x, t[0])) * max(0.0, min(spot[3], t[3]) - max(y, t[1])) for t in taken
        )
        return hidden + height * math.dist((x, y), corner), spot

    _, spot = min((place(corner) for corner in corners), key=lambda placed: placed[0])
    text_corner = (spot[0] + 0.2 * size * point, spot[1] + 0.3 * size * point)
    label.set_position(ax.transData.inverted().transform(text_corner))
    return spot


def _glimpse(
    by_stage: Sequence[Detections], stage: int, alphas: Sequence[float] | None, threshold: float
) -> list[float] | None:
    """Where a stage looked for the last stage's most confident object: ``xyxy`` in pixels, or None if not known."""
    if stage == 0 or not alphas or not len(by_stage[-1].above(threshold)):
        return None
    before = by_stage[stage - 1]
    same = (before.queries == by_stage[-1].queries[0]).nonzero()
    return _enlarged(before.boxes_xyxy[same[0, 0]], alphas[stage - 1]).tolist() if len(same) else None


def _enlarged(box_xyxy: Float[Tensor, "4"], alpha: float) -> Float[Tensor, "4"]:
    centre, size = (box_xyxy[:2] + box_xyxy[2:]) / 2, box_xyxy[2:] - box_xyxy[:2]
    larger = enlarge(torch.cat([centre, size]), alpha)
    return torch.cat([larger[:2] - larger[2:] / 2, larger[:2] + larger[2:] / 2])


# ------------------------------------------------------------------------------------------------------- curves


def plot_curves(metrics: Sequence[Mapping[str, Any]]) -> Figure:
    """The curves of a run: loss, loss by decoder, learning rate, AP by stage.

    Args:
        metrics: the lines of ``metrics.jsonl``.
    """
    train = [line for line in metrics if line["kind"] == "train"]
    figure = Figure((9.6, 6.2), dpi=100, layout="constrained")
    total, by_decoder, rate, precision = figure.subplots(2, 2).flat
    steps = [line["step"] for line in train]
    mark = {"marker": "o", "markersize": 3} if len(train) < 30 else {}

    _style(total, "Loss, all decoder layers together", "step")
    total.plot(steps, [line["loss"] for line in train], color=INK, **mark)

    _style(by_decoder, "Loss of the last layer, by stage", "step")
    decoders = {name for line in train for name in _by_decoder(line["terms"])}
    for name in sorted(decoders):  # "base", "stage1", ...
        stage = int(name.removeprefix("stage")) if name != "base" else 0
        values = [_by_decoder(line["terms"]).get(name, math.nan) for line in train]
        by_decoder.plot(steps, values, color=stage_colour(stage), label=stage_name(stage), **mark)
    _style(rate, "Learning rate", "step")
    rate.plot(steps, [line["lr"] for line in train], color=INK, **mark)
    rate.yaxis.set_major_formatter("{x:g}")

    _style(precision, "AP by stage (%)", "step")
    kinds = {
        "val": ("validation pictures", {"marker": "o"}),
        "train": ("training pictures", {"marker": "D", "markerfacecolor": "white", "linestyle": ""}),
    }
    for split, (words, mark) in kinds.items():
        lines = [line for line in metrics if line["kind"] == "evaluation" and line["split"] == split]
        for stage in range(max((len(line["stages"]) for line in lines), default=0)):
            values = [_number(line["stages"][stage]["AP"]) for line in lines]
            precision.plot([line["step"] for line in lines], values, color=stage_colour(stage), markersize=5, **mark)
        if lines:
            precision.plot([], [], color=GREY, markersize=5, label=words, **mark)

    for ax in (total, by_decoder, rate, precision):
        drawn = [point for line in ax.lines for point in line.get_xydata() if np.isfinite(point).all()]
        right, top = np.max(drawn, axis=0) if drawn else (0, 0)
        ax.set_xlim(0, 1.04 * right or 1)
        ax.set_ylim(0, max(1.08 * top, 1.0 if ax is precision else 0.0) or 1)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(frameon=False, fontsize=8)
    return figure


def plot_ap_by_stage(figures: Mapping[str, Any], title: str) -> Figure:
    """AP, AP50 and AP75 of every stage as bars.

    Args:
        figures: what :func:`regolite.evaluate` gives, or a line of ``metrics.jsonl`` of an evaluation.
        title: of the figure.
    """
    figure = Figure((6.4, 3.6), dpi=100, layout="constrained")
    ax = figure.subplots()
    names, stages = ("AP", "AP50", "AP75"), figures["stages"]
    _style(ax, title, "")
    wide = 0.8 / len(stages)
    for stage, measured in enumerate(stages):
        at = [n - 0.4 + wide * (stage + 0.5) for n in range(len(names))]
        values = [_number(measured[name]) for name in names]
        bars = ax.bar(at, values, 0.92 * wide, color=stage_colour(stage), label=stage_name(stage))
        ax.bar_label(bars, ["–" if math.isnan(v) else f"{v:.1f}" for v in values], fontsize=8, color=INK, padding=2)
    ax.set_xticks(range(len(names)), names)
    ax.tick_params(axis="x", length=0, labelsize=10)
    ax.set_ylim(0, max(1.0, 1.12 * ax.get_ylim()[1]))
    ax.set_ylabel("%", fontsize=9, color=GREY)
    names = {"loc": "outside lower center", "ncols": len(stages), "frameon": False, "fontsize": 9}
    figure.legend(*ax.get_legend_handles_labels(), **names)
    return figure


def table_by_stage(figures: Mapping[str, Any]) -> str:
    """COCO's figures of every stage as a table of text, in percent.

    Args:
        figures: what :func:`regolite.evaluate` gives, or a line of ``metrics.jsonl`` of an evaluation.
    """
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl")
    rows = ["".join([" " * 14, *(f"{name:>7}" for name in names)])]
    for stage, measured in enumerate(figures["stages"]):
        values = (f"{'-' if measured[n] is None else format(measured[n], '.1f'):>7}" for n in names)
        rows.append("".join([f"{stage_name(stage):14}", *values]))
    return "\n".join(rows)


def _by_decoder(terms: Mapping[str, float]) -> dict[str, float]:
    """The loss of the last layer of each decoder: ``base`` and ``stage2``, not ``base.1`` or ``proposals``."""
    sums: dict[str, float] = {}
    for name, value in terms.items():
        decoder = name.split("/")[0]
        if decoder == "base" or decoder.removeprefix("stage").isdigit():
            sums[decoder] = sums.get(decoder, 0.0) + value
    return sums


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _style(ax: Axes, title: str, x: str) -> None:
    ax.set_title(title, loc="left", fontsize=10, fontweight="bold", color=INK)
    ax.set_xlabel(x, fontsize=9, color=GREY)
    ax.tick_params(labelsize=8, colors=GREY)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("#B0B0B0")
    ax.grid(axis="y", color="#E6E6E6", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))


# -------------------------------------------------------------------------------------------------------- a run


def draw_run(
    folder: str | Path, model: nn.Module, datasets: Mapping[str, DetectionDataset], pictures: int = 4
) -> list[Path]:
    """Draw what a run has come to, into its folder's ``figures/``.

    ``curves.png``; for each split ``ap_SPLIT.png``, where it was evaluated, and ``stages_SPLIT_IMAGEID.png`` of some
    pictures, spread evenly over the split.

    Args:
        folder: the folder of the run.
        model: its detector.
        datasets: pictures and ground truth by split.
        pictures: how many of each split.

    Returns:
        The files.
    """
    folder = Path(folder)
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    (folder / "figures").mkdir(exist_ok=True)
    files = [save_figure(plot_curves(metrics), folder / "figures" / "curves.png")]
    alphas = model.config.ratios if isinstance(model, Rego) else None
    for split, dataset in datasets.items():
        measured = [line for line in metrics if line["kind"] == "evaluation" and line["split"] == split]
        if measured:
            title = f"{split}: {measured[-1]['images']} pictures, step {measured[-1]['step']}"
            files.append(save_figure(plot_ap_by_stage(measured[-1], title), folder / "figures" / f"ap_{split}.png"))
        count = min(pictures, len(dataset))
        for i in (n * len(dataset) // count for n in range(count)):
            by_stage = detect_by_stage(model, dataset.image(i), threshold=0.0)
            figure = draw_stages(dataset.image(i), by_stage, dataset.classes, ground_truth(dataset, i), alphas)
            files.append(save_figure(figure, folder / "figures" / f"stages_{split}_{dataset.image_ids[i]}.png"))
    return files
