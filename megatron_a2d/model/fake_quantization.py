"""Fake quantisation: fp32 values rounded to those that FP8 or NVFP4 can represent, on any device.

A matrix comes with the contraction of the product that reads it as its last axis, and blocks of values that share a
scale lie along that axis, so the two products that read a tensor in different directions round it differently. Scales
are those of Transformer Engine's kernels:

tensorwise  448 / amax of the matrix in e4m3 (57344 / amax in e5m2), in fp32 (common/recipe/current_scaling.cu)
blockwise   448 / amax of 1 x 128 or 128 x 128 values, rounded down to a power of two (recipe_common.cuh)
mxfp8       amax / 448 of 1 x 32 values, rounded up to a power of two, E8M0 (common/util/ptx.cuh, float_to_e8m0)
nvfp4       e4m3 scales of 1 x 16 or 16 x 16 values below one fp32 scale of the matrix (cast/nvfp4/core_nvfp4.cuh)

Codes are rounded to nearest, ties to even, and saturate. Shapes: R rows, K contraction.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
E2M1_MAX = 6.0
_LARGEST = torch.finfo(torch.float32).max
# Signs of the rows of the Hadamard transform: fixed random ones, the same in every layer of every run, as in
# Transformer Engine (pytorch/tensor/nvfp4_tensor.py).
_SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)


def amax_of(values: Tensor) -> Tensor:
    """The largest magnitude, fp32 []; 0 if there are no values."""
    return values.abs().amax().float() if values.numel() else values.new_zeros((), dtype=torch.float32)


def encode_scale(amax: Tensor, dtype: torch.dtype, power_of_two: bool = False) -> Tensor:
    """Factor on values of this amax before they are rounded to `dtype`; 1 where amax is 0 or infinite."""
    scale = _over(torch.finfo(dtype).max, amax)
    if power_of_two:
        scale = (scale.view(torch.int32) & -0x800000).view(torch.float32)  # the mantissa is cut off
    return torch.where((amax == 0) | ~amax.isfinite(), torch.ones_like(scale), scale)


def per_tensor(matrix_RK: Tensor, dtype: torch.dtype, scale: Tensor | None = None) -> Tensor:
    """Rounded with one scale: the given one, or that of these values."""
    scale = encode_scale(amax_of(matrix_RK), dtype) if scale is None else scale
    return _to_fp8(matrix_RK * scale, dtype) * scale.reciprocal()


def blockwise(matrix_RK: Tensor, dtype: torch.dtype = E4M3, square: bool = False) -> Tensor:
    """Rounded with a power of two for each 1 x 128 values, or each 128 x 128."""

    def rounded(blocks: Tensor, amax: Tensor) -> Tensor:
        scale = encode_scale(amax, dtype, power_of_two=True)
        return _to_fp8(blocks * scale, dtype) * scale.reciprocal()

    return _in_blocks(matrix_RK, 128 if square else 1, 128, rounded)


def mxfp8(matrix_RK: Tensor, dtype: torch.dtype = E4M3) -> Tensor:
    """Rounded with a power of two, no smaller than amax / 448, for each 1 x 32 values."""

    def rounded(blocks: Tensor, amax: Tensor) -> Tensor:
        decode_scale = _power_of_two_above(amax * (1 / torch.finfo(dtype).max))
        return _to_fp8(blocks / decode_scale, dtype) * decode_scale

    return _in_blocks(matrix_RK, 1, 32, rounded)


def nvfp4(matrix_RK: Tensor, square: bool = False, generator: torch.Generator | None = None) -> Tensor:
    """Rounded with an e4m3 scale for each 1 x 16 values, or each 16 x 16; stochastically if there is a generator."""
    amax = amax_of(matrix_RK)
    scale = _over(E2M1_MAX * torch.finfo(E4M3).max, amax)  # of the matrix
    scale = torch.where((amax == 0) | (scale == 0), torch.ones_like(scale), scale)

    def rounded(blocks: Tensor, amax: Tensor) -> Tensor:
        decode_scale = _to_fp8(amax * (scale * (1 / E2M1_MAX)), E4M3)
        codes = to_e2m1(blocks * (scale / decode_scale).clamp(max=_LARGEST), generator)
        return codes * decode_scale / scale

    return _in_blocks(matrix_RK, 16 if square else 1, 16, rounded)


def to_e2m1(values: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """The nearest of 0, 0.5, 1, 1.5, 2, 3, 4 and 6, ties to even; with a generator rounded stochastically, so that
    the expectation is the value. Saturates."""
    magnitude = values.abs().clamp(max=E2M1_MAX)
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    if generator is None:
        codes = torch.round(magnitude / step)
    else:
        noise = torch.rand(values.shape, generator=generator, device=values.device)
        codes = torch.floor(magnitude / step + noise)
    return (codes * step).copysign(values)


def hadamard(matrix_RK: Tensor) -> Tensor:
    """Each 16 values along K, with fixed random signs, times the orthonormal Hadamard matrix.

    K is zero-padded to a multiple of 16. A product is unchanged if both of its operands are transformed; outliers are
    spread over 16 values.
    """
    padded = F.pad(matrix_RK, (0, -matrix_RK.size(1) % 16))
    return (padded.view(len(padded), -1, 16) @ hadamard_matrix().to(padded.device)).view(padded.shape)


@functools.cache
def hadamard_matrix() -> Tensor:
    """[16, 16] fp32: signs times Sylvester's matrix / 4."""
    matrix = torch.ones(1, 1)
    for _ in range(4):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return torch.tensor(_SIGNS)[:, None] * matrix / 4


def generator_of(values: Tensor) -> torch.Generator:
    """A generator seeded with the values themselves: rounding is reproducible, also after a resume, without an RNG
    state in the checkpoint."""
    bits = values.float().contiguous().view(torch.int32).long()
    positions = torch.arange(1, bits.numel() + 1, device=bits.device).view(bits.shape)
    return torch.Generator(values.device).manual_seed(int((bits * positions).sum()) & 0x7FFFFFFFFFFFFFFF)


def _over(number: float, amax: Tensor) -> Tensor:
    """The quotient, rounded once, as kernels compute it (torch multiplies `number / amax` by a rounded reciprocal); at
    most the largest fp32."""
    return (torch.full_like(amax, number) / amax).clamp(max=_LARGEST)


def _to_fp8(values: Tensor, dtype: torch.dtype) -> Tensor:
    largest = torch.finfo(dtype).max
    return values.clamp(-largest, largest).to(dtype).float()


def _power_of_two_above(ratio: Tensor) -> Tensor:
    """The smallest power of two, at least 2^-127, that is not below the ratio; 2^127 for infinity and NaN."""
    mantissa, exponent = torch.frexp(ratio)  # ratio = mantissa * 2^exponent, mantissa in [0.5, 1)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
    biased = torch.where(ratio == 0, 0, (exponent + 127).clamp(0, 254))
    biased = torch.where(ratio.isfinite(), biased, 254).int()
    return torch.where(biased == 0, 2.0**-127, (biased << 23).view(torch.float32))


def _in_blocks(matrix_RK: Tensor, height: int, width: int, rounded: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """`rounded` applied to the blocks [R', height, K', width] and their amax; incomplete blocks are zero-padded."""
    rows, columns = matrix_RK.shape
    padded = F.pad(matrix_RK, (0, -columns % width, 0, -rows % height))
    blocks = padded.view(padded.size(0) // height, height, padded.size(1) // width, width)
    return rounded(blocks, blocks.abs().amax((1, 3), keepdim=True)).view(padded.shape)[:rows, :columns]
