"""One writer a folder: who holds a lock is said, a stale one is taken over, and folders are probed before the work."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from small_runs import SMALL_RUN

from regolite import RunConfig, UserError, train
from regolite.data import fetch, prepare
from regolite.paper import queue
from regolite.training import loop
from regolite.training.folder import RunFolder
from regolite.utils import lock
from regolite.utils.interrupts import RunStopped
from regolite.utils.lock import NAME, locked


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """Another process."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.communicate()


def write_lock(folder: Path, pid: int, started: float, host: str | None = None, age: float = 7200.0) -> Path:
    about = {"host": host or socket.gethostname(), "pid": pid, "started": started, "since": time.time() - age}
    (folder / NAME).write_text(json.dumps(about))
    return folder / NAME


def test_the_holder_is_named(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    file = write_lock(tmp_path, sleeper.pid, psutil.Process(sleeper.pid).create_time())
    before = file.read_bytes()
    with pytest.raises(UserError) as error, locked(tmp_path):
        pytest.fail("two writers")
    said = f"{tmp_path} is locked by process {sleeper.pid} on {socket.gethostname()}, since 20"
    assert str(error.value).startswith(said)
    assert str(error.value).endswith("(2 hours ago): wait until it ends, stop it, or give another folder")
    assert file.read_bytes() == before


@pytest.mark.parametrize("how", ["ended", "zombie", "id given to another process"])
def test_a_stale_lock_is_taken_over(
    tmp_path: Path, sleeper: subprocess.Popen[bytes], capsys: pytest.CaptureFixture[str], how: str
) -> None:
    started = psutil.Process(sleeper.pid).create_time()
    if how == "id given to another process":
        started -= 1000
    else:
        sleeper.kill()
        if how == "ended":
            sleeper.wait()
        else:
            while psutil.Process(sleeper.pid).status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.01)
    write_lock(tmp_path, sleeper.pid, started)
    with locked(tmp_path):
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()
    assert not list(tmp_path.iterdir())
    said = capsys.readouterr().out
    assert f"was locked by process {sleeper.pid} on" in said and "no longer runs: its lock is taken over" in said


def test_a_lock_of_another_host_is_never_taken_over(tmp_path: Path) -> None:
    file = write_lock(tmp_path, 2**22 + 1, 0.0, host="elsewhere", age=3 * 86400.0)
    said = r"on elsewhere, .*\(3 days ago\): .*no longer runs, delete .*lock.json"
    with pytest.raises(UserError, match=said), locked(tmp_path):
        pytest.fail("two writers")
    assert file.exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"host": "a", "pid": "b"}'])
def test_an_unreadable_lock_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(lock, "GRACE", 0.0)
    (tmp_path / NAME).write_bytes(content)
    with locked(tmp_path):
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()


def test_a_lock_is_released_whatever_happens(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    with pytest.raises(KeyError), locked(folder):
        with pytest.raises(UserError, match=f"is locked by process {os.getpid()} on"), locked(folder):
            pytest.fail("two writers in one process")
        assert (folder / NAME).exists(), "the refused one has left it alone"
        raise KeyError
    assert not (folder / NAME).exists()
    with locked(folder):  # somebody deletes it, and another process takes the folder
        other = write_lock(folder, 1, 0.0)
    assert other.exists()


def test_of_many_that_find_a_stale_lock_one_gets_it(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    sleeper.kill()
    sleeper.wait()
    start, end, outcomes = threading.Barrier(8), threading.Barrier(8), []

    def attempt() -> None:
        start.wait()
        try:
            with locked(tmp_path):
                outcomes.append("held")
                end.wait()
        except UserError:
            outcomes.append("refused")
            end.wait()

    for _ in range(20):
        write_lock(tmp_path, sleeper.pid, 0.0)
        threads = [threading.Thread(target=attempt) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(outcomes) == ["held"] + ["refused"] * 7
        assert not list(tmp_path.iterdir())
        outcomes.clear()


# ------------------------------------------------------------------------------------------------------ who is locked


CONFIG = replace(SMALL_RUN, data="scenes:4:val=1:size=64", epochs=2)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.setattr("regolite.plots.run.draw_run", lambda *args, **kwargs: [])
    monkeypatch.setattr(loop, "_evaluate", lambda *args: None)
    return replace(CONFIG, output=str(tmp_path / "run"))


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_has_one_writer(config: RunConfig, resume: bool) -> None:
    refused: list[str] = []

    def intrude(line: dict) -> None:
        if line["step"] == 2:
            with pytest.raises(UserError) as error:
                loop.train.__wrapped__(replace(config, resume=resume))  # without its signals: they are the first one's
            refused.append(str(error.value))

    folder = train(config, intrude)
    assert len(refused) == 1 and f"run is locked by process {os.getpid()} on {socket.gethostname()}" in refused[0]
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]
    assert not (folder / NAME).exists()


def test_a_stopped_and_a_failed_run_release_their_folder(config: RunConfig) -> None:
    file = Path(config.output) / NAME

    def stop(line: dict) -> None:
        assert json.loads(file.read_text())["pid"] == os.getpid()
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(RunStopped):
        train(config, stop)
    assert not file.exists()
    with pytest.raises(UserError, match="seed=0, now 1"):
        train(replace(config, resume=True, seed=1))
    assert not file.exists()
    train(replace(config, resume=True))


def test_downloads_have_one_writer(tmp_path: Path) -> None:
    with locked(tmp_path):
        with pytest.raises(UserError, match="is locked by process"):
            prepare.prepare_coco(tmp_path, mirror="http://127.0.0.1:1")
        with pytest.raises(UserError, match="is locked by process"):
            fetch.fetch_dataset("cards", tmp_path, mirror="http://127.0.0.1:1")


def test_experiments_have_one_writer(tmp_path: Path) -> None:
    def start(arm: str, seed: int) -> subprocess.Popen[bytes]:
        pytest.fail("started")

    with locked(tmp_path), pytest.raises(UserError, match="is locked by process"):
        queue.work([("base", 0)], {"base": "about"}, start, tmp_path, tmp_path / "results")


# ------------------------------------------------------------------------------------------------ what can be written


REFUSALS = [
    (errno.EACCES, "Permission denied; change its permissions, or write elsewhere"),
    (errno.EPERM, "Operation not permitted; change its permissions, or write elsewhere"),
    (errno.EROFS, "Read-only file system; the file system is read-only: write elsewhere, or mount it for writing"),
    (errno.ENOSPC, "No space left on device; free some space or write elsewhere"),
    (errno.EDQUOT, "; free some space or write elsewhere"),
    (errno.ENOTDIR, "Not a directory; a part of the path is a file: give another path"),
    (errno.EIO, "; check the path and its permissions"),
]


@pytest.mark.parametrize(("number", "said"), REFUSALS)
def test_the_advice_fits_what_the_system_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, said: str
) -> None:
    opened = os.open

    def refuse(path: str, *args: int, **options: int) -> int:
        if str(path).endswith(NAME):
            raise OSError(number, os.strerror(number), str(path))
        return opened(path, *args, **options)

    with monkeypatch.context() as patch, pytest.raises(UserError) as error:
        patch.setattr(os, "open", refuse)
        with locked(tmp_path):
            pytest.fail("written")
    assert str(error.value).startswith(f"{tmp_path / NAME}: ") and str(error.value).endswith(said)


@pytest.mark.parametrize("name", ["", "checkpoints", "figures", "tensorboard"])
@pytest.mark.parametrize(("number", "said"), REFUSALS[:4])
def test_every_folder_is_probed_before_the_first_step(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, name: str, number: int, said: str
) -> None:
    place, temporary = Path(config.output) / name, tempfile.TemporaryFile
    place.mkdir(parents=True)

    def refuse(*args: str, dir: Path, **options: str) -> object:
        if dir == place:
            raise OSError(number, os.strerror(number), str(dir / "tmpfile"))
        return temporary(*args, dir=dir, **options)

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(loop, "_backward", lambda *args: pytest.fail("a step was done"))
    with pytest.raises(UserError) as error:
        train(config)
    assert str(error.value).startswith(f"{place}: ") and str(error.value).endswith(said)
    assert not (Path(config.output) / "config.json").exists() and not (Path(config.output) / NAME).exists()


def test_a_name_that_is_too_long_is_one_clear_error(config: RunConfig) -> None:
    with pytest.raises(UserError, match=r"File name too long; give a shorter path"):
        train(replace(config, output=f"{config.output}/{300 * 'x'}"))


def test_files_that_cannot_be_replaced_are_named(config: RunConfig) -> None:
    (Path(config.output) / "best.safetensors").mkdir(parents=True)
    with pytest.raises(
        UserError, match=r"best\.safetensors: Is a directory; it is a folder: move it away, or write el"
    ):
        train(config)
    with pytest.raises(UserError, match=r"best\.safetensors/run: Not a directory; a part of the path is a file"):
        (Path(config.output) / "best.safetensors").rmdir()
        (Path(config.output) / "best.safetensors").touch()
        train(replace(config, output=f"{config.output}/best.safetensors/run"))


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="everything may be written by root")
def test_files_without_permission_are_named(tmp_path: Path) -> None:
    RunFolder(tmp_path, resume=False).close()
    (tmp_path / "metrics.jsonl").touch(0o400)
    with pytest.raises(UserError, match=r"metrics\.jsonl: Permission denied; change its permissions"):
        RunFolder(tmp_path, resume=True)


def test_probing_leaves_nothing_behind(tmp_path: Path) -> None:
    RunFolder(tmp_path, resume=False).close()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["checkpoints", "figures", "train.log"]
