"""The ablations of notebook 13: ``python notebooks/results/ablation.py``.

The model of the scenes keeps its weights and loses one of its paths: an attention becomes uniform (every query gives
the same weight to every key), or the glimpses of all queries are replaced by their mean. Measured is what is left of
the preference for the correct kind of ball, on the scenes and balls of ``relations.json``. It takes about five minutes
of one CPU core; ``ablation.json`` beside this file is written at the end.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import regolite
from regolite.boxes import to_xyxy
from regolite.data import DetectionDataset, collate, open_data
from regolite.data.scenes import CLASSES, DECIDERS
from regolite.evaluation.coco import prepared
from regolite.evaluation.relations import interval, stand_for
from regolite.models.attention import MultiHeadAttention

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = ROOT / "data/checkpoints/rego_deformable_detr_scenes.safetensors"
SCENES = "scenes:2000:val=300:context=0.5:max_objects=6"
BALLS = [CLASSES.index(f"ball of {shape}") for shape in DECIDERS]
BATCH = 13


@contextmanager
def changed(module: nn.Module) -> Iterator[None]:
    """Uniform weights for an attention; for a glimpse head, the mean over the queries in place of each glimpse."""
    if not isinstance(module, MultiHeadAttention):
        handle = module.register_forward_hook(lambda _, inputs, output: output.mean(1, keepdim=True).expand_as(output))
        try:
            yield
        finally:
            handle.remove()
        return
    kept = [parameter.detach().clone() for parameter in module.query.parameters()]
    with torch.no_grad():
        for parameter in module.query.parameters():
            parameter.zero_()
        try:
            yield
        finally:
            for parameter, old in zip(module.query.parameters(), kept):
                parameter.copy_(old)


@torch.inference_mode()
def preferences(model: nn.Module, dataset: DetectionDataset, wanted: Sequence[int]) -> tuple[Tensor, list[int]]:
    """The preference for the correct kind, of every ball and stage, [balls, stages]; and the image of each ball."""
    rows, images_of = [], []
    for start in range(0, len(wanted), BATCH):
        numbers = wanted[start : start + BATCH]
        images, targets = collate([dataset[i] for i in numbers], multiple=32)
        by_stage = model(images).by_stage
        scores = [prediction.logits.sigmoid() for prediction in by_stage]
        for k, (i, target) in enumerate(zip(numbers, targets)):
            query = stand_for(to_xyxy(by_stage[-1].boxes[k]), scores[-1][k], to_xyxy(target.boxes))[1]
            for ball, _ in dataset.relations(i):
                if query[ball] < 0:
                    rows.append(torch.full((len(scores),), 0.5))
                else:
                    both = torch.stack([one[k, query[ball]][BALLS] for one in scores])  # [stages, 2]
                    rows.append(both[:, BALLS.index(int(target.labels[ball]))] / both.sum(1))
                images_of.append(i)
    return torch.stack(rows), images_of


def figures(values: Tensor, before: Tensor, images: Sequence[int]) -> dict[str, list[dict[str, float]]]:
    """Mean preference, its change, and how often the class is right, each with its interval, by stage."""
    measured = {"preference": values, "change": values - before, "right": (values > 0.5).float()}
    return {
        name: [interval(column.double().numpy(), np.array(images)) for column in table.T]
        for name, table in measured.items()
    }


def main() -> None:
    torch.set_num_threads(1)
    model = regolite.load(CHECKPOINT).eval()
    dataset = prepared(model, open_data(SCENES, "val"))
    wanted = [i for i in range(len(dataset)) if len(dataset[i][1]) > 2 and dataset.relations(i)]
    layers = [list(stage.decoder.layers) for stage in model.stages]
    relations = [layer.cross_attention for stage in layers for layer in stage]
    among = [layer.self_attention for stage in layers for layer in stage]
    base = [layer.self_attention for layer in model.detector.decoder_layers]
    parts = {
        "as trained": [],
        "relations": relations,
        "self-attention of the stages": among,
        "self-attention of stage 2": [layer.self_attention for layer in layers[1]],
        "relations and self-attention of the stages": relations + among,
        "self-attention of the base decoder": base,
        "all attention between queries": relations + among + base,
        "glimpses": [stage.glimpse for stage in model.stages],
    }
    found, before = {}, None
    for name, modules in parts.items():
        with ExitStack() as stack:
            for module in modules:
                stack.enter_context(changed(module))
            values, images = preferences(model, dataset, wanted)
        before = values if before is None else before
        found[name] = {"modules": len(modules), **figures(values, before, images)}
        print(name, *(f"{one['mean']:.3f}" for one in found[name]["preference"]), flush=True)
    again, _ = preferences(model, dataset, wanted[:BATCH])
    assert torch.equal(again, before[: len(again)]), "an ablation has left the model changed"
    document = {"checkpoint": CHECKPOINT.name, "data": SCENES, "images": len(wanted), "balls": len(before)}
    Path(__file__).with_suffix(".json").write_text(json.dumps(document | {"parts": found}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
