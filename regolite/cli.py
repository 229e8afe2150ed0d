"""The command line: ``python -m regolite``, or ``regolite`` once installed.

::

    regolite presets
    regolite train --data data/mine --model rego_deformable_detr_everyday --output runs/mine --max-minutes 30 --resume \
        --checkpoint regolite/weights/rego_deformable_detr_everyday.safetensors --schedule one_cycle --batch-size 4
    regolite evaluate --checkpoint runs/mine/best.safetensors --data data/coco_tiny --json figures.json
    regolite detect --checkpoint runs/mine/best.safetensors street.jpg photos clip.mp4 --output found
    regolite explain street.jpg --html street.html
    regolite convert my_export --output data/mine
    regolite relations --checkpoint runs/mine/best.safetensors --data scenes:200 --json relations.json
    regolite complexity --models detr_r50 rego_detr_r50 --json complexity.json
    regolite data cards
    regolite prepare-coco --root data/coco
    regolite compare runs/base runs/rego --metric AP50
    regolite recipes --data COCO
    regolite experiment stages --seeds 0 1 2 --jobs 2
    regolite experiment recipe --data cards=data/cards everyday=DIR --jobs 2
    regolite train --recipe rego_deformable_detr_r50_50ep --data COCO --output runs/r50 --processes 8

Each command is a function that says in Python what the command does; :func:`main` chooses it and turns what goes wrong
into one line. Exit codes: 0 done, 1 prepare-coco has found something wrong, 2 wrong input, 130 interrupted by
Ctrl-C, 143 by SIGTERM. What a command alone needs is imported where it is needed, so that the others need not wait for
it.
"""

from __future__ import annotations

import argparse
import difflib
import glob
import io
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import types
import typing
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import regolite
from regolite.errors import UserError, advice

if TYPE_CHECKING:
    from PIL import Image

    from regolite.data import DetectionDataset
    from regolite.models.detector import Detector
    from regolite.types import Detections


EXTRAS = {"matplotlib": "course", "IPython": "course", "ipywidgets": "course", "av": "video", "supervision": "convert"}
"""Which extra of the package installs a library that not every command needs."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the words after ``regolite``; those of this process by default.

    Returns:
        The exit code.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")  # for names that the terminal's encoding lacks
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments = argparse.Namespace()
    try:
        arguments = _parse(argv)
        code = arguments.command(arguments)
        sys.stdout.flush()  # a closed pipe is to show here, and not when Python ends
        return code
    except UserError as error:
        return _fail(_one_line(error))
    except KeyboardInterrupt as error:  # RunStopped, where a run has saved what it had done
        if os.environ.get("RANK", "0") == "0":
            print(f"\nregolite: {getattr(error, 'what', 'interrupted')}{_how_to_go_on(argv)}", file=sys.stderr)
        return 128 + getattr(error, "signum", signal.SIGINT)
    except BrokenPipeError:  # `regolite presets | head -3`: nobody reads on, and nobody wants to hear of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package not in EXTRAS:
            raise
        return _fail(f"{package} is not installed: pip install 'regolite[{EXTRAS[package]}]'")
    except OSError as error:
        return _fail(_about_file(error, arguments))
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search("out of memory|can't allocate memory", str(error)):
            raise
        return _fail("out of memory; give a smaller --batch-size or --image-size, or a smaller model")


# ------------------------------------------------------------------------------------------------- the commands


def presets(arguments: argparse.Namespace) -> int:
    """Print the named models."""
    import torch

    rows = []
    for name in regolite.presets():
        config = regolite.configure(name, weights=None)
        with torch.device("meta"):  # shapes without numbers: nothing is allocated
            parameters = sum(p.numel() for p in regolite.build(config).parameters())
        stages = config.rego.stages if config.rego is not None else 0
        about = asdict(config.detector)
        backbone = about["backbone"] + "-dc5" * about.get("dilated", False)
        rows.append((name, parameters, backbone, stages, config.image_size))
    names = ("name", "parameters", "backbone", "stages", "image_size")
    if arguments.json:
        print(json.dumps([dict(zip(names, row)) for row in rows], indent=2))
    else:
        line = f"{{:{max(len(row[0]) for row in rows)}}}  {{:>12}}  {{:17}}  {{:>11}}  {{:>12}}".format
        print(line("model", "M parameters", "backbone", "REGO stages", "image size"))
        for name, count, backbone, stages, size in rows:
            print(line(name, f"{count / 1e6:.2f}", backbone, stages or "-", size))
    return 0


def train(arguments: argparse.Namespace) -> int:
    """Train, then say where the results are and how good they are."""
    from regolite.evaluation import table_by_stage
    from regolite.paper.recipes import recipe

    known = {f.name for f in fields(regolite.RunConfig)}
    given = {name: value for name, value in vars(arguments).items() if name in known}
    defaults = recipe(arguments.recipe).settings() if arguments.recipe is not None else {}
    config = regolite.RunConfig.of({**defaults, **given})
    folder = regolite.train(config)
    if os.environ.get("RANK", "0") == "0":  # of several processes only the first has results to show
        metrics = (json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines())
        latest = {line["split"]: line for line in metrics if line["kind"] == "evaluation"}
        for split, figures in latest.items():
            print(f"AP on {figures['images']} images of {split}, in percent\n\n{table_by_stage(figures)}\n")
        names = ("model.safetensors", "best.safetensors", "metrics.jsonl", "train.log", "figures")
        print(f"The run is in {folder}: {', '.join(name for name in names if (folder / name).exists())}")
        if (folder / "best.safetensors").exists():
            print(
                "These figures are those of the last weights, model.safetensors; compare them with published ones. "
                "best.safetensors was chosen by its AP on val."
            )
    return 0


def evaluate(arguments: argparse.Namespace) -> int:
    """Measure the average precision of every stage of a checkpoint."""
    from regolite.evaluation import table_by_stage, with_shared_classes
    from regolite.evaluation.bootstrap import as_text
    from regolite.models.config import config_of
    from regolite.utils.files import write_atomic

    _prepare(arguments.json)
    _prepare(arguments.save_detections, "--save-detections")
    model = _load(arguments)
    config = config_of(model)
    data = _open(arguments.data, arguments.split, model, arguments.limit_images, arguments.image_size)
    if arguments.shared_classes:
        of = len(data.classes)
        data = with_shared_classes(data, config)
        print(f"measured are the {len(data.classes)} classes that both know, of {of} in the data")
    if not set(data.category_ids) <= set(config.category_ids):
        raise UserError(
            f"{arguments.data} has other categories than {arguments.checkpoint}: {_ids(data.category_ids)} there, "
            f"{_ids(config.category_ids)} here; give the data that the model was trained for, train one on these, "
            "or measure --shared-classes"
        )
    names = dict(zip(config.category_ids, config.classes))
    if any(names[category] != name for category, name in zip(data.category_ids, data.classes)):
        print("regolite: warning: the data's classes have other names than the model's", file=sys.stderr)
    figures = regolite.evaluate(
        model, data, arguments.stages, arguments.batch_size, backend=arguments.backend,
        detections=arguments.save_detections, draws=arguments.bootstrap, on_broken=arguments.on_broken,
    )  # fmt: skip
    for message in figures.get("broken", ()):
        print(f"regolite: warning: left out: {message}", file=sys.stderr)
    print(f"AP on {figures['images']} images of {arguments.split}, in percent\n\n{table_by_stage(figures)}")
    if arguments.bootstrap:
        print(f"\n{as_text(figures)}")
    if arguments.json is not None:
        about = {
            "checkpoint": str(arguments.checkpoint),
            "data": arguments.data,
            "split": arguments.split,
            "image_size": arguments.image_size or config.image_size,
        }
        write_atomic(arguments.json, json.dumps({**about, **figures}, indent=2).encode())
    return 0


def detect(arguments: argparse.Namespace) -> int:
    """Find objects in images and videos; write each with its objects drawn, and all objects as detections.json."""
    from regolite.data.images import VIDEO_SUFFIXES

    if not 0 <= arguments.threshold <= 1:
        raise UserError(f"--threshold {arguments.threshold} must be between 0 and 1")
    sources, broken = _sources(arguments.images)
    if not sources:
        raise UserError("; ".join(broken))
    count = len(sources) + len(broken)
    model = _load(arguments)
    output, written = arguments.output, _file_names(sources, arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    with JsonList(output / "detections.json") as records:
        for path, name in zip(sources, written):
            look = _detect_in_video if path.suffix.lower() in VIDEO_SUFFIXES else _detect_in_image
            try:
                print(f"{path}: {look(model, path, output / name, arguments, records)}, drawn in {output / name}")
            except UserError as error:
                broken.append(_one_line(error))
            except (MemoryError, RuntimeError) as error:  # one image may be too large, and the next is not
                broken.append(f"{path}: {' '.join(str(error).split()) or type(error).__name__}")
    print(f"All of them are in {output / 'detections.json'}")
    if broken:
        raise UserError(f"{len(broken)} of {count} images failed, the others are done: {'; '.join(broken)}")
    return 0


def _sources(words: Sequence[str]) -> tuple[list[Path], list[str]]:
    """The images and videos that files, folders and patterns stand for; and what is wrong with the others."""
    from regolite.data.images import list_images

    found: dict[Path, None] = {}
    wrong = []
    for word in words:
        videos, images = _videos(word), []
        try:
            images = [] if Path(word) in videos else [path for path in list_images(word) if isinstance(path, Path)]
        except UserError as error:
            if not videos:
                wrong.append(_one_line(error))
        found |= dict.fromkeys(sorted([*images, *videos]))
    return list(found), wrong


def _videos(word: str) -> list[Path]:
    """The videos of a path: itself, those in a folder, or those that match a pattern."""
    from regolite.data.images import VIDEO_SUFFIXES

    path = Path(word)
    if os.path.isfile(path):
        files = [path]
    else:
        files = list(path.iterdir()) if path.is_dir() else [Path(file) for file in glob.glob(word, recursive=True)]
    return [file for file in files if file.suffix.lower() in VIDEO_SUFFIXES and not file.name.startswith(".")]


def _detect_in_image(
    model: Detector, path: Path, target: Path, arguments: argparse.Namespace, records: JsonList
) -> str:
    """Detect in one image, draw and record what is found; returns what to say of it."""
    from regolite.plots import draw_detections

    image = _read_image(path)
    [found] = regolite.detect(model, image, arguments.threshold, arguments.stages)
    draw_detections(image, found, found.classes).save(target, quality=92)
    records.extend(_records(path, found, model))
    return f"{len(found)} objects"


def _read_image(path: str | Path) -> Image.Image:
    """Read an image, with a line for each warning."""
    from regolite.data import read_image

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        image = read_image(path)
    for warning in said:
        print(f"regolite: warning: {warning.message}", file=sys.stderr)
    return image


def _detect_in_video(
    model: Detector, path: Path, target: Path, arguments: argparse.Namespace, records: JsonList
) -> str:
    """The same with every frame of a video."""
    from regolite.data.video import Frame, VideoWriter, read_video
    from regolite.plots import draw_detections

    objects = number = 0
    with VideoWriter(target) as writer:
        for number, frame in enumerate(read_video(path), 1):
            [found] = regolite.detect(model, frame.image, arguments.threshold, arguments.stages)
            writer.add(Frame(draw_detections(frame.image, found, found.classes), frame.seconds))
            when = {"frame": number, "seconds": round(frame.seconds, 3)}
            records.extend([{**record, **when} for record in _records(path, found, model)])
            objects += len(found)
    return f"{objects} objects in {number} frames"


class JsonList:
    """A JSON file that holds a list, whole again after every addition; what was in the file is lost.

    Args:
        path: the file.
    """

    END = b"\n]\n"

    def __init__(self, path: Path) -> None:
        self._file, self._empty = path.open("wb"), True
        self._file.write(b"[" + self.END)
        self._file.flush()

    def extend(self, records: Sequence[dict[str, Any]]) -> None:
        """Add records: they are written over the end, and then the end."""
        if records:
            text = ",".join("\n  " + json.dumps(record) for record in records)
            self._file.seek(-len(self.END), os.SEEK_END)
            self._file.write(("" if self._empty else ",").encode() + text.encode() + self.END)
            self._file.flush()
            self._empty = False

    def __enter__(self) -> JsonList:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def export(arguments: argparse.Namespace) -> int:
    """Write a detector as a file that runs without this package: ONNX or an exported PyTorch program."""
    from regolite.checkpoint import EVERYDAY
    from regolite.exporting import export

    _prepare(arguments.output, "--output")
    if arguments.device == "auto":
        arguments.device = "cpu"  # where the file is checked
    model = _load(arguments)
    shipped = Path(arguments.checkpoint) == EVERYDAY
    file = export(
        model,
        arguments.output,
        arguments.format,
        arguments.size,
        arguments.stages,
        arguments.with_traces,
        arguments.precision,
        arguments.images or None,
        arguments.license or ("Apache-2.0" if shipped else None),
    )
    checked = "its outputs equal the model's" if arguments.precision == "fp32" else "its outputs are finite: measure it"
    print(f"{file}: {file.stat().st_size / 1e6:.1f} MB; {checked}")
    return 0


def explain(arguments: argparse.Namespace) -> int:
    """Write an interactive page of what a detector does to an image, as one HTML file that needs no network."""
    _prepare(arguments.html, "--html")
    model = _load(arguments)
    image, name = _read_image(arguments.image), Path(arguments.image).name
    page = regolite.explain(model, image, arguments.threshold, arguments.stages, name=name)
    file = page.save(arguments.html)
    print(f"{file}: {file.stat().st_size / 1e6:.1f} MB; open it in a browser")
    return 0


def relations(arguments: argparse.Namespace) -> int:
    """Measure how often attention points at the object that decides the class, and what follows when it is removed."""
    from regolite.data import Scenes
    from regolite.evaluation import relation_benchmark, relations, removal
    from regolite.utils.files import write_atomic

    if (arguments.model is None) == (arguments.checkpoint is None):
        raise UserError("give either --checkpoint or --model, the detector to measure")
    _prepare(arguments.json)
    model = _load(arguments) if arguments.model is None else _adapted(arguments)
    data = _open(arguments.data, arguments.split, model, arguments.limit_images, arguments.image_size)
    if arguments.removal and not isinstance(data, Scenes):
        raise UserError(f"{arguments.data}: images in files cannot be drawn again; give scenes, or --no-removal")
    figures, cases = relations.relation_score(model, data, arguments.stages, arguments.batch_size)
    print(relations.as_text(figures))
    if arguments.removal:
        figures["removal"] = removal.removal(model, data, cases, arguments.stages)
        print(f"\n{removal.as_text(figures['removal'])}")
    figures["benchmark"] = relation_benchmark.benchmark(
        model, data, cases, figures.get("removal"), arguments.stages, arguments.batch_size
    )
    print(f"\n{relation_benchmark.as_text(figures['benchmark'])}")
    if arguments.json is not None:
        about = {
            "checkpoint": str(arguments.model or arguments.checkpoint),
            "data": arguments.data,
            "split": arguments.split,
        }
        write_atomic(arguments.json, json.dumps({**about, **figures}, indent=2).encode())
    return 0


def _prepare(file: Path | None, option: str = "--json") -> None:
    """Make sure, now and not after an hour, that results can be written to the file of an option."""
    if file is not None:
        if file.is_dir():
            raise UserError(f"{option} {file} is a folder; give a file")
        file.parent.mkdir(parents=True, exist_ok=True)


def _load(arguments: argparse.Namespace) -> Detector:
    """The model of ``--checkpoint`` on ``--device``, after checking that it has the wanted ``--stages``."""
    from regolite.utils.devices import choose_device

    model = regolite.load(arguments.checkpoint, choose_device(arguments.device))
    stages = model.num_stages
    if arguments.stages is not None and not 0 <= arguments.stages <= stages:
        has = f"has 0 to {stages}" if stages else "has no REGO: give 0, or leave it out"
        raise UserError(f"--stages {arguments.stages}: {arguments.checkpoint} {has}")
    return model


def _adapted(arguments: argparse.Namespace) -> Detector:
    """The model of transformers of ``--model`` on ``--device``."""
    from regolite.interop import adapt
    from regolite.utils.devices import choose_device

    try:
        import transformers
    except ImportError:
        raise UserError("--model needs Hugging Face's transformers: pip install 'regolite[transformers]'") from None
    if arguments.stages is not None:
        raise UserError("--stages is for detectors with REGO; leave it out with --model")
    try:
        model = transformers.AutoModelForObjectDetection.from_pretrained(arguments.model)
    except (OSError, ValueError) as error:
        raise UserError(f"--model {arguments.model}: transformers can't load it ({error})") from error
    return adapt(model).to(choose_device(arguments.device)).eval()


def _open(root: str, split: str, model: Detector, limit: int | None, size: int | None = None) -> DetectionDataset:
    """Data as the model is to see them in evaluation."""
    from regolite.data import make_transform, open_data
    from regolite.models.config import config_of

    config = config_of(model)
    return open_data(root, split, make_transform(config.augment, size or config.image_size, train=False), limit)


def _records(path: Path, found: Detections, model: Detector) -> list[dict[str, Any]]:
    """The detections of one image as JSON holds them."""
    from regolite.models.config import config_of

    config = config_of(model)
    return [
        {
            "file": str(path),
            "label": config.classes[label],
            "category_id": config.category_ids[label],
            "score": round(score, 4),
            "box": [round(value, 2) for value in box],  # xyxy, pixels
        }
        for label, score, box in zip(found.labels.tolist(), found.scores.tolist(), found.boxes_xyxy.tolist())
    ]


def _file_names(images: Sequence[Path], output: Path) -> list[str]:
    """A name in the output folder for each image: its own, numbered where two are called the same."""
    from regolite.data.images import VIDEO_SUFFIXES

    taken: set[str] = set()
    names = []
    for path in images:
        if path.resolve().parent == output.resolve():
            raise UserError(f"{path} lies in the output folder and would be written over; give another --output")
        suffix = path.suffix if path.suffix.lower() in (".jpg", ".jpeg", ".png") else ".png"
        suffix = ".mp4" if path.suffix.lower() in VIDEO_SUFFIXES else suffix
        name, number = path.stem + suffix, 2
        while name.lower() in taken:
            name, number = f"{path.stem}_{number}{suffix}", number + 1
        taken.add(name.lower())
        names.append(name)
    return names


def _ids(category_ids: Sequence[int]) -> str:
    """Category ids in a few words."""
    if not category_ids:
        return "none"
    some = ", ".join(map(str, category_ids[:5])) + (", ..." if len(category_ids) > 5 else "")
    return f"{len(category_ids)} ({some})"


def convert(arguments: argparse.Namespace) -> int:
    """Make a data folder of images and boxes in COCO, YOLO or Pascal VOC form."""
    from regolite.data import convert as convert_data

    print(convert_data(arguments.source, arguments.output, arguments.val, arguments.seed))
    print(f"\nnext: {_program()} {_fine_tune(arguments.output, 'mine')}")
    return 0


def _fine_tune(data: Path, name: str) -> str:
    """The command that fine-tunes the everyday detector on a small data folder for half an hour."""
    from regolite.checkpoint import EVERYDAY

    here = Path.cwd()
    file = EVERYDAY.relative_to(here) if EVERYDAY.is_relative_to(here) else EVERYDAY
    start = f"--model {file.stem} --checkpoint {shlex.quote(str(file))}"
    how = "--schedule one_cycle --batch-size 4 --max-minutes 30"
    return f"train --data {shlex.quote(str(data))} {start} --output runs/{name} {how}"


def complexity(arguments: argparse.Namespace) -> int:
    """Count parameters and multiply-adds of the named models, beside Table 1 of the paper."""
    from regolite.evaluation.complexity import as_text, document, rows
    from regolite.utils.files import write_atomic

    _prepare(arguments.json)
    counted = rows(arguments.models, progress=True)
    print(as_text(counted))
    if arguments.json is not None:
        write_atomic(arguments.json, (json.dumps(document(counted), indent=1) + "\n").encode())
    return 0


def recipes(arguments: argparse.Namespace) -> int:
    """List the paper's trainings: AP, estimates of GPU hours and memory, and the commands."""
    from regolite.paper.recipes import RECIPES, as_text, assumptions, memory, memory_as_text, recipe, rows

    chosen = [recipe(arguments.name)] if arguments.name is not None else list(RECIPES.values())
    if arguments.memory:
        models = chosen if arguments.name is not None else [one for one in chosen if not one.overrides]
        sizes = memory(models, progress=sys.stderr.isatty())
        print(json.dumps(sizes, indent=2) if arguments.json else memory_as_text(sizes))
        return 0
    if arguments.json and arguments.name is not None:
        print(json.dumps(chosen[0].settings(), indent=2))
        return 0
    how = (arguments.processes, arguments.tflops)
    found = rows(chosen, arguments.data, *how, progress=sys.stderr.isatty())
    print(json.dumps(found, indent=2) if arguments.json else as_text(found, assumptions(*how)))
    return 0


def coco_study(arguments: argparse.Namespace) -> int:
    """Train the paper's claims on full COCO, or print the runs with GPU hours, their order, and the verdicts so far."""
    from regolite.paper import coco_study as study

    if not arguments.print:
        study.conduct(arguments.data, arguments.output, arguments.processes, arguments.tflops)
    steps, judged = study.order(arguments.tflops), study.verdicts(arguments.output)
    print(study.as_text(steps, judged, arguments.data, arguments.output, arguments.processes))
    return 0


def compare(arguments: argparse.Namespace) -> int:
    """Print how far runs have come, in how much training, and in what they differ."""
    from regolite.evaluation.run_comparison import Comparison, as_text, differences, differences_as_text, rows

    names = ("runs", "labels", "base", "metric", "stage", "split")
    comparison = Comparison.of({name: getattr(arguments, name) for name in names})
    runs = comparison.read()
    table = rows(runs, **comparison.figure)
    if arguments.json:
        print(json.dumps({"runs": table, "differences": differences(runs)}, indent=2))
    else:
        print(f"{as_text(table, comparison.metric)}\n\n{differences_as_text(runs)}")
        for note in (note for row in table for note in row["notes"]):
            print(f"regolite: warning: {note}", file=sys.stderr)
    return 0


def experiment(arguments: argparse.Namespace) -> int:
    """Ask the paper's questions at laptop scale: train what is missing, and print the verdicts."""
    from regolite.paper import (
        cost,
        experiments,
        newer_study,
        queue,
        real_study,
        recipe_study,
        relation_study,
        report,
        statistics,
    )

    small = "runs/experiments_small/results" if arguments.small else "experiments/results"
    results = arguments.results or Path(small)
    if not arguments.names:
        print(report.overview(statistics.read_results(results) if any(results.glob("*.json")) else {}))
        return 0
    named = [name for name in arguments.names if name not in ("cost", "newer", "real", "recipe", "relations")]
    wanted = list(experiments.EXPERIMENTS) if "all" in arguments.names else named
    for name in wanted:
        experiments.experiment(name)
    studies = {"newer", "real", "recipe", "relations"} & {*arguments.names}
    if not studies and (arguments.data or arguments.weights or arguments.arms):
        raise UserError(
            "--data, --weights and --arms are options of the studies newer, real, recipe and relations: name one of "
            "them, or leave the options out"
        )
    folder = arguments.output or Path("runs/experiments_small" if arguments.small else "runs/experiments")
    if wanted:
        queue.conduct(wanted, arguments.seeds, folder, results, arguments.jobs, arguments.small)
        found = statistics.read_results(results)
        print("\n\n".join(report.as_text(experiments.EXPERIMENTS[name], found) for name in wanted))
    if "cost" in arguments.names or "all" in arguments.names:
        measured = cost.measure(results / "cost.json", rounds=2 if arguments.small else 30)
        for arm, one in measured["arms"].items():
            print(f"{arm:<20}{1000 * one['step']:8.0f} ms a step{one['relative']:7.2f}{one['macs'] / 1e6:9.1f} M")
    if "recipe" in arguments.names:
        options = (arguments.seeds, folder / "recipe", results / "recipe", arguments.jobs, arguments.small)
        try:
            weights = arguments.weights or recipe_study.WEIGHTS
            recipe_study.conduct(_by_name(arguments.data), weights, arguments.arms, *options)
        finally:  # runs may be missing, or have failed: those that are done are worth a look
            if studied := recipe_study.read(results / "recipe"):
                print(recipe_study.report(studied))
    if "real" in arguments.names:
        options = (arguments.seeds, folder / "real", results / "real", arguments.jobs, arguments.small)
        try:
            if arguments.data or arguments.arms:
                real_study.conduct(_by_name(arguments.data), arguments.arms, *options)
        finally:  # as above
            print(real_study.report(real_study.read(results / "real"), results / "real"))
    if "newer" in arguments.names:
        options = (arguments.seeds, folder / "newer", results / "newer", arguments.jobs, arguments.small)
        try:
            newer_study.conduct(_by_name(arguments.data), arguments.arms, *options)
        finally:
            print(newer_study.report(results / "newer"))
    if "relations" in arguments.names:
        options = (arguments.seeds, folder / "relations", results / "relations", arguments.jobs, arguments.small)
        try:
            relation_study.conduct(arguments.arms, *options)
        finally:
            print(relation_study.report(results / "relations"))
    return 0


def _by_name(words: Sequence[str]) -> dict[str, str]:
    """The folder of each data set from words as ``cards=DIR``."""
    for word in words:
        if not all(word.partition("=")):
            raise UserError(f"--data {word}: write NAME=DIR, as in cards=data/cards")
    return dict(word.split("=", 1) for word in words)


def data(arguments: argparse.Namespace) -> int:
    """Download a small public dataset from GitHub, verify every file and convert it to COCO format."""
    from regolite.data import fetch, prepare

    root = arguments.root or Path("data") / arguments.name
    fetch.fetch_dataset(arguments.name, root, arguments.mirror)
    print(prepare.check_coco(root, fetch.SPLITS))
    print(f"\n{fetch.SOURCES[arguments.name]}\n\nThe dataset is in {root}; its source and license are in SOURCES.md")
    print(f"\nnext: {_program()} {_fine_tune(root, arguments.name)}")
    return 0


def prepare_coco(arguments: argparse.Namespace) -> int:
    """Download COCO 2017, unpack and check it; or only check a data folder."""
    from regolite.data import prepare
    from regolite.utils.files import write_atomic

    _prepare(arguments.json)
    if not arguments.check:
        prepare.prepare_coco(arguments.root, arguments.splits, arguments.mirror, arguments.keep_zips)
    print(f"checking {arguments.root} ...", flush=True)
    report = prepare.check_coco(arguments.root, arguments.splits, arguments.read_images)
    print(report)
    if arguments.json is not None:
        write_atomic(arguments.json, (json.dumps(report.to_dict(), indent=1) + "\n").encode())
    if report.wrong:
        whole = f"all are in {arguments.json}" if arguments.json else "--json FILE lists all"
        print(f"regolite: {len(report.wrong)} things are wrong in {arguments.root}; {whole}", file=sys.stderr)
        return 1
    example = f"train --data {arguments.root} --model rego_deformable_detr_r50 --output runs/coco"
    print(f"nothing is wrong\n\nnext: {_program()} {example}")
    return 0


def progress(arguments: argparse.Namespace) -> int:
    """Print which exercises of the course you have solved, and which modules you have written."""
    from regolite.course import every_exercise
    from regolite.course.progress import table

    print(table({number: exercise.reference is not None for number, exercise in every_exercise().items()}))
    return 0


# -------------------------------------------------------------------------------------------------- the options


class Parser(argparse.ArgumentParser):
    """Argparse whose errors are :class:`~regolite.errors.UserError`, and that names the nearest option.

    It looks for misspelt options before anything else: for argparse itself, ``--dtaa x`` is a missing ``--data``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.known: list[str] = []
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})

    def add_argument(self, *args: Any, **kwargs: Any) -> argparse.Action:
        """As argparse's; the option's names are remembered."""
        action = super().add_argument(*args, **kwargs)
        self.known += action.option_strings
        return action

    def check_spelling(self, words: Sequence[str]) -> None:
        """Refuse an option that there isn't.

        Raises:
            UserError: the message names the nearest option that there is.
        """
        for word in words:
            option = word.split("=")[0]
            if option == "--":
                return
            if re.match("--?[A-Za-z]", option) and option not in self.known:
                near = difflib.get_close_matches("--" + option.lstrip("-"), self.known, n=1)
                self.error(f"there is no option {option}" + (f", did you mean {near[0]}?" if near else ""))

    def error(self, message: str) -> typing.NoReturn:
        """Raise instead of printing and ending the process."""
        raise UserError(f"{message} (see {self.prog} --help)")


def _program() -> str:
    """How this program was called."""
    return "python -m regolite" if Path(sys.argv[0]) == Path(__file__).with_name("__main__.py") else "regolite"


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog=_program(), description="Object detection with Transformers and REGO.")
    parser.add_argument("--version", action="version", version=f"regolite {regolite.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command, add_options in (
        (presets, _presets_options),
        (train, _train_options),
        (evaluate, _evaluate_options),
        (relations, _relations_options),
        (detect, _detect_options),
        (export, _export_options),
        (explain, _explain_options),
        (convert, _convert_options),
        (complexity, _complexity_options),
        (data, _data_options),
        (prepare_coco, _prepare_coco_options),
        (compare, _compare_options),
        (recipes, _recipes_options),
        (experiment, _experiment_options),
        (coco_study, _coco_study_options),
        (progress, lambda parser: None),
    ):
        name, about = command.__name__.replace("_", "-"), command.__doc__
        options = commands.add_parser(name, help=about, description=about)
        options.set_defaults(command=command)
        if argv[:1] == [name]:
            add_options(options)
            options.check_spelling(argv[1:])
    if not (argv and argv[0] in commands.choices):
        parser.check_spelling(argv[:1])
    return parser.parse_args(argv)


def _presets_options(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def _train_options(parser: Parser) -> None:
    """One option for every field of :class:`regolite.RunConfig`; what is not given keeps the field's default."""
    parser.usage = f"{parser.prog} --data DIR (--model PRESET | --recipe NAME) --output DIR [option ...]"
    about = "a training of the paper, see `regolite recipes`; other options go before what it says"
    parser.add_argument("--recipe", action=_Recipe, metavar="NAME", help=about)
    hints = typing.get_type_hints(regolite.RunConfig)
    metavars = {"data": "DIR", "output": "DIR", "model": "PRESET", "checkpoint": "FILE", "overrides": "NAME=VALUE"}
    for field in fields(regolite.RunConfig):
        names = ["--" + field.name.replace("_", "-")] + (["--set"] if field.name == "overrides" else [])
        how, about = _how_to_read(hints[field.name]), field.metadata["help"].replace("%", "%%")
        if field.name in metavars:
            how["metavar"] = metavars[field.name]
        if field.name in ("data", "model", "output"):
            how["required"] = True
        elif field.default not in (None, ()):
            default = field.default if isinstance(field.default, tuple) else (field.default,)
            about += f" (default: {' '.join(map(str, default))})"
        parser.add_argument(*names, dest=field.name, default=argparse.SUPPRESS, help=about, **how)


class _Recipe(argparse.Action):
    """``--recipe`` names a model, so that ``--model`` may be left out."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, value: Any, *_: Any) -> None:
        setattr(namespace, self.dest, value)
        next(action for action in parser._actions if action.dest == "model").required = False


def _how_to_read(hint: Any) -> dict[str, Any]:
    """What argparse must know about a type."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):  # X | None: left out for None
        [hint] = [argument for argument in typing.get_args(hint) if argument is not type(None)]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return {"choices": arguments}
    if origin is tuple:
        return {"nargs": "*", "action": "extend", **_how_to_read(arguments[0])}
    options: dict[Any, dict[str, Any]] = {
        bool: {"action": argparse.BooleanOptionalAction},
        int: {"type": whole_number, "metavar": "N"},
        float: {"type": number, "metavar": "X"},
        str: {"type": str, "metavar": "NAME"},
    }
    return options[hint]


def _evaluate_options(parser: Parser) -> None:
    _model_options(parser)
    parser.add_argument("--data", required=True, metavar="DIR", help="folder in COCO format, or scenes")
    splits = ("val", "train", "test", "train+val")
    parser.add_argument("--split", choices=splits, default="val", help="which images (default: val)")
    about = "measure only classes that both the data and the model know, by name; what else the data has is no object"
    parser.add_argument("--shared-classes", action="store_true", help=about)
    about = "say how sure the figures are, and AP50 of each class, by N draws of the images (200 are enough)"
    parser.add_argument("--bootstrap", type=whole_number, default=0, metavar="N", help=about)
    parser.add_argument("--batch-size", type=positive, default=8, metavar="N", help="images at a time (default: 8)")
    parser.add_argument("--limit-images", type=positive, metavar="N", help="use only the first N images")
    parser.add_argument(
        "--image-size", type=positive, metavar="N", help="size of the images; the model's own by default"
    )
    parser.add_argument(
        "--backend",
        choices=("pycocotools", "faster-coco-eval"),
        default="pycocotools",
        help="what computes the figures (default: pycocotools)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
    about = "leave images that cannot be read out of the figures, and name them (default: stop at the first)"
    parser.add_argument("--on-broken", choices=("stop", "skip"), default="stop", help=about)
    about = "write what the last stage finds to this file, in COCO's form of results"
    parser.add_argument("--save-detections", type=Path, metavar="FILE", help=about)


def _relations_options(parser: Parser) -> None:
    about = "a detector of transformers, by name or folder, with the classes of the data, in place of --checkpoint"
    parser.add_argument("--model", metavar="NAME_OR_FOLDER", help=about)
    _model_options(parser, required=False)
    about = "scenes, as scenes:200; with --no-removal also a folder with decided_by"
    parser.add_argument("--data", required=True, metavar="DATA", help=about)
    parser.add_argument("--split", choices=("val", "train"), default="val", help="which images (default: val)")
    parser.add_argument(
        "--image-size", type=positive, metavar="N", help="size of the images; the model's own by default"
    )
    parser.add_argument("--batch-size", type=positive, default=8, metavar="N", help="images at a time (default: 8)")
    about = "use only the first N images"
    parser.add_argument("--limit-images", "--limit", type=positive, metavar="N", help=about)
    about = "take objects out of the scenes too (the default), which takes several times as long"
    parser.add_argument("--removal", action=argparse.BooleanOptionalAction, default=True, help=about)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")


def _detect_options(parser: Parser) -> None:
    from regolite.checkpoint import EVERYDAY

    _model_options(parser, EVERYDAY)
    about = "images and videos, folders of them, or patterns as 'photos/**/*.jpg'"
    parser.add_argument("images", nargs="+", metavar="IMAGE", help=about)
    about = "folder for the results (default: found)"
    parser.add_argument("--output", type=Path, default=Path("found"), metavar="DIR", help=about)
    parser.add_argument("--threshold", type=number, default=0.3, metavar="X", help="least score (default: 0.3)")


def _export_options(parser: Parser) -> None:
    from regolite.checkpoint import EVERYDAY

    _model_options(parser, EVERYDAY)
    about = "the file to write, .onnx or .pt2 (torch-export)"
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help=about)
    about = "onnx, or torch-export for torch.export.load (default: onnx)"
    parser.add_argument("--format", choices=("onnx", "torch-export"), default="onnx", help=about)
    about = "side of the square that images are padded to, a multiple of 32; the model's own image size by default"
    parser.add_argument("--size", type=positive, metavar="N", help=about)
    about = "add attention, sampling points, glimpses and boxes of all layers as outputs"
    parser.add_argument("--with-traces", action="store_true", help=about)
    about = "of the weights: fp16 halves the file, int8 quantizes matrix products (default: fp32)"
    parser.add_argument("--precision", choices=("fp32", "fp16", "int8"), default="fp32", help=about)
    about = "photographs to check the file with (default: two of data/coco_tiny; without it, random colors)"
    parser.add_argument("--images", nargs="*", metavar="IMAGE", help=about)
    about = "license of the weights, for the card (default: Apache-2.0 for the shipped ones, none for others)"
    parser.add_argument("--license", metavar="NAME", help=about)


def _explain_options(parser: Parser) -> None:
    from regolite.checkpoint import EVERYDAY

    _model_options(parser, EVERYDAY)
    parser.add_argument("image", metavar="IMAGE", help="the image")
    parser.add_argument("--html", type=Path, required=True, metavar="FILE", help="the page to write")
    about = "least score of an object at first; the page has a control for it (default: 0.3)"
    parser.add_argument("--threshold", type=number, default=0.3, metavar="X", help=about)


def _convert_options(parser: Parser) -> None:
    parser.add_argument("source", type=Path, metavar="FOLDER", help="images and boxes, COCO, YOLO or Pascal VOC")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="data folder to make")
    about = "share of the images held out, where FOLDER has no validation split (default: 0.2)"
    parser.add_argument("--val", type=number, default=0.2, metavar="X", help=about)
    parser.add_argument("--seed", type=whole_number, default=0, metavar="N", help="seed of that choice (default: 0)")


def _complexity_options(parser: Parser) -> None:
    parser.add_argument("--models", nargs="+", metavar="PRESET", help="which models (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts, by part too, to this file")


def _recipes_options(parser: Parser) -> None:
    from regolite.paper.estimates import TFLOPS

    parser.add_argument("name", nargs="?", metavar="NAME", help="only this one")
    parser.add_argument("--data", default="COCO", metavar="DIR", help="folder of COCO in the commands (default: COCO)")
    about = "processes to start, one a GPU; a batch is divided among them (default: 8)"
    parser.add_argument("--processes", type=positive, default=8, metavar="N", help=about)
    about = f"what a GPU sustains, 10^12 operations a second (default: {TFLOPS}, a V100 in float32; why is printed)"
    parser.add_argument("--tflops", type=number, default=TFLOPS, metavar="X", help=about)
    about = "print JSON: the whole table, or with NAME the parameters of notebook 20, for papermill's -f FILE"
    parser.add_argument("--json", action="store_true", help=about)
    about = "print the estimated memory of a training step with 1, 2 and 4 images a GPU instead, by model of Table 1"
    parser.add_argument("--memory", action="store_true", help=about)


def _compare_options(parser: Parser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs; config.json and metrics.jsonl will do")
    parser.add_argument("--labels", nargs="+", default=[], metavar="NAME", help="their names (default: the folders')")
    parser.add_argument("--base", metavar="NAME", help="the run to compare with (default: the first)")
    metrics = ("AP", "AP50", "AP75", "APs", "APm", "APl")
    parser.add_argument("--metric", choices=metrics, default="AP", help="which figure (default: AP)")
    parser.add_argument("--stage", type=whole_number, metavar="N", help="which stage (default: each run's last)")
    parser.add_argument("--split", choices=("val", "train"), default="val", help="which images (default: val)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _experiment_options(parser: Parser) -> None:
    about = "experiments, `all`, `cost` (times of steps), or a study: `newer`, `real`, `recipe` or `relations`"
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{about} (default: list them, with what is done)")
    about = "seeds of the runs (default: 0 to 2, and 0 to 4 in the main comparison)"
    parser.add_argument("--seeds", type=whole_number, nargs="+", metavar="N", help=about)
    about = "runs at a time, one core each (default: 1)"
    parser.add_argument("--jobs", type=positive, default=1, metavar="N", help=about)
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder of the runs (default: runs/experiments)")
    about = "folder of the results (default: experiments/results)"
    parser.add_argument("--results", type=Path, metavar="DIR", help=about)
    about = "tiny runs in folders of their own, which only show that everything works"
    parser.add_argument("--small", action="store_true", help=about)
    about = "newer, real, recipe: folders of the data sets, in COCO format: cards=DIR everyday=DIR"
    parser.add_argument("--data", nargs="+", default=[], metavar="NAME=DIR", help=about)
    about = "recipe: weights of the baseline's backbone (default: the bundled ones, trained on COCO)"
    parser.add_argument("--weights", metavar="FILE", help=about)
    parser.add_argument(
        "--arms",
        nargs="+",
        metavar="ARM",
        help="studies: only these arms (default: all); real: SETTING or SETTING/ARM",
    )


def _coco_study_options(parser: Parser) -> None:
    from regolite.paper.estimates import TFLOPS

    parser.add_argument("--print", action="store_true", help="print runs, hours, order and verdicts, and train nothing")
    parser.add_argument("--data", default="COCO", metavar="DIR", help="folder of COCO (default: COCO)")
    about = "folder of the runs (default: runs/coco_study)"
    parser.add_argument("--output", default="runs/coco_study", metavar="DIR", help=about)
    about = "processes of a run, one a GPU (default: 8)"
    parser.add_argument("--processes", type=positive, default=8, metavar="N", help=about)
    about = f"what a GPU sustains, 10^12 operations a second (default: {TFLOPS}, a V100 in float32)"
    parser.add_argument("--tflops", type=number, default=TFLOPS, metavar="X", help=about)


def _data_options(parser: Parser) -> None:
    from regolite.data import fetch

    parser.add_argument("name", choices=tuple(fetch.SOURCES), help="which dataset")
    parser.add_argument("--root", type=Path, metavar="DIR", help="data folder to create (default: data/NAME)")
    about = f"server with the files under GitHub's paths (default: {fetch.MIRROR}); SHA-256 sums are checked anyway"
    parser.add_argument("--mirror", default=fetch.MIRROR, metavar="URL", help=about)


def _prepare_coco_options(parser: Parser) -> None:
    from regolite.data import prepare

    parser.add_argument("--root", type=Path, required=True, metavar="DIR", help="data folder to make, or to check")
    about = "which images (default: both; val alone is 2 GB instead of 40 GB while it is unpacked)"
    parser.add_argument("--splits", nargs="+", choices=prepare.SPLITS, default=prepare.SPLITS, help=about)
    parser.add_argument("--check", action="store_true", help="download nothing: check the folder as it is, COCO or not")
    parser.add_argument("--read-images", action="store_true", help="open every image, not only a sample; takes long")
    about = f"server with COCO's files under the same paths (default: {prepare.MIRROR}); sums are checked anyway"
    parser.add_argument("--mirror", default=prepare.MIRROR, metavar="URL", help=about)
    parser.add_argument("--keep-zips", action="store_true", help="keep the zip files once they are unpacked")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was found to this file")


def _model_options(parser: Parser, default: Path | None = None, required: bool = True) -> None:
    """The options of all commands that load a model, and the checkpoint that is loaded where none is named."""
    about = "weights: of a run, its folder, or a published file" + (
        f" (default: the shipped {default.name})" if default else ""
    )
    required = required and default is None
    parser.add_argument("--checkpoint", type=Path, required=required, default=default, metavar="FILE", help=about)
    parser.add_argument("--stages", type=whole_number, metavar="N", help="use N REGO stages, 0 for none (default: all)")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to compute (default: auto)"
    )


def number(text: str) -> float:
    """Read a number."""
    return _read(text, float, math.isfinite, "a number")


def whole_number(text: str) -> int:
    """Read a whole number."""
    return _read(text, int, lambda value: True, "a whole number")


def positive(text: str) -> int:
    """Read a whole number greater than 0."""
    return _read(text, int, lambda value: value > 0, "a whole number greater than 0")


def _read(text: str, kind: Callable[[str], Any], is_right: Callable[[Any], bool], words: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not is_right(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {words}")
    return value


# --------------------------------------------------------------------------------------------------- what went wrong


def _fail(message: str) -> int:
    print(f"regolite: error: {message}", file=sys.stderr)
    return 2


def _one_line(error: UserError) -> str:
    """The message of an error, without the traceback around one that a DataLoader's worker has sent."""
    text = str(error)
    if "in DataLoader worker" in text:
        text = text.rpartition("UserError: ")[2]
    return " ".join(text.split())


def _about_file(error: OSError, arguments: argparse.Namespace) -> str:
    """What the system says, and of which file; of a full disk it says no file."""
    where = error.filename or getattr(arguments, "output", None) or getattr(arguments, "json", None)
    return f"{f'{where}: ' if where else ''}{error.strerror or error}; {advice(error)}"


def _how_to_go_on(argv: Sequence[str]) -> str:
    """What to say after Ctrl-C."""
    join = subprocess.list2cmdline if os.name == "nt" else shlex.join
    if argv[:1] in (["data"], ["prepare-coco"]):
        return f"; go on by the same command: {_program()} {join(argv)}"
    if list(argv[:1]) != ["train"]:
        return ""
    again = ["train", "--resume", *(word for word in argv[1:] if word not in ("--resume", "--no-resume"))]
    return f"; go on by the same command with --resume: {_program()} {join(again)}"
