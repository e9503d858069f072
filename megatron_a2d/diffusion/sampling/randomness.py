"""Draws that belong to a row and a position, and to nothing else: the same text on any batch split and device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def row_seed(seed: int, row: int) -> int:
    """A 32-bit seed for one row of a batch, mixed so that neighbouring seeds and rows share nothing."""
    value = (seed * 0x9E3779B97F4A7C15 + row + 1) % 2**64
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # SplitMix64's finaliser
        value = (value ^ (value >> shift)) * factor % 2**64
    return value >> 32


def position_uniforms(seed: int | Sequence[int], batch: int, length: int) -> Tensor:
    """One uniform number for each position, [B, L] fp64; each position is drawn once, so one is enough.

    They come from a generator of each row on the CPU. One seed a row, or one number from which `row_seed` makes them.
    """
    seeds = [row_seed(seed, row) for row in range(batch)] if isinstance(seed, int) else list(seed)
    if len(seeds) != batch:
        raise ValueError(f"{len(seeds)} seeds for {batch} rows; give one seed a row, or a single number")
    draws = [torch.rand(length, dtype=torch.float64, generator=torch.Generator().manual_seed(value)) for value in seeds]
    return torch.stack(draws)
