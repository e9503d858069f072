"""Corpus files as streams of documents, and their division into shards; memory holds one document, or one batch.

A corpus is divided into pieces of about 32 MB, each a few `Span`s (byte ranges) of files: the unit that a worker
processes and that survives an interruption. The division depends on the files alone, not on the number of workers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from data_prep.corpus_files import find_inputs, kind_of
from data_prep.formats import READERS, Document, Problem, Span, num_units
from data_prep.memory_limits import DEFAULT_LIMITS, Limits
from megatron_a2d.utils.errors import UserError

PIECE_BYTES = 1 << 25
MAX_PROBLEMS = 1000  # that are kept of a piece; all are counted


@dataclass
class Counts:
    """Counts what `read_documents` has met."""

    documents: int = 0
    empty: int = 0
    invalid: int = 0
    problems: list[str] = field(default_factory=list)  # the first of the invalid ones, with file and line


class Piece(NamedTuple):
    """Consecutive parts of the corpus."""

    spans: list[Span]

    @property
    def num_bytes(self) -> int:
        return sum(span.num_bytes for span in self.spans)


def plan_pieces(paths: Sequence[Path], piece_bytes: int = PIECE_BYTES, skip_invalid: bool = False) -> list[Piece]:
    """The corpus in pieces: large files are cut where their kind allows it, small ones put together.

    UserError for a .parquet file that cannot be opened; with `skip_invalid` its reader reports it.
    """
    pieces: list[Piece] = []
    spans: list[Span] = []
    filled = 0
    for path in paths:
        for span in _spans(path, piece_bytes, skip_invalid):
            spans.append(span)
            filled += span.num_bytes
            if filled >= piece_bytes:
                pieces.append(Piece(spans))
                spans, filled = [], 0
    return [*pieces, Piece(spans)] if spans else pieces


def _spans(path: Path, piece_bytes: int, skip_invalid: bool) -> Iterator[Span]:
    """Lines of .jsonl by bytes, .parquet by row groups; other kinds are read from their beginning alone."""
    kind, size = kind_of(path), path.stat().st_size
    assert kind is not None
    try:
        units = num_units(path, kind) if size else 0
    except UserError:
        if not skip_invalid:
            raise
        units = 0
    count = max(1, min(units, round(size / piece_bytes)))
    for number in range(count):
        start, stop = number * units // count, (number + 1) * units // count
        yield Span(str(path), kind, start, stop, size * (number + 1) // count - size * number // count)


def read_span(
    span: Span, json_key: str, counts: Counts, skip_invalid: bool = False, limits: Limits = DEFAULT_LIMITS
) -> Iterator[Document]:
    """Every document of a span that has text. What cannot be read is a UserError, or counted and passed over."""
    empty = Problem(span.path, "is empty")
    for item in READERS[span.kind](span, json_key, limits) if span.num_bytes else [empty]:
        if isinstance(item, Problem):
            if not skip_invalid:
                raise UserError(
                    f"{item.where}: {item.reason}; correct or remove it, or pass over such with --on-error skip"
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
    """Every document that has text, in the order of the files; UserError where there is none at all."""
    for piece in plan_pieces(find_inputs(patterns).paths):
        for span in piece.spans:
            yield from read_span(span, json_key, counts, limits=limits)
    if counts.documents == 0:
        raise UserError(f"--input {' '.join(map(str, patterns))}: holds no text at all; give documents")
