"""Forward passes with a `Window` (diffusion/model_interface.py): packed positions, and the cache that they attend to.

Packed, positions need no padding, however many each sequence computes; only attention sees them by sequence.
"""

from __future__ import annotations

import torch

from megatron_a2d.diffusion.attention_masks import block_causal_mask
from megatron_a2d.diffusion.model_interface import Request, Window
from megatron_a2d.hf.kv_cache_a2d import KeyValueCache


class PackedWindows:
    """Packs requests, and owns their cache, whose memory is allocated once for sequences of equal or shorter length."""

    def __init__(self) -> None:
        self._cache: KeyValueCache | None = None

    def pack(self, request: Request, window: Window) -> tuple[Request, KeyValueCache]:
        """The active positions as one sequence [1, N], and the cache, which has them selected and has their mask.

        Every sequence's first pass computes all that later ones attend to, so entries of earlier batches are
        overwritten before they are read.
        """
        active_BL, length = window.active, request.tokens.shape[1]
        cache, num_slots = self._cache, int(window.slots.max()) + 1
        if cache is None or cache.length < length or cache.num_slots < num_slots:
            cache = self._cache = KeyValueCache(num_slots, length)
        # Under full attention all keys are read; in block diffusion none after the current block.
        num_keys = length if request.levels is None else int(active_BL.any(0).nonzero().max()) + 1
        columns_BA = cache.select(window.slots, active_BL, num_keys)
        visible = request.visible[:, None, :num_keys]
        if request.levels is not None:
            visible = visible & block_causal_mask(request.levels.gather(1, columns_BA), request.levels[:, :num_keys])
        cache.visible = None if bool(visible.all()) else visible
        positions_BL = torch.arange(length, device=active_BL.device).expand_as(active_BL)
        packed = Request(
            tokens=request.tokens[active_BL][None],
            visible=request.visible[active_BL][None],
            needed=request.needed[active_BL][None],
            positions=positions_BL[active_BL][None],
        )
        return packed, cache
