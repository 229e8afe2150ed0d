"""The one error for wrong input."""

from __future__ import annotations

import errno
import os


class UserError(ValueError):
    """Wrong input: its message is one line that names the thing and the mend.

    The command line prints it without a traceback and exits with code 2.
    """


def advice(error: OSError) -> str:
    """How to fix what the system says about a file."""
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
    """The error of a path that cannot be written; the path of ``error`` itself is named where it has one."""
    return UserError(f"{error.filename or path}: {error.strerror or error}; {advice(error)}")
