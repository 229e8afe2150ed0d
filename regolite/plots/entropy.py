"""How widely attention looks, layer by layer, and how that changes while a detector learns.

The entropy of a row of weights is 0 where one cell gets all, and log S where S cells get the same; so its exponential
says at how many cells, evenly looked at, the row might as well look. A young DETR looks everywhere. How fast its
cross-attention learns to look at few cells is much of how fast it learns at all.

While a model is trained::

    entropy = EntropyByEpoch(model, dataset, range(4))
    regolite.train(config, watch=entropy, model=model)
    entropy_figure(entropy.by_epoch)

Of checkpoints of several epochs::

    entropy_figure({epoch: entropies(regolite.load(path), dataset, range(4)) for epoch, path in checkpoints.items()})
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import nn

from regolite.data import DetectionDataset
from regolite.errors import UserError
from regolite.inference import detect
from regolite.plots.drawing import GRAY, INK, STAGE_COLORS, style_axes
from regolite.tracing.recorder import record
from regolite.tracing.trace import OnCells, Trace

KINDS = {
    "encoder.": "Encoder: cells look at cells",
    "decoder.cross": "Decoder: queries look at the image",
    "decoder.self": "Decoder: queries look at queries",
    "relations": "REGO: glimpses ask the stage before",
    "stage.self": "REGO: queries look at queries",
}
LINES = ("-", "--", "-.", ":")
MARKS = ("o", "s", "^", "D", "v", "P")


def entropy_by_layer(trace: Trace) -> dict[str, float]:
    """The mean entropy of every attention, in nats, over heads, images and all that look; padding is left out.

    Returns:
        Entropies by the names of the trace, ``"decoder.0.cross"`` and so on.
    """
    means = {}
    for name in trace.names():
        record = trace[name]
        if isinstance(record, OnCells):
            entropy = record.entropy().transpose(1, 2)  # [B, Q, M]
            if name.startswith("encoder."):  # cells of padding look too, but nobody looks at them
                limits = trace.frame.original.flip(1)
                on = torch.stack([(record.centers(n) < limit).all(-1) for n, limit in enumerate(limits)])
                entropy = entropy[on]
            means[name] = float(entropy.mean())
    return means


def entropies(
    model: nn.Module, dataset: DetectionDataset, indices: Sequence[int], names: str | Sequence[str] = "*"
) -> dict[str, float]:
    """The mean entropy of every attention of a detector, in nats, over some images, one by one.

    Args:
        model: the detector.
        dataset: where the images are from.
        indices: which; a few do.
        names: which attentions, as :func:`regolite.record` takes them. Without ``encoder.*`` it takes less memory.

    Raises:
        UserError: when there are no images.
    """
    if not len(indices):
        raise UserError("the mean over no images is nothing: give at least one index")
    found = []
    for i in indices:
        with record(model, names) as trace:
            detect(model, dataset.image(i))
        found.append(entropy_by_layer(trace))
    return {name: float(np.mean([one[name] for one in found])) for name in found[0]}


class EntropyByEpoch:
    """Watches a training run: the entropies before it, and whenever the run evaluates (``config.evaluate_every``).

    Args:
        model: the detector that is trained; give it to :func:`regolite.train` too.
        dataset: where the images are from; its own images, whatever the run's.
        indices: which images.

    Attributes:
        by_epoch: entropies by epoch, epoch 0 before training.
    """

    def __init__(self, model: nn.Module, dataset: DetectionDataset, indices: Sequence[int]) -> None:
        self.model, self.dataset, self.indices = model, dataset, indices
        self.by_epoch = {0: entropies(model, dataset, indices)}

    def __call__(self, line: Mapping[str, Any]) -> None:
        """What ``watch`` is called with: a line of metrics."""
        if line["kind"] == "evaluation" and line["epoch"] not in self.by_epoch:
            self.by_epoch[line["epoch"]] = entropies(self.model, self.dataset, self.indices)


def entropy_figure(by_epoch: Mapping[int, Mapping[str, float]] | Sequence[Mapping[str, float]]) -> Figure:
    """Attention entropy by epoch: a panel for each kind of attention, a line for each layer.

    Args:
        by_epoch: entropies (:func:`entropies`) by epoch; or in a row, those of epochs 0, 1, 2, ...

    Raises:
        UserError: when there are none, or the epochs do not have the same attentions.
    """
    by_epoch = dict(by_epoch) if isinstance(by_epoch, Mapping) else dict(enumerate(by_epoch))
    epochs = sorted(by_epoch)
    names = list(by_epoch[epochs[0]]) if epochs else []
    if not names or any(set(by_epoch[epoch]) != set(names) for epoch in epochs):
        raise UserError("give entropies by epoch, {epoch: {name: entropy}}, of the same attentions each time")
    groups = {kind: [name for name in names if kind_of(name) == kind] for kind in KINDS}
    groups = {kind: members for kind, members in groups.items() if members}
    columns = min(len(groups), 2)
    rows = -(-len(groups) // columns)
    figure = Figure((4.9 * columns, 3.1 * rows), dpi=100, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for ax, (kind, members) in zip(axes, groups.items()):
        style_axes(ax, KINDS[kind], "epoch", "entropy (nats)")
        for number, name in enumerate(members):
            stage, layer = _place(name)
            color = STAGE_COLORS[(stage or number) % len(STAGE_COLORS)]
            style = {"linestyle": LINES[layer % 4], "marker": MARKS[layer % len(MARKS)], "markersize": 4}
            label = f"stage {stage}, layer {layer}" if stage else f"layer {layer}"
            ax.plot(epochs, [by_epoch[epoch][name] for epoch in epochs], color=color, label=label, **style)
        ax.margins(y=0.1)
        _count_cells(ax)
        ax.legend(fontsize=7, frameon=False, ncols=2 if len(members) > 4 else 1)
    for ax in axes[len(groups) :]:  # what is left of the last row
        ax.axis("off")
    return figure


def kind_of(name: str) -> str:
    """The kind of attention, one of :data:`KINDS`, that a name of a trace stands for."""
    parts = name.split(".")
    if parts[0] == "stage":
        return "relations" if parts[2] == "relations" else "stage.self"
    return "encoder." if parts[0] == "encoder" else f"decoder.{parts[-1]}"


def _place(name: str) -> tuple[int, int]:
    """Stage, or 0 for the base detector, and layer."""
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    return (numbers[0], numbers[1]) if name.startswith("stage.") else (0, numbers[0])


def _count_cells(ax: Axes) -> None:
    """The same axis at the right, as a number of cells that are looked at evenly."""
    right = ax.twinx()
    low, high = ax.get_ylim()
    right.set_ylim(low, high)
    evenly = MaxNLocator(5).tick_values(math.exp(low), math.exp(high))
    ticks = [n for n in evenly.tolist() if n > 0 and low <= math.log(n) <= high]
    right.set_yticks([math.log(n) for n in ticks], [f"{n:,g}" for n in ticks])
    right.set_ylabel("as if evenly at so many", fontsize=8, color=GRAY)
    right.tick_params(labelsize=8, colors=GRAY)
    right.spines[:].set_visible(False)
    ax.tick_params(labelcolor=INK)
