"""Process groups: initialisation of torch.distributed and of megatron.core's parallel groups."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_a2d import megatron_compat
from megatron_a2d.config.settings import ParallelConfig
from megatron_a2d.distributed.environment import check_launch as check_launch
from megatron_a2d.distributed.environment import rank as rank
from megatron_a2d.distributed.environment import world_size as world_size
from megatron_a2d.megatron_compat.device import communication_backend, device, has_cuda

T = TypeVar("T")
_STARTING = timedelta(hours=2)


def initialize(config: ParallelConfig, replays_graphs: bool = False) -> None:
    """Initialise torch.distributed and megatron.core's groups. A second call changes the layout.

    `replays_graphs`: --cuda-graph-impl is on, which needs random number generators that can be captured.
    """
    megatron_compat.install()
    if has_cuda():
        torch.cuda.set_device(device())
    if not dist.is_initialized():
        # Long: the others wait here while rank 0 verifies checksums; distributed/rank_failure.py finds dead ranks.
        dist.init_process_group(
            communication_backend(), store=meet(_STARTING, "training"), rank=rank(), world_size=world_size(),
            timeout=_STARTING,
        )  # fmt: skip
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=config.virtual_pipeline_size,
        context_parallel_size=config.context_parallel_size,
        expert_model_parallel_size=config.expert_model_parallel_size,
        expert_tensor_parallel_size=config.expert_tensor_parallel_size,
        # Gloo is not used on GPUs: its mesh of connections takes time and needs host names that resolve everywhere.
        create_gloo_process_groups=not has_cuda(),
        # Longer than the hang limit, so that the watchdog names a hung rank before a collective times out.
        distributed_timeout_minutes=config.distributed_timeout_minutes + 1,
    )
    # Weights come from checkpoints and there is no dropout, but megatron.core requires its generators.
    model_parallel_cuda_manual_seed(1, te_rng_tracker=replays_graphs, force_reset_rng=replays_graphs)


def meet(timeout: timedelta, purpose: str) -> dist.Store:
    """The store shared by all processes, with a key prefix per purpose and per torchrun restart."""
    if "MASTER_ADDR" not in os.environ:
        return dist.HashStore()
    store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # the store survives a restart
    return dist.PrefixStore(f"{purpose}_{attempt}", store)


def finalize() -> None:
    """Destroy the process groups."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def from_first_rank(value: T) -> T:
    """Broadcast rank 0's value; collective."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def union(values: list[int]) -> list[int]:
    """Sorted union of all ranks' values; collective."""
    box: list[list[int]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(box, values)
    return sorted(set().union(*box))


def owns_loss() -> bool:
    """True on the ranks that report losses: each sample of the global batch is on exactly one of them."""
    is_last = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
    return is_last and parallel_state.get_tensor_model_parallel_rank() == 0
