"""Substitutes for data-dependent values and sizes, assuming balanced routing.

Every expert is chosen by the same number of tokens, to within one; in a mask [tokens, experts] the fraction
`experts per token / experts` is true. Unknown values, such as a gradient norm, are 1. Counts that are computed from a
mask on the GPU (tokens per expert, split sizes) are propagated through later operations until the host reads them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
_LARGEST = 1 << 20  # elements of a tensor whose values are propagated


class Routing:
    """Router sizes of the rehearsed model; a dense model routes nothing."""

    num_experts = experts_per_token = 1


def balanced_counts(tokens: int, experts: int) -> Tensor:
    """[experts] int64: how many of `tokens` each of these experts receives; the sum is their share to within one."""
    edges = torch.arange(experts + 1) * tokens * Routing.experts_per_token // Routing.num_experts
    return edges.diff()


def chosen(mask: Tensor) -> int:
    """Number of true values in a mask [tokens, experts], or in a slice of one."""
    return mask.numel() * Routing.experts_per_token // Routing.num_experts


def why_host_waits(function: Any, args: Any, kwargs: Any) -> str | None:
    """How this operation synchronises the host (it reads a value or a data-dependent size); None if it does not."""
    if function in _READS:
        return _READS[function] if args[0].is_meta else None
    if function is aten._to_copy.default:
        return "copy to the host" if args[0].is_meta and _to_host(kwargs) else None
    if function is aten.copy_.default:
        return "copy to the host" if args[1].is_meta and not args[0].is_meta else None
    if function is aten.index.Tensor or (function is aten.index_put_.default and args[2].numel() > 1):
        return "index by a mask" if any(_is_mask(index) for index in args[1]) else None
    return None


_READS = {
    aten._local_scalar_dense.default: ".item()",
    aten.nonzero.default: "nonzero",
    aten.masked_select.default: "masked_select",
    aten.equal.default: "equal",
    aten.repeat_interleave.Tensor: "repeat_interleave",
}


def _to_host(kwargs: Any) -> bool:
    device = kwargs.get("device")
    return device is not None and torch.device(device).type == "cpu"


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.is_meta and index.dtype in (torch.bool, torch.uint8)


def answer(function: Any, args: Any, kwargs: Any) -> Any:
    """The operation's result on the host."""
    tensor = args[0]
    if function is aten._local_scalar_dense.default:
        return _value(tensor).item()
    if function is aten._to_copy.default:
        return _value(tensor).to(kwargs.get("dtype") or tensor.dtype)
    if function is aten.copy_.default:
        return tensor.copy_(_value(args[1]))
    if function is aten.masked_select.default:
        return tensor.new_empty(chosen(args[1]))
    if function is aten.nonzero.default:
        return tensor.new_empty(chosen(tensor), tensor.dim(), dtype=torch.int64)
    if function is aten.equal.default:
        return True
    if function is aten.index.Tensor and [index is None for index in args[1]].count(False) == 1:
        dim, mask = next((dim, index) for dim, index in enumerate(args[1]) if index is not None)
        return tensor.new_empty(*tensor.shape[:dim], chosen(mask), *tensor.shape[dim + mask.dim() :])
    raise NotImplementedError(f"{function}: its size depends on data, and balanced routing does not determine it")


def _value(tensor: Tensor) -> Tensor:
    value = known(tensor)
    return torch.ones(tensor.shape, dtype=tensor.dtype) if value is None else value


def known(tensor: Tensor) -> Tensor | None:
    """The values of a GPU tensor, if balanced routing determines them."""
    return getattr(tensor, "balanced_values", None)


def follow(function: Any, args: Any, kwargs: Any, result: Any) -> None:
    """Attach values to `result`, which torch's `function` returned, if those of `args` determine them."""
    if not isinstance(result, Tensor) or not result.is_meta or result.numel() > _LARGEST:
        return
    if _counts_chosen(function, args, kwargs):
        result.balanced_values = balanced_counts(args[0].size(0), args[0].size(1))  # type: ignore[attr-defined]
        return
    if result.dtype.is_floating_point or not any(known(tensor) is not None for tensor in _tensors(args)):
        return
    if any(
        tensor.is_meta and known(tensor) is None for tensor in tree_leaves((args, kwargs)) if torch.is_tensor(tensor)
    ):
        return
    with _disable_current_modes():
        host_args, host_kwargs = tree_map(_on_host, (args, kwargs))
        value = function(*host_args, **host_kwargs)
    if isinstance(value, Tensor) and value.shape == result.shape:
        result.balanced_values = value  # type: ignore[attr-defined]


def _tensors(args: Any) -> Iterator[Tensor]:
    """Of an operation's arguments, in lists too."""
    for value in args:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from (item for item in value if isinstance(item, Tensor))


def _on_host(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_meta:
        return known(value)
    if isinstance(value, torch.device):
        return torch.device("cpu")
    return value


def _counts_chosen(function: Any, args: Any, kwargs: Any) -> bool:
    """Whether the function sums a mask [tokens, experts] over tokens."""
    if function not in (torch.Tensor.sum, torch.sum) or args[0].dtype != torch.bool or args[0].dim() != 2:
        return False
    dim = kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else None))
    return dim in (0, (0,), [0])


def communicate(operation: str, args: Any, size: int) -> None:
    """Propagate values through a collective: all ranks have the same."""
    if operation == "all_gather" and isinstance(args[0], Tensor) and (value := known(args[1])) is not None:
        args[0].balanced_values = value.flatten().repeat(size).view(args[0].shape)  # type: ignore[attr-defined]
