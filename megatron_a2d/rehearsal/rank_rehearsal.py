"""Rehearsal of one rank: built as training builds it, and run for one step."""

from __future__ import annotations

import gc
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_a2d.config.model_config import ModelConfig
from megatron_a2d.config.settings import RunConfig
from megatron_a2d.data.dataloader import Batch, MicroBatches
from megatron_a2d.data.diffusion_samples import make_sample
from megatron_a2d.distributed import process_groups
from megatron_a2d.megatron_compat.optimizer_chain import members
from megatron_a2d.model import masked_attention
from megatron_a2d.rehearsal.balanced_routing import Routing
from megatron_a2d.rehearsal.cuda_names import CudaNames, flex_attention
from megatron_a2d.rehearsal.step_trace import Event, StepTrace, Wait
from megatron_a2d.training.initialization import build_train_state
from megatron_a2d.training.optimizer import update_parameters
from megatron_a2d.training.param_gather import zero_gradients
from megatron_a2d.training.train_state import TrainState
from megatron_a2d.training.train_step import forward_backward


class RankRehearsal(NamedTuple):
    """Bytes, communication and waits of one rank in one step."""

    rank: int
    stage: int
    num_microbatches: int
    weights: int
    gradients: int
    optimizer: int  # main weights and moments
    building: int  # peak before the step
    activations: int  # peak of forward and backward passes, besides weights, gradients and optimizer state
    update: int  # the same for the optimizer's update
    left: int  # after the step, besides weights, gradients and optimizer state: workspaces, caches
    events: list[Event]
    waits: Counter[Wait]

    @property
    def state(self) -> int:
        return self.weights + self.gradients + self.optimizer

    @property
    def peak(self) -> int:
        """Peak of any step but the first, which allocates the optimizer's moments."""
        return max(self.building, self.state + max(self.activations, self.left + self.update))


def rehearse_rank(
    config: RunConfig, model_config: ModelConfig, rank: int, world_size: int, progress: Callable[[str], None]
) -> RankRehearsal:
    """Build rank `rank` of `world_size` and take a step in which every position is masked.

    The process has been prepared by dataless_gpu.install (and engine_kernels.install), and has no peers.
    """
    progress(f"rank {rank}: process groups")
    _join(config, rank, world_size)
    Routing.num_experts = model_config.num_experts if model_config.is_moe else 1
    Routing.experts_per_token = model_config.num_experts_per_tok if model_config.is_moe else 1
    batches = _micro_batches(config, model_config)
    trace = StepTrace()
    flex = patch.multiple(masked_attention, has_triton=lambda: True, flex_attention=flex_attention)
    with trace, flex, CudaNames(), torch.autograd.set_multithreading_enabled(False):
        progress(f"rank {rank}: model and optimizer")
        with _modules_listed_once():
            state = build_train_state(model_config, config)
        if state.balancing:
            state.balancing.assume_even_loads()
        progress(f"rank {rank}: {len(batches)} micro-batches")
        result = _step(trace, state, batches)
    building, activations, update, left = result
    weights, gradients, optimizer = _state_bytes(state)
    rehearsal = RankRehearsal(
        rank, parallel_state.get_pipeline_model_parallel_rank(), len(batches), weights, gradients, optimizer,
        building, activations, update, left - weights - gradients - optimizer, trace.events, trace.waits,
    )  # fmt: skip
    del state, trace, batches
    gc.collect()
    return rehearsal


def _step(trace: StepTrace, state: TrainState, batches: list[Batch]) -> tuple[int, int, int, int]:
    """The halves of training's step, and their memory: the peak before it, that of the passes above what they begin
    with, that of the update above what it ends with, and what is held then."""
    building, before = trace.peak, trace.now
    trace.phase, trace.peak = "passes", before
    state.scheduler.step(1)
    zero_gradients(state.chunks, state.optimizer)
    losses = forward_backward(state.chunks, batches, forward_only=False)
    activations = trace.peak - before
    del losses
    trace.phase, trace.peak = "update", trace.now
    update_parameters(state.optimizer)
    return building, activations, trace.peak - trace.now, trace.now


_LISTS = ("modules", "parameters")
_SOUGHT = "register_wgrad_accumulation_and_reduce_hooks"


def _method(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    return lambda module, *args, **kwargs: function(name, module, *args, **kwargs)


@contextmanager
def _modules_listed_once() -> Iterator[None]:
    """megatron.core looks for each parameter's module among all modules and their parameters (--delay-wgrad-compute):
    with lists that are made once, of the modules that it looks for, that takes a second instead of half a minute."""
    build, originals = DistributedDataParallel.__init__, {name: getattr(nn.Module, name) for name in _LISTS}

    def build_with_lists(*args: Any, **kwargs: Any) -> None:
        known: dict[Any, list[Any]] = {}

        def listed(name: str, module: nn.Module, *rest: Any, **options: Any) -> Iterator[Any]:
            searches = name == "modules" and sys._getframe(2).f_code is build.__code__
            key = (name, searches, module, rest, tuple(options.items()))
            if key not in known:
                found = originals[name](module, *rest, **options)
                known[key] = [one for one in found if not searches or hasattr(one, _SOUGHT)]
            return iter(known[key])

        with ExitStack() as patches:
            for name in _LISTS:
                patches.enter_context(patch.object(nn.Module, name, _method(listed, name)))
            build(*args, **kwargs)

    with patch.object(DistributedDataParallel, "__init__", build_with_lists):
        yield


def _join(config: RunConfig, rank: int, world_size: int) -> None:
    process_groups.finalize()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK="0")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    process_groups.initialize(config.parallel, replays_graphs=False)


class _AnyTokens:
    """A dataset of one token, in documents of one sample."""

    def __init__(self, length: int):
        self._length = length

    def tokens(self, sample_index: int, /) -> np.ndarray:
        return np.zeros(self._length, dtype=np.int64)

    def documents(self, sample_index: int, /) -> np.ndarray:
        return np.zeros(self._length, dtype=np.int64)

    def eod_token_id(self) -> int | None:
        return None


def _micro_batches(config: RunConfig, model_config: ModelConfig) -> list[Batch]:
    """This rank's, of one step, with a loss at every position."""
    tokens = _AnyTokens(config.data.seq_length)
    batches = MicroBatches(
        tokens,
        make_sample(config, model_config, tokens, config.data.seed, for_training=True),
        micro_batch_size=config.training.micro_batch_size,
        global_batch_size=config.training.global_batch_size,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        num_workers=0,
    )
    first = next(batches)  # all are alike
    first = first._replace(weights=torch.ones_like(first.weights))
    return [first] * batches.num_microbatches


def _state_bytes(state: TrainState) -> tuple[int, int, int]:
    """Weights, gradients and optimizer state; every storage once."""
    counted: set[int] = set()

    def new_bytes(tensors: list[Any]) -> int:
        total = 0
        for tensor in tensors:
            if torch.is_tensor(tensor) and tensor.is_meta and tensor.untyped_storage()._cdata not in counted:
                counted.add(tensor.untyped_storage()._cdata)
                total += tensor.untyped_storage().nbytes()
        return total

    buffers = [
        buffer for chunk in state.chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)
    ]  # fmt: skip
    weights = new_bytes([parameter for model in state.models for parameter in model.parameters()])
    weights += new_bytes([buffer.param_data for buffer in buffers])
    gradients = new_bytes([buffer.grad_data for buffer in buffers])
    held: list[Any] = []
    for part in members(state.optimizer):
        for group in part.optimizer.param_groups:
            held += group["params"]
        for values in part.optimizer.state.values():
            held += values.values()
    return weights, gradients, new_bytes(held)
