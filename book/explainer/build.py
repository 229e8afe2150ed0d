"""Make REGO Explainer: ``python -m book.explainer.build [FOLDER]``, by default ``build/explainer``.

The folder can be served by any static server. It has the two models as ONNX files, two runtimes that execute them in a
browser, the page's scripts, and ``manifest.json``, which says sizes and hashes of the files that the scripts fetch.

A browser fetches one of the runtimes (``worker.js``): the one for WebGPU if it has a GPU and can suspend WebAssembly,
otherwise the one for WebAssembly, which also takes over if WebGPU fails or gives another answer than PyTorch for a
stored image. The page says which of them runs; ``?backend=wasm`` or ``?backend=webgpu`` in its address chooses one.
WebGPU was tested with an adapter in software only: its speed on a GPU was not measured.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import onnx
import torch
from filelock import FileLock
from PIL import Image

import regolite
from book.explainer.browser_model import compressed, write_model
from book.explainer.page import SCENES_DATA, traced, write_page
from book.explainer.runtime import PROVIDERS, VERSION, write_runtime
from regolite.data.images import ImageSource, read_image
from regolite.data.open import open_data
from regolite.data.scenes import Scenes

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build"

WEIGHTS = {
    "everyday": ROOT / "regolite" / "weights" / "rego_deformable_detr_everyday.safetensors",
    "scenes": ROOT / "data" / "checkpoints" / "rego_deformable_detr_scenes.safetensors",
}
SIZES = {"everyday": 320, "scenes": 128}
"""Side of the square that images are padded to: that of training."""

LEAST = 0.3
"""Least score of an object of a check; no query of the two images has a score within 0.02 of it."""

FETCHED = ("worker.js", "resize.js")
"""Scripts of the worker; all others are in the page."""

CODE = ("boxes.py", "data", "exporting", "explaining/packing.py", "models", "ops", "tracing", "types.py")
"""Modules of the package that the files of the models depend on."""


def build(folder: Path, book: str | None = None) -> None:
    """Write everything to a folder, over what is there.

    Without npm, and without what it has fetched before, the page has its stored examples and no model.

    Args:
        folder: for the page and what it fetches.
        book: address of the book's chapters, as in :func:`book.explainer.page.write_page`.
    """
    try:
        write_runtime(folder / "runtime", BUILD / "npm")
    except SystemExit as reason:
        print(f"REGO Explainer shows its stored examples only: {reason}", flush=True)
        write_page(folder, book, live=False)
        return
    write_page(folder, book)
    for script in FETCHED:
        shutil.copy(HERE / script, folder)
    (folder / "models").mkdir(exist_ok=True)
    models = {}
    for name, weights in WEIGHTS.items():
        content = _exported(name, weights).read_bytes()
        about = {entry.key: entry.value for entry in onnx.load_from_string(content).metadata_props}
        path = folder / "models" / f"{name}.onnx.gz"
        path.write_bytes(compressed(content))
        models[name] = {
            "file": _described(path, folder), "size": int(about["size"]), "header": json.loads(about["header"]),
            "check": check_of(name, weights, folder),
        }  # fmt: skip
    runtimes = {provider: _described(folder / "runtime" / f"ort.{provider}.gz", folder) for provider in PROVIDERS}
    manifest = {"version": regolite.__version__, "onnxruntime-web": VERSION, "runtimes": runtimes, "models": models}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def example_of(name: str) -> ImageSource:
    """An image for a model, to trace it with."""
    if name == "scenes":
        return Scenes(1, split="val", max_objects=6).image(0)
    return ROOT / "data" / "coco_tiny" / "images" / "000000475546.jpg"


def checked_image(name: str) -> Image.Image:
    """An example of the page that a GPU is checked with; a photograph is reduced, since its pixels are fetched."""
    if name == "scenes":
        return open_data(SCENES_DATA, "val").scene(22).draw()
    image = read_image(ROOT / "data" / "coco_tiny" / "images" / "000000234748.jpg")
    image.thumbnail((160, 160))
    return image


def check_of(name: str, weights: Path, folder: Path) -> dict[str, Any]:
    """Write the pixels of an image, and say what PyTorch finds in it: a GPU has to find the same.

    Args:
        name: of the model.
        weights: its checkpoint.
        folder: of the page.

    Returns:
        The file with the pixels (RGBA) and their size, and by stage the objects with a score of at least
        :data:`LEAST`: query, label, score and box (``cxcywh`` as fractions of the image).
    """
    image = checked_image(name)
    path = folder / "models" / f"{name}.check.gz"
    path.write_bytes(gzip.compress(image.convert("RGBA").tobytes(), 9, mtime=0))
    stages = []
    for boxes in traced(regolite.load(weights), image).by_stage:
        scores, labels = boxes.best()
        found = (scores >= LEAST).nonzero()[:, 0].tolist()
        stages.append(
            [
                {"query": q, "label": int(labels[q]), "score": float(scores[q]), "box": boxes.boxes[0, q].tolist()}
                for q in found
            ]
        )  # fmt: skip
    return {
        "file": _described(path, folder), "width": image.width, "height": image.height, "threshold": LEAST,
        "stages": stages,
    }  # fmt: skip


def _exported(name: str, weights: Path) -> Path:
    """The ONNX file of a model. It takes a minute or two, so the file is kept until the weights or the code change."""
    key = hashlib.sha256(weights.read_bytes() + torch.__version__.encode())
    paths = [path for part in CODE for path in sorted((ROOT / "regolite").glob(part))]
    modules = [module for path in paths for module in (sorted(path.rglob("*.py")) if path.is_dir() else [path])]
    for module in [*modules, HERE / "browser_model.py"]:
        key.update(module.read_bytes())
    file = BUILD / "explainer-models" / f"{name}-{key.hexdigest()[:16]}.onnx"
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_suffix(".lock")):  # tests in several processes export once
        if file.exists():
            return file
        for old in file.parent.glob(f"{name}-*.onnx"):
            old.unlink()
        print(f"exporting the model {name} ...", flush=True)
        unfinished = file.with_suffix(".part")
        write_model(regolite.load(weights), unfinished, SIZES[name], example_of(name))
        unfinished.replace(file)
    return file


def _described(path: Path, folder: Path) -> dict[str, Any]:
    content = path.read_bytes()
    return {
        "path": path.relative_to(folder).as_posix(), "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }  # fmt: skip


if __name__ == "__main__":
    build(Path(sys.argv[1]) if len(sys.argv) > 1 else BUILD / "explainer")
