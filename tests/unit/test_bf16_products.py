"""Products of bf16 matrices in fp32 where the processor has none: rounded once, whatever the parts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from bench.train_step_variants import ProductRecorder
from megatron_a2d.model import local_layers, local_linear, matrix_products
from megatron_a2d.model.chunked_cross_entropy import OutputLayer, _MaskedHead
from megatron_a2d.model.experts import grouped_product
from megatron_a2d.model.local_layers import CoreAttention
from megatron_a2d.model.local_linear import LinearProduct, LocalColumnParallelLinear
from megatron_a2d.model.masked_attention import no_mask
from megatron_a2d.model.matrix_products import multiply
from tests.unit.test_local_products import random


@pytest.fixture(autouse=True)
def without_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix_products, "_has_bf16_products", lambda: False)


def bf16(*shape: int, seed: int = 0) -> Tensor:
    return random(*shape, seed=seed).bfloat16()


@pytest.fixture(autouse=True)
def no_bf16_product() -> Iterator[None]:
    """No product or attention of a test has a bf16 operand, forward or backward."""
    with ProductRecorder() as recorder:
        yield
    calls = [[value for value in call.args if isinstance(value, Tensor)] for call in recorder.calls]
    operands = [value for call in calls if all(value.numel() for value in call) for value in call]
    assert all(value.dtype != torch.bfloat16 for value in operands)


def gradients(function: Any, *inputs: Tensor) -> list[Tensor]:
    """The output, and the gradients of all inputs for a gradient of the output that bf16 can hold."""
    inputs = tuple(tensor.detach().clone().requires_grad_() for tensor in inputs)
    output = function(*inputs)
    output.backward(bf16(*output.shape, seed=9).to(output.dtype))
    return [output.detach(), *(tensor.grad for tensor in inputs if tensor.grad is not None)]


def assert_rounded_once(found: Tensor, exact: Tensor) -> None:
    """bf16 has 8 bits: half a unit in the last place, and a little for the sum in fp32."""
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=2**-8 * 1.02, atol=1e-4)


@pytest.mark.parametrize("part", [1, 7 * 24, 1 << 20])
@pytest.mark.parametrize(("rows", "inner", "columns"), [(9, 24, 40), (9, 40, 24), (0, 24, 40)])
def test_a_product(rows: int, inner: int, columns: int, part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix_products, "WIDENED_VALUES", part)
    a, b = bf16(rows, inner), bf16(columns, inner, seed=1).T
    out = torch.full((rows, columns), torch.nan, dtype=torch.bfloat16)
    multiply(a, b, out=out)
    assert_rounded_once(out, a.double() @ b.double())


@pytest.mark.parametrize("part", [1, 7 * 24, 1 << 20])
@pytest.mark.parametrize("shape", [(5, 3, 24), (8, 24), (0, 2, 24)])
def test_a_linear_layers_gradients(shape: tuple[int, ...], part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix_products, "WIDENED_VALUES", part)
    inputs = bf16(*shape), bf16(40, 24, seed=1)
    exact = gradients(torch.nn.functional.linear, *(tensor.double() for tensor in inputs))
    for found, expected in zip(gradients(LinearProduct.apply, *inputs), exact, strict=True):
        assert_rounded_once(found, expected)


def test_experts() -> None:
    tokens, weight, ends = bf16(18, 24), bf16(3, 40, 24, seed=1), torch.tensor([8, 8, 18], dtype=torch.int32)
    found = gradients(lambda *both: grouped_product(*both, ends), tokens, weight)
    exact = gradients(lambda x, w: torch.cat([x[:8] @ w[0].T, x[8:] @ w[2].T]), tokens.double(), weight.double())
    for ours, expected in zip(found, exact, strict=True):
        assert_rounded_once(ours, expected)


def core_attention() -> CoreAttention:
    attention = CoreAttention.__new__(CoreAttention)
    torch.nn.Module.__init__(attention)
    attention.is_causal, attention.softmax_scale, attention.context_parallel_group = False, None, None
    return attention


def test_attention_is_rounded_at_its_end_alone() -> None:
    attention = core_attention()

    def attend(*qkv: Tensor) -> Tensor:
        result: Tensor = attention.forward(*qkv, attention_mask=None)
        return result

    qkv = [bf16(16, 2, 2, 8, seed=seed) for seed in range(3)]
    found, exact = gradients(attend, *qkv), gradients(attend, *(tensor.double() for tensor in qkv))
    for ours, expected in zip(found, exact, strict=True):
        assert_rounded_once(ours, expected)


def test_the_heads_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weight's gradient is summed in fp32 over parts of the vocabulary."""
    monkeypatch.setattr(matrix_products, "WIDENED_VALUES", 24)

    class Alone:
        def rank(self) -> int:
            return 0

        def size(self) -> int:
            return 1

    labels = torch.tensor([3, 39, 0, 7, 7, 1, 2, 38] * 2)

    def losses(hidden: Tensor, weight: Tensor) -> Any:
        return _MaskedHead.apply(hidden, weight, labels, Alone(), 8)[0]

    hidden, weight = bf16(16, 24), bf16(40, 24, seed=1)
    found = gradients(losses, hidden, weight)
    exact = gradients(
        lambda h, w: torch.nn.functional.cross_entropy(h @ w.T, labels, reduction="none"),
        hidden.float(), weight.float(),
    )  # fmt: skip
    for ours, expected in zip(found, exact, strict=True):
        torch.testing.assert_close(ours.float(), expected, rtol=0.03, atol=0.03)


def test_fp32_and_processors_with_bf16_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not matrix_products.is_widened(torch.ones(2, 2)) and matrix_products.is_widened(bf16(2, 2))
    monkeypatch.setattr(matrix_products, "_has_bf16_products", lambda: True)
    assert not matrix_products.is_widened(bf16(2, 2))


@pytest.mark.parametrize("tiled", [True, False])
def test_attention_with_a_mask(tiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles and dense masks get fp32 operands; what comes back is bf16."""
    seen = []

    def sparse(query: Tensor, *rest: Any) -> Tensor | None:
        seen.append(query.dtype)
        return query if tiled else None

    monkeypatch.setattr(local_layers, "sparse_attention", sparse)
    attention = core_attention()
    result = attention.forward(*(bf16(16, 2, 2, 8, seed=seed) for seed in range(3)), no_mask(16, torch.device("cpu")))
    assert seen == [torch.float32] and result.dtype == torch.bfloat16 and result.shape == (16, 2, 16)


def test_a_sequence_parallel_input_is_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    """megatron.core's own product of such an input is torch's."""
    monkeypatch.setattr(
        local_linear, "gather_from_sequence_parallel_region", lambda x, group: torch.cat([x, x]) if group == "tp" else x
    )
    options = {"bias": None, "allreduce_dgrad": False, "sequence_parallel": True, "tp_group": "tp"}
    x, weight = bf16(4, 2, 24), bf16(40, 24, seed=1)
    found = LocalColumnParallelLinear._forward_impl(None, x, weight, **options)  # type: ignore[arg-type]
    assert_rounded_once(found, torch.cat([x, x]).double() @ weight.T.double())


def test_the_heads_logits_are_products_of_its_layer() -> None:
    """Sampling asks the LM head for logits, without labels."""
    assert issubclass(OutputLayer, LocalColumnParallelLinear)


@pytest.mark.parametrize("rows", [matrix_products.FEW_ROWS - 1, matrix_products.FEW_ROWS])
def test_few_rows_are_left_to_torch(rows: int) -> None:
    a, b = bf16(rows, 24), bf16(40, 24, seed=1).T
    out = torch.empty(rows, 40, dtype=torch.bfloat16)
    with _disable_current_modes(), ProductRecorder() as recorder:
        multiply(a, b, out=out)
    (call,) = recorder.calls
    assert (call.args[0].dtype == torch.bfloat16) == (rows < matrix_products.FEW_ROWS)
    assert_rounded_once(out, a.double() @ b.double())


def test_torch_says_whether_it_has_bf16_products() -> None:
    """Under another name every processor would be one without them."""
    assert isinstance(torch.ops.mkldnn._is_mkldnn_bf16_supported(), bool)
