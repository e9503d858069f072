"""Corpus files as streams of documents, and their division into shards; memory holds one document, or one batch.

A corpus is divided into shards of about 32 MB, each a few `FileRange`s of files: the unit that a worker
processes and that survives an interruption. The division depends on the files alone, not on the number of workers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from data_prep.corpus_files import find_inputs, kind_of
from data_prep.formats import READERS, Document, FileRange, Problem, num_units
from data_prep.memory_limits import DEFAULT_LIMITS, Limits
from megatron_a2d.utils.errors import UserError

SHARD_BYTES = 1 << 25
MAX_PROBLEMS = 1000  # kept per shard; all are counted


@dataclass
class Counts:
    """Counts of what `read_documents` has read and skipped."""

    documents: int = 0
    empty: int = 0
    invalid: int = 0
    problems: list[str] = field(default_factory=list)  # the first of the invalid ones, with file and line


class Shard(NamedTuple):
    """Consecutive ranges of the corpus files."""

    file_ranges: list[FileRange]

    @property
    def num_bytes(self) -> int:
        return sum(file_range.num_bytes for file_range in self.file_ranges)


def plan_shards(paths: Sequence[Path], shard_bytes: int = SHARD_BYTES, skip_invalid: bool = False) -> list[Shard]:
    """Divide the corpus into shards: large files are split if their format allows it, small ones combined, so that a
    shard holds half as much as `shard_bytes` or more, whatever the rounding.

    UserError for a .parquet file that cannot be opened; with `skip_invalid` its reader reports it.
    """
    shards: list[Shard] = []
    file_ranges: list[FileRange] = []
    filled = 0
    for path in paths:
        for file_range in _file_ranges(path, shard_bytes, skip_invalid):
            file_ranges.append(file_range)
            filled += file_range.num_bytes
            if filled >= shard_bytes // 2:
                shards.append(Shard(file_ranges))
                file_ranges, filled = [], 0
    return [*shards, Shard(file_ranges)] if file_ranges else shards


def _file_ranges(path: Path, shard_bytes: int, skip_invalid: bool) -> Iterator[FileRange]:
    """Ranges of a file: byte ranges of .jsonl, row groups of .parquet; other formats are one range."""
    kind, size = kind_of(path), path.stat().st_size
    assert kind is not None
    try:
        units = num_units(path, kind) if size else 0
    except UserError:
        if not skip_invalid:
            raise
        units = 0
    count = max(1, min(units, round(size / shard_bytes)))
    for number in range(count):
        start, stop = number * units // count, (number + 1) * units // count
        yield FileRange(str(path), kind, start, stop, size * (number + 1) // count - size * number // count)


def read_file_range(
    file_range: FileRange, json_key: str, counts: Counts, skip_invalid: bool = False, limits: Limits = DEFAULT_LIMITS
) -> Iterator[Document]:
    """Every non-blank document of a range. What cannot be read is a UserError, or counted and skipped."""
    empty = Problem(file_range.path, "is empty")
    for item in READERS[file_range.kind](file_range, json_key, limits) if file_range.num_bytes else [empty]:
        if isinstance(item, Problem):
            if not skip_invalid:
                raise UserError(
                    f"{item.where}: {item.reason}; correct or remove it, or skip such documents with --on-error skip"
                )
            counts.invalid += 1
            if len(counts.problems) < MAX_PROBLEMS:
                counts.problems.append(f"{item.where}: {item.reason}")
        elif item.is_blank:
            counts.empty += 1
        else:
            counts.documents += 1
            yield item


def read_documents(
    patterns: Sequence[Path], json_key: str, counts: Counts, limits: Limits = DEFAULT_LIMITS
) -> Iterator[Document]:
    """Every non-blank document, in the order of the files; UserError if there are none."""
    for shard in plan_shards(find_inputs(patterns).paths):
        for file_range in shard.file_ranges:
            yield from read_file_range(file_range, json_key, counts, limits=limits)
    if counts.documents == 0:
        raise UserError(f"--input {' '.join(map(str, patterns))}: holds no text at all; give documents")
