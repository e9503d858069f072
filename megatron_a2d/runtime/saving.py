"""Saving in steps that every rank ends together, whatever fails on one of them.

megatron.core.dist_checkpointing.save raises on the rank whose disk is full while the others wait for it in the
next collective. Here a failed write is remembered instead, and `agree` tells all ranks after each step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.base import StrategyAction, register_default_strategy
from megatron.core.dist_checkpointing.strategies.common import TorchCommonSaveStrategy
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint import CheckpointException

from megatron_a2d.errors import SaveError

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

    def write_state(self, state: dict[str, Any], directory: Path, content_metadata: dict[str, Any]) -> None:
        """megatron's files of `state`, into the existing empty `directory`: all but metadata.json. Collective."""
        register_default_strategy(StrategyAction.SAVE_COMMON, "torch", 1, _CommonStrategy(self))
        request = dist_checkpointing.save(
            state, str(directory), _ShardedStrategy(self), async_sharded_save=True, content_metadata=content_metadata
        )
        assert isinstance(request, AsyncRequest) and request.async_fn_args is not None
        self.agree()
        self.attempt(_write, request)
        # Its collectives run whatever happened above. The other finalizer writes metadata.json before a barrier.
        self.attempt(request.finalize_fns[0])
        self.agree()


class _CommonStrategy(TorchCommonSaveStrategy):
    """common.pt; an error is remembered."""

    def __init__(self, saving: Saving):
        super().__init__("torch", 1)
        self._saving = saving

    def save_common(self, common_state_dict: Any, checkpoint_dir: Any) -> None:
        self._saving.attempt(super().save_common, common_state_dict, checkpoint_dir)


class _ShardedStrategy(TorchDistSaveShardedStrategy):
    """Chunks and .metadata; an error of the rank that writes .metadata is remembered."""

    def __init__(self, saving: Saving):
        super().__init__("torch_dist", 1)
        self._saving = saving

    def _get_save_and_finalize_callbacks(self, writer: Any, save_state_dict_ret: Any) -> AsyncRequest:
        finish = writer.finish
        writer.finish = lambda *arguments: self._saving.attempt(finish, *arguments)
        return super()._get_save_and_finalize_callbacks(writer, save_state_dict_ret)


def _write(request: AsyncRequest) -> None:
    """This rank's chunks, by processes of its own; what fails in them is told by the finalizer."""
    if request.async_fn is None:  # nothing to write
        return
    arguments = list(request.async_fn_args)
    if request.preload_fn is not None:
        arguments[1] = request.preload_fn()  # copies from the GPU
    request.async_fn(*arguments)


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
