"""--complementary-masks: each text twice, under a mask and its complement."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_a2d.config.settings import build
from megatron_a2d.data.dataloader import make_batch
from megatron_a2d.data.diffusion_samples import TextPairs, make_sample
from megatron_a2d.diffusion.block_diffusion import corrupt_blocks
from megatron_a2d.diffusion.corruption import Corrupted, corrupt
from megatron_a2d.diffusion.rng import Noise

MASK, LENGTH, FIRST_TIME = 99, 24, 1e-3
TOKENS = np.arange(LENGTH)
NOISE = Noise(seed=5, mask_token_id=MASK, min_timestep=FIRST_TIME, label_shift=False, complementary=True)
OBJECTIVES: dict[str, Callable[[int], Corrupted]] = {
    "mdlm": lambda index: corrupt(TOKENS, index, NOISE),
    "block": lambda index: corrupt_blocks(TOKENS, index, NOISE, 5),
}
each_objective = pytest.mark.parametrize("name", OBJECTIVES)


def masks(sample: Corrupted) -> np.ndarray:
    return sample.tokens[:LENGTH] == MASK


@each_objective
def test_a_pair_masks_every_token(name: str) -> None:
    twice = 0
    for index in range(0, 4000, 2):
        one, other = OBJECTIVES[name](index), OBJECTIVES[name](index + 1)
        assert (masks(one) | masks(other)).all()
        assert one.noise_segments is not None and other.noise_segments is not None
        assert one.noise_segments[:, 0] + other.noise_segments[:, 0] == pytest.approx(1 + FIRST_TIME)
        twice += int((masks(one) & masks(other)).sum())
    assert twice < 3 * FIRST_TIME * 2000 * LENGTH, "both halves mask a token with the probability min_timestep"


@each_objective
def test_complements_are_samples_like_all_others(name: str) -> None:
    """A token's expected weight, which is what makes the loss unbiased, is the same in both halves, and without pairs."""
    plain = Noise(seed=6, mask_token_id=MASK, min_timestep=FIRST_TIME, label_shift=False)
    make = {"mdlm": corrupt, "block": lambda *given: corrupt_blocks(*given, 5)}[name]

    def mean_loss(samples: list[Corrupted]) -> float:
        """Of a model whose loss grows with the masked fraction around the token."""
        return float(np.mean([sample.weights[:LENGTH].sum() / LENGTH * masks(sample).mean() for sample in samples]))

    count = 20_000
    first = mean_loss([OBJECTIVES[name](2 * index) for index in range(count)])
    second = mean_loss([OBJECTIVES[name](2 * index + 1) for index in range(count)])
    expected = mean_loss([make(TOKENS, index, plain) for index in range(count)])
    assert first == pytest.approx(expected, rel=0.02) and second == pytest.approx(expected, rel=0.02)


def test_each_text_twice_in_a_row() -> None:
    class Texts:
        def tokens(self, sample_index: int, /) -> np.ndarray:
            return np.full(LENGTH, sample_index)

        def documents(self, sample_index: int, /) -> np.ndarray:
            return np.full(LENGTH, 10 * sample_index)

        def eod_token_id(self) -> int | None:
            return 3

    pairs = TextPairs(Texts())
    batch = make_batch(pairs, lambda tokens, index: corrupt(tokens, index, NOISE, pairs.documents(index)), 4, 4)
    assert batch.labels[:, 0].tolist() == [2, 2, 3, 3] and batch.documents is not None
    assert batch.documents[:, 0].tolist() == [20, 20, 30, 30] and pairs.eod_token_id() == 3
    run = {"train_iters": 4, "global_batch_size": 2}
    assert (build({**run, "complementary_masks": True}).num_texts, build(run).num_texts) == (4, 8)


@pytest.mark.parametrize("objective", ["mdlm", "block"])
def test_a_pair_is_cut_alike(objective: str) -> None:
    """Under --random-length-prob: blocks that begin anew at another position would have other times."""
    blocks = {"block_length": 5, "reset_block_grid": True} if objective == "block" else {}
    settings = {"objective": objective, "complementary_masks": True, "random_length_prob": 1.0, "seq_length": LENGTH}
    texts: Any = SimpleNamespace(documents=lambda index: np.zeros(LENGTH, np.int64), eod_token_id=lambda: None)
    model: Any = SimpleNamespace(mask_token_id=MASK)
    make = make_sample(build(settings | {"label_shift": False} | blocks), model, texts, 7, for_training=True)
    for index in range(0, 400, 2):
        one, other = make(TOKENS, index), make(TOKENS, index + 1)
        assert (masks(one) | masks(other)).all()
