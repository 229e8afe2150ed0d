"""The trainings behind notebook 08: ``python notebooks/results/why_detr_is_slow.py``.

Six detectors learn the same 256 drawn scenes with three seeds each, and each differs from one of the others in one
thing (:data:`RUNS`). All of them read the same feature maps, those of the bundled ImageNet MobileNetV2, computed once
and frozen, so that only the transformer and its loss differ. After every epoch the first 64 training scenes are
evaluated: which query is matched with which object, the entropy of the attention, and how well boxes and classes fit.

It takes about 15 minutes of one CPU core. Finished epochs are kept in ``runs/why_detr_is_slow``; started again, the
script resumes from there. ``why_detr_is_slow.json`` beside this file is rewritten after every training.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import string
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

import regolite
from regolite.boxes import box_iou, to_xyxy
from regolite.data import DetectionDataset, collate, make_transform, open_data
from regolite.evaluation.coco import average_precision
from regolite.inference import to_detections
from regolite.losses import SetLoss
from regolite.matching import Matches, PaddedTargets, match
from regolite.models.attention import MultiHeadAttention
from regolite.models.config import ModelConfig
from regolite.models.presets import configure
from regolite.training.config import RunConfig
from regolite.training.schedule import lr_factor, parameter_groups
from regolite.types import DetectorOutput, FeatureMap, ImageBatch, Prediction, Target

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).with_suffix(".json")
STATES = ROOT / "runs" / "why_detr_is_slow"

SCENES = "scenes:256:val=64:context=0:max_objects=4:size=256"
WATCHED = 64  # the first training scenes, evaluated after every epoch
SEEDS = (0, 1, 2)
SAVED_OF, SAVED = "DETR", 20  # the predictions for the first scene are kept: of this run, with the first seed, so long
EPOCHS = 32
QUERIES = 20
RECIPE = RunConfig(
    batch_size=8,
    lr=2.5e-4,
    sampling_lr_mult=1.0,
    clip=0.1,
    schedule="step",
    drop_epochs=(26,),
    warmup=0.02,
    epochs=EPOCHS,
)


@dataclass(frozen=True)
class Arm:
    """One of the detectors that are compared.

    Attributes:
        preset: the preset.
        overrides: what differs from it.
        fixed_matching: trained with pairs that depend on the ground truth alone.
    """

    preset: str = "detr_tiny"
    overrides: dict[str, Any] = field(default_factory=dict)
    fixed_matching: bool = False


FOCAL = {"scoring": "sigmoid", "label": 2.0}
RUNS = {
    "DETR": Arm(),
    "DETR + focal loss": Arm(overrides=FOCAL),
    "DETR + reference points": Arm(overrides={"reference_points": True}),
    "DETR*": Arm("detr_star_tiny"),
    "DETR + fixed matching": Arm(fixed_matching=True),
    "Deformable DETR": Arm("deformable_detr_tiny", {"levels": 1, "backbone_stages": (5,)}),
}
SMALLER: dict[str, Any] = {"queries": QUERIES, "encoder_layers": 1, "decoder_layers": 2}
LETTERS = string.ascii_lowercase  # a query is written as a letter


class FixedMatchingLoss(SetLoss):
    """The set loss with a matching that never changes: query q answers for objects near the q-th point of a grid."""

    def _match(self, named: dict[str, Prediction], targets: PaddedTargets, scoring: str) -> Matches:
        x, y = (torch.arange(5) + 0.5) / 5, (torch.arange(QUERIES // 5) + 0.5) / (QUERIES // 5)
        grid = torch.cartesian_prod(x, y)  # [Q, 2]
        pairs: list[tuple[int, int, int]] = []
        for b, count in enumerate(targets.counts):
            found = linear_sum_assignment(torch.cdist(grid, targets.boxes[b, :count, :2]).numpy())
            pairs += [(b, q, t) for q, t in zip(*(side.tolist() for side in found))]
        rows = torch.tensor(pairs).T
        return Matches(torch.zeros_like(rows[0]), *rows).repeat(0, len(named) - 1)


class Known(nn.Module):
    """Stands in for a backbone: returns feature maps that were computed before."""

    def __init__(self) -> None:
        super().__init__()
        self.maps: list[FeatureMap] = []

    def forward(self, images: ImageBatch) -> list[FeatureMap]:
        """The maps that were put here last."""
        return self.maps


def known_features(backbone: nn.Module, images: ImageBatch) -> list[FeatureMap]:
    """The last two maps (stride 16 and 32) of some images, computed a few images at a time."""
    parts = []
    with torch.no_grad():
        for few in torch.arange(len(images)).split(16):
            parts.append(backbone(ImageBatch(images.pixels[few], images.mask[few], images.sizes[few]))[-2:])
    return [
        FeatureMap(torch.cat([m.tensor for m in level]), torch.cat([m.mask for m in level]), level[0].stride)
        for level in zip(*parts)
    ]


class Images:
    """Images whose feature maps are known."""

    def __init__(self, dataset: DetectionDataset, backbone: nn.Module) -> None:
        self.dataset = dataset
        self.images, self.targets = collate([dataset[i] for i in range(len(dataset))], multiple=32)
        self.maps = known_features(backbone, self.images)

    def __len__(self) -> int:
        return len(self.targets)

    def run(self, model: nn.Module, chosen: Tensor) -> tuple[DetectorOutput, list[Target]]:
        """A model's output for the chosen images, and their targets."""
        model.backbone.maps = [FeatureMap(f.tensor[chosen], f.mask[chosen], f.stride) for f in self.maps[-1:]]
        images = ImageBatch(self.images.pixels[chosen], self.images.mask[chosen], self.images.sizes[chosen])
        return model(images), [self.targets[i] for i in chosen.tolist()]


def build(name: str, classes: int, seed: int) -> nn.Module:
    """One of :data:`RUNS` with random weights, its backbone replaced by known feature maps."""
    arm = RUNS[name]
    config: ModelConfig = configure(arm.preset, **SMALLER, **arm.overrides)
    torch.manual_seed(seed)
    model = regolite.build(config, num_classes=classes)
    model.backbone = Known()
    return model


@contextlib.contextmanager
def entropies(model: nn.Module) -> Iterator[list[list[float]]]:
    """Collect the entropy in nats of every dense cross-attention, by layer and head, mean over images and queries."""
    found: list[list[float]] = []

    def note(module: MultiHeadAttention, arguments: tuple[Tensor, ...]) -> None:
        query, key, _, mask = arguments
        weights = module.weights(query, key, mask)  # [B, M, Q, S]
        found.append(torch.special.entr(weights).sum(-1).mean((0, 2)).tolist())

    # MultiHeadAttention.look calls the module itself, so a hook sees what it is called with.
    layers = model.decoder.layers if hasattr(model, "decoder") else []
    hooks = [layer.cross_attention.register_forward_pre_hook(note) for layer in layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def matched(prediction: Prediction, targets: list[Target], loss: SetLoss) -> Matches:
    """The matched pairs of one prediction, in the order of images and of their objects."""
    pairs = match([prediction], PaddedTargets.of(targets), loss.scoring, loss.costs)
    order = (pairs.image * 1000 + pairs.target).argsort()
    return Matches(*(column[order] for column in (pairs.prediction, pairs.image, pairs.query, pairs.target)))


@torch.inference_mode()
def look(model: nn.Module, images: Images, loss: SetLoss) -> dict[str, Any]:
    """Evaluate the watched images: Hungarian-matched queries, fit of boxes and classes, entropy of the attention."""
    model.eval()
    with entropies(model) as entropy:
        output, targets = images.run(model, torch.arange(min(WATCHED, len(images))))
    pairs = matched(output.final, targets, loss)
    truth = torch.cat([t.boxes for t in targets])
    boxes = output.final.boxes[pairs.image, pairs.query]
    iou = box_iou(to_xyxy(boxes), to_xyxy(truth)).diagonal()
    answers = output.final.logits[pairs.image, pairs.query, : len(images.dataset.classes)].argmax(-1)
    named = answers == torch.cat([t.labels for t in targets])
    line: dict[str, Any] = {"queries": "".join(LETTERS[q] for q in pairs.query.tolist())}
    line |= {"iou": round(iou.mean().item(), 3), "named": round(named.float().mean().item(), 3)}
    if entropy:
        line["entropy"] = [round(sum(layer) / len(layer), 2) for layer in entropy]
    return line


@torch.inference_mode()
def precision(model: nn.Module, images: Images, count: int) -> dict[str, float]:
    """AP and AP50 on the first images."""
    model.eval()
    output, targets = images.run(model, torch.arange(min(count, len(images))))
    sizes = torch.tensor([t.size for t in targets])
    ids = set(images.dataset.image_ids[:count])
    truth = type(images.dataset.coco)()
    whole = images.dataset.coco.dataset
    truth.dataset = whole | {
        "images": [i for i in whole["images"] if i["id"] in ids],
        "annotations": [a for a in whole["annotations"] if a["image_id"] in ids],
    }
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools always prints
        truth.createIndex()
    found = to_detections(output.final, sizes, model.scoring)
    results = [line for d, t in zip(found, targets) for line in d.to_coco(t.image_id, images.dataset.category_ids)]
    measured = average_precision(truth, results)
    return {name: round(measured[name] or 0.0, 2) for name in ("AP", "AP50")}


@torch.inference_mode()
def saved_prediction(model: nn.Module, images: Images, i: int) -> dict[str, Any]:
    """A prediction for image ``i``, as small as matching allows: boxes, and logits of the classes that are there.

    With a softmax one more column stands for all other classes together; the probabilities of the classes that are
    there are then the same as those of the whole.
    """
    model.eval()
    output, [target] = images.run(model, torch.tensor([i]))
    there = target.labels.unique()
    logits = output.final.logits[0]
    if model.scoring == "softmax":
        p = logits.softmax(-1)[:, there]
        logits = torch.cat([p, 1 - p.sum(-1, keepdim=True)], -1).clamp(min=1e-6).log()
    else:
        logits = logits[:, there]
    return {
        "logits": [[round(v, 2) for v in row] for row in logits.tolist()],
        "boxes": [[round(v, 3) for v in row] for row in output.final.boxes[0].tolist()],
    }


def train(
    name: str, train_set: Images, val_set: Images, epochs: int, seed: int, state_file: Path | None = None
) -> dict[str, Any]:
    """Train one of :data:`RUNS` and evaluate it after every epoch; resumes from ``state_file`` if it exists."""
    model = build(name, len(train_set.dataset.classes), seed)
    kind = FixedMatchingLoss if RUNS[name].fixed_matching else SetLoss
    loss = kind(model.model_config.loss, model.scoring)
    optimizer = torch.optim.AdamW(parameter_groups(model, RECIPE), weight_decay=RECIPE.weight_decay)
    size = RECIPE.batch_size
    steps = -(-len(train_set) // size)
    saves = name == SAVED_OF and seed == SEEDS[0]
    run: dict[str, Any] = {
        "seed": seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "scoring": model.scoring,
        "seconds": 0.0,
        "course": [{"epoch": 0, **look(model, train_set, loss)}],
        "precision": [],
        "saved": [saved_prediction(model, train_set, 0)] if saves else [],
    }
    first, recipe = 1, repr((SCENES, epochs, SMALLER, RUNS[name], RECIPE))
    if state_file is not None and state_file.exists():
        state = torch.load(state_file, weights_only=True)
        if state["recipe"] != recipe:
            raise SystemExit(f"{state_file} was trained by another recipe; delete it to start again")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        run, first = json.loads(state["run"]), state["epoch"] + 1
    for epoch in range(first, epochs + 1):
        began, mean_loss = time.process_time(), 0.0
        model.train()
        order = torch.randperm(len(train_set), generator=torch.Generator().manual_seed(1000 * seed + epoch))
        for number, chosen in enumerate(order.split(size)):
            factor = lr_factor(RECIPE, epoch - 1, ((epoch - 1) * steps + number) / (epochs * steps))
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor
            total, _ = loss(*train_set.run(model, chosen))
            optimizer.zero_grad()
            total.backward()
            nn.utils.clip_grad_norm_(model.parameters(), RECIPE.clip)
            optimizer.step()
            mean_loss += total.item() / steps
        run["seconds"] += time.process_time() - began
        run["course"].append({"epoch": epoch, "loss": round(mean_loss, 2), **look(model, train_set, loss)})
        if epoch <= SAVED and saves:
            run["saved"].append(saved_prediction(model, train_set, 0))
        if epoch % 4 == 0:
            figures = {"train": precision(model, train_set, WATCHED), "val": precision(model, val_set, len(val_set))}
            run["precision"].append({"epoch": epoch, **figures})
        if state_file is not None and (epoch % 10 == 0 or epoch == epochs):
            state_file.parent.mkdir(parents=True, exist_ok=True)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch}
            state |= {"run": json.dumps(run), "recipe": recipe}
            torch.save(state, state_file.with_suffix(".new"))
            state_file.with_suffix(".new").replace(state_file)
    print(f"{name}, seed {seed}: {run['seconds']:.0f} s, {run['precision'][-1:]}", flush=True)
    run["seconds"] = round(run["seconds"])
    return run


def open_images(split: str, limit: int | None = None) -> Images:
    """The scenes of a split with their feature maps."""
    backbone = regolite.build("detr_tiny", num_classes=1).backbone.eval()
    return Images(open_data(SCENES, split, make_transform("none"), limit), backbone)


def main() -> None:
    """Train every arm with every seed, and write the results after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--seeds", type=int, nargs="*", default=list(SEEDS))
    parser.add_argument("--only", nargs="*", default=list(RUNS), help="some of: " + "; ".join(RUNS))
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    train_set, val_set = open_images("train"), open_images("val")
    results: dict[str, Any] = {
        "scenes": SCENES, "watched": WATCHED, "seeds": args.seeds, "epochs": args.epochs, "torch": torch.__version__,
        "recipe": RECIPE.to_dict(), "targets": [len(t) for t in train_set.targets[:WATCHED]],
        "runs": {name: [] for name in RUNS if name in args.only},
    }  # fmt: skip
    for seed in args.seeds:
        for number, name in enumerate(RUNS):
            if name in args.only:
                state = STATES / f"{number}-seed{seed}.pt"
                results["runs"][name].append(train(name, train_set, val_set, args.epochs, seed, state))
                args.output.write_text(json.dumps(results, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
