"""Key-value cache of sampling: forward passes over some positions of sequences, which attend to the cached ones too.

For block diffusion it is exact: a finished block attends to nothing after it, so its keys and values never change. For
bidirectional models it is an approximation: cached entries do not reflect tokens that have changed since.

A pass computes N positions of B sequences, packed: sequence by sequence from left to right, without padding between
them. Its mask decides which of the first E positions each query attends to; what is cached of the others does not
matter. Memory for all positions is allocated in the first pass. Shapes: A the most active positions of a sequence, H
query heads, G key-value heads, R = H / G, d head size, L positions of a sequence.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


class KeyValueCache:
    """Keys and values of all layers, [slots, G, L, d] each; a sequence has a slot."""

    def __init__(self, num_slots: int, length: int):
        self.num_slots, self.length = num_slots, length
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def select(self, slots_B: torch.Tensor, active_BL: torch.Tensor, num_keys: int) -> torch.Tensor:
        """Set the positions of the next pass; `num_keys` is E. Returns their columns [B, A], each sequence's active
        ones first; those of sequences with fewer end in columns that are not active. Then set `visible`."""
        counts_B = active_BL.sum(1)
        columns_BA = (~active_BL).long().argsort(dim=1, stable=True)[:, : int(counts_B.max())]
        self._valid_BA = torch.arange(columns_BA.shape[1], device=counts_B.device) < counts_B[:, None]
        self._has_gaps = not bool(self._valid_BA.all())
        in_order = torch.equal(slots_B, torch.arange(len(slots_B), device=slots_B.device))
        self._rows = slice(0, len(slots_B)) if in_order else slots_B  # a slice of the cache is not copied
        self._places = slots_B[:, None].expand_as(columns_BA)[self._valid_BA], columns_BA[self._valid_BA]
        self._num_keys = num_keys
        self.visible: torch.Tensor | None = None  # [B, A or 1, E] bool, True where a query attends to a key; None: all
        return columns_BA

    def attend(
        self,
        layer: int,
        query_NHd: torch.Tensor,
        key_NGd: torch.Tensor,
        value_NGd: torch.Tensor,
        scale: float | None = None,
    ) -> torch.Tensor:
        """Cache the keys and values of this pass, and return attention [N, H, d] to the cached ones.

        There may be more rows than positions were selected; the last ones are then padding, and 0 in the output.
        """
        num_rows, num_active = len(query_NHd), len(self._places[0])
        keys, values = self._updated(layer, key_NGd[:num_active], value_NGd[:num_active])
        groups = keys.shape[1]
        query_BAHd = self._by_sequence(query_NHd[:num_active])
        batch, longest, heads, size = query_BAHd.shape
        # The queries that share keys are so many queries of one head: keys and values need no copies.
        query = query_BAHd.view(batch, longest, groups, -1, size).permute(0, 2, 3, 1, 4).flatten(2, 3)
        mask = self.visible
        if mask is not None:
            mask = (mask if mask.shape[1] == 1 else mask.repeat(1, heads // groups, 1))[:, None]
        mixed = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale)
        mixed_BAHd = mixed.unflatten(2, (-1, longest)).permute(0, 3, 1, 2, 4).flatten(2, 3)
        mixed_NHd = mixed_BAHd[self._valid_BA] if self._has_gaps else mixed_BAHd.flatten(0, 1)
        return mixed_NHd if num_rows == num_active else F.pad(mixed_NHd, (0, 0, 0, 0, 0, num_rows - num_active))

    def _updated(self, layer: int, key_NGd: torch.Tensor, value_NGd: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [B, G, E, d] after storing those of this pass."""
        if layer not in self._layers:
            shape = (self.num_slots, key_NGd.shape[1], self.length, key_NGd.shape[2])
            self._layers[layer] = (key_NGd.new_zeros(shape), value_NGd.new_zeros(shape))
        slots, columns = self._places
        for stored, tensor in zip(self._layers[layer], (key_NGd, value_NGd), strict=True):
            stored[slots, :, columns] = tensor
        keys, values = (stored[self._rows, :, : self._num_keys] for stored in self._layers[layer])
        return keys, values

    def _by_sequence(self, packed_NHd: torch.Tensor) -> torch.Tensor:
        """[B, A, H, d], 0 where a sequence has fewer positions."""
        if not self._has_gaps:
            return packed_NHd.unflatten(0, tuple(self._valid_BA.shape))
        rows = packed_NHd.new_zeros(*self._valid_BA.shape, *packed_NHd.shape[1:])
        rows[self._valid_BA] = packed_NHd
        return rows
