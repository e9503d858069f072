"""Per-sample sums of the loss, and estimates with standard errors.

The training loss is

    sum over masked tokens of weight * cross-entropy  /  number of maskable tokens

with both sums over the whole global batch: all micro-batches, all data- and context-parallel ranks. Neither the weight
nor the division is in this module:

    weight       set per token when a sample is masked: corruption.py, loss_weighting.py
    sum          training/train_step.py `_loss`, per micro-batch and undivided
    division     megatron.core divides the gradients once by the global number of maskable tokens, because
                 model/transformer_config.py sets calculate_per_token_loss and training/initialization.py turns off
                 average_in_collective

The denominator is known before the forward pass and does not depend on the layout. Dividing earlier (a mean per rank or
per micro-batch) would make the gradient depend on how the batch is split.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class SampleSums(NamedTuple):
    """Per sample of a micro-batch, float64, for metrics and standard errors. Shape [b] each."""

    weighted_loss: Tensor  # sum of weight * cross-entropy, nats
    cross_entropy: Tensor  # sum of cross-entropy over loss positions, nats
    num_positions: Tensor  # loss positions: those with a weight above 0
    num_correct: Tensor  # loss positions whose most likely token is the label


def sample_sums(
    losses_N: Tensor,
    weights_N: Tensor,
    correct_N: Tensor,
    sample_N: Tensor,
    num_samples: int,
    counts_N: Tensor | None = None,
) -> SampleSums:
    """Sum the N loss positions by the sample (0..num_samples-1) that each belongs to.

    `counts_N`, bool: which positions are counted; the weights of the others must be 0.
    """
    losses, weights = losses_N.detach().double(), weights_N.double()
    columns = torch.stack([weights * losses, losses, torch.ones_like(losses), correct_N.double()])
    if counts_N is not None:
        columns = columns * counts_N
    sums = torch.zeros(4, num_samples, dtype=torch.float64, device=losses.device)
    return SampleSums(*sums.index_add_(1, sample_N, columns))


class Estimate(NamedTuple):
    """A mean with its standard error, in nats/token unless stated otherwise."""

    mean: float
    standard_error: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.standard_error:.3f}"


def mean_estimate(values: Tensor) -> Estimate:
    """Mean of independent values [n], and the standard error of that mean (nan for one value)."""
    values = values.double()
    count = values.numel()
    error = math.sqrt(float(values.var()) / count) if count > 1 else float("nan")
    return Estimate(float(values.mean()), error)


def ratio_estimate(numerator: Tensor, denominator: Tensor) -> Estimate:
    """sum(numerator) / sum(denominator) over samples [n], with the delta method's standard error."""
    numerator, denominator = numerator.double(), denominator.double()
    count, total = numerator.numel(), float(denominator.sum())
    if total == 0:
        return Estimate(float("nan"), float("nan"))
    ratio = float(numerator.sum()) / total
    residual = numerator - ratio * denominator
    error = math.sqrt(float((residual**2).sum()) * count / max(count - 1, 1)) / total
    return Estimate(ratio, error if count > 1 else float("nan"))
