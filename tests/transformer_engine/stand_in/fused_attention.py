"""Fused attention, forward and backward: batches [s, b, h, d] or [b, s, h, d] and packed sequences [t, h, d].

With fewer key heads than query heads each serves a group. Softmax statistics are log-sums of exponentials, as
context parallelism reads them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.transformer_engine.stand_in.enums import (
    DType,
    NVTE_Bias_Type,
    NVTE_Fused_Attn_Backend,
    NVTE_Mask_Type,
    NVTE_QKV_Layout,
    NVTE_Softmax_Type,
    is_thd,
)
from tests.transformer_engine.stand_in.fp8_casts import check

# cuDNN has no fp32; here it is let through, so that results can be compared to the last digits.
TYPES = (torch.float16, torch.bfloat16, torch.float32)


def get_fused_attn_backend(
    is_training: bool, q_dtype: Any, kv_dtype: Any, qkv_layout: Any, bias_type: Any, attn_mask_type: Any,
    softmax_type: Any, p_dropout: float, num_attn_heads: int, num_gqa_groups: int, max_seqlen_q: int,
    max_seqlen_kv: int, head_dim_qk: int, head_dim_v: int, window_size_left: int, window_size_right: int,
    return_max_logit: bool, cuda_graph: bool, deterministic: bool,
) -> Any:  # fmt: skip
    """A narrow reading of what cuDNN takes: head sizes that are multiples of 8 up to 256, THD with padding masks."""
    fits = (
        q_dtype in (DType.kFloat16, DType.kBFloat16, DType.kFloat32)
        and head_dim_qk % 8 == 0 and head_dim_v % 8 == 0 and head_dim_qk <= 256
        and bias_type == NVTE_Bias_Type.NVTE_NO_BIAS
        and (not is_thd(qkv_layout) or "PADDING" in NVTE_Mask_Type(attn_mask_type).name)
        and softmax_type == NVTE_Softmax_Type.NVTE_VANILLA_SOFTMAX
        and (window_size_left, window_size_right) in ((-1, -1), (-1, 0))
    )  # fmt: skip
    return NVTE_Fused_Attn_Backend.NVTE_F16_arbitrary_seqlen if fits else NVTE_Fused_Attn_Backend.NVTE_No_Backend


def fused_attn_fwd(
    max_seqlen_q: int, max_seqlen_kv: int, is_training: bool, attn_scale: float, p_dropout: float, set_zero: bool,
    qkv_layout: Any, bias_type: Any, attn_mask_type: Any, softmax_type: Any, window_size: Any,
    bottom_right_diagonal: bool, cu_seqlens_q: Tensor, cu_seqlens_kv: Tensor, Q: Tensor, K: Tensor, V: Tensor,
    fake_dtype: Any, cu_seqlens_q_padded: Any, cu_seqlens_kv_padded: Any, page_table_k: Any, page_table_v: Any,
    s_quantizer: Any, o_quantizer: Any, Bias: Any, SoftmaxOffset: Any, rng_gen: Any, rng_elts_per_thread: int,
    return_max_logit: bool, cuda_graph: bool,
) -> list[Tensor]:  # fmt: skip
    """[output, statistics, random state], in evaluation too: 2.20's Python counts on it, 2.12's does not look."""
    check(p_dropout == 0 and s_quantizer is None and o_quantizer is None, "dropout and FP8 attention are not offered")
    _check_operands(max_seqlen_q, cu_seqlens_q, Q, K, V, qkv_layout)
    output = torch.zeros(*Q.shape[:-1], V.size(-1), dtype=Q.dtype)
    packed, heads, repeats = is_thd(qkv_layout), Q.size(-2), Q.size(-2) // K.size(-2)
    batch = cu_seqlens_q.numel() - 1
    statistics = torch.zeros(Q.size(0), heads, 1) if packed else torch.zeros(batch, heads, max_seqlen_q, 1)
    queries = [_sequences(qkv_layout, t, cu_seqlens_q, cu_seqlens_q_padded, True) for t in (output, Q)]
    keys = [_sequences(qkv_layout, t, cu_seqlens_kv, cu_seqlens_kv_padded, False) for t in (K, V)]
    rows = _rows_of_statistics(qkv_layout, statistics, cu_seqlens_q, cu_seqlens_q_padded)
    for row, place, q, k, v in zip(rows, *queries, *keys, strict=True):
        k, v = (tensor.repeat_interleave(repeats, 1) for tensor in (k, v))
        scores = _scores(q, k, attn_scale, attn_mask_type)
        lse = scores.logsumexp(-1)
        place.copy_(torch.einsum("hqk,khd->qhd", (scores - lse[..., None]).exp(), v.float()))
        row.copy_(lse)
    return [output, statistics, torch.zeros(2, dtype=torch.int64)]


def fused_attn_bwd(
    max_seqlen_q: int, max_seqlen_kv: int, attn_scale: float, p_dropout: float, set_zero: bool, qkv_layout: Any,
    bias_type: Any, attn_mask_type: Any, softmax_type: Any, window_size: Any, bottom_right_diagonal: bool,
    deterministic: bool, cu_seqlens_q: Tensor, cu_seqlens_kv: Tensor, Q: Tensor, K: Tensor, V: Tensor, out: Tensor,
    dO: Tensor, fake_dtype: Any, dqkv_type: Any, Aux_CTX_Tensors: list[Tensor], cu_seqlens_q_padded: Any,
    cu_seqlens_kv_padded: Any, s_quantizer: Any, dp_quantizer: Any, dqkv_quantizer: Any, cuda_graph: bool,
) -> list[Any]:  # fmt: skip
    """[dQ, dK, dV, None, None]."""
    _check_operands(max_seqlen_q, cu_seqlens_q, Q, K, V, qkv_layout)
    check(dO.shape == out.shape, "gradient of the output")
    dQ, dK, dV = (torch.zeros(t.shape, dtype=t.dtype) for t in (Q, K, V))
    groups, repeats = K.size(-2), Q.size(-2) // K.size(-2)
    queries = [_sequences(qkv_layout, t, cu_seqlens_q, cu_seqlens_q_padded, True) for t in (Q, out, dO, dQ)]
    keys = [_sequences(qkv_layout, t, cu_seqlens_kv, cu_seqlens_kv_padded, False) for t in (K, V, dK, dV)]
    rows = _rows_of_statistics(qkv_layout, Aux_CTX_Tensors[0], cu_seqlens_q, cu_seqlens_q_padded)
    for lse, q, o, do, dq, k, v, dk, dv in zip(rows, *queries, *keys, strict=True):
        every_k, every_v = (tensor.repeat_interleave(repeats, 1) for tensor in (k, v))
        p = (_scores(q, every_k, attn_scale, attn_mask_type) - lse[..., None]).exp()
        dp = torch.einsum("qhd,khd->hqk", do.float(), every_v.float())
        delta = (do.float() * o.float()).sum(-1).T
        ds = p * (dp - delta[..., None]) * attn_scale
        dq.copy_(torch.einsum("hqk,khd->qhd", ds, every_k.float()))
        dk.copy_(_sum_groups(torch.einsum("hqk,qhd->khd", ds, q.float()), groups))
        dv.copy_(_sum_groups(torch.einsum("hqk,qhd->khd", p, do.float()), groups))
    return [dQ, dK, dV, None, None]


def _check_operands(max_q: int, cu_seqlens_q: Tensor, q: Tensor, k: Tensor, v: Tensor, layout: Any) -> None:
    check(q.dtype in TYPES and q.dtype == k.dtype == v.dtype, "q, k and v of one type that attention has")
    check(cu_seqlens_q.dtype == torch.int32, "cu_seqlens must be int32")
    check(int(cu_seqlens_q.diff().max()) <= max_q, "a sequence is longer than max_seqlen")
    check(q.size(-2) % k.size(-2) == 0, "query heads must be a multiple of key heads")
    if is_thd(layout):
        check(q.dim() == 3 and int(cu_seqlens_q[-1]) <= q.size(0), "sequences beyond the tensor")


def _sequences(layout: Any, tensor: Tensor, bounds: Tensor, offsets: Tensor | None, is_query: bool) -> list[Tensor]:
    """The sequences of a batch as views [s, h, d]. offsets: where they begin, if padding lies between them."""
    form = NVTE_QKV_Layout(layout).name.removeprefix("NVTE_").split("_")[0 if is_query else -1]
    form = form.replace("3", "").replace("2", "")
    lengths = bounds.diff().tolist()
    if form == "THD":
        starts = (bounds if offsets is None else offsets)[:-1].tolist()
        return [tensor[start : start + length] for start, length in zip(starts, lengths, strict=True)]
    batch_dim = 1 if form == "SBHD" else 0
    return [tensor.select(batch_dim, i)[:length] for i, length in enumerate(lengths)]


def _rows_of_statistics(layout: Any, statistics: Tensor, bounds: Tensor, offsets: Tensor | None) -> list[Tensor]:
    """Views [h, s] of [t, h, 1] or [b, h, s, 1]."""
    if is_thd(layout):
        return [rows[..., 0].T for rows in _sequences(layout, statistics, bounds, offsets, True)]
    lengths = bounds.diff().tolist()
    return [rows[:, :length, 0] for rows, length in zip(statistics, lengths, strict=True)]


def _scores(q: Tensor, k: Tensor, scale: float, mask_type: Any) -> Tensor:
    """[h, sq, sk] fp32, of queries and keys with as many heads."""
    scores = torch.einsum("qhd,khd->hqk", q.float(), k.float()) * scale
    name = NVTE_Mask_Type(mask_type).name
    if "CAUSAL" not in name:
        return scores
    shift = k.size(0) - q.size(0) if "BOTTOM_RIGHT" in name else 0
    past = torch.ones(q.size(0), k.size(0), dtype=torch.bool).tril(shift)
    return scores.masked_fill(~past, float("-inf"))


def _sum_groups(tensor: Tensor, groups: int) -> Tensor:
    return tensor.view(tensor.size(0), groups, tensor.size(1) // groups, -1).sum(2)
