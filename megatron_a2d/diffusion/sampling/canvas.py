"""The batch that is denoised: given tokens, holes, and padding at the right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Canvas(NamedTuple):
    """A batch to denoise, all [B, L]."""

    tokens: Tensor  # int64; masks in the holes, padding at the right
    editable: Tensor  # bool, True in the holes
    visible: Tensor  # bool, False at the padding

    def to(self, device: torch.device) -> Canvas:
        return Canvas(*(tensor.to(device) for tensor in self))


def make_canvas(rows: Sequence[Sequence[int]], mask_token_id: int, pad_token_id: int = 0) -> Canvas:
    """Stack rows of tokens, padded at the right; every mask token in a row is a hole.

    The published package leaves one more token, padding, after the holes: to reproduce its output, append it.
    """
    shape = (len(rows), max(len(row) for row in rows))
    tokens_BL = torch.full(shape, pad_token_id, dtype=torch.long)
    visible_BL = torch.zeros(shape, dtype=torch.bool)
    for index, row in enumerate(rows):
        tokens_BL[index, : len(row)] = torch.tensor(row, dtype=torch.long)
        visible_BL[index, : len(row)] = True
    return Canvas(tokens_BL, visible_BL & (tokens_BL == mask_token_id), visible_BL)
