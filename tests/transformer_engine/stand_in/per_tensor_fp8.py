"""FP8 with one scale a tensor: delayed scaling (from a history of maxima) and current scaling (from the tensor's own)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.transformer_engine.stand_in.fp8_casts import (
    check,
    flat,
    from_fp8,
    reads_operands_as_they_lie,
    scale_from_amax,
    to_fp8,
    transposed_shape,
)

DELAYED, CURRENT = "Float8Quantizer", "Float8CurrentScalingQuantizer"
QUANTIZERS = (DELAYED, CURRENT)
STORAGE = "Float8TensorStorage"


def _halves(quantizer: Any) -> tuple[bool, bool]:
    """Whether the data and their transposed copy are kept."""
    no_copy = reads_operands_as_they_lie()
    return quantizer.rowwise_usage or no_copy, quantizer.columnwise_usage and not no_copy


def create(quantizer: Any, shape: tuple[int, ...], fake_dtype: torch.dtype, classes: Any) -> Any:
    keeps_data, keeps_transpose = _halves(quantizer)
    fields = dict(
        data=torch.empty(shape, dtype=torch.uint8) if keeps_data else None,
        fp8_scale_inv=torch.empty(1),
        fp8_dtype=quantizer.dtype,
        data_transpose=torch.empty(transposed_shape(shape), dtype=torch.uint8) if keeps_transpose else None,
        quantizer=quantizer,
    )
    if quantizer.internal:
        return classes.Float8TensorStorage(**fields)
    return classes.Float8Tensor(shape=shape, dtype=fake_dtype, **fields)


def update_halves(quantizer: Any, output: Any, shape: tuple[int, ...]) -> None:
    """Make the halves of an existing tensor that are wanted now, and drop the other."""
    check(output._data is not None or output._transpose is not None, "Float8Tensor has no data")
    keeps_data, keeps_transpose = _halves(quantizer)
    if not keeps_data:
        output._data = None
    elif output._data is None:
        output._data = torch.empty(shape, dtype=torch.uint8)
    if not keeps_transpose:
        output._transpose = None
    elif output._transpose is None:
        output._transpose = torch.empty(transposed_shape(shape), dtype=torch.uint8)
    output._transpose_invalid = not keeps_transpose
    output._fp8_dtype = quantizer.dtype


def fill(quantizer: Any, values: Tensor, output: Any) -> None:
    matrix = flat(values).float()
    if type(quantizer).__name__ == DELAYED:
        _record_amax(quantizer, matrix)
        scale = quantizer.scale
    else:
        scale = _scale_of_own_amax(quantizer, matrix)
    output._scale_inv.copy_(scale.reciprocal().reshape(output._scale_inv.shape))
    raw = to_fp8(matrix * scale, quantizer.dtype)
    if output._data is not None:
        output._data.copy_(raw.view(output._data.shape))
    if output._transpose is not None:
        output._transpose.copy_(raw.T.reshape(output._transpose.shape))
        output._transpose_invalid = False


def _record_amax(quantizer: Any, matrix: Tensor) -> None:
    if quantizer.amax.numel():
        amax = matrix.abs().max().reshape(quantizer.amax.shape)
        quantizer.amax.copy_(torch.maximum(quantizer.amax, amax))


def _scale_of_own_amax(quantizer: Any, matrix: Tensor) -> Tensor:
    """[1]. A quantizer of 2.12 keeps the last scale and maximum, and may have been given the maximum; one of 2.20 not."""
    kept = getattr(quantizer, "amax", None)
    amax = matrix.abs().max().reshape(1) if kept is None or not quantizer.use_existing_amax else kept.reshape(1).clone()
    if quantizer.with_amax_reduction:
        group = quantizer._canonicalized_amax_reduction_group()
        torch.distributed.all_reduce(amax, torch.distributed.ReduceOp.MAX, group=group)
    scale = scale_from_amax(amax, quantizer.dtype, quantizer.force_pow_2_scales, quantizer.amax_epsilon)
    if kept is not None:
        kept.copy_(amax.reshape(kept.shape))
        quantizer.scale.copy_(scale.reshape(quantizer.scale.shape))
    return scale


def read(tensor: Any, columnwise: bool) -> Tensor:
    """The matrix in fp32, from the data or from the transposed copy."""
    if not columnwise or reads_operands_as_they_lie():
        check(tensor._data is not None, "operand is missing row-wise usage")
        return flat(from_fp8(tensor._data, tensor._fp8_dtype)) * tensor._scale_inv
    check(tensor._transpose is not None and not tensor._transpose_invalid, "operand is missing column-wise usage")
    raw = from_fp8(tensor._transpose, tensor._fp8_dtype)
    return raw.reshape(raw.size(0), -1).T * tensor._scale_inv


def shape_of(storage: Any) -> tuple[int, ...]:
    if storage._data is not None:
        return tuple(storage._data.shape)
    found = tuple(storage._transpose.shape)
    return (*found[1:], found[0])
