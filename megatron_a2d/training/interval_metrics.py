"""Metrics of a log interval, means over its steps and all ranks: losses by time, accuracy by mask ratio, speed."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_a2d.config.model_config import ModelConfig
from megatron_a2d.config.settings import RunConfig
from megatron_a2d.diffusion.metrics import NUM_BUCKETS
from megatron_a2d.distributed.process_groups import owns_loss
from megatron_a2d.megatron_compat.device import device, peak_flops
from megatron_a2d.model.flops import train_flops_per_token
from megatron_a2d.training.balancing import AuxLosses
from megatron_a2d.training.train_state import TrainState
from megatron_a2d.training.train_step import SampleLosses, StepResult, Totals

_NUM_COLUMNS = 5  # of a bucket: weighted loss, cross-entropy, positions, correct positions, maskable tokens


class IntervalMetrics:
    """Sums over the steps of a log interval; validation and checkpoints are not timed."""

    def __init__(self, config: RunConfig, model_config: ModelConfig):
        self._seq_length = config.data.seq_length
        self._model_config, self._input_length = model_config, config.input_length
        self._positions_per_token = config.input_length / config.data.seq_length
        self._causal = config.diffusion.objective == "ar"
        self._ar_loss_weight = config.diffusion.ar_loss_weight
        self._balancing = config.balancing
        self._has_budget = config.performance.moe_expert_rank_capacity_factor is not None
        self._peak = peak_flops()
        self.restart()

    def restart(self) -> None:
        # Of steps that learn from the objective, and of those that graft; then [by time, by mask ratio] x buckets.
        self._totals = torch.zeros(2, len(Totals._fields), dtype=torch.float64, device=device())
        self._buckets = torch.zeros(2 * NUM_BUCKETS, _NUM_COLUMNS, dtype=torch.float64, device=device())
        self._aux_losses = torch.zeros(len(AuxLosses._fields), dtype=torch.float64, device=device())
        self._grad_norm, self._steps, self._updates, self._seconds = 0.0, 0, 0, 0.0
        self._repeated = self._balanced = self._samples = 0
        self.resume()

    def resume(self) -> None:
        self._begin = time.perf_counter()

    def add(self, result: StepResult, num_samples: int, grafting_error: Tensor | None = None) -> None:
        """Add a step on a global batch of `num_samples`.

        `grafting_error`: the step regressed attention (--conversion grafting) with this summed error.
        """
        now = time.perf_counter()
        self._seconds += now - self._begin
        self._begin = now
        self._steps += 1
        self._samples += num_samples
        self._batch_size = num_samples
        self._repeated += result.repeated
        if math.isfinite(result.grad_norm):  # skipped steps are not part of the means
            totals = self._totals[0 if grafting_error is None else 1]
            totals += result.totals
            if grafting_error is not None:
                totals[Totals._fields.index("weighted_loss")] += grafting_error
            self._grad_norm += result.grad_norm
            self._updates += 1
            if result.aux_losses is not None:
                self._aux_losses += torch.stack(result.aux_losses)
                self._balanced += 1
            if owns_loss():
                self._add_buckets(result.losses)

    def _add_buckets(self, losses: list[SampleLosses]) -> None:
        for segments in (item.segments for item in losses if item.segments):
            columns = torch.stack([*segments.sums, segments.num_maskable.to(self._buckets)], dim=1)
            for first, values in ((0, segments.times), (NUM_BUCKETS, segments.mask_ratios)):
                self._buckets.index_add_(0, first + _bucket(values).to(self._buckets.device), columns)

    def read(self, state: TrainState) -> dict[str, Any]:
        """The interval's metrics over all ranks, by name; starts the next interval. Collective."""
        dist.all_reduce(self._totals)
        dist.all_reduce(self._buckets)
        totals, grafting = (Totals(*row) for row in self._totals.tolist())
        tokens_per_second = self._samples * self._seq_length / self._seconds
        values: dict[str, Any] = {
            "loss": _ratio(totals.weighted_loss, totals.num_maskable),
            "cross_entropy": _ratio(totals.masked_cross_entropy, totals.masked_positions),
            "accuracy": _ratio(totals.masked_correct, totals.masked_positions),
            "mask_ratio": _ratio(totals.num_masked, totals.num_maskable),
            "grad_norm": self._grad_norm / max(self._updates, 1),
            "lr": max(group["lr"] for group in state.optimizer.param_groups),
            "tokens_per_second": tokens_per_second,
            "batch_size": self._batch_size,  # of the last step
            "consumed_samples": state.consumed_samples,
            "consumed_tokens": state.consumed_samples * self._seq_length,
        }
        if self._has_budget:
            values["repeated_step_frac"] = self._repeated / self._steps
        values |= self._aux_metrics()
        if grafting.num_maskable:
            values["grafting_error"] = grafting.weighted_loss / grafting.num_maskable
        if self._ar_loss_weight:
            ar_loss = (totals.weighted_loss - totals.masked_loss) / self._ar_loss_weight
            values["diffusion_loss"] = _ratio(totals.masked_loss, totals.num_maskable)
            values["ar_loss"] = _ratio(ar_loss, totals.num_maskable)
        if self._peak:
            supervised = totals.num_positions / max(totals.num_maskable + grafting.num_maskable, 1)
            flops = self._positions_per_token * train_flops_per_token(
                self._model_config,
                self._input_length,
                self._causal,
                head_fraction=supervised / self._positions_per_token,
            )
            values["mfu"] = tokens_per_second * flops / (self._peak * dist.get_world_size())
        if not self._causal:
            buckets = self._buckets.tolist()
            by_time, by_ratio = buckets[:NUM_BUCKETS], buckets[NUM_BUCKETS:]
            values["loss_by_t"] = _by_bucket(by_time, above=0, below=4)
            values["accuracy_by_mask_ratio"] = _by_bucket(by_ratio, above=3, below=2)
        self.restart()
        return values

    def _aux_metrics(self) -> dict[str, float]:
        """Means over the interval of the auxiliary losses that the run sets; `loss` does not include them."""
        settings = self._balancing
        aux_loss, z_loss, dropped_frac = (_ratio(total, self._balanced) for total in self._aux_losses.tolist())
        shown = {
            "aux_loss": (settings.has_aux_loss, aux_loss),
            "z_loss": (settings.moe_z_loss_coeff > 0, z_loss),
            "dropped_token_frac": (settings.moe_expert_capacity_factor is not None, dropped_frac),
        }
        return {f"moe_{name}": value for name, (is_set, value) in shown.items() if is_set}


def _ratio(above: float, below: float) -> float:
    return above / below if below else math.nan


def _bucket(values: Tensor) -> Tensor:
    """Bucket numbers of values in [0, 1], as in validation's tables."""
    return (values * NUM_BUCKETS).long().clamp(max=NUM_BUCKETS - 1)


def _by_bucket(sums: list[list[float]], above: int, below: int) -> dict[str, float]:
    """The ratio of two columns by a bucket's lower end; empty buckets are omitted."""
    return {
        f"{number / NUM_BUCKETS:.1f}": columns[above] / columns[below]
        for number, columns in enumerate(sums)
        if columns[below] > 0
    }
