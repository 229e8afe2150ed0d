"""One writer a folder: a lock file that says which process writes there.

The lock is ``lock.json`` in the folder, with the host, the process id and the start time of its holder. It is created
by ``O_EXCL``, so that only one of several processes can have it, and deleted at the end. A killed process leaves its
lock behind; the next command on the same host finds that the process is gone and takes the lock over. Whether a process
on another host still runs cannot be known, so such a lock is never taken over.
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
from typing import Any

import psutil  # comes with Accelerate

from regolite.errors import UserError, not_writable
from regolite.utils.progress import Status

NAME = "lock.json"
SECONDS = 5.0  # by which the start time of a process, as the system reports it, may vary with its clock
GRACE = 1.0  # seconds within which a new lock has its content
PATIENCE = 60.0  # seconds within which a stale lock is deleted


@contextmanager
def locked(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Hold the lock of a folder, which is created if necessary.

    Args:
        folder: the folder to write to.

    Raises:
        UserError: another process, or another thread of this one, writes to the folder; the message says which. Or the
            folder cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
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
            if held and _read(file) == ours:  # somebody may have deleted it, and another process locked the folder
                file.unlink()


def _this_process() -> bytes:
    """The content of a lock that this process holds."""
    process = psutil.Process()
    about = {"host": socket.gethostname(), "pid": process.pid, "started": process.create_time(), "since": time.time()}
    return json.dumps(about).encode()


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
        UserError: the process runs, or it may.
    """
    content = _read(file)
    if content is None:  # released since
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
    # Only who holds this second lock may delete a lock of this content: a slower process would delete the next one.
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


def _parse(content: bytes) -> dict[str, Any] | None:
    """Who holds a lock; None if its content is none of a lock."""
    kinds = {"host": str, "pid": int, "started": (int, float), "since": (int, float)}
    try:
        holder = json.loads(content)
    except (ValueError, RecursionError):
        return None
    is_whole = isinstance(holder, dict) and all(isinstance(holder.get(name), kind) for name, kind in kinds.items())
    return holder if is_whole else None


def _is_running(holder: dict[str, Any]) -> bool:
    """Whether the process of a lock runs on this host, and its id was not given to another one since."""
    try:
        process = psutil.Process(holder["pid"])
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - holder["started"]) < SECONDS
    except psutil.AccessDenied:
        return True
    except (psutil.NoSuchProcess, ValueError, OverflowError):
        return False


def _age(seconds: float) -> str:
    for unit, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.0f} {name} ago"
    return f"{max(seconds, 0):.0f} seconds ago"
