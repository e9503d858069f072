"""A large output directory whose writing may be interrupted and taken up again by the same command.

Everything is written into `.NAME.partial` beside the final name. A file that is complete gets a line in a journal, with
its checksum; the next run of the same command keeps the files whose checksums are right (what was not yet on the disk
when the power failed is not) and writes the others. What "the same" means is the `identity`, a dictionary that names
the sources and the options: with another one the work starts anew.
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
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

from megatron_a2d.conversion.workers import run_jobs
from megatron_a2d.terminal.console import console, progress
from megatron_a2d.utils.atomic_write import check_new_directory, fsync_path, make_parent, regular
from megatron_a2d.utils.errors import UserError
from megatron_a2d.utils.parsing import ParseError, parse_json
from megatron_a2d.utils.partial_files import open_lock

JOURNAL = ".journal"
_BLOCK = 1 << 20
_CHECKERS = 4  # threads


class Unfinished:
    """`directory` is where to write; `done` says what earlier runs recorded of their complete files."""

    def __init__(self, directory: Path, journal: Any, done: dict[str, dict[str, Any]]):
        self.directory, self.done = directory, done
        self.may_keep: Callable[[], bool] = lambda: True
        """False once something is found for which the work will be refused; nothing more is then kept."""
        self._journal, self._lock = journal, threading.Lock()

    def record(self, name: str, facts: dict[str, Any]) -> None:
        """The file `name`, relative to the directory, is complete; `facts` holds its "crc32" or its "sha256".

        Safe from several threads.
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
def unfinished_directory(path: Path, flag: str, identity: dict[str, Any]) -> Iterator[Unfinished]:
    """Yield the work on `path`; on success it gets its name, after a UserError it is removed, after anything else
    (a signal, a full disk) it is kept for the next run. `flag` is the command-line name of `path`.
    """
    path = Path(path)
    check_new_directory(path, flag)
    make_parent(path)
    place, partial = path.absolute(), _partial(path)  # absolute, because "." cannot be removed under that name
    if partial.is_symlink() or (partial.exists() and not partial.is_dir()):
        raise UserError(f"{flag} {path}: {partial} is in the way and is no directory of its own; remove it")
    partial.mkdir(exist_ok=True)
    with open_lock(partial / JOURNAL) as journal:
        try:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{flag} {path}: another process is writing it; wait, or name another directory") from None
        except OSError:
            pass  # a file system without locks
        work = Unfinished(partial, journal, _take_up(partial, journal, json.loads(json.dumps(identity))))
        if work.done:
            console.print(f"{path}: continues an interrupted run, {len(work.done)} files are complete")
        try:
            yield work
            for entry in partial.rglob("*"):
                fsync_path(entry)
            # Not before: flushing takes minutes, and an interruption then must not cost everything.
            (partial / JOURNAL).unlink()
            if path.exists():
                place.rmdir()
            os.rename(partial, place)
            fsync_path(place.parent)
        except UserError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise UserError([problem.replace(str(partial), str(path)) for problem in error.problems]) from error
        except BaseException as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                console.print(f"{flag} {path}: the disk is full; make room")
            if work.done:
                console.print(f"{partial}: holds {len(work.done)} complete files; the same command continues there")
            else:
                shutil.rmtree(partial, ignore_errors=True)
            raise


def size_of_unfinished(path: Path) -> int:
    """The bytes that an interrupted run left for `path`."""
    return sum(entry.stat().st_size for entry in _partial(path).rglob("*") if entry.is_file())


def _partial(path: Path) -> Path:
    return Path(path).absolute().with_name(f".{Path(path).name}.partial")


def _take_up(partial: Path, journal: Any, identity: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The complete files of an earlier run of the same work; all else in `partial` is removed.

    A link is no file of ours, whoever put it there: it is removed, and nothing is written through it.
    """
    for path in partial.rglob("*"):
        if path.is_symlink():
            path.unlink()
    journal.seek(0)
    lines = [_parse(line) for line in journal]
    done: dict[str, dict[str, Any]] = {}
    if lines and lines[0] == {"identity": identity}:
        whole = [
            line for line in lines[1:]
            if _is_inside(partial, line.get("file")) and isinstance(line.get("facts"), dict)
        ]  # fmt: skip
        with progress("checking what is there", sum(_size(partial / line["file"]) for line in whole), "B") as advance:
            jobs = [functools.partial(_is_intact, partial / line["file"], line["facts"]) for line in whole]
            intact = run_jobs(jobs, _CHECKERS, advance)
        done = {line["file"]: line["facts"] for line, good in zip(whole, intact, strict=True) if good}
    elif lines:
        console.print(f"{partial}: is of another source or other options; starting anew")
    for path in sorted(partial.rglob("*"), reverse=True):
        if path.is_dir():
            if not any(path.iterdir()):
                path.rmdir()
        elif path.name != JOURNAL and path.relative_to(partial).as_posix() not in done:
            path.unlink()
    # Written anew: a last line that was cut short would swallow the next one.
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
    except OSError:  # a name that is too long
        return False


def _is_intact(path: Path, facts: dict[str, Any], advance: Callable[[float], None]) -> bool:
    crc, sha = 0, hashlib.sha256()
    with open(path, "rb", opener=regular) as file:
        while block := file.read(_BLOCK):
            if "sha256" in facts:
                sha.update(block)
            else:
                crc = zlib.crc32(block, crc)
            advance(len(block))
    return facts["sha256"] == sha.hexdigest() if "sha256" in facts else facts.get("crc32") == f"{crc:08x}"


def _size(path: Path) -> int:
    return path.stat().st_size


def _parse(line: str) -> dict[str, Any]:
    try:
        value = parse_json(line)
    except ParseError:
        return {}
    return value if isinstance(value, dict) else {}


def describe_files(directory: Path) -> list[list[Any]]:
    """Names, sizes and times of change of all files: what tells that a source is still the same."""
    files = sorted(path for path in Path(directory).rglob("*") if path.is_file())
    return [[path.relative_to(directory).as_posix(), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
