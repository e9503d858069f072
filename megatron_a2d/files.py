"""Output that appears whole or not at all: write beside the final name, flush to disk, rename."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_a2d.errors import UserError

_HELD: list[Any] = []  # locks


def fsync_path(path: Path) -> None:
    """Flush a file's contents, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def new_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is renamed to `path`, else removed."""
    path = Path(path)
    make_parent(path)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        yield partial
        fsync_path(partial)
        os.replace(partial, path)
        fsync_path(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def new_directory(path: str | Path, flag: str) -> Iterator[Path]:
    """Yield a fresh directory beside `path`; on success it is renamed to `path`, else removed.

    `flag` is the command-line name of `path`, for the message when something is already there.
    """
    path = Path(path)
    check_new_directory(path, flag)
    make_parent(path)
    _remove_abandoned(path)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    partial.mkdir()
    try:
        yield partial
        for entry in partial.rglob("*"):
            fsync_path(entry)
        if path.exists():
            path.rmdir()
        os.rename(partial, path)
        fsync_path(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_new_directory(path: Path, flag: str) -> None:
    """UserError when something is at `path` already; an empty directory does no harm.

    A link (even one to nothing) and a mount point cannot be replaced by a rename: better said at the beginning.
    """
    if path.is_symlink() or path.absolute().is_mount():  # "." is its own parent, as a mount point is
        kind = "symbolic link" if path.is_symlink() else "mount point"
        raise UserError(f"{flag} {path}: is a {kind}, and the result is put in place by a rename; name a new directory")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{flag} {path}: already exists and is not an empty directory; remove it or name another one")


def make_parent(path: Path) -> None:
    """Make the directory that `path` lies in; UserError when that cannot be, or nothing can be written there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(errno.EACCES, "no permission to write there")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); name another place") from None


def _remove_abandoned(path: Path) -> None:
    """Remove what processes that were killed left beside `path`."""
    for partial in path.parent.glob(f".{path.name}.partial-*"):
        owner = partial.name.rpartition("-")[2]
        if not owner.isdigit() or int(owner) == os.getpid() or not Path(f"/proc/{owner}").exists():
            shutil.rmtree(partial, ignore_errors=True)


def hold_directory(path: str | Path, flag: str) -> None:
    """Keep `path` for this process until it ends; UserError if another one on this machine holds it."""
    path = Path(path)
    make_parent(path / "x")
    file = open(path / ".lock", "a+")  # noqa: SIM115  (closed, and with it released, by the end of the process)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip() or "another process"
        file.close()
        raise UserError(f"{flag} {path}: {owner} is writing there; wait for it, or name another directory") from None
    except OSError:
        return  # a file system without locks
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    _HELD.append(file)


def read_json(path: str | Path, what: str) -> dict[str, Any]:
    """The JSON object in `path`; `what` names its role in error messages."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: {what} is missing; check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {what} cannot be read ({error}); check the file") from None
    if not text.strip():
        raise UserError(f"{path}: {what} is empty; fetch or write it again")
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: {what} is not valid JSON ({error}); fetch or write it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: {what} holds a JSON {type(value).__name__}, not an object; fetch it again")
    return value


def finite(value: Any) -> Any:
    """`value` with None for infinities and what is not a number: JSON has no words for them."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with new_file(path) as partial:
        partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
