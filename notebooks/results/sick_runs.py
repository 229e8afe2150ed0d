"""The trainings of notebook 12 that go wrong, each by one mistake, and one that does not: their curves.

`python notebooks/results/sick_runs.py` writes `12_sick_runs.json` beside itself, in about 3 minutes of one CPU core.
Which letter is which mistake stands below: solve exercise 12.5 first.
"""

import contextlib
import io
import json
import math
from pathlib import Path

import torch
from pycocotools.coco import COCO
from torch.nn.utils import clip_grad_norm_

import regolite
from regolite.boxes import to_xyxy
from regolite.checkpoint import EVERYDAY
from regolite.loading import load_weights
from regolite.data import collate, make_transform, open_data
from regolite.inference import to_detections
from regolite.evaluation.coco import average_precision
from regolite.losses import SetLoss
from regolite.training.schedule import lr_factor, parameter_groups

ROOT = Path(__file__).resolve().parents[2]
PHOTOGRAPHS = (5, 14, 17, 21)  # of the validation images, as in the notebook
STEPS = 30
MISTAKES = {
    "healthy": "",
    "A": "only the stages were handed to the optimizer",
    "B": "learning rate 40 times too high",
    "C": "boxes as corners, where center and size belong",
    "D": "learning rate 50 times too low",
    "no clipping": "",
    "zero_grad forgotten": "",
}
RATES = {"B": 40, "D": 1 / 50}


def measure(model, images, targets, dataset):
    """AP of every stage on the images that are learned."""
    keep, truth = {target.image_id for target in targets}, COCO()
    truth.dataset = dict(dataset.coco.dataset)
    truth.dataset["images"] = [entry for entry in truth.dataset["images"] if entry["id"] in keep]
    truth.dataset["annotations"] = [entry for entry in truth.dataset["annotations"] if entry["image_id"] in keep]
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    model.eval()
    with torch.inference_mode():
        output = model(images)
    sizes, by_stage = torch.tensor([target.size for target in targets]), []
    for prediction in output.by_stage:
        found = zip(to_detections(prediction, sizes, model.scoring), targets)
        results = [line for f, t in found for line in f.to_coco(t.image_id, dataset.category_ids)]
        by_stage.append(round(average_precision(truth, results)["AP"], 2))
    return by_stage


def train(name):
    """One training and its curves."""
    torch.manual_seed(0)
    dataset = open_data(ROOT / "data/coco_tiny", "val", make_transform("none", 192))
    names = {"classes": dataset.classes, "category_ids": dataset.category_ids}
    model = regolite.build(regolite.configure("rego_deformable_detr_everyday", **names))
    load_weights(model, EVERYDAY, new_classes=True)
    images, targets = collate([dataset[i] for i in PHOTOGRAPHS], multiple=32)
    shown = targets
    config = regolite.RunConfig(
        lr=1e-3 * RATES.get(name, 1), sampling_lr_mult=1.0, schedule="one_cycle", warmup=0.1, clip=0.1
    )
    if name == "C":
        targets = [type(t)(t.labels, to_xyxy(t.boxes), t.image_id, t.size) for t in targets]
    trained = model.stages if name == "A" else model
    optimizer = torch.optim.AdamW(parameter_groups(trained, config), weight_decay=config.weight_decay)
    set_loss = SetLoss(model.model_config.loss, model.scoring)
    decoders = ["base", "stage1", "stage2", "stage3"]
    curves = {"loss": {decoder: [] for decoder in decoders}, "norm": [], "lr": [], "AP": []}
    for step in range(STEPS):
        if step % 10 == 0:
            curves["AP"].append([step, *measure(model, images, shown, dataset)])
        factor = lr_factor(config, 0, step / STEPS)
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        model.train()
        torch.manual_seed(step)  # of the noise
        loss, terms = set_loss(model(images, targets=targets), targets)
        if name != "zero_grad forgotten":
            optimizer.zero_grad()
        loss.backward()
        norm = clip_grad_norm_(model.parameters(), math.inf if name == "no clipping" else config.clip)
        optimizer.step()
        for decoder in decoders:
            last = sum(value.item() for term, value in terms.items() if term.split("/")[0] == decoder)
            curves["loss"][decoder].append(round(last, 3))
        curves["norm"].append(round(norm.item(), 2))
        curves["lr"].append(config.lr * factor)
    curves["AP"].append([STEPS, *measure(model, images, shown, dataset)])
    print(name, "loss of stage 3", curves["loss"]["stage3"][-1], "AP", curves["AP"][-1][1:], flush=True)
    return curves


if __name__ == "__main__":
    torch.set_num_threads(1)
    runs = {name: train(name) for name in MISTAKES}
    Path(__file__).with_name("12_sick_runs.json").write_text(json.dumps(runs) + "\n", encoding="utf-8")
