"""NVFP4: 4-bit numbers with an e4m3 scale for 16 of them, below one scale in fp32 for the tensor.

The column-wise half is that of the transpose; with a quantizer that asks for it, of the transpose times the random
Hadamard matrix, which the other operand of its product is multiplied by too. A GPU does this for bf16 alone. Rounding is
to nearest: the random bits of stochastic rounding cannot be compared with another's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.transformer_engine.stand_in.enums import DType
from tests.transformer_engine.stand_in.fp8_casts import (
    check,
    flat,
    from_fp8,
    num_rows,
    quotient,
    replace_halves,
    round_up,
    to_fp8,
)

QUANTIZERS = ("NVFP4Quantizer",)
STORAGE = "NVFP4TensorStorage"
BLOCK = 16
NUMBERS = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_HALVES = ("rowwise", "columnwise")


def create(quantizer: Any, shape: tuple[int, ...], fake_dtype: torch.dtype, classes: Any) -> Any:
    rows, columns = num_rows(shape), shape[-1]
    check(rows % BLOCK == 0 and columns % BLOCK == 0, f"NVFP4 requires dims divisible by 16 (got {shape})")
    fields = _halves(quantizer, shape) | dict(
        fp4_dtype=quantizer.dtype, quantizer=quantizer, with_gemm_swizzled_scales=quantizer.optimize_for_gemm
    )
    if quantizer.internal:
        return classes.NVFP4TensorStorage(*fields.values())
    return classes.NVFP4Tensor(shape=shape, dtype=fake_dtype, **fields)


def _halves(quantizer: Any, shape: tuple[int, ...]) -> dict[str, Tensor | None]:
    """Two numbers in a byte, scales filled up to what the products' kernels read at once, and the largest values."""
    rows, columns = num_rows(shape), shape[-1]
    fields: dict[str, Tensor | None] = dict.fromkeys(
        (
            "rowwise_data",
            "rowwise_scale_inv",
            "columnwise_data",
            "columnwise_scale_inv",
            "amax_rowwise",
            "amax_columnwise",
        )
    )
    for half, data, outer, inner in (
        ("rowwise", (*shape[:-1], columns // 2), rows, columns), ("columnwise", (columns, rows // 2), columns, rows),
    ):  # fmt: skip
        if getattr(quantizer, f"{half}_usage"):
            fields[f"{half}_data"] = torch.empty(data, dtype=torch.uint8)
            scales = (round_up(outer, 128), round_up(inner // BLOCK, 4))
            fields[f"{half}_scale_inv"] = torch.zeros(scales, dtype=torch.uint8)
            fields[f"amax_{half}"] = torch.zeros(1)
    return fields


def update_halves(quantizer: Any, output: Any, shape: tuple[int, ...]) -> None:
    replace_halves(output, _halves(quantizer, shape))


def fill(quantizer: Any, values: Tensor, output: Any) -> None:
    check(not quantizer.stochastic_rounding, "NVFP4 is rounded to nearest alone")
    matrix = flat(values).float()
    for half, source in zip(_HALVES, (matrix, _transpose(quantizer, matrix)), strict=True):
        if getattr(output, f"_{half}_data") is not None:
            getattr(output, f"_amax_{half}").copy_(source.abs().max())
            _reduce(quantizer, getattr(output, f"_amax_{half}"))
            _fill_half(output, half, source, BLOCK if quantizer.with_2d_quantization else 1)


def _transpose(quantizer: Any, matrix: Tensor) -> Tensor:
    if not quantizer.with_rht:
        return matrix.T
    groups = matrix.T.reshape(matrix.size(1), -1, BLOCK)
    return (groups @ quantizer.rht_matrix.float()).view(matrix.T.shape)


def _reduce(quantizer: Any, amax: Tensor) -> None:
    if quantizer.with_amax_reduction:
        group = quantizer._canonicalized_amax_reduction_group()
        torch.distributed.all_reduce(amax, torch.distributed.ReduceOp.MAX, group=group)


def _fill_half(output: Any, half: str, matrix: Tensor, height: int) -> None:
    rows, columns = matrix.shape
    blocks = matrix.reshape(rows // height, height, columns // BLOCK, BLOCK)
    encode = _tensor_scale(getattr(output, f"_amax_{half}"))
    scale = to_fp8(blocks.abs().amax((1, 3)) * (encode * (1 / 6)), DType.kFloat8E4M3)
    decode = from_fp8(scale, DType.kFloat8E4M3)[:, None, :, None]
    codes = _codes(torch.where(decode == 0, 0.0, blocks * (encode / decode))).view(rows, columns)
    getattr(output, f"_{half}_scale_inv")[:rows, : columns // BLOCK] = scale.repeat_interleave(height, 0)
    data = getattr(output, f"_{half}_data")
    data.copy_((codes[:, ::2] | codes[:, 1::2] << 4).view(data.shape))


def _tensor_scale(amax: Tensor) -> Tensor:
    """What brings the largest value to the largest number times the largest scale."""
    return torch.where(amax == 0, 1.0, quotient(6 * 448, amax))


def _codes(values: Tensor) -> Tensor:
    """Sign and place in NUMBERS; what lies in the middle of two goes to the one at an even place."""
    middles = (NUMBERS[1:] + NUMBERS[:-1]) / 2
    above = values.abs()[..., None] - middles
    above[..., 1::2] += (above[..., 1::2] == 0).float()
    return ((above > 0).sum(-1) + 8 * (values < 0)).to(torch.uint8)


def read(tensor: Any, columnwise: bool) -> Tensor:
    """The matrix in fp32, from one of the halves: they were rounded apart and differ."""
    half = _HALVES[columnwise]
    data, scale = getattr(tensor, f"_{half}_data"), getattr(tensor, f"_{half}_scale_inv")
    check(data is not None and scale is not None, f"operand is missing {half} usage")
    raw = flat(data).long()
    codes = torch.stack([raw & 15, raw >> 4], -1).view(len(raw), -1)
    values = NUMBERS[codes & 7] * (1 - 2 * (codes >> 3))
    rows, columns = values.shape
    factor = from_fp8(scale[:rows, : columns // BLOCK].contiguous(), DType.kFloat8E4M3).repeat_interleave(BLOCK, 1)
    matrix = values * factor / _tensor_scale(getattr(tensor, f"_amax_{half}"))
    return matrix.T if columnwise else matrix


def shape_of(storage: Any) -> tuple[int, ...]:
    if storage._rowwise_data is not None:
        return (*storage._rowwise_data.shape[:-1], 2 * storage._rowwise_data.shape[-1])
    columns, half_rows = storage._columnwise_data.shape
    return (2 * half_rows, columns)
