"""Writer process of a rank's chunks: forked, so that training continues while it writes (--async-save).

megatron.core's own writers report through queues, and hang when one of them is killed. Here one process per rank
writes, measures what it wrote, and answers through a pipe, which also closes if the process dies without an answer. A
forked process keeps the tensors as they were; beside training on CPUs it gets copies of them (fork_memory.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import os
import signal
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from torch import Tensor

from megatron_a2d.checkpoint.fork_memory import copy_to_mapping, not_inherited
from megatron_a2d.checkpoint.manifest import Entry, measure
from megatron_a2d.megatron_compat.device import has_cuda

_PR_SET_PDEATHSIG = 1  # of Linux's prctl


class ChunkWriter:
    """Process that writes this rank's planned `chunks` to `directory`; it starts at construction.

    `in_background`: training needs the CPUs at the same time, so the process takes only what training leaves.
    `changing`: the tensors that training changes meanwhile.
    """

    def __init__(
        self,
        chunks: FileSystemWriterAsync,
        directory: Path,
        in_background: bool = False,
        changing: Iterable[Tensor] = (),
    ):
        self._chunks = chunks
        self._is_empty = not chunks.write_buckets
        buckets = chunks.write_buckets or []
        withheld: Iterable[Tensor] = ()
        if has_cuda():
            buckets = chunks.preload_tensors(buckets)  # copies from the GPU
        elif in_background:
            buckets, withheld = _copied(buckets), changing
        transforms = [chunks.transforms] if hasattr(chunks, "transforms") else []
        context = multiprocessing.get_context("fork")
        self._connection, theirs = context.Pipe(duplex=False)
        arguments = (theirs, os.getpid(), buckets, transforms, directory, in_background)
        self._process = context.Process(target=_write, args=arguments, daemon=True)
        with not_inherited(withheld):
            self._process.start()
        theirs.close()
        # The process has them now; megatron.core's finalizer reads only their number.
        chunks.write_buckets = [()] * len(buckets)  # type: ignore[list-item]

    def is_done(self) -> bool:
        return self._connection.poll()  # also true if the process died

    def finish(self) -> dict[str, Entry]:
        """Wait for the process; returns sizes and checksums of its files. Raises the error that stopped it."""
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
    """Keep megatron.core from starting a process that holds a queue of results, which is not used here."""
    original, filesystem_async._results_queue = filesystem_async._results_queue, _Results({})
    try:
        yield
    finally:
        filesystem_async._results_queue = original


def _copied(buckets: list[Any]) -> list[Any]:
    """`buckets` with copies of their tensors."""
    copies = iter(copy_to_mapping([tensor for *_, (_, tensors) in buckets for _, tensor in tensors]))
    return [
        (*names, (objects, [(item, next(copies)) for item, _ in tensors])) for *names, (objects, tensors) in buckets
    ]


def _write(
    connection: Connection,
    parent: int,
    buckets: list[Any],
    transforms: list[Any],
    directory: Path,
    in_background: bool,
) -> None:
    """Main function of the writer process. No garbage collection: GPU tensors in its memory belong to the parent.

    No threads either: where there is no memory to start one, Thread.start() waits for ever (CPython 3.11), and with it
    all ranks for this one's answer.
    """
    gc.disable()
    if in_background:
        os.nice(19)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # training's handler only records it
    _end_with(parent)
    results = _Results({})
    try:
        for number, bucket in enumerate(buckets):
            FileSystemWriterAsync.write_preloaded_data(transforms, number, bucket, results, results, use_fsync=True)
        for value in results.value.values():
            if isinstance(value, Exception):
                raise value
        names = [os.path.basename(path) for path, *_ in buckets]
        entries = measure(directory, names, num_threads=1)
        connection.send((results.value, entries))
    except Exception as error:
        connection.send(error if isinstance(error, OSError) else RuntimeError(str(error)))


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
