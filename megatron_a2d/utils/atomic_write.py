"""Atomic writes (temporary file, fsync, rename), and reads of small untrusted files."""

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
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_a2d.utils.errors import UserError
from megatron_a2d.utils.parsing import ParseError, decode, parse_json, parse_yaml
from megatron_a2d.utils.partial_files import make_empty, open_lock, partial_path, remove_abandoned

LARGEST_JSON = 2**28  # bytes; ten times the tokenizers and indices of the largest models
LARGEST_YAML = 2**18  # bytes; a hundred times a recipe, which PyYAML parses in four seconds

_LOCKS: list[Any] = []  # held until the process ends


def fsync_path(path: Path) -> None:
    """Flush a file's contents, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def regular(path: str | Path, flags: int) -> int:
    """Open a regular file (an `opener` for open()). OSError for a pipe, which would block forever, a device and a
    directory."""
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is a directory" if stat.S_ISDIR(mode) else "is not a regular file", str(path))
    return descriptor


@contextmanager
def new_file(path: str | Path, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path next to `path`; on success it is renamed to `path`, else removed.

    Not `durable`: without waiting for the disk. For a file that is verified before it is used after a crash.
    """
    path = Path(path)
    if kind := _irreplaceable_kind(path):
        raise UserError(f"{path}: is a {kind}, which a file must not replace; name a file")
    make_parent(path)
    partial = partial_path(path)
    make_empty(partial)
    try:
        yield partial
        if durable:
            fsync_path(partial)
        os.replace(partial, path)
        if durable:
            fsync_path(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def _irreplaceable_kind(path: Path) -> str:
    """The kind of `path` if a file must not replace it, else ''. Root could even replace /dev/null."""
    try:
        if path.is_symlink() and os.readlink(path).startswith("/proc/"):  # /dev/stdout
            return "stream of this process"
        mode = path.stat().st_mode
    except OSError:  # nothing there yet, or writing will report the error
        return ""
    return "" if stat.S_ISREG(mode) else "directory" if stat.S_ISDIR(mode) else "device or a pipe"


@contextmanager
def new_directory(path: str | Path, flag: str) -> Iterator[Path]:
    """Yield a new directory next to `path`; on success it is renamed to `path`, else removed.

    `flag` is the command-line name of `path`, for the error message if `path` already exists.
    """
    path = Path(path)
    check_new_directory(path, flag)
    make_directory(path.parent, f"{flag} {path}")
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
    """UserError if `path` already exists, unless as an empty directory, or cannot be made.

    A symbolic link (even a broken one) and a mount point cannot be replaced by a rename, so they are rejected here.
    """
    if path.is_symlink() or path.absolute().is_mount():  # "." is its own parent, as a mount point is
        kind = "symbolic link" if path.is_symlink() else "mount point"
        raise UserError(f"{flag} {path}: is a {kind}, which a rename cannot replace; name a new directory")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{flag} {path}: already exists and is not an empty directory; remove it or name another one")
    if problems := write_problems(path.parent, f"{flag} {path}"):
        raise UserError(problems)


def write_problems(directory: Path, where: str) -> list[str]:
    """Why no file can be made in `directory`, which need not exist yet: one line, or none. Leaves nothing behind.

    `where` is what the user gave: a flag and its value.
    """
    above = directory.absolute()
    try:
        while not os.path.lexists(above):
            above = above.parent
        if not above.is_dir():  # a broken link, too
            return [f"{where}: cannot be written ({above} is not a directory); name another path"]
        # Not os.access, which grants root anything, even in /proc.
        with tempfile.TemporaryFile(dir=above):
            return []
    except OSError as error:
        return [f"{where}: cannot be written below {above} ({error.strerror}); name another path"]


def make_directory(directory: Path, where: str) -> None:
    """Create `directory`; UserError if that fails or it is not writable. `where`: as for `write_problems`."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not os.access(directory, os.W_OK):
            raise PermissionError(errno.EACCES, "no permission to write there")
    except OSError as error:
        raise UserError(f"{where}: cannot be written ({error.strerror}); name another path") from None


def make_parent(path: Path) -> None:
    """Create the parent directory of the file `path`; UserError if that fails or the directory is not writable."""
    make_directory(path.parent, str(path))


def hold_directory(path: str | Path, flag: str) -> None:
    """Lock the directory `path` until this process ends; UserError if another process on this machine has it locked."""
    path = Path(path)
    make_directory(path, f"{flag} {path}")
    file = open_lock(path / ".lock")  # closed, and so released, when the process ends
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip() or "another process"
        file.close()
        raise UserError(f"{flag} {path}: {owner} is writing there; wait for it, or name another directory") from None
    except OSError:
        return  # the file system has no locks
    file.seek(0)
    file.truncate()
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    _LOCKS.append(file)


def read_json(path: str | Path, what: str, allow_nonfinite: bool = False) -> dict[str, Any]:
    """The JSON object in the file `path`; `what` says in error messages what the file is.

    `allow_nonfinite`: results may hold NaN, such as the standard error of a single sample.
    """
    content = _read(path, f"{path}: {what}")
    if not content.strip():
        raise UserError(f"{path}: {what} is empty; fetch or write it again")
    try:
        value = parse_json(content, allow_nonfinite)
    except ParseError as error:
        raise UserError(f"{path}: {what} is not valid JSON ({error}); fetch or write it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: {what} holds a JSON {type(value).__name__}, not an object; fetch it again")
    return value


def read_yaml(path: str | Path, where: str, aliases: bool = False) -> dict[str, Any]:
    """The YAML mapping in `path`, a file or a shell's pipe; errors start with `where` (a flag and its value).

    `aliases`: as for `parse_yaml`.
    """
    try:
        content = _read(path, f"{where}:", limit=LARGEST_YAML, only_files=not is_shell_pipe(path))
        value = parse_yaml(content, aliases)
    except ParseError as error:
        raise UserError(f"{where}: is not valid YAML ({error}); correct the file") from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: holds no settings; write lines of the form `name: value`")
    return value


def read_text(path: str | Path, what: str, limit: int | None = None) -> str:
    """The UTF-8 text of the file `path`, at most `limit` bytes; `what` says in error messages what the file is."""
    try:
        return decode(_read(path, f"{path}: {what}", limit=limit or LARGEST_JSON))
    except ParseError as error:
        raise UserError(f"{path}: {what} is {error}; fetch or write it again") from None


def is_shell_pipe(path: str | Path) -> bool:
    """Whether `path` is a pipe made by a shell (`--config <(command)`), which has a writer."""
    return str(path).startswith(("/dev/fd/", "/dev/stdin", "/proc/self/fd/"))


def _read(path: str | Path, where: str, limit: int = LARGEST_JSON, only_files: bool = True) -> bytes:
    """The bytes of a file. `only_files` rejects pipes and devices, on which a read could block forever."""
    try:
        if only_files and not stat.S_ISREG(os.stat(path).st_mode):
            raise UserError(f"{where} is not a regular file; check the path")
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
    """`value` with None in place of infinities and NaNs, which JSON cannot represent."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with new_file(path) as partial:
        partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
