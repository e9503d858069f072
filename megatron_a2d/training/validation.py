"""Validation: the negative evidence lower bound (NELBO) on held-out data, with fixed masks.

Every validation of every run masks the same tokens (common random numbers), so differences between checkpoints are
differences between models. The sums of each sample are gathered from all ranks before they are reduced: the result
does not depend on the layout.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megatron_a2d.config.model_config import ModelConfig
from megatron_a2d.config.settings import RunConfig
from megatron_a2d.data.dataloader import MicroBatches
from megatron_a2d.data.packed_dataset import PackedDataset
from megatron_a2d.diffusion.metrics import SampleTable, ValidationResult, summarise
from megatron_a2d.distributed.process_groups import owns_loss
from megatron_a2d.megatron_compat.device import device
from megatron_a2d.training.data_setup import VALIDATION_SEED, micro_batches
from megatron_a2d.training.train_state import TrainState
from megatron_a2d.training.train_step import forward_backward

__all__ = ["VALIDATION_SEED", "ValidationResult", "run_validation", "validate"]


def run_validation(
    state: TrainState, config: RunConfig, model_config: ModelConfig, valid_data: PackedDataset
) -> ValidationResult:
    """Validate on --eval-iters global batches, or on as many as the held-out data fills. Collective."""
    batch_size = config.training.global_batch_size
    num_samples = min(config.training.eval_iters, valid_data.num_samples // batch_size) * batch_size
    state.gather_parameters()
    with micro_batches(config, model_config, valid_data, VALIDATION_SEED, 0, for_training=False) as batches:
        return validate(state.chunks, batches, num_samples, batch_size)


def validate(chunks: list[Any], batches: MicroBatches, num_samples: int, global_batch_size: int) -> ValidationResult:
    """Evaluate the samples 0 .. num_samples - 1 of `batches`. Collective; every rank returns the same result."""
    columns = SampleTable(num_samples, device())
    modules: list[nn.Module] = list(chunks)
    for module in modules:
        module.eval()
    with torch.no_grad():
        for _ in range(num_samples // global_batch_size):
            iteration = [next(batches) for _ in range(batches.num_microbatches)]
            for item in forward_backward(chunks, iteration, forward_only=True):
                if owns_loss():
                    columns.put(item.sample_index, item.times, item.num_maskable, item.sums)
    for module in modules:
        module.train()
    dist.all_reduce(columns.table)
    return summarise(columns)
