"""Attention in tiles on a CPU: masked entries are not computed, so time and memory follow the open ones.

PyTorch's flash kernel for CPUs computes each call of attention_tiles.py. It returns the logarithms of the softmax
denominators, by which a query's parts over disjoint keys are joined exactly. Its backward kernel, given the joint
output and logarithms, returns each part of the true gradient (FlashAttention-2, Dao 2023). All sums have a fixed order.
Shapes: s queries, K keys, b batch, n heads, d head size; T tiles of a call, q and k a tile's queries and keys.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_a2d.model.attention_tiles import Range, Ranges, Tiles

# Added to masked scores. Finite, unlike -inf: a query without open entries in a call has no weight there, and no NaN.
_MASKED = -1e30


class TiledAttention(torch.autograd.Function):
    """Attention [s, b, n, d] of query [s, b, n, d] to key and value [K, b, n or fewer, d] in the given calls."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, calls: list[Tiles], scale: float | None
    ) -> Tensor:
        exact = torch.promote_types(query.dtype, torch.float32)
        output = query.new_zeros(query.shape, dtype=exact)
        # Of every query, the logarithm of its softmax denominator over the keys of the calls so far.
        logarithm = query.new_full(query.shape[:-1], -torch.inf, dtype=exact)
        for call in calls:
            part, part_logarithm = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                _stack(query, call.queries), _stack(key, call.keys), _stack(value, call.keys),
                attn_mask=_added(call.mask, query), scale=scale,
            )  # fmt: skip
            part, part_logarithm = (_unstack(tensor, len(call.queries)) for tensor in (part, part_logarithm))
            for (first, end), place in _places(call.queries):
                joint = torch.logaddexp(logarithm[first:end], part_logarithm[place])
                weight = (part_logarithm[place] - joint).exp_()
                output[first:end].lerp_(part[place].to(exact), weight[..., None])
                logarithm[first:end] = joint
        output = output.to(query.dtype)
        ctx.save_for_backward(query, key, value, output, logarithm)
        ctx.calls, ctx.scale = calls, scale
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, output, logarithm = ctx.saved_tensors
        totals = [torch.zeros_like(tensor, dtype=logarithm.dtype) for tensor in (query, key, value)]
        for call in ctx.calls:
            parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                _stack(gradient, call.queries), _stack(query, call.queries), _stack(key, call.keys),
                _stack(value, call.keys), _stack(output, call.queries), _stack(logarithm, call.queries), 0.0, False,
                attn_mask=_added(call.mask, query), scale=ctx.scale,
            )  # fmt: skip
            for total, part, tiles in zip(totals, parts, (call.queries, call.keys, call.keys), strict=True):
                part = _unstack(part, len(tiles))
                for (first, end), place in _places(tiles):
                    total[first:end] += part[place]
        return *(total.to(query.dtype) for total in totals), None, None


@functools.cache
def has_kernel() -> bool:
    """Whether this torch has the kernel, and heads of keys that several heads of queries share (tested)."""
    query, key = torch.ones(1, 1, 2, 1), torch.arange(2.0).view(2, 1, 1, 1)
    calls = [Tiles((((0, 1),),), (((0, 2),),), None)]
    try:
        output = TiledAttention.apply(query, key, key, calls, None)
    except (AttributeError, RuntimeError, TypeError):
        return False
    return torch.allclose(output, torch.tensor(1.0).sigmoid())


def _stack(tensor: Tensor, tiles: tuple[Ranges, ...]) -> Tensor:
    """[s, b, n, ...] -> [T b, n, q, ...], as the kernel has it."""
    parts = [tensor[first:end] for ranges in tiles for first, end in ranges]
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    return whole.unflatten(0, (len(tiles), -1)).movedim(1, 3).flatten(0, 1)


def _unstack(tensor: Tensor, num_tiles: int) -> Tensor:
    """[T b, n, q, ...] -> [T q, b, n, ...]."""
    return tensor.unflatten(0, (num_tiles, -1)).movedim(3, 1).flatten(0, 1)


def _places(tiles: tuple[Ranges, ...]) -> Iterator[tuple[Range, slice]]:
    """Every range of positions, and where it lies in what `_unstack` returns."""
    place = 0
    for ranges in tiles:
        for first, end in ranges:
            yield (first, end), slice(place, place + end - first)
            place += end - first


def _added(mask: Tensor | None, query: Tensor) -> Tensor | None:
    """What is added to the scores: [T b, 1, q, k], 0 where attention is allowed."""
    if mask is None:
        return None
    added = torch.zeros(mask.shape, dtype=query.dtype).masked_fill_(~mask, _MASKED)
    return added[:, None, None].expand(-1, query.size(1), -1, -1, -1).flatten(0, 1)
