"""Memory of a forked process: copies of the tensors that it is to write, and no access to those that training changes.

A fork shares all pages, and whoever changes one copies it first, in a page fault of its own. After a fork that shares
them, one step of a training process on CPUs does that for all of its weights, gradients and optimizer state. It costs
less to copy what is to be written at once, before the fork, and to share nothing else of these.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

_ALIGNMENT = 64  # bytes


def copy_to_mapping(tensors: list[Tensor]) -> list[Tensor]:
    """Copies of host tensors in a separate memory mapping, which is freed together with the last of them."""
    starts, end = [], 0
    for tensor in tensors:
        starts.append(end)
        end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    memory = mmap.mmap(-1, max(end, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError, AttributeError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    copies = []
    for tensor, start in zip(tensors, starts, strict=True):
        if not tensor.nbytes:
            copies.append(torch.empty_like(tensor))
            continue
        flat = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=start)
        copies.append(flat.view(tensor.shape).copy_(tensor.detach()))
    return copies


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
    """Address and bytes of the pages that lie in this memory entirely."""
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (start + size) // mmap.PAGESIZE * mmap.PAGESIZE - first
    return (first, length) if length > 0 else None


def _advise(pages: tuple[int, int], advice: int | None) -> bool:
    """Whether the kernel took the advice."""
    if advice is None:
        return False
    address, length = pages
    return ctypes.CDLL(None).madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), ctypes.c_int(advice)) == 0
