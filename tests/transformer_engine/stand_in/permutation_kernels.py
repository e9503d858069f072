"""Transformer Engine's triton kernels that sort tokens by expert, under the names of its module triton/permutation.py.

A token that goes to several experts is copied, rows sorted by expert and then by token; back, its copies are summed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class _Routes(NamedTuple):
    """One element a copy of a token."""

    tokens: Tensor
    experts: Tensor
    rows: Tensor


def make_row_id_map(routing_map: Tensor, num_tokens: int, num_experts: int) -> Tensor:
    """[num_tokens, 2 * num_experts + 1]: a token's rows, from num_experts on the experts of these, and last their number."""
    experts, tokens = routing_map.bool().T.nonzero(as_tuple=True)
    result = torch.full((num_tokens, 2 * num_experts + 1), -1, dtype=torch.int32)
    result[:, -1] = 0
    for row, (expert, token) in enumerate(zip(experts.tolist(), tokens.tolist(), strict=True)):
        number = int(result[token, -1])
        result[token, number], result[token, num_experts + number] = row, expert
        result[token, -1] += 1
    return result


def _routes(row_id_map: Tensor, num_experts: int, pad_offsets: Tensor | None) -> _Routes:
    tokens, numbers = (torch.arange(num_experts) < row_id_map[:, -1:]).nonzero(as_tuple=True)
    experts = row_id_map[tokens, num_experts + numbers].long()
    rows = row_id_map[tokens, numbers].long()
    return _Routes(tokens, experts, rows if pad_offsets is None else rows + pad_offsets[experts])


def permute_with_mask_map(
    inp: Tensor, row_id_map: Tensor, probs: Tensor | None, scale: Tensor | None, pad_offsets: Tensor | None,
    num_tokens: int, num_experts: int, num_out_tokens: int, hidden_size: int, scale_hidden_dim: int,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Rows of the tokens' copies, of their scales and of their probabilities."""
    routes = _routes(row_id_map, num_experts, pad_offsets)

    def rows_of(values: Tensor) -> Tensor:
        return values.new_zeros(num_out_tokens, *values.shape[1:]).index_copy(0, routes.rows, values)

    permuted_scale = None if scale is None else rows_of(scale[routes.tokens])
    if probs is None:
        return rows_of(inp[routes.tokens]), permuted_scale, None
    own = probs[routes.tokens, routes.experts] if probs.dim() == 2 else probs[routes.tokens]
    return rows_of(inp[routes.tokens]), permuted_scale, rows_of(own)


def unpermute_with_mask_map(
    inp: Tensor, row_id_map: Tensor, merging_probs: Tensor | None, permuted_probs: Tensor | None,
    pad_offsets: Tensor | None, num_tokens: int, num_experts: int, hidden_size: int,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The sum of each token's rows, weighted if there are probabilities; [num_tokens, num_experts] of permuted_probs."""
    routes = _routes(row_id_map, num_experts, pad_offsets)
    rows = inp[routes.rows].float()
    if merging_probs is not None:
        rows = rows * merging_probs[routes.tokens, routes.experts].float()[:, None]
    output = torch.zeros(num_tokens, hidden_size).index_add(0, routes.tokens, rows).to(inp.dtype)
    return output, None if permuted_probs is None else _by_expert(permuted_probs[routes.rows], routes, row_id_map)


def _by_expert(values: Tensor, routes: _Routes, row_id_map: Tensor) -> Tensor:
    num_tokens, num_experts = row_id_map.size(0), row_id_map.size(1) // 2
    return values.new_zeros(num_tokens, num_experts).index_put((routes.tokens, routes.experts), values)


def unpermute_with_mask_map_bwd_with_merging_probs(
    fwd_output_grad: Tensor, row_id_map: Tensor, fwd_input: Tensor, merging_probs: Tensor, pad_offsets: Tensor | None,
    num_tokens: int, num_experts: int, num_out_tokens: int, hidden_size: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of the rows and of the weights that they were summed with."""
    routes = _routes(row_id_map, num_experts, pad_offsets)
    gradients = fwd_output_grad[routes.tokens].float()
    weighted = (gradients * merging_probs[routes.tokens, routes.experts].float()[:, None]).to(fwd_output_grad.dtype)
    rows = fwd_output_grad.new_zeros(num_out_tokens, hidden_size).index_copy(0, routes.rows, weighted)
    of_weights = (gradients * fwd_input[routes.rows].float()).sum(-1).to(merging_probs.dtype)
    return rows, _by_expert(of_weights, routes, row_id_map)


def make_chunk_sort_map(split_sizes: Tensor, sorted_indices: Tensor, num_tokens: int, num_splits: int) -> Tensor:
    """Where each row goes when chunks of rows are put into the order of sorted_indices."""
    chunks = torch.arange(num_tokens).split(split_sizes.tolist())
    order = torch.cat([chunks[index] for index in sorted_indices.tolist()])
    result = torch.empty(num_tokens, dtype=torch.int32)
    result[order] = torch.arange(num_tokens, dtype=torch.int32)
    return result


def sort_chunks_by_map(
    inp: Tensor, row_id_map: Tensor, probs: Tensor | None, num_tokens: int, hidden_size: int, is_forward: bool
) -> tuple[Tensor, Tensor | None]:
    places = row_id_map.long()
    order = places.argsort() if is_forward else places
    return inp[order], None if probs is None else probs[order]
