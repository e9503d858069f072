"""Saving in steps that every rank ends together, whatever fails on one of them; in the background if wanted.

megatron.core.dist_checkpointing.save raises on the rank whose disk is full while the others wait for it in the
next collective. Here a failed write is remembered instead, and `agree` tells all ranks after each step. Its steps are
taken one by one for another reason too: from 0.17 on it has no common.pt, and ours are one format under all versions.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint import CheckpointException

from megatron_a2d.checkpoint.async_writer import ChunkWriter, without_queues
from megatron_a2d.checkpoint.manifest import Entry
from megatron_a2d.megatron_compat.versions import async_save_options
from megatron_a2d.utils.errors import SaveError, UserError

# torch.save reports a full disk as a RuntimeError. CheckpointException carries what happened on other ranks.
_WRITE_ERRORS = (OSError, RuntimeError, CheckpointException, UserError)

# It announces what its processes raise, which we are told anyway.
logging.getLogger("megatron.core.dist_checkpointing.strategies.filesystem_async").setLevel(logging.CRITICAL)


class CollectiveSave:
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
        sharded, common = save_preprocess({**state, "content_metadata": content_metadata})
        if dist.get_rank() == 0:
            self.attempt(torch.save, common, directory / "common.pt")
        strategy = _ShardedStrategy(self)
        with without_queues():
            request = strategy.async_save(sharded, directory, **async_save_options())
        self.agree()
        assert isinstance(request, AsyncRequest)
        (self._finalize,) = request.finalize_fns
        self._writer = self.attempt(ChunkWriter, strategy.chunks, directory)
        self.agree()

    def is_written(self) -> bool:
        """Whether this rank's chunks are written, or cannot be."""
        return self._writer.is_done()

    def finish_writing(self) -> dict[str, Entry]:
        """Wait for all ranks' chunks, then write .metadata (metadata.json is left); collective, to be called once.

        Returns size and checksum of each chunk file, of all ranks.
        """
        entries = self.attempt(self._writer.finish) or {}
        self.attempt(self._finalize)  # its collectives run whatever happened above
        del self._writer, self._finalize
        self.agree()
        parts: list[dict[str, Entry]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(parts, entries)
        return {name: entry for part in parts for name, entry in part.items()}


class _ShardedStrategy(TorchDistSaveShardedStrategy):
    """Plans chunks, and .metadata; an error of the rank that writes .metadata is remembered."""

    def __init__(self, saving: CollectiveSave):
        super().__init__("torch_dist", 1, thread_count=2)
        self._saving = saving
        self.chunks: Any = None

    def _get_save_and_finalize_callbacks(self, writer: Any, *plan: Any) -> AsyncRequest:
        self.chunks = writer
        finish = writer.finish
        writer.finish = lambda *arguments: self._saving.attempt(finish, *arguments)
        return super()._get_save_and_finalize_callbacks(writer, *plan)


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
