"""One iteration: micro-batches through megatron's schedule, one optimizer step. Model and data meet here."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple, Protocol

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
from megatron_a2d.training.optimizer import update_parameters
from megatron_a2d.training.param_gather import zero_gradients


class SpanLosses(NamedTuple):
    """What was masked at one time: the samples of a micro-batch, or all of their blocks; m of them."""

    times: Tensor  # [m]
    mask_ratios: Tensor  # [m], masked over maskable tokens
    num_maskable: Tensor  # [m]; like num_masked 0 on all but the first of the ranks that share a sequence
    num_masked: Tensor  # [m]
    sums: SampleSums  # [m] each, of the rows that masked tokens judge, without an autoregressive co-loss


class SampleLosses(NamedTuple):
    """The losses of a micro-batch's samples, on the last pipeline stage."""

    sample_index: Tensor  # [b] int64, global
    times: Tensor  # [b]
    num_maskable: Tensor  # [b] int64; 0 on all but the first of the ranks that share the samples' sequences
    sums: SampleSums
    spans: SpanLosses | None  # None where nothing is masked


class StepResult(NamedTuple):
    """`totals` are this rank's part and may be summed over ranks; the gradient norm is global.

    A norm that is not finite means that the update was skipped on all ranks; `not_finite` then holds the indices of
    this rank's samples whose loss is not finite (none, where the loss is finite and its gradient is not).
    """

    totals: Tensor  # [10] float64, the fields of Totals
    grad_norm: float
    not_finite: list[int]
    losses: list[SampleLosses]  # of this rank


class Totals(NamedTuple):
    """Sums over samples. Where nothing is masked (objective ar), `masked_...` are those of all rows with loss."""

    weighted_loss: float
    cross_entropy: float
    num_rows: float
    num_correct: float
    num_maskable: float
    num_masked: float  # tokens, whether or not they have a weight
    masked_loss: float  # the weighted loss without the autoregressive co-loss
    masked_cross_entropy: float
    masked_rows: float  # those of masked tokens that have a weight
    masked_correct: float


class Observer(Protocol):
    """Something that looks at a step while it is made (monitor.py), and changes nothing in it."""

    def step(self, iteration: list[Batch]) -> AbstractContextManager[None]: ...

    def update(self) -> AbstractContextManager[None]: ...


def forward_backward(
    chunks: list[nn.Module],
    batches: Iterator[Batch],
    num_microbatches: int,
    shape: tuple[int, int],
    forward_only: bool,
) -> list[SampleLosses]:
    """Run an iteration's micro-batches of shape (b, s); returns their losses on the last stage, else nothing."""
    micro_batch_size, seq_length = shape
    with phase("data"):
        iteration = [next(batches) for _ in range(num_microbatches)]
    return get_forward_backward_func()(
        forward_step_func=_forward_step,
        # Each virtual stage reads all micro-batches for itself.
        data_iterator=[iter(iteration) for _ in chunks] if len(chunks) > 1 else iter(iteration),
        model=chunks,
        num_microbatches=num_microbatches,
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        forward_only=forward_only,
    )


def train_step(
    chunks: list[Any],
    optimizer: MegatronOptimizer,
    batches: Iterator[Batch],
    num_microbatches: int,
    shape: tuple[int, int],
    observer: Observer | None = None,
) -> StepResult:
    """Forward, backward and update. The learning rate has been set before."""
    with phase("data"):
        iteration = [next(batches) for _ in range(num_microbatches)]
    with observer.step(iteration) if observer else nullcontext():
        with phase("optimizer"):
            zero_gradients(chunks, optimizer)
        losses = forward_backward(chunks, iter(iteration), num_microbatches, shape, forward_only=False)
    mark("update")
    with observer.update() if observer else nullcontext(), phase("optimizer"):
        grad_norm = update_parameters(optimizer)
    not_finite = [] if math.isfinite(grad_norm) else _not_finite(losses)
    return StepResult(loss_totals(losses), grad_norm, not_finite, losses)


class Rows(NamedTuple):
    """The rows of this rank's piece of a micro-batch that carry loss, in the order of (b, s); N of them.

    They are found on the host, where the batch was made: a GPU that were asked for their number would have to finish
    all that it was given first.
    """

    places: Tensor  # [N] int64, into (b, s)
    labels: Tensor  # [N] int64
    weights: Tensor  # [N] float32
    samples: Tensor  # [N] int64, 0 .. b - 1
    spans: Tensor | None = None  # [N] int64, 0 .. b n - 1; None: as `samples`
    masked_weights: Tensor | None = None  # [N] float32; None: as `weights`


def find_rows(batch: Batch) -> Rows:
    """On the host, like the batch."""
    labels_bs, weights_bs = (cp_slice(tensor, dim=1) for tensor in (batch.labels, batch.weights))
    index_N = (weights_bs.flatten() > 0).nonzero()[:, 0]
    labels_N, weights_N = labels_bs.flatten()[index_N], weights_bs.flatten()[index_N]
    samples_N = index_N // weights_bs.size(1)
    spans_N = masked_weights_N = None
    if batch.segment_of_position is not None:
        assert batch.noise_segments is not None
        spans_N = cp_slice(batch.segment_of_position, dim=1).flatten()[index_N] + samples_N * batch.noise_segments.size(
            1
        )
    if batch.masked_weights is not None:
        masked_weights_N = cp_slice(batch.masked_weights, dim=1).flatten()[index_N]
    return Rows(index_N, labels_N, weights_N, samples_N, spans_N, masked_weights_N)


def _forward_step(batches: Iterator[Batch], model: Any, return_schedule_plan: bool = False) -> tuple[Any, Any]:
    """megatron's `forward_step_func`: the model's output (or the plan of its parts, where megatron interleaves two
    micro-batches), and the function that makes a loss of it."""
    mark("micro-batch")
    batch = next(batches)
    rows = Rows._make(None if tensor is None else send(tensor) for tensor in find_rows(batch))
    # The documents stay here: where they are packed sequences, their lengths are asked for.
    rest = (None if tensor is None else send(tensor) for tensor in (batch.positions, batch.annealing, batch.levels))
    tokens = send(cp_slice(batch.tokens, dim=1).contiguous())
    inputs = (tokens, rows.labels, rows.places, batch.documents, *rest)
    if not return_schedule_plan:
        return model(*inputs), partial(_loss, batch, rows)
    plan = model.build_schedule_plan(*inputs)
    return plan, lambda losses: _loss(batch, rows, TokenLosses(losses, model.correct_of(plan)))


def _loss(batch: Batch, rows: Rows, output: TokenLosses) -> tuple[Tensor, Tensor, SampleLosses]:
    """Sum of the weighted losses, not divided: megatron divides gradients by the global number of tokens."""
    sums = sample_sums(output.losses, rows.weights, output.correct, rows.samples, len(batch.weights))
    # The ranks that share a sample's sequence have its rows in pieces; one of them counts the sample.
    num_maskable = batch.num_maskable * (parallel_state.get_context_parallel_rank() == 0)
    losses = SampleLosses(batch.sample_index, batch.times, num_maskable, sums, _span_losses(batch, rows, output, sums))
    return (output.losses * rows.weights).sum(), send(num_maskable.sum().int()), losses


def _span_losses(batch: Batch, rows: Rows, output: TokenLosses, sums: SampleSums) -> SpanLosses | None:
    """`sums` are those of the samples, which are the spans' too where a sample is one and has one loss."""
    if batch.noise_segments is None:
        return None
    times_M, num_maskable_M, num_masked_M = batch.noise_segments.flatten(0, 1).T
    ratios_M = num_masked_M / num_maskable_M.clamp(min=1)
    if rows.spans is not None:
        weights_N = rows.weights if rows.masked_weights is None else rows.masked_weights
        sums = sample_sums(output.losses, weights_N, output.correct, rows.spans, len(times_M), weights_N > 0)
    counts = parallel_state.get_context_parallel_rank() == 0
    return SpanLosses(times_M, ratios_M, num_maskable_M * counts, num_masked_M * counts, sums)


def _not_finite(losses: list[SampleLosses]) -> list[int]:
    return [
        int(index)
        for item in losses
        for index, loss in zip(item.sample_index, item.sums.weighted_loss, strict=True)
        if not math.isfinite(loss)
    ]


def loss_totals(losses: list[SampleLosses]) -> Tensor:
    """[10] float64, the fields of Totals."""
    totals = torch.zeros(len(Totals._fields), dtype=torch.float64, device=device())
    if parallel_state.get_tensor_model_parallel_rank() == 0:  # tensor-parallel ranks hold the same rows
        for item in losses:
            totals[:4] += torch.stack([column.sum() for column in item.sums])
            totals[4] += item.num_maskable.sum()
            spans = item.spans
            totals[5] += spans.num_masked.sum() if spans else item.sums.num_rows.sum()
            totals[6:] += torch.stack([column.sum() for column in (spans.sums if spans else item.sums)])
    return totals
