"""Scores of candidate positions (proposed token, its confidence, the entropy), and the random numbers of the draws.

`scorer` turns logits into `Scores`: temperature, top-k and top-p filters, guidance. The mask token is never predicted,
and filters leave entropies finite. Logits are computed a few positions at a time: at a vocabulary of 152k they are far
larger than everything else. `row_seed` and `position_uniforms` derive the random numbers from a seed, one generator per
sequence, so that a sequence's draws do not depend on the batch.
Shapes: N candidates, n those of a chunk, D hidden, V vocabulary, B sequences, L positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_a2d.diffusion.model_interface import Head, Reduce, logits_in_chunks
from megatron_a2d.diffusion.sampling_options import UNSHAPED, SamplingOptions


class Scores(NamedTuple):
    """The scores of each candidate, [N]."""

    tokens: Tensor  # int64
    # fp32, log-probability of that token; topk_margin: of its lead over the second. Of confidence and threshold before
    # temperature and filters.
    log_confidence: Tensor
    entropy: Tensor  # fp32, nats


def scorer(options: SamplingOptions, mask_token_id: int, uniforms_N: Tensor | None) -> Reduce:
    """The `reduce` of a forward pass. `uniforms_N` [N] fp64 determines the draws; None: take the most likely token.

    Under guidance the second half of the hidden states are those without the given text.
    """

    def reduce(hidden_ND: Tensor, head: Head) -> tuple[Tensor, ...]:
        num_candidates = len(hidden_ND) // (2 if options.cfg_scale else 1)
        unconditional = logits_in_chunks(hidden_ND[num_candidates:], head)
        found = []
        for chunk, logits_nV in logits_in_chunks(hidden_ND[:num_candidates], head):
            if options.cfg_scale:
                logits_nV = logits_nV + options.cfg_scale * (logits_nV - next(unconditional)[1])
            found.append(_score(logits_nV, options, mask_token_id, None if uniforms_N is None else uniforms_N[chunk]))
        return tuple(torch.cat(column) for column in zip(*found, strict=True))

    return reduce


def _score(logits_nV: Tensor, options: SamplingOptions, mask_token_id: int, uniforms_n: Tensor | None) -> Scores:
    logits_nV[:, mask_token_id] = -torch.inf
    whole_nV = logits_nV
    if options.temperature > 0 and options.temperature != 1:
        logits_nV = logits_nV / options.temperature
    logits_nV = _filter(logits_nV, options.top_k, options.top_p)
    is_shaped = logits_nV is not whole_nV
    # With z = logits - max: log-probabilities are z - log(sum exp z), and the entropy is log(sum) - sum(p z).
    best_n, likeliest_n = logits_nV.max(-1)
    z_nV = logits_nV.sub_(best_n[:, None])
    weights_nV = z_nV.exp()
    sum_n = weights_nV.sum(-1)
    if options.top_k or options.top_p < 1:
        z_nV = z_nV.masked_fill(weights_nV == 0, 0.0)  # impossible tokens add 0, not 0 * -inf
    else:
        z_nV[:, mask_token_id] = 0.0
    entropy_n = sum_n.log() - torch.linalg.vecdot(weights_nV, z_nV) / sum_n
    tokens_n = likeliest_n if uniforms_n is None else _draw(weights_nV, uniforms_n)
    if options.sampler in UNSHAPED and is_shaped:
        log_confidence_n = whole_nV.gather(-1, tokens_n[:, None])[:, 0] - whole_nV.logsumexp(-1)
    elif options.sampler == "topk_margin":
        first_n, second_n = (weights_nV.topk(2, dim=-1).values / sum_n[:, None]).unbind(-1)
        log_confidence_n = (first_n - second_n).clamp_min(torch.finfo(torch.float32).tiny).log()
    elif uniforms_n is None:
        log_confidence_n = -sum_n.log()
    else:
        log_confidence_n = (weights_nV.gather(-1, tokens_n[:, None])[:, 0] / sum_n).log()
    return Scores(tokens_n, log_confidence_n, entropy_n)


def _filter(logits_nV: Tensor, top_k: int, top_p: float) -> Tensor:
    """Set all but the most likely tokens to -inf: top-k, then top-p of the remaining ones."""
    if 0 < top_k < logits_nV.shape[-1]:
        values, indices = logits_nV.topk(top_k, dim=-1)
        logits_nV = torch.full_like(logits_nV, -torch.inf).scatter(-1, indices, values)
    if top_p < 1:
        values, indices = logits_nV.sort(dim=-1, descending=True)
        probabilities = values.softmax(-1)
        # A token is dropped once the likelier ones alone reach the mass top_p; the first is always kept.
        values = values.masked_fill(probabilities.cumsum(-1) - probabilities >= top_p, -torch.inf)
        logits_nV = torch.full_like(logits_nV, -torch.inf).scatter(-1, indices, values)
    return logits_nV


def _draw(weights_nV: Tensor, uniforms_n: Tensor) -> Tensor:
    """One token per position by inverting the cumulative distribution, in fp64 because of rare tokens."""
    cumulative_nV = weights_nV.double().cumsum(-1)
    total_n = cumulative_nV[:, -1]
    targets_n = torch.minimum(uniforms_n * total_n, torch.nextafter(total_n, torch.zeros_like(total_n)))
    return torch.searchsorted(cumulative_nV, targets_n[:, None], right=True)[:, 0]


def row_seed(seed: int, row: int) -> int:
    """A 32-bit seed for one sequence of a batch, hashed so that neighbouring seeds and indices are unrelated."""
    value = (seed * 0x9E3779B97F4A7C15 + row + 1) % 2**64
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # SplitMix64's finaliser
        value = (value ^ (value >> shift)) * factor % 2**64
    return value >> 32


def position_uniforms(seed: int | Sequence[int], batch: int, length: int) -> Tensor:
    """One uniform number per position, [B, L] fp64: each position is drawn once.

    `seed` is one seed per sequence, or one number from which `row_seed` derives them. Generated on the CPU.
    """
    seeds = [row_seed(seed, row) for row in range(batch)] if isinstance(seed, int) else list(seed)
    if len(seeds) != batch:
        raise ValueError(f"{len(seeds)} seeds for {batch} sequences; give one seed per sequence, or a single number")
    draws = [torch.rand(length, dtype=torch.float64, generator=torch.Generator().manual_seed(value)) for value in seeds]
    return torch.stack(draws)
