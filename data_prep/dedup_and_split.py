"""Merge of tokenised shards: drops exact duplicates, splits off the validation documents, writes the token files.

Exact de-duplication keeps the first document with each text. Digests are compared in groups of
equal remainder, so that memory is one byte per document plus one group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import xxhash

from data_prep.indexed_dataset_writer import TokenWriter
from data_prep.tokenize_shards import Job, ShardResult, read_result
from megatron_a2d.utils.errors import UserError

GROUP = 1 << 24  # digests compared at a time
CHANGED = "has changed since it was written; remove it and rerun the command that tokenised it"
_CHUNK = 1 << 20  # tokens held at a time: few enough that the same memory is used again


def is_held_out(digests: np.ndarray, valid_fraction: float) -> np.ndarray:
    """[documents] bool: held out by a hash of the text, the same on every machine and for every tokenizer."""
    return digests[:, 0] < np.uint64(min(int(valid_fraction * 2.0**64), 2**64 - 1))


class DocumentCounts(NamedTuple):
    """What the tokenised shards hold, duplicates included: these fall on the same side, and never empty it."""

    documents: int  # read
    invalid: int
    first_problem: str  # of the invalid ones
    training: int  # of the documents within --min-tokens and --max-tokens
    held_out: int


def count_documents(job: Job, num_shards: int, valid_fraction: float) -> DocumentCounts:
    """Count the documents of all shards, from their metadata alone."""
    documents = invalid = training = held_out = 0
    problems: list[str] = []
    for number in range(num_shards):
        result = read_result(job, number)
        documents, invalid = documents + result.counts["documents"], invalid + result.counts["invalid"]
        problems += result.counts["problems"][:1]
        held = int(is_held_out(result.digests, valid_fraction).sum())
        held_out, training = held_out + held, training + len(result.lengths) - held
    return DocumentCounts(documents, invalid, next(iter(problems), ""), training, held_out)


def find_copies(job: Job, num_shards: int) -> np.ndarray:
    """[all documents] bool, True where the same text has occurred before."""
    sizes = [len(read_result(job, number).lengths) for number in range(num_shards)]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    copies = np.zeros(starts[-1], dtype=bool)
    num_groups = max(1, -(-int(starts[-1]) // GROUP))
    for group in range(num_groups):
        parts, places = [], []
        for number in range(num_shards):
            digests = read_result(job, number).digests
            chosen = np.flatnonzero(digests[:, 1] % np.uint64(num_groups) == group)
            parts.append(digests[chosen])
            places.append(starts[number] + chosen)
        digests, place = np.concatenate(parts), np.concatenate(places)
        order = np.lexsort((place, digests[:, 1], digests[:, 0]))
        same = (digests[order][1:] == digests[order][:-1]).all(axis=1)
        copies[place[order][1:][same]] = True
    return copies


def merge(
    job: Job,
    num_shards: int,
    writers: Sequence[TokenWriter],
    valid_fraction: float,
    deduplicate: bool,
    advance: Callable[[int], Any],
) -> dict[str, Any]:
    """Write every shard in order; the second writer, if any, gets the held-out documents. Returns the total counts."""
    copies = find_copies(job, num_shards) if deduplicate else None
    totals: dict[str, Any] = {"duplicates": 0, "problems": []}
    first = 0
    for number in range(num_shards):
        result = read_result(job, number)
        for name, value in result.counts.items():
            totals[name] = totals[name] + value if name in totals else value
        keep = np.ones(len(result.lengths), dtype=bool)
        if copies is not None:
            keep &= ~copies[first : first + len(keep)]
            totals["duplicates"] += int((~keep).sum())
        first += len(keep)
        held_out = is_held_out(result.digests, valid_fraction) if len(writers) > 1 else np.zeros_like(keep)
        _write(job, number, result, [keep & ~held_out, keep & held_out], writers)
        advance(int(result.lengths.sum()))
    return totals


def _write(
    job: Job, number: int, result: ShardResult, chosen: list[np.ndarray], writers: Sequence[TokenWriter]
) -> None:
    """Write a shard's documents to their writers, in chunks. UserError if its tokens are not those of its checksum."""
    lengths, checksum = result.lengths, xxhash.xxh3_64()
    ends = np.cumsum(lengths)
    path, dtype = job.path(number, ".tokens"), writers[0].dtype
    total = int(ends[-1]) if len(ends) else 0
    if path.stat().st_size != total * dtype.itemsize:
        raise UserError(f"{path}: {CHANGED}")
    with open(path, "rb", buffering=0) as stream:
        begin = 0
        while begin < len(lengths):
            before = int(ends[begin - 1]) if begin else 0
            end = max(begin + 1, int(np.searchsorted(ends, before + _CHUNK, side="right")))
            some = slice(begin, end)
            count = int(ends[end - 1]) - before
            ids = np.fromfile(stream, dtype=dtype, count=count)
            checksum.update(memoryview(ids))  # type: ignore[arg-type]
            for writer, mask in zip(writers, chosen, strict=False):
                part = mask[some]
                if part.any():
                    writer.add(ids if part.all() else ids[np.repeat(part, lengths[some])], lengths[some][part])
            begin = end
    if checksum.hexdigest() != result.checksum:
        raise UserError(f"{path}: {CHANGED}")
