"""Fake quantisation against manually computed numbers, plain loops in float64, and another library's."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_a2d.model.fake_quantization import (
    E4M3,
    E5M2,
    blockwise,
    encode_scale,
    generator_of,
    hadamard,
    hadamard_matrix,
    mxfp8,
    nvfp4,
    per_tensor,
    to_e2m1,
)

FIXTURES = Path(__file__).parents[1] / "fixtures"


def matrix(rows: int = 48, columns: int = 160, seed: int = 0) -> Tensor:
    """Values over many orders of magnitude, of both signs."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randn(rows, columns, generator=generator) * 3
    return torch.randn(rows, columns, generator=generator) * exponents.exp2()


def codes(mantissa_bits: int, smallest: int, largest: float) -> list[float]:
    """All magnitudes of a small float: multiples of 2^(smallest - mantissa_bits), and normal numbers up to `largest`."""
    found = [i * 2.0 ** (smallest - mantissa_bits) for i in range(2**mantissa_bits)]
    for exponent in itertools.count(smallest):
        normal = [2.0**exponent * (1 + i / 2**mantissa_bits) for i in range(2**mantissa_bits)]
        found += [value for value in normal if value <= largest]
        if normal[-1] >= largest:
            return found


E4M3_CODES, E5M2_CODES, E2M1_CODES = codes(3, -6, 448.0), codes(2, -14, 57344.0), codes(1, 0, 6.0)


def nearest(value: float, table: list[float]) -> float:
    """Of the codes the nearest, of two equally near ones the one at an even place."""
    magnitude = abs(value)
    place = min(range(len(table)), key=lambda i: (abs(table[i] - magnitude), i % 2))
    return math.copysign(table[place], value)


def by_loops(values: Tensor, height: int, width: int, round_block: Callable[[list[float]], list[float]]) -> Tensor:
    result = torch.empty_like(values, dtype=torch.float64)
    for top, left in itertools.product(range(0, len(values), height), range(0, values.size(1), width)):
        block = values[top : top + height, left : left + width]
        rounded = torch.tensor(round_block(block.flatten().tolist()), dtype=torch.float64)
        result[top : top + height, left : left + width] = rounded.view(block.shape)
    return result


def test_the_tables_are_the_formats() -> None:
    assert (E4M3_CODES[1], E4M3_CODES[-2:]) == (2.0**-9, [416.0, 448.0])
    assert (E5M2_CODES[1], E5M2_CODES[-2:]) == (2.0**-16, [49152.0, 57344.0])
    assert E2M1_CODES == [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def test_fp4_by_hand() -> None:
    """Nearest, ties to the code with an even last bit, saturating."""
    given = [0.0, 0.25, 0.26, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 5.1, 9.0, -0.75, -1.9, -7.0]
    expected = [0.0, 0.0, 0.5, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0, 6.0, -1.0, -2.0, -6.0]
    assert to_e2m1(torch.tensor(given)).tolist() == expected


@pytest.mark.parametrize(
    ("amax", "value", "expected"),
    [
        (448.0, 17.0, 16.0),  # scale 1; 16 and 18 are codes: a tie goes to the even one
        (449.0, 0.003, 0.00390625),  # 449 / 448, up to 2: 0.0015 is 0.77 of the least code, 2^-9
        (448.0, 0.0028, 0.001953125),  # scale 1: 1.43 of the least code
        (465.0, 465.0, 480.0),  # 232.5 -> 240 (with a scale of 1, the floor of the exponent, it would saturate at 448)
        (0.875, 0.11, 0.109375),  # scale 2^-9: 56.32 -> 56
        (1.0, 0.1, 0.1015625),  # amax / 448 = 2^-8.8, so 2^-8: 25.6 -> 26
    ],
)
def test_mxfp8_by_hand(amax: float, value: float, expected: float) -> None:
    block = torch.zeros(1, 32)
    block[0, 3], block[0, 7] = -amax, value
    assert mxfp8(block)[0, 7].item() == expected


@pytest.mark.parametrize(
    ("amax", "value", "expected"),
    [
        (100.0, 0.0007, 0.00048828125),  # 448 / 100 = 4.48, down to 4: 0.0028 is 1.43 of the least code, 2^-9
        (112.0, 0.0007, 0.00048828125),  # 4 exactly
        (113.0, 0.0007, 0.0009765625),  # 3.96, down to 2: 0.0014 is 0.72 of the least code
        (113.0, 113.0, 112.0),  # 226 -> 224; with 4 it would saturate
    ],
)
def test_blockwise_by_hand(amax: float, value: float, expected: float) -> None:
    block = torch.zeros(1, 128)
    block[0, 0], block[0, 100] = amax, -value
    assert blockwise(block)[0, 100].item() == -expected


def test_nvfp4_by_hand() -> None:
    """amax 6: the matrix's scale is 2688 / 6 = 448. The second block's amax is 3: its own is 3 / 6 * 448 = 224, so it
    is multiplied by 448 / 224 = 2. The third's is 0.001 / 6 * 448 = 0.0747, in e4m3 0.078125, so 0.001 is 5.73 and becomes 6."""
    values = torch.zeros(1, 48)
    values[0, 0], values[0, 1], values[0, 16], values[0, 17], values[0, 32] = 6.0, 2.4, 3.0, 1.1, 0.001
    found = nvfp4(values)[0]
    assert found[[0, 1, 16, 17]].tolist() == [6.0, 2.0, 3.0, 1.0]
    assert found[32].item() == pytest.approx(6 * 0.078125 / 448, rel=1e-6)


def test_tensorwise_is_its_formula() -> None:
    values = matrix()
    for dtype, table in ((E4M3, E4M3_CODES), (E5M2, E5M2_CODES)):
        scale = float(torch.tensor(table[-1]) / values.abs().max())
        products = (values * scale).double()
        expected = by_loops(products, 1, 160, lambda row, table=table: [nearest(x, table) for x in row]) / scale
        torch.testing.assert_close(per_tensor(values, dtype).double(), expected, rtol=1e-6, atol=0)
    given = per_tensor(values, E4M3, torch.tensor(1.0))
    assert given.abs().max() == 448 and (given[values.abs() < 2**-11] == 0).all(), "a given scale saturates"


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_scales_are_rounded_once(dtype: torch.dtype) -> None:
    """As __fdiv_rn rounds them: one scale in four is off by a last bit if a rounded reciprocal is multiplied instead."""
    amax = torch.rand(1000, generator=torch.Generator().manual_seed(0)) * 8
    exact = torch.finfo(dtype).max / amax.double()  # in float64, so that rounding to fp32 is the only one
    assert torch.equal(encode_scale(amax, dtype), exact.float())


def test_a_tie_in_nvfp4_stays_one() -> None:
    """amax 448: the matrix's scale is exactly 6, and with a block's amax of 6 its own is 6, so 5 is halfway between 4 and 6."""
    values = torch.zeros(1, 32)
    values[0, 0], values[0, 16], values[0, 17], values[0, 18] = 448.0, 6.0, 5.0, 2.5
    assert nvfp4(values)[0, 16:19].tolist() == [6.0, 4.0, 2.0]


@pytest.mark.parametrize(("height", "square"), [(1, False), (128, True)])
def test_blockwise_is_its_formula(height: int, square: bool) -> None:
    values = matrix(200, 200)  # blocks at the ends are partial

    def rounded(block: list[float]) -> list[float]:
        scale = 2.0 ** math.floor(math.log2(448 / max(map(abs, block))))
        return [nearest(x * scale, E4M3_CODES) / scale for x in block]

    assert torch.equal(blockwise(values, square=square).double(), by_loops(values, height, 128, rounded))


def test_mxfp8_is_its_formula() -> None:
    values = matrix()

    def rounded(block: list[float]) -> list[float]:
        scale = 2.0 ** math.ceil(math.log2(max(map(abs, block)) / 448))
        return [nearest(x / scale, E4M3_CODES) * scale for x in block]

    assert torch.equal(mxfp8(values).double(), by_loops(values, 1, 32, rounded))


@pytest.mark.parametrize(("height", "square"), [(1, False), (16, True)])
def test_nvfp4_is_its_formula(height: int, square: bool) -> None:
    values = matrix(40, 72)
    largest = float(values.abs().max())

    def rounded(block: list[float]) -> list[float]:
        decode = nearest(max(map(abs, block)) / 6 * 2688 / largest, E4M3_CODES) * largest / 2688
        return [nearest(x / decode, E2M1_CODES) * decode if decode else 0.0 for x in block]

    found, expected = nvfp4(values, square=square).double(), by_loops(values, height, 16, rounded)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_another_library_agrees() -> None:
    """torchao's emulation, recorded by tests/fixtures/write_torchao_pairs.py."""
    recorded = load_file(FIXTURES / "torchao_0_18_0.safetensors")
    values = recorded["values"]
    assert torch.equal(mxfp8(values), recorded["mxfp8, e4m3"])
    assert torch.equal(mxfp8(values, E5M2), recorded["mxfp8, e5m2"])
    assert not torch.equal(mxfp8(values), recorded["mxfp8, e4m3, scales rounded down"]), "the other mode would be seen"
    torch.testing.assert_close(nvfp4(values), recorded["nvfp4"], rtol=1e-6, atol=0)


def test_scales_at_the_ends() -> None:
    """As the kernels: 1 where there is nothing to scale or no number to scale by, and the largest float for tiny values."""
    amax = torch.tensor([0.0, torch.inf, torch.nan, 1e-40])
    assert encode_scale(amax, E4M3).tolist() == [1.0, 1.0, 1.0, torch.finfo(torch.float32).max]
    assert encode_scale(amax, E4M3, power_of_two=True).tolist() == [1.0, 1.0, 1.0, 2.0**127]
    for rounded in (blockwise, mxfp8, nvfp4, lambda values: per_tensor(values, E4M3)):
        assert torch.equal(rounded(torch.zeros(2, 32)), torch.zeros(2, 32))
        assert rounded(torch.zeros(0, 32)).shape == (0, 32)
        broken = torch.ones(1, 32)
        broken[0, 0] = torch.nan
        assert rounded(broken)[0, 0].isnan(), "a gradient that is no number must be noticed"


def test_hadamard() -> None:
    """Orthonormal; a product of two transformed operands is what it was; outliers are spread."""
    transform = hadamard_matrix()
    torch.testing.assert_close(transform @ transform.T, torch.eye(16))
    assert (transform.abs() == 0.25).all()
    signs = (transform * 4)[:, 0]
    assert signs.tolist() == [1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1]
    a, b = matrix(5, 40), matrix(7, 40, seed=1)
    torch.testing.assert_close(hadamard(a) @ hadamard(b).T, a @ b.T, rtol=1e-4, atol=1e-3)
    outlier = torch.zeros(1, 16)
    outlier[0, 4] = 8.0
    assert hadamard(outlier).abs().tolist() == [[2.0] * 16]


def test_stochastic_rounding_is_right_on_average() -> None:
    """Each value goes to one of its two neighbours, so often that the mean is the value; the same ones in every run."""
    values = torch.tensor([0.1, 0.3, 1.1, 1.9, 2.2, 3.7, 4.5, 5.9, -0.6, -5.0]).repeat(20000, 1)
    generator = torch.Generator().manual_seed(1)
    rounded = to_e2m1(values, generator)
    for column, value in enumerate(values[0].tolist()):
        around = sorted({nearest(value, E2M1_CODES), *(c for c in rounded[:, column].tolist())})
        assert len(around) == 2 and around[0] < value < around[1]
        assert all(math.copysign(c, value) == c for c in around)
    assert (rounded.mean(0) - values[0]).abs().max() < 5 * 1.0 / 20000**0.5
    exact = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    assert torch.equal(to_e2m1(exact, generator), exact)
    a, b = (nvfp4(matrix(), generator=generator_of(matrix())) for _ in range(2))
    assert torch.equal(a, b) and not torch.equal(a, nvfp4(matrix()))
    permuted = matrix()[:, torch.randperm(160, generator=generator)]
    assert generator_of(permuted).initial_seed() != generator_of(matrix()).initial_seed()
