"""All runs of some experiments, several at a time, resumable.

Every run is a process of its own with one thread, so that two runs share two cores without waiting for each other, and
so that what a run leaves in memory ends with it. Seed by seed: whoever stops early has all arms with fewer seeds, not
some arms with all.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from regolite.errors import UserError
from regolite.paper import runner
from regolite.paper.experiments import ARMS, EXPERIMENTS, experiment
from regolite.utils.interrupts import RunStopped, end_with_starter
from regolite.utils.lock import locked
from regolite.utils.progress import Status

SAID = "stderr.txt"


def plan(names: Sequence[str], seeds: Sequence[int] | None = None) -> list[tuple[str, int]]:
    """The runs that experiments need, each once: pairs of arm and seed, the first seeds of all arms first.

    Args:
        names: of experiments; ``all`` for all of them.
        seeds: which ones; by default those of each arm.

    Raises:
        UserError: for an unknown name.
    """
    wanted = list(EXPERIMENTS) if "all" in names else list(names)
    arms = dict.fromkeys(arm for name in wanted for arm in experiment(name).arms)
    pairs = [(arm, seed) for arm in arms for seed in (ARMS[arm].seeds if seeds is None else dict.fromkeys(seeds))]
    return sorted(pairs, key=lambda pair: pair[1])  # stable: within a seed the order of the table


def conduct(
    names: Sequence[str],
    seeds: Sequence[int] | None = None,
    folder: str | Path = "runs/experiments",
    results: str | Path = "experiments/results",
    jobs: int = 1,
    small: bool = False,
) -> list[Path]:
    """Do all runs that are missing, and write what they gave.

    Args:
        names: of experiments; ``all`` for all of them.
        seeds: which ones; by default those of each arm.
        folder: for the runs.
        results: for the files of results.
        jobs: how many runs at a time.
        small: tiny runs that only show that everything works.

    Returns:
        The files of results.

    Raises:
        UserError: when an experiment is unknown, another process does runs in the folder, or runs have failed: the
            others are done, and their results written.
        RunStopped: when a signal came; what the running ones had done is saved.
    """
    pairs, folder = plan(names, seeds), Path(folder)
    abouts = {arm: ARMS[arm].about for arm, _ in pairs}
    return work(pairs, abouts, lambda arm, seed: _start(arm, seed, folder, small), folder, results, jobs)


def missing(pairs: Sequence[tuple[str, int]], results: str | Path) -> list[tuple[str, int]]:
    """Those pairs of arm and seed whose results are not in the folder of results."""
    done = {arm: _seeds(Path(results) / f"{arm}.json") for arm, _ in pairs}
    return [(arm, seed) for arm, seed in pairs if seed not in done[arm]]


def work(
    pairs: Sequence[tuple[str, int]],
    abouts: Mapping[str, str],
    start: Callable[[str, int], subprocess.Popen[bytes]],
    folder: str | Path,
    results: str | Path,
    jobs: int = 1,
) -> list[Path]:
    """Do the runs that are missing, each in a process of its own, and write what they gave.

    Args:
        pairs: arms and seeds, in the order in which they start.
        abouts: what each arm is, in a line.
        start: starts the process of an arm and a seed, see :func:`spawn`; it writes ``ARM/SEED/result.json``.
        folder: for the runs.
        results: for the files of results, ``ARM.json``.
        jobs: how many runs at a time.

    Returns:
        The files of results.

    Raises:
        UserError: when another process does runs in the folder, or runs have failed: the others are done, and their
            results written.
        RunStopped: when a signal came; what the running ones had done is saved.
    """
    folder, files = Path(folder), {arm: Path(results) / f"{arm}.json" for arm, _ in pairs}
    Path(results).mkdir(parents=True, exist_ok=True)  # fails now, not after the first run
    waiting = missing(pairs, results)
    status, count = Status(f"{len(pairs)} runs"), len(pairs)
    status.update(1 - len(waiting) / count)
    running: dict[tuple[str, int], subprocess.Popen[bytes]] = {}
    failed: list[str] = []
    with _interruptible(), locked(folder), _ended(running):
        while waiting or running:
            while waiting and len(running) < jobs:
                pair = waiting.pop(0)
                running[pair] = start(*pair)
            time.sleep(0.2)
            for (arm, seed), process in [(pair, p) for pair, p in running.items() if p.poll() is not None]:
                with running.pop((arm, seed)):  # closes its pipe
                    pass
                place = folder / arm / str(seed)
                if process.returncode == 0:
                    found = json.loads((place / "result.json").read_text(encoding="utf-8"))
                    runner.merge(arm, abouts[arm], [found], files[arm])
                    ap = ", ".join("-" if s["AP"] is None else f"{s['AP']:.1f}" for s in found["stages"])
                    Status.say(f"{arm}, seed {seed}: AP by stage {ap}")
                else:
                    said = (place / SAID).read_text(encoding="utf-8", errors="replace").strip().splitlines()
                    failed.append(f"{arm}, seed {seed}: {said[-1] if said else f'code {process.returncode}'}")
                    Status.say(failed[-1])
            status.update(1 - (len(waiting) + len(running)) / count, ", ".join(f"{a} {s}" for a, s in running))
    status.close()
    if failed:
        raise UserError(f"{len(failed)} of {count} runs failed, the others are done: {'; '.join(failed)}")
    return list(files.values())


def spawn(place: Path, module: str, *words: str) -> subprocess.Popen[bytes]:
    """Start a process of one thread that does a run; it ends with this one, see :func:`run_process`.

    Args:
        place: folder of the run, where its errors are written.
        module: what Python runs.
        words: its arguments.
    """
    place.mkdir(parents=True, exist_ok=True)
    package = str(Path(__file__).parents[2])  # where it is imported from here, even if it is not installed
    path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", module, *words]
    with open(place / SAID, "wb") as errors:
        return subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,  # it ends when this process does, however that comes about
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,  # Ctrl-C comes to this process alone, which ends them
        )


def run_process(work: Callable[..., Any]) -> None:
    """Do the work of a process that :func:`spawn` has started; wrong input is one line on stderr."""
    end_with_starter()
    torch.set_num_threads(1)
    try:
        work(*sys.argv[1:])
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


def _start(arm: str, seed: int, folder: Path, small: bool) -> subprocess.Popen[bytes]:
    words = (arm, str(seed), str(folder), str(int(small)))
    return spawn(folder / arm / str(seed), "regolite.paper.queue", *words)


@contextmanager
def _ended(running: dict[tuple[str, int], subprocess.Popen[bytes]]) -> Iterator[None]:
    """Whatever happens, no run goes on without this process: each is asked to save and to end."""
    try:
        yield
    finally:
        for process in running.values():
            process.terminate()  # it saves what it has done
        for process in running.values():
            with process:  # waits
                pass


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM and SIGHUP end this process as Ctrl-C does."""
    wanted = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]

    def stop(signum: int, frame: Any) -> None:
        raise KeyboardInterrupt(signum)

    mine = threading.current_thread() is threading.main_thread()  # others may not ask for signals
    before = {name: signal.signal(name, stop) for name in wanted if mine}
    try:
        yield
    except KeyboardInterrupt as error:
        raise RunStopped("stopped; what the runs had done is saved", *error.args or (signal.SIGINT,)) from None
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def _seeds(file: Path) -> set[int]:
    """The seeds whose results are in a file."""
    return {run["seed"] for run in json.loads(file.read_text(encoding="utf-8"))["runs"]} if file.exists() else set()


def _main(arm: str, seed: str, folder: str, small: str) -> None:
    """One of the processes that :func:`conduct` has started."""
    what = ARMS[arm]
    if int(small):
        runner.run(arm, runner.smaller(what), int(seed), folder, test=20)
    else:
        runner.run(arm, what, int(seed), folder)


if __name__ == "__main__":
    run_process(_main)
