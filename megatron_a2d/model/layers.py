"""Layers in plain torch, for machines without Transformer Engine, and exact under every layout.

Megatron's own local norm refuses sequence parallelism, and its local attention builds the score matrix.
Shapes: s sequence, b batch, h hidden, n heads, d head size; activations are [s, b, h].
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor


class RMSNorm(torch.nn.RMSNorm):
    """Root mean square norm (Zhang & Sennrich 2019) over the last axis."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        # Under sequence parallelism each rank sees other tokens: its gradient must be summed over the ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class CoreAttention(MegatronModule):
    """Scaled dot-product attention, bidirectional or causal. [s, b, n, d] in, [s, b, n * d] out."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **_: Any,
    ):
        super().__init__(config=config)
        assert attn_mask_type in (AttnMaskType.no_mask, AttnMaskType.causal)
        self.is_causal = attn_mask_type == AttnMaskType.causal
        self.softmax_scale = softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any) -> Tensor:
        assert attention_mask is None, "the mask type is fixed when the layer is built"
        query_bnsd, key_bnsd, value_bnsd = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        context_bnsd = F.scaled_dot_product_attention(
            query_bnsd,
            key_bnsd,
            value_bnsd,
            is_causal=self.is_causal,
            scale=self.softmax_scale,
            enable_gqa=True,
        )
        return context_bnsd.permute(2, 0, 1, 3).reshape(query.size(0), query.size(1), -1)
