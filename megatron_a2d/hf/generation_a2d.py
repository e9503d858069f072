"""Diffusion sampling as a method of the model: `model.generate(input_ids, max_new_tokens=64)`.

The schedule of RND1 (Radical Numerics, 2025): all holes start masked; in each of S steps every masked position is
predicted; after step n the floor(N * (S - n) / S) of a sample's N holes with the highest entropy stay masked, the
others keep their tokens. A model of block diffusion fills its blocks one after another, each by this schedule; the S
steps are divided over the blocks in proportion to their holes. The keys and values of finished blocks, which never
change, are cached. The mask token is never predicted, and samples of a batch do not influence one another.

Shapes: B batch, L sequence, S samples in a forward pass, D hidden, V vocabulary, N masked positions of all samples.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F

from .kv_cache_a2d import KeyValueCache


def _plan(blocks_H: torch.Tensor, steps: int) -> list[tuple[int, int]]:
    """(block, number of its holes that stay masked) after each step, given the block of each hole, [H]."""
    plan: list[tuple[int, int]] = []
    num_before = steps_before = 0
    for block, size in zip(*(column.tolist() for column in blocks_H.unique(return_counts=True)), strict=True):
        num_before += size
        share = max(1, steps * num_before // len(blocks_H) - steps_before)
        steps_before = steps * num_before // len(blocks_H)
        # In fp32, as published: where the product is whole, its rounding decides.
        plan += [(block, int(torch.tensor(size) * ((share - step) / share))) for step in range(1, share + 1)]
    return plan


class DiffusionGeneration:
    """Mixin with `generate`; needs `config.mask_token_id`, `model` (tokens to hidden states) and `lm_head`."""

    config: Any
    model: Any
    lm_head: Any

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        max_new_tokens: int = 0,
        num_steps: int | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
        use_cache: bool = True,
        **ignored_by_none: Any,
    ) -> torch.Tensor:
        """Fill the holes of `input_ids` [B, L] and `max_new_tokens` more at the end; int64 [B, L + max_new_tokens].

        Mask tokens in `input_ids` are holes. New tokens after the first of `generation_config.eos_token_id` are
        padding (`pad_token_id`, else that token), as in every `generate`; a sample that has ended is not computed
        further. `attention_mask` is 0 at padding; prompts of different lengths are padded on the left, as for every
        `generate`; without it, prompts that start with `config.pad_token_id` are refused. `num_steps` defaults to
        `config.num_diffusion_steps`. Temperature 0 takes the most likely token; `top_k` 0 and `top_p` 1 filter nothing;
        `generator` makes draws reproducible. `use_cache` False computes finished blocks again in every step; the text
        is the same. Raises ValueError for arguments out of range, and for a hole at the first position, which no
        position predicts under the label shift.
        """
        given = sorted(name for name, value in ignored_by_none.items() if value is not None)
        if given:
            raise ValueError(f"generate() of a diffusion model has no {', '.join(given)}")
        steps = self.config.num_diffusion_steps if num_steps is None else num_steps
        if steps < 1 or max_new_tokens < 0 or temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
            raise ValueError("need num_steps >= 1, max_new_tokens >= 0, temperature >= 0, top_k >= 0, 0 < top_p <= 1")
        tokens_BL, visible_BL = self._canvas(input_ids, attention_mask, max_new_tokens)
        masked_BL = (tokens_BL == self.config.mask_token_id) & visible_BL
        blocks_BL = torch.zeros_like(tokens_BL)
        if self.config.block_length:
            blocks_BL = (visible_BL.long().cumsum(1) - 1) // self.config.block_length
        plans = [_plan(blocks_L[masked_L], steps) for blocks_L, masked_L in zip(blocks_BL, masked_BL, strict=True)]
        blocks = _CachedBlocks(self, visible_BL) if use_cache and self.config.block_length else None
        for current in itertools.zip_longest(*plans, fillvalue=(-1, 0)):
            block_B, num_left_B = torch.tensor(current, device=tokens_BL.device).unbind(1)
            due_BL = masked_BL & (blocks_BL == block_B[:, None])
            due_BL &= (due_BL.sum(1) > num_left_B)[:, None]
            if not due_BL.any():
                continue
            # The positions whose output predicts those that are due.
            needed_BL = F.pad(due_BL[:, 1:], (0, 1)) if self.config.label_shift else due_BL
            if blocks is None:
                hidden_BLD = self.model(tokens_BL, attention_mask=None if visible_BL.all() else visible_BL)[0]
                hidden_ND = hidden_BLD[needed_BL]
            else:
                hidden_ND = blocks.hidden_states(tokens_BL, needed_BL, block_B)
            logprobs_NV = self._log_probabilities(hidden_ND, temperature, top_k, top_p)
            entropies_BL = torch.full(tokens_BL.shape, torch.inf, device=tokens_BL.device)
            entropies_BL[due_BL] = -(logprobs_NV.exp() * logprobs_NV.nan_to_num(neginf=0.0)).sum(-1)
            ranks_BL = entropies_BL.argsort(dim=1, stable=True).argsort(dim=1)
            decided_BL = due_BL & (ranks_BL < (due_BL.sum(1) - num_left_B)[:, None])
            chosen_NV = logprobs_NV[decided_BL[due_BL]]
            if temperature == 0:
                tokens_BL[decided_BL] = chosen_NV.argmax(-1)
            else:
                tokens_BL[decided_BL] = torch.multinomial(chosen_NV.exp(), 1, generator=generator)[:, 0]
            masked_BL &= ~decided_BL
            masked_BL &= ~self._has_ended(tokens_BL, masked_BL, max_new_tokens)[:, None]
        return self._padded_behind_end(tokens_BL, max_new_tokens)

    def _end_tokens(self) -> list[int]:
        # transformers does not always read generation_config.json; config.json has only one end token.
        ends = (getattr(self, "generation_config", None) or self.config).eos_token_id
        return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)

    def _has_ended(self, tokens_BL: torch.Tensor, masked_BL: torch.Tensor, max_new_tokens: int) -> torch.Tensor:
        """[B] bool: samples with an end-of-text token among the new ones and nothing masked before it."""
        is_end_BL = torch.isin(tokens_BL, tokens_BL.new_tensor(self._end_tokens()))
        is_end_BL[:, : tokens_BL.shape[1] - max_new_tokens] = False
        return (is_end_BL & (masked_BL.cumsum(1) == 0)).any(1)

    def _padded_behind_end(self, tokens_BL: torch.Tensor, max_new_tokens: int) -> torch.Tensor:
        """Replace new tokens after a sample's first end-of-text token by padding; holes in the prompt are unchanged."""
        ends = self._end_tokens()
        if not ends or max_new_tokens == 0:
            return tokens_BL
        padding = (getattr(self, "generation_config", None) or self.config).pad_token_id
        new_BN = tokens_BL[:, -max_new_tokens:]
        ended_BN = torch.isin(new_BN, new_BN.new_tensor(ends))
        new_BN[ended_BN.cumsum(1) - ended_BN.long() > 0] = ends[0] if padding is None else padding
        return tokens_BL

    def _canvas(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, max_new_tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and padding mask [B, L + new], validated."""
        visible_BL = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        if input_ids.dim() != 2 or visible_BL.shape != input_ids.shape:
            raise ValueError("input_ids and attention_mask must both be [batch, sequence]")
        if max_new_tokens and not visible_BL[:, -1].all():
            raise ValueError("prompts are padded on the right; pad on the left, so that new tokens follow them")
        new_BN = input_ids.new_full((len(input_ids), max_new_tokens), self.config.mask_token_id)
        tokens_BL = torch.cat([input_ids, new_BN], dim=1).long()
        visible_BL = torch.cat([visible_BL, torch.ones_like(new_BN, dtype=torch.bool)], dim=1)
        if attention_mask is None and self._is_padded_left(input_ids):
            raise ValueError(
                f"prompts start with padding (token {self.config.pad_token_id}) and there is no attention_mask, so the "
                "model would read it as text; pass the tokenizer's attention_mask, or a mask of ones if it is text"
            )
        if self.config.label_shift:
            before_BL = torch.cat([torch.zeros_like(visible_BL[:, :1]), visible_BL[:, :-1]], dim=1)
            if ((tokens_BL == self.config.mask_token_id) & visible_BL & ~before_BL).any():
                raise ValueError("a prompt starts with a hole, which no position predicts; put a token before it")
        return tokens_BL, visible_BL

    def _is_padded_left(self, input_ids: torch.Tensor) -> bool:
        """Whether prompts start with padding: with several such tokens, or with different numbers of them. A single one
        before every prompt may be part of the text."""
        if self.config.pad_token_id is None or not input_ids.numel():
            return False
        leading_B = (input_ids == self.config.pad_token_id).int().cumprod(dim=1).sum(1)
        return bool(leading_B.max() > min(1, int(leading_B.min())))

    def _log_probabilities(self, hidden_ND: torch.Tensor, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
        """Log-probabilities [N, V] in fp32 without the mask token, after temperature, top-k, then top-p."""
        logits_NV = self.lm_head(hidden_ND).float()
        logits_NV[:, self.config.mask_token_id] = -torch.inf
        if temperature > 0:
            logits_NV = logits_NV / temperature
        if 0 < top_k < logits_NV.shape[-1]:
            smallest = logits_NV.topk(top_k, dim=-1).values[:, -1:]
            logits_NV = logits_NV.masked_fill(logits_NV < smallest, -torch.inf)
        if top_p < 1:
            values, indices = logits_NV.sort(dim=-1, descending=True)
            probabilities = values.softmax(-1)
            # A token is dropped once the likelier ones alone reach the mass top_p; the first is always kept.
            values = values.masked_fill(probabilities.cumsum(-1) - probabilities >= top_p, -torch.inf)
            logits_NV = torch.full_like(logits_NV, -torch.inf).scatter(-1, indices, values)
        return logits_NV.log_softmax(-1)


class _CachedBlocks:
    """Forward passes of block diffusion over the current blocks, with a cache of the finished ones."""

    def __init__(self, model: DiffusionGeneration, visible_BL: torch.Tensor):
        self.model, self.visible_BL = model, visible_BL
        self.positions_BL = (visible_BL.long().cumsum(1) - 1).clamp(min=0)
        self.cache = KeyValueCache(*visible_BL.shape)
        self.first_B = visible_BL.new_zeros(len(visible_BL), dtype=torch.long)  # position that is not cached

    def hidden_states(self, tokens_BL: torch.Tensor, needed_BL: torch.Tensor, block_B: torch.Tensor) -> torch.Tensor:
        """Hidden states [N, D] of the needed positions, in the samples that have some.

        Computed are the current block and what has been finished since the last pass.
        """
        length = self.model.config.block_length
        samples_S = needed_BL.any(1).nonzero()[:, 0]
        start_S, positions_SL = block_B[samples_S] * length, self.positions_BL[samples_S]
        active_SL = (positions_SL >= self.first_B[samples_S, None]) & (positions_SL < start_S[:, None] + length)
        active_SL = (active_SL | needed_BL[samples_S]) & self.visible_BL[samples_S]
        self.first_B[samples_S] = start_S
        num_keys = int(active_SL.any(0).nonzero().max()) + 1
        columns_SA = self.cache.select(samples_S, active_SL, num_keys)
        mask_SAE = self.model.model.block_mask(positions_SL.gather(1, columns_SA), positions_SL[:, :num_keys], start_S)
        self.cache.visible = mask_SAE & self.visible_BL[samples_S, None, :num_keys]
        hidden_1ND = self.model.model(
            tokens_BL[samples_S][active_SL][None], position_ids=positions_SL[active_SL][None], cache=self.cache
        )[0]
        return hidden_1ND[0][needed_BL[samples_S][active_SL]]
