"""FP8 with one scale for 128 numbers of a row (activations, gradients) or for 128 x 128 of a matrix (weights)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.transformer_engine.stand_in.fp8_casts import (
    check,
    flat,
    from_fp8,
    num_rows,
    replace_halves,
    round_up,
    scale_from_amax,
    to_fp8,
    transposed_shape,
)

QUANTIZERS = ("Float8BlockQuantizer",)
STORAGE = "Float8BlockwiseQTensorStorage"
BLOCK = 128


def create(quantizer: Any, shape: tuple[int, ...], fake_dtype: torch.dtype, classes: Any) -> Any:
    fields = _halves(quantizer, shape) | dict(
        fp8_dtype=quantizer.dtype, quantizer=quantizer, is_2D_scaled=quantizer.block_scaling_dim == 2
    )
    if quantizer.internal:
        return classes.Float8BlockwiseQTensorStorage(**fields)
    return classes.Float8BlockwiseQTensor(shape=shape, dtype=fake_dtype, **fields)


def _halves(quantizer: Any, shape: tuple[int, ...]) -> dict[str, Tensor | None]:
    """Bytes and scales of both directions; the column-wise half is kept transposed."""
    fields: dict[str, Tensor | None] = dict.fromkeys(
        ("rowwise_data", "rowwise_scale_inv", "columnwise_data", "columnwise_scale_inv")
    )
    rows, columns = num_rows(shape), shape[-1]
    if quantizer.rowwise_usage:
        fields["rowwise_data"] = torch.empty(shape, dtype=torch.uint8)
        fields["rowwise_scale_inv"] = torch.zeros(_scales_shape(quantizer, rows, columns))
    if quantizer.columnwise_usage:
        fields["columnwise_data"] = torch.empty(transposed_shape(shape), dtype=torch.uint8)
        fields["columnwise_scale_inv"] = torch.zeros(_scales_shape(quantizer, columns, rows))
    return fields


def _scales_shape(quantizer: Any, rows: int, columns: int) -> tuple[int, int]:
    across = -(-columns // BLOCK)
    if quantizer.block_scaling_dim == 2:
        return -(-rows // BLOCK), round_up(across, 4)
    return across, round_up(rows, 4)


def update_halves(quantizer: Any, output: Any, shape: tuple[int, ...]) -> None:
    replace_halves(output, _halves(quantizer, shape))
    output._fp8_dtype = quantizer.dtype


def fill(quantizer: Any, values: Tensor, output: Any) -> None:
    matrix = flat(values).float()
    for half, oriented in (("rowwise", matrix), ("columnwise", matrix.T)):
        data, scales = getattr(output, f"_{half}_data"), getattr(output, f"_{half}_scale_inv")
        if data is not None:
            raw, inverse = _cast(quantizer, oriented)
            data.copy_(raw.reshape(data.shape))
            inverse = inverse if quantizer.block_scaling_dim == 2 else inverse.T
            scales[: inverse.size(0), : inverse.size(1)] = inverse


def _cast(quantizer: Any, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Bytes, and inverse scales [rows or blocks of 128 rows, blocks of 128 columns]."""
    height = BLOCK if quantizer.block_scaling_dim == 2 else 1
    rows, columns = matrix.shape
    padded = torch.nn.functional.pad(matrix, (0, -columns % BLOCK, 0, -rows % height))
    blocks = padded.view(padded.size(0) // height, height, padded.size(1) // BLOCK, BLOCK)
    amax = blocks.abs().amax((1, 3))
    scale = scale_from_amax(amax, quantizer.dtype, quantizer.force_pow_2_scales, quantizer.amax_epsilon)
    raw = to_fp8((blocks * scale[:, None, :, None]).view(padded.shape), quantizer.dtype)
    return raw[:rows, :columns], scale.reciprocal()


def read(tensor: Any, columnwise: bool) -> Tensor:
    """The matrix in fp32, from one of the halves."""
    half = "columnwise" if columnwise else "rowwise"
    data, scale = getattr(tensor, f"_{half}_data"), getattr(tensor, f"_{half}_scale_inv")
    check(data is not None and scale is not None, f"operand is missing {half} usage")
    raw = from_fp8(data, tensor._fp8_dtype)
    matrix = raw.reshape(raw.size(0), -1) if columnwise else flat(raw)
    rows, columns = matrix.shape
    scale = scale.repeat_interleave(BLOCK, 0) if tensor._is_2D_scaled else scale.T
    matrix = matrix * scale.repeat_interleave(BLOCK, 1)[:rows, :columns]
    return matrix.T if columnwise else matrix


def shape_of(storage: Any) -> tuple[int, ...]:
    if storage._rowwise_data is not None:
        return tuple(storage._rowwise_data.shape)
    found = tuple(storage._columnwise_data.shape)
    return (*found[1:], found[0])
