"""The example of notebook 16, and what other ways of training on it would have given.

`python notebooks/results/own_data.py` writes `16_own_data.json` beside itself: the detector of the notebook from two
starting points, with and without pasting, three minutes of one CPU core each, one seed; a quarter of an hour in all.
"""

import json
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import torch

import regolite

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "data" / "coco_tiny"
CHECKPOINT = ROOT / "regolite" / "weights" / "rego_deformable_detr_everyday.safetensors"
NEW = ("toilet", "laptop", "stop sign", "oven")
PER_CLASS = 4  # labeled training photographs of a class
BACKGROUND = {"train": 40, "val": 20}  # photographs with none of the classes
MINUTES, SEEDS = 3.0, (0,)
RECIPE = {
    "epochs": 10_000, "batch_size": 4, "image_size": 256, "lr": 5e-4, "sampling_lr_mult": 1.0,
    "schedule": "one_cycle", "warmup": 0.05, "augment": "laptop_crop", "evaluate_every": 0, "device": "cpu",
}  # fmt: skip


def write_export(folder):
    """Write the example as a labeling tool exports it: images, and COCO's form with outlines for each split.

    Returns:
        How many labeled photographs each split has.
    """
    folder = Path(folder)
    parts = [json.loads((TINY / "annotations" / f"instances_{s}.json").read_text("utf-8")) for s in ("train", "val")]
    categories = [category for category in parts[0]["categories"] if category["name"] in NEW]
    ids = {category["id"] for category in categories}
    objects = {image["id"]: [] for part in parts for image in part["images"]}
    for part in parts:
        for annotation in part["annotations"]:
            if annotation["category_id"] in ids:
                objects[annotation["image_id"]].append(annotation)

    splits, empty, seen = {"train": [], "val": []}, [], Counter()
    for image in (image for part in parts for image in part["images"]):
        present = {annotation["category_id"] for annotation in objects[image["id"]]}
        is_train = any(seen[category] < PER_CLASS for category in present)
        seen.update(present if is_train else ())
        (empty if not present else splits["train" if is_train else "val"]).append(image)
    labeled = {split: len(images) for split, images in splits.items()}

    (folder / "images").mkdir(parents=True, exist_ok=True)
    for split, images in splits.items():
        images += [empty.pop(0) for _ in range(BACKGROUND[split])]
        for image in images:
            shutil.copy(TINY / "images" / image["file_name"], folder / "images")
        annotations = [annotation for image in images for annotation in objects[image["id"]]]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / f"{split}.json").write_text(json.dumps(content), encoding="utf-8")
    return labeled


def train(data, output, start, copy_paste, seed):
    """Train, and return AP50 on the held-out photographs by stage, and the number of steps."""
    checkpoint = (
        {"checkpoint": str(CHECKPOINT)} if start == "everyday detector" else {"overrides": ("weights=bundled",)}
    )
    config = regolite.RunConfig(
        data=str(data), model="rego_deformable_detr_everyday", output=str(output), max_cpu_minutes=MINUTES,
        copy_paste=copy_paste, seed=seed, **RECIPE, **checkpoint,
    )  # fmt: skip
    lines = [json.loads(line) for line in (regolite.train(config) / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [stage["AP50"] for stage in lines[-1]["stages"]], lines[-1]["step"]


def main():
    """Do all trainings and write what they gave."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        labeled = write_export(work / "export")
        regolite.data.convert(work / "export", work / "data")
        rows = []
        for start in ("everyday detector", "ImageNet features"):
            for copy_paste in (0.5, 0.0):
                runs = [train(work / "data", work / f"{start}{copy_paste}{s}", start, copy_paste, s) for s in SEEDS]
                mean = [round(sum(values) / len(runs), 1) for values in zip(*(ap50 for ap50, _ in runs))]
                rows.append({"start": start, "copy_paste": copy_paste, "AP50": mean, "steps": [n for _, n in runs]})
                print(rows[-1], flush=True)
    about = {"minutes": MINUTES, "seeds": list(SEEDS), "held_out": labeled["val"]}
    Path(__file__).with_name("16_own_data.json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
