"""The training step: one global batch through megatron's pipeline schedule, then one optimizer update.

    train_step -> forward_backward -> megatron's schedule -> _forward_step -> DiffusionLM.forward -> _loss
               -> update_parameters (optimizer.py)

Normalisation: `_loss` returns sums over a micro-batch; megatron.core adds them up over micro-batches and ranks and
divides the gradients once, by the global number of maskable tokens (calculate_per_token_loss).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from megatron_a2d.data.dataloader import Batch
from megatron_a2d.diffusion.loss import SampleSums, sample_sums
from megatron_a2d.distributed.hang_watchdog import mark
from megatron_a2d.distributed.step_timers import phase
from megatron_a2d.megatron_compat.device import device, send
from megatron_a2d.model.diffusion_lm import TokenLosses, cp_slice
from megatron_a2d.training.balancing import AuxLosses, RunBalancing, balancing_of
from megatron_a2d.training.expert_budget import exceeded_budget, without_budget
from megatron_a2d.training.optimizer import update_parameters
from megatron_a2d.training.param_gather import gather_weights, zero_gradients

Number = TypeVar("Number", float, Tensor)


class Totals(NamedTuple, Generic[Number]):
    """Sums over samples. With objective ar nothing is masked: the `masked_...` fields then cover all loss positions."""

    weighted_loss: Number
    cross_entropy: Number
    num_positions: Number  # loss positions
    num_correct: Number
    num_maskable: Number  # tokens; the loss's denominator
    num_masked: Number  # tokens, whether or not they have a loss weight
    masked_loss: Number  # the weighted loss without the autoregressive co-loss
    masked_cross_entropy: Number
    masked_positions: Number  # masked tokens that have a loss weight
    masked_correct: Number


class SegmentLosses(NamedTuple):
    """Losses by noise segment: m ranges of tokens with one diffusion time each (a sample, or each of its blocks)."""

    times: Tensor  # [m]
    mask_ratios: Tensor  # [m], masked over maskable tokens
    num_maskable: Tensor  # [m]; like num_masked 0 on all context-parallel ranks but the first
    num_masked: Tensor  # [m]
    sums: SampleSums  # [m] each, over masked tokens, without an autoregressive co-loss


class SampleLosses(NamedTuple):
    """Losses of a micro-batch by sample, on the last pipeline stage."""

    sample_index: Tensor  # [b] int64, global
    times: Tensor  # [b]
    num_maskable: Tensor  # [b] int64; 0 on all context-parallel ranks but the first, so that sums count it once
    sums: SampleSums  # [b] each
    segments: SegmentLosses | None  # None where nothing is masked


class StepResult(NamedTuple):
    """Result of a training step. `totals` and `losses` cover this rank's samples, `grad_norm` is global.

    A norm that is not finite means that all ranks skipped the update; `not_finite` then holds the indices of this
    rank's samples whose loss is not finite (empty if the loss is finite and only its gradient is not).
    """

    totals: Tensor  # [10] float64, the fields of Totals; may be summed over ranks
    grad_norm: float
    not_finite: list[int]
    losses: list[SampleLosses]
    aux_losses: AuxLosses | None = None  # None if the run does not balance its experts
    repeated: bool = False  # tokens exceeded a rank's budget, and the passes were repeated without (expert_budget.py)


class Observer(Protocol):
    """Hooks around the two halves of a step (training_diagnostics.py); weights, gradients and loss are unchanged."""

    def step(self, micro_batches: list[Batch]) -> AbstractContextManager[None]: ...

    def update(self) -> AbstractContextManager[None]: ...


def train_step(
    chunks: list[Any], optimizer: MegatronOptimizer, micro_batches: list[Batch], observer: Observer | None = None
) -> StepResult:
    """Forward, backward and update with this rank's micro-batches of one global batch. Collective.

    The caller has set the learning rate.
    """
    count_loads(chunks, optimizer, micro_batches)
    with observer.step(micro_batches) if observer else nullcontext():
        with phase("optimizer"):
            zero_gradients(chunks, optimizer)
        losses = forward_backward(chunks, micro_batches, forward_only=False, within_budget=True)
        if repeated := exceeded_budget(chunks):
            zero_gradients(chunks, optimizer)
            losses = forward_backward(chunks, micro_batches, forward_only=False)
    mark("update")
    with observer.update() if observer else nullcontext(), phase("optimizer"):
        grad_norm = update_parameters(optimizer)
    not_finite = [] if math.isfinite(grad_norm) else _not_finite(losses)
    balancing = balancing_of(chunks)
    aux_losses = balancing.end_step(math.isfinite(grad_norm)) if balancing else None
    return StepResult(loss_totals(losses), grad_norm, not_finite, losses, aux_losses, repeated)


def count_loads(chunks: list[Any], optimizer: MegatronOptimizer, micro_batches: list[Batch]) -> None:
    """Before a step: count the loads of its global batch if its auxiliary loss needs them. Collective."""
    balancing = balancing_of(chunks)
    if balancing and balancing.counts_first:
        gather_weights(chunks, optimizer)
        _count_loads(chunks, micro_batches, balancing)


def _count_loads(chunks: list[Any], micro_batches: list[Batch], balancing: RunBalancing) -> None:
    """A forward pass that counts the choices of experts; no position has a loss, so that the LM head has no rows."""
    silent = [batch._replace(weights=torch.zeros_like(batch.weights)) for batch in micro_batches]
    with balancing.count(), torch.no_grad():
        forward_backward(chunks, silent, forward_only=True)


def forward_backward(
    chunks: list[nn.Module], micro_batches: list[Batch], forward_only: bool, within_budget: bool = False
) -> list[SampleLosses]:
    """Run megatron's pipeline schedule; returns one item per micro-batch on the last stage, elsewhere none.

    `within_budget`: tokens beyond a rank's budget are dropped, if the run has one; ask `exceeded_budget` afterwards.
    """
    micro_batch_size, seq_length = micro_batches[0].tokens.shape
    balancing = None if forward_only else balancing_of(chunks)
    if balancing and balancing.lacks_loads:
        _count_loads(chunks, micro_batches, balancing)
    with (
        nullcontext() if within_budget else without_budget(chunks),
        balancing.passes(micro_batches) if balancing else nullcontext(),
    ):
        return get_forward_backward_func()(
            forward_step_func=_forward_step,
            # Each virtual stage reads all micro-batches for itself.
            data_iterator=[iter(micro_batches) for _ in chunks] if len(chunks) > 1 else iter(micro_batches),
            model=chunks,
            num_microbatches=len(micro_batches),
            seq_length=seq_length,
            micro_batch_size=micro_batch_size,
            forward_only=forward_only,
        )


def _forward_step(batches: Iterator[Batch], model: Any, return_schedule_plan: bool = False) -> tuple[Any, Any]:
    """megatron's `forward_step_func`: the model's output, and the function that computes the loss from it.

    `return_schedule_plan`: return a plan of the layers instead of the output; megatron interleaves two micro-batches.
    """
    mark("micro-batch")
    batch = next(batches)
    targets = LossPositions._make(None if tensor is None else send(tensor) for tensor in find_loss_positions(batch))
    # `documents` stays on the host: for packed sequences the model needs their lengths there.
    rest = (None if tensor is None else send(tensor) for tensor in (batch.positions, batch.annealing, batch.levels))
    tokens = send(cp_slice(batch.tokens, dim=1).contiguous())
    inputs = (tokens, targets.labels, targets.indices, batch.documents, *rest)
    if not return_schedule_plan:
        return model(*inputs), partial(_loss, batch, targets)
    plan = model.build_schedule_plan(*inputs)
    return plan, lambda losses: _loss(batch, targets, TokenLosses(losses, model.correct_of(plan)))


class LossPositions(NamedTuple):
    """The positions of this rank's part of a micro-batch that have a loss, N of them, in the order of (b, s).

    They are found on the host, where the batch was made: asking a GPU for their number would make the host wait for
    everything queued there.
    """

    indices: Tensor  # [N] int64, into the flattened (b, s)
    labels: Tensor  # [N] int64
    weights: Tensor  # [N] float32, loss weights
    samples: Tensor  # [N] int64, 0 .. b - 1
    segments: Tensor | None = None  # [N] int64, 0 .. b n - 1; None: as `samples`
    masked_weights: Tensor | None = None  # [N] float32, without the autoregressive co-loss; None: as `weights`


def find_loss_positions(batch: Batch) -> LossPositions:
    """The positions with a loss weight above 0; on the host, like the batch."""
    labels_bs, weights_bs = (cp_slice(tensor, dim=1) for tensor in (batch.labels, batch.weights))
    index_N = (weights_bs.flatten() > 0).nonzero()[:, 0]
    labels_N, weights_N = labels_bs.flatten()[index_N], weights_bs.flatten()[index_N]
    samples_N = index_N // weights_bs.size(1)
    segments_N = masked_weights_N = None
    if batch.segment_of_position is not None:
        assert batch.noise_segments is not None
        segments_N = cp_slice(batch.segment_of_position, dim=1).flatten()[
            index_N
        ] + samples_N * batch.noise_segments.size(1)
    if batch.masked_weights is not None:
        masked_weights_N = cp_slice(batch.masked_weights, dim=1).flatten()[index_N]
    return LossPositions(index_N, labels_N, weights_N, samples_N, segments_N, masked_weights_N)


def _loss(batch: Batch, targets: LossPositions, output: TokenLosses) -> tuple[Tensor, Tensor, SampleLosses]:
    """megatron's loss function, called on the last pipeline stage."""
    sums = sample_sums(output.losses, targets.weights, output.correct, targets.samples, len(batch.weights))
    # Context-parallel ranks share the samples' sequences; the first of them counts the samples.
    num_maskable = batch.num_maskable * (parallel_state.get_context_parallel_rank() == 0)
    segments = _segment_losses(batch, targets, output, sums)
    # What megatron does with the three values:
    #   the loss sum, not a mean, is what the backward pass starts from;
    #   the token counts are summed over micro-batches and ranks, and all gradients divided by that sum at the end;
    #   the third is opaque to megatron: forward_backward returns a list of these, one per micro-batch.
    return (
        (output.losses * targets.weights).sum(),
        send(num_maskable.sum().int()),
        SampleLosses(batch.sample_index, batch.times, num_maskable, sums, segments),
    )


def _segment_losses(
    batch: Batch, targets: LossPositions, output: TokenLosses, sums: SampleSums
) -> SegmentLosses | None:
    """`sums`: those of the samples, reused where each sample is one segment and there is no co-loss."""
    if batch.noise_segments is None:
        return None
    times_M, num_maskable_M, num_masked_M = batch.noise_segments.flatten(0, 1).T
    ratios_M = num_masked_M / num_maskable_M.clamp(min=1)
    if targets.segments is not None:
        weights_N = targets.weights if targets.masked_weights is None else targets.masked_weights
        sums = sample_sums(output.losses, weights_N, output.correct, targets.segments, len(times_M), weights_N > 0)
    counts = parallel_state.get_context_parallel_rank() == 0
    return SegmentLosses(times_M, ratios_M, num_maskable_M * counts, num_masked_M * counts, sums)


def _not_finite(losses: list[SampleLosses]) -> list[int]:
    return [
        int(index)
        for item in losses
        for index, loss in zip(item.sample_index, item.sums.weighted_loss, strict=True)
        if not math.isfinite(loss)
    ]


def loss_totals(losses: list[SampleLosses]) -> Tensor:
    """[10] float64, the fields of Totals, summed over `losses`; 0 on tensor-parallel ranks but the first."""
    table = torch.zeros(len(Totals._fields), dtype=torch.float64, device=device())
    if parallel_state.get_tensor_model_parallel_rank() == 0:  # the others hold the same positions
        totals = Totals[Tensor](*table)  # views of its elements
        for item in losses:
            segments = item.segments
            masked = segments.sums if segments else item.sums
            totals.weighted_loss.add_(item.sums.weighted_loss.sum())
            totals.cross_entropy.add_(item.sums.cross_entropy.sum())
            totals.num_positions.add_(item.sums.num_positions.sum())
            totals.num_correct.add_(item.sums.num_correct.sum())
            totals.num_maskable.add_(item.num_maskable.sum())
            totals.num_masked.add_(segments.num_masked.sum() if segments else item.sums.num_positions.sum())
            totals.masked_loss.add_(masked.weighted_loss.sum())
            totals.masked_cross_entropy.add_(masked.cross_entropy.sum())
            totals.masked_positions.add_(masked.num_positions.sum())
            totals.masked_correct.add_(masked.num_correct.sum())
    return table
