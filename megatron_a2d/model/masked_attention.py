"""Attention under an encoded mask (diffusion/attention_masks.py): in tiles, compiled, or under a dense mask.

On a CPU long sequences are computed in tiles (tiled_attention.py). On a GPU PyTorch's FlexAttention compiles a kernel
that skips masked blocks and reads the encoded mask in the others; no test has run it on a GPU. Short sequences, and
machines that have neither, get a dense mask. Shapes: s this rank's queries, K all keys, b batch, n heads, d head size.
"""

from __future__ import annotations

import functools
import importlib.util
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_a2d.diffusion.attention_masks import allowed_entries, are_allowed
from megatron_a2d.model.attention_tiles import Tiles, tiles_of
from megatron_a2d.model.tiled_attention import TiledAttention, has_kernel

# With fewer keys, or where tiles compute more of all entries, a dense mask is faster (bench/block_attention.py).
SHORTEST = 512
_LARGEST_SHARE = 0.75
_NUM_KEPT = 4  # micro-batches between whose layers a pipeline stage alternates


class Mask(NamedTuple):
    """The mask of a micro-batch, and the queries that this rank has."""

    encoded: Tensor  # [B, F, K]; B = 1 if all samples have the same mask
    queries: slice
    causal: bool  # no query attends to a key after itself


def sparse_attention(query: Tensor, key: Tensor, value: Tensor, mask: Mask, scale: float | None) -> Tensor | None:
    """Attention [s, b, n, d] that skips masked entries; None where a dense mask is faster or all there is."""
    if key.size(0) < SHORTEST:
        return None
    if query.is_cpu and has_kernel() and (groups := _once_per_mask("tiles", mask, lambda: _tiles_of_samples(mask))):
        return _tiled(query, key, value, groups, scale)
    if query.is_cuda and has_triton():
        # Kept for the backward pass, a view of the layer's QKV tensor would keep queries and keys with it.
        return flex_attention(query, key, value.contiguous(), mask, scale, torch.compile)
    return None


def has_triton() -> bool:
    """Whether torch can compile FlexAttention's kernels."""
    return importlib.util.find_spec("triton") is not None


def dense_mask(mask: Mask) -> Tensor:
    """[B, 1, s, K] bool, True where attention is allowed."""
    return _once_per_mask("dense", mask, lambda: allowed_entries(*mask)[:, None])


@functools.lru_cache(maxsize=4)
def no_mask(num_keys: int, device: torch.device) -> Tensor:
    """Encoded mask [1, 2, K] that masks nothing, for causal attention under context parallelism."""
    return torch.zeros(1, 2, num_keys, dtype=torch.int64, device=device)


SampleTiles = list[tuple[int, list[Tiles]]]  # numbers of consecutive samples with the same mask, and its calls


def _tiled(query: Tensor, key: Tensor, value: Tensor, groups: SampleTiles, scale: float | None) -> Tensor:
    if len(groups) == 1:
        return TiledAttention.apply(query, key, value, groups[0][1], scale)
    sizes = [size for size, _ in groups]
    parts = zip(*(tensor.split(sizes, dim=1) for tensor in (query, key, value)), strict=True)
    outputs = [TiledAttention.apply(*part, calls, scale) for part, (_, calls) in zip(parts, groups, strict=True)]
    return torch.cat(outputs, dim=1)


def _tiles_of_samples(mask: Mask) -> SampleTiles:
    """Empty if the mask is too dense for tiles."""
    encoded = mask.encoded
    changes = (encoded[1:] != encoded[:-1]).flatten(1).any(1).nonzero()[:, 0] + 1
    place = mask.queries.start, mask.queries.stop, mask.causal
    groups = [
        (len(group), _tiles_of_fields(group[0].numpy().tobytes(), group.size(1), group.dtype, *place))
        for group in encoded.tensor_split(changes)
    ]
    computed = sum(size * call.num_entries for size, calls in groups for call in calls)
    num_queries = mask.queries.stop - mask.queries.start
    return groups if computed <= _LARGEST_SHARE * len(encoded) * num_queries * encoded.size(2) else []


@functools.lru_cache(maxsize=_NUM_KEPT)
def _tiles_of_fields(
    fields: bytes, num_fields: int, dtype: torch.dtype, first: int, end: int, causal: bool
) -> list[Tiles]:
    """The tiles of a mask [F, K], known by its content: without document masking it is the same in every step."""
    encoded_FK = torch.frombuffer(bytearray(fields), dtype=dtype).view(num_fields, -1)
    return tiles_of(encoded_FK, slice(first, end), causal)


def flex_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask, scale: float | None, compiled: Callable[[Any], Any]
) -> Tensor:
    """FlexAttention (Dong et al. 2024), [s, b, n, d]; `compiled` compiles a function."""
    from torch.nn.attention.flex_attention import create_block_mask
    from torch.nn.attention.flex_attention import flex_attention as kernel

    encoded_BFK, queries, causal = mask
    num_samples, num_fields, num_keys = encoded_BFK.shape

    def is_allowed(sample: Tensor, head: Tensor, query_index: Tensor, key_index: Tensor) -> Tensor:
        sample, place = sample % num_samples, query_index + queries.start
        own, other = ([encoded_BFK[sample, field, at] for field in range(num_fields)] for at in (place, key_index))
        return are_allowed(own, other, place, key_index, causal)

    def block_mask() -> Any:
        sizes = (num_samples, None, queries.stop - queries.start, num_keys)
        return compiled(create_block_mask)(is_allowed, *sizes, device=query.device)

    query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
    block = _once_per_mask("blocks", mask, block_mask)
    output = compiled(kernel)(query, key, value, block_mask=block, scale=scale, enable_gqa=True)
    return output.permute(2, 0, 1, 3)


_made: OrderedDict[tuple[Any, ...], tuple[Tensor, Any]] = OrderedDict()  # the last few masks', newest last


def _once_per_mask(what: str, mask: Mask, make: Callable[[], Any]) -> Any:
    """The result of `make` for a micro-batch's mask, cached for all layers.

    A mask is identified by its memory and the number of changes to it. It is kept, so that no other reuses its memory.
    """
    tensor, queries, causal = mask
    if tensor.is_meta or tensor.is_inference():  # has no memory, or no count of changes, to identify it
        return make()
    name = (what, tensor.data_ptr(), tensor._version, tensor.shape, queries.start, queries.stop, causal)
    if name not in _made:
        _made[name] = tensor, make()
        while len(_made) > _NUM_KEPT:
            _made.popitem(last=False)
    return _made[name][1]
