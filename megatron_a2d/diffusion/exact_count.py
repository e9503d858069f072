"""Masks of an exact number of tokens, in the place of independent ones.

Independent masks at time t hide a binomial number of a sample's n maskable tokens. Here the number is k = ceil(m(t) n),
and which k tokens are hidden is drawn. Each masked token weighs 1 / (k P(k)), where P(k) is how likely the times
make k. So every k counts the mean of its tokens' cross-entropy once, and the sum over k is the likelihood bound of the
order-agnostic model (LLaDA, Nie et al. 2025, equation 14), without the spread of the binomial. Times begin at min_time:
counts of m(min_time) n and below are never drawn, and the sum goes without them.
"""

from __future__ import annotations

import math

import numpy as np

from megatron_a2d.diffusion.noise import Noise

_ROUNDING = 1e-9  # of a share of times


def hide_exactly(noise: Noise, time: float, sample_index: int, maskable_L: np.ndarray) -> tuple[np.ndarray, float]:
    """(masked [L] bool, the weight of a masked token) at a time; nothing is masked where nothing can be."""
    total = int(maskable_L.sum())
    masked_L = np.zeros(len(maskable_L), dtype=bool)
    if total == 0:
        return masked_L, 0.0
    count = min(total, max(1, math.ceil(noise.functions.mask_probability(time) * total)))
    likelihood = _likelihood(noise, count, total)
    if likelihood < _ROUNDING and count < total:  # the time lies on the border of a span that no time reaches
        count += 1
        likelihood = _likelihood(noise, count, total)
    order = np.where(maskable_L, noise.uniforms(sample_index, len(maskable_L)), 2.0)
    masked_L[np.argpartition(order, count - 1)[:count]] = True
    return masked_L, 1 / (count * likelihood)


def _likelihood(noise: Noise, count: int, total: int) -> float:
    """The share of times that hide `count` of `total` tokens."""
    first, last = (max(noise.min_time, noise.functions.time(part / total)) for part in (count - 1, count))
    return (last - first) / (1 - noise.min_time)
