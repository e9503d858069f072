"""Matrix products, one and grouped, as cuBLAS is asked for them: row-major op(B) op(A)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tests.transformer_engine.stand_in.enums import torch_dtype
from tests.transformer_engine.stand_in.fp8_casts import check
from tests.transformer_engine.stand_in.quantized import is_quantized, quantize, read, shape_of

FP8_MULTIPLE = 16  # of every side of an FP8 product


def generic_gemm(
    A: Any, transA: bool, B: Any, transB: bool, D: Any, quantizer: Any, output_dtype: Any, bias: Any, bias_type: Any,
    gelu: bool, gelu_in: Any, grad: bool, workspace: Any, workspace_size: int, accumulate: bool,
    use_split_accumulator: bool, comm_overlap: Any = None, comm_type: Any = None, extra_output: Any = None,
    bulk_overlap: bool = False, alpha: float = 1.0, beta: float | None = None,
) -> list[Any]:  # fmt: skip
    """[output, gradient of the bias, None, extra_output]."""
    check(comm_overlap is None and not gelu, "user buffers and GELU in a product are not offered")
    check(not (transA and transB), "layout TT")
    _check_operands(A, B)
    shape = _output_shape(A, transA, B, transB)
    dtype = A.dtype if output_dtype is None else torch_dtype(output_dtype)
    is_empty = _is_empty(A, B)
    total = torch.zeros(shape) if is_empty else alpha * _product(A, transA, B, transB).reshape(shape)
    bias_gradient = None
    if bias is not None and grad:
        bias_gradient = read(B, transB).sum(0).to(dtype)
    elif bias is not None:
        total = total + bias.float()
    if D is None:
        check(not accumulate, "accumulation without a place")
        D = total.to(dtype)
    else:
        check(tuple(D.shape) == shape, f"output has {tuple(D.shape)}, expected {shape}")
        check(output_dtype is None or D.dtype == dtype, f"output is {D.dtype}, expected {dtype}")
        if not (is_empty and accumulate):
            _store(total, D, accumulate, 1.0 if beta is None else beta)
    if quantizer is not None:
        D = quantize(D, quantizer)
    return [D, bias_gradient, None, extra_output]


def te_general_grouped_gemm(
    A: list[Any], transa: bool, B: list[Any], transb: bool, D: list[Tensor] | None, D_type: Any, m_splits: list[int],
    bias: list[Tensor], bias_type: Any, single_output: bool, pre_gelu_out: list[Tensor], grad: bool,
    workspace: list[Any], workspace_size: int, accumulate: bool, use_split_accumulator: bool, math_sm_count: int,
) -> list[Tensor]:  # fmt: skip
    """One product for each pair of A and B, into D's tensors or, one below the other, into its only one."""
    check(D is not None, "D should be allocated")
    assert D is not None
    check(all(isinstance(size, int) for size in m_splits or []), "m_splits must be numbers on the host")
    start = 0
    for number, (a, b) in enumerate(zip(A, B, strict=True)):
        shape = _output_shape(a, transa, b, transb)
        check(len(shape) == 2, "grouped products are of matrices")
        if single_output:
            place = D[0].view(-1, shape[1])[start : start + shape[0]]
            start += shape[0]
        else:
            place = D[number]
            check(place.is_contiguous() and tuple(place.shape) == shape, "output of a grouped product")
        check(place.dtype == torch_dtype(D_type), f"output is {place.dtype}, expected {torch_dtype(D_type)}")
        _check_operands(a, b)
        if _is_empty(a, b):
            if not accumulate:
                with torch.no_grad():
                    place.zero_()
            continue
        total = _product(a, transa, b, transb)
        if bias[number].numel() and grad:
            bias[number].copy_(read(b, transb).sum(0))
        elif bias[number].numel():
            total = total + bias[number].float()
        _store(total, place, accumulate)
    return bias


def _check_operands(a: Any, b: Any) -> None:
    check(is_quantized(a) == is_quantized(b), "one operand is FP8 and the other is not")
    if not is_quantized(a):
        check(a.dtype == b.dtype, f"operands of {a.dtype} and {b.dtype}")
        check(a.is_contiguous() and b.is_contiguous(), "operands must be contiguous")


def _product(a: Any, transpose_a: bool, b: Any, transpose_b: bool) -> Tensor:
    """op(B) op(A) in fp32. Summed over are the rows of A unless it is transposed, and the columns of B unless it is:
    an FP8 operand gives the half whose scales lie along the sum."""
    left, right = read(b, transpose_b), read(a, not transpose_a)
    left, right = (left.T if transpose_b else left), (right.T if transpose_a else right)
    check(left.size(1) == right.size(0), f"product of {tuple(left.shape)} and {tuple(right.shape)}")
    if is_quantized(a):
        for size in (*left.shape, right.size(1)):
            check(size % FP8_MULTIPLE == 0, f"FP8 product with a side of {size}, no multiple of {FP8_MULTIPLE}")
    return left @ right


def _output_shape(a: Any, transpose_a: bool, b: Any, transpose_b: bool) -> tuple[int, ...]:
    a_shape, b_shape = shape_of(a), shape_of(b)
    last = math.prod(a_shape[:-1]) if transpose_a else a_shape[-1]
    return (b_shape[-1], last) if transpose_b else (*b_shape[:-1], last)


def _is_empty(a: Any, b: Any) -> bool:
    return 0 in (*shape_of(a), *shape_of(b))


def _store(total: Tensor, out: Tensor, accumulate: bool, beta: float = 1.0) -> None:
    total = total.view(out.shape)
    with torch.no_grad():
        out.copy_(total + beta * out.float() if accumulate else total)


def fused_multi_row_padding(input: Tensor, output: Tensor, rows: list[int], padded_rows: list[int]) -> None:
    """Each expert's rows filled up with zeros."""
    check(input.size(0) == sum(rows) and output.size(0) == sum(padded_rows), "rows to be padded")
    for piece, place in zip(torch.split(input, rows), torch.split(output, padded_rows), strict=True):
        place[: piece.size(0)] = piece
        place[piece.size(0) :] = 0


def fused_multi_row_unpadding(input: Tensor, output: Tensor, padded_rows: list[int], rows: list[int]) -> None:
    check(input.size(0) == sum(padded_rows) and output.size(0) == sum(rows), "rows to be unpadded")
    for piece, place in zip(torch.split(input, padded_rows), torch.split(output, rows), strict=True):
        place.copy_(piece[: place.size(0)])
