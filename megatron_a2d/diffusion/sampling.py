"""Sampling: the entropy-ordered schedule of RND1 (Radical Numerics, 2025), pure, over a `logits_fn`.

All holes start masked. Before each of S steps the model predicts every masked position. After step n, of a
row's N holes the floor(N * (S - n) / S) whose predictions have the highest entropy stay masked; the others
take their tokens for good. Nothing is masked again.

What differs from the published code: the mask token is never predicted; top-k and top-p leave entropies
finite; rows of a batch may have different prompts and holes, and do not influence one another; forwards that
would decide nothing are skipped, and scores are computed on masked positions only.

Shapes: B batch, L sequence, V vocabulary, N masked positions (of all rows together).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# on_step(step, tokens_BL, decided_BL): step counts from 1, `decided` are the positions decided in it
OnStep = Callable[[int, Tensor, Tensor], None]


class Canvas(NamedTuple):
    """A batch to denoise, all [B, L]."""

    tokens: Tensor  # int64; masks in the holes, padding at the right
    editable: Tensor  # bool, True in the holes
    attention_mask: Tensor  # bool, False at the padding


def make_canvas(rows: Sequence[Sequence[int]], mask_token_id: int, pad_token_id: int = 0) -> Canvas:
    """Stack rows of tokens, padded at the right; every mask token in a row is a hole.

    The published package leaves one more token, padding, after the holes: to reproduce its output, append it.
    """
    shape = (len(rows), max(len(row) for row in rows))
    tokens_BL = torch.full(shape, pad_token_id, dtype=torch.long)
    attention_mask_BL = torch.zeros(shape, dtype=torch.bool)
    for index, row in enumerate(rows):
        tokens_BL[index, : len(row)] = torch.tensor(row, dtype=torch.long)
        attention_mask_BL[index, : len(row)] = True
    return Canvas(tokens_BL, attention_mask_BL & (tokens_BL == mask_token_id), attention_mask_BL)


@torch.no_grad()
def denoise(
    logits_fn: Callable[[Tensor], Tensor],
    canvas_BL: Tensor,
    editable_BL: Tensor,
    mask_token_id: int,
    num_steps: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    label_shift: bool = True,
    seed: int | Sequence[int] = 0,
    on_step: OnStep | None = None,
) -> Tensor:
    """Fill the holes of `canvas_BL`; returns int64 [B, L], equal to the canvas outside the holes.

    `logits_fn` maps tokens [B, L] to logits [B, L, V]; padding is its own business. Under `label_shift` its
    row i - 1 predicts position i, so position 0 cannot be a hole. Temperature 0 takes the likeliest token and
    orders by the entropy at temperature 1; otherwise both come from the tempered and filtered distribution.
    `top_k` 0 and `top_p` 1 filter nothing. A row's draws depend on its own seed only, not on the batch around
    it: give one seed a row, or one number from which `row_seed(seed, row)` makes them.

    Raises ValueError for arguments out of range and for a hole at position 0 under the label shift.
    """
    _check(canvas_BL, editable_BL, num_steps, temperature, top_k, top_p, label_shift)
    masked_BL = editable_BL.clone()
    tokens_BL = canvas_BL.masked_fill(masked_BL, mask_token_id)
    uniforms_BL = _uniforms(seed, tokens_BL) if temperature > 0 else None
    num_holes_B = masked_BL.sum(1)
    for step in range(1, num_steps + 1):
        # In fp32, as published: where the product is whole, its rounding decides what floor() gives.
        num_left_B = (num_holes_B.float() * ((num_steps - step) / num_steps)).long()
        due_B = masked_BL.sum(1) > num_left_B
        if not due_B.any():
            continue
        considered_BL = masked_BL & due_B[:, None]
        rows_N, positions_N = considered_BL.nonzero(as_tuple=True)
        logits_NV = logits_fn(tokens_BL)[rows_N, positions_N - int(label_shift)].float()
        logprobs_NV = _log_probabilities(logits_NV, mask_token_id, temperature, top_k, top_p)
        # Lowest entropy first, the leftmost of equals; positions that are not considered come last.
        entropies_BL = torch.full(tokens_BL.shape, torch.inf, device=tokens_BL.device)
        entropies_BL[considered_BL] = _entropies(logprobs_NV)
        ranks_BL = entropies_BL.argsort(dim=1, stable=True).argsort(dim=1)
        decided_BL = considered_BL & (ranks_BL < (masked_BL.sum(1) - num_left_B)[:, None])
        chosen_NV = logprobs_NV[decided_BL[considered_BL]]
        if uniforms_BL is None:
            tokens_BL[decided_BL] = chosen_NV.argmax(-1)
        else:
            tokens_BL[decided_BL] = _draw(chosen_NV, uniforms_BL[decided_BL])
        masked_BL &= ~decided_BL
        if on_step is not None:
            on_step(step, tokens_BL.clone(), decided_BL)
    return tokens_BL


def row_seed(seed: int, row: int) -> int:
    """A 32-bit seed for one row of a batch, mixed so that neighbouring seeds and rows share nothing."""
    value = (seed * 0x9E3779B97F4A7C15 + row + 1) % 2**64
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # SplitMix64's finaliser
        value = (value ^ (value >> shift)) * factor % 2**64
    return value >> 32


def _log_probabilities(logits_NV: Tensor, mask_token_id: int, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Log-probabilities after suppressing the mask token, temperature, top-k, then top-p."""
    logits_NV[:, mask_token_id] = -torch.inf
    if temperature > 0:
        logits_NV = logits_NV / temperature
    if 0 < top_k < logits_NV.shape[-1]:
        values, indices = logits_NV.topk(top_k, dim=-1)
        logits_NV = torch.full_like(logits_NV, -torch.inf).scatter(-1, indices, values)
    if top_p < 1:
        values, indices = logits_NV.sort(dim=-1, descending=True)
        probabilities = values.softmax(-1)
        # A token goes when the likelier ones alone have reached the mass top_p; the first always stays.
        values = values.masked_fill(probabilities.cumsum(-1) - probabilities >= top_p, -torch.inf)
        logits_NV = torch.full_like(logits_NV, -torch.inf).scatter(-1, indices, values)
    return logits_NV.log_softmax(-1)


def _entropies(logprobs_NV: Tensor) -> Tensor:
    """Entropies in nats, [N]; impossible tokens (log-probability -inf) add 0."""
    return -(logprobs_NV.exp() * logprobs_NV.nan_to_num(neginf=0.0)).sum(-1)


def _draw(logprobs_NV: Tensor, uniforms_N: Tensor) -> Tensor:
    """One token a row by inverting the cumulative distribution, in fp64 for the rare tokens' sake."""
    cumulative_NV = logprobs_NV.double().exp().cumsum(-1)
    total_N = cumulative_NV[:, -1]
    targets_N = torch.minimum(uniforms_N * total_N, torch.nextafter(total_N, torch.zeros_like(total_N)))
    return torch.searchsorted(cumulative_NV, targets_N[:, None], right=True)[:, 0]


def _uniforms(seed: int | Sequence[int], tokens_BL: Tensor) -> Tensor:
    """One uniform number for each position, [B, L] fp64; each position is drawn once, so one is enough.

    They come from a generator of each row on the CPU: the same on every device and for every batch.
    """
    batch, length = tokens_BL.shape
    seeds = [row_seed(seed, row) for row in range(batch)] if isinstance(seed, int) else list(seed)
    if len(seeds) != batch:
        raise ValueError(f"{len(seeds)} seeds for {batch} rows; give one seed a row, or a single number")
    draws = [torch.rand(length, dtype=torch.float64, generator=torch.Generator().manual_seed(value)) for value in seeds]
    return torch.stack(draws).to(tokens_BL.device)


def _check(
    canvas_BL: Tensor,
    editable_BL: Tensor,
    num_steps: int,
    temperature: float,
    top_k: int,
    top_p: float,
    shift: bool,
) -> None:
    if canvas_BL.shape != editable_BL.shape or canvas_BL.dim() != 2 or editable_BL.dtype != torch.bool:
        raise ValueError("canvas and editable must both be [batch, sequence], and editable boolean")
    if shift and editable_BL[:, 0].any():
        raise ValueError("position 0 is a hole, and under the label shift nothing predicts it; put a token there")
    if num_steps < 1 or temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"need num_steps >= 1, temperature >= 0, top_k >= 0 and 0 < top_p <= 1, "
            f"not {num_steps}, {temperature}, {top_k}, {top_p}"
        )
