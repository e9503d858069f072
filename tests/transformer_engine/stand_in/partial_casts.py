"""FP8 weights (--fp8-param-gather): maxima and casts of that part of a weight whose main weights a process holds.

A part is a run of numbers of the flattened matrix, which can begin and end in the middle of a block. Processes agree on
the blocks' maxima in between.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.transformer_engine.stand_in.enums import DType
from tests.transformer_engine.stand_in.fp8_casts import from_e8m0, to_fp8
from tests.transformer_engine.stand_in.mxfp8_format import BLOCK


def fp8_block_scaling_compute_partial_amax(
    tensor: Tensor, amax: Tensor, h: int, w: int, start_offset: int, block_len: int
) -> None:
    matrix = _whole(tensor, h, w, start_offset, block_len)
    rows, columns = matrix.size(0) // block_len, matrix.size(1) // block_len
    amax[:rows, :columns] = matrix.view(rows, block_len, columns, block_len).abs().amax((1, 3))


def fp8_block_scaling_partial_cast(
    inp: Tensor, out: Tensor, scale: Tensor, h: int, w: int, start_offset: int, block_len: int, out_dtype: Any
) -> None:
    factors = scale.repeat_interleave(block_len, 0).repeat_interleave(block_len, 1)[:h, :w].flatten()
    own = factors[start_offset : start_offset + inp.numel()]
    out.copy_(to_fp8(inp.detach().float().flatten() * own, out_dtype).view(out.shape))


def mxfp8_scaling_compute_partial_amax(
    input: Tensor, amax_rowwise: Tensor, amax_colwise: Tensor, rows: int, cols: int, start_offset: int
) -> None:
    matrix = _whole(input, rows, cols, start_offset, BLOCK).abs()
    amax_rowwise[:rows, : cols // BLOCK] = matrix.view(rows, cols // BLOCK, BLOCK).amax(-1)
    amax_colwise[: rows // BLOCK, :cols] = matrix.view(rows // BLOCK, BLOCK, cols).amax(1)


def mxfp8_scaling_partial_cast(
    input: Tensor, output_rowwise: Tensor, output_colwise: Tensor, scale_inv_rowwise: Tensor, scale_inv_colwise: Tensor,
    rows: int, cols: int, start_offset: int,
) -> None:  # fmt: skip
    own = slice(start_offset, start_offset + input.numel())
    by_row = from_e8m0(scale_inv_rowwise[:rows, : cols // BLOCK]).repeat_interleave(BLOCK, 1).flatten()[own]
    by_column = from_e8m0(scale_inv_colwise[: rows // BLOCK, :cols]).repeat_interleave(BLOCK, 0).flatten()[own]
    values = input.detach().float().flatten()
    for output, scale_inv in ((output_rowwise, by_row), (output_colwise, by_column)):
        output.copy_(to_fp8(values / scale_inv, DType.kFloat8E4M3).view(output.shape))


def _whole(part: Tensor, rows: int, columns: int, start: int, block: int) -> Tensor:
    """The part at its place in a matrix that is zero elsewhere and filled up to whole blocks."""
    matrix = torch.zeros(rows * columns)
    matrix[start : start + part.numel()] = part.detach().float().flatten()
    return torch.nn.functional.pad(matrix.view(rows, columns), (0, -columns % block, 0, -rows % block))
