"""Unmasking schedules: how many positions stay masked after each forward pass, and the block of each hole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_a2d.diffusion.sampling_options import DREAM, SELF_SPECULATIVE, Sampler, SamplingOptions


class StepPlan(NamedTuple):
    """One planned forward pass of a sequence, which unmasks positions of one block."""

    block: int
    num_left: int  # masked positions that remain in the block, at most


def plan_steps(sizes: Sequence[int], sampler: Sampler, num_steps: int) -> list[StepPlan]:
    """The forward passes of a sequence whose blocks have `sizes` masked positions.

    eb and threshold may finish a block early: for them `num_left` is an upper bound.
    """
    num_holes, end, before = sum(sizes), 0, 0
    result = []
    for block, size in enumerate(sizes):
        end += size
        share = max(1, num_steps * end // num_holes - before)  # at least one forward pass per block
        before = num_steps * end // num_holes
        result += [StepPlan(block, left) for left in counts_left(size, sampler, share)]
    return result


def most_forward_passes(editable_BL: Tensor, options: SamplingOptions) -> int:
    """The largest number of forward passes of any sequence; some samplers need fewer."""
    if options.sampler == SELF_SPECULATIVE:
        return 2 * int(editable_BL.sum(1).max())  # a draft and its verification decide at least one token
    blocks_BL = blocks_of(editable_BL, options.block_length, options.aligned_blocks)
    return max(len(plan_steps(sizes, options.sampler, options.num_steps)) for sizes in sizes_of(blocks_BL))


def counts_left(num_holes: int, sampler: Sampler, num_steps: int) -> list[int]:
    """The number of masked positions after each of at most `num_steps` forward passes, strictly falling to 0."""
    if sampler in DREAM:
        return _dream_counts(num_holes, num_steps)
    # More forward passes than twice the holes give the same result: one position each.
    num_steps = min(num_steps, max(2 * num_holes, 1))
    if sampler == "rnd1":
        # floor(N (S - n) / S) after step n, in fp32, as published: where the product is whole, its rounding decides.
        holes = torch.tensor(num_holes)
        left = [int((holes * ((num_steps - step) / num_steps)).long()) for step in range(1, num_steps + 1)]
    elif sampler == "confidence":
        # N // S each time, and one more in the first N % S steps.
        each, more = divmod(num_holes, num_steps)
        left = [num_holes - step * each - min(step, more) for step in range(1, num_steps + 1)]
    else:
        left = [max(num_holes - step, 0) for step in range(1, num_steps)] + [0]
    return _falling(num_holes, left)


def _dream_counts(num_holes: int, num_steps: int) -> list[int]:
    """Dream's: a step from time t to s unmasks the share 1 - s/t of the masked positions, rounded down; the last, all.

    Times run from 1 to 1e-3, in fp32 as published: with as many steps as holes the first unmasks nothing, the last two.
    """
    times = torch.linspace(1, 1e-3, num_steps + 1)
    left = [num_holes]
    for share in (1 - times[1:-1] / times[:-2]).unbind():
        left.append(left[-1] - int(left[-1] * share))
    return _falling(num_holes, [*left[1:], 0])


def _falling(num_holes: int, left: list[int]) -> list[int]:
    """Without the forward passes that would unmask nothing."""
    return [count for count, earlier in zip(left, [num_holes, *left[:-1]], strict=True) if count < earlier]


def blocks_of(editable_BL: Tensor, block_length: int, aligned: bool = False) -> Tensor:
    """The block of each masked position, [B, L] int64; -1 elsewhere.

    A block is `block_length` consecutive masked positions, whatever lies between them. `aligned`: a block is
    `block_length` positions of the sequence itself, and blocks without masked positions are not counted.
    """
    numbers_BL = editable_BL.long().cumsum(1) - 1
    if aligned:
        positions_L = torch.arange(editable_BL.size(1), device=editable_BL.device)
        begins_BL = torch.zeros_like(editable_BL)
        for row_L, begins_L in zip(editable_BL, begins_BL, strict=True):
            holes = positions_L[row_L]
            begins_L[holes[torch.diff(holes // block_length, prepend=holes.new_tensor([-1])) > 0]] = True
        blocks_BL = begins_BL.long().cumsum(1) - 1
    else:
        blocks_BL = numbers_BL // block_length if block_length else torch.zeros_like(numbers_BL)
    return blocks_BL.masked_fill(~editable_BL, -1)


def sizes_of(blocks_BL: Tensor) -> list[list[int]]:
    """The number of masked positions of each block, per sequence."""
    return [torch.bincount(row_L[row_L >= 0]).tolist() for row_L in blocks_BL]
