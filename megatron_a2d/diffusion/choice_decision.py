"""Finds the choice of a question with the highest log-likelihood: draws to compare choices, and when to stop drawing.

With S(M) the cross-entropy of a continuation's masked tokens M, the bound of conditional_likelihood.py is

    log p(y | x) >= - sum over k in 1..n of 1 / k * mean over subsets M of size k of S(M)

Most of it is known from few passes: one with all n tokens masked gives each token's loss where it sees the context
alone, and at most 8 that mask every token once, a few at a time, its loss where it sees nearly everything. A token's
loss at k masked tokens is interpolated between them, linearly in k (`Control`). Random masks then estimate only what
that leaves: they are unbiased whatever the interpolation is worth (a control variate of coefficient 1). Masks depend on
the seed and the length alone: the choices of a question share them, and differences vary less than log-likelihoods do.

A choice draws until a sequential test is certain that it is not the best (`contenders`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import numpy as np

from megatron_a2d.diffusion.rng import INVERSE_GOLDEN_RATIO, Stream, uniforms

CONTROL_MASKS = 8  # at most, besides the full one


class WeightedMasks(NamedTuple):
    """Masks of a continuation and their weights. J masks, n tokens."""

    masks: np.ndarray  # [J, n] bool
    weights: np.ndarray  # [J] float64


@lru_cache(maxsize=1024)
def draws(num_tokens: int, num_draws: int, seed: int = 0) -> WeightedMasks:
    """The first `num_draws` random masks. More draws begin with the fewer. Needs 3 tokens. Cached: do not modify.

    With R(M) what a control leaves of S(M), weight * R(M) has the expectation of the bound's sum for R. R vanishes for
    the full mask, and for single tokens if each has a pass of its own: these sizes are not drawn. Masks of few tokens
    have large weights, and sizes are drawn accordingly, by a low-discrepancy sequence: those of any first draws are
    evenly spread.
    """
    single = num_tokens <= CONTROL_MASKS
    sizes = np.arange(1, num_tokens)
    probabilities = np.sqrt((num_tokens - sizes) * (sizes - 1.0 if single else 1.0) / sizes)
    probabilities /= probabilities.sum()
    offset = uniforms(seed, Stream.CHOICE, 0, 1)[0]
    masks = np.zeros((num_draws, num_tokens), dtype=bool)
    weights = np.zeros(num_draws)
    for draw in range(num_draws):
        fraction = (offset + draw * INVERSE_GOLDEN_RATIO) % 1
        size = min(1 + int((fraction >= probabilities.cumsum()).sum()), num_tokens - 1)
        order = uniforms(seed, Stream.CHOICE, 1 + draw, num_tokens).argsort()
        masks[draw, order[:size]] = True
        weights[draw] = 1 / (size * probabilities[size - 1])
    return WeightedMasks(masks, weights)


@lru_cache(maxsize=64)
def all_masks(num_tokens: int) -> WeightedMasks:
    """All 2^n - 1 masks: the weighted sum of S(M) is the bound. Cached: do not modify."""
    masks = np.array(list(product([False, True], repeat=num_tokens)))[1:]
    return WeightedMasks(masks, np.array([1 / (k * math.comb(num_tokens, int(k))) for k in masks.sum(1)]))


@lru_cache(maxsize=1024)
def control_masks(num_tokens: int, seed: int = 0) -> np.ndarray:
    """The full mask, and at most CONTROL_MASKS that mask every token once, [1 + P, n] bool. Cached: do not modify."""
    order = uniforms(seed, Stream.CHOICE, 0, 1 + num_tokens)[1:].argsort()
    size = math.ceil(num_tokens / CONTROL_MASKS)
    parts = [np.isin(np.arange(num_tokens), order[start : start + size]) for start in range(0, num_tokens, size)]
    return np.array([np.ones(num_tokens, dtype=bool), *parts])


class Control(NamedTuple):
    """Losses of each token, in nats, under the full mask and with few others masked: what is interpolated between."""

    full: np.ndarray  # [n] float64
    few: np.ndarray  # [n] float64

    def _share(self, size: np.ndarray | float) -> np.ndarray:
        """How far `size` masked tokens are on the way from few to all of them."""
        n = len(self.full)
        few = math.ceil(n / CONTROL_MASKS)
        return np.asarray((size - few) / (n - few))

    def losses(self, masks: np.ndarray) -> np.ndarray:
        """The interpolated S(M) of masks [J, n], [J]."""
        return masks @ self.few + self._share(masks.sum(1)) * (masks @ (self.full - self.few))

    @property
    def total(self) -> float:
        """The bound's sum for the interpolated losses: each token's mean over all sizes."""
        return float((self.few + self._share((len(self.full) + 1) / 2) * (self.full - self.few)).sum())


def looks(mc_num: int) -> list[int]:
    """Numbers of draws after which the test is made, each about 1.4 times the last; with control masks, `mc_num`."""
    last, numbers = max(mc_num - 1 - CONTROL_MASKS, 1), [4.0]
    while numbers[-1] * math.sqrt(2) < last:
        numbers.append(numbers[-1] * math.sqrt(2))
    return sorted({min(round(number), last) for number in numbers} | {last})


class ChoiceEstimate(NamedTuple):
    """What is known of a choice's log-likelihood, in nats."""

    values: np.ndarray  # [J] float64, one per draw; a single one if it is exact
    is_exact: bool
    num_draws: int | None  # of the final estimate, if drawing goes on to the end; None: that one is exact

    @property
    def mean(self) -> float:
        return float(self.values.mean())


def contenders(choices: Sequence[ChoiceEstimate], scale: np.ndarray, error: float) -> set[int]:
    """The choices whose order is open: the leader and the rivals that may still pass it; empty if the leader has won.

    The order is that of log-likelihood * `scale` [C]. A rival is beaten if a one-sided t-test on the differences of the
    draws that both have rejects that it would be the better one after all draws, at the level `error` divided by the
    number of rivals. The differences of the draws still to come are as variable as those at hand, so the difference
    after N draws varies by sd^2 (1 / J - 1 / N) around the one after J (finite population correction).
    """
    leader = int(np.argmax([choice.mean * s for choice, s in zip(choices, scale, strict=True)]))
    open_rivals = {
        rival
        for rival in range(len(choices))
        if rival != leader
        and not _is_ahead(choices[leader], choices[rival], (scale[leader], scale[rival]), error / (len(choices) - 1))
    }
    return open_rivals | {leader} if open_rivals else set()


def _is_ahead(one: ChoiceEstimate, other: ChoiceEstimate, scales: tuple[float, float], error: float) -> bool:
    sampled = [choice for choice in (one, other) if not choice.is_exact]
    num_draws = min((len(choice.values) for choice in sampled), default=1)
    differences = one.values[:num_draws] * scales[0] - other.values[:num_draws] * scales[1]
    mean = float(differences.mean())
    if not sampled:
        return mean >= 0
    if num_draws == 1:
        return False
    # Where one estimate becomes exact and the other does not, nothing bounds how far the difference still moves.
    ends = {choice.num_draws for choice in sampled}
    end = ends.pop() if len(ends) == 1 else None
    spread = float(differences.std(ddof=1)) * math.sqrt(1 / num_draws - (1 / end if end else 0))
    if not spread:
        return mean >= 0
    return student_tail(mean / spread, num_draws - 1) < error


def student_tail(t: float, degrees: int) -> float:
    """P(T > t) for Student's t of whole degrees of freedom (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan2(t, math.sqrt(degrees))
    cosine, sine = math.cos(angle), math.sin(angle)
    term, total = (cosine, 0.0) if degrees % 2 else (1.0, 0.0)
    for number in range(1 + degrees % 2, degrees, 2):
        total += term
        term *= cosine**2 * number / (number + 1)
    within = 2 / math.pi * (angle + sine * total) if degrees % 2 else sine * total
    return max(0.0, (1 - within) / 2)
