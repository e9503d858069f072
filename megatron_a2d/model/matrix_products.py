"""Matrix products on CPUs: oneDNN's in fp32, and products of bf16 matrices on processors that have none.

In fp32 oneDNN's are a tenth faster than MKL's, which torch uses, on AMD's processors.

Without AVX512 or AMX torch computes bf16 products in scalar loops, 5 to 100 times slower than in fp32 (torch 2.13.0;
findings/torch_bf16_products_on_avx2.sh). There the matrices are converted to fp32, the weight a part at a time, and the
result is rounded once, as GPUs do. Elsewhere, and on GPUs, these are torch's products. Shapes: [m, k] @ [k, n].
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

WIDENED_VALUES = 1 << 20  # of the weight in fp32 at a time: 4 MB, which stay in the cache
FEW_ROWS = 5  # fewer cost less in torch's loops over a transposed weight than the weight's conversion


def is_widened(matrix: Tensor) -> bool:
    """Whether products of this matrix are computed in fp32: it is bf16 on a CPU for which torch has no fast ones."""
    return matrix.dtype == torch.bfloat16 and matrix.device.type == "cpu" and not _has_bf16_products()


@functools.cache
def _has_bf16_products() -> bool:
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):  # a torch without oneDNN, or with another name of it
        return False


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ W.T of x [..., i] and W [o, i], without a gradient; W may be a transposed view."""
    if is_widened(x):
        output = x.new_empty(*x.shape[:-1], len(weight))
        multiply(x.reshape(-1, x.size(-1)), weight.T, out=output.view(-1, len(weight)))
        return output
    if x.dtype == torch.float32 and x.device.type == "cpu" and _has_onednn():
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return F.linear(x, weight)


def multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b, without a gradient."""
    if not is_widened(a) or (len(a) < FEW_ROWS and b.stride(0) == 1):
        torch.mm(a, b, out=out)
        return
    if b.size(1) >= b.size(0):
        a = a.float()
        for part in _parts(b.size(1), b.size(0)):
            out[:, part] = linear(a, b[:, part].float().T)
        return
    total = torch.zeros(out.shape, device=out.device)
    for part in _parts(b.size(0), b.size(1)):
        total.addmm_(a[:, part].float(), b[part].float())
    out.copy_(total)


def add_transposed_product(buffer: Tensor, a: Tensor, b: Tensor) -> None:
    """buffer += a.T @ b of bf16 matrices, in fp32: for matrices that `is_widened`."""
    b = b.float()
    for part in _parts(a.size(1), len(a)):
        buffer[part].addmm_(a[:, part].float().T, b)


def _parts(length: int, width: int) -> Iterator[slice]:
    """Slices of an axis of `length`, of WIDENED_VALUES values each where the other axis has `width`."""
    step = max(1, WIDENED_VALUES // max(1, width))
    return (slice(start, start + step) for start in range(0, length, step))


@functools.cache
def _has_onednn() -> bool:
    """Whether this torch has oneDNN's product under the name that its compiler uses, found by trying it."""
    x, weight = torch.arange(6.0).view(2, 3), torch.arange(12.0).view(3, 4).T
    try:
        return torch.equal(torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], ""), x @ weight.T)
    except (AttributeError, RuntimeError, TypeError):
        return False
