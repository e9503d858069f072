"""A log interval's means, over all of its steps and all ranks: losses by time, accuracy by mask ratio, speed."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_a2d.architecture import Architecture
from megatron_a2d.config import RunConfig
from megatron_a2d.diffusion.validation import NUM_BUCKETS
from megatron_a2d.model.flops import train_flops_per_token
from megatron_a2d.runtime.device import device, peak_flops
from megatron_a2d.training.parallel import owns_loss
from megatron_a2d.training.setup import TrainState
from megatron_a2d.training.step import SampleLosses, StepResult

_NUM_TOTALS = 5  # those of StepResult


class Meter:
    """Validation and checkpoints are not timed."""

    def __init__(self, config: RunConfig, architecture: Architecture):
        self._tokens_per_step = config.training.global_batch_size * config.data.seq_length
        self._architecture, self._input_length = architecture, config.input_length
        self._rows_per_token = config.input_length / config.data.seq_length
        self._causal = config.diffusion.objective == "ar"
        self._has_times = config.diffusion.objective == "mdlm"  # a block has a time of its own, a sample has many
        self._peak = peak_flops()
        self.restart()

    def restart(self) -> None:
        # The totals, then [by time, by mask ratio] x buckets x the same five.
        self._sums = torch.zeros(1 + 2 * NUM_BUCKETS, _NUM_TOTALS, dtype=torch.float64, device=device())
        self._grad_norm, self._steps, self._updates, self._seconds = 0.0, 0, 0, 0.0
        self.resume()

    def resume(self) -> None:
        self._begin = time.perf_counter()

    def add(self, result: StepResult, has_times: bool = True) -> None:
        """`has_times`: the samples were masked, each at its time."""
        now = time.perf_counter()
        self._seconds += now - self._begin
        self._begin = now
        self._steps += 1
        if math.isfinite(result.grad_norm):  # a step that was skipped is no part of the means
            self._sums[0] += result.totals
            self._grad_norm += result.grad_norm
            self._updates += 1
            if owns_loss() and self._has_times and has_times:
                self._add_buckets(result.losses)

    def _add_buckets(self, losses: list[SampleLosses]) -> None:
        for item in losses:
            columns = torch.stack([*item.sums, item.num_maskable.to(self._sums)], dim=1)
            for first, positions in ((1, item.times), (1 + NUM_BUCKETS, item.mask_ratios)):
                self._sums.index_add_(0, first + _bucket(positions).to(self._sums.device), columns)

    def read(self, state: TrainState) -> dict[str, Any]:
        """The interval's numbers, global; collective. Starts the next interval."""
        dist.all_reduce(self._sums)
        totals, *buckets = self._sums.tolist()
        weighted_loss, cross_entropy, num_rows, num_correct, num_maskable = totals
        tokens_per_second = self._steps * self._tokens_per_step / self._seconds
        values: dict[str, Any] = {
            "loss": weighted_loss / num_maskable if num_maskable else math.nan,
            "cross_entropy": cross_entropy / max(num_rows, 1),
            "accuracy": num_correct / max(num_rows, 1),
            "mask_ratio": num_rows / max(num_maskable, 1),
            "grad_norm": self._grad_norm / max(self._updates, 1),
            "lr": max(group["lr"] for group in state.optimizer.param_groups),
            "tokens_per_second": tokens_per_second,
            "consumed_samples": state.consumed_samples,
        }
        if self._peak:
            flops = self._rows_per_token * train_flops_per_token(
                self._architecture,
                self._input_length,
                self._causal,
                head_fraction=values["mask_ratio"] / self._rows_per_token,
            )
            values["mfu"] = tokens_per_second * flops / (self._peak * dist.get_world_size())
        if self._has_times:
            by_time, by_ratio = buckets[:NUM_BUCKETS], buckets[NUM_BUCKETS:]
            values["loss_by_time"] = _by_bucket(by_time, above=0, below=4)
            values["accuracy_by_mask_ratio"] = _by_bucket(by_ratio, above=3, below=2)
        self.restart()
        return values


def _bucket(positions: Tensor) -> Tensor:
    """Of numbers in [0, 1], as validation's tables cut them."""
    return (positions * NUM_BUCKETS).long().clamp(max=NUM_BUCKETS - 1)


def _by_bucket(sums: list[list[float]], above: int, below: int) -> dict[str, float]:
    """The ratio of two columns by a bucket's lower end; buckets that nothing fell into are left out."""
    return {
        f"{number / NUM_BUCKETS:.1f}": columns[above] / columns[below]
        for number, columns in enumerate(sums)
        if columns[below] > 0
    }
