"""What export costs and gains on this machine: ``python -m benchmarks.exporting [--json FILE]``.

Exports the everyday detector, its base alone and with REGO, and with weights of full, half and 8-bit precision; then
compares each file with PyTorch: milliseconds for one photograph, the two sides in turns, and AP on all photographs of
``data/coco_tiny``, none of which the detector has seen.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import regolite
from benchmarks.speed import compare
from regolite.data import open_data
from regolite.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from regolite.evaluation import with_shared_classes
from regolite.exporting import Exportable, Precision, export, session_of, square
from regolite.inference import to_detections
from regolite.models.config import config_of
from regolite.types import Detections, ImageBatch, Prediction

DATA = Path(__file__).parents[1] / "data" / "coco_tiny"
PHOTO = DATA / "images" / "000000475546.jpg"
FILES: dict[str, tuple[int | None, Precision]] = {
    "base": (0, "fp32"),
    "REGO": (None, "fp32"),
    "REGO, fp16": (None, "fp16"),
    "REGO, int8": (None, "int8"),
}


class Runtime(nn.Module):
    """An exported file as a detector that :func:`regolite.evaluate` takes.

    Args:
        file: the ONNX file.
        like: the model that it was exported from.
        size: side of the file's square.
    """

    def __init__(self, file: Path, like: nn.Module, size: int) -> None:
        super().__init__()
        self.session, self.model_config, self.size = session_of(file), config_of(like), size
        self.place = nn.Parameter(torch.zeros(()))  # `evaluate` asks for the device of a parameter

    def forward(self, pixels: Tensor, sizes: Tensor) -> list[Tensor]:
        """The outputs of the file."""
        inputs = {"pixels": pixels.numpy(), "sizes": sizes.numpy()}
        return [torch.from_numpy(x) for x in self.session.run(None, inputs)]

    def detections(self, images: ImageBatch, sizes: Tensor, top_k: int) -> list[Detections]:
        """The detections of the last stage."""
        mean, deviation = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
        height, width = images.mask.shape[1:]
        pixels = F.pad(images.pixels * deviation + mean, (0, self.size - width, 0, self.size - height))
        logits, boxes = self(pixels, images.sizes)[:2]
        return to_detections(Prediction(logits[-1], boxes[-1]), sizes, "sigmoid", top_k)


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.exporting", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to this file too")
    parser.add_argument("--rounds", type=int, default=15, help="measurements of each (default 15)")
    parser.add_argument("--threads", type=int, default=1, help="threads of both sides (default 1)")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error("--rounds must be at least 2")
    torch.set_num_threads(args.threads)
    model = regolite.load().eval()
    size = config_of(model).image_size
    data = with_shared_classes(open_data(str(DATA), "train+val"), config_of(model))
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    report: dict[str, Any] = {"machine": machine, "threads": args.threads, "files": {}}
    print(
        "| file | MB | onnxruntime, ms | PyTorch, ms | ratio | AP | AP50 |\n| --- | --- | --- | --- | --- | --- | --- |"
    )
    pixels, sizes = (x[None] for x in square(PHOTO, size))
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        for name, (stages, precision) in FILES.items():
            file = export(model, Path(folder) / "model.onnx", stages=stages, precision=precision, images=[PHOTO])
            runtime, module = Runtime(file, model, size), Exportable(model, stages)
            row = compare(partial(runtime, pixels, sizes), partial(module, pixels, sizes), args.rounds)
            figures = regolite.evaluate(runtime, data, batch_size=1, progress=False)
            row |= {"MB": file.stat().st_size / 1e6, "AP": figures["AP"], "AP50": figures["AP50"]}
            report["files"][name] = row
            times = (
                f"{row['ours']:.0f} | {row['theirs']:.0f} | {row['ratio']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
            )
            print(f"| {name} | {row['MB']:.1f} | {times} | {row['AP']:.1f} | {row['AP50']:.1f} |")
        figures = regolite.evaluate(model, data, batch_size=8, progress=False)
        report["torch"] = {"AP": figures["AP"], "AP50": figures["AP50"], "base": figures["stages"][0]["AP"]}
        print(f"PyTorch: AP {figures['AP']:.1f}, AP50 {figures['AP50']:.1f}, base AP {figures['stages'][0]['AP']:.1f}")
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
