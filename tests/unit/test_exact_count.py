"""Masks of an exact count: how many, which, and that every count enters the bound with the weight one."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_a2d.diffusion.corruption import corrupt, mask_exact_count
from megatron_a2d.diffusion.rng import Noise

MASK = 99


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_every_count_weighs_one(schedule: str) -> None:
    """Integrated over times, the weights of the masked tokens sum to one for each count 1 .. n."""
    noise = Noise(seed=3, mask_token_id=MASK, schedule=schedule, min_timestep=1e-6)
    maskable = np.arange(12) > 1
    times = noise.min_timestep + (1 - noise.min_timestep) * (np.arange(20_000) + 0.5) / 20_000
    sums = np.zeros(13)
    for number, time in enumerate(times):
        masked, weight = mask_exact_count(noise, float(time), number % 50, maskable)
        assert not masked[:2].any()
        sums[masked.sum()] += weight * masked.sum() / len(times)
    assert sums[0] == sums[11] == 0
    assert sums[1:11] == pytest.approx(np.ones(10), abs=0.02)


def test_the_share_is_that_of_the_time_and_every_token_is_as_likely() -> None:
    noise = Noise(seed=3, mask_token_id=MASK, mask_sampling="exact_count")
    tokens = np.arange(41)
    hidden = np.zeros(41)
    for index in range(3000):
        sample = corrupt(tokens, index, noise)
        masked = sample.tokens == MASK
        assert masked.sum() == np.ceil(40 * sample.time) == (sample.weights > 0).sum()
        assert sample.weights[:-1][masked[1:]] == pytest.approx(sample.weights.max())
        hidden += masked
    assert hidden[0] == 0 and hidden[1:] / 3000 == pytest.approx(np.full(40, 0.5125), abs=0.05)


def test_the_bound_of_a_known_model_is_the_same() -> None:
    """A cross-entropy that depends on the number of visible tokens alone: both kinds of masks estimate one sum."""
    length = 33
    exact = sum(1 / visible for visible in range(1, length)) / (length - 1)  # over counts 1 .. 32, visible 32 .. 1
    for kind in ("bernoulli", "exact_count"):
        noise = Noise(seed=8, mask_token_id=MASK, mask_sampling=kind, min_timestep=1e-4)
        losses = []
        for index in range(12_000):
            sample = corrupt(np.arange(length), index, noise)
            visible = (sample.tokens != MASK).sum()
            losses.append(float(sample.weights.sum()) / visible / (length - 1))
        assert np.mean(losses) == pytest.approx(exact, rel=0.03), kind


def test_nothing_is_masked_where_nothing_can_be() -> None:
    noise = Noise(seed=1, mask_token_id=MASK, mask_sampling="exact_count")
    sample = corrupt(np.full(5, 7), 0, noise, visible_token_id=7)
    assert (sample.tokens == 7).all() and sample.weights.sum() == 0 and sample.num_maskable == 0


def test_a_time_on_a_border_has_an_ordinary_weight() -> None:
    """Counts of m(min_timestep) n and below are never drawn; rounding may ask for one of them."""
    noise = Noise(seed=1, mask_token_id=MASK, min_timestep=1e-3)
    for total in (1000, 4000, 8000):
        first = total // 1000 + 1
        for time in (1e-3, np.nextafter(1e-3, 1), np.nextafter(1e-3, 0), 1.05e-3):
            masked, weight = mask_exact_count(noise, float(time), 0, np.ones(total, dtype=bool))
            assert masked.sum() == first and weight == pytest.approx(0.999 * total / first), (total, time)
    masked, weight = mask_exact_count(noise, 1.0, 0, np.ones(4000, dtype=bool))
    assert masked.all() and weight == pytest.approx(0.999)
