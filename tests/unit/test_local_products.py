"""The portable layers' own products and pointwise functions: outputs and gradients are those of the plain formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

from megatron_a2d.model import matrix_products
from megatron_a2d.model.local_attention import normed_and_rotated, rotated
from megatron_a2d.model.local_linear import LinearProduct, LocalColumnParallelLinear
from megatron_a2d.model.rms_norm import _Norm
from megatron_a2d.model.swiglu import swiglu

EPS = 1e-3  # large enough to matter


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gradients(function: Any, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """The output, and the gradients of all inputs for a fixed gradient of the output."""
    inputs = tuple(tensor.detach().clone().requires_grad_() for tensor in inputs)
    output = function(*inputs)
    output.backward(random(*output.shape, seed=9).to(output.dtype))
    return [output.detach(), *(tensor.grad for tensor in inputs if tensor.grad is not None)]


def same(found: list[torch.Tensor], expected: list[torch.Tensor], **tolerance: float) -> None:
    assert len(found) == len(expected)
    for ours, plain in zip(found, expected, strict=True):
        assert ours.dtype == plain.dtype
        torch.testing.assert_close(ours, plain, **tolerance)


@pytest.mark.parametrize("has_onednn", [True, False])
@pytest.mark.parametrize("shape", [(5, 3, 24), (7, 24), (1, 1, 24), (0, 2, 24)])
def test_linear_product(shape: tuple[int, ...], has_onednn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix_products, "_has_onednn", lambda: has_onednn)
    inputs = random(*shape), random(40, 24, seed=1)
    same(gradients(LinearProduct.apply, *inputs), gradients(F.linear, *inputs), rtol=1e-5, atol=1e-5)


def test_linear_layer_with_a_bias() -> None:
    """As megatron.core calls it for queries, keys and values."""

    def layer(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        options = {"bias": bias, "allreduce_dgrad": False, "sequence_parallel": False}
        return LocalColumnParallelLinear._forward_impl(None, x, weight, **options)  # type: ignore[arg-type]

    inputs = random(5, 3, 24), random(40, 24, seed=1), random(40, seed=2)
    same(gradients(layer, *inputs), gradients(F.linear, *inputs), rtol=1e-5, atol=1e-5)


def test_this_torch_has_onednns_product() -> None:
    """Otherwise the products are torch's own, and slower."""
    assert matrix_products._has_onednn()


@pytest.mark.parametrize("bf16", [False, True])
def test_weight_gradients_go_to_megatrons_buffer(bf16: bool) -> None:
    """Summed over micro-batches in fp32, and not once more by autograd."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    weight = random(40, 24).to(dtype).requires_grad_()
    weight.main_grad = torch.ones(40, 24)  # type: ignore[attr-defined]
    expected = torch.ones(40, 24)
    for seed in range(2):
        x, gradient = random(30, 24, seed=seed).to(dtype), random(30, 40, seed=7 + seed).to(dtype)
        LinearProduct.apply(x, weight).backward(gradient)
        expected += gradient.float().T @ x.float()
    torch.testing.assert_close(weight.main_grad, expected, rtol=1e-2 if bf16 else 1e-5, atol=0.1 if bf16 else 1e-5)  # type: ignore[attr-defined]
    assert weight.grad_added_to_main_grad  # type: ignore[attr-defined]


def test_a_frozen_weight_has_no_gradient() -> None:
    x, weight = random(5, 24).requires_grad_(), random(40, 24)
    weight.main_grad = torch.zeros(40, 24)  # type: ignore[attr-defined]
    LinearProduct.apply(x, weight).sum().backward()
    assert weight.grad is None and not weight.main_grad.any()  # type: ignore[attr-defined]
    torch.testing.assert_close(x.grad, weight.sum(0).expand(5, 24), rtol=1e-5, atol=1e-5)


def plain_swiglu(inner: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    gate, up = inner.chunk(2, dim=-1)
    output = F.silu(gate) * up
    return output if weights is None else (output * weights[..., None]).to(inner.dtype)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_swiglu(dtype: torch.dtype, tolerance: float, weighted: bool) -> None:
    inputs = [(random(6, 5, 32) * 3).to(dtype)] + ([random(6, 5, seed=1)] if weighted else [])
    same(gradients(swiglu, *inputs), gradients(plain_swiglu, *inputs), rtol=tolerance, atol=10 * tolerance)


def test_swiglu_of_no_rows() -> None:
    inputs = random(0, 32), random(0)
    same(gradients(swiglu, *inputs), gradients(plain_swiglu, *inputs))


def plain_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, (x.size(-1),), weight, EPS)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("shape", [(5, 3, 24), (0, 3, 24)])
def test_norm(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    inputs = (random(*shape) * 3).to(dtype), random(24, seed=1).to(dtype)
    found = gradients(lambda x, weight: _Norm.apply(x, weight, EPS), *inputs)
    same(found, gradients(plain_norm, *inputs), rtol=tolerance, atol=20 * tolerance)


def plain_attention_inputs(qkv: torch.Tensor, *weights: torch.Tensor, angles: Any) -> Any:
    """As megatron.core computes them, one after another; without `weights` queries and keys have no norms."""
    width = qkv.size(-1)
    query, key, value = qkv.flatten(3).split([2 * width, width, width], dim=-1)
    query = query.reshape(*query.shape[:2], -1, width)
    parts = [plain_norm(*pair) for pair in zip((query, key), weights, strict=True)] if weights else [query, key]
    return torch.cat([*(_apply_rotary_pos_emb_bshd(part, angles) for part in parts), value], dim=2)


@pytest.mark.parametrize("angles_per_sample", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 3e-2)])
def test_norms_and_rotation(dtype: torch.dtype, tolerance: float, angles_per_sample: bool) -> None:
    """Two groups of two queries, a key and a value; the angles are those of positions, or of each sample's own."""
    inputs = [random(6, 3, 2, 4, 8), random(8, seed=1) + 1, random(8, seed=2) - 1]
    half = random(6, 3 if angles_per_sample else 1, 1, 4, seed=3) * 3
    angles = torch.cat([half, half], dim=-1)

    def ours(*tensors: torch.Tensor) -> torch.Tensor:
        return torch.cat(normed_and_rotated(*tensors, angles, EPS), dim=2)

    inputs = [tensor.to(dtype) for tensor in inputs]
    plain = gradients(lambda *tensors: plain_attention_inputs(*tensors, angles=angles), *inputs)
    same(gradients(ours, *inputs), plain, rtol=tolerance, atol=20 * tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_rotation_without_norms(dtype: torch.dtype, tolerance: float) -> None:
    qkv, half = random(6, 3, 2, 4, 8).to(dtype), random(6, 3, 1, 4, seed=3) * 3
    angles = torch.cat([half, half], dim=-1)
    plain = gradients(lambda tensor: plain_attention_inputs(tensor, angles=angles), qkv)
    ours = gradients(lambda tensor: torch.cat(rotated(tensor, angles), dim=2), qkv)
    same(ours, plain, rtol=tolerance, atol=20 * tolerance)
