"""Saving a checkpoint's files: the sharded state dict by megatron.core's steps one by one, and the final rename.

    start_writing  -> plan of the chunks (megatron.core) -> async_writer.py: another process writes this rank's chunks
    finish_writing -> all chunks are on disk -> .metadata (megatron.core)
    commit         -> manifest -> rename -> tracker

megatron.core.dist_checkpointing.save raises on the rank whose disk is full while the others wait for it in the next
collective. Here a failure is recorded, and `raise_on_failure` exchanges it between all ranks after each step. There is
another reason for taking the steps one by one: from 0.17 on `save` writes no common.pt, and checkpoints of this project
have one format under all versions.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint import CheckpointException

from megatron_a2d.checkpoint.async_writer import BackgroundWriter, ChunkWriter, without_queues
from megatron_a2d.checkpoint.directory import TRACKER
from megatron_a2d.checkpoint.manifest import Entry, write_manifest
from megatron_a2d.megatron_compat.versions import async_save_options
from megatron_a2d.utils.atomic_write import fsync_path, new_file
from megatron_a2d.utils.errors import SaveError, UserError
from megatron_a2d.utils.partial_files import partial_path

# torch.save reports a full disk as a RuntimeError. CheckpointException carries the errors of other ranks.
_WRITE_ERRORS = (OSError, RuntimeError, CheckpointException, UserError)

# It logs the errors of its processes, which are raised here anyway.
logging.getLogger("megatron.core.dist_checkpointing.strategies.filesystem_async").setLevel(logging.CRITICAL)


class CollectiveSave:
    """One save, in steps: after each, `raise_on_failure` raises SaveError on all ranks if it failed on one of them.

    `background` writes it while training continues.
    """

    def __init__(self, background: BackgroundWriter | None = None) -> None:
        self._background = background
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
        self._writer = self.attempt(ChunkWriter, strategy.chunks, directory, self._background)
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


def commit(partial: Path, final: Path, known: dict[str, Entry], iteration: int) -> None:
    """Make the directory `partial` the checkpoint `final`: manifest, flush to disk, rename, tracker; on one rank.

    `known` holds size and checksum of files that were measured while they were written.
    """
    write_manifest(partial, known, num_threads=1)  # what is not known is small; no threads, as in async_writer.py
    for entry in partial.rglob("*"):
        fsync_path(entry)
    fsync_path(partial)
    replaced = partial_path(final.with_name(f"{final.name}.replaced"))
    if final.exists():  # a run that resumed from an earlier iteration writes it again
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(final, replaced)
    os.rename(partial, final)
    fsync_path(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    with new_file(final.parent / TRACKER) as tracker:
        tracker.write_text(f"{iteration}\n")
