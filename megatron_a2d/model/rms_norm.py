"""Root mean square norm (Zhang & Sennrich 2019): x / rms(x) * weight over the last axis, in fp32.

On a CPU torch composes it of pointwise operations and keeps their results; here only its input and one number per row
are kept, as by CUDA's fused kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor


class RMSNorm(torch.nn.RMSNorm):
    """The norm as a module, built as megatron.core builds norms."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        # Under sequence parallelism each rank has other tokens: the gradient must be summed over the ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """x normed, of its shape and type."""
        if x.device.type != "cpu":
            return super().forward(x)
        return _Norm.apply(x, self.weight, self.eps)


class TorchRMSNorm(RMSNorm):
    """The norm by torch's own function on every device."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.RMSNorm.forward(self, x)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # type: ignore[override]
        scale = inverse_rms(x, eps)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        x, weight, scale = ctx.saved_tensors
        result = torch.empty_like(x)
        products = backward_of_norm(gradient, x, weight, scale, out=result)
        return result, products.flatten(0, -2).sum(0).to(weight.dtype), None


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean of x^2 + eps), [..., 1] fp32."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return norm.square_().div_(x.size(-1)).add_(eps).rsqrt_()


def backward_of_norm(gradient: Tensor, x: Tensor, weight: Tensor, scale: Tensor, out: Tensor) -> Tensor:
    """The gradient of x, in `out`. Returns gradient * x / rms(x), whose sum over rows is the gradient of the weight."""
    normed = x * scale
    products = gradient * normed
    mean = (products * weight).mean(-1, keepdim=True)
    torch.mul((gradient * weight).to(normed.dtype).addcmul_(normed, mean, value=-1), scale, out=out)
    return products
