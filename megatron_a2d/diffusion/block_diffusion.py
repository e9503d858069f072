"""Block diffusion: text generated block by block, each block by masked diffusion (BD3LM, Arriola et al. 2025).

The model reads a sample of L tokens twice, as one input of 2 L positions: a noised copy, then a clean one. A noised
position attends to its own block of the noised copy and to the clean copy of all earlier blocks. A clean position
attends to clean positions up to the end of its block or, with an autoregressive co-loss, up to itself. So one forward
pass gives every block the context that it has when text is generated block by block.

Label shift: the position before predicts token i. For the first token of a block that is clean position i - 1, which
has seen all earlier blocks and nothing of this one; for the others it is noised position i - 1.

Attention is encoded as one number per position, its level (attention_masks.py). In sampling there is no noised copy,
and `BlockModel.levels` numbers the positions of the text itself.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from megatron_a2d.diffusion.corruption import Corrupted, check_text, has_predecessor, maskable_tokens, shift
from megatron_a2d.diffusion.loss_weighting import token_weights
from megatron_a2d.diffusion.model_interface import Model, Reduce, Request
from megatron_a2d.diffusion.rng import Noise


def corrupt_blocks(
    tokens_L: np.ndarray,
    sample_index: int,
    noise: Noise,
    block_length: int,
    documents_L: np.ndarray | None = None,
    visible_token_id: int | None = None,
    causal_context: bool = False,
    ar_loss_weight: float = 0.0,
    grid_positions_L: np.ndarray | None = None,
) -> Corrupted:
    """A sample as 2 L positions; each block is masked at its own time.

    The weighted sum over the number of maskable tokens is an unbiased estimate of the block NELBO in nats/token, an
    upper bound on the negative log-likelihood: the sum over blocks of a block's NELBO given the earlier ones.
    `ar_loss_weight` is the weight of the next-token loss of the clean copy, added under the same denominator.
    `grid_positions_L`: positions from which blocks are counted, 0 where a document begins a grid of its own; None: one
    grid for the sample.
    """
    check_text(tokens_L, sample_index, noise)
    length = len(tokens_L)
    positions_L = np.arange(length)
    maskable_L = maskable_tokens(tokens_L, noise.label_shift, documents_L, visible_token_id)
    starts_L = positions_L - (positions_L if grid_positions_L is None else grid_positions_L) % block_length
    starts, block_of_L, sizes = np.unique(starts_L, return_inverse=True, return_counts=True)
    times = noise.times(sample_index, len(starts), None if grid_positions_L is None else length)
    probability_L = np.repeat([noise.functions.mask_probability(time) for time in times], sizes)
    masked_L = (noise.uniforms(sample_index, length) < probability_L) & maskable_L
    weights_L = np.concatenate([
        token_weights(noise, noise.functions.weight(time), masked_L[start : start + size])
        for start, size, time in zip(starts, sizes, times, strict=True)
    ])  # fmt: skip
    next_L, next_weights_L = shift(tokens_L, weights_L)
    if noise.label_shift:
        closes_block_L = np.append(np.diff(block_of_L) > 0, True)
        labels_L, noised_weights_L = next_L, np.where(closes_block_L, np.float32(0), next_weights_L)
        clean_weights_L = next_weights_L - noised_weights_L
    else:
        labels_L, noised_weights_L, clean_weights_L = tokens_L, weights_L, np.zeros_like(weights_L)
    weights_2L = np.concatenate([noised_weights_L, clean_weights_L])
    masked_weights_2L = weights_2L if ar_loss_weight else None
    if ar_loss_weight:
        counted_L = has_predecessor(tokens_L, documents_L)
        if visible_token_id is not None:
            counted_L &= tokens_L != visible_token_id
        clean_weights_L = (
            clean_weights_L + np.float32(ar_loss_weight) * shift(tokens_L, counted_L.astype(np.float32))[1]
        )
        weights_2L = np.concatenate([noised_weights_L, clean_weights_L])
    label_position_L = np.minimum(positions_L + 1, length - 1) if noise.label_shift else positions_L
    counts = (np.bincount(block_of_L, weights=chosen_L) for chosen_L in (maskable_L, masked_L))
    return Corrupted(
        tokens=np.concatenate([np.where(masked_L, noise.mask_token_id, tokens_L), tokens_L]),
        labels=np.concatenate([labels_L, next_L]),
        weights=weights_2L,
        time=float(np.mean(times)),
        num_maskable=int(maskable_L.sum()),
        documents=None if documents_L is None else np.tile(documents_L, 2),
        positions=np.tile(positions_L, 2),
        levels=np.concatenate([2 * starts_L, 2 * (positions_L if causal_context else starts_L) + 1]),
        noise_segments=np.stack([times, *counts], axis=1),
        segment_of_position=np.tile(block_of_L[label_position_L], 2),
        masked_weights=masked_weights_2L,
    )


class BlockModel:
    """A block diffusion `Model` for sampling: the attention levels follow from where the masks are.

    Blocks before the first one with a mask are context, as the clean copy is in training. Each of the others attends to
    itself and to the context, so the block being filled does not attend to later ones.
    """

    def __init__(self, model: Model, mask_token_id: int, block_length: int, causal_context: bool):
        self._model, self._mask_token_id = model, mask_token_id
        self._block_length, self._causal_context = block_length, causal_context

    def __call__(self, request: Request, reduce: Reduce) -> tuple[Tensor, ...]:
        if request.levels is None:
            request = request._replace(levels=self.levels(request.tokens))
        return self._model(request, reduce)

    def levels(self, tokens_BL: Tensor) -> Tensor:
        """Attention levels of the text being generated, [B, L] int64."""
        positions_L = torch.arange(tokens_BL.size(1), device=tokens_BL.device)
        starts_L = positions_L // self._block_length * self._block_length
        masked_BL = tokens_BL == self._mask_token_id
        start_B = masked_BL.long().argmax(1) // self._block_length * self._block_length
        # Without a mask all is finished, a short last block too.
        is_context_BL = (positions_L < start_B[:, None]) | ~masked_BL.any(1, keepdim=True)
        return torch.where(is_context_BL, 2 * (positions_L if self._causal_context else starts_L) + 1, 2 * starts_L)
