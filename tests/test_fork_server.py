"""Kernels that are forks of one server do what new Pythons do."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import fork_server
import psutil
import pytest
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager, start_new_kernel

WAIT = 120  # seconds; two slow cores may be shared

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(fork_server.FOLDER not in os.environ, reason="here every kernel is a new Python"),
]

BEGIN = """
VARIES = ("JPY_PARENT_PID", "JUPYTER_PATH", "PYTEST_CURRENT_TEST")
import importlib, json, os, random, signal, sys, threading, warnings
about = {
    "mine": [name for name in sys.modules if name.split(".")[0] in ("regolite", "fork_server", "book", "results")],
    "path": sys.path, "folder": os.getcwd(), "argv": [sys.argv[0][-21:], sys.argv[1]], "main": __name__,
    "signals": [str(signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)],
    "threads": sorted(type(thread).__name__ for thread in threading.enumerate()),
}
for name in IMPORTS:
    importlib.import_module(name)
import matplotlib, numpy, torch
about |= {
    "cores": torch.get_num_threads(), "dtype": str(torch.get_default_dtype()), "backend": matplotlib.get_backend(),
    "filters": sorted(map(str, warnings.filters)),
    "environment": {name: value for name, value in os.environ.items() if name not in VARIES},
    "draws": [torch.rand(1).item(), numpy.random.rand(), random.random()],
}
print(json.dumps(about))
""".replace("IMPORTS", repr(fork_server.IMPORTS["ipykernel_launcher"]))


def said(client: BlockingKernelClient, code: str) -> str:
    """What code prints in a kernel; of an error its name."""
    texts = []

    def hook(message: dict) -> None:
        content = message["content"]
        texts.extend(content[key] for key in ("text", "ename") if key in content)

    client.execute_interactive(code, output_hook=hook, stop_on_error=False, timeout=WAIT)
    return "".join(texts)


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def ended(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[tuple[KernelManager, BlockingKernelClient]]:
    manager, client = start_new_kernel(cwd=str(tmp_path), startup_timeout=WAIT)
    yield manager, client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def test_a_fork_begins_as_a_new_python(kernel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    manager, client = kernel
    assert manager.kernel_spec.argv[-4:] == [fork_server.__file__, "ipykernel_launcher", "-f", "{connection_file}"]
    fork = json.loads(said(client, BEGIN))
    monkeypatch.delenv("JUPYTER_PATH")
    other, client = start_new_kernel(cwd=str(tmp_path), startup_timeout=WAIT)
    try:
        assert "fork_server" not in str(other.kernel_spec.argv)
        new = json.loads(said(client, BEGIN))
        assert not set(fork.pop("draws")) & set(new.pop("draws"))
        assert fork == new
        assert fork["mine"] == [] and fork["folder"] == str(tmp_path)
    finally:
        client.stop_channels()
        other.shutdown_kernel(now=True)


def test_a_kernel_is_interrupted_and_restarted(kernel):
    manager, client = kernel
    assert said(client, "import os; x = os.getpid(); print(x)") != str(manager.provisioner.process.pid)
    request = client.execute("print('begun', flush=True)\nwhile True: pass", stop_on_error=False)
    until(lambda: client.get_iopub_msg(timeout=WAIT)["content"].get("text", "").startswith("begun"))
    manager.interrupt_kernel()
    while (reply := client.get_shell_msg(timeout=WAIT))["parent_header"]["msg_id"] != request:
        pass
    assert reply["content"]["ename"] == "KeyboardInterrupt"
    before, draws = int(said(client, "print(x)")), json.loads(said(client, BEGIN))["draws"]
    manager.restart_kernel(now=True)
    client.wait_for_ready(timeout=WAIT)
    assert said(client, "x") == "NameError" and ended(before)
    assert not set(draws) & set(json.loads(said(client, BEGIN))["draws"])


def test_how_it_ends_is_seen_on_both_sides(kernel):
    manager, client = kernel
    client.execute("import os; os._exit(3)")
    assert manager.provisioner.process.wait(WAIT) == 3
    manager.restart_kernel(now=True)
    client.wait_for_ready(timeout=WAIT)
    fork = int(said(client, "import os; print(os.getpid())"))
    manager.provisioner.process.kill()  # what stands for it, alone
    until(lambda: ended(fork))


def test_the_server_ends_with_its_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name in (fork_server.FOLDER, "JUPYTER_PATH"):
        monkeypatch.delenv(name)  # and put back at the end
    fork_server.offer(tmp_path)
    done = subprocess.run(fork_server.command("papermill", "--version"), capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count(".") >= 2, done.stderr
    [server] = [process for process in psutil.process_iter(["cwd"]) if process.info["cwd"] == str(tmp_path)]
    done = subprocess.run(fork_server.command("papermill", "--what"), capture_output=True, text=True)
    assert done.returncode == 2 and "No such option" in done.stderr
    (tmp_path / "owner").unlink()
    until(lambda: ended(server.pid))
