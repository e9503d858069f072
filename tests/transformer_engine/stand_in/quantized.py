"""Quantised tensors of every format: made, filled, read and transposed.

A quantizer of Transformer Engine's Python says which halves of a tensor it wants: row-wise for the product that reads
rows, column-wise for the one that reads columns.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tests.transformer_engine.stand_in import blockwise_fp8, mxfp8_format, nvfp4_format, per_tensor_fp8
from tests.transformer_engine.stand_in.enums import torch_dtype
from tests.transformer_engine.stand_in.fp8_casts import check, flat, transposed_shape

_FORMATS: list[Any] = [per_tensor_fp8, mxfp8_format, blockwise_fp8, nvfp4_format]


def _format_of_quantizer(quantizer: Any) -> Any:
    name = type(quantizer).__name__
    for form in _FORMATS:
        if name in form.QUANTIZERS:
            return form
    raise NotImplementedError(f"transformer_engine_torch (stand-in) has no quantizer {name}")


def _format_of(tensor: Any) -> Any:
    """The format of a quantised tensor or of its bare storage; None of a plain tensor."""
    names = {cls.__name__ for cls in type(tensor).__mro__}
    return next((form for form in _FORMATS if form.STORAGE in names), None)


def is_quantized(tensor: Any) -> bool:
    return _format_of(tensor) is not None


def read(tensor: Any, columnwise: bool = False) -> Tensor:
    """An operand as a matrix in fp32, from that half of it which a product reads."""
    form = _format_of(tensor)
    if form is not None:
        return form.read(tensor, columnwise)
    check(isinstance(tensor, Tensor), f"operand is a {type(tensor).__name__}")
    return flat(tensor.detach()).float()


def shape_of(tensor: Any) -> tuple[int, ...]:
    return tuple(tensor.shape) if isinstance(tensor, Tensor) else _format_of(tensor).shape_of(tensor)


def _classes() -> ModuleType:
    from transformer_engine.pytorch import tensor

    return tensor


def _empty(quantizer: Any, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
    return _format_of_quantizer(quantizer).create(quantizer, shape, dtype, _classes())


def quantize(tensor: Tensor, quantizer: Any, output: Any = None, noop: Tensor | None = None) -> Any:
    values = tensor.detach().contiguous()
    if noop is not None and float(noop) != 0:
        return output
    form = _format_of_quantizer(quantizer)
    if output is None:
        output = _empty(quantizer, tuple(values.shape), values.dtype)
    else:
        check(_format_of(output) is form, f"{type(quantizer).__name__} must output to {form.STORAGE}")
        form.update_halves(quantizer, output, tuple(values.shape))
    if values.numel():
        form.fill(quantizer, values, output)
    return output


def dequantize(input: Any, otype: Any) -> Tensor:
    return read(input).view(shape_of(input)).to(torch_dtype(otype))


def multi_tensor_quantize(tensor_list: list[Tensor], quantizer_list: list[Any]) -> list[Any]:
    return [quantize(tensor, quantizer) for tensor, quantizer in zip(tensor_list, quantizer_list, strict=True)]


def split_quantize(
    tensor: Tensor, split_sections: list[int], quantizer_list: list[Any], disable_bulk_allocation: bool = False
) -> list[Any]:
    check(len(split_sections) == len(quantizer_list), "as many quantizers as sections")
    check(tensor.is_contiguous() and tensor.size(0) == sum(split_sections), "sections must add up to the first dim")
    return multi_tensor_quantize(list(torch.split(tensor, split_sections)), quantizer_list)


def bgrad_quantize(input: Tensor, quantizer: Any) -> tuple[Tensor, Any]:
    bias_gradient = flat(input).float().sum(0).to(input.dtype)
    return bias_gradient, (input if quantizer is None else quantize(input, quantizer))


def fp8_transpose(input: Tensor, dtype: Any, *, out: Tensor | None = None) -> Tensor:
    result = flat(input).T.contiguous().view(transposed_shape(input.shape))
    return result if out is None else out.copy_(result)


def swap_first_dims(tensor: Tensor, *, out: Tensor | None = None) -> Tensor:
    """[a, b, ...] as [b, a, ...]."""
    swapped = tensor.transpose(0, 1)
    return swapped.contiguous() if out is None else out.copy_(swapped)


def compute_amax(input: Tensor, amax: Tensor) -> None:
    largest = input.detach().abs().max().float() if input.numel() else torch.zeros(())
    amax.copy_(largest.reshape(amax.shape))
