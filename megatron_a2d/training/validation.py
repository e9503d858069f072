"""Validation: the negative evidence lower bound on held-out data, under noise that never changes.

Every validation of every run masks the same tokens (common random numbers), so that differences
between checkpoints are differences between models. Each sample's sums are gathered whole: the result does
not depend on the layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from megatron_a2d.data.batches import Batch
from megatron_a2d.diffusion.objective import Estimate, ratio_estimate
from megatron_a2d.runtime.device import device
from megatron_a2d.training.parallel import owns_loss
from megatron_a2d.training.step import forward_backward

# Validation's noise and order of samples are its own, and the same whatever --seed a run has.
VALIDATION_SEED = 0


class ValidationResult(NamedTuple):
    """Means over samples with their standard errors."""

    nelbo: Estimate  # nats a maskable token; for --objective ar: the negative log-likelihood
    cross_entropy: Estimate  # nats a row with loss, unweighted
    accuracy: Estimate  # share of rows with loss whose most likely token is right
    num_samples: int

    def to_dict(self) -> dict[str, float]:
        values: dict[str, float] = {"num_samples": self.num_samples}
        for name in ("nelbo", "cross_entropy", "accuracy"):
            estimate: Estimate = getattr(self, name)
            values |= {name: estimate.mean, f"{name}_standard_error": estimate.standard_error}
        return values


def validate(
    chunks: list[Any],
    batches: Iterator[Batch],
    num_samples: int,
    num_microbatches: int,
    shape: tuple[int, int],
) -> ValidationResult:
    """Evaluate the samples 0 .. num_samples - 1 of `batches`; collective, the same result on every rank.

    `num_microbatches` of `shape` (b, s) are this rank's part of one pass through the schedule.
    """
    columns: Tensor = torch.zeros(num_samples, 5, dtype=torch.float64, device=device())
    per_pass = num_microbatches * shape[0] * parallel_state.get_data_parallel_world_size()
    modules: list[nn.Module] = list(chunks)
    for module in modules:
        module.eval()
    with torch.no_grad():
        for _ in range(num_samples // per_pass):
            for item in forward_backward(chunks, batches, num_microbatches, shape, forward_only=True):
                if owns_loss():
                    columns[item.sample_index, :4] = torch.stack(list(item.sums), dim=1)
                    columns[item.sample_index, 4] = item.num_maskable.to(columns)
    for module in modules:
        module.train()
    dist.all_reduce(columns)
    weighted_loss, cross_entropy, num_rows, num_correct, num_maskable = columns.cpu().T
    return ValidationResult(
        nelbo=ratio_estimate(weighted_loss, num_maskable),
        cross_entropy=ratio_estimate(cross_entropy, num_rows),
        accuracy=ratio_estimate(num_correct, num_rows),
        num_samples=num_samples,
    )
