"""Validation: the negative evidence lower bound on held-out data, under noise that never changes.

Every validation of every run masks the same tokens (common random numbers), so that differences
between checkpoints are differences between models. Each sample's sums are gathered whole: the result does
not depend on the layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import nn

from megatron_a2d.data.dataloader import Batch
from megatron_a2d.diffusion.metrics import SampleTable, ValidationResult, summarise
from megatron_a2d.distributed.process_groups import owns_loss
from megatron_a2d.megatron_compat.device import device
from megatron_a2d.training.train_step import forward_backward

__all__ = ["VALIDATION_SEED", "ValidationResult", "validate"]

# Validation's noise and order of samples are its own, and the same whatever --seed a run has.
VALIDATION_SEED = 0


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
    columns = SampleTable(num_samples, device())
    per_pass = num_microbatches * shape[0] * parallel_state.get_data_parallel_world_size()
    modules: list[nn.Module] = list(chunks)
    for module in modules:
        module.eval()
    with torch.no_grad():
        for _ in range(num_samples // per_pass):
            for item in forward_backward(chunks, batches, num_microbatches, shape, forward_only=True):
                if owns_loss():
                    columns.put(item.sample_index, item.times, item.num_maskable, item.sums)
    for module in modules:
        module.train()
    dist.all_reduce(columns.table)
    return summarise(columns)
