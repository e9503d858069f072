"""Several files written at once by threads: reading, writing and checksums all leave the interpreter's lock."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

# While some wait for the disk, others check and hash. More than a few only compete for it.
DEFAULT_WORKERS = 4

T = TypeVar("T")
Advance = Callable[[float], None]


class _StoppedError(Exception):
    """Another thread failed, or the user interrupted; this one has nothing to say."""


def run_jobs(jobs: Sequence[Callable[[Advance], T]], workers: int, advance: Advance) -> list[T]:
    """The results of `jobs` in their order, `workers` of them at a time. Each is given an `advance` of its own,
    which ends it when another one has failed; the first failure is raised, when all have ended."""
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
