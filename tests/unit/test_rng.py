"""Noise is a pure function of (seed, sample index, position)."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from megatron_a2d.diffusion.corruption import corrupt, has_predecessor, maskable_tokens, next_token, shift
from megatron_a2d.diffusion.loss_weighting import token_weights
from megatron_a2d.diffusion.noise_schedule import SCHEDULES
from megatron_a2d.diffusion.rng import Noise, random_cut
from megatron_a2d.utils.errors import UserError

NOISE = Noise(seed=7, mask_token_id=99)


def test_golden_values() -> None:
    """Older runs resume with the same noise only if these never change."""
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
        return float(np.max(np.diff(np.concatenate([[noise.min_timestep], times, [1.0]]))))

    starts = [0, 1, 17, 1000, 123_457, 10**9, 10**12 + 3]
    assert max(largest_gap(NOISE, start) for start in starts) < 2.7 / 64
    uniform = Noise(7, 99, timestep_sampling="uniform")
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
    with pytest.raises(UserError, match="contains the mask token"):
        corrupt(np.array([1, 99, 2]), 0, NOISE)


def loop_over_predecessors(tokens: list[int], documents: list[int] | None) -> list[bool]:
    return [i > 0 and (documents is None or documents[i] == documents[i - 1]) for i in range(len(tokens))]


@pytest.mark.parametrize("documents", [None, [0, 0, 0, 1, 1, 2]])
@pytest.mark.parametrize("visible", [None, 7])
@pytest.mark.parametrize("label_shift", [True, False])
def test_what_is_maskable_and_counted(label_shift: bool, visible: int | None, documents: list[int] | None) -> None:
    """Under the shift a token needs one before it in its document; an end of document is never masked or counted."""
    tokens = [7, 5, 7, 6, 7, 8]
    documents_L = None if documents is None else np.array(documents)
    has_one = loop_over_predecessors(tokens, documents)
    assert has_predecessor(np.array(tokens), documents_L).tolist() == has_one
    expected = [(one or not label_shift) and token != visible for token, one in zip(tokens, has_one, strict=True)]
    assert maskable_tokens(np.array(tokens), label_shift, documents_L, visible).tolist() == expected
    sample = corrupt(
        np.array(tokens), 0, Noise(7, 99, min_timestep=0.999999, label_shift=label_shift), documents_L, visible
    )
    assert (sample.tokens == 99).tolist() == expected and sample.num_maskable == sum(expected)
    assert sample.documents is documents_L and sample.positions is None and sample.segment_of_position is None
    counted = [one and token != visible for token, one in zip(tokens, has_one, strict=True)]
    autoregressive = next_token(np.array(tokens), documents_L, visible)
    assert autoregressive.weights.tolist() == [*map(float, counted[1:]), 0.0] and autoregressive.time == 1.0
    assert autoregressive.labels.tolist() == [5, 7, 6, 7, 8, 7] and autoregressive.num_maskable == sum(counted)
    assert (
        autoregressive.tokens.tolist() == tokens
        and autoregressive.documents is documents_L
        and autoregressive.noise_segments is None
    )


def test_shifted_rows() -> None:
    """Row i is judged by token i + 1; the last row wraps around and has no weight."""
    labels, weights = shift(np.array([3, 4, 5]), np.array([9.0, 1.0, 2.0], dtype=np.float32))
    assert labels.tolist() == [4, 5, 3] and weights.tolist() == [1.0, 2.0, 0.0] and weights.dtype == np.float32


def test_times_by_their_formula() -> None:
    """min_timestep + (1 - min_timestep) frac(u + i / phi), in 64-bit fixed point; and independent ones from the stream of times."""
    noise = Noise(seed=11, mask_token_id=99, min_timestep=0.25)
    first = (noise.time(0) - 0.25) / 0.75
    for index in (1, 2, 10, 12345):
        expected = 0.25 + 0.75 * ((first + index * (math.sqrt(5) - 1) / 2) % 1)
        assert noise.time(index) == pytest.approx(expected, abs=1e-9)
    independent = Noise(seed=11, mask_token_id=99, min_timestep=0.25, timestep_sampling="uniform")
    for index in range(5):
        generator = np.random.Generator(np.random.Philox(key=11 + (1 << 64), counter=index << 64))
        assert independent.time(index) == 0.25 + 0.75 * generator.random()


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_by_their_formulas(name: str) -> None:
    schedule = SCHEDULES[name]
    for t in (0.01, 0.3, 0.5, 0.99, 1.0):
        mask, weight = (
            (t, 1 / t) if name == "linear" else (math.sin(math.pi / 2 * t), math.pi / 2 / math.tan(math.pi / 2 * t))
        )
        assert schedule.mask_probability(t) == pytest.approx(mask) and schedule.weight(t) == pytest.approx(
            weight, abs=1e-12
        )
        assert schedule.time(schedule.mask_probability(t)) == pytest.approx(t)
    assert schedule.time(0.0) == pytest.approx(0.0, abs=1e-12) and schedule.time(1.0) == pytest.approx(1.0)


@pytest.mark.parametrize(("name", "mean"), [("linear", 0.55), ("cosine", 2 / math.pi * math.cos(math.pi / 20) / 0.9)])
def test_uniform_weights_are_one_over_the_mean_share(name: str, mean: float) -> None:
    """E[m] over times in [0.1, 1]: of m = t, and of m = sin(pi t / 2)."""
    noise = Noise(1, 99, schedule=name, min_timestep=0.1, loss_weighting="uniform")
    masked = np.array([True, False, True])
    assert token_weights(noise, 123.0, masked) == pytest.approx([1 / mean, 0, 1 / mean])
    assert token_weights(replace(noise, loss_weighting="mdlm"), 123.0, masked).tolist() == [123, 0, 123]


def test_random_cuts() -> None:
    """1 .. length - 1, each as often as another, in the share of samples that was asked for."""
    cuts = [random_cut(3, index, 6, 0.5) for index in range(4000)]
    counts = np.array([cuts.count(place) for place in range(1, 6)])
    assert set(cuts) == {None, 1, 2, 3, 4, 5} and np.abs(counts - 400).max() < 5 * math.sqrt(400)
    assert all(random_cut(3, index, 6, 1.0) is not None for index in range(50))
    assert not any(random_cut(3, index, 6, 0.0) for index in range(50))
    assert {random_cut(3, index, 2, 1.0) for index in range(50)} == {1}
    assert {random_cut(3, index, 1, 1.0) for index in range(50)} == {None}


def test_settings_of_noise_that_are_none() -> None:
    for wrong in (
        {"schedule": "x"},
        {"timestep_sampling": "x"},
        {"min_timestep": 0.0},
        {"min_timestep": 1.0},
        {"seed": -1},
    ):
        with pytest.raises(AssertionError):
            replace(NOISE, **wrong)
    replace(NOISE, seed=0)
