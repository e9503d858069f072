"""SwiGLU (Shazeer 2020): silu(gate) * up, and for experts also times the router's weight.

megatron.core's is a chain of pointwise operations that a GPU's compiler fuses. Uncompiled, as on a CPU, it is a dozen
passes over memory, where the following are two forward and four backward. Shapes: [..., 2 f] in, gate before up.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl, weighted_bias_swiglu_impl
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from torch import Tensor


def swiglu(inner: Tensor, weights: Tensor | None = None) -> Tensor:
    """silu(gate) * up, [..., f]; `weights` [...] fp32 multiply the rows."""
    if inner.device.type == "cpu":
        return _SwiGLU.apply(inner, weights)
    if weights is None:
        return bias_swiglu_impl(inner, None)
    return weighted_bias_swiglu_impl(inner, None, weights[..., None])


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inner: Tensor, weights: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(inner, weights)
        gate, up = inner.chunk(2, dim=-1)
        output = F.silu(gate).mul_(up)
        return output if weights is None else output.mul_(weights[..., None])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        inner, weights = ctx.saved_tensors
        gate, up = inner.chunk(2, dim=-1)
        result = torch.empty_like(inner)
        gate_gradient, up_gradient = result.chunk(2, dim=-1)
        torch.ops.aten.silu.out(gate, out=up_gradient)
        weights_gradient = None
        if weights is not None:
            weights_gradient = (up_gradient * up).mul_(gradient).sum(-1, dtype=weights.dtype)
            gradient = (gradient * weights[..., None]).to(gradient.dtype)
        up_gradient.mul_(gradient)
        torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=gate_gradient)
        return result, weights_gradient


class LocalMLP(MLP):
    """megatron.core's MLP with the SwiGLU above."""

    def __init__(self, config: TransformerConfig, submodules: MLPSubmodules, pg_collection: Any = None, **_: Any):
        # Of a class that it does not know megatron.core 0.16 passes no process groups, and 0.19 those of a MoE layer.
        super().__init__(config, submodules, tp_group=pg_collection.tp if pg_collection else None)

    def forward(
        self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **_: Any
    ) -> tuple[Tensor, Tensor | None]:
        """The output [s, b, h] and no bias, as megatron.core calls it."""
        inner, _bias = self.linear_fc1(hidden_states)
        output, _bias = self.linear_fc2(swiglu(inner, per_token_scale))
        return output, None
