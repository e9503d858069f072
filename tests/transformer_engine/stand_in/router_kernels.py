"""The fused choice of experts: softmax and the largest few, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.transformer_engine.stand_in.fp8_casts import check


def fused_topk_with_score_function_fwd(
    logits: Tensor, topk: int, use_pre_softmax: bool, num_groups: Any, group_topk: Any, scaling_factor: Any,
    score_function: str, expert_bias: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Probabilities [tokens, experts], zero where not chosen; the choice; and what the backward pass reads."""
    check(logits.numel() > 0, "num_tokens and num_experts must be greater than 0")
    is_plain = score_function == "softmax" and expert_bias is None and not num_groups and not group_topk
    check(is_plain, "plain softmax alone is offered")
    values = logits.float()
    scores = values.softmax(-1) if use_pre_softmax else values
    routing = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, scores.topk(topk, -1).indices, True)
    if not use_pre_softmax:
        scores = values.masked_fill(~routing, float("-inf")).softmax(-1)
    probs = scores * routing * (scaling_factor or 1.0)
    return probs.to(logits.dtype), routing, scores.to(logits.dtype)


def fused_topk_with_score_function_bwd(
    num_tokens: int, num_experts: int, routing_map: Tensor, intermediate_output: Tensor, grad_probs: Tensor, topk: int,
    use_pre_softmax: bool, scaling_factor: Any, score_function: str,
) -> Tensor:  # fmt: skip
    """Gradient of the logits."""
    gradient = grad_probs.float() * routing_map * (scaling_factor or 1.0)
    scores = intermediate_output.float()
    return (scores * (gradient - (gradient * scores).sum(-1, keepdim=True))).to(intermediate_output.dtype)
