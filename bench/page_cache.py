"""Page cache of the files that a benchmark reads: warm, or really cold.

`cold` writes the files' dirty pages back, asks the kernel to drop their pages (posix_fadvise(2), POSIX_FADV_DONTNEED)
and counts with mincore(2) what is left: pages that another process maps, or a file system in memory, stay.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np

from megatron_a2d.utils.errors import UserError

LEFT = 0.01  # share of a file's pages that may stay


def files_in(paths: Iterable[Path]) -> list[Path]:
    """The files among `paths`, and those below directories."""
    below = [sorted(path.rglob("*")) if path.is_dir() else [path] for path in paths]
    return [file for group in below for file in group if file.is_file()]


def warm(paths: Iterable[Path]) -> None:
    """Read everything once."""
    for file in files_in(paths):
        with open(file, "rb", buffering=0) as stream:
            while stream.read(1 << 24):
                pass


def cold(paths: Iterable[Path]) -> None:
    """Drop the files' pages; UserError if some stay."""
    os.sync()
    for file in files_in(paths):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
        if (left := resident(file)) > LEFT:
            raise UserError(
                f"{file}: {left:.0%} of it stays in the page cache; give a directory on a disk, with files that no "
                "other process has open"
            )


def resident(file: Path) -> float:
    """Share of a file's pages that the page cache holds."""
    size = file.stat().st_size
    if not size:
        return 0.0
    with open(file, "rb") as stream, mmap.mmap(stream.fileno(), size, access=mmap.ACCESS_READ) as mapped:
        pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        view = np.frombuffer(mapped, dtype=np.uint8)
        code = ctypes.CDLL(None, use_errno=True).mincore(
            ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(size), pages
        )
        del view
        if code:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(file))
        return float((np.frombuffer(bytes(pages), dtype=np.uint8) & 1).mean())


CACHES = {"warm": warm, "cold": cold}


def before(cache: str, reads: Iterable[Path], writes: Iterable[Path] = ()) -> Callable[[], None]:
    """What precedes each run: earlier outputs are removed, the disk is idle, and the inputs are `warm` or `cold`."""

    def prepare(reads: list[Path], writes: list[Path]) -> None:
        for path in writes:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        os.sync()
        CACHES[cache](reads)

    return partial(prepare, list(reads), list(writes))
