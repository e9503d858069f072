"""Writing a torch_dist checkpoint of megatron.core without a model: one chunk at a time, several files at once.

Where everything will lie is known before anything is written, because a chunk's archive is a frame of known length
around its values (torch_archive.archive_frame). So files can be written in any order, by several threads, and
those that an interrupted run completed need not be written again.

Chunks end where megatron would cut fc1 (gate | up) and hold at most CHUNK_BYTES, because every loader
reads whole chunks, whatever part of them it needs.
"""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from megatron_a2d.checkpoint.manifest import Entry
from megatron_a2d.checkpoint.tensor_rows import RowSource, Span, StreamedFile, bytes_of, slabs
from megatron_a2d.checkpoint.torch_save_zip import archive_frame
from megatron_a2d.conversion.qwen3_weight_map import WeightMap
from megatron_a2d.conversion.resumable_output import Unfinished
from megatron_a2d.conversion.workers import run_jobs
from megatron_a2d.utils.atomic_write import write_json

# What megatron.core's loader reads to recognise the format.
FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
CHUNK_BYTES = 32 << 20
# Small enough that an interruption costs little and several workers have something to do.
FILE_BYTES = 512 << 20


class _Piece(NamedTuple):
    """A chunk and its archive's place in its file."""

    span: Span
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    offset: int
    length: int


def write_torch_dist(
    work: Unfinished,
    place: str,
    source: RowSource,
    weights: WeightMap,
    common: dict[str, Any],
    advance: Callable[[float], None],
    workers: int = 1,
) -> dict[str, Entry]:
    """Write the tensors of `source`, which carry megatron's names, into the existing directory `place` of `work`.

    `common` becomes common.pt. `advance` is told of the bytes written. Files that an earlier run completed are kept.
    Returns what is known of the files of tensors, for the manifest.
    """
    empty_state = _empty_state()
    files = _plan(source, weights, len(empty_state))
    jobs = [
        partial(_write_file, work, f"{place}/{name}", source, pieces, empty_state if number == 0 else b"")
        for number, (name, pieces) in enumerate(files.items())
        if f"{place}/{name}" not in work.done
    ]
    run_jobs(jobs, workers, advance)
    directory = work.directory / place
    _write_metadata(directory, source, weights, files, len(empty_state))
    torch.save(common, directory / "common.pt")
    write_json(directory / "metadata.json", FORMAT)  # last: it marks the checkpoint as complete
    return {name: Entry(**work.done[f"{place}/{name}"]) for name in files}


def _plan(source: RowSource, weights: WeightMap, begin: int) -> dict[str, list[_Piece]]:
    """Every file and its pieces; the first one begins with `begin` other bytes."""
    files: dict[str, list[_Piece]] = {}
    pieces: list[_Piece] = []
    position = begin
    for span in _chunks(source, weights):
        if position >= FILE_BYTES or not files:
            pieces = files.setdefault(f"__0_{len(files)}.distcp", [])
            position = begin if len(files) == 1 else 0
        rest = weights.megatron_shapes[span.name][len(span.lead) + 1 :]
        sizes = (*(1 for _ in span.lead), span.stop - span.start, *rest)
        dtype = source.dtype(span.name)
        length = sum(map(len, archive_frame(dtype, sizes))) + math.prod(sizes) * dtype.itemsize
        pieces.append(_Piece(span, (*span.lead, span.start, *(0 for _ in rest)), sizes, position, length))
        position += length
    return files


def _chunks(source: RowSource, weights: WeightMap) -> Iterator[Span]:
    for block in weights.blocks():
        matrix = (block.num_rows, *weights.megatron_shapes[block.key][len(block.lead) + 1 :])
        itemsize = source.dtype(block.key).itemsize
        begin = 0
        for length in [block.num_rows] if block.turns > 1 else [part.stop for part in block.parts]:
            for start, stop in slabs(matrix, begin, begin + length, itemsize, CHUNK_BYTES):
                yield Span(block.key, block.lead, start, stop)
            begin += length


def _write_file(
    work: Unfinished,
    name: str,
    source: RowSource,
    pieces: list[_Piece],
    first: bytes,
    advance: Callable[[float], None],
) -> None:
    size = crc = 0
    with StreamedFile(work.directory / name) as file:

        def write(data: bytes | memoryview) -> None:
            nonlocal size, crc
            file.write(data)
            size, crc = size + len(data), zlib.crc32(data, crc)

        write(first)
        for piece in pieces:
            assert size == piece.offset, (name, piece, size)
            key, lead, start, stop = piece.span
            prefix, suffix = archive_frame(source.dtype(key), piece.sizes)
            write(prefix)
            for first_row, end in slabs(piece.sizes[len(lead) :], start, stop, source.dtype(key).itemsize):
                rows = source.read(Span(key, lead, first_row, end)).contiguous()
                write(bytes_of(rows))
                advance(rows.nbytes)
            write(suffix)
    work.record(name, {"size": size, "crc32": f"{crc:08x}"})


def _write_metadata(
    directory: Path, source: RowSource, weights: WeightMap, files: dict[str, list[_Piece]], state_length: int
) -> None:
    """The file .metadata, by torch's own writer: each tensor's chunks, and where each lies."""
    items: dict[str, Any] = {}
    results: list[WriteResult] = []
    for key in weights.extra_state_keys():  # all share the one empty state at the beginning of the first file
        items[key] = BytesStorageMetadata()
        place = _StorageInfo(next(iter(files)), 0, state_length)
        results.append(WriteResult(MetadataIndex(key), state_length, place))
    for file, pieces in files.items():
        for piece in pieces:
            key = piece.span.name
            if key not in items:
                properties, size = TensorProperties(dtype=source.dtype(key)), torch.Size(weights.megatron_shapes[key])
                items[key] = TensorStorageMetadata(properties, size, [])
            chunk = ChunkStorageMetadata(torch.Size(piece.offsets), torch.Size(piece.sizes))
            index = MetadataIndex(key, chunk.offsets, len(items[key].chunks))
            items[key].chunks.append(chunk)
            results.append(WriteResult(index, piece.length, _StorageInfo(file, piece.offset, piece.length)))
    writer = _Writer(directory, sync_files=False)
    writer.finish(Metadata(items), [results])


class _Writer(dcp.FileSystemWriter):
    """Does not record where the checkpoint was written."""

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()


def _empty_state() -> bytes:
    blob = io.BytesIO()
    torch.save([None], blob)
    return blob.getvalue()
