"""Whoever has started a run may be stopped or killed alone, papermill or torchrun: the run saves, and nobody stays."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import nbformat
import psutil
import pytest
from forked import REGOLITE, Forked
from small_runs import SMALL_RUN

from regolite import UserError, train
from regolite.training import launch
from regolite.training.folder import RunFolder
from regolite.utils.interrupts import RunStopped, StopSignals

ROOT = Path(__file__).resolve().parent.parent
CONFIG = replace(SMALL_RUN, epochs=100)
MARK = "REGOLITE_TEST_ORPHANS"
# `python -m`, deaf to a shell that has begun these tests with `&` and so made its children ignore Ctrl-C.
MAIN = """
import runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
del sys.argv[0]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def ours(mark: str) -> list[psutil.Process]:
    """The processes that a test has started, and theirs, whoever their parent is now."""

    def is_ours(process: psutil.Process) -> bool:
        try:
            return process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:  # somebody else's, or it has just ended
            return False

    return [process for process in psutil.process_iter() if is_ours(process)]


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[str]:
    yield str(tmp_path)
    for process in ours(str(tmp_path)):  # of a test that has failed
        process.kill()


def start(mark: str, *words: str) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, MARK: mark, "JUPYTER_PLATFORM_DIRS": "1"}
    command = [sys.executable, "-c", MAIN, *words]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def wait_for_step(run: Path, step: int, running: subprocess.Popen[str] | Forked) -> None:
    log = run / "metrics.jsonl"
    while not (log.exists() and f'"step": {step},' in log.read_text()):
        assert running.poll() is None, running.communicate()
        time.sleep(0.05)


def start_two(mark: str, run: Path, checkpoint_minutes: str) -> Forked:
    """Two processes that train, some steps after their start."""
    words = ["train", "--data", CONFIG.data, "--model", CONFIG.model, "--output", str(run)]
    words += ["--set", *CONFIG.overrides, "--image-size", "64", "--batch-size", "2", "--processes", "2"]
    words += ["--log-every", "1", "--evaluate-every", "0", "--checkpoint-minutes", checkpoint_minutes]
    running = Forked(REGOLITE, *words, "--device", "cpu", **{MARK: mark})
    wait_for_step(run, 3, running)
    return running


def wait_for_nobody(mark: str, seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while left := ours(mark):
        assert time.monotonic() < until, [process.cmdline() for process in left]
        time.sleep(0.1)


def saved(run: Path) -> int:
    folder = RunFolder(run, resume=True)
    folder.close()
    logged = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    assert folder.last_step() == logged[-1]["step"], "the last step that was done is saved, an hour before its time"
    return folder.last_step()


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_a_signal_to_papermill_alone_saves_the_run(tmp_path: Path, mark: str, signum: signal.Signals) -> None:
    """As Slurm sends it to the process that it has started."""
    run = tmp_path / "run"
    config = replace(CONFIG, output=str(run)).to_dict()
    code = f"import regolite\nregolite.train(regolite.RunConfig.of({config!r}))"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, tmp_path / "train.ipynb")
    running = start(mark, "papermill", str(tmp_path / "train.ipynb"), str(tmp_path / "done.ipynb"))
    wait_for_step(run, 3, running)
    running.send_signal(signum)
    running.communicate(timeout=60)
    wait_for_nobody(mark)
    assert saved(run) >= 3
    assert f"stopped after step {saved(run)}, which is saved" in (run / "train.log").read_text()


@pytest.mark.slow
def test_torchrun_is_killed_alone(tmp_path: Path, mark: str) -> None:
    run = tmp_path / "run"
    running = start_two(mark, run, checkpoint_minutes="60")
    [agent] = [one for one in psutil.Process(running.pid).children() if "torch.distributed.run" in one.cmdline()]
    agent.kill()
    _, said = running.communicate(timeout=120)
    wait_for_nobody(mark)
    assert running.returncode == 128 + signal.SIGTERM
    step = saved(run)
    [line] = [line for line in said.splitlines() if line.startswith("regolite:")]
    wanted = f"regolite: stopped by the end of its parent process after step {step}, which is saved in {run}; go on by"
    assert line.startswith(wanted) and "train --resume --data" in line and "Traceback" not in said


@pytest.mark.slow
def test_a_process_is_killed_alone(tmp_path: Path, mark: str) -> None:
    """By the system that runs out of memory, say; the first process, which tells the others' fate otherwise."""
    run = tmp_path / "run"
    running = start_two(mark, run, checkpoint_minutes="0")
    [first] = [one for one in ours(mark) if one.environ().get("RANK") == "0"]
    first.kill()
    _, said = running.communicate(timeout=120)
    wait_for_nobody(mark)
    assert running.returncode == 128 + signal.SIGKILL
    wanted = rf"regolite: one of 2 processes was killed by SIGKILL; the checkpoint of step \d+ is kept in {run}; go on"
    assert re.search(wanted, said) and "Traceback" not in said
    assert "SIGKILL" in (run / "processes.log").read_text()


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ("[rank1]: Traceback\n[rank1]: RuntimeError: CUDA error: an illegal address\n", "RuntimeError: CUDA error: an"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried\n  File x", "torch.OutOfMemoryError: CUDA out of memory"),
        ("nothing of the kind", "for a reason that they do not tell"),
    ],
)
def test_what_processes_say_is_one_line(tmp_path: Path, said: str, wanted: str) -> None:
    with pytest.raises(UserError) as caught:
        launch_module()._fail(replace(CONFIG, output=str(tmp_path / "run")), said)
    assert wanted in str(caught.value) and "\n" not in str(caught.value)
    assert (tmp_path / "run" / "processes.log").read_text() == said


def launch_module():
    return sys.modules[launch.__module__]


def test_a_parent_that_ends_is_a_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regolite.plots.run.draw_run", lambda *args, **kwargs: [])
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    monkeypatch.setattr("regolite.utils.interrupts.POLL", 0.01)
    real, steps = os.getppid(), []

    def watch(line: dict) -> None:
        steps.append(line["step"])
        if line["step"] == 3:
            monkeypatch.setattr(os, "getppid", lambda: real + 1)
            time.sleep(0.1)

    with pytest.raises(RunStopped, match="stopped by the end of its parent process after step 4, which is saved in"):
        train(replace(CONFIG, output=str(tmp_path / "run")), watch)
    assert saved(tmp_path / "run") == 4


def test_the_kernels_own_guard_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    parentpoller = pytest.importorskip("ipykernel.parentpoller")
    monkeypatch.setenv("JPY_PARENT_PID", str(os.getppid()))
    with StopSignals():
        assert parentpoller.os is not os and parentpoller.os.getppid() == os.getppid()
    assert parentpoller.os is os
