"""Numbers in FP8: casts that saturate, scales from maxima, and scales that are powers of two (E8M0 bytes)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tests.transformer_engine.stand_in.enums import torch_dtype


def check(condition: Any, message: str) -> None:
    """What the extension refuses with a RuntimeError."""
    if not condition:
        raise RuntimeError(f"transformer_engine_torch (stand-in): {message}")


def largest(dtype: Any) -> float:
    """The largest number of an FP8 type: 448 (e4m3), 57344 (e5m2)."""
    return torch.finfo(torch_dtype(dtype)).max


def to_fp8(values: Tensor, dtype: Any) -> Tensor:
    """Raw bytes of the nearest numbers of the type; what lies beyond the largest becomes the largest."""
    return values.clamp(-largest(dtype), largest(dtype)).to(torch_dtype(dtype)).view(torch.uint8)


def from_fp8(raw: Tensor, dtype: Any) -> Tensor:
    return raw.view(torch_dtype(dtype)).float()


def quotient(number: float, divisor: Tensor) -> Tensor:
    """Rounded once, as __fdiv_rn; `number / divisor` of torch is the product with a rounded reciprocal."""
    return torch.full_like(divisor, number) / divisor


def scale_from_amax(amax: Tensor, dtype: Any, pow_2: bool, epsilon: float) -> Tensor:
    """What values are multiplied by before the cast: the largest number of the type over the largest value."""
    amax = amax.float().clamp(min=epsilon)
    scale = quotient(largest(dtype), amax).clamp(max=torch.finfo(torch.float32).max)
    if pow_2:
        mantissa, exponent = torch.frexp(scale)
        scale = torch.ldexp(torch.full_like(mantissa, 0.5), exponent)
    return torch.where(amax.isinf() | (amax == 0), torch.ones_like(scale), scale)


def e8m0_from_amax(amax: Tensor, dtype: Any) -> Tensor:
    """Bytes of the least power of two that brings the largest value within the type (rounded up, as MXFP8 does)."""
    ratio = amax.float() / largest(dtype)
    mantissa, exponent = torch.frexp(ratio)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)  # powers of two are exact already
    return torch.where(ratio == 0, torch.zeros_like(exponent), (exponent + 127).clamp(0, 254)).to(torch.uint8)


def from_e8m0(raw: Tensor) -> Tensor:
    return torch.exp2(raw.float() - 127)


def replace_halves(output: Any, halves: dict[str, Tensor | None]) -> None:
    """Give an existing tensor the halves that are wanted now and missing, and drop those that are not wanted."""
    for name, fresh in halves.items():
        if fresh is None or getattr(output, f"_{name}") is None:
            setattr(output, f"_{name}", fresh)


def flat(tensor: Tensor) -> Tensor:
    """[..., k] as a matrix [m, k]."""
    return tensor.reshape(-1, tensor.shape[-1])


def transposed_shape(shape: Any) -> tuple[int, ...]:
    """Of the transpose of the matrix [m, k], m kept as it was given."""
    return (shape[-1], *shape[:-1])


def num_rows(shape: Any) -> int:
    return math.prod(shape[:-1])


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def reads_operands_as_they_lie() -> bool:
    """Blackwell's FP8 products take operands in either order; Hopper's want a transposed copy."""
    return torch.cuda.get_device_capability() >= (10, 0)
