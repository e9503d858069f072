"""Emulated FP8 and NVFP4 products against each recipe's formula, written out; which layers and settings get them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_a2d.config.fp8_recipe import Emulation, emulation_of, engine_scaling
from megatron_a2d.config.settings import build
from megatron_a2d.model import emulated_layers
from megatron_a2d.model.chunked_cross_entropy import losses_of_logits
from megatron_a2d.model.emulated_layers import EmulatedProduct, _DelayedRounding, _DelayedScales, _Emulated
from megatron_a2d.model.fake_quantization import (
    E4M3,
    E5M2,
    blockwise,
    encode_scale,
    generator_of,
    hadamard,
    mxfp8,
    nvfp4,
    per_tensor,
)

TOKENS, IN, OUT = 80, 96, 64


def operands() -> tuple[Tensor, Tensor, Tensor]:
    """x [4, 20, in], W [out, in], dy [4, 20, out], with outliers."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, TOKENS // 4, IN), (OUT, IN), (4, TOKENS // 4, OUT))
    x, weight, dy = (torch.randn(shape, generator=generator) for shape in shapes)
    x[1, 2, 3], dy[2, 3, 4] = 40.0, -30.0
    return x, weight, dy


def _tensorwise(x: Tensor, w: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    x8, w8, dy8 = per_tensor(x, E4M3), per_tensor(w, E4M3), per_tensor(dy, E5M2)
    return x8 @ w8.T, dy8 @ w8, dy8.T @ x8


def _blockwise(x: Tensor, w: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    w8 = blockwise(w, square=True)
    return blockwise(x) @ w8.T, blockwise(dy) @ w8, blockwise(dy.T) @ blockwise(x.T).T


def _mxfp8(x: Tensor, w: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    return mxfp8(x) @ mxfp8(w).T, mxfp8(dy) @ mxfp8(w.T).T, mxfp8(dy.T) @ mxfp8(x.T).T


def _nvfp4(x: Tensor, w: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    w4, tokens_o, tokens_i = nvfp4(w, square=True), hadamard(dy.T), hadamard(x.T)
    rows, columns = (nvfp4(values, generator=generator_of(values)) for values in (dy, tokens_o))
    return nvfp4(x) @ w4.T, rows @ w4, columns @ nvfp4(tokens_i).T


FORMULAS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "tensorwise": _tensorwise, "blockwise": _blockwise, "mxfp8": _mxfp8, "nvfp4": _nvfp4,
}  # fmt: skip


def product(x: Tensor, weight: Tensor, dy: Tensor, rounding: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = EmulatedProduct.apply(x, weight, rounding)
    y.backward(dy.to(y.dtype))
    assert x.grad is not None and weight.grad is not None
    return y.detach(), x.grad, weight.grad


@pytest.mark.parametrize("recipe", FORMULAS)
def test_a_linear_layer_is_its_formula(recipe: str) -> None:
    x, weight, dy = operands()
    found = product(x, weight, dy, emulated_layers._ROUNDINGS[recipe])
    expected = FORMULAS[recipe](x.flatten(0, 1), weight, dy.flatten(0, 1))
    exact = (x.flatten(0, 1) @ weight.T, dy.flatten(0, 1) @ weight, dy.flatten(0, 1).T @ x.flatten(0, 1))
    for value, formula, plain in zip(found, expected, exact, strict=True):
        torch.testing.assert_close(value.view(formula.shape), formula, rtol=1e-5, atol=1e-4)
        assert 0.01 < (formula - plain).norm() / plain.norm() < 0.25, "rounded, and no more than that"


@pytest.mark.parametrize(
    ("part", "changed"), [("RHT", (2,)), ("STOCHASTIC_ROUNDING", (1, 2)), ("2D_QUANTIZATION", (0, 1))]
)
def test_transformer_engines_switches_of_nvfp4(
    part: str, changed: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each changes the products that it concerns, and no other; without all of them it is the plain format."""
    rounding = emulated_layers._ROUNDINGS["nvfp4"]
    x, weight, dy = operands()
    usual = product(x, weight, dy, rounding)
    monkeypatch.setenv(f"NVTE_NVFP4_DISABLE_{part}", "1")
    found = product(x, weight, dy, rounding)
    assert tuple(n for n in range(3) if not torch.equal(found[n], usual[n])) == changed
    for other in ("RHT", "STOCHASTIC_ROUNDING", "2D_QUANTIZATION"):
        monkeypatch.setenv(f"NVTE_NVFP4_DISABLE_{other}", "1")
    x2, dy2 = x.flatten(0, 1), dy.flatten(0, 1)
    plain = (nvfp4(x2) @ nvfp4(weight).T, nvfp4(dy2) @ nvfp4(weight.T).T, nvfp4(dy2.T) @ nvfp4(x2.T).T)
    for value, formula in zip(product(x, weight, dy, rounding), plain, strict=True):
        torch.testing.assert_close(value.view(formula.shape), formula, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("recipe", FORMULAS)
def test_bf16_is_rounded_once(recipe: str) -> None:
    """Operands in bf16, sums in fp32, results in bf16; no tokens give zeros."""
    x, weight, dy = (tensor.bfloat16() for tensor in operands())
    found = product(x, weight, dy, emulated_layers._ROUNDINGS[recipe])
    wide = product(x.float(), weight.float(), dy.float(), emulated_layers._ROUNDINGS[recipe])
    for value, expected in zip(found, wide, strict=True):
        assert value.dtype == torch.bfloat16 and torch.equal(value, expected.bfloat16())
    empty = product(x[:0], weight, dy[:0], emulated_layers._ROUNDINGS[recipe])
    assert empty[0].shape == (0, 20, OUT) and torch.equal(empty[2], torch.zeros_like(weight))


def test_frozen_weights_get_no_gradient() -> None:
    x, weight, dy = operands()
    x.requires_grad_()
    EmulatedProduct.apply(x, weight, emulated_layers._ROUNDINGS["mxfp8"]).backward(dy)
    assert weight.grad is None and x.grad is not None


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """One process, and what it would exchange with others."""
    told: list[float] = []
    monkeypatch.setattr(emulated_layers.parallel_state, "get_amax_reduction_group", lambda **_: None)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, *_, **__: told.append(float(tensor)))
    return told


def test_delayed_scaling_is_its_formula(alone: list[float]) -> None:
    """Each micro-batch is rounded with the largest values of the one before, the first with scales of 1."""
    x, weight, dy = operands()
    scales, scale = _DelayedScales(), dict.fromkeys(("x", "w", "dy"), torch.tensor(1.0))
    for number in range(3):
        now = {"x": x * (number + 1), "w": weight + number, "dy": dy * 0.01**number}
        found = product(now["x"], now["w"], now["dy"], _DelayedRounding(scales, None))
        x8, w8 = (per_tensor(now[name].flatten(0, -2), E4M3, scale[name]) for name in ("x", "w"))
        dy8 = per_tensor(now["dy"].flatten(0, -2), E5M2, scale["dy"])
        for value, formula in zip(found, (x8 @ w8.T, dy8 @ w8, dy8.T @ x8), strict=True):
            torch.testing.assert_close(value.view(formula.shape), formula, rtol=1e-5, atol=1e-4)
        scale = {name: encode_scale(now[name].abs().max(), E5M2 if name == "dy" else E4M3) for name in now}
    assert len(alone) == 9, "three largest values a micro-batch"


def test_delayed_scaling_keeps_what_validation_saw(alone: list[float]) -> None:
    """As Transformer Engine, whose history is advanced by training alone: validation's largest values count there."""
    x, weight, dy = operands()
    scales = _DelayedScales()
    with torch.no_grad():
        EmulatedProduct.apply(5 * x, weight, _DelayedRounding(scales, None))
    assert alone == [] and scales.now("input") == 1
    product(x, weight, dy, _DelayedRounding(scales, None))
    assert scales.now("input") == encode_scale((5 * x).abs().max(), E4M3)
    product(x, weight, dy, _DelayedRounding(scales, None))
    assert scales.now("input") == encode_scale(x.abs().max(), E4M3)
    product(x * torch.inf, weight, dy, _DelayedRounding(scales, None))
    assert scales.now("input") == encode_scale(x.abs().max(), E4M3), "no number, no scale"


def test_delayed_scaling_rounds_a_weight_once_a_batch(alone: list[float]) -> None:
    class Layer(_Emulated, torch.nn.Module):
        recipe = "delayed"

    layer, (x, weight, _) = Layer(), operands()
    group: dict[str, Any] = {"allreduce_dgrad": False, "sequence_parallel": False, "tp_group": None}
    chunk = torch.nn.Sequential(layer)
    emulated_layers.follow_batches(chunk)
    expected = per_tensor(weight, E4M3, torch.tensor(1.0))
    for micro_batch in range(2):
        x_scale = torch.tensor(1.0) if micro_batch == 0 else encode_scale(x.abs().max(), E4M3)
        found = layer._forward_impl(x, weight, **group)
        torch.testing.assert_close(found, per_tensor(x, E4M3, x_scale) @ expected.T, rtol=1e-5, atol=1e-4)
    chunk.set_is_first_microbatch()  # type: ignore[operator]
    found = layer._forward_impl(x, weight, **group)
    expected = per_tensor(weight, E4M3, encode_scale(weight.abs().max(), E4M3))
    torch.testing.assert_close(found, per_tensor(x, E4M3, x_scale) @ expected.T, rtol=1e-5, atol=1e-4)


def test_other_layers_are_told_as_before() -> None:
    """Transformer Engine's layers quantise a weight again when megatron.core's own method marks the start of a batch."""
    chunk = torch.nn.Sequential(torch.nn.Linear(2, 2))
    emulated_layers.follow_batches(chunk)
    assert "set_is_first_microbatch" not in vars(chunk)


class OneRank:
    rank, size = staticmethod(lambda: 0), staticmethod(lambda: 1)


def test_losses_of_whole_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.tensor_parallel import cross_entropy

    monkeypatch.setattr(cross_entropy, "get_tensor_model_parallel_group", lambda: None)
    monkeypatch.setattr(cross_entropy, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(cross_entropy, "get_tensor_model_parallel_world_size", lambda: 1)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: None)
    logits = torch.randn(7, 33, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = logits.detach().argmax(1)
    labels[3] = (labels[3] + 1) % 33
    losses, correct = losses_of_logits(logits, labels, OneRank)
    torch.testing.assert_close(losses, F.cross_entropy(logits, labels, reduction="none"))
    assert correct.tolist() == [True, True, True, False, True, True, True]
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    (expected,) = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), logits)
    torch.testing.assert_close(gradient, expected)


def test_what_is_emulated() -> None:
    given: dict[str, Any] = {"bf16": True, "fp8_recipe": "mxfp8", "transformer_impl": "local"}
    assert emulation_of(build({**given, "fp8_recipe": "none"})) is None
    assert emulation_of(build({**given, "transformer_impl": "auto"})) is None
    assert emulation_of(build(given)) == Emulation("mxfp8")
    assert engine_scaling(build(given), (10, 0)) is None, "Transformer Engine gets nothing to do"
    ends = {"first_last_layers_bf16": True, "num_layers_at_end_in_bf16": 2, "fp8_output_proj": True}
    emulation = emulation_of(build({**given, **ends}))
    assert emulation == Emulation("mxfp8", 1, 2, True)
    assert [emulation.of_layer(n, 5) for n in range(5)] == [None, "mxfp8", "mxfp8", None, None]
    assert emulation_of(build({"bf16": True, "fp4_recipe": "nvfp4", "transformer_impl": "local"})) == Emulation("nvfp4")
    assert "nvfp4 is emulated" in str(Emulation("nvfp4"))
