"""Which token may look at which, where that is neither all nor only the past: as data, entry by entry.

Every function here takes the queries that a process has, and all keys: what is decided for a (query, key) depends on
neither the layout nor the batch. Shapes: B batch, Q own queries, K all keys.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from megatron_a2d.diffusion.rng import attention_key

# A random entry is a number in 0 .. 2^53 - 1; it is open where it lies below the threshold.
_ALWAYS = 1 << 53
# SplitMix64 (Steele, Lea & Flood 2014): increment and multipliers, as signed 64-bit numbers.
_INCREMENT, _FIRST, _SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


def annealing_key_and_threshold(seed: int, sample_index: int, iteration: int, num_steps: int) -> np.ndarray | None:
    """A training sample's share of DiffuLLaMA's annealing (Gong et al. 2024): causal OR random entries.

    Of the entries above the diagonal the part (iteration + 1) / num_steps is open, all of them from then on: None.
    Returns [2] int64, the sample's key and the threshold, for `annealed`.
    """
    if iteration + 1 >= num_steps:
        return None
    return np.array([attention_key(seed, sample_index), _ALWAYS * (iteration + 1) // num_steps], dtype=np.int64)


def fully_annealed() -> np.ndarray:
    """The annealing of a sample whose entries are all open, for a batch that has others."""
    return np.array([0, _ALWAYS], dtype=np.int64)


def annealed(annealing_B2: Tensor, queries_Q: Tensor, num_keys: int) -> Tensor:
    """[B, Q, K] bool, True where a query may look at a key: at the past, and at random entries.

    A pure function of (seed, sample index, query, key); with a rising threshold entries only ever open.
    """
    keys_K = torch.arange(num_keys, device=queries_Q.device)
    key_B, threshold_B = annealing_B2[:, 0, None, None], annealing_B2[:, 1, None, None]
    numbers_BQK = key_B + ((queries_Q[:, None] << 32) + keys_K) * _INCREMENT
    random_BQK = _shifted_right(_mixed(numbers_BQK), 11) < threshold_B
    return random_BQK | (keys_K <= queries_Q[:, None])


def block_causal_mask(own_BQ: Tensor, levels_BK: Tensor) -> Tensor:
    """[B, Q, K] bool: rows of one level see one another, and clean rows (odd) of lower levels (block_diffusion.py)."""
    queries, keys = own_BQ[:, :, None], levels_BK[:, None, :]
    return (keys == queries) | ((keys % 2 == 1) & (keys < queries))


def _mixed(numbers: Tensor) -> Tensor:
    """SplitMix64's output function; int64 arithmetic wraps."""
    numbers = (numbers ^ _shifted_right(numbers, 30)) * _FIRST
    numbers = (numbers ^ _shifted_right(numbers, 27)) * _SECOND
    return numbers ^ _shifted_right(numbers, 31)


def _shifted_right(numbers: Tensor, bits: int) -> Tensor:
    """Zeros come in from the left."""
    return (numbers >> bits) & ((1 << (64 - bits)) - 1)
