"""Rotary embedding of batches and of packed sequences, forward and backward."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from tests.transformer_engine.stand_in.enums import NVTE_QKV_Format
from tests.transformer_engine.stand_in.fp8_casts import check


def fused_rope_forward(
    input: Tensor, freqs: Tensor, start: Any, form: Any, interleaved: bool, bounds: Any, cp_size: int, cp_rank: int
) -> Tensor:
    _check(input, freqs, start, interleaved, cp_size)
    return _over_sequences(input, freqs[:, 0, 0], form, bounds, _rotate)


def fused_rope_backward(
    gradient: Tensor, freqs: Tensor, start: Any, form: Any, interleaved: bool, bounds: Any, cp_size: int, cp_rank: int
) -> Tensor:
    _check(gradient, freqs, start, interleaved, cp_size)
    return _over_sequences(gradient, freqs[:, 0, 0], form, bounds, _rotate_back)


def _check(x: Tensor, freqs: Tensor, start: Any, interleaved: bool, cp_size: int) -> None:
    check(freqs.dim() == 4, "expected 4D tensor")
    check(freqs.shape[1:3] == (1, 1), "expected the second and third dims of the freqs tensor equal 1")
    check(freqs.dtype == torch.float32, "Dtype of the freqs tensor must be float")
    check(x.size(-1) >= freqs.size(3), "expected the last dim of the input to be that of the freqs tensor or more")
    check(not interleaved and start is None and cp_size == 1, "interleaved, shifted or divided angles are not offered")


def _over_sequences(x: Tensor, table: Tensor, form: Any, bounds: Any, rotate: Any) -> Tensor:
    if form == NVTE_QKV_Format.NVTE_THD:
        check(x.dim() == 3 and bounds is not None and bounds.dim() == 1, "expected cu_seqlens tensor")
        result = torch.zeros_like(x)
        for begin, end in itertools.pairwise(bounds.tolist()):
            check(end - begin <= table.size(0), "a sequence is longer than the angles")
            result[begin:end] = rotate(x[begin:end], table[: end - begin])
        return result
    check(x.dim() == 4, "expected 4D tensor")
    is_sbhd = form == NVTE_QKV_Format.NVTE_SBHD
    x = x if is_sbhd else x.transpose(0, 1)
    check(x.size(0) <= table.size(0), "expected freqs tensor has a longer sequence length than input")
    result = rotate(x, table[: x.size(0)])
    return (result if is_sbhd else result.transpose(0, 1)).contiguous()


def _split(x: Tensor, freqs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What is turned, what passes, and the angles, of x [s, ..., d] and freqs [s, d2]."""
    size = freqs.size(-1)
    return x[..., :size].float(), x[..., size:], freqs.view(freqs.size(0), *[1] * (x.dim() - 2), size)


def _rotate(x: Tensor, freqs: Tensor) -> Tensor:
    turned, passed, angles = _split(x, freqs)
    first, second = turned.chunk(2, -1)
    result = turned * angles.cos() + torch.cat([-second, first], -1) * angles.sin()
    return torch.cat([result.to(x.dtype), passed], -1)


def _rotate_back(x: Tensor, freqs: Tensor) -> Tensor:
    turned, passed, angles = _split(x, freqs)
    first, second = (turned * angles.sin()).chunk(2, -1)
    result = turned * angles.cos() + torch.cat([second, -first], -1)
    return torch.cat([result.to(x.dtype), passed], -1)
