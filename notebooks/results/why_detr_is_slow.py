"""The trainings behind notebook 08: ``python notebooks/results/why_detr_is_slow.py``.

Five detectors learn the same 256 drawn scenes, in the same order, for the same number of epochs, with the same
optimizer and learning rate. All of them read the same feature maps, those of the bundled ImageNet MobileNetV2, computed
once and frozen: whatever differs is the transformer's doing. After every epoch the first 64 training scenes are looked
at: which query is matched with which object, how far the attention is spread, how well boxes and classes fit.

It takes about half an hour of one CPU core. An epoch that is done is kept in ``runs/why_detr_is_slow``; started again,
the script goes on from there. ``why_detr_is_slow.json`` beside this file is written anew after every detector.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import string
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import regolite
from regolite.models.attention import MultiHeadAttention
from regolite.boxes import box_iou, to_xyxy
from regolite.data import DetectionDataset, collate, make_transform, open_data
from regolite.inference import to_detections
from regolite.evaluation.coco import average_precision
from regolite.losses import SetLoss
from regolite.matching import Matches, PaddedTargets, match
from regolite.models.rego import Rego
from regolite.types import DetectorOutput, FeatureMap, ImageBatch, Prediction, Target
from regolite.training.config import RunConfig
from regolite.training.schedule import lr_factor, parameter_groups

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).with_suffix(".json")
STATES = ROOT / "runs" / "why_detr_is_slow"

SCENES = "scenes:256:val=64:context=0:max_objects=4:size=256"
WATCHED = 64  # the first training scenes, looked at after every epoch
SAVED = 20  # epochs whose predictions for the first scene are kept,
SAVED_OF = ("DETR",)  # of these
EPOCHS = 60
RECIPE = RunConfig(
    batch_size=8,
    lr=2.5e-4,
    sampling_lr_mult=1.0,
    clip=0.1,
    schedule="step",
    drop_epochs=(48,),
    warmup=0.02,
    epochs=EPOCHS,
)
SINGLE = {"levels": 1, "backbone_stages": (5,)}
DOUBLE = {"levels": 2, "backbone_stages": (4, 5)}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "DETR": ("detr_tiny", {}),
    "DETR*": ("detr_star_tiny", {}),
    "Deformable DETR, one level": ("deformable_detr_tiny", SINGLE),
    "Deformable DETR, one level + REGO": ("rego_deformable_detr_tiny", SINGLE),
    "Deformable DETR, two levels": ("deformable_detr_tiny", DOUBLE),
}
LETTERS = string.ascii_lowercase  # a query is written as a letter


class Known(nn.Module):
    """In a backbone's place: gives feature maps that were computed before."""

    def __init__(self) -> None:
        super().__init__()
        self.maps: list[FeatureMap] = []

    def forward(self, images: ImageBatch) -> list[FeatureMap]:
        """The maps that were put here last, whatever the images."""
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
        detector = model.detector if isinstance(model, Rego) else model
        levels = min(len(detector.feature_channels), len(self.maps))
        detector.backbone.maps = [FeatureMap(f.tensor[chosen], f.mask[chosen], f.stride) for f in self.maps[-levels:]]
        images = ImageBatch(self.images.pixels[chosen], self.images.mask[chosen], self.images.sizes[chosen])
        return model(images), [self.targets[i] for i in chosen.tolist()]


def build(name: str, classes: int, seed: int) -> nn.Module:
    """One of ``RUNS`` with random weights, its backbone replaced by known feature maps."""
    preset, overrides = RUNS[name]
    torch.manual_seed(seed)
    model = regolite.build(preset, num_classes=classes, queries=20, **overrides)
    detector = model.detector if isinstance(model, Rego) else model
    detector.backbone = Known()
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
    """What the watched images say of a model: matched queries (base detector and last stage), fit, entropy."""
    model.eval()
    with entropies(model) as entropy:
        output, targets = images.run(model, torch.arange(min(WATCHED, len(images))))
    line: dict[str, Any] = {"queries": []}
    for prediction in output.by_stage if len(output.by_stage) == 1 else (output.by_stage[0], output.final):
        pairs = matched(prediction, targets, loss)
        line["queries"].append("".join(LETTERS[q] for q in pairs.query.tolist()))
    truth = torch.cat([t.boxes for t in targets])
    boxes = output.final.boxes[pairs.image, pairs.query]
    iou = box_iou(to_xyxy(boxes), to_xyxy(truth)).diagonal()
    answers = output.final.logits[pairs.image, pairs.query, : len(images.dataset.classes)].argmax(-1)
    named = answers == torch.cat([t.labels for t in targets])
    line |= {"iou": round(iou.mean().item(), 4), "named": round(named.float().mean().item(), 4)}
    if entropy:
        line["entropy"] = [round(sum(layer) / len(layer), 4) for layer in entropy]
    return line


@torch.inference_mode()
def precision(model: nn.Module, images: Images, count: int) -> list[dict[str, float]]:
    """AP and AP50 by stage on the first images."""
    model.eval()
    chosen = torch.arange(min(count, len(images)))
    output, targets = images.run(model, chosen)
    sizes = torch.tensor([t.size for t in targets])
    ids = set(images.dataset.image_ids[:count])
    truth = type(images.dataset.coco)()
    whole = images.dataset.coco.dataset
    truth.dataset = whole | {
        "images": [i for i in whole["images"] if i["id"] in ids],
        "annotations": [a for a in whole["annotations"] if a["image_id"] in ids],
    }
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints whatever it does
        truth.createIndex()
    figures = []
    for prediction in output.by_stage:
        found = to_detections(prediction, sizes, model.scoring)
        results = [line for d, t in zip(found, targets) for line in d.to_coco(t.image_id, images.dataset.category_ids)]
        measured = average_precision(truth, results)
        figures.append({name: round(measured[name] or 0.0, 2) for name in ("AP", "AP50")})
    return figures


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
    """Train one of ``RUNS`` and watch it; goes on from ``state_file`` where there is one."""
    torch.manual_seed(seed)
    model = build(name, len(train_set.dataset.classes), seed)
    loss = SetLoss(model.model_config.loss, model.scoring)
    optimizer = torch.optim.AdamW(parameter_groups(model, RECIPE), weight_decay=RECIPE.weight_decay)
    size = RECIPE.batch_size
    steps = -(-len(train_set) // size)
    run: dict[str, Any] = {
        "preset": RUNS[name][0],
        "parameters": sum(p.numel() for p in model.parameters()),
        "scoring": model.scoring,
        "seconds": 0.0,
        "course": [{"epoch": 0, **look(model, train_set, loss)}],
        "precision": [],
        "saved": [saved_prediction(model, train_set, 0)] if name in SAVED_OF else [],
    }
    first, recipe = 1, json.dumps([SCENES, epochs, RUNS[name], RECIPE.to_dict()])
    if state_file is not None and state_file.exists():
        state = torch.load(state_file, weights_only=True)
        if state["recipe"] != recipe:
            raise SystemExit(f"{state_file} was trained by another recipe; delete it to start anew")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        run, first = json.loads(state["run"]), state["epoch"] + 1
    for epoch in range(first, epochs + 1):
        began, paid = time.process_time(), 0.0
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
            paid += total.item() / steps
        run["seconds"] += time.process_time() - began
        run["course"].append({"epoch": epoch, "loss": round(paid, 3), **look(model, train_set, loss)})
        if epoch <= SAVED and name in SAVED_OF:
            run["saved"].append(saved_prediction(model, train_set, 0))
        if epoch % 3 == 0:
            figures = {"train": precision(model, train_set, WATCHED), "val": precision(model, val_set, len(val_set))}
            run["precision"].append({"epoch": epoch, **figures})
            print(
                f"{name}: epoch {epoch}, loss {paid:.2f}, AP {figures['train'][-1]} {figures['val'][-1]}",
                flush=True,
            )
        if state_file is not None:
            state_file.parent.mkdir(parents=True, exist_ok=True)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch}
            state |= {"run": json.dumps(run), "recipe": recipe}
            torch.save(state, state_file.with_suffix(".new"))
            state_file.with_suffix(".new").replace(state_file)
    run["seconds"] = round(run["seconds"])
    return run


def open_images(split: str, limit: int | None = None) -> Images:
    """The scenes of a split with their feature maps."""
    backbone = regolite.build("detr_tiny", num_classes=1).backbone.eval()
    return Images(open_data(SCENES, split, make_transform("none"), limit), backbone)


def main() -> None:
    """Train all, and write the results after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=list(RUNS), help="some of: " + "; ".join(RUNS))
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    train_set, val_set = open_images("train"), open_images("val")
    results: dict[str, Any] = {
        "scenes": SCENES, "watched": WATCHED, "seed": args.seed, "epochs": args.epochs, "torch": torch.__version__,
        "recipe": RECIPE.to_dict(), "targets": [len(t) for t in train_set.targets[:WATCHED]], "runs": {},
    }  # fmt: skip
    for number, name in enumerate(RUNS):
        if name in args.only:
            state = STATES / f"{number}-seed{args.seed}.pt"
            results["runs"][name] = train(name, train_set, val_set, args.epochs, args.seed, state)
            args.output.write_text(json.dumps(results, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
