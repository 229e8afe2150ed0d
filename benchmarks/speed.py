"""How fast, on this machine's CPU: ``python -m benchmarks.speed [--json FILE]``.

Four comparisons, both sides in the same run on the same numbers, and a table:

- backbone: :class:`~regolite.models.backbone.Backbone`, whose frozen norms are folded into the convolutions and whose
  padding is hidden by a product, against norms of their own and ``masked_fill``;
- deformable attention: :func:`~regolite.models.deformable_attention.read_and_mix`, which keeps no samples, against the
  same by autograd;
- glimpses: :func:`~regolite.models.glimpse.cut_glimpses` against torchvision's ``MultiScaleRoIAlign``, forward and
  backward;
- matching: all layers and stages at once (:func:`regolite.matching.match`) against one matching at a time, as DETR's
  code has it: a cost of every query of the batch for every object of the batch, and a transfer, for each of them;
- where the time of a training step of ``rego_deformable_detr_tiny`` goes.

The two sides take turns, so that whatever else the machine does slows both; a ratio is the median of the ratios of
neighbors. Before anything is timed, both sides must give the same: values and gradients within 1e-4, matchings
exactly. Exit code 1 where they do not.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

import regolite
from regolite.boxes import generalized_box_iou, to_pixels, to_xyxy
from regolite.data import batch_images
from regolite.losses import SetLoss
from regolite.matching import MatchingCosts, PaddedTargets, match
from regolite.models.backbone import Backbone, hide
from regolite.models.deformable_attention import read_and_mix, sample_and_mix
from regolite.models.glimpse import cut_glimpses
from regolite.types import FeatureMap, ImageBatch, Prediction, Target

CLASSES = 80
OBJECTS = 7  # COCO's mean, 860,001 objects in 117,266 images that have any


def compare(ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int) -> dict[str, float]:
    """Median milliseconds of both, and quartiles of the ratio (theirs to ours) of runs that are neighbors in time."""
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    for turn in range(rounds + 1):
        sides = [("ours", ours), ("theirs", theirs)]
        for name, side in sides if turn % 2 else sides[::-1]:
            start = time.perf_counter()
            side()
            if turn:  # the first round warms caches up
                times[name].append(1000 * (time.perf_counter() - start))
    low, middle, high = statistics.quantiles([t / o for o, t in zip(times["ours"], times["theirs"])], n=4)
    return {**{name: statistics.median(t) for name, t in times.items()}, "ratio": middle, "low": low, "high": high}


def some_boxes(*shape: int) -> Tensor:
    """Boxes like those of objects: centers anywhere, sizes from 0.03 to 0.9 of the image, most of them small."""
    sizes = 0.03 * 30 ** torch.rand(*shape, 2)
    return torch.cat([torch.rand(*shape, 2), sizes], -1)


def samples_kept(maps: Tensor, places: Tensor, weight: Tensor) -> Tensor:
    """What :func:`regolite.models.deformable_attention.read_and_mix` computes, left to autograd."""
    return (F.grid_sample(maps, 2 * places - 1, align_corners=False) * weight[:, None]).sum(2)


# ------------------------------------------------------------------------------------------------------- backbone


def backbone(name: str, size: tuple[int, int], batch: int, rounds: int) -> dict[str, float]:
    """The maps of a padded batch and the gradients of the weights, channels last."""
    net = Backbone(name, (3, 4, 5), weights=None, frozen_stages=2).to(memory_format=torch.channels_last)
    with patch("regolite.models.backbone.FoldedNorm", FrozenBatchNorm2d), patch("regolite.models.backbone.fold_norms"):
        plain = Backbone(name, (3, 4, 5), weights=None, frozen_stages=2).to(memory_format=torch.channels_last)
    for norm in (module for module in net.modules() if isinstance(module, FrozenBatchNorm2d)):
        norm.running_var.uniform_(0.5, 2.0)
        norm.running_mean.normal_(std=0.1)
    plain.load_state_dict(net.state_dict())
    images = batch_images([torch.randn(3, size[0], size[1] - 16 * (i % 3)) for i in range(batch)], 32)

    def masked_fill(x: Tensor, mask: Tensor) -> Tensor:
        return x.masked_fill(mask[:, None], 0.0)

    def step(module: nn.Module, hide: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, ...]:
        with patch("regolite.models.backbone.hide", hide):
            maps = [feature.tensor for feature in module(images)]
        weights = [p for p in module.parameters() if p.requires_grad]
        return *maps, *torch.autograd.grad(sum(m.square().mean() for m in maps), weights)

    sides = step(net, hide), step(plain, masked_fill)
    relative = max(((o - t).abs().max() / t.abs().max()).item() for o, t in zip(*sides))
    if not relative <= 1e-3:  # of more than fifty layers one after another
        raise SystemExit(f"the backbone's maps or gradients differ by {relative:.1e}")
    return compare(lambda: step(net, hide), lambda: step(plain, masked_fill), rounds) | {"difference": relative}


# ------------------------------------------------------------------------------------------- deformable attention


def reading(
    size: tuple[int, int], batch: int, queries: int | None, channels: int, strides: tuple[int, ...], rounds: int
) -> dict[str, float]:
    """One layer reads its samples, forward and backward; 8 heads, 4 points, ``queries`` None where every cell asks."""
    shapes = [(-(-size[0] // stride), -(-size[1] // stride)) for stride in strides]
    cells, heads, points = sum(height * width for height, width in shapes), 8, 4
    asking = (batch, queries or cells, heads, len(shapes), points)
    values = torch.randn(batch, cells, heads, channels // heads, requires_grad=True)
    locations = torch.rand(*asking, 2, requires_grad=True)
    weights = torch.rand(*asking).flatten(3).softmax(-1).view(asking).requires_grad_()
    upstream = torch.randn(batch, asking[1], channels)

    def step(read: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        with patch("regolite.models.deformable_attention.read_and_mix", read):
            mixed = sample_and_mix(values, shapes, locations, weights)
        return mixed, *torch.autograd.grad(mixed, (values, locations, weights), upstream)

    relative = max(((g - w).abs().max() / w.abs().max()).item() for g, w in zip(step(read_and_mix), step(samples_kept)))
    if not relative <= 1e-4:
        raise SystemExit(f"deformable attention or its gradients differ from autograd's by {relative:.1e}")
    return compare(lambda: step(read_and_mix), lambda: step(samples_kept), rounds) | {"difference": relative}


# ------------------------------------------------------------------------------------------------------- glimpses


def glimpses(
    size: tuple[int, int], batch: int, queries: int, channels: int, strides: tuple[int, ...], rounds: int
) -> dict[str, float]:
    """Glimpses of ``queries`` boxes in each of ``batch`` images, forward and backward."""
    shapes = [tuple(-(-side // stride) for side in size) for stride in strides]
    maps = [torch.randn(batch, channels, *shape, requires_grad=True) for shape in shapes]
    features = [FeatureMap(m, torch.zeros(batch, *m.shape[2:], dtype=torch.bool), s) for m, s in zip(maps, strides)]
    boxes = to_pixels(some_boxes(batch, queries), torch.tensor([size] * batch))
    align = MultiScaleRoIAlign([str(s) for s in strides], 7, 2)

    def ours() -> Tensor:
        return cut_glimpses(features, boxes)

    def theirs() -> Tensor:
        return align({str(s): m for s, m in zip(strides, maps)}, list(boxes), [size] * batch)

    upstream = torch.randn(batch * queries, channels, 7, 7)

    def step(cut: Callable[[], Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        cuts = cut()
        return cuts, torch.autograd.grad(cuts, maps, upstream)

    (values, gradients), (wanted, wanted_gradients) = step(ours), step(theirs)
    difference = (values - wanted).abs().max().item()
    relative = max(((g - w).abs().max() / w.abs().max()).item() for g, w in zip(gradients, wanted_gradients))
    if not (difference <= 1e-4 and relative <= 1e-4):
        raise SystemExit(f"glimpses differ from torchvision's by {difference:.1e}, their gradients by {relative:.1e}")
    return compare(lambda: step(ours), lambda: step(theirs), rounds) | {"difference": difference}


# ------------------------------------------------------------------------------------------------------- matching


def one_matching(
    prediction: Prediction, targets: list[Target], scoring: str, costs: MatchingCosts
) -> list[tuple[list[int], list[int]]]:
    """One layer's matching, as DETR's code has it: every query against every object of the batch."""
    logits, boxes = prediction.logits.flatten(0, 1), prediction.boxes.flatten(0, 1)
    labels, wanted = torch.cat([t.labels for t in targets]), torch.cat([t.boxes for t in targets])
    if scoring == "softmax":
        label = -logits.softmax(-1)[:, labels]
    else:
        p = logits.sigmoid()
        right = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log()
        wrong = 0.75 * p**2 * -(1 - p + 1e-8).log()
        label = right[:, labels] - wrong[:, labels]
    cost = costs.label * label + costs.l1 * torch.cdist(boxes, wanted, p=1)
    cost = cost - costs.giou * generalized_box_iou(to_xyxy(boxes), to_xyxy(wanted))
    blocks = cost.view(len(targets), -1, len(wanted)).cpu().split([len(t) for t in targets], 2)
    pairs = [linear_sum_assignment(block[b].numpy()) for b, block in enumerate(blocks)]
    return [(torch.as_tensor(query), torch.as_tensor(target)) for query, target in pairs]


def matching(predictions: int, batch: int, queries: int, scoring: str, rounds: int) -> dict[str, float]:
    """Matchings of so many predictions (layers and stages) of a batch."""
    counts = torch.poisson(torch.full((batch,), float(OBJECTS))).int().tolist()
    targets = [Target(torch.randint(CLASSES, (n,)), some_boxes(n), i, (1, 1)) for i, n in enumerate(counts)]
    columns = CLASSES + (scoring == "softmax")
    made = [
        Prediction(torch.randn(batch, queries, columns) - 2, some_boxes(batch, queries)) for _ in range(predictions)
    ]
    costs = MatchingCosts()

    def ours():
        return match(made, PaddedTargets.of(targets), scoring, costs)

    def theirs():
        return [one_matching(prediction, targets, scoring, costs) for prediction in made]

    found = ours()
    pairs = set(zip(*(x.tolist() for x in (found.prediction, found.image, found.query, found.target))))
    wanted = {
        (p, b, q, t)
        for p, images in enumerate(theirs())
        for b, (query, target) in enumerate(images)
        for q, t in zip(query.tolist(), target.tolist())
    }
    if pairs != wanted:
        raise SystemExit(f"{len(pairs ^ wanted)} matched pairs differ between the two ways of matching")
    return compare(ours, theirs, rounds)


# -------------------------------------------------------------------------------------------------- a training step


class Stopwatch:
    """Seconds by part. A part that runs inside another one is not counted in the outer one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._running: list[str] = []
        self._since = 0.0

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time inside for ``name``."""
        self._lap()
        self._running.append(name)
        try:
            yield
        finally:
            self._lap()
            self._running.pop()

    def _lap(self) -> None:
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, its time counted for ``name``."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return timed


def step_shares(preset: str, size: int, batch: int, rounds: int) -> dict[str, float]:
    """Median milliseconds of each part of a training step."""
    torch.manual_seed(0)
    model = regolite.build(preset).train().to(memory_format=torch.channels_last)
    images = ImageBatch(
        torch.randn(batch, 3, size, size),
        torch.zeros(batch, size, size, dtype=torch.bool),
        torch.tensor([[size, size]] * batch),
    )
    targets = [Target(torch.randint(CLASSES, (OBJECTS,)), some_boxes(OBJECTS), 0, (size, size)) for _ in range(batch)]
    set_loss = SetLoss(model.model_config.loss, model.scoring)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)

    watch = Stopwatch()
    detector = model.detector
    parts: list[tuple[str, nn.Module]] = [
        ("backbone", detector.backbone),
        ("pyramid", detector.pyramid),
        ("encoder", detector.encoder),
        *(("decoder", layer) for layer in detector.decoder_layers),
        *(("stages: glimpse vectors", stage.glimpse) for stage in model.stages),
        *(("stages: decoders", stage.decoder) for stage in model.stages),
    ]
    for name, module in parts:
        module.forward = watch.wrap(name, module.forward)
    rows = []
    with (
        patch("regolite.models.rego.cut_glimpses", watch.wrap("stages: cutting glimpses", cut_glimpses)),
        patch("regolite.losses.match", watch.wrap("matching", match)),
    ):
        for turn in range(rounds + 1):
            watch.seconds.clear()
            with watch.part("heads and the rest of the forward pass"):
                output = model(images)
            with watch.part("loss"):
                loss, _ = set_loss(output, targets)
            with watch.part("backward"):
                loss.backward()
            with watch.part("optimizer (and clipping)"):
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
                optimizer.zero_grad()
            if turn:
                rows.append(dict(watch.seconds))
    return {name: 1000 * statistics.median(row[name] for row in rows) for name in rows[0]}


# ------------------------------------------------------------------------------------------------------ the report

BACKBONES = {
    "laptop: MobileNetV2, 192x256, batch 8": ("mobilenet_v2", (192, 256), 8),
    "full: ResNet-50, 480x640, batch 2": ("resnet50", (480, 640), 2),
}
READING = {
    "miniature: 96x96, batch 4, every cell asks, C 64, strides 8-32": ((96, 96), 4, None, 64, (8, 16, 32)),
    "laptop: 256x256, batch 8, every cell asks, C 128, strides 8-32": ((256, 256), 8, None, 128, (8, 16, 32)),
    "full: 800x1066, batch 1, every cell asks, C 256, strides 8-64": ((800, 1066), 1, None, 256, (8, 16, 32, 64)),
    "full: 800x1066, batch 1, 300 queries, C 256, strides 8-64": ((800, 1066), 1, 300, 256, (8, 16, 32, 64)),
}
GLIMPSES = {
    "laptop: 256x256, batch 8, 100 queries, C 128, strides 8-32": ((256, 256), 8, 100, 128, (8, 16, 32)),
    "full: 800x1066, batch 1, 300 queries, C 256, strides 8-64": ((800, 1066), 1, 300, 256, (8, 16, 32, 64)),
    "full: 800x1066, batch 2, 300 queries, C 256, strides 8-64": ((800, 1066), 2, 300, 256, (8, 16, 32, 64)),
}
MATCHING = {
    "laptop: 3 + 3x2 predictions, batch 8, 100 queries, sigmoid": (9, 8, 100, "sigmoid"),
    "laptop: 3 + 3x2 predictions, batch 8, 100 queries, softmax": (9, 8, 100, "softmax"),
    "full: 6 + 3x2 predictions, batch 8, 300 queries, sigmoid": (12, 8, 300, "sigmoid"),
    "full: 6 + 3x2 predictions, batch 16, 300 queries, sigmoid": (12, 16, 300, "sigmoid"),
}


def print_ratios(title: str, theirs: str, rows: dict[str, dict[str, float]]) -> None:
    """A table of comparisons."""
    print(f"\n{title}\n{'':64} {theirs:>12} {'regolite':>12} {'ratio':>8} (quartiles)")
    for name, row in rows.items():
        print(
            f"{name:64} {row['theirs']:9.1f} ms {row['ours']:9.1f} ms {row['ratio']:7.2f}x "
            f"({row['low']:.2f} to {row['high']:.2f})"
        )


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to this file too")
    parser.add_argument("--rounds", type=int, default=15, help="measurements of each (default 15)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of PyTorch (default: all cores)")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error("--rounds must be at least 2")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    report: dict[str, Any] = {
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "threads": args.threads,
        "torch": torch.__version__,
        "rounds": args.rounds,
    }
    print(f"{report['machine']}, {args.threads} threads, PyTorch {torch.__version__}; medians of {args.rounds} rounds")

    report["backbone"] = {name: backbone(*sizes, args.rounds) for name, sizes in BACKBONES.items()}
    print_ratios("A backbone, forward and backward (equal within 1e-3)", "unfolded", report["backbone"])

    report["reading"] = {name: reading(*sizes, args.rounds) for name, sizes in READING.items()}
    print_ratios(
        "A layer of deformable attention reads, forward and backward (equal within 1e-4)", "autograd", report["reading"]
    )

    report["glimpses"] = {name: glimpses(*sizes, args.rounds) for name, sizes in GLIMPSES.items()}
    print_ratios("Glimpses, forward and backward (equal within 1e-4)", "RoIAlign", report["glimpses"])

    report["matching"] = {name: matching(*sizes, args.rounds) for name, sizes in MATCHING.items()}
    print_ratios("Matching of a training step (the same pairs)", "one by one", report["matching"])

    report["step"] = step_shares("rego_deformable_detr_tiny", 256, 8, args.rounds)
    total = sum(report["step"].values())
    print(f"\nA training step of rego_deformable_detr_tiny, 256x256, batch 8: {total:.0f} ms, of which")
    for name, milliseconds in sorted(report["step"].items(), key=lambda item: -item[1]):
        print(f"{name:60} {milliseconds:9.1f} ms {100 * milliseconds / total:6.1f} %")

    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
