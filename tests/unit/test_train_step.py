"""A step's sums, row by row against plain loops: which rows carry loss, and whose they are."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from megatron.core import parallel_state

from megatron_a2d import megatron_compat
from megatron_a2d.data.dataloader import Batch
from megatron_a2d.model.diffusion_lm import TokenLosses
from megatron_a2d.training import train_step
from megatron_a2d.training.train_step import SampleLosses, Totals, find_loss_positions, loss_totals

megatron_compat.install()

SAMPLES, LENGTH, SPANS = 3, 6, 2


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel_state, "get_context_parallel_world_size", lambda: 1)
    monkeypatch.setattr(parallel_state, "get_context_parallel_rank", lambda: 0)


def batch_of(seed: int, spans: bool, masked_weights: bool) -> Batch:
    """Three samples of six rows, half of them with loss; whole numbers, so that sums are exact in any order."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    weights = integers(0, 2, SAMPLES, LENGTH) * integers(1, 5, SAMPLES, LENGTH).float()
    return Batch(
        tokens=integers(0, 9, SAMPLES, LENGTH),
        labels=integers(0, 9, SAMPLES, LENGTH),
        weights=weights,
        times=torch.rand(SAMPLES, generator=generator),
        sample_index=torch.arange(40, 40 + SAMPLES),
        num_maskable=integers(3, LENGTH + 1, SAMPLES),
        noise_segments=integers(1, 6, SAMPLES, SPANS, 3).double() if spans else None,
        segment_of_position=integers(0, SPANS, SAMPLES, LENGTH) if spans and masked_weights else None,
        masked_weights=weights * integers(0, 2, SAMPLES, LENGTH) if masked_weights else None,
    )


def rows_with_loss(batch: Batch) -> Iterator[tuple[int, int]]:
    for sample in range(SAMPLES):
        for place in range(LENGTH):
            if batch.weights[sample, place] > 0:
                yield sample, place


@pytest.mark.parametrize("masked_weights", [False, True])
def test_rows_that_carry_loss(masked_weights: bool) -> None:
    batch = batch_of(0, spans=True, masked_weights=masked_weights)
    targets, expected = find_loss_positions(batch), list(rows_with_loss(batch))
    assert 3 < len(expected) < SAMPLES * LENGTH
    assert targets.indices.tolist() == [sample * LENGTH + place for sample, place in expected]
    assert targets.labels.tolist() == [int(batch.labels[where]) for where in expected]
    assert targets.weights.tolist() == [float(batch.weights[where]) for where in expected]
    assert targets.samples.tolist() == [sample for sample, _ in expected]
    if not masked_weights:
        assert targets.segments is None and targets.masked_weights is None
        return
    assert batch.segment_of_position is not None and batch.masked_weights is not None
    assert targets.segments is not None and targets.masked_weights is not None
    assert targets.segments.tolist() == [where[0] * SPANS + int(batch.segment_of_position[where]) for where in expected]
    assert targets.masked_weights.tolist() == [float(batch.masked_weights[where]) for where in expected]


def test_rows_of_a_piece_of_the_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of two context-parallel ranks: the last three rows of each sample, counted from its own first."""
    batch = batch_of(0, spans=True, masked_weights=True)
    monkeypatch.setattr(parallel_state, "get_context_parallel_world_size", lambda: 2)
    monkeypatch.setattr(parallel_state, "get_context_parallel_rank", lambda: 1)
    targets = find_loss_positions(batch)
    expected = [(sample, place) for sample, place in rows_with_loss(batch) if place >= 3]
    assert batch.segment_of_position is not None and targets.segments is not None
    assert targets.indices.tolist() == [sample * 3 + place - 3 for sample, place in expected]
    assert targets.samples.tolist() == [sample for sample, _ in expected]
    assert targets.segments.tolist() == [where[0] * SPANS + int(batch.segment_of_position[where]) for where in expected]


def losses_of(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, SampleLosses, torch.Tensor, torch.Tensor]:
    targets = find_loss_positions(batch)
    losses = torch.arange(1.0, 1 + len(targets.indices))
    correct = torch.arange(len(targets.indices)) % 3 == 0
    total, num_tokens, found = train_step._loss(batch, targets, TokenLosses(losses, correct))
    return total, num_tokens, found, losses, correct


def sums_by(
    keys: list[int], count: int, weights: list[float], losses: torch.Tensor, correct: torch.Tensor
) -> list[list[float]]:
    """weighted loss, loss, rows, right rows of each key; rows without a weight are not counted."""
    table = [[0.0] * count for _ in range(4)]
    for key, weight, loss, right in zip(keys, weights, losses.tolist(), correct.tolist(), strict=True):
        if weight > 0:
            for column, value in zip(table, (weight * loss, loss, 1, right), strict=True):
                column[key] += value
    return table


@pytest.mark.parametrize("context_rank", [0, 1])
@pytest.mark.parametrize(("spans", "masked_weights"), [(False, False), (True, False), (True, True)])
def test_sums_of_a_micro_batch(
    spans: bool, masked_weights: bool, context_rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel_state, "get_context_parallel_rank", lambda: context_rank)
    batch = batch_of(1, spans, masked_weights)
    total, num_tokens, found, losses, correct = losses_of(batch)
    where = list(rows_with_loss(batch))
    weights = [float(batch.weights[place]) for place in where]
    assert float(total) == sum(weight * loss for weight, loss in zip(weights, losses.tolist(), strict=True))
    counted = batch.num_maskable if context_rank == 0 else torch.zeros(SAMPLES)
    assert int(num_tokens) == counted.sum() and found.num_maskable.tolist() == counted.tolist()
    assert [column.tolist() for column in found.sums] == sums_by(
        [s for s, _ in where], SAMPLES, weights, losses, correct
    )
    assert found.sample_index is batch.sample_index and found.times is batch.times
    if batch.noise_segments is None:
        assert found.segments is None
        return
    assert found.segments is not None
    lines = [line for sample in batch.noise_segments.tolist() for line in sample]
    assert found.segments.times.tolist() == [time for time, _, _ in lines]
    assert found.segments.mask_ratios.tolist() == [masked / maskable for _, maskable, masked in lines]
    assert found.segments.num_maskable.tolist() == [maskable * (context_rank == 0) for _, maskable, _ in lines]
    assert found.segments.num_masked.tolist() == [masked * (context_rank == 0) for _, _, masked in lines]
    if batch.segment_of_position is None or batch.masked_weights is None:
        assert found.segments.sums is found.sums, "a sample is one span"
        return
    keys = [sample * SPANS + int(batch.segment_of_position[sample, place]) for sample, place in where]
    weights = [float(batch.masked_weights[place]) for place in where]
    assert 0 < weights.count(0) < len(weights)
    expected = sums_by(keys, SAMPLES * SPANS, weights, losses, correct)
    assert [column.tolist() for column in found.segments.sums] == expected


def test_a_span_without_maskable_tokens_has_the_ratio_0() -> None:
    batch = batch_of(2, spans=True, masked_weights=False)
    assert batch.noise_segments is not None
    batch.noise_segments[1, 0] = torch.tensor([0.5, 0.0, 0.0])
    _, _, found, _, _ = losses_of(batch)
    assert (
        found.segments is not None
        and found.segments.mask_ratios[SPANS] == 0
        and bool(found.segments.mask_ratios.isfinite().all())
    )


@pytest.mark.parametrize("spans", [False, True])
def test_totals_are_the_sums_over_micro_batches(spans: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    items = [losses_of(batch_of(seed, spans, spans))[2] for seed in (3, 4)]
    monkeypatch.setattr(parallel_state, "get_tensor_model_parallel_rank", lambda: 0)
    totals = Totals(*loss_totals(items).tolist())
    sums = [sum(float(item.sums[column].sum()) for item in items) for column in range(4)]
    assert list(totals[:4]) == sums
    assert totals.num_maskable == sum(int(item.num_maskable.sum()) for item in items)
    if not spans:
        assert totals.num_masked == totals.num_positions and list(totals[6:]) == sums
    else:
        assert totals.num_masked == sum(float(item.segments.num_masked.sum()) for item in items if item.segments)
        assert list(totals[6:]) == [
            sum(float(item.segments.sums[c].sum()) for item in items if item.segments) for c in range(4)
        ]
        assert totals.masked_loss < totals.weighted_loss
    monkeypatch.setattr(parallel_state, "get_tensor_model_parallel_rank", lambda: 1)
    assert loss_totals(items).tolist() == [0.0] * 10, "tensor-parallel ranks hold the same rows"


def test_samples_whose_loss_is_not_finite() -> None:
    items = [losses_of(batch_of(seed, False, False))[2] for seed in (5, 6)]
    assert train_step._not_finite(items) == []
    items[0].sums.weighted_loss[2] = math.nan
    items[1].sums.weighted_loss[0] = math.inf
    assert train_step._not_finite(items) == [42, 40]
