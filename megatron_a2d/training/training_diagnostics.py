"""Training diagnostics, once per log interval: gradient norm, update size and drift by role, routers, gradient noise.

--monitor does not change what the run computes. All numbers are summed over ranks before they are divided: none of them
depends on the layout, except the gradient noise scale (gradient_noise.py), whose two batch sizes do. The metrics of
every step, such as the loss, are interval_metrics.py's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_a2d.config.model_config import ModelConfig
from megatron_a2d.config.settings import ROLES, RunConfig
from megatron_a2d.data.dataloader import Batch
from megatron_a2d.distributed.process_groups import from_first_rank
from megatron_a2d.megatron_compat.device import device
from megatron_a2d.training.gradient_noise import GradientNoiseScale
from megatron_a2d.training.initialization import initialize_state
from megatron_a2d.training.param_gather import zero_gradients
from megatron_a2d.training.param_shards import over_ranks, owned_shards, squares_by_role
from megatron_a2d.training.router_metrics import RouterCounts
from megatron_a2d.training.train_state import TrainState
from megatron_a2d.training.train_step import forward_backward
from megatron_a2d.training.weight_drift import Drift, find_reference


class Monitor:
    """The run's monitor, an `Observer` (train_step.py) of the steps that are logged. All methods are collective."""

    def __init__(self, config: RunConfig, model_config: ModelConfig, state: TrainState):
        self._model_config, self._state, self._shards = model_config, state, owned_shards(state)
        sizes = torch.zeros(len(ROLES), dtype=torch.float64, device=device())
        for shard in self._shards:
            sizes[ROLES.index(shard.role)] += shard.stop - shard.start
        over_ranks(sizes)
        self._roles = {role: index for index, role in enumerate(ROLES) if sizes[index] > 0}
        self._routers = None
        performance = config.performance
        replayed = performance.cuda_graph_scope if performance.cuda_graph_impl != "none" else ()
        if state.balancing and "moe_router" not in replayed:  # nothing is counted inside a CUDA graph replay
            self._routers = RouterCounts(state.balancing, state.models[0].expert_orders)
        self._noise_scale = GradientNoiseScale(config)
        self._grafting_iters = config.grafting_iters
        self._drift: Drift | None = None
        self._values: dict[str, Any] = {}

    def remember_start(self) -> None:
        """Measure drift from the current weights."""
        self._drift = Drift(self._shards)

    def remember_start_of(self, config: RunConfig) -> None:
        """For a resumed run: measure drift from the weights it began with (--load, or random).

        They are loaded into the model; the caller then loads the checkpoint to resume from over them.
        """
        found = find_reference(config.training.load, self._model_config) if dist.get_rank() == 0 else None
        directory = from_first_rank(found)
        if directory is not None:
            initialize_state(self._state, config, self._model_config, directory, weights_only=True)
            self.remember_start()

    @contextmanager
    def step(self, micro_batches: list[Batch]) -> Iterator[None]:
        """Context around the forward and backward passes of a training step.

        Before them it runs an extra forward and backward pass on the small batch; the step zeroes the gradients.
        """
        self._values = {}
        # During grafting the gradient is that of the regression, not of the objective.
        grafts = self._state.iteration < self._grafting_iters
        small_batch = None if grafts else self._noise_scale.small_batch(micro_batches)
        small = None if small_batch is None else self._gradient_norm_squared(small_batch)
        with self._routers.counting() if self._routers else nullcontext():
            yield
        squares = self._squares(lambda _, shard: shard.gradient())
        self._values["grad_norm_by_role"] = self._by_role(squares, [1.0] * len(ROLES))
        if small is not None:
            self._values |= self._noise_scale.estimate(small, sum(squares))

    @contextmanager
    def update(self) -> Iterator[None]:
        """Context around the optimizer's step."""
        before = [shard.weight().clone() for shard in self._shards]
        yield
        moved = self._squares(lambda number, shard: shard.weight() - before[number])
        size = self._squares(lambda number, shard: before[number])
        self._values["update_to_weight_ratio"] = self._by_role(moved, size)

    def read(self) -> dict[str, Any]:
        """Metrics of the last observed step, by name."""
        values, self._values = self._values, {}
        if self._drift:
            values["relative_weight_change"] = self._drift.measure()
        if self._routers:
            values["moe"] = self._routers.read()
        return values

    def _squares(self, what: Callable[[int, Any], Tensor]) -> list[float]:
        sums: list[float] = over_ranks(squares_by_role(self._shards, what)).tolist()
        return sums

    def _by_role(self, above: list[float], below: list[float]) -> dict[str, float]:
        """sqrt(above / below) by role."""
        return {role: math.sqrt(above[index] / below[index]) for role, index in self._roles.items() if below[index] > 0}

    def _gradient_norm_squared(self, micro_batches: list[Batch]) -> float:
        """Over all ranks, of an extra forward and backward pass; zeroes the gradients first."""
        zero_gradients(self._state.chunks, self._state.optimizer)
        forward_backward(list(self._state.chunks), micro_batches, forward_only=False)
        return sum(self._squares(lambda _, shard: shard.gradient()))
