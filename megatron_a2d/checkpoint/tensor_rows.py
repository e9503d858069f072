"""Row ranges of tensors: the unit in which weights are located, read and moved.

A weight is a matrix (or vector) at `lead`, an index into its tensor's leading axes (layer, expert).
Conversion moves ranges of complete rows of such matrices.
"""

from __future__ import annotations

import errno
import fcntl
import math
import mmap
import os
import re
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from megatron_a2d.utils.atomic_write import regular
from megatron_a2d.utils.errors import UserError

# Read at once: it stays in the processor's cache while it is read, checked and written, and the allocator reuses the
# same memory.
SLAB_BYTES = 4 << 20
_BLOCK_BYTES = 4 << 20  # written at once
_MOST_UNUSED = 4  # blocks of memory kept to be read into again
_DIRECT = getattr(os, "O_DIRECT", 0)  # 0 where the system does not have it

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class RowRange(NamedTuple):
    """Rows `start` to `stop` (not included) of tensor `name`, at index `lead` of its leading axes."""

    name: str
    lead: tuple[int, ...]
    start: int
    stop: int


class RowSource(Protocol):
    """Tensors that can be read a few rows at a time."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The full shape of every tensor by name."""

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, row_range: RowRange, memory: memoryview | None = None) -> torch.Tensor:
        """The rows of `row_range`, [stop - start, *rest]; in `memory`, of their size, if no other is needed."""


class Remapped:
    """`source` under other names: each tensor of `shapes` is assembled from the rows that `locate` returns, and cast to
    its dtype in `dtypes`."""

    def __init__(
        self,
        source: RowSource,
        shapes: Mapping[str, tuple[int, ...]],
        dtypes: Mapping[str, torch.dtype],
        locate: Callable[[RowRange], list[RowRange]],
    ):
        self.shapes = shapes
        self._source, self._dtypes, self._locate = source, dtypes, locate

    def dtype(self, name: str) -> torch.dtype:
        return self._dtypes[name]

    def read(self, row_range: RowRange, memory: memoryview | None = None) -> torch.Tensor:
        located = self._locate(row_range)
        if len(located) == 1:
            rows = self._source.read(located[0], memory)
        else:
            rows = torch.cat([self._source.read(part) for part in located])
        return cast(rows, self._dtypes[row_range.name], row_range.name)


def cast(rows: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """`rows` in `dtype`; UserError if a finite value of tensor `name` overflows."""
    if rows.dtype == dtype:
        return rows
    result = rows.to(dtype)
    if torch.finfo(dtype).max < torch.finfo(rows.dtype).max and not bool((result.isfinite() | ~rows.isfinite()).all()):
        raise UserError(f"{name}: has values beyond the range of {dtype}; choose --dtype bf16 or fp32")
    return result


class FiniteCheck:
    """`source`, recording in `non_finite` the tensors in which a NaN or an infinity was read."""

    def __init__(self, source: RowSource):
        self.shapes, self.dtype = source.shapes, source.dtype
        self._source = source
        self.non_finite: set[str] = set()

    def read(self, row_range: RowRange, memory: memoryview | None = None) -> torch.Tensor:
        rows = self._source.read(row_range, memory)
        if not is_finite(rows):
            self.non_finite.add(row_range.name)
        return rows

    def problems(self, where: Path) -> list[str]:
        """A line for each tensor, in the order of the model."""
        return [
            f"{where}: tensor {name} has values that are not finite (NaN or infinity); fetch or write it again, or "
            "accept them with --allow-nonfinite"
            for name in self.shapes
            if name in self.non_finite
        ]


def is_finite(rows: torch.Tensor) -> bool:
    """Whether there is no NaN and no infinity.

    The bits of numbers with one sign are ordered as their magnitudes are, with infinity and the NaNs at the end: the
    largest as signed integers is that of the positive numbers, as unsigned ones that of the negative ones.
    """
    if not rows.numel():
        return True
    if not rows.is_contiguous():  # in their place: a copy of each piece would stay in the allocator's memory
        low, high = rows.aminmax()
        return math.isfinite(float(low)) and math.isfinite(float(high))
    width = rows.element_size()
    bits = np.frombuffer(bytes_of(rows.contiguous()), f"i{width}")
    infinity = _bits_of_infinity(rows.dtype)
    return bool(bits.max() < infinity and bits.view(f"u{width}").max() < infinity + (1 << (8 * width - 1)))


@lru_cache
def _bits_of_infinity(dtype: torch.dtype) -> int:
    return int(np.frombuffer(bytes_of(torch.tensor([math.inf], dtype=dtype)), f"i{dtype.itemsize}")[0])


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor; writing to it writes the tensor."""
    raw: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(raw)


def slabs(
    shape: Sequence[int], row_start: int, row_stop: int, itemsize: int, limit: int | None = None
) -> Iterator[tuple[int, int]]:
    """Cut rows of a matrix of `shape` ([rows, *rest]) into ranges of at most `limit` bytes, by default SLAB_BYTES."""
    step = max(1, (limit or SLAB_BYTES) // max(1, math.prod(shape[1:]) * itemsize))
    for start in range(row_start, row_stop, step):
        yield start, min(start + step, row_stop)


def num_bytes(source: RowSource) -> int:
    return sum(math.prod(shape) * source.dtype(name).itemsize for name, shape in source.shapes.items())


# More tensors of one kind than this, over layers and experts, share a line.
_SAME_KIND = 8


def account(
    expected: Mapping[str, tuple], found: Mapping[str, tuple], where: str, described_by: str = "config.json"
) -> list[str]:
    """Every difference between the tensors `expected` of a model and those `found`: one line per tensor, or one for all
    whose names differ only in numbers. `described_by`: the file that `expected` follows from."""
    missing = [name for name in expected if name not in found]
    problems = [
        f"{where}: {_tensors(names)} missing; fetch or write the model again, completely" for names in _by_kind(missing)
    ]
    unknown = [name for name in found if name not in expected]
    problems += [
        f"{where}: {_tensors(names, list(found[names[0]]))} unknown; only models of supported families are read"
        for names in _by_kind(unknown)
    ]
    wrong = [name for name in found if name in expected and tuple(found[name]) != tuple(expected[name])]
    for names in _by_kind(wrong):
        others = f", as have {len(names) - 1} others of its kind" if len(names) > 1 else ""
        problems.append(
            f"{where}: tensor {names[0]} has shape {list(found[names[0]])}, but {described_by} asks for "
            f"{list(expected[names[0]])}{others}; take the {described_by} that belongs to the weights"
        )
    return problems


def _by_kind(names: Sequence[str]) -> list[list[str]]:
    """`names` one by one, except that many names which differ only in numbers form one group."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(re.sub(r"\d+", "#", name), []).append(name)
    groups = kinds.values()
    return [part for group in groups for part in ([group] if len(group) > _SAME_KIND else [[name] for name in group])]


def _tensors(names: Sequence[str], shape: list[int] | None = None) -> str:
    first = names[0] if shape is None else f"{names[0]} {shape}"
    return f"tensor {first} is" if len(names) == 1 else f"tensor {first} and {len(names) - 1} others of its kind are"


class StreamedFile:
    """A file that is written once, from its beginning to its end, bypassing the system's page cache where possible.

    Copying through the cache costs as much processor time as hashing, and pushes everything else out of memory.
    """

    def __init__(self, path: Path):
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        try:
            self._descriptor = os.open(path, flags | _DIRECT, 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL:  # the file system does not support direct I/O
                raise
            self._descriptor = os.open(path, flags, 0o666)
        # Page-aligned, as direct I/O requires; rows that are read into it may go beyond the end of a block.
        self._memory = memoryview(mmap.mmap(-1, 2 * _BLOCK_BYTES))
        self._address = np.frombuffer(self._memory, np.uint8).ctypes.data
        self._filled = 0  # bytes, fewer than a block

    def room(self, size: int) -> memoryview | None:
        """Memory for the next `size` bytes, which `write` then need not copy; None for more than a block."""
        return self._memory[self._filled : self._filled + size] if size <= _BLOCK_BYTES else None

    def write_tensor(self, rows: torch.Tensor) -> None:
        """Write the values of a contiguous tensor; memory from `room` is no longer valid afterwards."""
        if rows.data_ptr() == self._address + self._filled:
            self._filled += rows.nbytes
            self._flush_block()
        else:
            self.write(bytes_of(rows))

    def write(self, data: bytes | memoryview) -> None:
        rest = memoryview(data)
        while rest:
            part = rest[: _BLOCK_BYTES - self._filled]
            self._memory[self._filled : self._filled + len(part)] = part
            self._filled, rest = self._filled + len(part), rest[len(part) :]
            self._flush_block()

    def _flush_block(self) -> None:
        """Write whole pages once a block is full."""
        if self._filled >= _BLOCK_BYTES:
            left = self._filled % min(mmap.PAGESIZE, _BLOCK_BYTES)
            whole = self._filled - left
            self._flush(whole)
            self._memory[:left] = self._memory[whole : whole + left]
            self._filled = left

    def _flush(self, size: int) -> None:
        rest = self._memory[:size]
        while rest:
            try:
                count = os.write(self._descriptor, rest)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._use_cache():
                    raise
            else:
                rest = rest[count:]

    def _use_cache(self) -> bool:
        """Write through the page cache from now on; False if that is so already."""
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~_DIRECT)
        return bool(flags & _DIRECT)

    def __enter__(self) -> StreamedFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._use_cache()  # the end of the file does not fill a page
                self._flush(self._filled)
        finally:
            os.close(self._descriptor)


class OpenFiles:
    """Descriptors of files that several threads read at random positions, closed together.

    Tensors are read into NumPy's memory: the allocator does not reuse torch's, which is aligned, for the next one while
    anything small lies next to it.

    `from_disk`: tensors are read past the system's page cache where the file system allows it, so that what comes back
    is what the disk holds, for less processor time.
    """

    def __init__(self, from_disk: bool = False) -> None:
        self._descriptors: dict[tuple[Path, int], int] = {}
        self._lock = threading.Lock()
        self._direct = _DIRECT if from_disk else 0
        self._unused: deque[mmap.mmap] = deque(maxlen=_MOST_UNUSED)

    def read_bytes(self, path: Path, offset: int, length: int) -> bytes:
        """`length` bytes at `offset`; UserError, before a buffer is allocated, if the file ends earlier."""
        descriptor = self._descriptor(path)
        data = os.pread(descriptor, max(0, min(length, os.fstat(descriptor).st_size - offset)), offset)
        if len(data) != length:
            raise UserError(f"{path}: ends after byte {offset + len(data)}; the file is truncated, fetch it again")
        return data

    def read_tensor(
        self,
        path: Path,
        offset: int,
        shape: Sequence[int],
        dtype: torch.dtype,
        memory: memoryview | None = None,
    ) -> torch.Tensor:
        """A contiguous tensor of the values at `offset`, in `memory` if it is of their size. Plain reads: mapped pages
        count as memory."""
        if self._direct:
            return self._read_pages(path, offset, shape, dtype)
        size = math.prod(shape) * dtype.itemsize
        if memory is None or len(memory) != size:
            memory = np.empty(size, np.uint8).data
        self.read_into(path, offset, memory)
        return torch.frombuffer(memory, dtype=dtype).view(tuple(shape)) if size else torch.empty(shape, dtype=dtype)

    def read_into(self, path: Path, offset: int, rest: memoryview) -> None:
        """Fill `rest` with the bytes at `offset`."""
        while rest:
            count = os.preadv(self._descriptor(path), [rest], offset)
            if count <= 0:
                raise UserError(f"{path}: ends after byte {offset}; the file is truncated, fetch it again")
            offset, rest = offset + count, rest[count:]

    def _read_pages(self, path: Path, offset: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Direct I/O moves complete pages into aligned memory: the tensor is a view into those around it."""
        size, skipped = math.prod(shape) * dtype.itemsize, offset % mmap.PAGESIZE
        length = -(-(skipped + size) // mmap.PAGESIZE) * mmap.PAGESIZE
        aligned = self._pages(length)
        filled = max(0, self._read_direct(path, offset - skipped, aligned) - skipped)
        self.read_into(path, offset + filled, aligned[skipped + filled : skipped + size])
        return torch.frombuffer(aligned, dtype=dtype, count=math.prod(shape), offset=skipped).view(tuple(shape))

    def _pages(self, length: int) -> memoryview:
        """Aligned memory, reused once no tensor lies in it, because new memory has to be zeroed."""
        try:
            memory = self._unused.pop()
        except IndexError:
            memory = None
        if memory is None or len(memory) < length:
            memory = mmap.mmap(-1, max(length, SLAB_BYTES + 2 * mmap.PAGESIZE))
        pages = np.frombuffer(memory, np.uint8, length)
        weakref.finalize(pages, self._unused.append, memory)
        return pages.data

    def _read_direct(self, path: Path, offset: int, rest: memoryview) -> int:
        """The number of bytes read by direct I/O; fewer than requested at the end of the file or on failure."""
        done = 0
        while done < len(rest) and done % mmap.PAGESIZE == 0:
            try:
                count = os.preadv(self._descriptor(path, self._direct), [rest[done:]], offset + done)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                return done  # the file system does not support it
            if count == 0:
                break
            done += count
        return done

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def _descriptor(self, path: Path, extra_flags: int = 0) -> int:
        with self._lock:
            if (path, extra_flags) not in self._descriptors:
                try:
                    self._descriptors[path, extra_flags] = regular(path, os.O_RDONLY | extra_flags)
                except OSError as error:
                    if extra_flags and error.errno == errno.EINVAL:
                        raise
                    raise UserError(f"{path}: cannot be read ({error.strerror}); check the file") from None
            return self._descriptors[path, extra_flags]
