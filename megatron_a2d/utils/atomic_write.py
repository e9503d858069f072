"""Output that appears whole or not at all: write beside the final name, flush to disk, rename."""

from __future__ import annotations

import errno
import fcntl
import glob
import json
import math
import os
import shutil
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_a2d.utils.errors import UserError
from megatron_a2d.utils.parsing import ParseError, decode, parse_json, parse_yaml
from megatron_a2d.utils.partial_files import make_empty, open_lock, partial_path, remove_abandoned

LARGEST_JSON = 2**28  # bytes; the tokenizers and indices of the largest models take a tenth
LARGEST_YAML = 2**18  # bytes; a recipe takes a hundredth, and the library four seconds for all of it

_HELD: list[Any] = []  # locks


def fsync_path(path: Path) -> None:
    """Flush a file's contents, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def regular(path: str | Path, flags: int) -> int:
    """Open a file that must be one (an `opener` of open()); OSError for a pipe, which would be waited for without end,
    a device and a directory."""
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is no regular file", str(path))
    return descriptor


@contextmanager
def new_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is renamed to `path`, else removed."""
    path = Path(path)
    if kind := _is_no_place(path):
        raise UserError(f"{path}: is a {kind}, and a file is to be written; name a file")
    make_parent(path)
    partial = partial_path(path)
    make_empty(partial)
    try:
        yield partial
        fsync_path(partial)
        os.replace(partial, path)
        fsync_path(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def _is_no_place(path: Path) -> str:
    """What `path` is that must not be replaced by a file, or ''. Whoever is root may replace /dev/null too."""
    try:
        if path.is_symlink() and os.readlink(path).startswith("/proc/"):  # /dev/stdout
            return "stream of this process"
        mode = path.stat().st_mode
    except OSError:  # nothing is there yet, or the writing says what is wrong
        return ""
    return "" if stat.S_ISREG(mode) else "directory" if stat.S_ISDIR(mode) else "device or a pipe"


@contextmanager
def new_directory(path: str | Path, flag: str) -> Iterator[Path]:
    """Yield a fresh directory beside `path`; on success it is renamed to `path`, else removed.

    `flag` is the command-line name of `path`, for the message when something is already there.
    """
    path = Path(path)
    check_new_directory(path, flag)
    make_parent(path)
    remove_abandoned(path.parent, f".{glob.escape(path.name)}.partial-*")
    partial = partial_path(path)
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


def hold_directory(path: str | Path, flag: str) -> None:
    """Keep `path` for this process until it ends; UserError if another one on this machine holds it."""
    path = Path(path)
    make_parent(path / "x")
    file = open_lock(path / ".lock")  # closed, and with it released, by the end of the process
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip() or "another process"
        file.close()
        raise UserError(f"{flag} {path}: {owner} is writing there; wait for it, or name another directory") from None
    except OSError:
        return  # a file system without locks
    file.seek(0)
    file.truncate()
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    _HELD.append(file)


def read_json(path: str | Path, what: str) -> dict[str, Any]:
    """The JSON object in the file `path`; `what` names its role in error messages."""
    content = _read(path, f"{path}: {what}")
    if not content.strip():
        raise UserError(f"{path}: {what} is empty; fetch or write it again")
    try:
        value = parse_json(content)
    except ParseError as error:
        raise UserError(f"{path}: {what} is not valid JSON ({error}); fetch or write it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: {what} holds a JSON {type(value).__name__}, not an object; fetch it again")
    return value


def read_yaml(path: str | Path, where: str) -> dict[str, Any]:
    """The YAML mapping in `path`, a file or a shell's pipe; `where` (a flag and its value) begins error messages."""
    try:
        value = parse_yaml(_read(path, f"{where}:", limit=LARGEST_YAML, only_files=not is_shell_pipe(path)))
    except ParseError as error:
        raise UserError(f"{where}: is not valid YAML ({error}); correct the file") from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: holds no settings; write lines of the form `name: value`")
    return value


def read_text(path: str | Path, what: str, limit: int | None = None) -> str:
    """The UTF-8 text of the file `path`, of at most `limit` bytes; `what` names its role in error messages."""
    try:
        return decode(_read(path, f"{path}: {what}", limit=limit or LARGEST_JSON))
    except ParseError as error:
        raise UserError(f"{path}: {what} is {error}; fetch or write it again") from None


def is_shell_pipe(path: str | Path) -> bool:
    """Whether a shell made it for `--config <(command)`: somebody writes there."""
    return str(path).startswith(("/dev/fd/", "/dev/stdin", "/proc/self/fd/"))


def _read(path: str | Path, where: str, limit: int = LARGEST_JSON, only_files: bool = True) -> bytes:
    """A file's bytes. A pipe or a device inside somebody's directory would be waited for without end."""
    try:
        if only_files and not stat.S_ISREG(os.stat(path).st_mode):
            raise UserError(f"{where} is no regular file; check the path")
        with open(path, "rb") as file:
            content = file.read(limit + 1)
    except FileNotFoundError:
        raise UserError(f"{where} is missing; check the path") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{where} cannot be read ({reason}); check the path") from None
    if len(content) > limit:
        raise UserError(f"{where} is larger than {limit >> 10:,} KiB; check that it is the right file")
    return content


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
