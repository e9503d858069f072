"""Attention masks, put together from document boundaries, annealing and block levels.

Whether a query attends to a key is a pure function of the two and of the sample, independent of layout and batch. So a
mask is encoded as a few numbers per position, from which any part of it is computed where it is needed
(model/tiled_attention.py). Shapes: B batch, Q some of the queries, K all keys.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_a2d.diffusion.rng import attention_key

# Every entry has a random number in 0 .. 2^53 - 1 and is unmasked if that is below the threshold.
_ALWAYS = 1 << 53
# SplitMix64 (Steele, Lea & Flood 2014): increment and multipliers, as signed 64-bit numbers.
_INCREMENT, _FIRST, _SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


def encoded_mask(
    documents_BK: Tensor | None, annealing_B2: Tensor | None, levels_BK: Tensor | None, num_keys: int
) -> Tensor | None:
    """The attention mask of a micro-batch as a few numbers per position, [B, F, K] int64; None: full attention.

    F = 2: document and level; F = 4 while attention is annealed: also key and threshold, the same for all positions.
    Each argument that is given restricts attention: to the document of a position, to what `annealed` unmasks, to what
    `block_causal_mask` does. Kilobytes, where the mask itself has a byte for each pair of positions.
    """
    given = [tensor for tensor in (documents_BK, annealing_B2, levels_BK) if tensor is not None]
    if not given:
        return None
    everywhere_BK = given[0].new_zeros(len(given[0]), num_keys)
    fields = [everywhere_BK if tensor is None else tensor for tensor in (documents_BK, levels_BK)]
    if annealing_B2 is not None:
        fields += [everywhere_BK + column[:, None] for column in annealing_B2.T]
    return torch.stack(fields, dim=1)


def allowed_entries(encoded_BFK: Tensor, queries: slice, causal: bool = False) -> Tensor:
    """[B, Q, K] bool, True where a query of the slice attends to a key. `causal`: to none after itself."""
    places_K = torch.arange(encoded_BFK.size(2), device=encoded_BFK.device)
    keys, own = encoded_BFK[:, :, None, :].unbind(1), encoded_BFK[:, :, queries, None].unbind(1)
    return are_allowed(own, keys, places_K[queries, None], places_K, causal)


def are_allowed(
    query: Sequence[Tensor], key: Sequence[Tensor], query_place: Tensor, key_place: Tensor, causal: bool
) -> Tensor:
    """bool, True where a query attends to a key: elementwise, from the F fields and the position of each."""
    allowed = (query[0] == key[0]) & _is_visible_level(query[1], key[1])
    if len(query) == 4:
        allowed = allowed & _is_annealed(query[2], query[3], query_place, key_place)
    return allowed & (key_place <= query_place) if causal else allowed


def annealing_key_and_threshold(seed: int, sample_index: int, place: int, count: int) -> np.ndarray | None:
    """Key and threshold for `annealed`, [2] int64: DiffuLLaMA's attention annealing (Gong et al. 2024).

    A share (place + 1) / count of the entries above the diagonal is unmasked, by the `place` of the sample or of its
    iteration among the `count` that annealing takes. None once all of them are.
    """
    if place + 1 >= count:
        return None
    return np.array([attention_key(seed, sample_index), _ALWAYS * (place + 1) // count], dtype=np.int64)


def fully_annealed() -> np.ndarray:
    """Key and threshold of a sample with full attention, for a batch in which other samples are annealed."""
    return np.array([0, _ALWAYS], dtype=np.int64)


def annealed(annealing_B2: Tensor, queries_Q: Tensor, num_keys: int) -> Tensor:
    """[B, Q, K] bool, True where a query attends to a key: the past and itself, and random later positions.

    A pure function of (seed, sample index, query, key); as the threshold rises, unmasked entries stay unmasked.
    """
    keys_K = torch.arange(num_keys, device=queries_Q.device)
    key_B, threshold_B = annealing_B2[:, 0, None, None], annealing_B2[:, 1, None, None]
    return _is_annealed(key_B, threshold_B, queries_Q[:, None], keys_K)


def block_causal_mask(own_BQ: Tensor, levels_BK: Tensor) -> Tensor:
    """[B, Q, K] bool: a query attends to keys of its own level and to clean (odd) keys of lower levels.

    The level of a position of block diffusion (block_diffusion.py sets it) is 2 * start of its block if it is noised,
    2 * start + 1 if it is clean, or 2 * position + 1 if the clean copy is causal.
    """
    return _is_visible_level(own_BQ[:, :, None], levels_BK[:, None, :])


def _is_visible_level(query: Tensor, key: Tensor) -> Tensor:
    return (key == query) | ((key % 2 == 1) & (key < query))


def _is_annealed(key: Tensor, threshold: Tensor, query_place: Tensor, key_place: Tensor) -> Tensor:
    numbers = key + ((query_place << 32) + key_place) * _INCREMENT
    return (_shifted_right(_mixed(numbers), 11) < threshold) | (key_place <= query_place)


def _mixed(numbers: Tensor) -> Tensor:
    """SplitMix64's output function; int64 arithmetic wraps."""
    numbers = (numbers ^ _shifted_right(numbers, 30)) * _FIRST
    numbers = (numbers ^ _shifted_right(numbers, 27)) * _SECOND
    return numbers ^ _shifted_right(numbers, 31)


def _shifted_right(numbers: Tensor, bits: int) -> Tensor:
    """Logical right shift: the upper bits are filled with zeros."""
    return (numbers >> bits) & ((1 << (64 - bits)) - 1)
