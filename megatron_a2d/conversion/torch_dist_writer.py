"""Writer of torch_dist checkpoints of megatron.core without a model: chunk by chunk, several files in parallel.

All offsets are known before anything is written, because a chunk's archive is a frame of known length around its
values (archive_frame). So files can be written in any order, by several threads, and those that an interrupted run
completed need not be written again.

Chunks end where megatron would split fc1 (gate | up) and hold at most CHUNK_BYTES, because loaders read complete
chunks, whatever part of them they need.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import xxhash

from megatron_a2d.checkpoint.manifest import Entry
from megatron_a2d.checkpoint.metadata_index import Chunk, Index, Location, StoredTensor
from megatron_a2d.checkpoint.metadata_writer import write_index
from megatron_a2d.checkpoint.tensor_rows import RowRange, RowSource, StreamedFile, bytes_of, slabs
from megatron_a2d.checkpoint.torch_save_zip import archive_frame
from megatron_a2d.conversion.resumable_output import ResumableOutput
from megatron_a2d.conversion.weight_map import WeightMap
from megatron_a2d.conversion.workers import run_jobs
from megatron_a2d.utils.atomic_write import write_json

# metadata.json, by which megatron.core's loader recognises the format.
FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
CHUNK_BYTES = 32 << 20
# Small enough that an interruption costs little and several workers are kept busy.
FILE_BYTES = 512 << 20


class _Chunk(NamedTuple):
    """A chunk of a tensor, and the location of its archive in its file."""

    row_range: RowRange
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    offset: int
    length: int


def write_torch_dist(
    work: ResumableOutput,
    subdirectory: str,
    source: RowSource,
    weights: WeightMap,
    common: dict[str, Any],
    advance: Callable[[float], None],
    workers: int = 1,
) -> dict[str, Entry]:
    """Write the tensors of `source`, under megatron's names, into the existing subdirectory `subdirectory` of `work`.

    `common` becomes common.pt. `advance` is called with bytes written. Files that an earlier run completed are kept.
    Returns the manifest entries of the tensor files.
    """
    empty_state = _empty_state()
    files = _plan(source, weights, len(empty_state))
    jobs = [
        partial(_write_file, work, f"{subdirectory}/{name}", source, chunks, empty_state if number == 0 else b"")
        for number, (name, chunks) in enumerate(files.items())
        if f"{subdirectory}/{name}" not in work.done
    ]
    run_jobs(jobs, workers, advance)
    directory = work.directory / subdirectory
    write_index(directory, _index(source, weights, files, len(empty_state)))
    torch.save(common, directory / "common.pt")
    write_json(directory / "metadata.json", FORMAT)  # last: marks the checkpoint as complete
    return {name: Entry.of(work.done[f"{subdirectory}/{name}"]) for name in files}


def _plan(source: RowSource, weights: WeightMap, begin: int) -> dict[str, list[_Chunk]]:
    """File name -> its chunks; the first file starts with `begin` other bytes."""
    files: dict[str, list[_Chunk]] = {}
    chunks: list[_Chunk] = []
    position = begin
    for row_range in _chunks(source, weights):
        if position >= FILE_BYTES or not files:
            chunks = files.setdefault(f"__0_{len(files)}.distcp", [])
            position = begin if len(files) == 1 else 0
        rest = weights.megatron_shapes[row_range.name][len(row_range.lead) + 1 :]
        sizes = (*(1 for _ in row_range.lead), row_range.stop - row_range.start, *rest)
        dtype = source.dtype(row_range.name)
        length = sum(map(len, archive_frame(dtype, sizes))) + math.prod(sizes) * dtype.itemsize
        chunks.append(
            _Chunk(row_range, (*row_range.lead, row_range.start, *(0 for _ in rest)), sizes, position, length)
        )
        position += length
    return files


def _chunks(source: RowSource, weights: WeightMap) -> Iterator[RowRange]:
    for block in weights.blocks():
        matrix = (block.num_rows, *weights.megatron_shapes[block.key][len(block.lead) + 1 :])
        itemsize = source.dtype(block.key).itemsize
        begin = 0
        for length in [block.num_rows] if block.groups > 1 else [part.stop for part in block.parts]:
            for start, stop in slabs(matrix, begin, begin + length, itemsize, CHUNK_BYTES):
                yield RowRange(block.key, block.lead, start, stop)
            begin += length


def _write_file(
    work: ResumableOutput,
    name: str,
    source: RowSource,
    chunks: list[_Chunk],
    first: bytes,
    advance: Callable[[float], None],
) -> None:
    size, checksum = 0, xxhash.xxh3_64()
    with StreamedFile(work.directory / name) as file:

        def write(data: bytes) -> None:
            nonlocal size
            size += len(data)
            checksum.update(data)
            file.write(data)

        write(first)
        for chunk in chunks:
            assert size == chunk.offset, (name, chunk, size)
            key, lead, start, stop = chunk.row_range
            matrix, itemsize = chunk.sizes[len(lead) :], source.dtype(key).itemsize
            prefix, suffix = archive_frame(source.dtype(key), chunk.sizes)
            write(prefix)
            for first_row, end in slabs(matrix, start, stop, itemsize):
                room = file.room((end - first_row) * math.prod(matrix[1:]) * itemsize)
                rows = source.read(RowRange(key, lead, first_row, end), room).contiguous()
                size += rows.nbytes
                checksum.update(bytes_of(rows))
                file.write_tensor(rows)
                advance(rows.nbytes)
            write(suffix)
    work.record(name, Entry(size, checksum.hexdigest()).stored())


def _index(source: RowSource, weights: WeightMap, files: dict[str, list[_Chunk]], state_length: int) -> Index:
    """The chunks of each tensor and their locations."""
    first = next(iter(files))  # all extra states share an empty one at its start
    objects = dict.fromkeys(weights.extra_state_keys(), Location(first, 0, state_length))
    tensors: dict[str, StoredTensor] = {}
    for file, chunks in files.items():
        for chunk in chunks:
            key = chunk.row_range.name
            if key not in tensors:
                tensors[key] = StoredTensor(source.dtype(key), weights.megatron_shapes[key], [])
            location = Location(file, chunk.offset, chunk.length)
            tensors[key].chunks.append(Chunk(chunk.offsets, chunk.sizes, location))
    return Index(tensors, objects)


def _empty_state() -> bytes:
    blob = io.BytesIO()
    torch.save([None], blob)
    return blob.getvalue()
