"""Partial files: their names, locks, and the removal of those that killed processes left behind.

The name of a partial file contains host and process id. On the same host it is removed once the process is gone;
one of another host only if nothing in it has changed for an hour.
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

YOUNG = 3600.0  # seconds since the last modification


def partial_path(path: Path) -> Path:
    """The temporary path where this process writes `path`: .NAME.partial-HOST-PROCESS next to it."""
    return path.with_name(f".{path.name}.partial-{_host()}-{os.getpid()}")


def remove_abandoned(root: Path, pattern: str, besides: Path | None = None) -> list[str]:
    """Remove partial files in `root` (except `besides`) whose writer is gone; returns one line per file kept."""
    left = []
    for partial in root.glob(pattern):
        if partial == besides:
            continue
        try:
            if not partial.is_symlink() and partial.is_dir():
                if host := _writer(partial):
                    left.append(
                        f"{partial}: {host} is writing it, or was less than an hour ago; it is kept, and removed "
                        "once nothing in it has changed for an hour"
                    )
                else:
                    shutil.rmtree(partial, ignore_errors=True)
            elif partial.is_symlink() or not _writer(partial):
                partial.unlink()  # the link, not what it points to
        except FileNotFoundError:  # renamed or removed in the meantime
            continue
    return left


def _writer(partial: Path) -> str | None:
    """The process that may still be writing it, or None; names by earlier versions contain no host."""
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
    """Open the file `path`, created if missing, for locking, reading and writing. UserError for a symbolic link and
    anything else but a regular file, so that no other file can be truncated through it."""
    return _open_own(path, os.O_RDWR, "r+", "a lock")


def open_log(path: Path) -> IO[str]:
    """Open the file `path`, created if missing, for appending; UserError as for `open_lock`."""
    return _open_own(path, os.O_WRONLY | os.O_APPEND, "a", "a log")


def _open_own(path: Path, flags: int, mode: str, what: str) -> IO[str]:
    try:
        descriptor = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        reason = "is a symbolic link" if path.is_symlink() else f"cannot be opened ({error.strerror})"
        raise UserError(f"{path}: {reason}, and {what} must be a regular file; remove it") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"{path}: is not a regular file, and {what} must be one; remove it")
    return os.fdopen(descriptor, mode, encoding="utf-8", errors="replace")


def make_empty(partial: Path) -> None:
    """Create the file `partial`, removing an older one; a symbolic link of that name is not followed."""
    partial.unlink(missing_ok=True)
    os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666))
