"""Parallel load of a checkpoint into the ranks' shards: every byte is read once, by one rank that needs it.

megatron.core's default load reads complete chunks even if a rank needs a small slice; replicated slices are read by
every rank; and torch unpickles .metadata. Here its steps are taken one by one, slices are read by
torch_dist_reader.py, which unpickles nothing, and each replicated slice is read by one rank, which sends it to the
others (megatron.core's FullyParallelLoadStrategyWrapper).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, merge, nested_values
from megatron.core.dist_checkpointing.mapping import apply_factory_merges
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper
from megatron.core.dist_checkpointing.utils import extract_sharded_base, force_all_tensors_to_non_fp8
from megatron.core.dist_checkpointing.validation import determine_global_metadata, validate_sharding_integrity

from megatron_a2d.checkpoint.metadata_index import Box
from megatron_a2d.checkpoint.torch_dist_reader import EXPERT_BIAS, TorchDistCheckpoint, open_torch_dist
from megatron_a2d.megatron_compat.device import device
from megatron_a2d.utils.errors import UserError


def load_state(wanted: dict[str, Any], directory: Path) -> dict[str, Any]:
    """`wanted` with its sharded tensors read from the iteration's directory. Collective.

    Biases of experts that the checkpoint lacks are left out. UserError if it has some that are not wanted.

    UserError on all ranks if the checkpoint is damaged, lacks a tensor, or has one of another shape.
    """
    force_all_tensors_to_non_fp8(wanted)
    problems = _Problems()
    with ExitStack() as stack, _receiving_on(device()):
        stored = problems.attempt(lambda: stack.enter_context(open_torch_dist(directory)))
        problems.raise_on_failure()
        problems.attempt(lambda: _check_biases(wanted, stored, directory))
        problems.raise_on_failure()
        if EXPERT_BIAS not in stored.all_shapes:
            wanted = _without_biases(wanted)
        wanted, local, factories = load_preprocess(wanted)
        sharded, _ = extract_sharded_base(wanted)
        _, shards_of_all = determine_global_metadata(sharded)
        validate_sharding_integrity(shards_of_all)
        for shard in nested_values(sharded):
            if shard.data is not None and not shard.data.is_contiguous():
                shard.data = None  # exchanged tensors must be contiguous: a new tensor receives this one
        slices = _Slices(stored, directory, problems)
        loaded = FullyParallelLoadStrategyWrapper(slices).load(sharded, directory)
        problems.raise_on_failure()
    state: dict[str, Any] = apply_factory_merges(merge(loaded, local), factories)
    return state


def _is_bias(value: Any) -> bool:
    return isinstance(value, ShardedTensor) and value.key == EXPERT_BIAS


def _without_biases(wanted: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _without_biases(value) if isinstance(value, dict) else value
        for name, value in wanted.items()
        if not _is_bias(value)
    }


def _check_biases(wanted: dict[str, Any], stored: TorchDistCheckpoint, directory: Path) -> None:
    """Biases that are not wanted must be zero, as they are at the end of a run."""
    if not any(_is_bias(value) for value in nested_values(wanted)) and stored.has_expert_bias():
        raise UserError(
            f"{directory}: its experts' biases are not zero, and its routers do not choose the same experts without "
            "them; add --moe-router-enable-expert-bias, or use a checkpoint from the end of the run"
        )


class _Problems:
    """This rank's read errors, kept until all ranks have exchanged their slices.

    A rank that raised at once would leave the others waiting.
    """

    def __init__(self) -> None:
        self._problems: list[str] = []

    def attempt(self, function: Callable[[], Any]) -> Any:
        """function(), or None if it raises a UserError, which is recorded."""
        try:
            return function()
        except UserError as error:
            self._problems += error.problems
            return None

    def raise_on_failure(self) -> None:
        """UserError on all ranks if an attempt failed on any of them. Collective."""
        problems: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(problems, self._problems)
        if any(problems):
            raise UserError(dict.fromkeys(line for lines in problems for line in lines))


class _Slices:
    """Load strategy for megatron.core: replaces every sharded tensor of this rank by the tensor read for it."""

    def __init__(self, stored: TorchDistCheckpoint, directory: Path, problems: _Problems):
        self._stored, self._directory, self._problems = stored, directory, problems

    def load(self, wanted: dict[str, Any], *_: Any) -> dict[str, Any]:
        dict_list_map_inplace(self._receive, wanted)
        return wanted

    def _receive(self, shard: ShardedTensor) -> torch.Tensor:
        if not isinstance(shard, ShardedTensor):
            raise TypeError(
                f"{shard} is requested from a checkpoint; only tensors are read, objects would be unpickled"
            )
        shard.init_data(device())
        assert shard.data is not None
        target = shard.data.detach()
        self._problems.attempt(lambda: target.copy_(self._read(shard).reshape(target.shape)))
        return target

    def _read(self, shard: ShardedTensor) -> torch.Tensor:
        there, asked = self._stored.all_shapes.get(shard.key), tuple(shard.global_shape)
        if there != asked:
            found = "is missing" if there is None else f"has the shape {list(there)}, not {list(asked)}"
            raise UserError(
                f"{self._directory}: {shard.key} {found}: the checkpoint does not fit this run; resume with the "
                "settings in its run.json, or take only its weights with --finetune"
            )
        lengths = (*(1 for _ in range(shard.prepend_axis_num)), *shard.local_shape)
        start = tuple(shard.global_offset)
        stop = tuple(first + length for first, length in zip(start, lengths, strict=True))
        return self._stored.read_box(shard.key, Box(start, stop))


@contextmanager
def _receiving_on(target: torch.device) -> Iterator[None]:
    """Make megatron.core receive slices on this device: it names "cuda", and binds torch.empty at its import."""
    original = ShardedTensor.init_data
    ShardedTensor.init_data = lambda self, _, init_fn=torch.empty: original(self, target, init_fn)
    try:
        yield
    finally:
        ShardedTensor.init_data = original
