"""Attention entropy by layer, and its change during training.

The entropy of a row of attention weights is 0 if one cell gets all the weight, and log S if S cells get equal weights;
its exponential is an effective number of cells. DETR's cross-attention is almost uniform at first, and how fast it
concentrates on few cells largely determines how fast DETR converges.

During training::

    entropy = EntropyByEpoch(model, dataset, range(4))
    regolite.train(config, watch=entropy, model=model)
    entropy_figure(entropy.by_epoch)

From the checkpoints of several epochs::

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
    "encoder.": "Encoder self-attention",
    "decoder.cross": "Decoder cross-attention",
    "decoder.self": "Decoder self-attention",
    "relations": "REGO: attention to the previous stage",
    "stage.self": "REGO self-attention",
}
LINES = ("-", "--", "-.", ":")
MARKS = ("o", "s", "^", "D", "v", "P")


def entropy_by_layer(trace: Trace) -> dict[str, float]:
    """The mean entropy of every attention in nats, over heads, images and queries, without padding.

    Returns:
        Entropies by trace name, such as ``"decoder.0.cross"``.
    """
    means = {}
    for name in trace.names():
        record = trace[name]
        if isinstance(record, OnCells):
            entropy = record.entropy().transpose(1, 2)  # [B, Q, M]
            if name.startswith("encoder."):  # encoder queries include padding cells
                limits = trace.frame.original.flip(1)
                on = torch.stack([(record.centers(n) < limit).all(-1) for n, limit in enumerate(limits)])
                entropy = entropy[on]
            means[name] = float(entropy.mean())
    return means


def entropies(
    model: nn.Module, dataset: DetectionDataset, indices: Sequence[int], names: str | Sequence[str] = "*"
) -> dict[str, float]:
    """The mean entropy of every attention of a detector in nats, over images that are run one at a time.

    Args:
        model: the detector.
        dataset: the data set.
        indices: indices of the images; a few are enough.
        names: patterns for :func:`regolite.record`. Leaving out ``encoder.*`` saves memory.

    Raises:
        UserError: if there are no images.
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
    """Records entropies before training and at every evaluation (``config.evaluate_every``).

    Args:
        model: the detector that is trained; give it to :func:`regolite.train` too.
        dataset: the data set, independent of the run's.
        indices: indices of the images.

    Attributes:
        by_epoch: entropies by epoch; epoch 0 is before training.
    """

    def __init__(self, model: nn.Module, dataset: DetectionDataset, indices: Sequence[int]) -> None:
        self.model, self.dataset, self.indices = model, dataset, indices
        self.by_epoch = {0: entropies(model, dataset, indices)}

    def __call__(self, line: Mapping[str, Any]) -> None:
        """The ``watch`` callback, called with a line of metrics."""
        if line["kind"] == "evaluation" and line["epoch"] not in self.by_epoch:
            self.by_epoch[line["epoch"]] = entropies(self.model, self.dataset, self.indices)


def entropy_figure(by_epoch: Mapping[int, Mapping[str, float]] | Sequence[Mapping[str, float]]) -> Figure:
    """Attention entropy by epoch: one panel for each kind of attention, one line for each layer.

    Args:
        by_epoch: entropies (:func:`entropies`) by epoch, or a sequence for epochs 0, 1, 2, ...

    Raises:
        UserError: if there are none, or the epochs differ in their attentions.
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
    for ax in axes[len(groups) :]:  # unused panels of the last row
        ax.axis("off")
    return figure


def kind_of(name: str) -> str:
    """The kind of attention, one of :data:`KINDS`, of a trace name."""
    parts = name.split(".")
    if parts[0] == "stage":
        return "relations" if parts[2] == "relations" else "stage.self"
    return "encoder." if parts[0] == "encoder" else f"decoder.{parts[-1]}"


def _place(name: str) -> tuple[int, int]:
    """Stage, or 0 for the base detector, and layer."""
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    return (numbers[0], numbers[1]) if name.startswith("stage.") else (0, numbers[0])


def _count_cells(ax: Axes) -> None:
    """A second axis at the right: the effective number of cells, exp(entropy)."""
    right = ax.twinx()
    low, high = ax.get_ylim()
    right.set_ylim(low, high)
    numbers = MaxNLocator(5).tick_values(math.exp(low), math.exp(high))
    ticks = [n for n in numbers if n > 0 and low <= math.log(n) <= high]
    right.set_yticks([math.log(n) for n in ticks], [f"{n:,g}" for n in ticks])
    right.set_ylabel("effective number of cells", fontsize=8, color=GRAY)
    right.tick_params(labelsize=8, colors=GRAY)
    right.spines[:].set_visible(False)
    ax.tick_params(labelcolor=INK)
