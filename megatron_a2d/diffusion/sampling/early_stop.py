"""Early stopping: which masked positions lie after an end-of-text token and need not be unmasked."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor


def after_eos(tokens_BL: Tensor, masked_BL: Tensor, editable_BL: Tensor, end_token_ids: Collection[int]) -> Tensor:
    """Masked positions after the end of their hole's text, [B, L] bool.

    A hole's text ends at its first end-of-text token. Once nothing before that token is masked, the masked positions
    after it in the same hole are never shown.
    """
    end_ids = torch.tensor(list(end_token_ids), dtype=torch.long, device=tokens_BL.device)
    ends_BL = editable_BL & ~masked_BL & torch.isin(tokens_BL, end_ids)
    starts_BL = editable_BL & ~torch.nn.functional.pad(editable_BL[:, :-1], (1, 0))
    final_ends_BL = ends_BL & (_count_before(masked_BL, starts_BL) == 0)
    return masked_BL & (_count_before(final_ends_BL, starts_BL) > 0)


def _count_before(marked_BL: Tensor, starts_BL: Tensor) -> Tensor:
    """The number of marked positions to the left in the same hole; holes begin where `starts` is True."""
    before_BL = marked_BL.long().cumsum(1) - marked_BL.long()
    return before_BL - before_BL.masked_fill(~starts_BL, 0).cummax(1).values


def kept_positions(tokens: list[int], editable: list[bool], end_token_ids: Collection[int]) -> list[int]:
    """The positions to show: all but those of a hole from its first end-of-text token on."""
    kept = []
    has_ended = False
    for position, (token, hole) in enumerate(zip(tokens, editable, strict=True)):
        has_ended = hole and (has_ended or token in end_token_ids)
        if not has_ended:
            kept.append(position)
    return kept
