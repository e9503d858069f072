"""Training diagnostics, once per log interval: gradient norm, update size and drift by role, routers, gradient noise.

Monitoring does not change what the run computes. All numbers are summed over ranks before they are divided: none of
them depends on the layout, except the gradient noise scale, whose two batch sizes do.

Gradient noise scale (McCandlish et al. 2018, appendix A): with |g_b|^2 of a small batch and |g_B|^2 of the full one,

    tr S  = (|g_b|^2 - |g_B|^2) / (1/b - 1/B)     |G|^2 = (B |g_B|^2 - b |g_b|^2) / (B - b)     B_noise = tr S / |G|^2

For independent samples both estimates are unbiased but noisy, so B_noise is the ratio of their moving averages (both
start at 0, a bias that cancels in the ratio). Low-discrepancy times are spread evenly over a batch, whose samples are
then not independent: the scale comes out somewhat low. The small batch is part of the same samples; its extra forward
and backward pass before the step costs at most a quarter of a step per log interval.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_a2d.checkpoint.directory import HF_FILES, resolve
from megatron_a2d.checkpoint.manifest import check_manifest
from megatron_a2d.checkpoint.reader import check_pickles
from megatron_a2d.config.model_config import ModelConfig, read_model_config
from megatron_a2d.config.settings import ROLES, RunConfig
from megatron_a2d.data.dataloader import Batch
from megatron_a2d.distributed.process_groups import from_first_rank
from megatron_a2d.megatron_compat.device import device
from megatron_a2d.training.initialization import initialize_state
from megatron_a2d.training.param_gather import zero_gradients
from megatron_a2d.training.param_shards import ParamShard, over_ranks, owned_shards, squares_by_role
from megatron_a2d.training.router_metrics import RouterCounts
from megatron_a2d.training.train_state import TrainState
from megatron_a2d.training.train_step import forward_backward
from megatron_a2d.utils.errors import UserError
from megatron_a2d.utils.printable import print_line

_EMA_DECAY = 0.9  # per log interval


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
        if model_config.is_moe and "moe_router" not in replayed:  # no hook runs inside a CUDA graph replay
            mask = model_config.mask_token_id if config.diffusion.objective != "ar" else None
            self._routers = RouterCounts(state.models, mask)
        self._small = _small_batch(config)
        self._grafting_iters = config.diffusion.grafting_iters
        self._batch_size = config.training.global_batch_size
        self._noise, self._signal = 0.0, 0.0
        self._drift: Drift | None = None
        self._values: dict[str, Any] = {}

    def remember_start(self) -> None:
        """Measure drift from the current weights."""
        self._drift = Drift(self._shards)

    def remember_start_of(self, config: RunConfig) -> None:
        """For a resumed run: measure drift from the weights it began with (--load, or random).

        They are loaded into the model; the caller then loads the checkpoint to resume from over them.
        """
        found = _find_reference(config.training.load, self._model_config) if dist.get_rank() == 0 else None
        directory = from_first_rank(found)
        if directory is not None:
            initialize_state(self._state, config, self._model_config, directory, weights_only=True)
            self.remember_start()

    @contextmanager
    def step(self, micro_batches: list[Batch]) -> Iterator[None]:
        """Around the forward and backward passes of a training step.

        Before them it runs an extra forward and backward pass on the small batch; the step zeroes the gradients.
        """
        self._values = {}
        # During grafting the gradient is that of the regression, not of the objective.
        grafts = self._state.iteration < self._grafting_iters
        small = self._small_gradient(micro_batches) if self._small and not grafts else None
        with self._routers.counting() if self._routers else nullcontext():
            yield
        squares = self._squares(lambda _, shard: shard.gradient())
        self._values["grad_norm_by_role"] = self._by_role(squares, [1.0] * len(ROLES))
        if small is not None:
            self._values |= self._noise_scale(small, sum(squares))

    @contextmanager
    def update(self) -> Iterator[None]:
        """Around the optimizer's step."""
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

    def _small_gradient(self, micro_batches: list[Batch]) -> float:
        """|g_b|^2: the squared gradient norm of the small batch."""
        assert self._small is not None
        count, size = self._small
        small = [
            Batch._make(None if rows is None else rows[:size] for rows in batch) for batch in micro_batches[:count]
        ]
        zero_gradients(self._state.chunks, self._state.optimizer)
        forward_backward(list(self._state.chunks), small, forward_only=False)
        return sum(self._squares(lambda _, shard: shard.gradient()))

    def _noise_scale(self, small: float, large: float) -> dict[str, float]:
        assert self._small is not None
        count, size = self._small
        b, B = count * size * parallel_state.get_data_parallel_world_size(), self._batch_size
        noise, signal = (small - large) / (1 / b - 1 / B), (B * large - b * small) / (B - b)
        if math.isfinite(noise):
            self._noise = _EMA_DECAY * self._noise + (1 - _EMA_DECAY) * noise
            self._signal = _EMA_DECAY * self._signal + (1 - _EMA_DECAY) * signal
        scale = self._noise / self._signal if self._signal > 0 and self._noise > 0 else math.nan
        return {"tr_sigma": noise, "grad_norm_sq": signal, "grad_noise_scale": scale}


def _find_reference(load: str | None, model_config: ModelConfig) -> Path | None:
    """The checkpoint that the run began with; None, with a warning, if it is missing, damaged or another model's."""
    try:
        if not load:
            raise UserError("--load: is missing")
        directory = resolve(load)
        check_pickles(directory)
        if read_model_config(directory / HF_FILES) != model_config:
            raise UserError(f"{directory}: is another model")
        if problems := check_manifest(directory, checksums=False):
            raise UserError(problems)
    except UserError as error:
        needed = "the checkpoint that the run began with (--load)"
        print_line(f"warning: relative_weight_change is not logged; it needs {needed}: {error.problems[0]}", sys.stderr)
        return None
    return directory


def _small_batch(config: RunConfig) -> tuple[int, int] | None:
    """(micro-batches, samples per micro-batch) of a rank's small batch; None if a step cannot be divided."""
    training = config.training
    least = config.parallel.pipeline_model_parallel_size if config.parallel.virtual_pipeline_size else 1
    share = training.global_batch_size // (training.micro_batch_size * parallel_state.get_data_parallel_world_size())
    if share >= 4 * least:
        return least, training.micro_batch_size
    if training.micro_batch_size > 1 and config.performance.cuda_graph_impl == "none":
        return least, max(1, training.micro_batch_size // 4)
    # CUDA graphs replay with the micro-batch size that they were captured with.
    return (least, training.micro_batch_size) if share > least else None


class Drift:
    """|W - W0| / |W0| by role; W0 are the weights at construction, kept in host memory."""

    def __init__(self, shards: list[ParamShard]):
        self._shards = shards
        self._start = [shard.weight().to("cpu", copy=True) for shard in shards]

    def measure(
        self, values: Callable[[int, ParamShard], Tensor] = lambda _, shard: shard.weight()
    ) -> dict[str, float]:
        """Drift of `values`, by default the current weights, for the roles that the model has. Collective."""

        def moved(number: int, shard: ParamShard) -> Tensor:
            return values(number, shard).float() - self._start[number].to(device()).float()

        sums = over_ranks(
            torch.stack(
                [
                    squares_by_role(self._shards, moved),
                    squares_by_role(self._shards, lambda number, shard: self._start[number].to(device())),
                ]
            )
        )
        away, size = sums.sqrt().tolist()
        return {role: away[index] / size[index] for index, role in enumerate(ROLES) if size[index] > 0}
