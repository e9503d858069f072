"""The Monte-Carlo objective against exact enumeration, and its standard errors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_a2d.diffusion.corruption import corrupt
from megatron_a2d.diffusion.loss import SampleSums, mean_estimate, ratio_estimate, sample_sums
from megatron_a2d.diffusion.metrics import SampleTable, summarise
from megatron_a2d.diffusion.rng import Noise
from tests.unit.exact_nelbo import exact_nelbo, monte_carlo_nelbo

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
@pytest.mark.parametrize("timestep_sampling", ["low_discrepancy", "uniform"])
def test_monte_carlo_agrees_with_enumeration(
    logits_fn: Callable[[Tensor], Tensor], label_shift: bool, schedule: str, timestep_sampling: str
) -> None:
    noise = Noise(3, VOCABULARY, schedule, timestep_sampling, label_shift=label_shift)
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
    from megatron_a2d.diffusion import noise_schedule as schedules

    original = schedules.SCHEDULES["linear"]
    schedules.SCHEDULES["linear"] = original._replace(weight=lambda t: 1.0)
    try:
        estimate = monte_carlo_nelbo(logits_fn, TOKENS, unweighted, num_draws=5_000)
    finally:
        schedules.SCHEDULES["linear"] = original
    assert abs(estimate.mean - exact) > 10 * estimate.standard_error


def test_exact_nelbo_does_not_depend_on_the_schedule(logits_fn: Callable[[Tensor], Tensor]) -> None:
    linear, cosine = (
        exact_nelbo(logits_fn, TOKENS, Noise(0, VOCABULARY, name, min_timestep=1e-6)) for name in ("linear", "cosine")
    )
    assert linear == pytest.approx(cosine, rel=1e-4)


def test_exact_nelbo_of_a_position_wise_model_is_its_cross_entropy() -> None:
    """Where a token's prediction does not depend on what is visible, every order gives the same likelihood."""
    logits = torch.randn(LENGTH, VOCABULARY, generator=torch.Generator().manual_seed(1))
    noise = Noise(0, VOCABULARY, min_timestep=1e-6, label_shift=False)
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
    assert sums.num_positions.tolist() == [1, 0, 2] and sums.num_correct.tolist() == [1, 0, 1]


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


def sums_of(*columns: list[float]) -> SampleSums:
    return SampleSums(*(torch.tensor(column, dtype=torch.float64) for column in columns))


def test_validation_sums_by_sample_and_bucket() -> None:
    """Five samples in two batches, out of order; the second's rows lie on two ranks, one of which counts it."""
    columns, other = SampleTable(5), SampleTable(5)
    columns.put(
        torch.tensor([4, 0, 1]),
        torch.tensor([0.95, 0.05, 0.5]),
        torch.tensor([10, 20, 40]),
        sums_of([9, 4, 20], [8, 2, 15], [9, 1, 20], [3, 1, 10]),
    )
    columns.put(
        torch.tensor([2, 3]),
        torch.tensor([0.55, 1.0]),
        torch.tensor([10, 10]),
        sums_of([6, 3], [3, 3], [5, 10], [2, 1]),
    )
    other.put(torch.tensor([1]), torch.tensor([0.5]), torch.tensor([0]), sums_of([2], [1], [4], [0]))
    columns.table += other.table
    result = summarise(columns)
    losses, maskable, rows, right = [4, 22, 6, 3, 9], [20, 40, 10, 10, 10], [1, 24, 5, 10, 9], [1, 10, 2, 1, 3]
    assert result.num_samples == 5 and result.nelbo.mean == pytest.approx(sum(losses) / sum(maskable))
    assert result.cross_entropy.mean == pytest.approx((2 + 16 + 3 + 3 + 8) / sum(rows))
    assert result.accuracy.mean == pytest.approx(sum(right) / sum(rows))
    ratio = sum(losses) / sum(maskable)
    squares = sum((loss - ratio * count) ** 2 for loss, count in zip(losses, maskable, strict=True))
    assert result.nelbo.standard_error == pytest.approx(math.sqrt(squares * 5 / 4) / sum(maskable))
    by_time = {(0.0, 0.1): (1, 4 / 20), (0.5, 0.6): (2, 28 / 50), (0.9, 1.0): (2, 12 / 20)}
    # Shares of masked tokens: 0.05, 0.6, 0.5, 1.0 and 0.9.
    by_share = {(0.0, 0.1): (1, 1.0), (0.5, 0.6): (1, 2 / 5), (0.6, 0.7): (1, 10 / 24), (0.9, 1.0): (2, 4 / 19)}
    for name, buckets, expected in (
        ("nelbo_by_time", result.nelbo_by_time, by_time),
        ("accuracy_by_mask_ratio", result.accuracy_by_mask_ratio, by_share),
    ):
        found = {(bucket.low, bucket.high): (bucket.num_samples, bucket.value.mean) for bucket in buckets}
        assert found.keys() == expected.keys() and list(found) == sorted(found)
        for key, (count, mean) in expected.items():
            assert found[key] == (count, pytest.approx(mean))
        rows_of_table = result.tables()[name]
        assert [(row["low"], row["high"], row["num_samples"], row["mean"]) for row in rows_of_table] == [
            (*key, *found[key]) for key in found
        ]
        assert [row["standard_error"] for row in rows_of_table] == pytest.approx(
            [bucket.value.standard_error for bucket in buckets], nan_ok=True
        )
    assert result.to_dict() == {
        "num_samples": 5, "nelbo": result.nelbo.mean, "nelbo_standard_error": result.nelbo.standard_error,
        "cross_entropy": result.cross_entropy.mean, "cross_entropy_standard_error": result.cross_entropy.standard_error,
        "accuracy": result.accuracy.mean, "accuracy_standard_error": result.accuracy.standard_error,
    }  # fmt: skip


def test_samples_without_maskable_tokens_are_in_the_first_bucket() -> None:
    columns = SampleTable(2)
    columns.put(
        torch.tensor([0, 1]), torch.tensor([0.75, 0.75]), torch.tensor([0, 4]), sums_of([0, 2], [0, 1], [0, 2], [0, 1])
    )
    result = summarise(columns)
    assert [(bucket.low, bucket.num_samples) for bucket in result.nelbo_by_time] == [(0.0, 1), (0.7, 1)]
    assert math.isnan(result.nelbo_by_time[0].value.mean) and result.nelbo.mean == 0.5


@pytest.mark.parametrize("counts", [None, [True, False, True, True, False]])
def test_rows_are_summed_by_sample(counts: list[bool] | None) -> None:
    losses, weights = [1.0, 2.0, 4.0, 8.0, 16.0], [3.0, 0.0, 0.5, 1.0, 0.0]
    correct, samples = [True, True, False, True, False], [2, 0, 2, 0, 0]
    found = sample_sums(
        torch.tensor(losses),
        torch.tensor(weights),
        torch.tensor(correct),
        torch.tensor(samples),
        4,
        None if counts is None else torch.tensor(counts),
    )
    expected = [[0.0] * 4 for _ in range(4)]
    for row, sample in enumerate(samples):
        if counts is None or counts[row]:
            for column, value in zip(expected, (weights[row] * losses[row], losses[row], 1, correct[row]), strict=True):
                column[sample] += value
    assert [column.tolist() for column in found] == expected and {column.dtype for column in found} == {torch.float64}


def test_estimates_by_their_formulas() -> None:
    mean, error = mean_estimate(torch.tensor([1.0, 3.0, 8.0]))
    assert mean == 4 and error == pytest.approx(math.sqrt((9 + 1 + 16) / 2 / 3))
    mean, error = mean_estimate(torch.tensor([3.0]))
    assert mean == 3 and math.isnan(error)
    ratio, error = ratio_estimate(torch.tensor([2.0, 4.0, 3.0]), torch.tensor([4.0, 10.0, 4.0]))
    assert ratio == 0.5 and error == pytest.approx(math.sqrt((0 + 1 + 1) * 3 / 2) / 18)
    ratio, error = ratio_estimate(torch.tensor([2.0, 4.0]), torch.tensor([4.0, 10.0]))
    assert error == pytest.approx(math.sqrt(((2 - 24 / 14) ** 2 + (4 - 60 / 14) ** 2) * 2) / 14)
    ratio, error = ratio_estimate(torch.tensor([1.0]), torch.tensor([4.0]))
    assert ratio == 0.25 and math.isnan(error)
    assert all(math.isnan(value) for value in ratio_estimate(torch.zeros(3), torch.zeros(3)))
    assert str(mean_estimate(torch.tensor([1.0, 3.0]))) == "2.000 ± 1.000"


@pytest.mark.parametrize("batch_size", [1, 7, 20, 64])
def test_batches_change_no_bound(logits_fn: Callable[[Tensor], Tensor], batch_size: int) -> None:
    """Every draw and every mask counts once, also where the last batch is not full."""
    noise = Noise(3, VOCABULARY)
    seen: list[int] = []

    def counting(tokens_BL: Tensor) -> Tensor:
        seen.append(len(tokens_BL))
        return logits_fn(tokens_BL)

    found = monte_carlo_nelbo(counting, TOKENS, noise, 20, batch_size)
    assert sum(seen) == 20 and max(seen) <= batch_size and len(seen) == math.ceil(20 / batch_size)
    values = []
    for index in range(20):
        draw = corrupt(TOKENS, index, noise)
        losses = torch.nn.functional.cross_entropy(
            logits_fn(torch.from_numpy(draw.tokens)[None])[0].double(), torch.from_numpy(draw.labels), reduction="none"
        )
        values.append(float((losses * torch.from_numpy(draw.weights)).sum()) / 5)
    assert found.mean == pytest.approx(np.mean(values)) and found.standard_error == pytest.approx(
        np.std(values, ddof=1) / math.sqrt(20)
    )
    seen.clear()
    assert exact_nelbo(counting, TOKENS, noise, batch_size) == pytest.approx(exact_nelbo(logits_fn, TOKENS, noise))
    assert sum(seen) == 31 and max(seen) <= batch_size, "all masks of five tokens but the empty one"


@pytest.mark.parametrize("label_shift", [True, False])
@pytest.mark.parametrize(("schedule", "min_timestep"), [("linear", 1e-6), ("linear", 0.3), ("cosine", 0.2)])
def test_the_exact_bound_term_by_term(
    logits_fn: Callable[[Tensor], Tensor], schedule: str, min_timestep: float, label_shift: bool
) -> None:
    """The integral over times by the midpoint rule, the cross-entropies of each mask token by token."""
    noise = Noise(0, VOCABULARY, schedule, min_timestep=min_timestep, label_shift=label_shift)
    first = int(label_shift)
    n = LENGTH - first
    times = min_timestep + (1 - min_timestep) * (np.arange(200_000) + 0.5) / 200_000
    m = times if schedule == "linear" else np.sin(np.pi / 2 * times)
    weight = 1 / times if schedule == "linear" else np.pi / 2 / np.tan(np.pi / 2 * times)
    counts = [float((weight * m**k * (1 - m) ** (n - k)).mean()) for k in range(n + 1)]
    total = 0.0
    for mask in itertools.product([False, True], repeat=n):
        inputs = [
            VOCABULARY if place >= first and mask[place - first] else int(TOKENS[place]) for place in range(LENGTH)
        ]
        logprobs = logits_fn(torch.tensor([inputs]))[0].double().log_softmax(-1)
        for place in range(first, LENGTH):
            if mask[place - first]:
                total -= counts[sum(mask)] * float(logprobs[place - first, int(TOKENS[place])])
    assert exact_nelbo(logits_fn, TOKENS, noise) == pytest.approx(total / n, rel=1e-4)
