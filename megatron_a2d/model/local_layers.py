"""Local layers: plain PyTorch modules for machines without Transformer Engine, exact under every layout.

Megatron's own local attention builds the score matrix.
Shapes: s sequence, b batch, h hidden, n heads, d head size; activations are [s, b, h].
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor


class CoreAttention(MegatronModule):
    """Scaled dot-product attention, bidirectional or causal. [s, b, n, d] in, [s, b, n * d] out.

    Context parallelism: each rank has a contiguous slice of the sequence, and gathers the keys and values of all ranks.
    Without a causal mask all slices cost the same, so the load needs no balancing.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,
    ):
        super().__init__(config=config)
        assert attn_mask_type in (AttnMaskType.no_mask, AttnMaskType.causal)
        self.is_causal = attn_mask_type == AttnMaskType.causal
        self.softmax_scale = softmax_scale
        self.context_parallel_group = None
        if config.context_parallel_size > 1:
            assert pg_collection is not None
            self.context_parallel_group = pg_collection.cp

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any) -> Tensor:
        """`attention_mask` [b, 1, s, all positions] is True where attention is masked, as in megatron."""
        if self.context_parallel_group is not None:
            # Backward sums the ranks' gradients of each slice and returns the sum to its owner.
            key, value = (
                gather_from_sequence_parallel_region(tensor, group=self.context_parallel_group)
                for tensor in (key, value)
            )
        allowed = None if attention_mask is None else ~attention_mask
        is_causal = self.is_causal
        if is_causal and (allowed is not None or self.context_parallel_group is not None):
            past = self._past(query.size(0), key.size(0), query.device)
            allowed, is_causal = past if allowed is None else past & allowed, False
        query_bnsd, key_bnsd, value_bnsd = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        context_bnsd = F.scaled_dot_product_attention(
            query_bnsd,
            key_bnsd,
            value_bnsd,
            attn_mask=allowed,
            is_causal=is_causal,
            scale=self.softmax_scale,
            enable_gqa=True,
        )
        return context_bnsd.permute(2, 0, 1, 3).reshape(query.size(0), query.size(1), -1)

    def _past(self, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
        """[queries, keys], True where a key is not after its query; the queries are this rank's slice."""
        group = self.context_parallel_group
        first = 0 if group is None else torch.distributed.get_rank(group) * num_queries
        queries = torch.arange(first, first + num_queries, device=device)
        return torch.arange(num_keys, device=device)[None, :] <= queries[:, None]
