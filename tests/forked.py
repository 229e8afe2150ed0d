"""Processes for the tests in which the process itself matters: it is killed, gets a signal, or ends with a code.

A new Python imports PyTorch for seconds. Here a server of the standard library's :mod:`multiprocessing` imports it
once, and each process is a fork of that server: a process of its own in everything but its imports. The kernels of the
notebooks that nbval runs are such processes too.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import weakref
from pathlib import Path

from jupyter_client.provisioning import local_provisioner

_SERVED = "forkserver" in multiprocessing.get_all_start_methods()  # not on Windows
_CONTEXT = multiprocessing.get_context("forkserver" if _SERVED else "spawn")
if _SERVED:
    _CONTEXT.set_forkserver_preload(
        ["regolite.cli", "regolite.paper.queue", "regolite.training", "regolite.plots", "ipykernel.kernelapp"]
    )

REGOLITE = "import runpy; runpy.run_module('regolite', run_name='__main__', alter_sys=True)"
"""The code of ``python -m regolite``."""

KERNEL = """
import os, runpy, sys
os.setsid()
os.chdir(sys.argv.pop(1))
import matplotlib
matplotlib.use("module://matplotlib_inline.backend_inline")  # a kernel says so before anything imports Matplotlib
runpy.run_module("ipykernel_launcher", run_name="__main__", alter_sys=True)
"""
"""The code of a notebook's kernel; its first argument is the folder."""


class Forked:
    """A process that does what ``python -c CODE WORDS`` would, in the environment of this one.

    The methods and attributes are those of :class:`subprocess.Popen`, with stdout and stderr as text.

    Args:
        code: Python code; Ctrl-C is not ignored in it, even where a shell has begun these tests with ``&``.
        words: its arguments.
        environment: what its environment has besides that of this process.
    """

    def __init__(self, code: str, *words: str, **environment: str) -> None:
        folder = tempfile.mkdtemp()
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self._said = [Path(folder) / name for name in ("stdout", "stderr")]
        place = {**os.environ, **environment}, os.getcwd()
        self._process = _CONTEXT.Process(target=_run, args=(self._said, *place, code, words))
        self._process.start()
        self.pid = self._process.pid

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *error: object) -> None:
        self.wait()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, signum)

    def kill(self) -> None:
        self._process.kill()

    def terminate(self) -> None:
        self._process.terminate()

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise TimeoutError(f"process {self.pid} still runs after {timeout} seconds")
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end.

        Returns:
            What it wrote to stdout and stderr.
        """
        self.wait(timeout)
        stdout, stderr = (file.read_text("utf-8", errors="replace") for file in self._said)
        return stdout, stderr


class ForkedKernel(Forked):
    """The kernel of a notebook.

    Args:
        command: how Jupyter starts a kernel: ``[python, "-m", "ipykernel_launcher", *words]``.
        cwd: its folder.
        env: its environment.
    """

    stdin = stdout = stderr = None  # Jupyter would close them

    def __init__(self, command: list[str], cwd: str | None = None, env: dict[str, str] | None = None, **_: object):
        super().__init__(KERNEL, cwd or os.getcwd(), *command[3:], **(env or {}))
        while self.poll() is None and os.getpgid(self.pid) != self.pid:
            time.sleep(0.001)  # Jupyter kills the group of a kernel: it must have its own by then


def fork_kernels() -> None:
    """Let the kernels that this process starts be forks."""
    if _SERVED:
        local_provisioner.launch_kernel = ForkedKernel


def _run(said: list[Path], environment: dict[str, str], folder: str, code: str, words: tuple[str, ...]) -> None:
    for number, file in enumerate(said, start=1):
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = ["-c", *words]
    exec(code, {"__name__": "__main__"})
