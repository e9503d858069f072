"""What Transformer Engine 2.20 asks of its extension in another way than 2.12.

Each function and enumeration here is put over the one of the same name.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from tests.transformer_engine.stand_in import fused_attention, quantized, router_kernels
from tests.transformer_engine.stand_in.enums import NVTE_QKV_Format, NVTE_QKV_Layout
from tests.transformer_engine.stand_in.fp8_casts import check

NVTE_Fused_Attn_Backend = IntEnum(
    "NVTE_Fused_Attn_Backend", {"NVTE_No_Backend": -1, "NVTE_F16_arbitrary_seqlen": 1, "NVTE_FP8": 2}
)
NVTERoutingMapFormat = IntEnum("NVTERoutingMapFormat", {"BYTEMAP": 0, "BITMAP_U8": 1})
NVTEQBHistogramMode = IntEnum("NVTEQBHistogramMode", {"TWO_KERNEL": 0, "FUSED_ATOMIC": 1})
NVTEScalingMode = IntEnum("NVTEScalingMode", {"NVTE_DELAYED_TENSOR_SCALING": 0, "NVTE_MXFP8_1D_SCALING": 1})


def create_empty_quantized_tensor(
    quantizer: Any, shape: list[int], dtype: torch.dtype, device: Any, pin_memory: bool
) -> Any:
    """A tensor to be filled; quantizers made their own before."""
    return quantized._empty(quantizer, tuple(shape), dtype)


def get_fused_attn_backend(parameters: Any) -> tuple[Any, str]:
    """The choice, and why there is none."""
    p = parameters
    backend: int = fused_attention.get_fused_attn_backend(
        p.is_training, p.qkv_dtype, p.qkv_dtype, p.qkv_layout, p.bias_type, p.attn_mask_type, p.softmax_type, p.dropout,
        p.num_attn_heads, p.num_gqa_groups, p.max_seqlen_q, p.max_seqlen_kv, p.head_dim_qk, p.head_dim_v,
        p.window_size_left, p.window_size_right, p.return_max_logit, p.cuda_graph, p.deterministic,
    )  # fmt: skip
    is_offered = backend != NVTE_Fused_Attn_Backend.NVTE_No_Backend
    return NVTE_Fused_Attn_Backend(backend), "" if is_offered else "the stand-in does not offer it"


def fused_attn_fwd(
    max_seqlen_q: int, max_seqlen_kv: int, is_training: bool, attn_scale: float, p_dropout: float, set_zero: bool,
    qkv_layout: Any, o_format: Any, qkv_scale_inv_format: Any, *rest: Any,
) -> list[Tensor]:  # fmt: skip
    """The output's format is a separate argument."""
    _check_format(qkv_layout, o_format)
    return fused_attention.fused_attn_fwd(
        max_seqlen_q, max_seqlen_kv, is_training, attn_scale, p_dropout, set_zero, qkv_layout, *rest
    )


def fused_attn_bwd(
    max_seqlen_q: int, max_seqlen_kv: int, attn_scale: float, p_dropout: float, set_zero: bool, qkv_layout: Any,
    o_format: Any, do_format: Any, dqkv_layout: Any, qkv_scale_inv_format: Any, do_scale_inv_format: Any,
    bias_type: Any, attn_mask_type: Any, softmax_type: Any, window_size: Any, bottom_right_diagonal: bool,
    deterministic: bool, cu_seqlens_q: Tensor, cu_seqlens_kv: Tensor, Q: Any, K: Any, V: Any, O: Any, dO: Any,  # noqa: E741
    fake_dtype: Any, *rest: Any,
) -> list[Any]:  # fmt: skip
    """Formats are arguments; the gradients have the type of the rest."""
    _check_format(qkv_layout, o_format)
    _check_format(qkv_layout, do_format)
    check(dqkv_layout == qkv_layout, "gradients of another layout are not offered")
    return fused_attention.fused_attn_bwd(
        max_seqlen_q, max_seqlen_kv, attn_scale, p_dropout, set_zero, qkv_layout, bias_type, attn_mask_type,
        softmax_type, window_size, bottom_right_diagonal, deterministic, cu_seqlens_q, cu_seqlens_kv, Q, K, V, O, dO,
        fake_dtype, fake_dtype, *rest,
    )  # fmt: skip


def _check_format(layout: Any, form: Any) -> None:
    queries = NVTE_QKV_Layout(layout).name.removeprefix("NVTE_").split("_")[0].replace("3", "").replace("2", "")
    check(NVTE_QKV_Format(form).name == f"NVTE_{queries}", f"queries {queries} and an output of another format")


def fused_topk_with_score_function_fwd(
    logits: Tensor, topk: int, use_pre_softmax: bool, num_groups: Any, group_topk: Any, scaling_factor: Any,
    score_function: str, expert_bias: Any, routing_map_format: int, topk_indices: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As before, and what the backward pass reads is in fp32."""
    check(
        routing_map_format == NVTERoutingMapFormat.BYTEMAP and topk_indices is None, "a map of bytes alone is offered"
    )
    probs, routing, scores = router_kernels.fused_topk_with_score_function_fwd(
        logits.float(), topk, use_pre_softmax, num_groups, group_topk, scaling_factor, score_function, expert_bias
    )
    return probs.to(logits.dtype), routing, scores


def fused_topk_with_score_function_bwd(
    routing_map: Tensor, intermediate_output: Tensor, grad_probs: Tensor, grad_logits: Tensor, topk: int,
    use_pre_softmax: bool, scaling_factor: Any, score_function: str, use_dense_indices: bool, routing_map_format: int,
) -> None:  # fmt: skip
    """Fills `grad_logits`."""
    check(intermediate_output.dtype == torch.float32 and not use_dense_indices, "scores in fp32, a map of bytes")
    gradient = router_kernels.fused_topk_with_score_function_bwd(
        *routing_map.shape, routing_map, intermediate_output, grad_probs, topk, use_pre_softmax, scaling_factor,
        score_function,
    )  # fmt: skip
    grad_logits.copy_(gradient)
