"""Local layers: plain PyTorch modules for machines without Transformer Engine, exact under every layout.

Megatron's own local attention builds the score matrix.
Shapes: s sequence, b batch, h hidden, n heads, d head size; activations are [s, b, h].
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_a2d.model.masked_attention import Mask, dense_mask, no_mask, sparse_attention
from megatron_a2d.model.matrix_products import is_widened


class AttentionCache(Protocol):
    """What sampling passes instead of a mask: attends to cached keys and values too (hf/kv_cache_a2d.py)."""

    length: int  # of the longest sequence

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Attention [s, n, d] of query [s, n, d] to key and value [s, n or fewer, d], which it stores."""
        ...


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
        self.layer_number = layer_number
        self.is_causal = attn_mask_type == AttnMaskType.causal
        self.softmax_scale = softmax_scale
        self.context_parallel_group = None
        if config.context_parallel_size > 1:
            assert pg_collection is not None
            self.context_parallel_group = pg_collection.cp

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | AttentionCache | None, **_: Any
    ) -> Tensor:
        """`attention_mask` [b, F, all positions] is encoded (diffusion/attention_masks.py); None: full attention."""
        if attention_mask is not None and not isinstance(attention_mask, Tensor):
            query, key, value = (tensor.squeeze(1) for tensor in (query, key, value))
            attended = attention_mask.attend(self.layer_number, query, key, value, self.softmax_scale)
            return attended.flatten(1).unsqueeze(1)
        group, num_queries = self.context_parallel_group, query.size(0)
        if group is not None:
            # Backward sums the ranks' gradients of each slice and returns the sum to its owner.
            key, value = (gather_from_sequence_parallel_region(tensor, group=group) for tensor in (key, value))
        dtype = query.dtype
        if is_widened(query):  # torch's backward pass is slow too, and the tiles' products
            query, key, value = (tensor.float() for tensor in (query, key, value))
        mask = None
        if attention_mask is not None or (self.is_causal and group is not None):
            first = 0 if group is None else torch.distributed.get_rank(group) * num_queries
            encoded = no_mask(key.size(0), key.device) if attention_mask is None else attention_mask
            mask = Mask(encoded, slice(first, first + num_queries), self.is_causal)
            context = sparse_attention(query, key, value, mask, self.softmax_scale)
            if context is not None:
                return context.flatten(2).to(dtype)
        query_bnsd, key_bnsd, value_bnsd = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        context_bnsd = F.scaled_dot_product_attention(
            query_bnsd,
            key_bnsd,
            value_bnsd,
            attn_mask=None if mask is None else dense_mask(mask),
            is_causal=self.is_causal and mask is None,
            scale=self.softmax_scale,
            enable_gqa=True,
        )
        return context_bnsd.permute(2, 0, 1, 3).reshape(num_queries, query.size(1), -1).to(dtype)
