"""Background writer of a rank's chunks: a forked process, which keeps the tensors as they were during training.

megatron.core's own writers report through queues, and hang when one of them is killed. Here one process writes,
measures what it wrote, and answers through a pipe, which also tells when it ended without an answer.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import os
import signal
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from megatron_a2d.checkpoint.manifest import Entry, measure
from megatron_a2d.megatron_compat.device import has_cuda

_PR_SET_PDEATHSIG = 1  # of Linux's prctl


class ChunkWriter:
    """Begins to write the planned `chunks` into `directory`."""

    def __init__(self, chunks: FileSystemWriterAsync, directory: Path):
        self._chunks = chunks
        self._is_empty = not chunks.write_buckets
        buckets = chunks.write_buckets or []
        if has_cuda():
            buckets = chunks.preload_tensors(buckets)  # copies from the GPU
        transforms = [chunks.transforms] if hasattr(chunks, "transforms") else []
        context = multiprocessing.get_context("fork")
        self._connection, theirs = context.Pipe(duplex=False)
        arguments = (theirs, os.getpid(), buckets, transforms, directory)
        self._process = context.Process(target=_write, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        # The process has them now, and megatron.core's finalizer wants only their number.
        chunks.write_buckets = [()] * len(buckets)  # type: ignore[list-item]

    def is_done(self) -> bool:
        return self._connection.poll()  # an end without an answer counts too

    def finish(self) -> dict[str, Entry]:
        """Wait; sizes and checksums of the files. Raises what kept them from being written."""
        answer: Any
        try:
            answer = self._connection.recv()
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            answer = OSError(f"the process that wrote the chunks ended with exit code {code} before it was done")
        self._process.join()
        results, entries = (answer, {}) if isinstance(answer, Exception) else answer
        if not self._is_empty:
            self._chunks.results_queue = _Results(results)  # where megatron.core's finalizer looks
        if isinstance(answer, Exception):
            raise answer
        return entries


@contextlib.contextmanager
def without_queues() -> Iterator[None]:
    """megatron.core starts a process to hold a queue of results; here none is needed."""
    original, filesystem_async._results_queue = filesystem_async._results_queue, _Results({})
    try:
        yield
    finally:
        filesystem_async._results_queue = original


def _write(connection: Connection, parent: int, buckets: list[Any], transforms: list[Any], directory: Path) -> None:
    """In the process of its own. Garbage is not collected: GPU tensors in it are the parent's."""
    gc.disable()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # training only remembers it
    _end_with(parent)
    results = _Results({})
    try:
        for number, bucket in enumerate(buckets):
            FileSystemWriterAsync.write_preloaded_data(transforms, number, bucket, results, results, use_fsync=True)
        for value in results.value.values():
            if isinstance(value, Exception):
                raise value
        entries = measure(directory, [os.path.basename(path) for path, *_ in buckets])
        connection.send((results.value, entries))
    except Exception as error:
        connection.send(error if isinstance(error, OSError) else RuntimeError(str(error)))


def _end_with(parent: int) -> None:
    """When the parent is killed, this process is too: it holds the parent's connections, and peers wait on those."""
    with contextlib.suppress(OSError, AttributeError):  # Linux alone knows it
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


class _Results:
    """Stands for all of megatron.core's queues: of results, of workers that are done, of what the finalizer reads."""

    def __init__(self, value: Any):
        self.value = value

    def put(self, item: tuple[int, Any]) -> None:
        number, result = item
        self.value[number] = result

    def get(self) -> None:
        pass

    def task_done(self) -> None:
        pass

    def get_nowait(self) -> Any:
        return self.value
