"""Owned parameter shards: a partition of the model's parameters in which each element is on exactly one rank.

Sums over shards, added over all ranks, equal those of one process: replicated parameters (data parallelism, norms and
routers under tensor parallelism, tied embeddings) and sharded ones (the distributed optimizer) count once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor, nn

from megatron_a2d.config.settings import ROLES
from megatron_a2d.megatron_compat.device import device
from megatron_a2d.megatron_compat.optimizer_chain import members, updated_by, whole_matrix_members
from megatron_a2d.training.optimizer import role_of
from megatron_a2d.training.train_state import TrainState


class ParamShard(NamedTuple):
    """A range of a flattened parameter."""

    role: str
    parameter: nn.Parameter
    start: int
    stop: int
    main: Tensor | None  # this range of the optimizer's fp32 main copy, if there is one (bf16)

    def weight(self) -> Tensor:
        """The values that the optimizer updates, flat."""
        if self.main is not None:
            return self.main.detach().view(-1)
        return self.parameter.detach().view(-1)[self.start : self.stop]

    def gradient(self) -> Tensor:
        """The reduced gradient before clipping, flat; a single zero if the parameter is frozen."""
        if not self.parameter.requires_grad:
            return torch.zeros(1, device=self.parameter.device)
        return self.parameter.main_grad.view(-1)[self.start : self.stop]  # type: ignore[attr-defined]


def owned_shards(state: TrainState) -> list[ParamShard]:
    """This rank's shards; empty if other ranks own all of its parameters."""
    ranges: dict[nn.Parameter, tuple[int, int]] = {}
    mains: dict[nn.Parameter, Tensor] = {}
    is_sharded = False
    for part in members(state.optimizer):
        if isinstance(part, DistributedOptimizer):
            is_sharded = True
            for parameter in part.model_param_gbuf_map:
                local_range = part._get_model_param_range_map(parameter)["param"]
                ranges[parameter] = (local_range.start, local_range.end)
                if (main := getattr(parameter, "main_param", None)) is not None:
                    mains[parameter] = main
        for models, copies in zip(
            getattr(part, "float16_groups", ()), getattr(part, "fp32_from_float16_groups", ()), strict=True
        ):
            mains.update(zip(models, copies, strict=True))
    for part in whole_matrix_members(state.optimizer):
        is_sharded = True
        ranges.update({parameter: (0, parameter.numel()) for parameter in updated_by(part)})
    shards = []
    for model in state.models:
        tied = model.share_embeddings_and_output_weights
        for name, parameter in model.named_parameters():
            splits = is_sharded and parameter.requires_grad  # frozen parameters are in no optimizer
            if not _counts_here(parameter, splits):
                continue
            start, stop = ranges.get(parameter, (0, 0)) if splits else (0, parameter.numel())
            if stop > start:
                shards.append(ParamShard(role_of(name, tied), parameter, start, stop, mains.get(parameter)))
    return shards


def _counts_here(parameter: nn.Parameter, is_sharded: bool) -> bool:
    """Whether this rank owns the parameter, among the ranks that have the same values."""
    if not param_is_not_shared(parameter):
        return False
    is_expert = not getattr(parameter, "allreduce", True)
    if is_expert:
        replica = parallel_state.get_expert_data_parallel_rank()
        shard = parallel_state.get_expert_tensor_parallel_rank()
    else:
        replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
        shard = parallel_state.get_tensor_model_parallel_rank()
    is_split = getattr(parameter, "tensor_model_parallel", False)
    return (is_sharded or replica == 0) and (is_split or shard == 0)


def squares_by_role(shards: Iterable[ParamShard], values: Callable[[int, ParamShard], Tensor]) -> Tensor:
    """[roles] float64, this rank's sums of the squares of `values(number, shard)`; see `over_ranks`."""
    sums = torch.zeros(len(ROLES), dtype=torch.float64, device=device())
    by_role: dict[int, list[Tensor]] = {}
    for number, shard in enumerate(shards):
        by_role.setdefault(ROLES.index(shard.role), []).append(values(number, shard))
    for index, tensors in by_role.items():
        norms = torch.stack(torch._foreach_norm([tensor.float() for tensor in tensors]))
        sums[index] = norms.double().square().sum()
    return sums


def over_ranks(sums: Tensor) -> Tensor:
    """The sums of all ranks; collective."""
    dist.all_reduce(sums)
    return sums
