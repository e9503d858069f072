"""Held-out evaluation on selected tokens: cloze tests, and infilling of one hole per sample."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from megatron.core import parallel_state

from megatron_a2d.data.dataloader import MakeSample, MicroBatches
from megatron_a2d.diffusion.corruption import Corrupted, next_token
from megatron_a2d.diffusion.rng import Stream, uniforms
from megatron_a2d.study.load_run import LoadedRun
from megatron_a2d.training.validation import VALIDATION_SEED, ValidationResult, validate


def evaluate(loaded: LoadedRun, make: MakeSample) -> ValidationResult:
    """Cross-entropy and accuracy at the loss positions of `make`, over all held-out samples. Collective."""
    training, data = loaded.config.training, loaded.valid_data
    count = data.num_samples // training.global_batch_size * training.global_batch_size
    loaded.state.gather_parameters()
    with MicroBatches(
        data, make, micro_batch_size=training.micro_batch_size, global_batch_size=training.global_batch_size,
        dp_rank=parallel_state.get_data_parallel_rank(), dp_size=parallel_state.get_data_parallel_world_size(),
    ) as batches:  # fmt: skip
        return validate(loaded.state.chunks, batches, count, training.global_batch_size)


def supervise_only(asked: Callable[[np.ndarray], np.ndarray]) -> MakeSample:
    """Next-token samples whose loss is restricted to the tokens where `asked` is True."""

    def make(tokens: np.ndarray, index: int) -> Corrupted:
        sample = next_token(tokens)
        # Position i predicts token i + 1; the last position predicts none.
        weights = sample.weights * np.append(asked(tokens)[1:], False)
        return sample._replace(weights=weights, num_maskable=int(weights.sum()))

    return make


def holes(loaded: LoadedRun, length: int) -> MakeSample:
    """Samples with one hole each, of `length` tokens at an index that depends only on the sample."""
    mask, shifted = loaded.model_config.mask_token_id, loaded.config.diffusion.label_shift
    assert mask is not None

    def make(tokens: np.ndarray, index: int) -> Corrupted:
        first = 1 + int(uniforms(VALIDATION_SEED, Stream.STUDY_HOLE, index, 1)[0] * (len(tokens) - length))
        hole = np.zeros(len(tokens), dtype=bool)
        hole[first : first + length] = True
        labels, is_target = (np.roll(tokens, -1), np.roll(hole, -1)) if shifted else (tokens, hole)
        return Corrupted(np.where(hole, mask, tokens), labels, is_target.astype(np.float32), 1.0, int(hole.sum()))

    return make
