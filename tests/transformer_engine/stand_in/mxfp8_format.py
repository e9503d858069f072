"""MXFP8: one scale, a power of two, for 32 numbers of a row (row-wise half) or of a column (column-wise half)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.transformer_engine.stand_in.fp8_casts import (
    check,
    e8m0_from_amax,
    flat,
    from_e8m0,
    from_fp8,
    num_rows,
    replace_halves,
    round_up,
    to_fp8,
)

QUANTIZERS = ("MXFP8Quantizer",)
STORAGE = "MXFP8TensorStorage"
BLOCK = 32


def create(quantizer: Any, shape: tuple[int, ...], fake_dtype: torch.dtype, classes: Any) -> Any:
    check(num_rows(shape) % BLOCK == 0 and shape[-1] % BLOCK == 0, f"MXFP8 requires dims divisible by 32 (got {shape})")
    fields = _halves(quantizer, shape) | dict(
        fp8_dtype=quantizer.dtype, quantizer=quantizer, with_gemm_swizzled_scales=quantizer.optimize_for_gemm
    )
    if quantizer.internal:
        return classes.MXFP8TensorStorage(*fields.values())
    return classes.MXFP8Tensor(shape=shape, dtype=fake_dtype, **fields)


def _halves(quantizer: Any, shape: tuple[int, ...]) -> dict[str, Tensor | None]:
    """Bytes and scales of both directions; scales are filled up to what the products' kernels read at once."""
    rows, columns = num_rows(shape), shape[-1]
    fields: dict[str, Tensor | None] = dict.fromkeys(
        ("rowwise_data", "rowwise_scale_inv", "columnwise_data", "columnwise_scale_inv")
    )
    if quantizer.rowwise_usage:
        fields["rowwise_data"] = torch.empty(shape, dtype=torch.uint8)
        scales = (round_up(rows, 128), round_up(columns // BLOCK, 4))
        fields["rowwise_scale_inv"] = torch.zeros(scales, dtype=torch.uint8)
    if quantizer.columnwise_usage:
        fields["columnwise_data"] = torch.empty(shape, dtype=torch.uint8)
        scales = (round_up(rows // BLOCK, 4), round_up(columns, 128))
        fields["columnwise_scale_inv"] = torch.zeros(scales, dtype=torch.uint8)
    return fields


def update_halves(quantizer: Any, output: Any, shape: tuple[int, ...]) -> None:
    replace_halves(output, _halves(quantizer, shape))
    output._fp8_dtype = quantizer.dtype


def fill(quantizer: Any, values: Tensor, output: Any) -> None:
    matrix = flat(values).float()
    rows, columns = matrix.shape
    if output._rowwise_data is not None:
        blocks = matrix.view(rows, columns // BLOCK, BLOCK)
        scale = e8m0_from_amax(blocks.abs().amax(-1), quantizer.dtype)
        output._rowwise_scale_inv[:rows, : columns // BLOCK] = scale
        raw = to_fp8(blocks / from_e8m0(scale)[..., None], quantizer.dtype)
        output._rowwise_data.copy_(raw.view(output._rowwise_data.shape))
    if output._columnwise_data is not None:
        blocks = matrix.view(rows // BLOCK, BLOCK, columns)
        scale = e8m0_from_amax(blocks.abs().amax(1), quantizer.dtype)
        output._columnwise_scale_inv[: rows // BLOCK, :columns] = scale
        raw = to_fp8(blocks / from_e8m0(scale)[:, None], quantizer.dtype)
        output._columnwise_data.copy_(raw.view(output._columnwise_data.shape))


def read(tensor: Any, columnwise: bool) -> Tensor:
    """The matrix in fp32, from one of the halves: they were rounded apart and differ."""
    half = "columnwise" if columnwise else "rowwise"
    data, scale = getattr(tensor, f"_{half}_data"), getattr(tensor, f"_{half}_scale_inv")
    check(data is not None and scale is not None, f"operand is missing {half} usage")
    matrix = flat(from_fp8(data, tensor._fp8_dtype))
    rows, columns = matrix.shape
    if columnwise:
        factor = from_e8m0(scale[: rows // BLOCK, :columns])
        return (matrix.view(rows // BLOCK, BLOCK, columns) * factor[:, None]).view(rows, columns)
    factor = from_e8m0(scale[:rows, : columns // BLOCK])
    return (matrix.view(rows, columns // BLOCK, BLOCK) * factor[..., None]).view(rows, columns)


def shape_of(storage: Any) -> tuple[int, ...]:
    data = storage._columnwise_data if storage._rowwise_data is None else storage._rowwise_data
    return tuple(data.shape)
