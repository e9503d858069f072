"""Thread pool for writing several files in parallel: reading, writing and checksums all release the GIL."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

# Some threads wait for the disk while others compute checksums; more than a few only compete for the disk.
DEFAULT_WORKERS = 4

T = TypeVar("T")
Advance = Callable[[float], None]


class _StoppedError(Exception):
    """Raised in a thread to stop it after another one failed or the user interrupted."""


def run_jobs(jobs: Sequence[Callable[[Advance], T]], workers: int, advance: Advance) -> list[T]:
    """The results of `jobs`, in order, running `workers` at a time. Each job gets an `advance` callback, which stops it
    once another job has failed; the first failure is raised after all have stopped."""
    stop = threading.Event()

    def checked(amount: float) -> None:
        if stop.is_set():
            raise _StoppedError
        advance(amount)

    with ThreadPoolExecutor(max(1, workers)) as pool:
        futures = [pool.submit(job, checked) for job in jobs]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()
            unfinished = [future for future in futures if not future.done()]
            if unfinished:
                pool.shutdown(wait=True, cancel_futures=True)
    failures = [future.exception() for future in futures if not future.cancelled()]
    for failure in failures:
        if failure is not None and not isinstance(failure, _StoppedError):
            raise failure
    return [future.result() for future in futures]
