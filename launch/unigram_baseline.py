"""What a model that knows only token frequencies would score: the mark that training has to beat."""

from __future__ import annotations

import numpy as np
import torch

from megatron_a2d.data.indexed_dataset import TokenFile
from megatron_a2d.diffusion.loss import Estimate, mean_estimate
from megatron_a2d.utils.errors import UserError

_GROUP = 1 << 22  # tokens looked at in one go: bounds memory


def unigram_counts(file: TokenFile, vocab_size: int) -> np.ndarray:
    """How often each token occurs, [vocab_size] int64. `file` holds ids below `vocab_size` only."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for tokens in file.chunks():
        counts += np.bincount(tokens, minlength=vocab_size)
    return counts


def unigram_entropy(train: TokenFile, valid: TokenFile, vocab_size: int, piece_length: int) -> Estimate:
    """Cross-entropy of `valid` under the unigram model of `train`, in nats a token.

    The model is add-one smoothed, p(v) = (count(v) + 1) / (N + vocab_size). The mean is over pieces of
    `piece_length` tokens (samples), and so is its standard error: tokens within a piece are not independent.
    """
    num_pieces = valid.num_tokens // piece_length
    if num_pieces == 0:
        raise UserError(f"{valid.prefix}: its {valid.num_tokens} tokens do not fill one piece of {piece_length}")
    counts = unigram_counts(train, vocab_size)
    surprise = np.log(counts.sum() + vocab_size) - np.log(counts + 1.0)
    means = np.empty(num_pieces)
    group = max(1, _GROUP // piece_length)
    for start in range(0, num_pieces, group):
        stop = min(start + group, num_pieces)
        tokens = valid.read(start * piece_length, (stop - start) * piece_length)
        means[start:stop] = surprise[tokens].reshape(stop - start, piece_length).mean(axis=1)
    return mean_estimate(torch.from_numpy(means))
