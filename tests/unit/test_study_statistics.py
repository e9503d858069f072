"""Statistics of studies: critical batch sizes, noise scales, intervals, the masking times of a batch."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_a2d.config.settings import build
from megatron_a2d.diffusion.corruption import Corrupted
from megatron_a2d.study import gradient_moments
from megatron_a2d.study.ablations import critical_batch_size
from megatron_a2d.study.confidence import Moments, mean_interval, paired_difference, ratio_interval, verdict
from megatron_a2d.study.gradient_moments import BatchTimes


def test_the_critical_batch_of_a_known_curve() -> None:
    """Flat up to 32, then 2% worse a doubling: 1% is lost half a doubling later."""
    losses = known_curve(num_seeds=2)
    assert critical_batch_size.critical_batch(losses).value == pytest.approx(32 * 2**0.5, rel=1e-6)
    flat = critical_batch_size.critical_batch({batch: {1: 3.0, 2: 3.0} for batch in (8, 16)})
    assert math.isinf(flat.value) and flat.show(16).startswith("> 16")
    draw = random.Random(0)
    found = critical_batch_size.critical_batch(with_noise(losses, draw, 0.01))
    assert found.low < found.value < found.high
    # What a seed does to all of its batches is no uncertainty about where the curve leaves the band.
    alike = {batch: {seed: loss + seed for seed, loss in found.items()} for batch, found in losses.items()}
    found = critical_batch_size.critical_batch(alike)
    assert found.high - found.low < 1e-6
    alone = critical_batch_size.critical_batch(known_curve(num_seeds=1))
    assert math.isnan(alone.low) and "one seed" in critical_batch_size._claim({"mdlm": alone, "ar": alone})


def test_the_critical_batch_lies_in_its_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    """In 9 of 10 studies, although three batches are equally good, and the lowest of their losses is too low by chance."""
    monkeypatch.setattr(critical_batch_size, "_NUM_DRAWS", 300)
    draw, curve, truth = random.Random(3), known_curve(num_seeds=2), 32 * 2**0.5
    found = [
        critical_batch_size.critical_batch(with_noise(curve, draw, 0.006), seed=draw.randrange(1000))
        for _ in range(150)
    ]
    assert sum(item.low <= truth <= item.high for item in found) > 0.87 * 150
    assert abs(np.median([math.log2(item.value / truth) for item in found])) < 0.1


def known_curve(num_seeds: int) -> critical_batch_size.Losses:
    return {
        batch: dict.fromkeys(range(num_seeds), 3.0 * (1 + 0.02 * max(0.0, math.log2(batch / 32))))
        for batch in (8, 16, 32, 64, 128)
    }


def with_noise(losses: critical_batch_size.Losses, draw: random.Random, size: float) -> critical_batch_size.Losses:
    return {
        batch: {seed: value + draw.gauss(0, size) for seed, value in found.items()} for batch, found in losses.items()
    }


def test_moments_of_known_gradients() -> None:
    """Noise scale of g = G + noise in many dimensions, and its invariance of the batch size."""
    draw = np.random.default_rng(0)
    truth = draw.normal(size=400) * 0.3
    for batch in (1, 4):
        gradients = truth + draw.normal(size=(200, 400)) / batch**0.5
        sums = {
            "count": 200,
            "sum_of_squares": float((gradients**2).sum()),
            "square_of_sum": float((gradients.sum(0) ** 2).sum()),
        }
        assert Moments.of(sums).noise_scale(batch) == pytest.approx(400 / (truth**2).sum(), rel=0.05)


def test_intervals() -> None:
    found = mean_interval([1.0, 2.0, 3.0])
    assert found.mean == 2 and found.half_width == pytest.approx(4.303 / 3**0.5)
    assert str(mean_interval([1.0])) == "1.000" and math.isnan(mean_interval([1.0, math.nan]).mean)
    assert paired_difference({1: 3.0, 2: 5.0, 3: 9.0}, {1: 1.0, 2: 2.0}).mean == 2.5
    assert verdict(mean_interval([0.5, 0.6, 0.55])).startswith("higher by 0.550")
    assert verdict(mean_interval([-0.5, 0.6, 0.1])).startswith("no significant difference")
    assert "one seed" in verdict(mean_interval([0.5]))
    assert (
        mean_interval([2.0, 2.0]).format(1) == "2.0" and verdict(mean_interval([2.0, 2.0])) == "+2.000 for every seed"
    )
    draw = random.Random(1)
    below = [draw.gauss(2, 0.1) for _ in range(30)]
    found_ratio = ratio_interval([0.5 * value + draw.gauss(0, 0.02) for value in below], below)
    assert found_ratio.low < 0.5 < found_ratio.high < 0.52


@pytest.mark.parametrize("scheme", ["iid", "antithetic", "stratified", "by_index"])
def test_times_of_a_batch(scheme: str) -> None:
    """Every scheme is uniform; how evenly a batch is covered is what differs."""
    batches = [
        [BatchTimes(seed=seed, mask_token_id=9, scheme=scheme, batch_size=8).time(place) for place in range(8)]
        for seed in range(300)
    ]
    assert np.mean(batches) == pytest.approx(0.5, abs=0.03) and np.std(batches) == pytest.approx(12**-0.5, abs=0.02)
    largest_gap = np.mean([np.diff([0, *sorted(batch), 1]).max() for batch in batches])
    assert largest_gap < 0.2 if scheme in ("stratified", "by_index") else largest_gap > 0.22
    if scheme == "antithetic":
        assert all(
            a + b == pytest.approx(1.001) for batch in batches for a, b in zip(batch[::2], batch[1::2], strict=True)
        )


class Texts:
    """Each text's tokens are its number."""

    def tokens(self, sample_index: int, /) -> np.ndarray:
        return np.full(30, sample_index)


@pytest.mark.parametrize("same_tokens", [False, True])
@pytest.mark.parametrize("scheme", ["by_index", "complementary"])
def test_complements_are_measured_on_half_the_texts(
    scheme: str, same_tokens: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two batches of 4 samples: 4 texts each, or 2, each under a mask and its complement."""
    batches: list[list[Corrupted]] = []

    def one_batch(loaded: Any, texts: Any, make: Any, size: int, first: int) -> float:
        batches.append([make(texts.tokens(index), index) for index in range(first, first + size)])
        return 0.0

    monkeypatch.setattr(gradient_moments, "owned_shards", lambda state: [])
    monkeypatch.setattr(gradient_moments, "_Sums", lambda shards: SimpleNamespace(add=lambda: None, read=dict))
    monkeypatch.setattr(gradient_moments, "one_batch", one_batch)
    loaded: Any = SimpleNamespace(
        config=build({"train_iters": 1, "label_shift": False}), model_config=SimpleNamespace(mask_token_id=99),
        train_data=Texts(), state=None,
    )  # fmt: skip
    gradient_moments.gradient_moments(loaded, 4, 1, 2, scheme=scheme, same_tokens=same_tokens)
    pairs = scheme == "complementary"
    texts = [[0, 0, 1, 1], [2, 2, 3, 3]] if pairs else [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [[sample.labels[0] for sample in batch] for batch in batches] == ([texts[0]] * 2 if same_tokens else texts)
    masked = [[sample.tokens == 99 for sample in batch] for batch in batches]
    for one, other, *_ in masked:
        assert bool((one | other).all()) == pairs and not one.all()
    assert any((one != other).any() for one, other in zip(*masked, strict=True)), "replicates have their own noise"
