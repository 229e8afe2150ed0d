"""Lock files: one writer per folder.

The lock is ``lock.json`` in the folder, with the host, the process id and the start time of its holder. It is created
with ``O_EXCL``, which succeeds in one process only, and deleted at the end. A killed process leaves its lock behind;
the next command on the same host finds that the process no longer runs and takes over the lock. A lock from another
host is never taken over, since its process may still run.
"""

from __future__ import annotations

import json
import os
import socket
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypedDict

import psutil  # a dependency of Accelerate

from regolite.errors import UserError, not_writable
from regolite.utils.progress import Status

NAME = "lock.json"
TOLERANCE = 5.0  # seconds by which the reported start time of a process may vary with the system clock
GRACE = 1.0  # seconds within which a new lock file has its content
PATIENCE = 60.0  # seconds within which a stale lock is deleted


class Holder(TypedDict):
    """The content of a lock file: the process that holds the lock."""

    host: str
    pid: int
    started: float
    since: float


@contextmanager
def locked(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Hold the lock of a folder, which is created if necessary.

    Args:
        folder: the folder to write to.

    Raises:
        UserError: another process, or another thread of this one, writes to the folder (the message names it), or the
            folder cannot be written.
    """
    folder = Path(folder)
    if os.path.isfile(folder):
        raise UserError(f"{folder} is a file; give a folder")
    file, ours, held = folder / NAME, _this_process(), False
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            while not (held := _create(file, ours)):
                _remove_stale(file)
        except OSError as error:
            raise not_writable(error, folder) from error
        yield
    finally:
        with suppress(OSError):
            if held and _read(file) == ours:  # it may have been deleted, and the folder locked by another process
                file.unlink()


def _this_process() -> bytes:
    """The content of a lock that this process holds."""
    process = psutil.Process()
    holder = Holder(host=socket.gethostname(), pid=process.pid, started=process.create_time(), since=time.time())
    return json.dumps(holder).encode()


def _create(file: Path, content: bytes) -> bool:
    """Create the lock file; False if it exists."""
    try:
        descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    try:
        with open(descriptor, "wb") as out:
            out.write(content)
    except OSError:  # a full disk
        file.unlink(missing_ok=True)
        raise
    return True


def _remove_stale(file: Path) -> None:
    """Remove the lock of a process that no longer runs.

    Raises:
        UserError: the process runs, or may run.
    """
    content = _read(file)
    if content is None:  # released in the meantime
        return
    holder = _parse(content)
    if holder is None:  # just created, or left empty by a power failure
        time.sleep(GRACE)
        if _read(file) != content:
            return
        who = "an unknown process"
    else:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder["since"]))
        who = f"process {holder['pid']} on {holder['host']}, since {since} ({_age(time.time() - holder['since'])})"
        if holder["host"] != socket.gethostname():
            raise UserError(
                f"{file.parent} is locked by {who}: wait until it ends, or give another folder. If that process no "
                f"longer runs, delete {file}"
            )
        if _is_running(holder):
            raise UserError(f"{file.parent} is locked by {who}: wait until it ends, stop it, or give another folder")
    # A second lock guards the deletion: a slower process would delete the lock of the next holder.
    guard = file.with_name(f".{NAME}.{zlib.crc32(content)}.tmp")
    if not _create(guard, b""):
        with suppress(FileNotFoundError):
            if time.time() - guard.stat().st_mtime > PATIENCE:  # its holder was killed
                guard.unlink()
        time.sleep(0.05)
        return
    try:
        if _read(file) == content:
            file.unlink()
            Status.say(f"{file.parent} was locked by {who}, which no longer runs: its lock is taken over")
    finally:
        guard.unlink(missing_ok=True)


def _read(file: Path) -> bytes | None:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return None


def _parse(content: bytes) -> Holder | None:
    """The holder of a lock; None for any other content."""
    kinds: dict[str, tuple[type, ...]] = {"host": (str,), "pid": (int,), "started": (int, float), "since": (int, float)}
    try:
        holder = json.loads(content)
    except (ValueError, RecursionError):
        return None
    is_valid = isinstance(holder, dict) and all(isinstance(holder.get(name), kind) for name, kind in kinds.items())
    return holder if is_valid else None


def _is_running(holder: Holder) -> bool:
    """Whether the holder runs on this host; its process id may have been reused since."""
    try:
        process = psutil.Process(holder["pid"])
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - holder["started"]) < TOLERANCE
    except psutil.AccessDenied:
        return True
    except (psutil.NoSuchProcess, ValueError, OverflowError):
        return False


def _age(seconds: float) -> str:
    for unit, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.0f} {name} ago"
    return f"{max(seconds, 0):.0f} seconds ago"
