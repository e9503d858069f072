"""From settings to samples: what training makes of a sample, and that a validation is the same whatever is trained."""

from __future__ import annotations

import contextlib
import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_a2d.config.model_config import ModelConfig
from megatron_a2d.config.settings import build
from megatron_a2d.config.skipped_samples import NONE_SKIPPED
from megatron_a2d.data.diffusion_samples import attention_segments, make_sample, positions_within
from megatron_a2d.diffusion.block_diffusion import corrupt_blocks
from megatron_a2d.diffusion.corruption import Corrupted, corrupt, next_token
from megatron_a2d.diffusion.loss_weighting import context
from megatron_a2d.diffusion.rng import Noise, random_cut
from megatron_a2d.training import data_setup, validation
from megatron_a2d.training.validation import VALIDATION_SEED

LENGTH, MASK, END, SEED = 40, 255, 7, 11
MODEL = ModelConfig(4, 64, 4, 2, 16, 128, 256, 4096, 1e-6, 1e6, False, mask_token_id=MASK)
TOKENS = np.where(np.isin(np.arange(LENGTH), (8, 25)), END, np.arange(LENGTH) + 100)
DOCUMENTS = np.repeat([3, 4, 5], [9, 17, 14])


class Data:
    """Three documents of 9, 17 and 14 tokens; the first two end with the token END."""

    def documents(self, sample_index: int) -> np.ndarray:
        return DOCUMENTS

    def eod_token_id(self) -> int | None:
        return END


def sample_of(index: int = 0, for_training: bool = True, **settings: Any) -> Corrupted:
    config = build({"train_data_path": "x", "seq_length": LENGTH, "global_batch_size": 4} | settings)
    return make_sample(config, MODEL, Data(), SEED, for_training)(TOKENS, index)


def same(one: Corrupted, other: Corrupted) -> bool:
    return all(
        a is b or (a is not None and b is not None and np.array_equal(a, b)) for a, b in zip(one, other, strict=True)
    )


FOR_TRAINING: dict[str, dict[str, Any]] = {
    "mask_sampling": {"mask_sampling": "exact_count"},
    "loss_weighting": {"loss_weighting": "uniform"},
    "cart": {"loss_weighting": "cart", "cart_p": 0.3},
    "random_length_prob": {"random_length_prob": 1.0},
    "complementary_masks": {"complementary_masks": True},
    "annealing": {"conversion": "annealing", "attention_annealing_iters": 9},
    "grafting": {"conversion": "grafting", "grafting_iters": 9},
}
FOR_BOTH: dict[str, dict[str, Any]] = {
    "noise_schedule": {"noise_schedule": "cosine"},
    "timestep_sampling": {"timestep_sampling": "uniform"},
    "min_timestep": {"min_timestep": 0.5},
    "label_shift": {"label_shift": False},
    "reset_attention_mask": {"reset_attention_mask": True},
    "reset_position_ids": {"reset_position_ids": True},
    "eod_mask_loss": {"eod_mask_loss": True},
    "ar": {"objective": "ar"},
    "block": {"objective": "block", "block_length": 5},
    "reset_block_grid": {"objective": "block", "block_length": 5, "reset_block_grid": True},
}


@pytest.mark.parametrize("name", FOR_TRAINING)
def test_a_validation_is_the_same_whatever_is_trained(name: str) -> None:
    """These settings change what is trained, and nothing of what is validated."""
    plain = [sample_of(index) for index in range(8)]
    assert all(same(sample_of(index, for_training=False), plain[index]) for index in range(8))
    changed = [sample_of(index, **FOR_TRAINING[name]) for index in range(8)]
    assert not all(same(*pair) for pair in zip(changed, plain, strict=True))
    valid = [sample_of(index, for_training=False, **FOR_TRAINING[name]) for index in range(8)]
    assert all(same(*pair) for pair in zip(valid, plain, strict=True))


@pytest.mark.parametrize("name", FOR_BOTH)
def test_settings_of_both(name: str) -> None:
    plain = [sample_of(index) for index in range(8)]
    trained, valid = ([sample_of(index, done, **FOR_BOTH[name]) for index in range(8)] for done in (True, False))
    assert all(same(*pair) for pair in zip(trained, valid, strict=True))
    assert not all(same(*pair) for pair in zip(trained, plain, strict=True))


def test_the_co_loss_is_trained_and_not_validated() -> None:
    """The model's context stays causal: that is what it has been given."""
    block = {"objective": "block", "block_length": 5}
    trained, valid = (sample_of(2, done, ar_loss_weight=0.5, **block) for done in (True, False))
    noise = Noise(SEED, MASK)
    assert same(trained, corrupt_blocks(TOKENS, 2, noise, 5, causal_context=True, ar_loss_weight=0.5))
    assert same(valid, corrupt_blocks(TOKENS, 2, noise, 5, causal_context=True))
    assert same(sample_of(2, **block), corrupt_blocks(TOKENS, 2, noise, 5))


def test_every_setting_of_the_noise_arrives() -> None:
    noise = Noise(SEED, MASK, "cosine", "uniform", 0.2, False, "exact_count", "cart", 0.4)
    settings = dict(
        noise_schedule="cosine", timestep_sampling="uniform", min_timestep=0.2, label_shift=False, mask_sampling="exact_count",
        loss_weighting="cart", cart_p=0.4,
    )  # fmt: skip
    for index in range(6):
        assert same(sample_of(index, **settings), corrupt(TOKENS, index, noise))


def test_a_cut_isolates_its_halves() -> None:
    """Combined with document masking; positions are counted in each part."""
    for index in range(8):
        cut = random_cut(SEED, index, LENGTH, 1.0)
        assert cut is not None
        halves = (np.arange(LENGTH) >= cut).astype(np.int64)
        assert same(sample_of(index, random_length_prob=1.0), corrupt(TOKENS, index, Noise(SEED, MASK), halves))
        isolated = sample_of(index, random_length_prob=1.0, reset_attention_mask=True, reset_position_ids=True)
        pieces = 2 * DOCUMENTS + halves
        assert isolated.documents is not None and np.array_equal(isolated.documents, pieces)
        starts = [0, *(np.flatnonzero(np.diff(pieces)) + 1), LENGTH]
        assert isolated.positions is not None
        assert isolated.positions.tolist() == [n for a, b in itertools.pairwise(starts) for n in range(b - a)]
        assert isolated.tokens[starts[:-1]].tolist() == TOKENS[starts[:-1]].tolist(), "nothing predicts a first token"
    assert attention_segments(None, None, 4) is None and positions_within(None) is None
    whole = sample_of(0, reset_position_ids=True)
    assert whole.documents is None and whole.positions is not None and whole.positions[9] == 0


def test_end_of_document_tokens_stay() -> None:
    for objective in ({}, {"objective": "ar"}, {"objective": "block", "block_length": 5}):
        plain, kept = (sample_of(4, eod_mask_loss=masked, **objective) for masked in (False, True))
        assert plain.num_maskable - kept.num_maskable == 2
        assert not kept.weights[kept.labels == END].any()
    assert same(sample_of(4, objective="ar", eod_mask_loss=True), next_token(TOKENS, None, END))


@pytest.mark.parametrize("settings", [{}, {"reset_position_ids": True}])
def test_positions_of_both_halves_of_a_block_sample(settings: dict[str, Any]) -> None:
    """Noised and clean rows of a token have one place: 0 .. L - 1 twice, or counted in each document."""
    sample = sample_of(3, objective="block", block_length=6, **settings)
    assert sample.positions is not None and len(sample.positions) == 2 * LENGTH
    expected = [*range(9), *range(17), *range(14)] if settings else list(range(LENGTH))
    assert sample.positions.tolist() == expected + expected


def test_annealing_and_grafting_follow_the_iteration() -> None:
    """Of the batch that the sample is in: 4 samples an iteration."""
    annealings = [
        sample_of(index, conversion="annealing", attention_annealing_iters=3).annealing for index in range(12)
    ]
    shares = [None if found is None else round(int(found[1]) / 2**53, 3) for found in annealings]
    assert shares == [0.333] * 4 + [0.667] * 4 + [None] * 4
    clean = [not (sample_of(n, conversion="grafting", grafting_iters=2).tokens == MASK).any() for n in range(12)]
    assert clean == [True] * 8 + [False] * 4


def test_cart_looks_at_its_own_document_alone() -> None:
    """Where documents are isolated, what is visible in another one is no context."""
    # The mean of t (1 - t) over times from 0.001 on.
    scale = (1 / 2 - 1 / 3 - (0.001**2 / 2 - 0.001**3 / 3)) / 0.999
    seen = 0
    for index in range(20):
        sample, open_one = (
            sample_of(index, loss_weighting="cart", **more) for more in ({"reset_attention_mask": True}, {})
        )
        masked = sample.tokens == MASK
        alone = np.concatenate([context(part, 0.8) for part in np.split(~masked, [9, 26])])
        assert np.append(0, sample.weights[:-1]) == pytest.approx(masked * alone / scale, rel=1e-5)
        seen += not np.array_equal(sample.weights, open_one.weights)
    assert seen > 10


def test_training_and_validation_ask_for_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation: the first samples with validation's noise, and at most as many batches as the data has."""
    asked: list[tuple[Any, ...]] = []
    made: list[dict[str, Any]] = []

    def record(dataset: Any, make: Any, **rest: Any) -> Any:
        made.append({"dataset": dataset, "make": make, **rest})
        return contextlib.nullcontext(SimpleNamespace(num_microbatches=3, of=made[-1]))

    monkeypatch.setattr(data_setup, "make_sample", lambda *arguments: asked.append(arguments) or "maker")
    monkeypatch.setattr(data_setup, "MicroBatches", record)
    monkeypatch.setattr(validation, "validate", lambda chunks, batches, *rest: (chunks, batches.of, *rest))
    monkeypatch.setattr(data_setup.parallel_state, "get_data_parallel_rank", lambda: 1)
    monkeypatch.setattr(data_setup.parallel_state, "get_data_parallel_world_size", lambda: 2)
    config = build({
        "micro_batch_size": 2, "global_batch_size": 12, "eval_iters": 5, "num_workers": 3, "seed": 77, "seq_length": 9,
        "skip_samples": ("40-44",),
    })  # fmt: skip
    ours = {
        "make": "maker",
        "micro_batch_size": 2,
        "global_batch_size": 12,
        "dp_rank": 1,
        "dp_size": 2,
        "num_workers": 3,
    }
    data, held_out = SimpleNamespace(), SimpleNamespace(num_samples=43)
    data_setup.micro_batches(config, MODEL, data, config.data.seed, 36)  # type: ignore[arg-type]
    assert asked.pop() == (config, MODEL, data, 77, True)
    assert made.pop() == {"dataset": data, "start_sample": 36, "skipped": config.skipped, **ours}

    fetched: list[int] = []
    state: Any = SimpleNamespace(chunks=["chunk"], gather_parameters=lambda: fetched.append(1))
    for batches, wanted in ((5, 3), (2, 2)):  # 43 samples fill three batches of 12
        found: Any = validation.run_validation(
            state, build(config.to_dict() | {"eval_iters": batches}), MODEL, held_out  # type: ignore[arg-type]
        )  # fmt: skip
        assert asked.pop()[2:] == (held_out, VALIDATION_SEED, False) and VALIDATION_SEED == 0
        assert made[-1] == {"dataset": held_out, "start_sample": 0, "skipped": NONE_SKIPPED, **ours}
        assert found == (["chunk"], made.pop(), wanted * 12, 12) and fetched.pop()
