"""Saving in steps that every rank ends together, whatever fails on one of them; in the background if wanted.

megatron.core.dist_checkpointing.save raises on the rank whose disk is full while the others wait for it in the
next collective. Here a failed write is remembered instead, and `agree` tells all ranks after each step. Each rank's
chunks are written by a process of its own: a fork, which keeps the tensors as they were while training goes on.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.base import StrategyAction, register_default_strategy
from megatron.core.dist_checkpointing.strategies.common import TorchCommonSaveStrategy
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint import CheckpointException

from megatron_a2d.conversion.manifest import Entry, measure
from megatron_a2d.errors import SaveError
from megatron_a2d.runtime.device import has_cuda

# torch.save reports a full disk as a RuntimeError. CheckpointException carries what happened on other ranks.
_WRITE_ERRORS = (OSError, RuntimeError, CheckpointException)

# It announces what its processes raise, which we are told anyway.
logging.getLogger("megatron.core.dist_checkpointing.strategies.filesystem_async").setLevel(logging.CRITICAL)


class Saving:
    """One save. Steps are `attempt`s; after each, `agree` raises SaveError on all ranks if one of them failed."""

    def __init__(self) -> None:
        self._error: str | None = None

    def attempt(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """function(*arguments); what a full or broken disk raises is remembered, and None returned."""
        try:
            return function(*arguments)
        except _WRITE_ERRORS as error:
            self._error = self._error or _reason(error)
            return None

    def agree(self) -> None:
        """Collective."""
        errors: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(errors, self._error)
        if error := next(filter(None, errors), None):
            raise SaveError(error)

    def start_writing(self, state: dict[str, Any], directory: Path, content_metadata: dict[str, Any]) -> None:
        """Begin megatron's files of `state` in the existing empty `directory`; collective.

        When it returns, the tensors in `state` may change: what is written is what they are now.
        """
        self._directory = directory
        # Results come through our own pipe: megatron.core would start a process to hold a queue.
        filesystem_async._results_queue = _NO_QUEUE
        register_default_strategy(StrategyAction.SAVE_COMMON, "torch", 1, _CommonStrategy(self))
        strategy = _ShardedStrategy(self)
        request = dist_checkpointing.save(
            state, str(directory), strategy, async_sharded_save=True, content_metadata=content_metadata
        )
        assert isinstance(request, AsyncRequest) and strategy.writer is not None
        self._request, self._chunks = request, strategy.writer
        self.agree()
        self._process = self.attempt(_WriterProcess, self._chunks, directory)
        self.agree()

    def is_written(self) -> bool:
        """Whether this rank's chunks are written, or cannot be."""
        return self._process.is_done()

    def finish_writing(self) -> dict[str, Entry]:
        """Wait for all ranks' chunks, then write .metadata (metadata.json is left); collective.

        Returns size and checksum of each chunk file, of all ranks.
        """
        answer = self.attempt(self._process.answer)
        results, entries = answer or (OSError(self._error or ""), {})
        if self._chunks.write_buckets:
            self._chunks.results_queue = _Answer(results)
        # Its collectives run whatever happened above. The other finalizer writes metadata.json before a barrier.
        self.attempt(self._request.finalize_fns[0])
        self.agree()
        parts: list[dict[str, Entry]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(parts, entries)
        return {name: entry for part in parts for name, entry in part.items()}


class _CommonStrategy(TorchCommonSaveStrategy):
    """common.pt; an error is remembered."""

    def __init__(self, saving: Saving):
        super().__init__("torch", 1)
        self._saving = saving

    def save_common(self, common_state_dict: Any, checkpoint_dir: Any) -> None:
        self._saving.attempt(super().save_common, common_state_dict, checkpoint_dir)


class _ShardedStrategy(TorchDistSaveShardedStrategy):
    """Plans chunks, and .metadata; an error of the rank that writes .metadata is remembered."""

    def __init__(self, saving: Saving):
        super().__init__("torch_dist", 1)
        self._saving = saving
        self.writer: FileSystemWriterAsync | None = None

    def _get_save_and_finalize_callbacks(self, writer: Any, save_state_dict_ret: Any) -> AsyncRequest:
        self.writer = writer
        finish = writer.finish
        writer.finish = lambda *arguments: self._saving.attempt(finish, *arguments)
        return super()._get_save_and_finalize_callbacks(writer, save_state_dict_ret)


class _WriterProcess:
    """Writes this rank's chunks, and measures what it wrote."""

    def __init__(self, chunks: FileSystemWriterAsync, directory: Path):
        buckets = chunks.write_buckets or []
        if has_cuda():
            buckets = chunks.preload_tensors(buckets)  # copies from the GPU
        context = multiprocessing.get_context("fork")
        self._connection, theirs = context.Pipe(duplex=False)
        transforms = [chunks.transforms] if hasattr(chunks, "transforms") else []
        self._process = context.Process(target=_write, args=(theirs, buckets, transforms, directory), daemon=True)
        self._process.start()
        theirs.close()

    def is_done(self) -> bool:
        return self._connection.poll()  # an end without an answer counts too

    def answer(self) -> tuple[dict[int, Any], dict[str, Entry]]:
        """Write results by bucket, and the files' sizes and checksums; raises what kept it from writing."""
        try:
            answer = self._connection.recv()
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            raise OSError(f"the process that wrote the chunks ended with exit code {code} before it was done") from None
        self._process.join()
        if isinstance(answer, Exception):
            raise answer
        return answer


def _write(connection: Connection, buckets: list[Any], transforms: list[Any], directory: Path) -> None:
    """In the process of its own. Garbage is not collected: GPU tensors in it are the parent's."""
    gc.disable()
    results: _Results = _Results()
    try:
        for number, bucket in enumerate(buckets):
            FileSystemWriterAsync.write_preloaded_data(transforms, number, bucket, results, results, use_fsync=True)
        if error := next((value for value in results.values() if isinstance(value, Exception)), None):
            raise error
        entries = measure(directory, [os.path.basename(path) for path, *_ in buckets])
        connection.send((dict(results), entries))
    except Exception as error:
        connection.send(error if isinstance(error, OSError) else RuntimeError(str(error)))


class _Results(dict[int, Any]):
    """Stands for both queues of megatron.core's writer: what it found, and that it has ended."""

    def put(self, item: tuple[int, Any]) -> None:
        number, result = item
        self[number] = result

    def get(self) -> None:  # type: ignore[override]
        pass

    def task_done(self) -> None:
        pass


class _Answer:
    """Stands for the queue that megatron.core's finalizer reads."""

    def __init__(self, results: Any):
        self._results = results

    def get_nowait(self) -> Any:
        return self._results


_NO_QUEUE = _Answer({})


def _reason(error: BaseException) -> str | None:
    """One line: the cause, not what was wrapped around it. None on ranks that are only told of another's failure."""
    rank = dist.get_rank()
    if isinstance(error, CheckpointException):
        if not error.failures:
            return None
        rank, (error, _) = next(iter(error.failures.items()))
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split()).removeprefix("Worker failure: ")
    return f"{type(error).__name__}: {text[:200]}, on rank {rank}"
