"""Which of a question's choices has the highest log-likelihood: draws that compare them, and when to stop drawing.

Let G(M) be what the tokens M of a continuation y gain from seeing the others: the sum over i in M of
log p(y_i | x, y outside M) - log p(y_i | x). The bound of conditional_likelihood.py is then

    log p(y | x) >= sum over i of log p(y_i | x)
                    + sum over k in 1..n-1 of 1 / k * mean over subsets M of size k of G(M)

One forward pass gives the first term, and choices of equal length share it; only the second one is estimated. So the
fully masked pass is a control variate of coefficient 1, and each draw stays unbiased. Sizes k are drawn in proportion
to 1 / sqrt(k): a small M has the larger weight, and so the larger variance. Masks depend on the seed and the length
alone: the choices of a question share them, and differences vary less than log-likelihoods do.

A choice draws until a sequential test is certain that it is not the best (`contenders`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import numpy as np

from megatron_a2d.diffusion.rng import Stream, uniforms

_INVERSE_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


class GainMasks(NamedTuple):
    """Masks of a continuation, none of them full, and the weights of what it gains under them. J masks, n tokens."""

    masks: np.ndarray  # [J, n] bool
    weights: np.ndarray  # [J] float64


@lru_cache(maxsize=256)
def gain_draws(num_tokens: int, num_draws: int, seed: int = 0) -> GainMasks:
    """The first `num_draws` random masks; each one's weight * G(M) is unbiased. More draws begin with the fewer.

    Sizes follow a low-discrepancy sequence, so that those of any first draws are evenly spread. Cached: do not modify.
    """
    sizes = np.arange(1, num_tokens)
    probabilities = sizes**-0.5 / (sizes**-0.5).sum()
    offset = uniforms(seed, Stream.CHOICE, 0, 1)[0]
    masks = np.zeros((num_draws, num_tokens), dtype=bool)
    weights = np.zeros(num_draws)
    for draw in range(num_draws):
        fraction = (offset + draw * _INVERSE_GOLDEN_RATIO) % 1
        size = min(1 + int((fraction >= probabilities.cumsum()).sum()), num_tokens - 1)
        order = uniforms(seed, Stream.CHOICE, 1 + draw, num_tokens).argsort()
        masks[draw, order[:size]] = True
        weights[draw] = 1 / (size * probabilities[size - 1])
    return GainMasks(masks, weights)


@lru_cache(maxsize=64)
def all_gains(num_tokens: int) -> GainMasks:
    """All 2^n - 2 masks but the full one: the weighted sum of their gains is exact. Cached: do not modify."""
    masks = np.array(list(product([False, True], repeat=num_tokens)))[1:-1].reshape(-1, num_tokens)
    return GainMasks(masks, np.array([1 / (k * math.comb(num_tokens, int(k))) for k in masks.sum(1)]))


def looks(mc_num: int) -> list[int]:
    """Numbers of draws after which the test is made, each about 1.4 times the last; the full mask is the `mc_num`th."""
    last, numbers = max(mc_num - 1, 1), [4.0]
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
