"""The whole of it in small: a COCO folder, a training in two processes that is killed and goes on, its evaluation.

As somebody with eight GPUs will do it, by papermill and with nothing replaced, on twelve images.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import nbformat
import psutil
import pytest
from forked import REGOLITE, Forked
from small_runs import WITHOUT_FIGURES, fork_two

from regolite.checkpoint import EVERYDAY
from regolite.cli import main
from regolite.training.metrics import MEASURED

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "data" / "coco_tiny"
STEPS = 8
# All in which the notebook's defaults, a rehearsal, are not those of the command line; and this run's own. Two steps an
# epoch. The shipped weights find objects in these images, so that no figure is 0 and every image shows something.
SETTINGS = {
    "model": EVERYDAY.stem,
    "checkpoint": str(EVERYDAY),
    "epochs": STEPS // 2,
    "batch_size": 4,
    "processes": 2,
    "lr": 1e-4,
    "sampling_lr_mult": 0.5,
    "schedule": "one_cycle",
    "warmup": 0.1,
    "augment": "laptop",
    "image_size": 160,
    "limit_images": None,
    "evaluate_every": 1,
    "evaluate_start": False,
    "evaluate_train": True,
    "log_every": 1,
    "checkpoint_minutes": 0.0,
    "device": "cpu",
}
pytestmark = pytest.mark.slow


def start(marker: Path, *words: str) -> subprocess.Popen[str]:
    """Start ``python -m WORDS``; it and all that it starts can be told by the marker in their environment."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": path, "JUPYTER_PREFER_ENV_PATH": "1", "DRY_RUN": str(marker)}
    said = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen([sys.executable, "-m", *words], env=env, cwd=marker, text=True, **said)


def finish(running: subprocess.Popen[str]) -> str:
    said, _ = running.communicate()
    assert running.returncode == 0, said
    return said


def papermill(folder: Path, notebook: str, done: str, parameters: Mapping[str, Any]) -> subprocess.Popen[str]:
    """Start papermill as `make demo` does."""
    words = [str(ROOT / "notebooks" / notebook), str(folder / done), "--cwd", str(ROOT / "notebooks")]
    for name, value in parameters.items():
        words += ["-y", json.dumps({name: value})]
    return start(folder, "papermill", *words, "--no-progress-bar", "--autosave-cell-every", "1")


def outputs(notebook: Path) -> list[Any]:
    """All outputs of a notebook; empty while papermill has not written any."""
    try:
        cells = nbformat.read(notebook, as_version=4).cells
    except (OSError, ValueError):  # it is being written
        return []
    return [output for cell in cells for output in cell.get("outputs", [])]


def printed(notebook: Path) -> str:
    return "".join(output.text for output in outputs(notebook) if output.output_type == "stream")


def assert_whole(notebook: Path, images: int) -> None:
    """Every cell was run, none failed, and what is to be seen is there."""
    cells = [cell for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"]
    assert all(cell.metadata.papermill.status == "completed" for cell in cells)
    found = outputs(notebook)
    assert not [output for output in found if output.output_type == "error"]
    assert sum(any(kind.startswith("image/") for kind in output.get("data", {})) for output in found) == images


def metrics(run: Path) -> list[dict[str, Any]]:
    """The metrics without what depends on the clock."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in found]


def alive(marker: Path) -> list[psutil.Process]:
    """The processes that :func:`start` has started with this marker, and theirs, whoever their parent is now."""

    def is_ours(process: psutil.Process) -> bool:
        try:
            return process.environ().get("DRY_RUN") == str(marker) and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:  # somebody else's, or it has just ended
            return False

    return [process for process in psutil.process_iter() if is_ours(process)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("dry_run")
    yield folder
    for process in alive(folder):  # of a test that has failed
        process.kill()


@pytest.fixture(scope="module")
def coco(place: Path) -> Path:
    """Twelve images, as COCO's own archives lay them out."""
    root = place / "coco"
    (root / "annotations").mkdir(parents=True)
    for split, count in (("train", 8), ("val", 4)):
        content = json.loads((TINY / "annotations" / f"instances_{split}.json").read_bytes())
        content["images"] = content["images"][:count]
        ids = {image["id"] for image in content["images"]}
        content["annotations"] = [one for one in content["annotations"] if one["image_id"] in ids]
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
        (root / f"{split}2017").mkdir()
        for image in content["images"]:
            shutil.copy(TINY / "images" / image["file_name"], root / f"{split}2017")
    return root


@pytest.fixture(scope="module")
def whole(place: Path, coco: Path) -> Path:
    """The run that nothing interrupts, from the command line, by torchrun's rules but without its three Pythons."""
    words = ["train", "--data", str(coco), "--output", str(place / "whole")]
    for name, value in SETTINGS.items():
        if value is not None and value is not False:
            words += ["--" + name.replace("_", "-")] + [str(value)] * (value is not True)
    errors = fork_two(WITHOUT_FIGURES + REGOLITE, *words)
    assert (place / "whole" / "model.safetensors").exists(), errors
    return place / "whole"


@pytest.fixture(scope="module")
def broken(place: Path, coco: Path) -> Path:
    """The run from notebook 20 in which every process is killed at once, after three of its steps or a little later."""
    run, done = place / "notebook", place / "killed.ipynb"
    running = papermill(place, "20_train_coco.ipynb", done.name, {**SETTINGS, "data": str(coco), "output": str(run)})
    log = run / "metrics.jsonl"
    # The second: what it prints is to be read while it trains, too.
    while not (log.exists() and '"step": 3,' in log.read_text() and "AP on val by stage" in printed(done)):
        assert running.poll() is None, running.communicate()[0]
        time.sleep(0.01)
    mine = psutil.Process(running.pid)
    tree = [mine, *mine.children(recursive=True)]
    for process in tree:
        process.kill()
    running.communicate()
    psutil.wait_procs(tree[1:], timeout=60)
    assert running.returncode == -signal.SIGKILL
    assert len(tree) >= 5, "papermill, the kernel, torchrun and two that train"
    return run


@pytest.fixture(scope="module")
def mended(place: Path, coco: Path, broken: Path) -> Path:
    """The same run after the same command, with ``resume`` and nothing else."""
    settings = {**SETTINGS, "data": str(coco), "output": str(broken), "resume": True}
    finish(papermill(place, "20_train_coco.ipynb", "20.ipynb", settings))
    return broken


@pytest.fixture(scope="module")
def evaluation(place: Path, coco: Path, mended: Path) -> Path:
    model, output = mended / "model.safetensors", place / "evaluation"
    parameters = {"checkpoint": str(model), "data": str(coco), "output": str(output), "threshold": 0.3}
    parameters |= {"splits": ["train", "val"], "shared_classes": False}
    finish(papermill(place, "21_evaluate_coco.ipynb", "21.ipynb", parameters))
    return output


def test_the_folder_is_checked_as_coco_is(coco: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["prepare-coco", "--root", str(coco), "--check", "--read-images"]) == 0
    said = capsys.readouterr().out
    assert "train: 8 images, " in said and "val: 4 images, " in said and said.count(" 80 categories") == 2
    assert "\nnothing is wrong\n" in said


def test_killed_it_is_dead_and_has_kept_what_it_had(place: Path, broken: Path):
    assert not alive(place), "an orphan"
    before = {path: path.stat().st_mtime_ns for path in broken.rglob("*")}
    time.sleep(1)
    assert before == {path: path.stat().st_mtime_ns for path in broken.rglob("*")}, "somebody still writes"
    assert 3 <= metrics(broken)[-1]["step"] < STEPS
    assert list((broken / "checkpoints").glob("step_*.pt")) and (broken / "config.json").exists()
    assert "2 processes on cpu" in (broken / "train.log").read_text()


def test_what_is_left_alone_saves_and_ends(place: Path, coco: Path):
    """When only the one who has started it is killed, nobody would see it go on, and who resumes it would meet it."""
    run = place / "alone"
    words = ["train", "--data", str(coco), "--output", str(run), "--model", EVERYDAY.stem, "--image-size", "64"]
    words += ["--epochs", "1000", "--evaluate-every", "0", "--log-every", "1", "--batch-size", "2", "--processes", "2"]
    running = Forked(REGOLITE, *words, DRY_RUN=str(place))
    while not ((run / "metrics.jsonl").exists() and '"step": 3,' in (run / "metrics.jsonl").read_text()):
        assert running.poll() is None, running.communicate()[0]
        time.sleep(0.01)
    left = [process for process in alive(place) if process.pid != running.pid]
    running.kill()
    running.communicate()
    assert len(left) >= 3 and psutil.wait_procs(left, timeout=60)[1] == []
    step = metrics(run)[-1]["step"]
    assert (run / "checkpoints" / f"step_{step:08d}.pt").exists() and step < 1000


def test_it_ends_as_the_run_that_nothing_stopped(place: Path, whole: Path, mended: Path):
    assert (mended / "train.log").read_text().count("going on after step") == 1, "it went on, and did not begin again"
    settings = [json.loads((run / "config.json").read_text())["run"] for run in (mended, whole)]
    assert {name for name in settings[0] if settings[0][name] != settings[1][name]} == {"output", "resume"}
    assert metrics(mended) == metrics(whole)
    for name in ("model.safetensors", "best.safetensors"):
        assert (mended / name).read_bytes() == (whole / name).read_bytes(), name
    assert_whole(place / "20.ipynb", images=5)


def test_the_evaluation_has_the_figures_of_the_run(place: Path, mended: Path, evaluation: Path):
    assert_whole(place / "21.ipynb", images=7)
    measured = json.loads((evaluation / "figures.json").read_text("utf-8"))["splits"]
    last = {line["split"]: line for line in metrics(mended) if line["kind"] == "evaluation"}
    assert measured.keys() == last.keys() == {"train", "val"}
    for split, figures in measured.items():
        about = {"kind": "evaluation", "split": split, "step": STEPS, "epoch": STEPS // 2}
        assert last[split].pop("images_seen") == STEPS * SETTINGS["batch_size"]
        assert about | figures == last[split]
        assert figures["AP"] > 0 and len(figures["stages"]) == 4


def test_the_runs_are_compared(place: Path, whole: Path, mended: Path):
    parameters = {"runs": [str(whole), str(mended)], "labels": []}
    finish(papermill(place, "22_compare_runs.ipynb", "22.ipynb", parameters))
    assert_whole(place / "22.ipynb", images=4)
    best = max(line["AP"] for line in metrics(whole) if line["kind"] == "evaluation" and line["split"] == "val")
    said = printed(place / "22.ipynb")
    assert "the runs have the same settings" in said
    assert f"to reach AP {best:.1f}, the best of whole" in said
    assert f"notebook: best AP {best:.1f} after" in said and "as much as whole" in said
