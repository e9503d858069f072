"""Masking of training samples: the model's inputs, labels and loss weights, made before any model sees the sample.

All of it is a pure function of (tokens, sample index, settings), numpy on the CPU. `corrupt` masks each maskable token
independently (Bernoulli), or `mask_exact_count` a fixed number of them, each with the inverse of its probability as
the loss weight, so that both are unbiased for the same bound.

Label shift: an autoregressive model predicts the token at position i from the hidden state at position i - 1, and RND1
keeps that. So the label at position i - 1 is token i, and the first token, which no position predicts, is never masked.
The labels are shifted here, once; slicing along the sequence later needs no neighbouring positions. Where the documents
of a sample are isolated from one another, the same holds for the first token of each.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from megatron_a2d.diffusion.loss_weighting import token_weights
from megatron_a2d.diffusion.rng import Noise
from megatron_a2d.utils.errors import UserError


class Corrupted(NamedTuple):
    """One sample. `labels[i]` is the target of the model's output at position i, with loss weight `weights[i]`."""

    tokens: np.ndarray  # [L] int64, the model's input
    labels: np.ndarray  # [L] int64
    weights: np.ndarray  # [L] float32, 0 where a position has no loss
    time: float  # in (0, 1]; 1 for autoregressive samples
    num_maskable: int  # this sample's contribution to the loss's denominator, in tokens
    documents: np.ndarray | None = None  # [L] int64, the document of each token, where they are isolated
    positions: np.ndarray | None = None  # [L] int64, where they are not 0 .. L - 1
    annealing: np.ndarray | None = None  # [2] int64 (attention_masks.py), while attention is annealed
    levels: np.ndarray | None = None  # [L] int64 (block_diffusion.py), for block diffusion
    # For metrics. A noise segment is what is masked at one time: the whole sample, or one of its blocks.
    noise_segments: np.ndarray | None = None  # [n, 3] float64: time, num maskable, num masked; None: nothing is masked
    segment_of_position: np.ndarray | None = None  # [L] int64, the segment of the label's token; None: all 0
    masked_weights: np.ndarray | None = None  # [L] float32, `weights` without the autoregressive co-loss; None: equal


def corrupt(
    tokens_L: np.ndarray,
    sample_index: int,
    noise: Noise,
    documents_L: np.ndarray | None = None,
    visible_token_id: int | None = None,
) -> Corrupted:
    """Mask a sample for the masked diffusion objective (MDLM; LLaDA, Nie et al. 2025).

    At time t each maskable token is masked with probability m(t) and has the loss weight m'(t) / m(t). Summed over
    a batch and divided by the batch's number of maskable tokens, the loss is an unbiased estimate of the NELBO in
    nats/token; other weights (loss_weighting.py) estimate no bound. `visible_token_id` (end of document) is never
    masked and not counted.
    """
    check_text(tokens_L, sample_index, noise)
    (time,) = noise.times(sample_index)
    maskable_L = maskable_tokens(tokens_L, noise.label_shift, documents_L, visible_token_id)
    if noise.mask_sampling == "exact_count":
        masked_L, bound_weight = mask_exact_count(noise, time, sample_index, maskable_L)
    else:
        masked_L = noise.uniforms(sample_index, len(tokens_L)) < noise.functions.mask_probability(time)
        masked_L &= maskable_L
        bound_weight = noise.functions.weight(time)
    weights_L = token_weights(noise, bound_weight, masked_L, documents_L)
    labels_L = tokens_L
    if noise.label_shift:
        labels_L, weights_L = shift(tokens_L, weights_L)
    num_maskable = int(np.count_nonzero(maskable_L))
    return Corrupted(
        tokens=np.where(masked_L, noise.mask_token_id, tokens_L),
        labels=labels_L,
        weights=weights_L,
        time=time,
        num_maskable=num_maskable,
        documents=documents_L,
        # Counted by mask, not by weight: a masked token's weight may be 0 (cart).
        noise_segments=np.array([[time, num_maskable, np.count_nonzero(masked_L)]], dtype=np.float64),
    )


def next_token(
    tokens_L: np.ndarray, documents_L: np.ndarray | None = None, visible_token_id: int | None = None
) -> Corrupted:
    """A sample for the autoregressive objective: nothing is masked, every next token has weight 1."""
    counted_L = has_predecessor(tokens_L, documents_L)
    if visible_token_id is not None:
        counted_L &= tokens_L != visible_token_id
    labels_L, weights_L = shift(tokens_L, counted_L.astype(np.float32))
    return Corrupted(tokens_L, labels_L, weights_L, 1.0, int(np.count_nonzero(counted_L)), documents_L)


def without_loss(tokens_L: np.ndarray, documents_L: np.ndarray | None = None) -> Corrupted:
    """A sample without labels, for losses computed inside the model (grafting): all weights 0, every token counts."""
    return Corrupted(tokens_L, tokens_L, np.zeros(len(tokens_L), np.float32), 1.0, len(tokens_L), documents_L)


def check_text(tokens_L: np.ndarray, sample_index: int, noise: Noise) -> None:
    """UserError if the text itself contains the mask token."""
    if (tokens_L == noise.mask_token_id).any():
        raise UserError(
            f"sample {sample_index}: its text contains the mask token, id {noise.mask_token_id}; tokenise with the "
            "model's own tokenizer, or convert the model with another --mask-token-id"
        )


def maskable_tokens(
    tokens_L: np.ndarray, label_shift: bool, documents_L: np.ndarray | None, visible_token_id: int | None
) -> np.ndarray:
    """[L] bool, the tokens that may be masked; their number is the sample's contribution to the denominator."""
    maskable_L = has_predecessor(tokens_L, documents_L) if label_shift else np.ones(len(tokens_L), dtype=bool)
    if visible_token_id is not None:
        maskable_L &= tokens_L != visible_token_id
    return maskable_L


def has_predecessor(tokens_L: np.ndarray, documents_L: np.ndarray | None) -> np.ndarray:
    """[L] bool, True where the previous position is in the same document, so that it can predict the token."""
    result_L = np.ones(len(tokens_L), dtype=bool)
    result_L[0] = False
    if documents_L is not None:
        np.equal(documents_L[1:], documents_L[:-1], out=result_L[1:])
    return result_L


def shift(tokens_L: np.ndarray, weights_L: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Labels and weights [L] under the label shift: position i predicts token i + 1.

    The last position has no successor: its weight is 0 and its label arbitrary.
    """
    labels_L, shifted_L = np.empty_like(tokens_L), np.zeros_like(weights_L)
    labels_L[:-1], labels_L[-1] = tokens_L[1:], tokens_L[0]
    shifted_L[:-1] = weights_L[1:]
    return labels_L, shifted_L


_ROUNDING = 1e-9  # probabilities below this are rounding errors


def mask_exact_count(noise: Noise, time: float, sample_index: int, maskable_L: np.ndarray) -> tuple[np.ndarray, float]:
    """Mask ceil(m(t) n) of n maskable tokens, uniformly chosen; returns (masked [L] bool, a masked token's weight).

    The weight 1 / (count * P(count)) makes the loss an unbiased estimate of the NELBO's terms for the counts that times
    in [min_timestep, 1] reach; smaller counts are never drawn. Nothing is masked where no token is maskable.
    """
    total = int(maskable_L.sum())
    masked_L = np.zeros(len(maskable_L), dtype=bool)
    if total == 0:
        return masked_L, 0.0
    count = min(total, max(1, math.ceil(noise.functions.mask_probability(time) * total)))
    probability = _count_probability(noise, count, total)
    if probability < _ROUNDING and count < total:  # the interval of this count's times ends at min_timestep
        count += 1
        probability = _count_probability(noise, count, total)
    order = np.where(maskable_L, noise.uniforms(sample_index, len(maskable_L)), 2.0)
    masked_L[np.argpartition(order, count - 1)[:count]] = True
    return masked_L, 1 / (count * probability)


def _count_probability(noise: Noise, count: int, total: int) -> float:
    """The probability, over times, that exactly `count` of `total` tokens are masked."""
    first, last = (max(noise.min_timestep, noise.functions.time(number / total)) for number in (count - 1, count))
    return (last - first) / (1 - noise.min_timestep)
