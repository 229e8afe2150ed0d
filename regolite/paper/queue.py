"""A resumable queue of experiment runs, several at a time.

Every run has its own single-threaded process, so that runs on several cores do not wait for each other and all memory
is freed at the end. Runs are ordered by seed: an early stop leaves all arms with fewer seeds.
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

STDERR_FILE = "stderr.txt"


def plan(names: Sequence[str], seeds: Sequence[int] | None = None) -> list[tuple[str, int]]:
    """The runs of experiments without duplicates: pairs of arm and seed, ordered by seed.

    Args:
        names: names of experiments; ``all`` for all of them.
        seeds: the seeds; by default those of each arm.

    Raises:
        UserError: for an unknown name.
    """
    chosen = list(EXPERIMENTS) if "all" in names else list(names)
    arms = dict.fromkeys(arm for name in chosen for arm in experiment(name).arms)
    pairs = [(arm, seed) for arm in arms for seed in (ARMS[arm].seeds if seeds is None else dict.fromkeys(seeds))]
    return sorted(pairs, key=lambda pair: pair[1])  # stable: table order within a seed


def conduct(
    names: Sequence[str],
    seeds: Sequence[int] | None = None,
    folder: str | Path = "runs/experiments",
    results: str | Path = "experiments/results",
    jobs: int = 1,
    small: bool = False,
) -> list[Path]:
    """Do all missing runs and write their results.

    Args:
        names: names of experiments; ``all`` for all of them.
        seeds: the seeds; by default those of each arm.
        folder: folder of the runs.
        results: folder of the result files.
        jobs: number of simultaneous runs.
        small: do tiny runs, as a smoke test.

    Returns:
        The result files.

    Raises:
        UserError: if an experiment is unknown, another process uses the folder, or runs failed; results of the other
            runs are written.
        RunStopped: after a signal; the progress of the current runs is saved.
    """
    pairs, folder = plan(names, seeds), Path(folder)
    abouts = {arm: ARMS[arm].about for arm, _ in pairs}
    return work(pairs, abouts, lambda arm, seed: _start(arm, seed, folder, small), folder, results, jobs)


def missing(pairs: Sequence[tuple[str, int]], results: str | Path) -> list[tuple[str, int]]:
    """The pairs of arm and seed without results in the folder."""
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
    """Do the missing runs, each in its own process, and write their results.

    Args:
        pairs: arms and seeds, in starting order.
        abouts: description of each arm in one line.
        start: starts the process of an arm and a seed (:func:`spawn`), which writes ``ARM/SEED/result.json``.
        folder: folder of the runs.
        results: folder of the result files, ``ARM.json``.
        jobs: number of simultaneous runs.

    Returns:
        The result files.

    Raises:
        UserError: if another process uses the folder, or runs failed; results of the other runs are written.
        RunStopped: after a signal; the progress of the current runs is saved.
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
                    errors = (place / STDERR_FILE).read_text("utf-8", errors="replace").strip().splitlines()
                    failed.append(f"{arm}, seed {seed}: {errors[-1] if errors else f'code {process.returncode}'}")
                    Status.say(failed[-1])
            status.update(1 - (len(waiting) + len(running)) / count, ", ".join(f"{a} {s}" for a, s in running))
    status.close()
    if failed:
        raise UserError(f"{len(failed)} of {count} runs failed, the others are done: {'; '.join(failed)}")
    return list(files.values())


def spawn(place: Path, module: str, *words: str) -> subprocess.Popen[bytes]:
    """Start a single-threaded process for a run, which ends with this process; see :func:`run_process`.

    Args:
        place: folder of the run, where stderr is written.
        module: Python module to run.
        words: its arguments.
    """
    place.mkdir(parents=True, exist_ok=True)
    package = str(Path(__file__).parents[2])  # importable even if not installed
    path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", module, *words]
    with open(place / STDERR_FILE, "wb") as errors:
        return subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,  # closed when this process ends for any reason, which ends the run
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,  # only this process gets Ctrl-C, and terminates the runs
        )


def run_process(work: Callable[..., Any]) -> None:
    """Main function of a process started by :func:`spawn`; a UserError becomes one line on stderr."""
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
    """Terminate all runs at the end, whatever happens; each saves its progress first."""
    try:
        yield
    finally:
        for process in running.values():
            process.terminate()  # the run saves its progress
        for process in running.values():
            with process:  # waits
                pass


@contextmanager
def _interruptible() -> Iterator[None]:
    """Handle SIGTERM and SIGHUP like Ctrl-C."""
    signals = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]

    def stop(signum: int, frame: Any) -> None:
        raise KeyboardInterrupt(signum)

    main = threading.current_thread() is threading.main_thread()  # other threads can't set handlers
    before = {name: signal.signal(name, stop) for name in signals if main}
    try:
        yield
    except KeyboardInterrupt as error:
        raise RunStopped("stopped; what the runs had done is saved", *error.args or (signal.SIGINT,)) from None
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def _seeds(file: Path) -> set[int]:
    """The seeds with results in a file."""
    return {run["seed"] for run in json.loads(file.read_text(encoding="utf-8"))["runs"]} if file.exists() else set()


def _main(arm: str, seed: str, folder: str, small: str) -> None:
    """Main function of the processes of :func:`conduct`."""
    if int(small):
        runner.run(arm, runner.smaller(ARMS[arm]), int(seed), folder, test=20)
    else:
        runner.run(arm, ARMS[arm], int(seed), folder)


if __name__ == "__main__":
    run_process(_main)
