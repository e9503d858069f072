"""What is being written, and by whom: names of unfinished files, locks, and what killed processes have left.

A partial's name holds host and process. On its own host one can see whether the process lives; what another host
writes is left alone until nothing in it has changed for an hour.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import stat
import time
from pathlib import Path
from typing import IO

from megatron_a2d.utils.errors import UserError

YOUNG = 3600.0  # seconds since the last change


def partial_path(path: Path) -> Path:
    """Where this process writes what will be `path`: .NAME.partial-HOST-PROCESS beside it."""
    return path.with_name(f".{path.name}.partial-{_host()}-{os.getpid()}")


def remove_abandoned(root: Path, pattern: str, besides: Path | None = None) -> list[str]:
    """Remove the partials in `root`, `besides` one, that nobody writes any more; a line for each that may still be."""
    left = []
    for partial in root.glob(pattern):
        if partial == besides:
            continue
        try:
            if not partial.is_symlink() and partial.is_dir():
                if host := _writer(partial):
                    left.append(
                        f"{partial}: {host} writes there, or did less than an hour ago; it is left alone, and removed "
                        "when nothing in it has changed for an hour"
                    )
                else:
                    shutil.rmtree(partial, ignore_errors=True)
            elif partial.is_symlink() or not _writer(partial):
                partial.unlink()  # the link, not what it points to
        except FileNotFoundError:  # finished, or removed, in the meantime
            continue
    return left


def _writer(partial: Path) -> str | None:
    """Who may still be writing it; nobody where no host is named, as earlier versions did not."""
    named = re.search(r"\.partial-(.+)-(\d+)$", partial.name)
    if not named:
        return None
    host, process = named[1], int(named[2])
    if host == _host() and (process == os.getpid() or not Path(f"/proc/{process}").exists()):
        return None
    now = time.time()
    age = min((now - entry.lstat().st_mtime for entry in (partial, *partial.rglob("*"))), default=YOUNG)
    return f"process {process} on {host}" if age < YOUNG else None


def _host() -> str:
    return re.sub(r"[^\w.-]", "_", socket.gethostname())


def open_lock(path: Path) -> IO[str]:
    """The file `path`, made if it is not there, to lock, read and write. UserError for a link or any other thing that
    bears the name: what it leads to must not be emptied."""
    return _open_own(path, os.O_RDWR, "r+", "a lock")


def open_log(path: Path) -> IO[str]:
    """The file `path`, made if it is not there, to write at its end; UserError as for a lock."""
    return _open_own(path, os.O_WRONLY | os.O_APPEND, "a", "what is written there")


def _open_own(path: Path, flags: int, mode: str, what: str) -> IO[str]:
    try:
        descriptor = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        reason = "is a symbolic link" if path.is_symlink() else f"cannot be opened ({error.strerror})"
        raise UserError(f"{path}: {reason}, and {what} must be a file of its own; remove it") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"{path}: is no regular file, and {what} must be one; remove it")
    return os.fdopen(descriptor, mode, encoding="utf-8", errors="replace")


def make_empty(partial: Path) -> None:
    """Make the file `partial`, which must be a new one: a link that somebody has put there is not followed."""
    partial.unlink(missing_ok=True)
    os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666))
