"""Loss weights of masked tokens, as a pure function of the sample.

    mdlm     m'(t) / m(t)                       the likelihood bound (MDLM, Sahoo et al. 2024, equation 10)
    uniform  1 / E[m]                           the same for every masked token
    cart     context(i) / E[m (1 - m)]          larger for tokens with more visible context (Dream, Ye et al. 2025)
    context(i) = 1/2 * sum over visible tokens j != i of p (1 - p)^(|i - j| - 1)

E is the mean over times. The constants make the expected weight of every maskable token 1 (cart: of those that are not
near an end). So the weighted sum over the number of maskable tokens is in nats/token for all three, and gradient
clipping at a given norm means the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np

from megatron_a2d.diffusion.noise_schedule import SCHEDULES
from megatron_a2d.diffusion.rng import Noise

# Neighbours that contribute less are omitted from `context`: far below the resolution of a float32 weight.
_SMALLEST_CONTRIBUTION = 1e-12


def token_weights(
    noise: Noise, bound_weight: float, masked_L: np.ndarray, documents_L: np.ndarray | None = None
) -> np.ndarray:
    """The weight of each masked token, 0 elsewhere; [L] float32. `bound_weight`: the weight under mdlm."""
    if noise.loss_weighting == "mdlm":
        return masked_L * np.float32(bound_weight)
    if noise.loss_weighting == "uniform":
        return masked_L * np.float32(1 / _mean_over_times(noise, _masked))
    weights_L = context(~masked_L, noise.cart_p, documents_L) / _mean_over_times(noise, _masked_and_visible)
    return (masked_L * weights_L).astype(np.float32)


def context(visible_L: np.ndarray, p: float, documents_L: np.ndarray | None = None) -> np.ndarray:
    """The visible share of each token's neighbourhood, 0 to 1: [L] float64. Other documents do not count."""
    length = len(visible_L)
    if documents_L is not None:
        borders = np.flatnonzero(documents_L[1:] != documents_L[:-1]) + 1
        return np.concatenate([context(document, p) for document in np.split(visible_L, borders)])
    reach = 1 if p == 1 else math.ceil(math.log(_SMALLEST_CONTRIBUTION) / math.log(1 - p))
    one_side = 0.5 * p * (1 - p) ** np.arange(min(reach, max(length - 1, 1)))
    kernel = np.concatenate([one_side[::-1], [0.0], one_side])
    return np.convolve(visible_L.astype(np.float64), kernel)[len(one_side) : len(one_side) + length]


def _masked(probability: float) -> float:
    return probability


def _masked_and_visible(probability: float) -> float:
    """The probability that one token is masked and another one is not."""
    return probability * (1 - probability)


def _mean_over_times(noise: Noise, function: Callable[[float], float]) -> float:
    return _quadrature(noise.schedule, noise.min_timestep, function)


@lru_cache(maxsize=64)
def _quadrature(schedule: str, min_timestep: float, function: Callable[[float], float]) -> float:
    """The mean of function(m(t)) over t in [min_timestep, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(64)
    times = min_timestep + (1 - min_timestep) * (nodes + 1) / 2
    values = [function(SCHEDULES[schedule].mask_probability(t)) for t in times]
    return float(np.dot(weights, values) / 2)
