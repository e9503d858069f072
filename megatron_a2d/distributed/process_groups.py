"""Process groups: torch.distributed, then megatron.core's layout on top of it."""

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
    """Join the process group and lay the model out. A second call changes the layout.

    `replays_graphs`: --cuda-graph-impl is on; generators must then be ones that can be recorded.
    """
    megatron_compat.install()
    if has_cuda():
        torch.cuda.set_device(device())
    if not dist.is_initialized():
        # Long: the others wait here while the first rank reads checksums. distributed/rank_failure.py says who is dead.
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
        # On GPUs nothing speaks gloo, whose mesh of connections costs time and needs names that resolve everywhere.
        create_gloo_process_groups=not has_cuda(),
        # A rank that hangs is found before a collective gives up on it, and then it has a name.
        distributed_timeout_minutes=config.distributed_timeout_minutes + 1,
    )
    # Weights come from checkpoints and there is no dropout; megatron.core still wants its generators.
    model_parallel_cuda_manual_seed(1, te_rng_tracker=replays_graphs, force_reset_rng=replays_graphs)


def meet(timeout: timedelta, purpose: str) -> dist.Store:
    """The store that all processes share, with keys of its own for each purpose and each of torchrun's restarts."""
    if "MASTER_ADDR" not in os.environ:
        return dist.HashStore()
    store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # the store outlives it
    return dist.PrefixStore(f"{purpose}_{attempt}", store)


def finalize() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def from_first_rank(value: T) -> T:
    """What rank 0 passed, on every rank; collective."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def union(values: list[int]) -> list[int]:
    """All ranks' values, sorted, each once; collective."""
    box: list[list[int]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(box, values)
    return sorted(set().union(*box))


def owns_loss() -> bool:
    """True on the ranks that report losses: each row of the global batch is on exactly one of them."""
    is_last = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
    return is_last and parallel_state.get_tensor_model_parallel_rank() == 0
