"""The error for invalid input, and what its messages have in common."""

from __future__ import annotations

import difflib
import errno
import os
from collections.abc import Iterable


class UserError(ValueError):
    """Invalid input. Its one-line message says what is wrong and how to fix it.

    The command line prints the message without a traceback and exits with code 2.
    """


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the closest known one, or all of them."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(known)}"


def advice(error: OSError) -> str:
    """How to fix a file system error."""
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None)):
        return "free some space or write elsewhere"
    if error.errno == errno.EROFS:
        return "the file system is read-only: write elsewhere, or mount it for writing"
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return "a part of the path is a file: give another path"
    if error.errno == errno.EISDIR:
        return "it is a folder: move it away, or write elsewhere"
    if error.errno == errno.ENAMETOOLONG:
        return "give a shorter path"
    if error.errno in (errno.EACCES, errno.EPERM):
        return "change its permissions, or write elsewhere"
    return "check the path and its permissions"


def not_writable(error: OSError, path: str | os.PathLike[str]) -> UserError:
    """The error for a path that cannot be written. It names the path stored in ``error`` if there is one."""
    return UserError(f"{error.filename or path}: {error.strerror or error}; {advice(error)}")
