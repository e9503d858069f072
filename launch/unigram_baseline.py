"""Unigram baseline: the cross-entropy of a model that knows only token frequencies, which training has to beat."""

from __future__ import annotations

import numpy as np
import torch

from megatron_a2d.data.indexed_dataset import TokenFile
from megatron_a2d.diffusion.loss import Estimate, mean_estimate
from megatron_a2d.utils.errors import UserError

_GROUP = 1 << 22  # tokens processed at a time: bounds memory


def unigram_counts(file: TokenFile, vocab_size: int) -> np.ndarray:
    """Occurrences of each token, [vocab_size] int64. All ids of `file` must be below `vocab_size`."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for tokens in file.chunks():
        counts += np.bincount(tokens, minlength=vocab_size)
    return counts


def unigram_entropy(train: TokenFile, valid: TokenFile, vocab_size: int, sample_length: int) -> Estimate:
    """Cross-entropy of `valid` under the unigram model of `train`, in nats/token.

    The model is add-one smoothed, p(v) = (count(v) + 1) / (N + vocab_size). The mean is over
    samples of `sample_length` tokens, and so is its standard error: tokens within a sample are not independent.
    """
    num_samples = valid.num_tokens // sample_length
    if num_samples == 0:
        raise UserError(f"{valid.prefix}: its {valid.num_tokens} tokens do not fill one sample of {sample_length}")
    counts = unigram_counts(train, vocab_size)
    surprise = np.log(counts.sum() + vocab_size) - np.log(counts + 1.0)
    means = np.empty(num_samples)
    group = max(1, _GROUP // sample_length)
    for start in range(0, num_samples, group):
        stop = min(start + group, num_samples)
        tokens = valid.read(start * sample_length, (stop - start) * sample_length)
        means[start:stop] = surprise[tokens].reshape(stop - start, sample_length).mean(axis=1)
    return mean_estimate(torch.from_numpy(means))
