"""Linear layers of the local implementation: megatron's, with the matrix products that are fastest on a CPU.

On a CPU the products with the weight are those of matrix_products.py, and the weight's gradient is added to megatron's
main_grad as it is computed. On a GPU they are megatron's. Shapes: x [..., i], W [o, i].
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_a2d.model.matrix_products import is_widened, linear
from megatron_a2d.model.weight_gradients import add_product, gradient_buffer, hand_over


class LinearProduct(torch.autograd.Function):
    """x @ W.T with its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        return linear(x, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        x_gradient = linear(gradient, weight.T) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return x_gradient, None
        buffer = gradient_buffer(weight)
        add_product(buffer, gradient.reshape(-1, gradient.size(-1)), x.reshape(-1, x.size(-1)))
        return x_gradient, hand_over(weight, buffer)


class _Local:
    def _forward_impl(self, input: Tensor, weight: Tensor, **options: Any) -> Tensor:
        """Called by megatron.core's linear layers as their matrix product."""
        sequence_parallel = options["sequence_parallel"]
        if input.device.type != "cpu" or (sequence_parallel and not is_widened(input)):
            # megatron's keeps only this rank's slice of a sequence-parallel input
            return super()._forward_impl(input=input, weight=weight, **options)  # type: ignore[misc]
        if sequence_parallel:
            input = gather_from_sequence_parallel_region(input, group=options["tp_group"])
        elif options["allreduce_dgrad"]:
            input = tensor_parallel.copy_to_tensor_model_parallel_region(input, group=options["tp_group"])
        output = LinearProduct.apply(input, weight)
        return output if options["bias"] is None else output + options["bias"]


class LocalColumnParallelLinear(_Local, ColumnParallelLinear):
    """megatron.core's column-parallel linear layer with the products above."""


class LocalRowParallelLinear(_Local, RowParallelLinear):
    """megatron.core's row-parallel linear layer with the products above."""
