"""Attention masks as boolean tensors, put together from document boundaries, annealing and block levels.

Every function takes the queries of this process and all keys. Whether a query attends to a key is a pure function of
the two and of the sample, independent of layout and batch. Shapes: B batch, Q this rank's queries, K all keys.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from megatron_a2d.diffusion.rng import attention_key

# Every entry has a random number in 0 .. 2^53 - 1 and is unmasked if that is below the threshold.
_ALWAYS = 1 << 53
# SplitMix64 (Steele, Lea & Flood 2014): increment and multipliers, as signed 64-bit numbers.
_INCREMENT, _FIRST, _SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


def attention_mask(
    documents_BK: Tensor | None,
    annealing_B2: Tensor | None,
    levels_BK: Tensor | None,
    num_keys: int,
    slice_queries: Callable[[Tensor], Tensor],
) -> Tensor | None:
    """[B, 1, Q, K] bool, True where attention is masked, as megatron has it; None: full attention.

    Each argument that is given restricts attention: to the document of a position, to what `annealed` unmasks, to what
    `block_causal_mask` does. `slice_queries` takes this rank's queries out of a tensor of whole sequences.
    """
    allowed = []
    if documents_BK is not None:
        allowed.append(slice_queries(documents_BK)[:, :, None] == documents_BK[:, None, :])
    if annealing_B2 is not None:
        (queries_Q,) = slice_queries(torch.arange(num_keys, device=annealing_B2.device)[None])
        allowed.append(annealed(annealing_B2, queries_Q, num_keys))
    if levels_BK is not None:
        allowed.append(block_causal_mask(slice_queries(levels_BK), levels_BK))
    return ~functools.reduce(torch.logical_and, allowed)[:, None] if allowed else None


def annealing_key_and_threshold(seed: int, sample_index: int, iteration: int, num_steps: int) -> np.ndarray | None:
    """Key and threshold for `annealed`, [2] int64: DiffuLLaMA's attention annealing (Gong et al. 2024).

    A share (iteration + 1) / num_steps of the entries above the diagonal is unmasked. None once all of them are.
    """
    if iteration + 1 >= num_steps:
        return None
    return np.array([attention_key(seed, sample_index), _ALWAYS * (iteration + 1) // num_steps], dtype=np.int64)


def fully_annealed() -> np.ndarray:
    """Key and threshold of a sample with full attention, for a batch in which other samples are annealed."""
    return np.array([0, _ALWAYS], dtype=np.int64)


def annealed(annealing_B2: Tensor, queries_Q: Tensor, num_keys: int) -> Tensor:
    """[B, Q, K] bool, True where a query attends to a key: the past and itself, and random later positions.

    A pure function of (seed, sample index, query, key); as the threshold rises, unmasked entries stay unmasked.
    """
    keys_K = torch.arange(num_keys, device=queries_Q.device)
    key_B, threshold_B = annealing_B2[:, 0, None, None], annealing_B2[:, 1, None, None]
    numbers_BQK = key_B + ((queries_Q[:, None] << 32) + keys_K) * _INCREMENT
    random_BQK = _shifted_right(_mixed(numbers_BQK), 11) < threshold_B
    return random_BQK | (keys_K <= queries_Q[:, None])


def block_causal_mask(own_BQ: Tensor, levels_BK: Tensor) -> Tensor:
    """[B, Q, K] bool: a query attends to keys of its own level and to clean (odd) keys of lower levels.

    The level of a position of block diffusion (block_diffusion.py sets it) is 2 * start of its block if it is noised,
    2 * start + 1 if it is clean, or 2 * position + 1 if the clean copy is causal.
    """
    queries, keys = own_BQ[:, :, None], levels_BK[:, None, :]
    return (keys == queries) | ((keys % 2 == 1) & (keys < queries))


def _mixed(numbers: Tensor) -> Tensor:
    """SplitMix64's output function; int64 arithmetic wraps."""
    numbers = (numbers ^ _shifted_right(numbers, 30)) * _FIRST
    numbers = (numbers ^ _shifted_right(numbers, 27)) * _SECOND
    return numbers ^ _shifted_right(numbers, 31)


def _shifted_right(numbers: Tensor, bits: int) -> Tensor:
    """Logical right shift: the upper bits are filled with zeros."""
    return (numbers >> bits) & ((1 << (64 - bits)) - 1)
