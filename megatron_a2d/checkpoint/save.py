"""Saving a sharded state dict: megatron.core's steps one by one, with failures that every rank learns of.

    start_writing -> plan of the chunks (megatron.core) -> ChunkWriter: a forked process writes this rank's chunks
    finish_writing -> all chunks are on disk -> .metadata (megatron.core)

megatron.core.dist_checkpointing.save raises on the rank whose disk is full while the others wait for it in the next
collective. Here a failure is recorded, and `raise_on_failure` exchanges it between all ranks after each step. There is
another reason for taking the steps one by one: from 0.17 on `save` writes no common.pt, and checkpoints of this project
have one format under all versions.

megatron.core's own writers report through queues, and hang when one of them is killed. Here one process per rank
writes, measures what it wrote, and answers through a pipe, which also closes if the process dies without an answer. The
process is forked: it keeps the tensors as they were, so training continues while it writes (--async-save).
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint import CheckpointException

from megatron_a2d.checkpoint.manifest import Entry, measure
from megatron_a2d.megatron_compat.device import has_cuda
from megatron_a2d.megatron_compat.versions import async_save_options
from megatron_a2d.utils.errors import SaveError, UserError

# torch.save reports a full disk as a RuntimeError. CheckpointException carries the errors of other ranks.
_WRITE_ERRORS = (OSError, RuntimeError, CheckpointException, UserError)
_PR_SET_PDEATHSIG = 1  # of Linux's prctl

# It logs the errors of its processes, which are raised here anyway.
logging.getLogger("megatron.core.dist_checkpointing.strategies.filesystem_async").setLevel(logging.CRITICAL)


class CollectiveSave:
    """One save, in steps: after each, `raise_on_failure` raises SaveError on all ranks if it failed on one of them."""

    def __init__(self) -> None:
        self._error: str | None = None

    def attempt(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """function(*arguments); an error of a full or broken disk is recorded, and None returned."""
        try:
            return function(*arguments)
        except _WRITE_ERRORS as error:
            self._error = self._error or _reason(error)
            return None

    def raise_on_failure(self) -> None:
        """SaveError on all ranks if an attempt failed on any of them. Collective."""
        errors: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(errors, self._error)
        if error := next(filter(None, errors), None):
            raise SaveError(error)

    def start_writing(self, state: dict[str, Any], directory: Path, content_metadata: dict[str, Any]) -> None:
        """Start to write megatron's files of `state` to the existing empty `directory`; collective.

        When it returns, the tensors in `state` may change: the values at the time of the call are written.
        """
        sharded, common = save_preprocess({**state, "content_metadata": content_metadata})
        if dist.get_rank() == 0:
            self.attempt(torch.save, common, directory / "common.pt")
        strategy = _ShardedStrategy(self)
        with without_queues():
            request = strategy.async_save(sharded, directory, **async_save_options())
        self.raise_on_failure()
        assert isinstance(request, AsyncRequest)
        (self._finalize,) = request.finalize_fns
        self._writer = self.attempt(ChunkWriter, strategy.chunks, directory)
        self.raise_on_failure()

    def is_written(self) -> bool:
        """Whether this rank's chunks have been written, or have failed."""
        return self._writer.is_done()

    def finish_writing(self) -> dict[str, Entry]:
        """Wait for all ranks' chunks, then write .metadata (but not metadata.json); collective, to be called once.

        Returns size and checksum of every rank's chunk files.
        """
        entries = self.attempt(self._writer.finish) or {}
        self.attempt(self._finalize)  # it has collectives, so it runs on every rank whatever failed above
        del self._writer, self._finalize
        self.raise_on_failure()
        entries_by_rank: list[dict[str, Entry]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(entries_by_rank, entries)
        return {name: entry for entries in entries_by_rank for name, entry in entries.items()}


class _ShardedStrategy(TorchDistSaveShardedStrategy):
    """Planner of the chunks and of .metadata; an error of the rank that writes .metadata is recorded."""

    def __init__(self, save: CollectiveSave):
        super().__init__("torch_dist", 1, thread_count=2)
        self._collective_save = save
        self.chunks: Any = None

    def _get_save_and_finalize_callbacks(self, writer: Any, *plan: Any) -> AsyncRequest:
        self.chunks = writer
        finish = writer.finish
        writer.finish = lambda *arguments: self._collective_save.attempt(finish, *arguments)
        return super()._get_save_and_finalize_callbacks(writer, *plan)


def _reason(error: BaseException) -> str | None:
    """The innermost cause, on one line; None on ranks that only report another rank's failure."""
    rank = dist.get_rank()
    if isinstance(error, CheckpointException):
        if not error.failures:
            return None
        rank, (error, _) = next(iter(error.failures.items()))
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split()).removeprefix("Worker failure: ")
    return f"{type(error).__name__}: {text[:200]}, on rank {rank}"


class ChunkWriter:
    """Process that writes this rank's planned `chunks` to `directory`; it starts at construction."""

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


def _write(connection: Connection, parent: int, buckets: list[Any], transforms: list[Any], directory: Path) -> None:
    """Main function of the writer process. No garbage collection: GPU tensors in its memory belong to the parent."""
    gc.disable()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # training's handler only records it
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
