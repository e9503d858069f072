"""The conditional log-likelihood of a continuation given its context, estimated by masking only the continuation.

For a continuation y of n tokens after a context x (LLaDA, Nie et al. 2025, equation 6; Ou et al. 2024)

    log p(y | x) >= mean over k in 1..n, and over subsets M of size k, of
                    n / k * sum over i in M of log p(y_i | x, y outside M)

The estimate is exact (all 2^n - 1 subsets) if that takes no more forward passes than requested: for a single token,
the answer of most multiple-choice tasks, it is one. Otherwise it averages independent replicates, each of several
draws: within a replicate the counts k are stratified over 1..n, and the subsets are consecutive arcs of one random
order of the tokens laid in a circle, so that together they cover all tokens evenly. Every arc of a random order is a
uniformly random subset: each draw is unbiased, and the spread of the replicates' means gives the standard error.

The noise depends on the seed and the length alone: the choices of a question share it (common random numbers), and no
batching or sorting can change a result.
"""

from __future__ import annotations

import math
from itertools import product
from typing import NamedTuple

import numpy as np

from megatron_a2d.diffusion.loss import Estimate
from megatron_a2d.diffusion.rng import Stream, uniforms


class MaskSamples(NamedTuple):
    """The masks of a continuation and their weights. J forward passes, n tokens."""

    masks: np.ndarray  # [J, n] bool
    weights: np.ndarray  # [J] float64; the estimate is the sum of weight * (sum of losses), per replicate
    replicates: np.ndarray  # [J] int64; the estimate is the mean over replicates
    num_replicates: int


def likelihood_samples(num_tokens: int, mc_num: int, seed: int = 0) -> MaskSamples:
    """At most `mc_num` forward passes for a continuation of `num_tokens`; exact if they suffice."""
    if num_tokens < 1 or mc_num < 1:
        raise ValueError(f"need at least one token and one draw, not {num_tokens} and {mc_num}")
    if num_tokens < 30 and 2**num_tokens - 1 <= mc_num:
        masks = np.array(list(product([False, True], repeat=num_tokens)))[1:]
        sizes = masks.sum(1)
        weights = np.array([1.0 / (k * math.comb(num_tokens, k)) for k in sizes])
        return MaskSamples(masks, weights, np.zeros(len(masks), dtype=np.int64), 1)
    # About the square root of the draws are replicates: enough replicates for a standard error, enough draws to
    # stratify.
    num_replicates = max(1, round(math.sqrt(mc_num)))
    per_replicate = mc_num // num_replicates
    masks_J: list[np.ndarray] = []
    weights_J: list[float] = []
    for replicate in range(num_replicates):
        numbers = uniforms(seed, Stream.CONTINUATION, replicate, num_tokens + 1)
        order, start = numbers[1:].argsort(), 0
        for draw in range(per_replicate):
            size = 1 + int(num_tokens * ((draw + numbers[0]) / per_replicate))
            mask = np.zeros(num_tokens, dtype=bool)
            mask[order[(start + np.arange(size)) % num_tokens]] = True
            start += size
            masks_J.append(mask)
            weights_J.append(num_tokens / size / per_replicate)
    replicates_J = np.arange(num_replicates).repeat(per_replicate)
    return MaskSamples(np.array(masks_J), np.array(weights_J), replicates_J, num_replicates)


def pseudo_likelihood_samples(num_tokens: int) -> MaskSamples:
    """Pseudo-log-likelihood, one token masked at a time: the sum of log p(y_i | all other tokens).

    Neither a likelihood nor a bound on one.
    """
    return MaskSamples(np.eye(num_tokens, dtype=bool), np.ones(num_tokens), np.zeros(num_tokens, dtype=np.int64), 1)


def log_likelihood(draws: MaskSamples, losses_J: np.ndarray) -> Estimate:
    """The estimate in nats, at most 0, from each draw's sum of cross-entropies over its masked tokens [J].

    The standard error is 0 if the estimate is exact.
    """
    totals = np.zeros(draws.num_replicates)
    np.add.at(totals, draws.replicates, draws.weights * losses_J)
    if draws.num_replicates == 1:
        num_draws, num_tokens = draws.masks.shape
        is_pseudo = num_draws == num_tokens and bool((draws.weights == 1).all())
        exact = num_draws == 2**num_tokens - 1 or is_pseudo
        return Estimate(-float(totals[0]), 0.0 if exact else float("nan"))
    return Estimate(-float(totals.mean()), float(totals.std(ddof=1) / math.sqrt(draws.num_replicates)))
