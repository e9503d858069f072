"""Memory of a forked process: it gets the tensors handed to it, and shares none of those that training changes.

A fork shares all pages, and whoever changes one copies it first, in a page fault of its own. After a fork that shares
them, one step of a training process on CPUs does that for all of its weights, gradients and activations.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import os
import tempfile
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_ALIGNMENT = 64  # bytes


class Stored(NamedTuple):
    """Where a MemoryFile holds a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # bytes


class MemoryFile:
    """File without a name, in memory where the system has such files, by which a process hands tensors to its fork."""

    def __init__(self) -> None:
        if hasattr(os, "memfd_create"):
            self._file = os.memfd_create("a2d")
        else:
            self._file, path = tempfile.mkstemp()
            os.unlink(path)

    def write(self, tensors: list[Tensor]) -> list[Stored]:
        """Replace what the file holds by these host tensors; OSError if there is no room."""
        self.clear()
        stored, end = [], 0
        for tensor in tensors:
            start = -(-end // _ALIGNMENT) * _ALIGNMENT
            data = tensor.detach().reshape(-1).view(torch.uint8).numpy().data
            end = start + len(data)
            while data:  # the kernel writes at most 2 GiB at once
                data = data[os.pwrite(self._file, data, end - len(data)) :]
            stored.append(Stored(tensor.dtype, tuple(tensor.shape), start))
        return stored

    def read(self, stored: list[Stored]) -> list[Tensor]:
        """The tensors, in a mapping of the file that is freed together with the last of them."""
        if not (size := os.fstat(self._file).st_size):
            return [torch.empty(shape, dtype=dtype) for dtype, shape, _ in stored]
        memory = mmap.mmap(self._file, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        return [
            torch.frombuffer(memory, dtype=dtype, count=count, offset=start).view(shape)
            if (count := math.prod(shape))
            else torch.empty(shape, dtype=dtype)
            for dtype, shape, start in stored
        ]

    def clear(self) -> None:
        """Free its memory; no tensor that `read` returned may still be in use."""
        os.ftruncate(self._file, 0)

    def close(self) -> None:
        os.close(self._file)


@contextlib.contextmanager
def not_inherited(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Context whose forked processes do not inherit the memory of `tensors`: reading it there would end the process.

    Of each tensor's storage that holds for its whole pages. On Linux; elsewhere, and for tensors that are not in host
    memory, it does nothing.
    """
    storages = {
        (storage.data_ptr(), storage.nbytes())
        for tensor in tensors
        if tensor.device.type == "cpu"
        for storage in [tensor.untyped_storage()]
    }
    inner = [pages for start, size in storages if (pages := _whole_pages(start, size))]
    kept: list[tuple[int, int]] = []
    try:
        for pages in inner:
            if _advise(pages, getattr(mmap, "MADV_DONTFORK", None)):
                kept.append(pages)
        yield
    finally:
        for pages in kept:
            _advise(pages, mmap.MADV_DOFORK)


def _whole_pages(start: int, size: int) -> tuple[int, int] | None:
    """Address and size in bytes of the pages that lie entirely in this memory."""
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (start + size) // mmap.PAGESIZE * mmap.PAGESIZE - first
    return (first, length) if length > 0 else None


def _advise(pages: tuple[int, int], advice: int | None) -> bool:
    """Whether the kernel accepted the advice."""
    if advice is None:
        return False
    address, length = pages
    return ctypes.CDLL(None).madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), ctypes.c_int(advice)) == 0
