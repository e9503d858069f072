"""Mistakes found in other codebases: each test fails with the mistaken formula, which is given next to ours.

Their pipelines with more than two stages, and tensor-parallel ranks without tokens, are covered by the layouts PP4 and
TP2 x PP2 of tests/parity/test_layouts.py.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_a2d.data.dataloader import MicroBatches
from megatron_a2d.diffusion.corruption import corrupt
from megatron_a2d.diffusion.rng import Noise
from tests.unit.exact_nelbo import exact_nelbo

LENGTH, MASK = 64, 999
NOISE = Noise(seed=3, mask_token_id=MASK)
TOKENS = np.arange(LENGTH)


class Tokens:
    """A dataset whose sample i holds the numbers i, i + 1, ..."""

    def tokens(self, sample_index: int, /) -> np.ndarray:
        return np.arange(sample_index, sample_index + LENGTH) % 900


def batches(dp_rank: int = 0, dp_size: int = 1, start_sample: int = 0) -> MicroBatches:
    return MicroBatches(
        Tokens(), lambda tokens, index: corrupt(tokens, index, NOISE), micro_batch_size=2, global_batch_size=8,
        dp_rank=dp_rank, dp_size=dp_size, start_sample=start_sample, num_workers=0,
    )  # fmt: skip


def test_shifting_keeps_the_length() -> None:
    """Cutting the last row off leaves a length that tensor and context parallelism do not divide."""
    theirs = TOKENS[1:]
    assert len(theirs) % 2 != 0
    sample = corrupt(TOKENS, 0, NOISE)
    assert len(sample.tokens) == len(sample.labels) == len(sample.weights) == LENGTH


def test_labels_are_shifted_before_the_sequence_is_cut() -> None:
    """Slicing first gives the last row of every piece a wrong label, or none."""
    whole = corrupt(TOKENS, 0, NOISE).labels
    sliced_first = np.concatenate([np.append(piece[1:], piece[:1]) for piece in np.split(TOKENS, 4)])
    assert np.count_nonzero(whole != sliced_first) >= 3
    pieces = np.split(whole, 4)
    assert all(piece[-1] == TOKENS[(number + 1) * 16] for number, piece in enumerate(pieces[:-1]))


def test_pieces_of_a_sequence_have_masks_of_their_own() -> None:
    """A generator that every context-parallel rank seeds alike masks the same places of every piece."""
    theirs = [np.random.default_rng(0).random(16) < 0.5 for _ in range(4)]
    assert all(np.array_equal(theirs[0], mask) for mask in theirs)
    noise = Noise(seed=3, mask_token_id=MASK, label_shift=False)
    for index in range(8):
        ours = np.split(corrupt(TOKENS, index, noise).tokens == MASK, 4)
        if 0.2 < noise.time(index) < 0.8:
            assert not all(np.array_equal(ours[0], mask) for mask in ours[1:])


def test_noise_is_the_same_on_one_node_and_on_four() -> None:
    """A generator for each rank makes the masks, and so the loss curve, depend on the number of ranks."""

    def seeded_by_rank(dp_size: int) -> dict[int, bytes]:
        generators = [np.random.default_rng(rank) for rank in range(dp_size)]
        return {index: generators[index % dp_size].random(LENGTH).tobytes() for index in range(8)}

    assert seeded_by_rank(1) != seeded_by_rank(4)

    def ours(dp_size: int) -> dict[int, bytes]:
        seen = {}
        for rank in range(dp_size):
            for batch in (next(b) for b in [batches(rank, dp_size)] for _ in range(4 // dp_size)):
                for row, index in enumerate(batch.sample_index.tolist()):
                    seen[index] = batch.tokens[row].numpy().tobytes()
        return seen

    assert ours(1) == ours(2) == ours(4) and len(ours(1)) == 8


def test_noise_goes_on_after_a_restart() -> None:
    """A generator whose state is not in the checkpoint restarts: the first batch after a restart repeats old noise."""
    theirs = [np.random.default_rng(1234).random(LENGTH) for _ in ("first start", "restart")]
    assert np.array_equal(*theirs)
    unbroken = batches()
    first, *_ = (next(unbroken) for _ in range(4))
    after = next(unbroken)
    resumed = next(batches(start_sample=8))
    assert torch.equal(resumed.tokens, after.tokens) and torch.equal(resumed.times, after.times)
    assert not torch.equal(resumed.weights > 0, first.weights > 0)


def test_one_denominator() -> None:
    """A mean for each micro-batch of masked tokens, then a mean of means, depends on how the batch is cut."""
    samples = [corrupt(TOKENS, index, NOISE) for index in range(8)]
    losses = np.random.default_rng(0).random((8, LENGTH))
    weights = np.stack([sample.weights for sample in samples])

    def mean_of_means(size: int) -> float:
        cuts = [slice(start, start + size) for start in range(0, 8, size)]
        return float(np.mean([(weights[cut] * losses[cut]).sum() / (weights[cut] > 0).sum() for cut in cuts]))

    def ours(size: int) -> float:
        cuts = [slice(start, start + size) for start in range(0, 8, size)]
        maskable = sum(sample.num_maskable for sample in samples)
        return float(sum((weights[cut] * losses[cut]).sum() for cut in cuts) / maskable)

    assert mean_of_means(1) != pytest.approx(mean_of_means(4), rel=1e-2)
    assert ours(1) == pytest.approx(ours(2), rel=1e-12) == pytest.approx(ours(8), rel=1e-12)


def test_weights_are_those_of_the_time_not_of_the_realised_ratio() -> None:
    """1 / (masked / length) instead of 1 / t: with n maskable tokens the estimate comes out n / (n + 1) of the bound."""
    n, vocabulary = 5, 4
    tokens = np.array([0, 1, 2, 3, 1])
    logits = torch.randn(n, vocabulary + 1, generator=torch.Generator().manual_seed(0))
    noise = Noise(seed=1, mask_token_id=vocabulary, label_shift=False, min_timestep=1e-6)
    exact = exact_nelbo(lambda tokens_BL: logits.expand(len(tokens_BL), -1, -1), tokens, noise)
    losses = torch.nn.functional.cross_entropy(logits.double(), torch.from_numpy(tokens), reduction="none").numpy()
    ours, theirs = [], []
    for index in range(20_000):
        sample = corrupt(tokens, index, noise)
        masked = sample.tokens == vocabulary
        ours.append((sample.weights * losses).sum() / n)
        theirs.append((masked * losses).sum() / masked.sum() if masked.any() else 0.0)
    assert np.mean(ours) == pytest.approx(exact, rel=0.03)
    assert np.mean(theirs) == pytest.approx(exact * n / (n + 1), rel=0.03)
    assert np.mean(theirs) < 0.9 * exact
