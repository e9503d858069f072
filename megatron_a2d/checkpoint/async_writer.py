"""Processes that write a rank's chunks, with --async-save in the background.

megatron.core's own writers report through queues, and hang when one of them is killed. Here one process per rank
writes, measures what it wrote, and answers through a pipe, which also closes if the process dies without an answer.

    ChunkWriter        one rank's part of one save
    BackgroundWriter   the run's means of writing while it trains

A process is forked for a save: it has the tensors as they were. On CPUs, training would then copy each page that it
shares with the process and changes, so there one process, forked before the first step, writes all saves, and is
handed copies of the tensors (fork_memory.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from torch import Tensor

from megatron_a2d.checkpoint.fork_memory import MemoryFile, not_inherited
from megatron_a2d.checkpoint.manifest import Entry, measure
from megatron_a2d.megatron_compat.device import has_cuda

_PR_SET_PDEATHSIG = 1  # of Linux's prctl
_LOWEST_PRIORITY = 19


class ChunkWriter:
    """Writing of this rank's planned `chunks` to `directory`, by another process; it starts at construction."""

    def __init__(self, chunks: FileSystemWriterAsync, directory: Path, background: BackgroundWriter | None = None):
        self._chunks = chunks
        self._is_empty = not chunks.write_buckets
        buckets = chunks.write_buckets or []
        if has_cuda():
            buckets = chunks.preload_tensors(buckets)  # copies from the GPU
        job = (buckets, [chunks.transforms] if hasattr(chunks, "transforms") else [], directory)
        self._process = background.start(*job) if background else _Process(_write_once, 0, *job)
        # The process has them now; megatron.core's finalizer reads only their number.
        chunks.write_buckets = [()] * len(buckets)  # type: ignore[list-item]

    def is_done(self) -> bool:
        return self._process.has_answered()  # also true if the process died

    def finish(self) -> dict[str, Entry]:
        """Wait for the process; returns sizes and checksums of its files. Raises the error that stopped it."""
        answer = self._process.answer()
        results, entries = (answer, {}) if isinstance(answer, Exception) else answer
        if not self._is_empty:
            self._chunks.results_queue = _Results(results)  # where megatron.core's finalizer looks
        if isinstance(answer, Exception):
            raise answer
        return entries


class BackgroundWriter:
    """Writes chunks while training continues, one save at a time, with what training leaves of the CPUs.

    `changing` returns the tensors that training changes. Construct it before the first step, whose memory the process
    would share. A process that was killed is replaced at the next save.
    """

    def __init__(self, changing: Callable[[], Iterable[Tensor]]):
        self._changing = changing
        self._memory = MemoryFile()
        self._process = None if has_cuda() else self._forked()

    def start(self, buckets: list[Any], transforms: list[Any], directory: Path) -> _Process:
        """Start writing; returns the process that writes."""
        if self._process is None:  # with a GPU training changes little of the host's memory
            return _Process(_write_once, _LOWEST_PRIORITY, buckets, transforms, directory)
        stored = self._memory.write([tensor for *_, (_, tensors) in buckets for _, tensor in tensors])
        job = (_replaced(buckets, stored), transforms, directory)
        if not self._process.send(job):
            self._process = self._forked()
            self._process.send(job)
        return self._process

    def close(self) -> None:
        """End the process, even while it writes."""
        if self._process:
            self._process.kill()
        self._memory.close()

    def _forked(self) -> _Process:
        with not_inherited(self._changing()):
            return _Process(_write_always, _LOWEST_PRIORITY, self._memory)


class _Process:
    """Forked process that answers through a pipe; `function` gets its end of it and the arguments."""

    def __init__(self, function: Callable[..., None], niceness: int, *arguments: Any):
        context = multiprocessing.get_context("fork")
        self._connection, theirs = context.Pipe()
        self._has_job = False
        begin = (function, niceness, os.getpid(), self._connection, theirs)
        self._process = context.Process(target=_begin, args=(*begin, *arguments), daemon=True)
        self._process.start()
        theirs.close()

    def send(self, job: Any) -> bool:
        """Send the job; returns whether the process is alive."""
        if self._has_job:  # of a save that failed on another rank, so that nobody waited for this one
            self.answer()
        try:
            self._connection.send(job)
        except OSError:
            return False
        self._has_job = True
        return True

    def has_answered(self) -> bool:
        return self._connection.poll()

    def answer(self) -> Any:
        """The process's answer; an OSError if it ended without one."""
        self._has_job = False
        try:
            return self._connection.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            code = self._process.exitcode
            return OSError(f"the process that wrote the chunks ended with exit code {code} before it was done")

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


@contextlib.contextmanager
def without_queues() -> Iterator[None]:
    """Keep megatron.core from starting a process that holds a queue of results, which is not used here."""
    original, filesystem_async._results_queue = filesystem_async._results_queue, _Results({})
    try:
        yield
    finally:
        filesystem_async._results_queue = original


def _replaced(buckets: list[Any], tensors: Iterable[Any]) -> list[Any]:
    """`buckets` with these in place of their tensors."""
    others = iter(tensors)
    return [(*names, (objects, [(item, next(others)) for item, _ in old])) for *names, (objects, old) in buckets]


def _begin(
    function: Callable[..., None], niceness: int, parent: int, theirs: Connection, ours: Connection, *arguments: Any
) -> None:
    """Main function of a writer process. No garbage collection: GPU tensors in its memory belong to the parent."""
    theirs.close()
    gc.disable()
    os.nice(niceness)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # training's handler only records it
    for number in (signal.SIGINT, signal.SIGUSR1):  # sent to all processes of a terminal, or of a job
        signal.signal(number, signal.SIG_IGN)
    _end_with(parent)
    function(ours, *arguments)


def _write_once(connection: Connection, *job: Any) -> None:
    connection.send(_write(*job))


def _write_always(connection: Connection, memory: MemoryFile) -> None:
    gc.freeze()  # collections skip training's objects
    gc.enable()
    while True:
        try:
            buckets, transforms, directory = connection.recv()
        except EOFError:
            return
        stored = [tensor for *_, (_, tensors) in buckets for _, tensor in tensors]
        answer = _write(_replaced(buckets, memory.read(stored)), transforms, directory)
        memory.clear()
        connection.send(answer)


def _write(buckets: list[Any], transforms: list[Any], directory: Path) -> Any:
    """Results for megatron.core's finalizer, and sizes and checksums of the files; or the error that stopped it.

    Starts no threads: where there is no memory to start one, Thread.start() waits for ever (CPython 3.11), and with it
    all ranks for this one's answer.
    """
    results = _Results({})
    try:
        for number, bucket in enumerate(buckets):
            FileSystemWriterAsync.write_preloaded_data(transforms, number, bucket, results, results, use_fsync=True)
        for value in results.value.values():
            if isinstance(value, Exception):
                raise value
        names = [os.path.basename(path) for path, *_ in buckets]
        return results.value, measure(directory, names, num_threads=1)
    except Exception as error:
        return error if isinstance(error, OSError) else RuntimeError(str(error))


def _end_with(parent: int) -> None:
    """Kill this process when the parent dies: it holds the parent's connections, on which other ranks wait."""
    with contextlib.suppress(OSError, AttributeError):  # Linux only
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


class _Results:
    """Replacement of megatron.core's queues: of results, of finished workers, and of what the finalizer reads."""

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
