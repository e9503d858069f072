"""Validation metrics: means with standard errors from per-sample sums, in total, by time and by mask ratio."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_a2d.diffusion.loss import Estimate, SampleSums, ratio_estimate

NUM_BUCKETS = 10


class SampleTable:
    """Per-sample sums of samples 0 .. n - 1, filled in any order; ranks fill their own and are summed."""

    def __init__(self, num_samples: int, device: torch.device | str = "cpu"):
        self.table = torch.zeros(num_samples, 6, dtype=torch.float64, device=device)

    def put(self, sample_index: Tensor, times: Tensor, num_maskable: Tensor, sums: SampleSums) -> None:
        """Set the sums of these samples.

        Where a sample's sequence is split over several ranks, `num_maskable` must be 0 on all but one of them.
        """
        self.table[sample_index, :4] = torch.stack(list(sums), dim=1)
        self.table[sample_index, 4] = num_maskable.to(self.table)
        self.table[sample_index, 5] = times.to(self.table) * (num_maskable > 0).to(self.table)


class Bucket(NamedTuple):
    """Samples whose time, or share of masked tokens, lies in [low, high)."""

    low: float
    high: float
    num_samples: int
    value: Estimate


class ValidationResult(NamedTuple):
    """Means over samples with their standard errors."""

    nelbo: Estimate  # nats/maskable token; for --objective ar: the negative log-likelihood
    cross_entropy: Estimate  # nats/loss position, unweighted
    accuracy: Estimate  # share of loss positions whose most likely token is the label
    num_samples: int
    nelbo_by_time: tuple[Bucket, ...] = ()
    accuracy_by_mask_ratio: tuple[Bucket, ...] = ()

    def to_dict(self) -> dict[str, float]:
        """The means alone."""
        values: dict[str, float] = {"num_samples": self.num_samples}
        for name in ("nelbo", "cross_entropy", "accuracy"):
            estimate: Estimate = getattr(self, name)
            values |= {name: estimate.mean, f"{name}_standard_error": estimate.standard_error}
        return values

    def tables(self) -> dict[str, list[dict[str, float]]]:
        """The buckets, as plain values."""
        return {
            name: [
                {
                    "low": bucket.low, "high": bucket.high, "num_samples": bucket.num_samples,
                    "mean": bucket.value.mean, "standard_error": bucket.value.standard_error,
                }
                for bucket in getattr(self, name)
            ]
            for name in ("nelbo_by_time", "accuracy_by_mask_ratio")
        }  # fmt: skip


def summarise(columns: SampleTable) -> ValidationResult:
    """The result of all samples of `columns`."""
    table = columns.table.cpu()
    weighted_loss, cross_entropy, num_positions, num_correct, num_maskable, times = table.T
    return ValidationResult(
        nelbo=ratio_estimate(weighted_loss, num_maskable),
        cross_entropy=ratio_estimate(cross_entropy, num_positions),
        accuracy=ratio_estimate(num_correct, num_positions),
        num_samples=len(table),
        nelbo_by_time=_buckets(times, weighted_loss, num_maskable),
        accuracy_by_mask_ratio=_buckets(num_positions / num_maskable.clamp(min=1), num_correct, num_positions),
    )


def _buckets(positions: Tensor, numerator: Tensor, denominator: Tensor) -> tuple[Bucket, ...]:
    numbers = (positions * NUM_BUCKETS).long().clamp(max=NUM_BUCKETS - 1)
    found = []
    for number in sorted(set(numbers.tolist())):
        inside = numbers == number
        value = ratio_estimate(numerator[inside], denominator[inside])
        found.append(Bucket(number / NUM_BUCKETS, (number + 1) / NUM_BUCKETS, int(inside.sum()), value))
    return tuple(found)
