"""Self-speculative decoding of block diffusion models that were trained with an autoregressive co-loss.

Such a model predicts a block in two ways: its noised form bidirectionally, all tokens at once, and its finished form
causally, each token from those before it. One drafts and the other verifies: the causal pass over a drafted block shows
at every position what autoregressive decoding would write there. The longest agreeing prefix is accepted, and the token
after it is the causal pass's own (speculative decoding, Leviathan et al. 2023; with one model, Zhang et al. 2023). So
the text is that of autoregressive decoding, token for token, in fewer forward passes wherever drafts agree.

Above temperature 0 both draw a position's token with the same random number, so the text is the autoregressive sample
with these numbers. Shapes: S sequences of a forward pass, L positions, N predicted positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_a2d.diffusion.model_interface import Model, Request
from megatron_a2d.diffusion.sampling.batch_state import BatchState, Canvas, Inputs, output_positions, scatter
from megatron_a2d.diffusion.sampling.token_scores import Scores, scorer
from megatron_a2d.diffusion.sampling_options import SamplingOptions


class SelfSpeculation(BatchState):
    """Each sequence drafts the rest of its current block in one forward pass, and verifies it in the next."""

    def __init__(self, inputs: Inputs):
        super().__init__(inputs)
        _check(self.canvas, self.options)
        # Any token but the mask stands for a draft where there is none.
        self.drafts_BL = torch.full_like(self.tokens_BL, int(self.mask_token_id == 0))
        self.has_draft_B = torch.zeros_like(self.num_cached_B, dtype=torch.bool)

    def advance(self, model: Model, sequences: list[int]) -> Tensor:
        """Run one forward pass over `sequences`; returns the positions whose tokens it decided, [B, L]."""
        length = self.options.block_length
        positions_L = torch.arange(self.tokens_BL.shape[1], device=self.masked_BL.device)
        sequences_S = torch.tensor(sequences, device=self.masked_BL.device)
        masked_SL = self.masked_BL[sequences_S]
        end_S = (masked_SL.long().argmax(1) // length + 1) * length
        in_block_SL = masked_SL & (positions_L < end_S[:, None])
        # A draft of one token saves nothing: without one, verifying decides that token.
        verifies_S1 = (self.has_draft_B[sequences_S] | (in_block_SL.sum(1) == 1))[:, None]
        predicted_SL = in_block_SL | (masked_SL & verifies_S1 & (positions_L == end_S[:, None]))
        needed_SL = torch.where(
            verifies_S1, output_positions(predicted_SL, True), output_positions(predicted_SL, self.label_shift)
        )
        drafts_SL = self.drafts_BL[sequences_S]
        tokens_SL = torch.where(verifies_S1 & in_block_SL, drafts_SL, self.tokens_BL[sequences_S])
        window = None if self.options.cache == "none" else self.block_window(sequences_S, end_S, needed_SL)
        uniforms_N = None if self.uniforms_BL is None else self.uniforms_BL[sequences_S][predicted_SL]
        request = Request(tokens_SL, self.canvas.visible[sequences_S], needed_SL, window)
        scores = Scores(*model(request, scorer(self.options, self.mask_token_id, uniforms_N)))
        found_SL = scatter(scores.tokens, predicted_SL, 0)
        differs_SL = in_block_SL & (found_SL != drafts_SL)
        accepted_SL = predicted_SL & verifies_S1 & (differs_SL.cumsum(1) - differs_SL.long() == 0)
        self._record(sequences_S, verifies_S1[:, 0], end_S, differs_SL, masked_SL & ~accepted_SL)
        self.drafts_BL[sequences_S] = torch.where(predicted_SL & ~verifies_S1, found_SL, drafts_SL)
        return self.unmask(sequences, sequences_S, accepted_SL, found_SL)

    def _record(
        self, sequences_S: Tensor, verifies_S: Tensor, end_S: Tensor, differs_SL: Tensor, left_SL: Tensor
    ) -> None:
        """Which sequences now have a draft, and how many positions have final keys and values in the cache.

        After verifying they are those up to the first token that differs, but no further than the block of the next
        draft, which overwrites its own.
        """
        length = self.options.block_length
        right_S = torch.where(differs_SL.any(1), differs_SL.long().argmax(1), end_S)
        next_start_S = left_SL.long().argmax(1) // length * length
        self.num_cached_B[sequences_S] = torch.where(verifies_S, right_S.minimum(next_start_S), end_S - length)
        self.has_draft_B[sequences_S] = ~verifies_S


def _check(canvas: Canvas, options: SamplingOptions) -> None:
    if not options.aligned_blocks:
        raise ValueError("self-speculative decoding needs a block diffusion model: set block_length and aligned_blocks")
    given_BL = canvas.visible & ~canvas.editable
    if not given_BL[:, 0].all() or (given_BL[:, 1:] & canvas.editable[:, :-1]).any():
        raise ValueError("self-speculative decoding continues texts; holes before given tokens need another sampler")
