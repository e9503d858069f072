"""Corruption is data: a sample leaves this module masked, labelled and weighted, before any model sees it.

Label shift: an autoregressive model reads the token at position i from the output at position i - 1. RND1 keeps
that, so the row i - 1 of the output is judged by a masked token i, and position 0, which no row
predicts, is never masked. The shift is done here, once; later slicing along the sequence therefore
never needs a neighbour's rows. Where a sample's documents are isolated from one another, the same holds for
the first token of each.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from megatron_a2d.diffusion.loss_weighting import token_weights
from megatron_a2d.diffusion.rng import Noise
from megatron_a2d.utils.errors import UserError


class Corrupted(NamedTuple):
    """One sample. Row i of the model's output is judged by `labels[i]` with weight `weights[i]`."""

    tokens: np.ndarray  # [L] int64, the model's input
    labels: np.ndarray  # [L] int64
    weights: np.ndarray  # [L] float32, 0 where a row carries no loss
    time: float  # in (0, 1]; 1 for autoregressive samples
    num_maskable: int  # this sample's part of the loss's denominator, in tokens
    documents: np.ndarray | None = None  # [L] int64, the document of each token, where they are isolated
    positions: np.ndarray | None = None  # [L] int64, where they are not 0 .. L - 1
    annealing: np.ndarray | None = None  # [2] int64 (attention_masks.py), where not all tokens see one another yet
    levels: np.ndarray | None = None  # [L] int64 (block_diffusion.py), where blocks follow one another
    # What monitoring asks for. A span is what was masked at one time: the sample, or each of its blocks.
    spans: np.ndarray | None = None  # [n, 3] float64: time, maskable tokens, masked ones; None where none are masked
    span_of_row: np.ndarray | None = None  # [L] int64, that of the token which judges the row; None: all the first
    masked_weights: np.ndarray | None = None  # [L] float32, where `weights` holds an autoregressive co-loss too


def corrupt(
    tokens_L: np.ndarray,
    sample_index: int,
    noise: Noise,
    documents_L: np.ndarray | None = None,
    visible_token_id: int | None = None,
) -> Corrupted:
    """Mask a sample for the masked diffusion objective (MDLM; LLaDA, Nie et al. 2025).

    At time t each maskable token is hidden with probability m(t) and weighs m'(t) / m(t). Summed over a
    batch and divided by the batch's number of maskable tokens, that is an unbiased estimate of
    the NELBO in nats a token; other weights (loss_weighting.py) estimate no bound. `visible_token_id` (end of
    document) is never masked and not counted.
    """
    check_text(tokens_L, sample_index, noise)
    time = noise.time(sample_index)
    maskable_L = maskable_tokens(tokens_L, noise.label_shift, documents_L, visible_token_id)
    if noise.mask_sampling == "exact_count":
        masked_L, bound_weight = hide_exactly(noise, time, sample_index, maskable_L)
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
        # Not the rows with weight: some weights (cart) are 0 for tokens that are masked.
        spans=np.array([[time, num_maskable, np.count_nonzero(masked_L)]], dtype=np.float64),
    )


def next_token(
    tokens_L: np.ndarray, documents_L: np.ndarray | None = None, visible_token_id: int | None = None
) -> Corrupted:
    """The same sample for the autoregressive objective: nothing is masked, every next token counts 1."""
    counted_L = has_predecessor(tokens_L, documents_L)
    if visible_token_id is not None:
        counted_L &= tokens_L != visible_token_id
    labels_L, weights_L = shift(tokens_L, counted_L.astype(np.float32))
    return Corrupted(tokens_L, labels_L, weights_L, 1.0, int(np.count_nonzero(counted_L)), documents_L)


def without_loss(tokens_L: np.ndarray, documents_L: np.ndarray | None = None) -> Corrupted:
    """The same sample as it is, for what is learnt inside the model: no row is judged, every token counts."""
    return Corrupted(tokens_L, tokens_L, np.zeros(len(tokens_L), np.float32), 1.0, len(tokens_L), documents_L)


def check_text(tokens_L: np.ndarray, sample_index: int, noise: Noise) -> None:
    """UserError where the text itself holds the mask token."""
    if (tokens_L == noise.mask_token_id).any():
        raise UserError(
            f"sample {sample_index}: its text holds the mask token, id {noise.mask_token_id}; tokenise with the "
            "model's own tokenizer, or convert the model with another --mask-token-id"
        )


def maskable_tokens(
    tokens_L: np.ndarray, label_shift: bool, documents_L: np.ndarray | None, visible_token_id: int | None
) -> np.ndarray:
    """[L] bool, the tokens that may be masked; their number is the sample's part of the denominator."""
    maskable_L = has_predecessor(tokens_L, documents_L) if label_shift else np.ones(len(tokens_L), dtype=bool)
    if visible_token_id is not None:
        maskable_L &= tokens_L != visible_token_id
    return maskable_L


def has_predecessor(tokens_L: np.ndarray, documents_L: np.ndarray | None) -> np.ndarray:
    """True where the row before sees the same document: those tokens can be predicted."""
    result_L = np.ones(len(tokens_L), dtype=bool)
    result_L[0] = False
    if documents_L is not None:
        np.equal(documents_L[1:], documents_L[:-1], out=result_L[1:])
    return result_L


def shift(tokens_L: np.ndarray, weights_L: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row i is judged by token i + 1. The last row has no successor: weight 0, and any label will do."""
    labels_L, shifted_L = np.empty_like(tokens_L), np.zeros_like(weights_L)
    labels_L[:-1], labels_L[-1] = tokens_L[1:], tokens_L[0]
    shifted_L[:-1] = weights_L[1:]
    return labels_L, shifted_L


_ROUNDING = 1e-9  # of a share of times


def hide_exactly(noise: Noise, time: float, sample_index: int, maskable_L: np.ndarray) -> tuple[np.ndarray, float]:
    """(masked [L] bool, the weight of a masked token) at a time; nothing is masked where nothing can be."""
    total = int(maskable_L.sum())
    masked_L = np.zeros(len(maskable_L), dtype=bool)
    if total == 0:
        return masked_L, 0.0
    count = min(total, max(1, math.ceil(noise.functions.mask_probability(time) * total)))
    likelihood = _likelihood(noise, count, total)
    if likelihood < _ROUNDING and count < total:  # the time lies on the border of a span that no time reaches
        count += 1
        likelihood = _likelihood(noise, count, total)
    order = np.where(maskable_L, noise.uniforms(sample_index, len(maskable_L)), 2.0)
    masked_L[np.argpartition(order, count - 1)[:count]] = True
    return masked_L, 1 / (count * likelihood)


def _likelihood(noise: Noise, count: int, total: int) -> float:
    """The share of times that hide `count` of `total` tokens."""
    first, last = (max(noise.min_time, noise.functions.time(part / total)) for part in (count - 1, count))
    return (last - first) / (1 - noise.min_time)
