"""Resumable output directories: an interrupted conversion is resumed by the same command.

Files are written to `.NAME.partial` next to the final name. Each complete file is recorded in a journal with its
checksum; the next run of the same command keeps the files whose checksums match (a power failure may have lost data
not yet on disk) and writes the others. Two commands are the same if their `identity` is, a dictionary of the sources
and options; with another identity writing starts from scratch.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

from megatron_a2d.checkpoint.manifest import ALGORITHMS, Hasher
from megatron_a2d.conversion.workers import run_jobs
from megatron_a2d.terminal.console import console, progress
from megatron_a2d.utils.atomic_write import check_new_directory, fsync_path, make_directory, regular
from megatron_a2d.utils.errors import UserError
from megatron_a2d.utils.parsing import ParseError, parse_json
from megatron_a2d.utils.partial_files import open_lock

JOURNAL = ".journal"
_IO_CHUNK = 1 << 20
_CHECKERS = 4  # threads
# Checksums by their key in the journal.
_HASHERS: dict[str, Callable[[], Hasher]] = {
    "sha256": hashlib.sha256,
    **{name: hasher for name, (_, hasher) in ALGORITHMS.items()},
}


class ResumableOutput:
    """The output being written. `directory`: where to write; `done`: complete file -> what was recorded about it."""

    def __init__(self, directory: Path, journal: Any, done: dict[str, dict[str, Any]]):
        self.directory, self.done = directory, done
        self.may_keep: Callable[[], bool] = lambda: True
        """False once the output is known to be rejected; no further file is recorded then."""
        self._journal, self._lock = journal, threading.Lock()

    def record(self, name: str, facts: dict[str, Any]) -> None:
        """Record the file `name`, relative to the directory, as complete; `facts` holds one of _HASHERS.

        Thread-safe.
        """
        with self._lock:
            self.done[name] = facts
            if not self.may_keep():
                return
            self._journal.write(json.dumps({"file": name, "facts": facts}) + "\n")
            self._journal.flush()

    def num_bytes_done(self) -> int:
        return sum((self.directory / name).stat().st_size for name in self.done)


@contextmanager
def resumable_directory(path: Path, flag: str, identity: dict[str, Any]) -> Iterator[ResumableOutput]:
    """Yield the output that is to become `path`: renamed on success, removed after a UserError, kept for the next run
    after anything else (a signal, a full disk). `flag` is the command-line name of `path`.
    """
    path = Path(path)
    check_new_directory(path, flag)
    make_directory(path.parent, f"{flag} {path}")
    final, partial = path.absolute(), _partial(path)  # absolute, because rmdir(".") fails
    if partial.is_symlink() or (partial.exists() and not partial.is_dir()):
        raise UserError(f"{flag} {path}: {partial} exists and is not a directory of its own; remove it")
    partial.mkdir(exist_ok=True)
    with open_lock(partial / JOURNAL) as journal:
        try:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{flag} {path}: another process is writing it; wait, or choose another directory"
            ) from None
        except OSError:
            pass  # the file system has no locks
        work = ResumableOutput(partial, journal, _resume(partial, journal, json.loads(json.dumps(identity))))
        if work.done:
            console.print(f"{path}: resuming an interrupted run, {len(work.done)} files are complete")
        try:
            yield work
            for entry in partial.rglob("*"):
                fsync_path(entry)
            # Only now: flushing takes minutes, and until it is done the run must stay resumable.
            (partial / JOURNAL).unlink()
            if path.exists():
                final.rmdir()
            os.rename(partial, final)
            fsync_path(final.parent)
        except UserError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise UserError([problem.replace(str(partial), str(path)) for problem in error.problems]) from error
        except BaseException as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                console.print(f"{flag} {path}: the disk is full; free some space")
            if work.done:
                console.print(f"{partial}: holds {len(work.done)} complete files; run the same command again to resume")
            else:
                shutil.rmtree(partial, ignore_errors=True)
            raise


def num_bytes_written(path: Path) -> int:
    """The bytes that an interrupted run has already written for `path`."""
    return sum(entry.stat().st_size for entry in _partial(path).rglob("*") if entry.is_file())


def _partial(path: Path) -> Path:
    return Path(path).absolute().with_name(f".{Path(path).name}.partial")


def _resume(partial: Path, journal: Any, identity: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The intact files of an earlier run with the same identity; everything else in `partial` is removed.

    Symbolic links are removed too, whoever made them, so that nothing is written through one.
    """
    for path in partial.rglob("*"):
        if path.is_symlink():
            path.unlink()
    journal.seek(0)
    lines = [_parse(line) for line in journal]
    done: dict[str, dict[str, Any]] = {}
    if lines and lines[0] == {"identity": identity}:
        recorded = [
            line for line in lines[1:]
            if _is_inside(partial, line.get("file")) and isinstance(line.get("facts"), dict)
        ]  # fmt: skip
        with progress("checking files", sum(_size(partial / line["file"]) for line in recorded), "B") as advance:
            jobs = [functools.partial(_is_intact, partial / line["file"], line["facts"]) for line in recorded]
            intact = run_jobs(jobs, _CHECKERS, advance)
        done = {line["file"]: line["facts"] for line, good in zip(recorded, intact, strict=True) if good}
    elif lines:
        console.print(f"{partial}: has another source or other options; starting from scratch")
    for path in sorted(partial.rglob("*"), reverse=True):
        if path.is_dir():
            if not any(path.iterdir()):
                path.rmdir()
        elif path.name != JOURNAL and path.relative_to(partial).as_posix() not in done:
            path.unlink()
    # Rewritten: the next line would be appended to a truncated last one.
    journal.seek(0)
    journal.truncate()
    kept: list[dict[str, Any]] = [{"file": name, "facts": facts} for name, facts in done.items()]
    for entry in [{"identity": identity}, *kept]:
        journal.write(json.dumps(entry) + "\n")
    journal.flush()
    return done


def _is_inside(partial: Path, name: Any) -> bool:
    if not isinstance(name, str) or PurePath(name).is_absolute() or ".." in PurePath(name).parts:
        return False
    try:
        return (partial / name).is_file()
    except OSError:  # the name is too long
        return False


def _is_intact(path: Path, facts: dict[str, Any], advance: Callable[[float], None]) -> bool:
    algorithm = next((name for name in _HASHERS if name in facts), None)
    if algorithm is None:
        return False
    hasher = _HASHERS[algorithm]()
    with open(path, "rb", opener=regular) as file:
        while chunk := file.read(_IO_CHUNK):
            hasher.update(chunk)
            advance(len(chunk))
    return bool(facts[algorithm] == hasher.hexdigest())


def _size(path: Path) -> int:
    return path.stat().st_size


def _parse(line: str) -> dict[str, Any]:
    try:
        value = parse_json(line)
    except ParseError:
        return {}
    return value if isinstance(value, dict) else {}


def describe_files(directory: Path) -> list[list[Any]]:
    """Name, size and modification time of every file: the identity of an unchanged source."""
    files = sorted(path for path in Path(directory).rglob("*") if path.is_file())
    return [[path.relative_to(directory).as_posix(), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
