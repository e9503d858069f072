"""The files of a corpus: every file of `--input` is read, refused, or reported as skipped with the reason."""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from data_prep.formats import READERS
from megatron_a2d.terminal.console import console
from megatron_a2d.utils.errors import UserError

_JSON_LINES = (".jsonl", ".ndjson")
_COMPRESSED = {".gz": ".gz", ".zst": ".zst", ".zstd": ".zst"}
SHOWN = 10
Identity = tuple[int, int]  # device and inode: one file, whatever it is called


class Inputs(NamedTuple):
    """The corpus files that were found, and those that were skipped."""

    paths: list[Path]  # the files to read
    passed_over: list[str]  # the others below a directory: "path: reason"

    def show_passed_over(self) -> None:
        """Print the first skipped files, one per line."""
        for line in self.passed_over[:SHOWN]:
            console.print(f"skipped: {line}", markup=False, soft_wrap=True)
        if (more := len(self.passed_over) - SHOWN) > 0:
            console.print(f"skipped: {more:,} more files", markup=False, soft_wrap=True)


def kind_of(path: Path) -> str | None:
    """The reader of a file (a key of READERS) by its suffix, case-insensitive; None for an unknown suffix.

    A compressed .json is read as JSON Lines, the convention on the Hugging Face hub; a plain .json may hold anything.
    """
    *_, before, last = ["", "", *(suffix.lower() for suffix in path.suffixes)]
    if last in _COMPRESSED:
        return f".jsonl{_COMPRESSED[last]}" if before in (*_JSON_LINES, ".json") else None
    if last in _JSON_LINES:
        return ".jsonl"
    return last if last in READERS else None


def find_inputs(patterns: Sequence[Path | str], skip_invalid: bool = False) -> Inputs:
    """Expand files, directories (recursively, following links) and globs; a directory's files are sorted by path.

    UserError lists every path that is missing, given twice, given explicitly but of an unknown format, unreadable, or
    empty (unless `skip_invalid`).
    """
    problems: list[str] = []
    found = Inputs([], [])
    taken: dict[Identity, Path] = {}  # by earlier patterns
    for pattern in map(Path, patterns):
        if pattern.exists():
            named, missing = [pattern], f"holds no {', '.join(READERS)} files; name another directory"
        elif glob.has_magic(str(pattern)):
            named = sorted(map(Path, glob.glob(str(pattern), recursive=True)))
            missing = "matches no file; check the pattern"
        else:
            named, missing = [], "does not exist; check the path"
        mine: dict[Identity, Path] = {}
        nowhere = [name for name in named if not name.exists()]
        problems += [f"--input {name}: is a broken link; repair it, or leave it out" for name in nowhere]
        for name in (name for name in named if name not in nowhere):
            for path in _below(name, found.passed_over, problems) if name.is_dir() else [name]:
                first = mine.setdefault(_identity(path.stat()), path)
                if first != path:
                    found.passed_over.append(f"{path}: is the same file as {first}")
        if not mine and not nowhere:
            problems.append(f"--input {pattern}: {missing}")
        problems += [line for path in mine.values() for line in _problems(path, skip_invalid)]
        problems += [
            f"--input {path}: is given twice{'' if taken[key] == path else f', also as {taken[key]}'}; give it once"
            for key, path in mine.items()
            if key in taken
        ]
        taken |= mine
        found.paths.extend(sorted(mine.values()))
    if problems:
        raise UserError(problems)
    return found


def _problems(path: Path, skip_invalid: bool) -> Iterator[str]:
    """Problems of a file that is to be read."""
    if not path.is_file():
        yield f"--input {path}: is not a file; name a file, a directory or a glob"
    elif kind_of(path) is None:
        yield f"--input {path}: unknown file format; give {' or '.join(READERS)}"
    elif path.stat().st_size == 0 and not skip_invalid:
        yield f"--input {path}: is empty; leave it out, or skip such files with --on-error skip"
    elif not os.access(path, os.R_OK):
        yield f"--input {path}: cannot be read (no permission); change that, or leave it out"


def _below(root: Path, passed_over: list[str], problems: list[str]) -> Iterator[Path]:
    """The files below a directory that have a reader. Linked directories come last: by then the directory that a link
    loops back to has been visited, so the walk terminates."""
    seen: set[Identity] = set()
    waiting, links = [root], list[Path]()
    while waiting or links:
        directory = waiting.pop() if waiting else links.pop(0)
        real = directory.resolve()
        if _identity(real.stat()) in seen:
            passed_over.append(f"{directory}: links to {real}, which has been read already")
            continue
        seen.add(_identity(real.stat()))
        try:
            entries = sorted(directory.iterdir())
        except OSError as error:
            problems.append(f"--input {directory}: cannot be read ({error.strerror}); change that, or leave it out")
            continue
        for path in entries:
            try:
                mode = path.stat().st_mode
            except OSError:
                passed_over.append(f"{path}: is a broken link")
                continue
            if stat.S_ISDIR(mode):
                if not path.is_symlink():
                    waiting.append(path)
                elif real.is_relative_to(path.resolve()):
                    passed_over.append(f"{path}: links to a directory that contains it")
                else:
                    links.append(path)
            elif not stat.S_ISREG(mode):
                passed_over.append(f"{path}: is not a regular file")
            elif kind_of(path) is None:
                passed_over.append(
                    f"{path}: there is no reader for {''.join(path.suffixes[-2:]) or 'files without a suffix'}"
                )
            else:
                yield path


def _identity(status: os.stat_result) -> Identity:
    return status.st_dev, status.st_ino
