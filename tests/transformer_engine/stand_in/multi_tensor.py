"""Kernels that go through many tensors at once: scaling, norms, Adam, and the scales of delayed FP8."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.transformer_engine.stand_in.enums import DType
from tests.transformer_engine.stand_in.fp8_casts import check, e8m0_from_amax, largest, quotient, scale_from_amax


def multi_tensor_scale(chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], scale: float) -> None:
    for source, target in zip(*tensor_lists, strict=True):
        if not torch.isfinite(source).all():
            noop_flag.fill_(1)
        target.copy_(source.float() * scale)


def multi_tensor_l2norm(
    chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], per_tensor: bool | None = False
) -> tuple[Tensor, Tensor]:
    norms = torch.stack([tensor.float().norm() for tensor in tensor_lists[0]])
    return norms.norm().view(1), norms if per_tensor else torch.empty(0)


def multi_tensor_unscale_l2norm(
    chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], inv_scale: Tensor,
    per_tensor: bool | None = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    norm, norms = multi_tensor_l2norm(chunk_size, noop_flag, tensor_lists, per_tensor)
    return norm * inv_scale, norms * inv_scale


def multi_tensor_adam(
    chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], lr: float, beta1: float, beta2: float,
    epsilon: float, step: int, mode: int, bias_correction: int, weight_decay: float,
) -> None:  # fmt: skip
    """Adam (mode 0) or AdamW (mode 1); with a fifth list, the fp32 main weights of the parameters."""
    correction1, correction2 = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1.0, 1.0)
    for gradient, parameter, m, v, *main in zip(*tensor_lists, strict=True):
        weight = main[0] if main else parameter
        g, p = gradient.float(), weight.float()
        if mode == 0:
            g = g + weight_decay * p
        next_m, next_v = beta1 * m.float() + (1 - beta1) * g, beta2 * v.float() + (1 - beta2) * g * g
        update = (next_m / correction1) / ((next_v / correction2).sqrt() + epsilon)
        p = p - lr * (update + (weight_decay * p if mode else 0.0))
        for place, value in ((m, next_m), (v, next_v), (weight, p), (parameter, p)):
            place.copy_(value)


def multi_tensor_adam_param_remainder(
    chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], lr: float, beta1: float, beta2: float,
    epsilon: float, step: int, mode: int, bias_correction: int, weight_decay: float,
) -> None:  # fmt: skip
    """Adam whose main weight is split: its upper half, rounded to nearest, is the bf16 parameter, the lower is kept."""
    for gradient, parameter, m, v, remainder in zip(*tensor_lists, strict=True):
        check(parameter.dtype == torch.bfloat16 and remainder.dtype == torch.int16, "types of a split main weight")
        main = join(parameter.detach(), remainder)
        multi_tensor_adam(
            chunk_size, noop_flag, [[gradient], [main], [m], [v]], lr, beta1, beta2, epsilon, step, mode,
            bias_correction, weight_decay,
        )  # fmt: skip
        upper, lower = split(main)
        parameter.copy_(upper)
        remainder.copy_(lower)


def split(main: Tensor) -> tuple[Tensor, Tensor]:
    """(bf16, int16) of fp32: its lower bits as a signed number, and the upper ones raised by one where that is negative."""
    bits = main.contiguous().view(torch.int32)
    low = (bits << 16) >> 16
    high = (bits >> 16) + (low < 0).to(torch.int32)
    return high.to(torch.int16).view(torch.bfloat16), low.to(torch.int16)


def join(upper: Tensor, lower: Tensor) -> Tensor:
    low = lower.to(torch.int32)
    high = upper.contiguous().view(torch.int16).to(torch.int32) - (low < 0).to(torch.int32)
    return ((high << 16) | (low & 0xFFFF)).view(torch.float32)


def multi_tensor_compute_scale_and_scale_inv(
    chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], max_fp8: float, force_pow_2_scales: bool,
    epsilon: float,
) -> None:  # fmt: skip
    dtype = DType.kFloat8E4M3 if max_fp8 == largest(DType.kFloat8E4M3) else DType.kFloat8E5M2
    for amax, scale, scale_inv in zip(*tensor_lists, strict=True):
        scale.copy_(scale_from_amax(amax, dtype, force_pow_2_scales, epsilon))
        scale_inv.copy_(scale.reciprocal())


def multi_tensor_compute_scale_inv_e8m0(
    chunk_size: int, noop_flag: Any, tensor_lists: list[list[Tensor]], *_: Any
) -> None:
    for amax, scale_inv in zip(*tensor_lists, strict=True):
        scale_inv.copy_(e8m0_from_amax(amax, DType.kFloat8E4M3).view(scale_inv.shape))


def fused_amax_and_scale_update_after_reduction(
    amax_reduction_buffer: Tensor, amax_histories: list[Tensor], scales: list[Tensor], amax_compute_algo: str,
    fp8_dtype: Any, margin: float,
) -> None:  # fmt: skip
    """Delayed scaling: put the step's maxima into the histories and make the next step's scales of them."""
    start = 0
    for history, scale in zip(amax_histories, scales, strict=True):
        reduced = amax_reduction_buffer[start : start + scale.numel()]
        start += scale.numel()
        last = torch.where(reduced != 0, reduced, history[0])
        rolled = torch.cat([history[1:], last[None]])
        amax = last if amax_compute_algo == "most_recent" else rolled.amax(0) * (last != 0)
        rolled[0] = 0
        history.copy_(torch.where(last != 0, rolled, history))
        wanted = quotient(largest(fp8_dtype) / 2**margin, amax).clamp(max=torch.finfo(torch.float32).max)
        scale.copy_(torch.where(torch.isfinite(amax) & (amax > 0), wanted, scale))
