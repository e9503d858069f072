"""The Monte-Carlo objective against exact enumeration, and its standard errors."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_a2d.diffusion.likelihood import exact_nelbo, monte_carlo_nelbo
from megatron_a2d.diffusion.noise import Noise
from megatron_a2d.diffusion.objective import mean_estimate, ratio_estimate, sample_sums

VOCABULARY, LENGTH = 5, 6
TOKENS = np.array([1, 2, 0, 3, 4, 1])


@pytest.fixture
def logits_fn() -> Callable[[Tensor], Tensor]:
    """A fixed random model in which every position looks at every other."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(LENGTH, LENGTH, generator=generator)
    embed = 1.5 * torch.randn(VOCABULARY + 1, VOCABULARY, generator=generator)
    return lambda tokens_BL: torch.einsum("ij,bjv->biv", mix, torch.tanh(embed[tokens_BL]))


@pytest.mark.parametrize("label_shift", [True, False])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("time_sampling", ["low_discrepancy", "uniform"])
def test_monte_carlo_agrees_with_enumeration(
    logits_fn: Callable[[Tensor], Tensor], label_shift: bool, schedule: str, time_sampling: str
) -> None:
    noise = Noise(3, VOCABULARY, schedule, time_sampling, label_shift=label_shift)
    exact = exact_nelbo(logits_fn, TOKENS, noise)
    estimate = monte_carlo_nelbo(logits_fn, TOKENS, noise, num_draws=20_000)
    assert estimate.standard_error < 0.02 * exact
    assert abs(estimate.mean - exact) < 3 * estimate.standard_error


def test_wrong_weights_are_found(logits_fn: Callable[[Tensor], Tensor]) -> None:
    """A negative control: weights of 1 instead of 1/t are not the NELBO."""
    noise = Noise(3, VOCABULARY)
    exact = exact_nelbo(logits_fn, TOKENS, noise)
    unweighted = Noise(3, VOCABULARY)
    object.__setattr__(unweighted, "schedule", "linear")
    from megatron_a2d.diffusion import schedule as schedules

    original = schedules.SCHEDULES["linear"]
    schedules.SCHEDULES["linear"] = original._replace(weight=lambda t: 1.0)
    try:
        estimate = monte_carlo_nelbo(logits_fn, TOKENS, unweighted, num_draws=5_000)
    finally:
        schedules.SCHEDULES["linear"] = original
    assert abs(estimate.mean - exact) > 10 * estimate.standard_error


def test_exact_nelbo_does_not_depend_on_the_schedule(logits_fn: Callable[[Tensor], Tensor]) -> None:
    linear, cosine = (
        exact_nelbo(logits_fn, TOKENS, Noise(0, VOCABULARY, name, min_time=1e-6)) for name in ("linear", "cosine")
    )
    assert linear == pytest.approx(cosine, rel=1e-4)


def test_exact_nelbo_of_a_position_wise_model_is_its_cross_entropy() -> None:
    """Where a token's prediction does not depend on what is visible, every order gives the same likelihood."""
    logits = torch.randn(LENGTH, VOCABULARY, generator=torch.Generator().manual_seed(1))
    noise = Noise(0, VOCABULARY, min_time=1e-6, label_shift=False)
    nelbo = exact_nelbo(lambda tokens_BL: logits.expand(len(tokens_BL), -1, -1), TOKENS, noise)
    expected = torch.nn.functional.cross_entropy(logits.double(), torch.from_numpy(TOKENS)).item()
    assert nelbo == pytest.approx(expected, rel=1e-5)


def test_sample_sums_group_rows() -> None:
    sums = sample_sums(
        losses_N=torch.tensor([1.0, 2.0, 4.0]),
        weights_N=torch.tensor([1.0, 3.0, 0.5]),
        correct_N=torch.tensor([True, False, True]),
        sample_N=torch.tensor([0, 2, 2]),
        num_samples=3,
    )
    assert sums.weighted_loss.tolist() == [1, 0, 8] and sums.cross_entropy.tolist() == [1, 0, 6]
    assert sums.num_rows.tolist() == [1, 0, 2] and sums.num_correct.tolist() == [1, 0, 1]


def test_errors_of_ratios_are_the_delta_methods() -> None:
    """Written out for three samples with 1, 2 and 3 rows; a ratio that is the same in all has no error."""
    ratio = ratio_estimate(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([1.0, 2.0, 3.0]))
    # 9 / 6 = 1.5; residuals -0.5, -1, 1.5; sqrt(3.5 * 3 / 2) / 6.
    assert ratio == pytest.approx((1.5, np.sqrt(3.5 * 3 / 2) / 6), abs=1e-12)
    assert ratio_estimate(torch.tensor([2.0, 8.0, 4.0]), torch.tensor([1.0, 4.0, 2.0])) == (2.0, 0.0)
    means = torch.tensor([1.0, 5.0, 3.0, 2.0])
    assert ratio_estimate(means, torch.ones(4)) == pytest.approx(mean_estimate(means), abs=1e-12)
    assert mean_estimate(means) == pytest.approx((2.75, np.sqrt(8.75 / 3 / 4)), abs=1e-12)
    assert np.isnan(ratio_estimate(torch.ones(1), torch.ones(1)).standard_error)
    assert np.isnan(ratio_estimate(torch.zeros(2), torch.zeros(2)).mean)


def test_standard_errors_cover() -> None:
    """Of 400 experiments about 68% lie within one standard error of the truth."""
    generator = torch.Generator().manual_seed(0)
    means, ratios, levelled = [], [], []
    for _ in range(400):
        x = torch.randn(50, generator=generator, dtype=torch.float64) + 2
        n = torch.rand(50, generator=generator, dtype=torch.float64) + 0.5
        means.append(abs((e := mean_estimate(x)).mean - 2) < e.standard_error)
        ratios.append(abs((e := ratio_estimate(x * n, n)).mean - 2) < e.standard_error)
        # A sum that does not grow with its rows: the denominator's spread is all of the error.
        levelled.append(abs((e := ratio_estimate(torch.ones(50), n)).mean - 1) < e.standard_error)
    assert 0.6 < np.mean(means) < 0.76 and 0.6 < np.mean(ratios) < 0.76
    assert 0.6 < np.mean(levelled) < 0.76
