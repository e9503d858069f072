"""How many positions stay masked after each forward pass, and which block a hole belongs to."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_a2d.diffusion.sampling.options import Sampler


class Turn(NamedTuple):
    """One forward pass of a row: it works on one block."""

    block: int
    num_left: int  # masked positions that the block keeps, at most


def turns(num_holes: int, sampler: Sampler, num_steps: int, block_length: int) -> list[Turn]:
    """All turns of a row. eb and threshold leave a block early: their counts are upper bounds."""
    block_length = block_length or max(num_holes, 1)
    result = []
    before = 0
    for block, start in enumerate(range(0, num_holes, block_length)):
        end = min(start + block_length, num_holes)
        share = max(1, num_steps * end // num_holes - before)  # at least one forward a block
        before = num_steps * end // num_holes
        result += [Turn(block, left) for left in counts_left(end - start, sampler, share)]
    return result


def counts_left(num_holes: int, sampler: Sampler, num_steps: int) -> list[int]:
    """Masked positions after each of at most `num_steps` forwards, strictly falling to 0."""
    # More forwards than twice the holes decide as these do: one position each.
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
    # A forward that would decide nothing is left out.
    return [count for count, earlier in zip(left, [num_holes, *left[:-1]], strict=True) if count < earlier]


def blocks_of(editable_BL: Tensor, block_length: int) -> Tensor:
    """The block of each hole, [B, L] int64; -1 elsewhere. Holes are counted along the row, gaps or not."""
    numbers_BL = editable_BL.long().cumsum(1) - 1
    blocks_BL = numbers_BL // block_length if block_length else torch.zeros_like(numbers_BL)
    return blocks_BL.masked_fill(~editable_BL, -1)
