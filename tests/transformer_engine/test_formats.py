"""Quantised tensors of the stand-in: what each format stores is what its definition says, and both halves of a tensor.

Quantizers are stand-ins too here, with the fields that Transformer Engine's have; engine_jobs.py uses the real ones.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.transformer_engine.stand_in import multi_tensor, partial_casts, quantized
from tests.transformer_engine.stand_in.enums import DType
from tests.transformer_engine.stand_in.fp8_casts import e8m0_from_amax, from_e8m0, from_fp8, scale_from_amax, to_fp8
from tests.transformer_engine.stand_in.products import _product

E4M3, E5M2 = DType.kFloat8E4M3, DType.kFloat8E5M2
ROWS, COLUMNS = 64, 160  # 160: two blocks of 128, one of them not whole


class _Storage:
    """A quantised tensor: its fields under the names that Transformer Engine gives them."""

    def __init__(self, *values: Any, **fields: Any):
        names = (
            "rowwise_data",
            "rowwise_scale_inv",
            "columnwise_data",
            "columnwise_scale_inv",
            "fp8_dtype",
            "quantizer",
        )
        fields |= dict(zip(names, values, strict=False))
        fields["transpose"] = fields.pop("data_transpose", None)
        fields["scale_inv"] = fields.pop("fp8_scale_inv", None)
        for name, value in fields.items():
            setattr(self, f"_{name}", value)


_STORAGES = {
    name: type(name, (_Storage,), {})
    for name in ("Float8TensorStorage", "MXFP8TensorStorage", "Float8BlockwiseQTensorStorage")
}


@pytest.fixture(autouse=True)
def plain_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(quantized, "_classes", lambda: SimpleNamespace(**_STORAGES))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))


def quantizer(kind: str, **changes: Any) -> Any:
    fields: dict[str, Any] = dict(
        dtype=E4M3, rowwise_usage=True, columnwise_usage=True, internal=True, optimize_for_gemm=False,
        force_pow_2_scales=False, amax_epsilon=0.0, block_scaling_dim=1, scale=torch.ones(1), amax=torch.zeros(1),
        use_existing_amax=False, with_amax_reduction=False,
    ) | changes  # fmt: skip
    return type(kind, (SimpleNamespace,), {})(**fields)


def by_definition(matrix: Tensor, block: tuple[int, int], power_of_two: bool) -> Tensor:
    """Each block divided by its scale, rounded to e4m3 and multiplied again, one block after the other."""
    result = torch.empty_like(matrix)
    for i in range(0, matrix.size(0), block[0]):
        for j in range(0, matrix.size(1), block[1]):
            piece = matrix[i : i + block[0], j : j + block[1]]
            scale = piece.abs().max() / 448
            if power_of_two:
                scale = torch.exp2(torch.ceil(torch.log2(scale.double()))).float()
                result[i : i + block[0], j : j + block[1]] = (piece / scale).to(torch.float8_e4m3fn).float() * scale
            else:
                factor = 1 / scale
                result[i : i + block[0], j : j + block[1]] = (piece * factor).to(torch.float8_e4m3fn).float() / factor
    return result


# Kind, its fields, blocks of the row-wise half and of the other, whether scales are powers of two.
FORMATS: list[tuple[str, dict[str, Any], tuple[int, int], tuple[int, int], bool]] = [
    ("Float8CurrentScalingQuantizer", {}, (ROWS, COLUMNS), (ROWS, COLUMNS), False),
    ("MXFP8Quantizer", {}, (1, 32), (32, 1), True),
    ("Float8BlockQuantizer", {}, (1, 128), (128, 1), False),
    ("Float8BlockQuantizer", {"block_scaling_dim": 2}, (128, 128), (128, 128), False),
    ("Float8BlockQuantizer", {"force_pow_2_scales": True}, (1, 128), (128, 1), True),
]


@pytest.mark.parametrize(("kind", "fields", "along_rows", "along_columns", "power"), FORMATS)
def test_both_halves_follow_the_definition(
    kind: str, fields: dict[str, Any], along_rows: tuple[int, int], along_columns: tuple[int, int], power: bool
) -> None:
    x = torch.randn(2, ROWS // 2, COLUMNS) * torch.logspace(-3, 3, COLUMNS)
    tensor = quantized.quantize(x, quantizer(kind, **fields))
    assert quantized.is_quantized(tensor) and quantized.shape_of(tensor) == tuple(x.shape)
    matrix = x.view(ROWS, COLUMNS)
    torch.testing.assert_close(quantized.read(tensor), by_definition(matrix, along_rows, power), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        quantized.read(tensor, True), by_definition(matrix, along_columns, power), rtol=1e-6, atol=0
    )
    assert torch.equal(quantized.dequantize(tensor, DType.kFloat32).view(ROWS, COLUMNS), quantized.read(tensor))


@pytest.mark.parametrize("kind", ["Float8CurrentScalingQuantizer", "MXFP8Quantizer", "Float8BlockQuantizer"])
def test_halves_that_are_not_wanted_are_not_there(kind: str) -> None:
    x = torch.randn(ROWS, COLUMNS)
    tensor = quantized.quantize(x, quantizer(kind, columnwise_usage=False))
    with pytest.raises(RuntimeError, match="is missing column"):
        quantized.read(tensor, True)
    again = quantized.quantize(2 * x, quantizer(kind, rowwise_usage=False), tensor)  # another pass wants the other half
    assert again is tensor
    with pytest.raises(RuntimeError, match="is missing row"):
        quantized.read(tensor)
    both = quantized.quantize(2 * x, quantizer(kind))
    assert torch.equal(quantized.read(tensor, True), quantized.read(both, True))
    left = quantized.quantize(x, quantizer(kind), both, noop=torch.ones(1))
    assert torch.equal(quantized.read(left, True), quantized.read(both, True))


def test_an_unknown_quantizer_raises_by_name() -> None:
    with pytest.raises(NotImplementedError, match="has no quantizer NVFP9Quantizer"):
        quantized.quantize(torch.randn(4, 4), quantizer("NVFP9Quantizer"))


def test_casts_saturate() -> None:
    values = torch.tensor([500.0, -1e9, 448.0, 0.0, 2**-9])
    assert from_fp8(to_fp8(values, E4M3), E4M3).tolist() == [448.0, -448.0, 448.0, 0.0, 2**-9]
    assert from_fp8(to_fp8(torch.tensor([1e9]), E5M2), E5M2).item() == 57344


def test_scales() -> None:
    """Of maxima that are exact, odd, zero and infinite."""
    amax = torch.tensor([448.0, 3.0, 0.0, float("inf")])
    assert scale_from_amax(amax, E4M3, False, 0.0).tolist() == [1.0, pytest.approx(448 / 3), 1.0, 1.0]
    assert scale_from_amax(amax, E4M3, True, 0.0).tolist() == [1.0, 128.0, 1.0, 1.0]
    assert scale_from_amax(amax, E4M3, False, 4.0).tolist() == [1.0, 112.0, 112.0, 1.0]
    above_112 = torch.tensor([112.0]).nextafter(torch.tensor(113.0))
    assert scale_from_amax(above_112, E4M3, True, 0.0).item() == 2, "the mantissa is cut off, however near 4 it is"
    many = torch.linspace(0.1, 8, 1000)
    assert torch.equal(scale_from_amax(many, E4M3, False, 0.0), (448 / many.double()).float()), "rounded once"
    # Rounded up, so that the largest value is never cut: 448 needs 1, the next number 2.
    raised = from_e8m0(e8m0_from_amax(torch.tensor([448.0, 448.0001, 447.0, 224.0]), E4M3))
    assert raised.tolist() == [1.0, 2.0, 1.0, 0.5]
    assert e8m0_from_amax(torch.zeros(1), E4M3).item() == 0


def test_delayed_scaling_records_and_does_not_look() -> None:
    """The cast has the scale that it was given, and leaves its maximum for the history."""
    delayed = quantizer("Float8Quantizer", scale=torch.tensor([2.0]), amax=torch.tensor([5.0]))
    x = torch.tensor([[300.0, 1.0], [-0.5, 3.0]])
    tensor = quantized.quantize(x, delayed)
    assert quantized.read(tensor).tolist() == [[224.0, 1.0], [-0.5, 3.0]] and delayed.amax.item() == 300
    assert torch.equal(quantized.read(tensor, True), quantized.read(tensor))


@pytest.mark.parametrize(("algorithm", "expected"), [("max", 448 / 9), ("most_recent", 448 / 2)])
def test_the_history_gives_the_next_scale(algorithm: str, expected: float) -> None:
    """The step's maximum goes to the end; the oldest counts once more and falls out, for the first place is the next
    step's."""
    history, scale = torch.tensor([[0.0], [9.0], [8.0], [1.0]]), torch.ones(1)
    multi_tensor.fused_amax_and_scale_update_after_reduction(
        torch.tensor([2.0]), [history], [scale], algorithm, E4M3, 0
    )
    assert history.flatten().tolist() == [0.0, 8.0, 1.0, 2.0] and scale.item() == pytest.approx(expected)


def test_scales_of_many_tensors() -> None:
    scale, inverse = torch.empty(1), torch.empty(1)
    multi_tensor.multi_tensor_compute_scale_and_scale_inv(
        1, None, [[torch.tensor([2.0])], [scale], [inverse]], 448.0, False, 0.0
    )
    assert scale.item() == 224 and inverse.item() == pytest.approx(1 / 224)


def test_products_read_the_half_whose_blocks_lie_along_the_sum() -> None:
    """Of a linear layer: y = x w', dx = dy w, dw = dy' x."""
    x, w, dy = (torch.randn(shape) for shape in ((64, 96), (32, 96), (64, 32)))
    xq, wq, dyq = (quantized.quantize(tensor, quantizer("MXFP8Quantizer")) for tensor in (x, w, dy))
    row, column = (lambda t: by_definition(t, (1, 32), True)), (lambda t: by_definition(t, (32, 1), True))
    torch.testing.assert_close(_product(wq, True, xq, False), row(x) @ row(w).T)
    torch.testing.assert_close(_product(wq, False, dyq, False), row(dy) @ column(w))
    torch.testing.assert_close(_product(xq, False, dyq, True), column(dy).T @ column(x))


def test_fp8_products_want_sides_of_16() -> None:
    operands = [quantized.quantize(torch.randn(n, 32), quantizer("Float8CurrentScalingQuantizer")) for n in (16, 24)]
    with pytest.raises(RuntimeError, match="a side of 24"):
        _product(operands[0], True, operands[1], False)


def test_parts_of_a_block_scaled_weight_make_the_whole() -> None:
    weight, whole = torch.randn(200, 160), torch.empty(200, 160, dtype=torch.uint8)
    amax = torch.zeros(2, 2, 2)
    parts = (slice(0, 10_001), slice(10_001, None))
    for part, own in zip(parts, amax, strict=True):
        partial_casts.fp8_block_scaling_compute_partial_amax(weight.flatten()[part], own, 200, 160, part.start, 128)
    scale = scale_from_amax(amax.amax(0), E4M3, False, 0.0)
    for part in parts:
        partial_casts.fp8_block_scaling_partial_cast(
            weight.flatten()[part], whole.view(-1)[part], scale, 200, 160, part.start, 128, E4M3
        )
    tensor = quantized.quantize(weight, quantizer("Float8BlockQuantizer", block_scaling_dim=2))
    assert torch.equal(whole, tensor._rowwise_data)


def test_parts_of_an_mxfp8_weight_make_the_whole() -> None:
    weight = torch.randn(64, 96)
    rowwise, columnwise = (torch.empty(64, 96, dtype=torch.uint8) for _ in range(2))
    amax_rows, amax_columns = torch.zeros(2, 128, 4), torch.zeros(2, 4, 128)
    parts = (slice(0, 1001), slice(1001, None))
    for part, rows, columns in zip(parts, amax_rows, amax_columns, strict=True):
        partial_casts.mxfp8_scaling_compute_partial_amax(weight.flatten()[part], rows, columns, 64, 96, part.start)
    maxima = [amax_rows.amax(0), amax_columns.amax(0)]
    scales = [torch.empty(amax.shape, dtype=torch.uint8) for amax in maxima]
    multi_tensor.multi_tensor_compute_scale_inv_e8m0(1, None, [maxima, scales])
    for part in parts:
        partial_casts.mxfp8_scaling_partial_cast(
            weight.flatten()[part], rowwise.view(-1)[part], columnwise.view(-1)[part], *scales, 64, 96, part.start
        )
    tensor = quantized.quantize(weight, quantizer("MXFP8Quantizer"))
    assert torch.equal(rowwise, tensor._rowwise_data) and torch.equal(columnwise, tensor._columnwise_data)
    assert torch.equal(scales[0][:64, :3], tensor._rowwise_scale_inv[:64, :3])
