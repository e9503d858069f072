"""Weight gradients added to megatron's main_grad by the matrix product itself, instead of by autograd afterwards.

Megatron.core's own fusion of the two (gradient_accumulation_fusion) needs a CUDA extension of apex or Transformer
Engine. Shapes: n tokens, i and o the weight's input and output features.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from megatron_a2d.model.matrix_products import add_transposed_product, is_widened


def gradient_buffer(weight: Tensor) -> Tensor:
    """The fp32 buffer in which the weight's gradient is accumulated: megatron's main_grad where that is fp32."""
    main_grad = getattr(weight, "main_grad", None)
    if main_grad is not None and main_grad.dtype == torch.float32:
        return main_grad
    return torch.zeros_like(weight, dtype=torch.float32)


def add_product(buffer_oi: Tensor, gradient_no: Tensor, input_ni: Tensor) -> None:
    """buffer += gradient^T input, summed in fp32."""
    if gradient_no.dtype == torch.float32:
        buffer_oi.addmm_(gradient_no.T, input_ni)
    elif is_widened(gradient_no):
        add_transposed_product(buffer_oi, gradient_no, input_ni)
    elif adds_in_fp32(gradient_no.device, gradient_no.dtype):
        torch.addmm(buffer_oi, gradient_no.T, input_ni, out_dtype=torch.float32, out=buffer_oi)
    else:
        buffer_oi.add_(gradient_no.T.matmul(input_ni))


@functools.cache
def adds_in_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch can add a matrix product of `dtype` to an fp32 matrix without rounding it first (tested)."""
    matrix, total = torch.ones(16, 16, dtype=dtype, device=device), torch.ones(16, 16, device=device)
    try:
        torch.addmm(total, matrix, matrix, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return bool((total == 17).all())


def hand_over(weight: Tensor, buffer: Tensor | None) -> Tensor | None:
    """The weight's gradient for autograd; a placeholder where it is already in megatron's main_grad."""
    if buffer is None or buffer is not getattr(weight, "main_grad", None):
        return None if buffer is None else buffer.to(weight.dtype)
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    # A tied weight also has the embedding's gradient, which autograd adds to the returned tensor.
    needs_zeros = getattr(weight, "zero_out_wgrad", False)
    return torch.zeros_like(weight) if needs_zeros else torch.empty_like(weight)
