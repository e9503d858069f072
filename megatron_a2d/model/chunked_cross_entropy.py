"""Chunked linear cross entropy: LM head and loss of the loss positions, a chunk at a time; no full logits tensor.

The forward pass keeps two numbers per position, its loss and the logarithm of the softmax's denominator. The backward
pass recomputes a chunk's logits and turns them into their gradient: softmax minus the label's one-hot. That costs one
more product with the head's weight and saves [N, V] logits. All chunks share one buffer. The vocabulary may be sharded
over tensor-parallel ranks, which all-gather four numbers per position once. On a GPU the elementwise steps are compiled
(`_run`). The weight's gradient is accumulated in fp32 (weight_gradients.py). On a CPU logits
that fit one chunk are kept instead of recomputed (`_keeps`). Shapes: N loss positions, n those of a chunk,
h hidden, V this rank's shard of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor

from megatron_a2d.model.local_linear import LocalColumnParallelLinear
from megatron_a2d.model.logits_chunks import rows_per_chunk
from megatron_a2d.model.matrix_products import multiply
from megatron_a2d.model.weight_gradients import add_product, gradient_buffer, hand_over


class OutputLayer(LocalColumnParallelLinear):
    """The LM head: logits over this rank's shard of the vocabulary; with labels, the losses instead.

    One module for both: with --overlap-param-gather megatron gathers the weight when its module is called.
    """

    def forward(  # type: ignore[override]
        self, hidden: Tensor, weight: Tensor | None = None, labels_N: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """(logits [..., V], bias or None), or with `labels_N` and hidden states [N, h]: (losses [N], correct [N]).

        Losses are cross-entropies in nats, fp32; `correct` is True where the label is the most likely token.
        """
        if labels_N is None:
            return super().forward(hidden.contiguous(), weight=weight)
        weight = self.weight if weight is None else weight
        rows = rows_per_chunk(len(weight), hidden.device.type)
        return _MaskedHead.apply(hidden, weight, labels_N, self.tp_group, rows, _keeps(hidden, rows))


def losses_of_logits(logits_NV: Tensor, labels_N: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    """As `OutputLayer` returns them, of all logits at once; differentiable."""
    with torch.no_grad():
        own_4N = _statistics(logits_NV.to(torch.float32, copy=True), labels_N - group.rank() * logits_NV.size(1))
        index_N = _over_ranks(own_4N, logits_NV.size(1), group)[3]
    losses_N = vocab_parallel_cross_entropy(logits_NV.to(torch.float32, copy=True), labels_N)
    return losses_N, index_N.long() == labels_N


class _MaskedHead(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden_Nh: Tensor, weight_Vh: Tensor, labels_N: Tensor, group: Any, rows: int, keeps: bool = False
    ) -> tuple[Tensor, Tensor]:
        first = group.rank() * len(weight_Vh)
        own_N = labels_N - first  # outside [0, V): on another rank's shard
        space = _space(hidden_Nh, weight_Vh, rows)
        parts = [
            _run(_statistics, _logits(hidden_Nh[chunk], weight_Vh, space), own_N[chunk])
            for chunk in _chunks(hidden_Nh, rows)
        ]
        statistics_4N = torch.cat(parts, dim=1) if parts else hidden_Nh.new_empty(4, 0).float()
        largest, total, label, index = _over_ranks(statistics_4N, len(weight_Vh), group)
        log_denominator_N = largest + total.log()
        ctx.group, ctx.rows = group, rows
        ctx.kept = _Kept(space, statistics_4N[0] - log_denominator_N) if keeps else None
        losses_N = log_denominator_N - label
        ctx.save_for_backward(hidden_Nh, weight_Vh, own_N, log_denominator_N, losses_N)
        correct_N = index.long() == labels_N
        ctx.mark_non_differentiable(correct_N)
        return losses_N, correct_N

    @staticmethod
    def backward(ctx: Any, gradient_N: Tensor, _: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden_Nh, weight_Vh, labels_N, log_denominator_N, losses_N = ctx.saved_tensors
        buffer_Vh = gradient_buffer(weight_Vh) if ctx.needs_input_grad[1] else None
        kept, ctx.kept = ctx.kept, None  # it is overwritten; a second backward pass would recompute it
        hidden_gradient = _hidden_gradient(
            hidden_Nh, weight_Vh, labels_N, log_denominator_N, losses_N, gradient_N, ctx.rows, buffer_Vh, kept
        )
        if ctx.group.size() > 1:
            torch.distributed.all_reduce(hidden_gradient, group=ctx.group)
        return hidden_gradient, hand_over(weight_Vh, buffer_Vh), None, None, None, None


class _Kept(NamedTuple):
    """What the backward pass of a single chunk needs instead of recomputing its logits."""

    exponentials: Tensor  # [N, V], exp(logit - this shard's largest)
    log_factor: Tensor  # [N]; softmax = exponential * exp(log_factor)


def _keeps(hidden_Nh: Tensor, rows: int) -> bool:
    """Whether the logits are kept for a backward pass: on a CPU, one chunk, whose exponentials `_statistics` leaves."""
    fits = hidden_Nh.device.type == "cpu" and 0 < len(hidden_Nh) <= rows
    return fits and hidden_Nh.dtype == torch.float32 and torch.is_grad_enabled()


def _hidden_gradient(
    hidden_Nh: Tensor, weight_Vh: Tensor, labels_N: Tensor, log_denominator_N: Tensor, losses_N: Tensor,
    gradient_N: Tensor, rows: int, buffer_Vh: Tensor | None, kept: _Kept | None,
) -> Tensor:  # fmt: skip
    """[N, h], from this rank's shard of the vocabulary; the weight's gradient is added to `buffer_Vh`, if any."""
    label_gradient_N = torch.expm1(-losses_N) * gradient_N  # the label's probability less one
    result_Nh = torch.empty_like(hidden_Nh)
    space = kept.exponentials if kept else _space(hidden_Nh, weight_Vh, rows)
    for chunk in _chunks(hidden_Nh, rows):
        if kept:
            delta_nV = space.mul_((kept.log_factor.exp() * gradient_N)[:, None])
        else:
            delta_nV = _logits(hidden_Nh[chunk], weight_Vh, space)
            _run(_become_softmax, delta_nV, log_denominator_N[chunk], gradient_N[chunk])
        _put(delta_nV, labels_N[chunk], label_gradient_N[chunk])
        multiply(delta_nV, weight_Vh, out=result_Nh[chunk])
        if buffer_Vh is not None:
            add_product(buffer_Vh, delta_nV, hidden_Nh[chunk])
    return result_Nh


def _chunks(hidden_Nh: Tensor, rows: int) -> Iterator[slice]:
    return (slice(start, start + rows) for start in range(0, len(hidden_Nh), rows))


def _space(hidden_Nh: Tensor, weight_Vh: Tensor, rows: int) -> Tensor:
    """A buffer for a chunk's logits; on a CPU, allocating one per chunk would take as long as its matrix product."""
    return hidden_Nh.new_empty(min(rows, len(hidden_Nh)), len(weight_Vh))


def _logits(hidden_nh: Tensor, weight_Vh: Tensor, space: Tensor) -> Tensor:
    logits_nV = space[: len(hidden_nh)]
    multiply(hidden_nh, weight_Vh.T, out=logits_nV)
    return logits_nV


def _statistics(logits_nV: Tensor, labels_n: Tensor) -> Tensor:
    """[4, n] fp32: largest logit, sum of exp(logit - largest), the label's logit (0 if on another rank), argmax.

    The argmax is exact in fp32 up to a vocabulary of 16 million. The logits are overwritten.
    """
    logits = logits_nV.float()
    is_here = (labels_n >= 0) & (labels_n < logits.size(1))
    label = logits.gather(1, labels_n.clamp(0, logits.size(1) - 1)[:, None])[:, 0] * is_here
    largest, index = logits.max(dim=1)
    total = logits.sub_(largest[:, None]).exp_().sum(dim=1)
    return torch.stack([largest, total, label, index.float()])


def _become_softmax(logits_nV: Tensor, log_denominator_n: Tensor, gradient_n: Tensor) -> Tensor:
    """Overwrite the logits by softmax times the position's upstream gradient."""
    softmax = logits_nV.float().sub_(log_denominator_n[:, None]).exp_()
    return logits_nV.copy_(softmax.mul_(gradient_n[:, None]))


def _put(delta_nV: Tensor, labels_n: Tensor, values_n: Tensor) -> None:
    """Set the entry of each position's label, where it is on this rank, to the position's value."""
    column_n1 = labels_n.clamp(0, delta_nV.size(1) - 1)[:, None]
    kept_n1 = delta_nV.gather(1, column_n1)
    delta_nV.scatter_(1, column_n1, torch.where(column_n1 == labels_n[:, None], values_n[:, None].to(kept_n1), kept_n1))


_compiled: dict[Callable[..., Tensor], Callable[..., Tensor]] = {}


def _run(function: Callable[..., Tensor], logits: Tensor, *rest: Tensor) -> Tensor:
    """Call `function`; on a GPU compiled to one kernel, which makes no fp32 copy of the logits."""
    if not logits.is_cuda:
        return function(logits, *rest)
    if function not in _compiled:
        _compiled[function] = torch.compile(function)
    return _compiled[function](logits, *rest)


def _over_ranks(own_4N: Tensor, vocabulary: int, group: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The statistics over the full vocabulary from those of each rank's shard; ties go to the lowest index."""
    if group.size() == 1:
        return own_4N[0], own_4N[1], own_4N[2], own_4N[3]
    every_R4N = [torch.empty_like(own_4N) for _ in range(group.size())]
    torch.distributed.all_gather(every_R4N, own_4N, group=group)
    largest_RN, total_RN, label_RN, index_RN = torch.stack(every_R4N, dim=1)
    largest, winner = largest_RN.max(dim=0, keepdim=True)
    total = (total_RN * (largest_RN - largest).exp()).sum(dim=0)
    index = index_RN.gather(0, winner) + winner * vocabulary
    return largest[0], total, label_RN.sum(dim=0), index[0]
