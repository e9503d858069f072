"""Linear layers of the local implementation: megatron's, with the matrix products that are fastest on a CPU.

On a CPU the products with the weight are oneDNN's (a tenth faster than MKL's on AMD's processors), and the weight's
gradient is added to megatron's main_grad as it is computed. On a GPU they are megatron's. Shapes: x [..., i], W [o, i].
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from megatron_a2d.model.weight_gradients import add_product, gradient_buffer, hand_over


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ W.T, without a gradient; W may be a transposed view."""
    if x.dtype == torch.float32 and x.device.type == "cpu" and _has_onednn():
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return F.linear(x, weight)


@functools.cache
def _has_onednn() -> bool:
    """Whether this torch has oneDNN's product under the name that its compiler uses, found by trying it."""
    x, weight = torch.arange(6.0).view(2, 3), torch.arange(12.0).view(3, 4).T
    try:
        return torch.equal(torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], ""), x @ weight.T)
    except (AttributeError, RuntimeError, TypeError):
        return False


class LinearProduct(torch.autograd.Function):
    """x @ W.T with its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        return product(x, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        x_gradient = product(gradient, weight.T) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return x_gradient, None
        buffer = gradient_buffer(weight)
        add_product(buffer, gradient.reshape(-1, gradient.size(-1)), x.reshape(-1, x.size(-1)))
        return x_gradient, hand_over(weight, buffer)


class _Local:
    def _forward_impl(self, input: Tensor, weight: Tensor, **options: Any) -> Tensor:
        """Called by megatron.core's linear layers as their matrix product."""
        if input.device.type != "cpu" or options["sequence_parallel"]:  # megatron's keeps this rank's slice only
            return super()._forward_impl(input=input, weight=weight, **options)  # type: ignore[misc]
        if options["allreduce_dgrad"]:
            input = tensor_parallel.copy_to_tensor_model_parallel_region(input, group=options["tp_group"])
        output = LinearProduct.apply(input, weight)
        return output if options["bias"] is None else output + options["bias"]


class LocalColumnParallelLinear(_Local, ColumnParallelLinear):
    """megatron.core's column-parallel linear layer with the products above."""


class LocalRowParallelLinear(_Local, RowParallelLinear):
    """megatron.core's row-parallel linear layer with the products above."""
