"""Notebook kernels, and papermill, that start in a tenth of a second instead of four.

Most of the time that a kernel takes to start goes to imports of PyTorch, Matplotlib and other people's packages. Here
a server imports them once for a whole session of tests, all of its workers included, and each kernel is a fork of the
server. It imports nothing of this repository: each kernel does that itself. Papermill has a server of its own.

Jupyter finds these kernels by ``JUPYTER_PATH`` under the name that notebooks ask for, and starts this file as it would
start a kernel. That process asks the server for the fork, by a Unix socket, and stands for it: it passes signals on,
ends with its exit status, and when it is killed, so is the fork. Without ``JUPYTER_PATH``, and elsewhere than on Linux,
kernels are new Pythons.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import operator
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

IMPORTS = {
    "ipykernel_launcher": (
        "accelerate", "anywidget", "ipykernel.kernelapp", "ipywidgets", "jaxtyping", "matplotlib.pyplot",
        "matplotlib_inline.backend_inline", "pycocotools.cocoeval", "safetensors.torch", "scipy.optimize",
        "scipy.stats", "torchvision.transforms.v2",
    ),
    "papermill": ("papermill.cli",),
}  # fmt: skip
"""What the server of a module imports, which its forks run."""

FOLDER = "REGOLITE_FORK_SERVERS"
"""The environment variable that names the folder of the servers' sockets, each called as its module."""


def offer(folder: Path) -> None:
    """Let Jupyter find the kernels, in this process and in those that it starts; the first one starts their server.

    The servers end when the folder is removed, or with this process.
    """
    if sys.platform != "linux":  # macOS forks too, but its libraries may not be used afterwards
        return
    spec = folder / "kernels" / "python3"
    spec.mkdir(parents=True)
    # Without site-packages, the process that stands for a kernel starts in 20 ms.
    argv = [sys.executable, "-I", "-S", __file__, "ipykernel_launcher", "-f", "{connection_file}"]
    (spec / "kernel.json").write_text(
        json.dumps({"argv": argv, "display_name": "Python 3 (ipykernel)", "language": "python"}), encoding="utf-8"
    )
    (folder / "owner").write_text(str(os.getpid()))
    # A server has this environment: that of the test which starts it may mark processes that the test kills.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    (folder / "environment").write_text(json.dumps(environment), encoding="utf-8")
    os.environ[FOLDER] = str(folder)
    os.environ["JUPYTER_PATH"] = os.pathsep.join(filter(None, [str(folder), os.environ.get("JUPYTER_PATH")]))


def command(*words: str) -> list[str]:
    """What runs ``python -m WORDS`` in a fork of a server if there is one, and in a new Python otherwise."""
    return [sys.executable, *(["-I", "-S", __file__] if FOLDER in os.environ else ["-m"]), *words]


def ask(words: list[str]) -> int:
    """Run ``python -m WORDS`` in a fork of the module's server, which is started at the first call of a session.

    Returns:
        The exit status.
    """
    import fcntl

    request = json.dumps([words, os.getcwd(), dict(os.environ)]).encode()
    os.chdir(os.environ[FOLDER])  # the path of a socket may have 100 characters only
    log = Path(f"{words[0]}.log")
    with open(f"{words[0]}.lock", "w") as lock, socket.socket(socket.AF_UNIX) as server:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not os.path.exists(words[0]):
            environment = json.loads(Path("environment").read_text("utf-8"))
            with log.open("w") as file:
                subprocess.Popen(
                    [sys.executable, __file__, "--serve", words[0]], env=environment, start_new_session=True,
                    stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                )  # fmt: skip
            while not os.path.exists(words[0]):
                select.select([], [], [], 0.01)
        fcntl.flock(lock, fcntl.LOCK_UN)
        server.connect(words[0])
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: server.sendall(bytes([number])))
        socket.send_fds(server, [len(request).to_bytes(8, "big")], [0, 1, 2])
        server.sendall(request)
        if status := server.recv(1):
            return status[0]
    sys.exit(f"the server for {words[0]} ended:\n{log.read_text('utf-8')}")


def wanted() -> bool:
    """Whether the folder is there, and the process that offered it."""
    try:
        os.kill(int(Path("owner").read_text()), 0)
    except OSError:
        return False
    return True


def serve(module: str) -> None:
    """Fork for all who ask, as long as they may. Here is one thread only, or nothing could be forked."""
    found = sys.path[1:]  # the first is the folder of this file
    os.environ.setdefault("MPLBACKEND", "module://matplotlib_inline.backend_inline")  # as a kernel does
    before = dict(os.environ)
    forks: dict[int, socket.socket] = {}
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{module}.new")
        listener.listen()
        os.rename(f"{module}.new", module)
        for name in IMPORTS[module]:
            importlib.import_module(name)
        while wanted():
            ready, _, _ = select.select([listener, *forks.values()], [], [], 0.05)
            for pid, client in [*forks.items()]:
                if client in ready:
                    signals = b""
                    with contextlib.suppress(ConnectionResetError):
                        signals = client.recv(16)
                    for number in signals or [signal.SIGKILL]:
                        with contextlib.suppress(ProcessLookupError):
                            os.killpg(pid, number)
                    if not signals:
                        forks.pop(pid).close()
            with contextlib.suppress(ChildProcessError):
                while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                    if client := forks.pop(ended[0], None):
                        with client, contextlib.suppress(ConnectionError):
                            status = os.waitstatus_to_exitcode(ended[1])
                            client.sendall(bytes([status if status >= 0 else 128 - status]))
            if listener in ready:
                client, _ = listener.accept()
                head, descriptors, _, _ = socket.recv_fds(client, 8, 3)
                request = client.recv(int.from_bytes(head, "big"), socket.MSG_WAITALL)
                if pid := os.fork():
                    forks[pid] = client
                    with contextlib.suppress(PermissionError, ProcessLookupError):
                        os.setpgid(pid, pid)  # whichever of the two does it first: a signal may follow at once
                    for descriptor in descriptors:
                        os.close(descriptor)
                    continue
                for other in (client, *forks.values()):
                    other.close()
                break
        else:
            for pid in forks:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
            return
    words, folder, environment = json.loads(request)
    by_imports = {name: value for name, value in os.environ.items() if name not in before}
    run(words, folder, by_imports | environment, descriptors, found)


def run(words: list[str], folder: str, environment: dict[str, str], descriptors: list[int], found: list[str]) -> None:
    """Do in a fork what ``python -m WORDS`` does in a new process."""
    os.setpgid(0, 0)
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:] = [folder, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep)), *found]
    for name, seed in (("numpy", "random.seed"), ("torch", "seed")):
        if name in sys.modules:  # Python's own generator has another seed in every fork
            operator.attrgetter(seed)(sys.modules[name])()
    sys.argv = words
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    if sys.argv[1] != "--serve":
        sys.exit(ask(sys.argv[1:]))
    serve(sys.argv[2])
