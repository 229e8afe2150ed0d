"""Whatever breaks: a run says what it was, keeps what it had, and goes on to the same bytes as if nothing had been."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import multiprocessing
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from forked import REGOLITE, Forked
from PIL import Image
from safetensors import safe_open
from small_runs import SMALL_RUN

from regolite import UserError, build, cli, train
from regolite.data import Scenes, make_transform
from regolite.training import NonFiniteLoss, folder, loop, schedule
from regolite.training.batches import TRIES, SeededItems
from regolite.training.folder import RunFolder
from regolite.training.metrics import MEASURED
from regolite.utils.interrupts import RunStopped, StopSignals, leave_signals_to_parent, stop

STEPS = 12
CONFIG = replace(SMALL_RUN, epochs=STEPS // 3, lr=1e-3, schedule="one_cycle", evaluate_every=2, ema=0.5)


@pytest.fixture(autouse=True)
def without_images(monkeypatch):
    monkeypatch.setattr("regolite.plots.run.draw_run", lambda *args, **kwargs: [])


@pytest.fixture
def config(tmp_path):
    def make(name="run", **changes):
        return replace(CONFIG, output=str(tmp_path / name), **changes)

    return make


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing has interrupted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("regolite.plots.run.draw_run", lambda *args, **kwargs: [])
        return train(replace(CONFIG, output=str(tmp_path_factory.mktemp("whole"))))


def lines(path):
    """The metrics without what depends on the clock."""
    found = [json.loads(line) for line in (Path(path) / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in found]


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def assert_same(path, whole):
    for name in ("model.safetensors", "best.safetensors"):
        assert sha256(Path(path) / name) == sha256(whole / name), name
    assert lines(path) == lines(whole)


def newest(path):
    """The step of the newest checkpoint."""
    return max(int(file.stem.removeprefix("step_")) for file in (Path(path) / "checkpoints").glob("step_*.pt"))


def at(step, what):
    """A watcher that does something once, when this step is logged."""
    done = []

    def watch(line):
        if line["kind"] == "train" and line["step"] >= step and not done:
            done.append(step)
            what()

    return watch


# --------------------------------------------------------------------------------------------- in a process of its own


def command(config, *more):
    words = [
        "train", "--data", config.data, "--model", config.model, "--output", config.output, "--image-size", "64",
        "--batch-size", "2", "--epochs", str(config.epochs), "--lr", "1e-3", "--schedule", "one_cycle",
        "--evaluate-every", "2", "--log-every", "1", "--device", "cpu", "--ema", "0.5",
        "--checkpoint-minutes", str(config.checkpoint_minutes), "--set", *config.overrides,
    ]  # fmt: skip
    return [*words, *more]


def start(config, *more):
    return Forked(REGOLITE, *command(config, *more))


def wait_for(step, config, running):
    """Until this step is logged."""
    metrics, start = Path(config.output) / "metrics.jsonl", time.monotonic()
    while not metrics.exists() or f'"step": {step},' not in metrics.read_text():
        if running.poll() is not None or time.monotonic() - start > 200:
            running.kill()
            pytest.fail(f"step {step} never came: {running.communicate()}")
        time.sleep(0.005)


@pytest.mark.slow
def test_killed_again_and_again(config, whole):
    lots = random.Random()  # other moments every time
    plan = config(checkpoint_minutes=0.001)
    kills = sorted(lots.sample(range(1, STEPS), 5))
    for step in kills:
        running = start(plan, "--resume")
        wait_for(step, plan, running)
        time.sleep(lots.uniform(0, 0.1))
        running.kill()
        running.communicate()
        assert running.returncode == -signal.SIGKILL, "it was too late"
    assert cli.main(command(plan, "--resume")) == 0
    assert_same(plan.output, whole)
    assert not list(Path(plan.output).rglob("*.tmp")), "what was half written is gone"


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_from_outside(config, whole, signum, code, capsys):
    plan = config()
    running = start(plan)
    wait_for(2, plan, running)
    running.send_signal(signum)
    try:
        _, said = running.communicate(timeout=200)
    finally:
        running.kill()
    assert running.returncode == code, said
    last = said.strip().splitlines()[-1]
    name = "Ctrl-C" if signum == signal.SIGINT else "SIGTERM"
    step = lines(plan.output)[-1]["step"]
    assert newest(plan.output) == step < STEPS
    assert f"stopped by {name} after step {step}, which is saved in {plan.output}; go on by" in last
    again = shlex.split(last.partition("python -m regolite ")[2])
    assert cli.main(again) == 0
    assert_same(plan.output, whole)


# `python -m regolite` that is sent a signal in the middle of an evaluation, before one of its batches.
IN_EVALUATION = """
import os, runpy, sys
from regolite.evaluation import coco
signum, batches, detect = int(sys.argv.pop(1)), int(sys.argv.pop(1)), coco.detections_by_stage
def detections_by_stage(*args):
    global batches
    batches -= 1
    if not batches:
        os.kill(os.getpid(), signum)
    return detect(*args)
coco.detections_by_stage = detections_by_stage
runpy.run_module("regolite", run_name="__main__", alter_sys=True)
"""


def killed_in_evaluation(signum, batch, words):
    running = Forked(IN_EVALUATION, str(int(signum)), str(batch), *words)
    _, said = running.communicate()
    assert running.returncode in (-signum, 128 + signum), said


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("number", [1, 2])
def test_killed_in_an_evaluation_of_a_run(config, whole, number, signum):
    """The first one is in the middle of the run, the second at its end; each has one batch."""
    plan = config()
    killed_in_evaluation(signum, number, command(plan))
    assert newest(plan.output) == 6 * number, "saved before it is evaluated"
    assert [line["kind"] for line in lines(plan.output)].count("evaluation") == number - 1
    assert cli.main(command(plan, "--resume")) == 0
    assert_same(plan.output, whole)


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_evaluate_is_killed_and_done_again(whole, tmp_path, signum):
    written = tmp_path / "figures.json", tmp_path / "found.json"
    words = ["evaluate", "--checkpoint", str(whole / "model.safetensors"), "--data", "scenes:12:size=64"]
    words += ["--split", "train", "--batch-size", "2", "--bootstrap", "3", "--device", "cpu"]
    words += ["--json", str(written[0]), "--save-detections", str(written[1])]
    killed_in_evaluation(signum, 4, words)
    assert not list(tmp_path.iterdir()), "nothing half written"
    assert cli.main(words) == 0
    before = [sha256(file) for file in written]
    killed_in_evaluation(signum, 4, words)
    assert [sha256(file) for file in written] == before and len(list(tmp_path.iterdir())) == 2, "what was there is kept"
    for file in written:
        file.unlink()
    assert cli.main(words) == 0
    assert [sha256(file) for file in written] == before


# ----------------------------------------------------------------------------------------------------------- signals


@pytest.fixture
def heard():
    """SIGHUP as in a terminal: ``nohup make test`` ignores it, and what was ignored stays ignored."""
    before = signal.getsignal(signal.SIGHUP)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_signal_finishes_the_step_and_saves(heard, config, whole, name):
    signum = getattr(signal, name)
    before = signal.getsignal(signum)
    plan = config()
    with pytest.raises(RunStopped) as stopped:
        train(plan, at(4, lambda: os.kill(os.getpid(), signum)))
    assert signal.getsignal(signum) is before
    called = "Ctrl-C" if name == "SIGINT" else name
    where = f"after step 5, which is saved in {plan.output}"
    assert str(stopped.value) == f"stopped by {called} {where}; go on with resume=True"
    assert stopped.value.signum == signum and isinstance(stopped.value, KeyboardInterrupt)
    assert newest(plan.output) == 5 and lines(plan.output)[-1]["step"] == 5
    assert "stopped after step 5" in (Path(plan.output) / "train.log").read_text()
    train(replace(plan, resume=True))
    assert_same(plan.output, whole)


@pytest.mark.parametrize("step", [STEPS - 1, STEPS])
def test_a_signal_in_the_last_step(config, whole, step):
    plan = config()
    with pytest.raises(RunStopped):
        train(plan, at(step, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert newest(plan.output) == STEPS
    train(replace(plan, resume=True))
    assert_same(plan.output, whole)


def test_a_second_ctrl_c_leaves_at_once(config, monkeypatch):
    monkeypatch.setattr("regolite.utils.interrupts.DEBOUNCE", 0.0)

    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    plan = config()
    with pytest.raises(KeyboardInterrupt) as left:
        train(plan, at(1, twice))
    assert not isinstance(left.value, RunStopped)
    assert not list((Path(plan.output) / "checkpoints").iterdir())


def test_what_a_launcher_passes_on_is_no_second_ctrl_c(monkeypatch):
    """The terminal sends Ctrl-C to all, and torchrun sends it to its processes once more. Slurm repeats SIGTERM."""
    signals = StopSignals()
    with signals:
        signals.hold()
        for signum in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), signum)
        assert signals.asked == signal.SIGINT
        monkeypatch.setattr("regolite.utils.interrupts.DEBOUNCE", 0.0)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop:
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) == stop._handle
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_before_the_first_step_there_is_nothing_to_finish(config, monkeypatch):
    monkeypatch.setattr(loop, "build", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(RunStopped, match="stopped by SIGTERM before the first step"):
        train(config())


@pytest.mark.parametrize("number", [1, 2])
def test_an_evaluation_is_left_at_once(config, whole, monkeypatch, number):
    """The first one is in the middle of the run, the second at its end."""
    evaluate, calls = loop.evaluate, []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(loop, "evaluate", interrupted)
    plan = config()
    step = 6 * number
    with pytest.raises(RunStopped, match=f"stopped by SIGTERM while evaluating after step {step}, which is saved in"):
        train(plan)
    assert newest(plan.output) == step
    train(replace(plan, resume=True))
    assert_same(plan.output, whole)


def test_training_in_a_thread(config):
    """Signals belong to the main thread; elsewhere there are none to catch, and training works."""
    found = []
    thread = threading.Thread(target=lambda: found.append(train(config(epochs=1))))
    thread.start()
    thread.join()
    assert len(found) == 1


def test_workers_leave_signals_to_the_training_process(config, whole):
    """Slurm and systemd send a signal to every process of a job."""

    def to_all():
        import psutil

        workers = psutil.Process().children(recursive=True)
        assert workers
        # From outside: what the training process itself asks of its workers they do.
        subprocess.run(["kill", "-TERM", *(str(process.pid) for process in (*workers, psutil.Process()))], check=True)

    plan = config(workers=1)
    with pytest.raises(RunStopped, match="after step 5"):
        train(plan, at(4, to_all))
    train(replace(plan, workers=0, resume=True))
    assert_same(plan.output, whole)


def test_a_worker_ends_when_the_training_process_says_so():
    """Deaf ones would keep a failed run from ending."""
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    worker = context.Process(target=sleep_as_a_worker, args=(ready,), daemon=True)
    worker.start()
    assert ready.wait(20.0)
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    worker.join(1.0)
    assert worker.is_alive(), "what others say is none of its business"
    worker.terminate()
    worker.join(20.0)
    assert worker.exitcode == 0


def sleep_as_a_worker(ready):
    leave_signals_to_parent()
    ready.set()
    time.sleep(100)


# ------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("keep", [1, 3])
def test_the_last_few_and_the_best_are_kept(config, keep):
    path = train(config(keep_checkpoints=keep, checkpoint_minutes=0.0, epochs=2, evaluate_every=1))
    names = sorted(file.name for file in (path / "checkpoints").iterdir())
    assert names == ["best.pt", *(f"step_{step:08d}.pt" for step in range(7 - keep, 7))]
    with pytest.raises(UserError, match="keep_checkpoints=0 must be greater than 0"):
        config(keep_checkpoints=0)


def test_the_best_checkpoint_goes_on_too(config, whole):
    plan = config()
    path = train(plan)
    best = folder._read_state(path / "checkpoints" / "best.pt")
    assert best["step"] == 6 and best["optimizer"]["state"], "the first evaluation, which no later one surpasses"
    for file in (path / "checkpoints").glob("step_*.pt"):
        file.unlink()  # it may be the same file as the best one, by another name
        file.write_bytes(b"")
    train(replace(plan, resume=True))
    assert_same(path, whole)


def flip(file):
    """One bit in the middle, among the numbers, where nothing but a check sum can see it."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("damage", [flip, lambda file: os.truncate(file, file.stat().st_size // 2)])
def test_a_damaged_checkpoint_is_passed_over_and_said(config, whole, capsys, damage):
    plan = config(checkpoint_minutes=0.0)
    with pytest.raises(RunStopped):
        train(plan, at(7, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    damage(Path(plan.output) / "checkpoints" / "step_00000008.pt")
    capsys.readouterr()
    train(replace(plan, resume=True))
    assert "warning: checkpoint step_00000008.pt is damaged (" in capsys.readouterr().out
    assert_same(plan.output, whole)


def test_torn_metrics_lose_lines_and_nothing_else(config, whole, capsys):
    plan = config(checkpoint_minutes=0.0)
    with pytest.raises(RunStopped):
        train(plan, at(7, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    metrics = Path(plan.output) / "metrics.jsonl"
    os.truncate(metrics, metrics.stat().st_size // 2)
    capsys.readouterr()
    train(replace(plan, resume=True))
    assert f"warning: {metrics} has lost lines from before the checkpoint" in capsys.readouterr().out
    for name in ("model.safetensors", "best.safetensors"):
        assert sha256(Path(plan.output) / name) == sha256(whole / name), name
    left, all_lines = lines(plan.output), lines(whole)
    lost = len(all_lines) - len(left)
    assert lost > 0 and any(left == all_lines[:n] + all_lines[n + lost :] for n in range(1, len(left)))


def test_a_damaged_checkpoint_takes_no_sound_ones_place(tmp_path):
    run = RunFolder(tmp_path, resume=False)
    for step in (1, 2, 9):
        run.save_state({"step": step})
    os.truncate(tmp_path / "checkpoints" / "step_00000009.pt", 10)
    assert run.load_state()["step"] == 2
    run.save_state({"step": 3})
    run.close()
    assert sorted(file.name for file in run.checkpoints.iterdir()) == ["step_00000002.pt", "step_00000003.pt"]


def test_no_dates_in_the_weights(config, whole):
    with safe_open(whole / "model.safetensors", framework="pt") as file:
        assert set(file.metadata()) == {"regolite"}
        stored = json.loads(file.metadata()["regolite"])
    assert stored == json.loads((whole / "config.json").read_text())["model"]
    path = train(config("elsewhere", log_every=5, checkpoint_minutes=0.0, keep_checkpoints=1))
    assert sha256(path / "model.safetensors") == sha256(whole / "model.safetensors")


# --------------------------------------------------------------------------------------------------------- full disks


@pytest.mark.parametrize("name", ["step_", "model.safetensors", "best.safetensors"])
def test_full_disk_for_a_while(config, whole, monkeypatch, capsys, name):
    """Steps 5 to 8, with an evaluation among them, find no space for the files of this name."""
    write, run = folder.write_atomic, config(checkpoint_minutes=0.0)
    full = []

    def scarce(path, data):
        if full and Path(path).name.startswith(name):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, data)

    monkeypatch.setattr(folder, "write_atomic", scarce)
    monkeypatch.setattr("regolite.checkpoint.write_atomic", scarce)

    def watch(line):
        if line["kind"] == "train":
            full[:] = [True] * (4 <= line["step"] < 8)
            if line["step"] == 8 and name == "step_":
                assert newest(run.output) == 3, "what was there is kept"

    train(run, watch)
    said = capsys.readouterr().out
    if name == "best.safetensors":
        assert "the best weights so far cannot be written (No space left on device): free some space" in said
        assert sha256(Path(run.output) / "model.safetensors") == sha256(whole / "model.safetensors")
    else:
        what, last = ("step 7", 3) if name == "step_" else ("model.safetensors", 7)
        wanted = f"{what} cannot be saved (No space left on device), the checkpoint of step {last} is kept: free some"
        assert wanted in said
        assert_same(run.output, whole)


def test_files_that_may_not_grow(config, whole, capsys):
    """The system's own limit, for real: writing fails in the middle of a file, of the metrics too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    run = config(checkpoint_minutes=0.0)
    metrics = Path(run.output) / "metrics.jsonl"

    def watch(line):
        if line["kind"] == "train" and line["step"] == 7:
            resource.setrlimit(resource.RLIMIT_FSIZE, (metrics.stat().st_size + 100, hard))
        if line["kind"] == "train" and line["step"] == 10:
            found = metrics.read_text()
            assert found.endswith("\n") and json.loads(found.splitlines()[-1])["step"] == 7, "whole lines only"
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    try:
        train(run, watch)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = capsys.readouterr().out
    assert said.count("metrics.jsonl cannot be written (File too large): free some space") == 1
    assert "step 8 cannot be saved (File too large)" in said
    assert_same(run.output, whole)


def test_full_disk_at_the_end(config, whole, monkeypatch):
    write = folder.write_atomic

    def scarce(path, data):
        if Path(path).name == f"step_{STEPS:08d}.pt":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, data)

    monkeypatch.setattr(folder, "write_atomic", scarce)
    run = config(checkpoint_minutes=0.0)
    with pytest.raises(UserError) as error:
        train(run)
    assert str(error.value) == (
        f"the run ends, and step {STEPS} cannot be saved (No space left on device), the checkpoint of step "
        f"{STEPS - 1} is kept: free some space at {run.output} and resume it"
    )
    monkeypatch.setattr(folder, "write_atomic", write)
    train(replace(run, resume=True))
    assert_same(run.output, whole)


def test_full_disk_when_a_signal_comes(config, whole, monkeypatch):
    write = folder.write_atomic

    def scarce(path, data):
        if Path(path).name == "step_00000005.pt":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, data)

    monkeypatch.setattr(folder, "write_atomic", scarce)
    run = config(checkpoint_minutes=0.0)
    with pytest.raises(RunStopped, match=r"after step 5: step 5 cannot be saved \(No space.*step 4 is kept; go on"):
        train(run, at(4, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    monkeypatch.setattr(folder, "write_atomic", write)
    train(replace(run, resume=True))
    assert_same(run.output, whole)


# -------------------------------------------------------------------------------------------------------- broken data


@pytest.fixture
def data(tmp_path):
    """The images of the runs above, as files."""
    root = tmp_path / "data"
    Scenes(6, size=64).write(root)
    Scenes(1, size=64, split="val").write(root)
    return root


def break_image(data, number=4):
    """Half a JPEG, as a download that was cut off leaves it."""
    path, buffer = data / "images" / f"train_{number:06d}.png", io.BytesIO()
    Scenes(6, size=64).image(number - 1).save(buffer, "JPEG")
    path.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    return path


def test_a_broken_image_stops_the_run_and_nothing_is_lost(config, data, whole):
    path = data / "images" / "train_000004.png"
    sound = path.read_bytes()
    run = config(data=str(data))
    with pytest.raises(UserError, match="train_000004.png cannot be read .*: replace the file"):
        train(run, at(4, lambda: break_image(data)))
    last = lines(run.output)[-1]["step"]
    assert newest(run.output) == last > 4, "saved when it broke, not when an hour is over"
    path.write_bytes(sound)
    train(replace(run, resume=True))
    assert_same(run.output, whole)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("how", ["broken", "missing"])
def test_a_broken_image_is_skipped_and_counted(config, data, how, workers):
    path = break_image(data)
    if how == "missing":
        path.unlink()
        with pytest.raises(UserError, match="1 of the 6 images of .* are missing .*, the first is train_000004.png"):
            train(config("strict", data=str(data)))
    run = config(data=str(data), on_broken="skip", workers=workers, epochs=2)
    seen = []
    with pytest.raises(RunStopped):
        train(run, at(3, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    train(replace(run, resume=True), seen.append)
    log = (Path(run.output) / "train.log").read_text()
    what = "does not exist" if how == "missing" else "cannot be read"
    assert f"{path} {what}" in log and "Another takes its place" in log
    assert [line for line in lines(run.output) if line["kind"] == "train"][-1]["broken_images"] == 2, "once an epoch"


def test_skipping_changes_nothing_where_all_is_sound(config, data, whole):
    assert_same(train(config(data=str(data), on_broken="skip")), whole)


def test_the_next_image_takes_the_place_of_a_broken_one(data):
    from regolite.data import open_data

    break_image(data, 4)
    break_image(data, 6)
    images = open_data(data, "train", make_transform("laptop", 64, train=True))
    items = SeededItems(images, 0, "skip")
    assert [items[0, i][1].image_id for i in range(6)] == [1, 2, 3, 5, 5, 1]
    assert [len(items[0, i][2]) for i in range(6)] == [0, 0, 0, 1, 0, 1]
    with pytest.raises(UserError, match="train_000004.png cannot be read"):
        SeededItems(images, 0)[0, 3]
    shutil.rmtree(data / "images")
    with pytest.raises(UserError, match=f"{TRIES} images in a row .* is the disk there.*train_000003.png does not"):
        items[0, 2]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("how", ["broken", "missing"])
def test_a_broken_validation_image_is_left_out_and_that_is_said_once(config, data, capsys, how, workers):
    Scenes(3, size=64, split="val").write(data)
    path = data / "images" / "val_000002.png"
    path.unlink() if how == "missing" else path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="val_000002.png"):
        train(config("strict", data=str(data)))
    run = config(data=str(data), on_broken="skip", workers=workers)
    train(run)
    found = [line for line in lines(run.output) if line["kind"] == "evaluation"]
    assert [(line["images"], line["broken_images"]) for line in found] == [(2, 1)] * 2
    said = f"1 of 3 images of val are left out when it is evaluated: image {path} "
    assert capsys.readouterr().out.count(said) == 1
    assert (Path(run.output) / "train.log").read_text().count(said) == 1


def test_skipping_leaves_no_whole_set_to_evaluate(config):
    with pytest.raises(UserError, match="on_broken='skip' leaves no whole set of training images"):
        config(on_broken="skip", evaluate_train=True)


def edit(data, change):
    file = data / "annotations" / "instances_train.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_wrong_category_ids(config, data, whole):
    run = config(data=str(data))
    with pytest.raises(RunStopped):
        train(run, at(4, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    sound = (data / "annotations" / "instances_train.json").read_text()
    before = {file.name: sha256(file) for file in (Path(run.output) / "checkpoints").iterdir()}

    def unknown(content):
        content["annotations"][3]["category_id"] = 77

    edit(data, unknown)
    with pytest.raises(UserError, match="annotation .* refers to category 77, which the file does not list"):
        train(replace(run, resume=True))

    def renumbered(content):
        for record in content["categories"]:
            record["id"] += 10
        for record in content["annotations"]:
            record["category_id"] = 11 + (record["category_id"] - 1) % 10

    (data / "annotations" / "instances_train.json").write_text(sound)
    edit(data, renumbered)
    with pytest.raises(UserError, match="training and validation annotations name different categories"):
        train(replace(run, resume=True))
    shutil.copy(data / "annotations" / "instances_train.json", data / "annotations" / "instances_val.json")
    with pytest.raises(UserError, match="holds a run on other categories than those of"):
        train(replace(run, resume=True))
    assert before == {file.name: sha256(file) for file in (Path(run.output) / "checkpoints").iterdir()}

    (data / "annotations" / "instances_train.json").write_text(sound)
    Scenes(1, size=64, split="val").write(data)
    train(replace(run, resume=True))
    assert_same(run.output, whole)


def test_nan_in_the_weights(config, whole, monkeypatch):
    run, optimizers = config(checkpoint_minutes=0.0), []
    make = schedule.parameter_groups
    monkeypatch.setattr(schedule, "parameter_groups", lambda *args: optimizers.append(make(*args)) or optimizers[-1])

    def ruin():
        with torch.no_grad():
            optimizers[0][-1]["params"][-1].fill_(float("nan"))

    with pytest.raises(NonFiniteLoss, match=r"training stopped at step \d: \d+ weights are not finite"):
        train(run, at(5, ruin))
    assert newest(run.output) == 4
    train(replace(run, resume=True))
    assert_same(run.output, whole)


@pytest.mark.parametrize(
    "error", [MemoryError("no room"), ZeroDivisionError("a side of 0"), RuntimeError("two\nlines")]
)
def test_whatever_one_image_causes_is_skipped_or_named(data, error):
    from regolite.data import open_data

    def transform(image, moved):
        if image.getpixel((0, 0)) == (1, 2, 3):
            raise error
        return recipe(image, moved)

    recipe = make_transform("laptop", 64, train=True)
    Image.new("RGB", (64, 64), (1, 2, 3)).save(data / "images" / "train_000004.png")
    images = open_data(data, "train", transform)
    _, target, broken = SeededItems(images, 0, "skip")[0, 3]
    assert target.image_id == 5 and len(broken) == 1
    said = f"train_000004.png cannot be prepared .{type(error).__name__}: "
    assert re.search(said, broken[0])
    with pytest.raises(UserError, match=said):
        SeededItems(images, 0)[0, 3]
    with pytest.raises(KeyboardInterrupt):  # which is no fault of the image
        error = KeyboardInterrupt()
        SeededItems(images, 0, "skip")[0, 3]


def test_a_line_of_pixels_is_trained_on(data):
    from regolite.data import open_data

    file = data / "annotations" / "instances_train.json"
    content = json.loads(file.read_text())
    content["images"][3] |= {"width": 4000, "height": 8}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 4]
    file.write_text(json.dumps(content))
    Image.new("RGB", (4000, 8)).save(data / "images" / "train_000004.png")
    items = SeededItems(open_data(data, "train", make_transform("laptop", 320)), 0)
    pixels, target, broken = items[0, 3]
    assert min(pixels.shape[1:]) == 1 and target.image_id == 4 and not broken


def test_figures_of_a_run_leave_broken_images_out(data, tmp_path):
    from regolite.data import open_data
    from regolite.plots import draw_run  # the name that is not patched above

    break_image(data, 1)
    (tmp_path / "metrics.jsonl").touch()
    model = build("deformable_detr_scenes", 14, dim=32, heads=2, ffn_dim=16, encoder_layers=1, decoder_layers=1)
    files = draw_run(tmp_path, model, {"train": open_data(data, "train")}, images=2)
    assert [file.name for file in files] == ["curves.png", "stages_train_4.png"]
