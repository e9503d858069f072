"""Noise is a pure function of (seed, sample index, position)."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_a2d.diffusion.corruption import corrupt, next_token
from megatron_a2d.diffusion.noise import Noise
from megatron_a2d.diffusion.schedule import SCHEDULES
from megatron_a2d.errors import UserError

NOISE = Noise(seed=7, mask_token_id=99)


def test_golden_values() -> None:
    """Checkpoints of old runs go on under the same noise only if these never change."""
    assert NOISE.time(0) == pytest.approx(0.8825843634242868, abs=1e-15)
    assert NOISE.time(10**12) == pytest.approx(0.7775376682712078, abs=1e-15)
    masked = corrupt(np.arange(24), 5, NOISE).tokens == 99
    assert "".join("#" if m else "." for m in masked) == ".#######################"


def test_any_order_any_process_gives_the_same_noise() -> None:
    forwards = [corrupt(np.arange(64), index, NOISE) for index in range(20)]
    backwards = [corrupt(np.arange(64), index, NOISE) for index in reversed(range(20))][::-1]
    for one, other in zip(forwards, backwards, strict=True):
        assert np.array_equal(one.tokens, other.tokens) and np.array_equal(one.weights, other.weights)
        assert one.time == other.time
    assert not np.array_equal(forwards[0].tokens, corrupt(np.arange(64), 0, Noise(8, 99)).tokens)
    assert not np.array_equal(forwards[0].tokens, forwards[1].tokens)


def test_a_longer_sample_begins_with_the_shorter_one() -> None:
    assert np.array_equal(NOISE.uniforms(3, 100)[:40], NOISE.uniforms(3, 40))


def test_times_are_evenly_spread_over_any_64_consecutive_samples() -> None:
    """The largest gap between neighbours of 64 points is 1/64 = 0.0156 at best; a golden-ratio sequence stays below 2.7
    times that. Independent times leave a gap of about ln(64)/64 * 1.1 = 0.07."""

    def largest_gap(noise: Noise, start: int) -> float:
        times = np.sort([noise.time(index) for index in range(start, start + 64)])
        return float(np.max(np.diff(np.concatenate([[noise.min_time], times, [1.0]]))))

    starts = [0, 1, 17, 1000, 123_457, 10**9, 10**12 + 3]
    assert max(largest_gap(NOISE, start) for start in starts) < 2.7 / 64
    uniform = Noise(7, 99, time_sampling="uniform")
    assert np.mean([largest_gap(uniform, start) for start in starts]) > 2.7 / 64
    means = [np.mean([NOISE.time(index) for index in range(start, start + 64)]) for start in starts]
    assert max(abs(mean - 0.5005) for mean in means) < 0.02


def test_mask_ratio_follows_the_schedule() -> None:
    for schedule in SCHEDULES:
        noise = Noise(1, 9_999, schedule=schedule)
        for index in range(8):
            sample = corrupt(np.zeros(20_000, dtype=np.int64), index, noise)
            expected = SCHEDULES[schedule].mask_probability(sample.time)
            assert np.mean(sample.tokens == 9_999) == pytest.approx(expected, abs=0.02)
    ratios = [np.mean(corrupt(np.zeros(512, dtype=np.int64), index, NOISE).tokens == 99) for index in range(512)]
    assert np.mean(ratios) == pytest.approx(0.5, abs=0.01)


def test_weight_is_the_schedules_slope() -> None:
    for schedule in SCHEDULES.values():
        for t in (0.05, 0.3, 0.7, 0.95):
            slope = (schedule.mask_probability(t + 1e-6) - schedule.mask_probability(t - 1e-6)) / 2e-6
            assert schedule.weight(t) == pytest.approx(slope / schedule.mask_probability(t), rel=1e-6)


def test_label_shift() -> None:
    tokens = np.arange(100, 164)
    for index in range(50):
        sample = corrupt(tokens, index, NOISE)
        masked = sample.tokens == 99
        assert not masked[0] and sample.num_maskable == 63
        assert np.array_equal(sample.labels[:-1], tokens[1:])
        assert np.array_equal(sample.weights[:-1] > 0, masked[1:]) and sample.weights[-1] == 0
        assert np.allclose(sample.weights[sample.weights > 0], 1 / sample.time)
        assert np.array_equal(sample.tokens[~masked], tokens[~masked])


def test_no_label_shift() -> None:
    noise = Noise(7, 99, label_shift=False)
    samples = [corrupt(np.arange(100, 164), index, noise) for index in range(50)]
    assert any(sample.tokens[0] == 99 for sample in samples)
    for sample in samples:
        assert np.array_equal(sample.labels, np.arange(100, 164)) and sample.num_maskable == 64
        assert np.array_equal(sample.weights > 0, sample.tokens == 99)


def test_next_token() -> None:
    sample = next_token(np.array([5, 6, 7]))
    assert sample.tokens.tolist() == [5, 6, 7] and sample.labels[:2].tolist() == [6, 7]
    assert sample.weights.tolist() == [1, 1, 0] and sample.num_maskable == 2


def test_text_that_holds_the_mask_token_is_refused() -> None:
    with pytest.raises(UserError, match="holds the mask token"):
        corrupt(np.array([1, 99, 2]), 0, NOISE)
