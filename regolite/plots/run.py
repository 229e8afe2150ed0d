"""All figures of a run, drawn into its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from regolite.data import DetectionDataset
from regolite.errors import UserError
from regolite.inference import detect_by_stage
from regolite.models.rego import Rego
from regolite.plots.curves import plot_ap_by_stage, plot_curves
from regolite.plots.detections import draw_stages, ground_truth
from regolite.plots.drawing import save_figure


def draw_run(
    folder: str | Path, model: nn.Module, datasets: Mapping[str, DetectionDataset], images: int = 4
) -> list[Path]:
    """Draw the figures of a run into ``figures/`` in its folder.

    These are ``curves.png``, and for each split ``ap_SPLIT.png``, if it was evaluated, and ``stages_SPLIT_IMAGEID.png``
    for images spread evenly over the split.

    Args:
        folder: the folder of the run.
        model: its detector.
        datasets: data sets by split.
        images: number of images of each split.

    Returns:
        The files written.
    """
    folder = Path(folder)
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    (folder / "figures").mkdir(exist_ok=True)
    files = [save_figure(plot_curves(metrics), folder / "figures" / "curves.png")]
    alphas = model.config.ratios if isinstance(model, Rego) else None
    for split, dataset in datasets.items():
        measured = [line for line in metrics if line["kind"] == "evaluation" and line["split"] == split]
        if measured:
            title = f"{split}: {measured[-1]['images']} images, step {measured[-1]['step']}"
            files.append(save_figure(plot_ap_by_stage(measured[-1], title), folder / "figures" / f"ap_{split}.png"))
        count = min(images, len(dataset))
        for i in (n * len(dataset) // count for n in range(count)):
            try:
                image = dataset.image(i)
            except UserError:  # reported by the run already
                continue
            by_stage = detect_by_stage(model, image, threshold=0.0)
            figure = draw_stages(image, by_stage, dataset.classes, ground_truth(dataset, i), alphas)
            files.append(save_figure(figure, folder / "figures" / f"stages_{split}_{dataset.image_ids[i]}.png"))
    return files
