"""Figures: detections on pictures stage by stage, the curves of a run, average precision by stage.

A notebook shows a figure by :func:`regolite.inspect.show`; :func:`save_figure` writes it as PNG.
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
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from regolite.boxes import enlarge
from regolite.data import DetectionDataset
from regolite.data.images import ImageSource, read_image
from regolite.detection import detect_by_stage
from regolite.errors import UserError
from regolite.inspect.drawing import (
    CLASS_COLOURS,
    DPI,
    GREY,
    INK,
    TRUTH_COLOUR,
    draw_box,
    draw_objects,
    draw_picture,
    draw_title,
    label_text,
    panels,
    stage_colour,
    stage_name,
    style_axes,
)
from regolite.rego import Rego
from regolite.structures import Detections

THRESHOLD = 0.3  # least score of a box that is drawn: lower than in use, so that a young model shows what it believes


def save_figure(figure: Figure, path: str | Path, dpi: int = DPI) -> Path:
    """Write a figure as PNG; the same figure gives the same bytes.

    Returns:
        The path.
    """
    figure.savefig(path, format="png", dpi=dpi, metadata={"Software": None})  # the version of matplotlib otherwise
    return Path(path)


# ----------------------------------------------------------------------------------------------------- pictures


def draw_detections(
    picture: ImageSource, detections: Detections, classes: Sequence[str], scores: bool = True
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
    picture = read_image(picture)
    dpi, (width, height) = 64, picture.size
    figure = Figure((width / dpi, height / dpi), dpi=dpi)
    canvas = FigureCanvasAgg(figure)
    ax = figure.add_axes((0, 0, 1, 1))
    draw_picture(ax, picture)
    colours = [CLASS_COLOURS[label % len(CLASS_COLOURS)] for label in detections.labels.tolist()]
    pixels = max(9.0, 0.026 * math.sqrt(width * height))  # height of the letters
    draw_objects(ax, detections, classes, colours, 72 / dpi * pixels, scores)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def draw_stages(
    picture: ImageSource,
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
    picture = read_image(picture)
    count = len(by_stage) + (truth is not None)
    figure, axes = panels(picture.height / picture.width, count, columns)
    size = 7.0
    for stage, (ax, detections) in enumerate(zip(axes, by_stage)):
        draw_picture(ax, picture)
        note = ""
        region = _glimpse(by_stage, stage, alphas, threshold)
        if region is not None:
            draw_box(ax, region, stage_colour(stage), 0.2 * size, dashed=True, inset=0.004 * max(picture.size))
            note = f"dashed: its glimpse, α = {alphas[stage - 1]:g}"
        draw_title(ax, stage_name(stage).capitalize(), note, stage_colour(stage))
        shown = detections.above(threshold)
        draw_objects(ax, shown, classes, [stage_colour(stage)] * len(shown), size)
        if not len(shown):
            best = f" (best: {label_text(detections, 0, classes)})" if len(detections) else ""
            said = ax.text(0.5, 0.5, f"nothing above {threshold:g}{best}", transform=ax.transAxes, fontsize=size)
            ground = {"facecolor": INK, "edgecolor": "none", "alpha": 0.75, "pad": 4}
            said.set(color="white", ha="center", va="center", bbox=ground)
    if truth is not None:
        draw_picture(axes[-1], picture)
        draw_title(axes[-1], "Ground truth", "", TRUTH_COLOUR)
        draw_objects(axes[-1], truth, classes, [TRUTH_COLOUR] * len(truth), size, scores=False)
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
    figure, axes = panels(min(ratio, 1.0), len(indices), min(columns, len(indices)))
    for ax, i in zip(axes, indices):
        truth = ground_truth(dataset, i)
        draw_picture(ax, dataset.image(i))
        draw_title(ax, dataset.file_name(i), f"{len(truth)} objects", TRUTH_COLOUR)
        colours = [CLASS_COLOURS[label % len(CLASS_COLOURS)] for label in truth.labels.tolist()]
        draw_objects(ax, truth, dataset.classes, colours, 7.0, scores=False)
    return figure


def ground_truth(dataset: DetectionDataset, i: int) -> Detections:
    """The true objects of picture ``i`` of a data set, as detections of score 1; crowds are left out."""
    objects = dataset.objects(i).targets(*dataset.size(i))
    boxes = torch.from_numpy(objects.boxes).float()
    boxes_xyxy = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
    count = len(objects)
    return Detections(torch.ones(count), torch.from_numpy(objects.labels), boxes_xyxy, torch.full((count,), -1))


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

    style_axes(total, "Loss, all decoder layers together", "step")
    total.plot(steps, [line["loss"] for line in train], color=INK, **mark)

    style_axes(by_decoder, "Loss of the last layer, by stage", "step")
    decoders = {name for line in train for name in _by_decoder(line["terms"])}
    for name in sorted(decoders):  # "base", "stage1", ...
        stage = int(name.removeprefix("stage")) if name != "base" else 0
        values = [_by_decoder(line["terms"]).get(name, math.nan) for line in train]
        line = {"linestyle": ("-", "--", "-.", ":")[stage % 4], "color": stage_colour(stage)}
        by_decoder.plot(steps, values, label=stage_name(stage), **line, **mark)
    style_axes(rate, "Learning rate", "step")
    rate.plot(steps, [line["lr"] for line in train], color=INK, **mark)
    rate.yaxis.set_major_formatter("{x:g}")

    style_axes(precision, "AP by stage (%)", "step")
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


def plot_ap_by_stage(figures: Mapping[str, Any], title: str, names: Sequence[str] = ("AP", "AP50", "AP75")) -> Figure:
    """Some of COCO's figures of every stage as bars.

    Args:
        figures: what :func:`regolite.evaluate` gives, or a line of ``metrics.jsonl`` of an evaluation.
        title: of the figure.
        names: which figures.
    """
    figure = Figure((1.6 + 1.6 * len(names), 3.6), dpi=100, layout="constrained")
    ax = figure.subplots()
    stages = figures["stages"]
    style_axes(ax, title, "")
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
    below = {"loc": "outside lower center", "ncols": len(stages), "frameon": False, "fontsize": 9}
    figure.legend(*ax.get_legend_handles_labels(), **below)
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
            try:
                image = dataset.image(i)
            except UserError:  # a run that skips broken images has named it
                continue
            by_stage = detect_by_stage(model, image, threshold=0.0)
            figure = draw_stages(image, by_stage, dataset.classes, ground_truth(dataset, i), alphas)
            files.append(save_figure(figure, folder / "figures" / f"stages_{split}_{dataset.image_ids[i]}.png"))
    return files
