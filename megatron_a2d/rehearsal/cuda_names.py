"""Tensors without data under the name "cuda": torch's meta device, and CUDA kernels that it lacks.

A tensor that is made for, or moved to, "cuda" takes no memory and says that it is on cuda:0. Tensors of the host are
real, so what is computed there (samples, loss positions) is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from megatron_a2d.rehearsal import balanced_routing

META, GPU = torch.device("meta"), torch.device("cuda", 0)


class CudaNames(TorchFunctionMode):
    """Active while a rank is built and runs its step."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function in _INSTEAD:
            return _INSTEAD[function](*args, **(kwargs or {}))
        if not kwargs and len(args) == 1:  # most calls: a tensor's attribute or view
            result = function(*args)
            balanced_routing.follow(function, args, {}, result)
            return result
        args = tuple(META if is_gpu(value) else value for value in args)
        kwargs = {name: META if is_gpu(value) else value for name, value in (kwargs or {}).items()}
        if isinstance(kwargs.get("device"), int):  # torch.cuda.current_device()
            kwargs["device"] = META
        kwargs.pop("pin_memory", None)
        result = function(*args, **kwargs)
        balanced_routing.follow(function, args, kwargs, result)
        return result


def is_gpu(value: Any) -> bool:
    """Whether this device is the GPU."""
    if isinstance(value, torch.device):
        return value.type == "cuda"
    return isinstance(value, str) and (value == "cuda" or value.startswith("cuda:"))


def _device(*args: Any, **kwargs: Any) -> torch.device:
    """torch.device(...), which may be given torch.cuda.current_device()."""
    return GPU if args and isinstance(args[0], int) else torch.device(*args, **kwargs)


def _device_of(tensor: Tensor) -> torch.device:
    return GPU if tensor.is_meta else torch._C.TensorBase.device.__get__(tensor)  # type: ignore[attr-defined]


def _type_of(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    result = torch._C.TensorBase.type(tensor, *args, **kwargs)
    return result.replace("torch.meta.", "torch.cuda.") if isinstance(result, str) else result


def _normal(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return tensor if tensor.is_meta else torch._C.TensorBase.normal_(tensor, *args, **kwargs)


def _tensor(data: Any, *args: Any, **kwargs: Any) -> Tensor:
    """torch.tensor(data): tensors among its numbers are read one by one."""
    if is_gpu(kwargs.get("device")) or isinstance(kwargs.get("device"), int):
        kwargs["device"] = META
    return torch.tensor(_read(data), *args, **kwargs)


def _read(data: Any) -> Any:
    if isinstance(data, list | tuple):
        return [_read(value) for value in data]
    return data.item() if isinstance(data, Tensor) and data.is_meta else data


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """scaled_dot_product_attention by CUDA's kernels, which keep no scores: flash attention, and with a mask or in fp32
    the memory-efficient one."""
    if attn_mask is None and query.dtype != torch.float32:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, scale=scale)[0]
    groups = query.size(1) // key.size(1)
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    bias = None
    if attn_mask is not None:
        bias = torch.empty(attn_mask.shape, dtype=query.dtype, device=META)
        bias = bias.expand(*query.shape[:2], query.size(2), key.size(2))
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, bias, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale)[0]


class _FusedRMSNorm(torch.autograd.Function):
    """torch's norm on CUDA: keeps its input and one number for each row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight, torch.empty(x.shape[:-1], dtype=torch.float32, device=META))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def _rms_norm(x: Tensor, shape: Any, weight: Tensor, eps: float | None = None) -> Tensor:
    return _FusedRMSNorm.apply(x, weight)


class _FlexAttention(torch.autograd.Function):
    """FlexAttention's kernels: keep their inputs, the output (laid out as the queries) and one number for each row."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # type: ignore[override]
        output = torch.empty_like(query)
        ctx.save_for_backward(
            query, key, value, output, torch.empty(query.shape[:-1], dtype=torch.float32, device=META)
        )
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def flex_attention(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    """Substitute for model/masked_attention.py's flex_attention, whose mask depends on data."""
    output: Tensor = _FlexAttention.apply(query, key, value)
    return output


_INSTEAD: dict[Any, Callable[..., Any]] = {
    torch.device: _device,
    torch.tensor: _tensor,
    torch.Tensor.is_cuda.__get__: lambda tensor: tensor.is_meta,  # type: ignore[attr-defined]
    torch.Tensor.device.__get__: _device_of,  # type: ignore[attr-defined]
    torch.Tensor.type: _type_of,
    torch.Tensor.normal_: _normal,
    torch.Tensor.cuda: lambda tensor, *args, **kwargs: tensor.to(META),
    functional.scaled_dot_product_attention: _attention,
    functional.rms_norm: _rms_norm,
    torch.rms_norm: _rms_norm,
}
