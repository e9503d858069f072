"""Verification of an output without rereading its source, in one pass that a model's forward passes can share.

While the source is read, a checksum (XXH3, 128 bits) of every range of rows is recorded, under HF names. The output is
then read once, from the disk and under HF names, that is through the inverse of the map by which it was written: each
range must have the checksum that it had in the source. This detects damage and misplaced rows.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from queue import Queue
from typing import NamedTuple, TypeVar

import torch
import xxhash

from megatron_a2d.checkpoint.tensor_rows import RowRange, RowSource, bytes_of, cast, slabs
from megatron_a2d.conversion.compare_weights import Comparison, check_alike, largest_difference, tensor_differs
from megatron_a2d.conversion.sources import Weights
from megatron_a2d.terminal.console import progress
from megatron_a2d.utils.errors import UserError

T = TypeVar("T")
# Of a tensor, in order: index of the first row, rows.
ReadRows = Callable[[str], Iterator[tuple[int, torch.Tensor]]]


class Piece(NamedTuple):
    """Rows `start` to `stop` (not included) of a tensor, as the source has them. `rounding`: the largest absolute one
    by the cast."""

    start: int
    stop: int
    checksum: bytes
    rounding: float


class RecordedRows:
    """`source`, cast to `dtype` unless it is None, with a checksum of all that was read. A `RowSource`."""

    def __init__(self, source: RowSource, dtype: torch.dtype | None = None):
        self.shapes = source.shapes
        self._source, self._dtype = source, dtype
        self._pieces: dict[str, list[Piece]] = {}

    def dtype(self, name: str) -> torch.dtype:
        return self._dtype or self._source.dtype(name)

    def read(self, row_range: RowRange, memory: memoryview | None = None) -> torch.Tensor:
        rows, piece = self._read(row_range, memory)
        self._pieces.setdefault(row_range.name, []).append(piece)
        return rows

    def ranges(self, name: str) -> list[tuple[int, int, Piece | None]]:
        """All rows of a tensor in order, as they were read; None where they were not, because an interrupted run had
        already written them."""
        shape, position = self.shapes[name], 0
        result: list[tuple[int, int, Piece | None]] = []
        for piece in [*sorted(self._pieces.get(name, ())), None]:
            end = piece.start if piece else shape[0]
            assert position <= end, (name, position, piece)
            result += [(*pair, None) for pair in slabs(shape, position, end, self.dtype(name).itemsize)]
            if piece:
                result.append((piece.start, piece.stop, piece))
                position = piece.stop
        return result

    def expected(self, row_range: RowRange) -> Piece:
        """Read the source again."""
        return self._read(row_range)[1]

    def _read(self, row_range: RowRange, memory: memoryview | None = None) -> tuple[torch.Tensor, Piece]:
        found = self._source.read(row_range, memory)
        rows = cast(found, self.dtype(row_range.name), row_range.name)
        rounding = largest_difference(found, rows) if found.dtype != rows.dtype else 0.0
        return rows, Piece(row_range.start, row_range.stop, _checksum(rows), rounding)


def _checksum(rows: torch.Tensor) -> bytes:
    return xxhash.xxh3_128_digest(bytes_of(rows.contiguous()))


class _Read(NamedTuple):
    """Rows of the output."""

    name: str
    start: int
    stop: int
    rows: torch.Tensor
    rounding: float
    difference: float | None  # from the source, where bits differ


class ReadBack:
    """The verification of `candidate`, which holds what `recorded` read of `reference`."""

    def __init__(self, recorded: RecordedRows, reference: Weights, candidate: Weights, workers: int = 1):
        """UserError if the architectures differ."""
        check_alike(reference, candidate)
        self.recorded, self.reference, self.candidate = recorded, reference, candidate
        self._workers = max(1, workers)

    def compare(self, forwards: Sequence[Callable[[ReadRows], T]] = ()) -> tuple[Comparison, list[T]]:
        """Read the output once and compare it. Raises UserError with every difference.

        Each of `forwards` runs in a thread meanwhile, and is given a function that yields a tensor's rows as they are
        read; it must ask for tensors in the model's order, each at most once. Returns their results too.
        """
        readers = [_Reader(self.candidate.tensors.shapes) for _ in forwards]
        differences: dict[str, float] = {}
        rounding = 0.0
        with _forward_threads(len(readers)) as pool:
            results = [pool.submit(reader.run, forward) for reader, forward in zip(readers, forwards, strict=True)]
            try:
                for read in self._all_rows():
                    for reader in readers:
                        reader.queue.put(read)
                    rounding = max(rounding, read.rounding)
                    if read.difference is not None:
                        differences[read.name] = max(read.difference, differences.get(read.name, 0.0))
            finally:
                for reader in readers:
                    reader.queue.put(None)
        if differences:
            raise UserError([tensor_differs(self.reference, self.candidate, *item) for item in differences.items()])
        comparison = Comparison(len(self.reference.tensors.shapes), self.reference.num_bytes(), rounding)
        return comparison, [result.result() for result in results]

    def _all_rows(self) -> Iterator[_Read]:
        """Everything, in the model's order, by several threads that stay a little ahead."""
        with progress("verifying", self.candidate.num_bytes(), "B") as advance:
            for read in self._read_ahead():
                advance(read.rows.nbytes)
                yield read

    def _read_ahead(self) -> Iterator[_Read]:
        pending: deque[Future[_Read]] = deque()
        with ThreadPoolExecutor(self._workers) as pool:
            try:
                for name in self.candidate.tensors.shapes:
                    for start, stop, piece in self.recorded.ranges(name):
                        pending.append(pool.submit(self._read, RowRange(name, (), start, stop), piece))
                        if len(pending) > 2 * self._workers:
                            yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _read(self, row_range: RowRange, piece: Piece | None) -> _Read:
        rows = self.candidate.tensors.read(row_range)
        piece = piece or self.recorded.expected(row_range)
        difference = None
        if _checksum(rows) != piece.checksum:
            difference = largest_difference(self.reference.tensors.read(row_range), rows)
        return _Read(row_range.name, row_range.start, row_range.stop, rows, piece.rounding, difference)


@contextmanager
def _forward_threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """A thread for each forward pass, with a quarter of the processors for its products: they run beside one another
    and the reading, and OpenMP's idle threads are busy."""
    before = torch.get_num_threads()
    few = max(1, min(before, (os.cpu_count() or 1) // 4))
    try:
        with ThreadPoolExecutor(max(1, count), initializer=torch.set_num_threads, initargs=(few,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


# Verifies an output before it is renamed to its final name: runs `compare`, and raises UserError to reject it.
Check = Callable[[ReadBack], Comparison]


def only_compare(read_back: ReadBack) -> Comparison:
    return read_back.compare()[0]


class _Reader:
    """The rows for one forward pass, which may skip tensors."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]):
        self.queue: Queue[_Read | None] = Queue(maxsize=2)
        self._shapes, self._ended = shapes, False

    def run(self, forward: Callable[[ReadRows], T]) -> T:
        try:
            return forward(self._rows)
        finally:  # nobody may wait for a forward pass that has ended
            while not self._ended:
                self._take()

    def _rows(self, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        end = 0
        while end < self._shapes[name][0]:
            read = self._take()
            if read is None:
                raise RuntimeError(f"{name} was not read, or was asked for too late")
            if read.name == name:
                end = read.stop
                yield read.start, read.rows

    def _take(self) -> _Read | None:
        read = None if self._ended else self.queue.get()
        self._ended = read is None
        return read
