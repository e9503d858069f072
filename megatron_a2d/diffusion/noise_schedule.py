"""Noise schedules: the masking probability at time t, and the loss weight of a masked token.

A masked diffusion process masks each token independently with probability m(t) = 1 - alpha(t), which
rises from 0 at t = 0 to 1 at t = 1. The negative evidence lower bound (NELBO) in nats is

    integral over t of  m'(t) / m(t) * E[ sum over masked tokens of -log p(token | visible tokens) ]

(MDLM, Sahoo et al. 2024, equation 10), so a masked token at time t has the loss weight m'(t) / m(t).
The bound itself does not depend on the schedule; the variance of its estimate does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple


class Schedule(NamedTuple):
    """`mask_probability` and `weight` take a time in (0, 1]; `time` is the inverse of the first, on [0, 1]."""

    mask_probability: Callable[[float], float]
    weight: Callable[[float], float]
    time: Callable[[float], float]


def _cosine_mask_probability(t: float) -> float:
    return math.cos(math.pi / 2 * (1 - t))


def _cosine_time(m: float) -> float:
    return 1 - 2 / math.pi * math.acos(min(m, 1.0))


def _cosine_weight(t: float) -> float:
    return math.pi / 2 * math.tan(math.pi / 2 * (1 - t))


SCHEDULES: dict[str, Schedule] = {
    # m = t: the ratio of masked tokens is uniform (LLaDA, Nie et al. 2025; RND1).
    "linear": Schedule(mask_probability=lambda t: t, weight=lambda t: 1 / t, time=lambda m: m),
    # alpha = 1 - cos(pi/2 (1 - t)): more time at high ratios (MDLM, appendix on schedules).
    "cosine": Schedule(mask_probability=_cosine_mask_probability, weight=_cosine_weight, time=_cosine_time),
}
