"""Self-attention of the local layers: megatron's, with few passes over memory between its products on a CPU.

Norms of queries and keys, where the model has them, and rotary embedding (Su et al. 2021) are one autograd function,
whose input is the QKV tensor and whose outputs are what attention reads: `normed_and_rotated`, or `rotated`. Shapes:
s sequence, b batch, n query heads, g KV heads (groups), d head size. A group's rows of the QKV tensor are its queries,
its key and its value: m = n / g + 2 heads.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from megatron_a2d.model.rms_norm import backward_of_norm, inverse_rms


class LocalSelfAttention(SelfAttention):
    """megatron.core's self-attention, for the local layers."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None, **options: Any) -> tuple[Tensor, Any]:
        """`rotary_pos_emb` among the options: angles [s, 1 or b, 1, d]."""
        shares_groups = self.config.num_query_groups < self.config.tensor_model_parallel_size
        packed = options.get("packed_seq_params") is not None
        if hidden_states.device.type != "cpu" or packed or shares_groups:
            return super().forward(hidden_states, attention_mask, **options)  # type: ignore[no-any-return]
        qkv, _ = self.linear_qkv(hidden_states)
        qkv = qkv.unflatten(-1, (self.num_query_groups_per_partition, -1, self.hidden_size_per_attention_head))
        norms, angles = (self.q_layernorm, self.k_layernorm), options["rotary_pos_emb"]
        if norms[0] is None:
            query, key, value = rotated(qkv, angles)
        else:
            query, key, value = normed_and_rotated(qkv, norms[0].weight, norms[1].weight, angles, norms[0].eps)
        recomputes = self.checkpoint_core_attention and self.training
        attend = self._checkpointed_attention_forward if recomputes else self.core_attention
        output: tuple[Tensor, Any] = self.linear_proj(attend(query, key, value, attention_mask))
        return output


def normed_and_rotated(
    qkv_sbgmd: Tensor, query_weight_d: Tensor, key_weight_d: Tensor, angles: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [s, b, n, d]; keys and values [s, b, g, d], the latter a view."""
    turns = _turns(angles, qkv_sbgmd)
    query, key, value = _NormedAndRotated.apply(qkv_sbgmd, query_weight_d, key_weight_d, *turns, eps)
    return query.flatten(2, 3), key.flatten(2, 3), value


def rotated(qkv_sbgmd: Tensor, angles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `normed_and_rotated`, without norms."""
    query, key, value = _Rotated.apply(qkv_sbgmd, *_turns(angles, qkv_sbgmd))
    return query.flatten(2, 3), key.flatten(2, 3), value


def _turns(angles: Tensor, qkv: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines, broadcastable to heads of the QKV tensor."""
    return angles.cos().to(qkv.dtype).unsqueeze(-2), angles.sin().to(qkv.dtype).unsqueeze(-2)


class _NormedAndRotated(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, qkv: Tensor, query_weight: Tensor, key_weight: Tensor, cosines: Tensor, sines: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        heads = qkv[..., :-1, :]
        weight = torch.cat([query_weight.expand(heads.size(-2) - 1, -1), key_weight[None]])  # of each head
        scale = inverse_rms(heads, eps)
        normed = (heads * scale).mul_(weight).to(qkv.dtype)
        ctx.save_for_backward(qkv, weight, scale, cosines, sines)
        query, key = (_turned(part, cosines, sines) for part in _queries_and_keys(normed))
        return query, key, qkv[..., -1, :]

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, query_gradient: Tensor, key_gradient: Tensor, value_gradient: Tensor
    ) -> tuple[Tensor | None, ...]:
        qkv, weight, scale, cosines, sines = ctx.saved_tensors
        heads = qkv[..., :-1, :]
        gradient = torch.empty_like(heads, memory_format=torch.contiguous_format)
        for part, out in zip((query_gradient, key_gradient), _queries_and_keys(gradient), strict=True):
            _turned(part, cosines, sines, back=True, out=out)
        result = torch.empty_like(qkv)
        result[..., -1, :] = value_gradient
        by_head = backward_of_norm(gradient, heads, weight, scale, out=result[..., :-1, :]).sum((0, 1, 2))
        by_head = by_head.to(weight.dtype)
        return result, by_head[:-1].sum(0), by_head[-1], None, None, None


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, qkv: Tensor, cosines: Tensor, sines: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cosines, sines)
        query, key = (_turned(part, cosines, sines) for part in _queries_and_keys(qkv[..., :-1, :]))
        return query, key, qkv[..., -1, :]

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, query_gradient: Tensor, key_gradient: Tensor, value_gradient: Tensor
    ) -> tuple[Tensor | None, ...]:
        cosines, sines = ctx.saved_tensors
        parts = query_gradient, key_gradient, value_gradient.unsqueeze(-2)
        result = torch.cat(parts, dim=-2)
        for part, out in zip(parts[:2], _queries_and_keys(result[..., :-1, :]), strict=True):
            _turned(part, cosines, sines, back=True, out=out)
        return result, None, None


def _queries_and_keys(heads: Tensor) -> tuple[Tensor, Tensor]:
    """Views [s, b, g, n / g, d] and [s, b, g, 1, d]."""
    return heads[..., :-1, :], heads[..., -1:, :]


def _turned(x: Tensor, cosines: Tensor, sines: Tensor, back: bool = False, out: Tensor | None = None) -> Tensor:
    """R x, or with `back` R^T x: component i and component i + d / 2 are a pair."""
    first, second = x.chunk(2, dim=-1)
    sine_first, sine_second = sines.chunk(2, dim=-1)
    result = torch.mul(
        x, cosines, out=torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    )
    result_first, result_second = result.chunk(2, dim=-1)
    if back:
        result_first.addcmul_(second, sine_second)
        result_second.addcmul_(first, sine_first, value=-1)
    else:
        result_first.addcmul_(second, sine_first, value=-1)
        result_second.addcmul_(first, sine_second)
    return result
