"""Transformer Engine's layers in NVFP4 against the emulation on the local layers, both in fp32 otherwise.

Gradients are rounded to nearest on both sides (NVTE_NVFP4_DISABLE_STOCHASTIC_ROUNDING): random bits cannot be compared.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.transformer_engine.engine_cases import fusions
from tests.transformer_engine.engine_pool import EnginePool
from tests.transformer_engine.pretend_gpu import BLACKWELL
from tests.transformer_engine.stand_in import nvfp4_format
from tests.transformer_engine.stand_in.enums import DType

TORCHAO = Path(__file__).parents[1] / "fixtures" / "torchao_0_18_0.safetensors"


def stored(values: torch.Tensor, **changes: Any) -> Any:
    """The stand-in's tensor of these values."""
    quantizer = SimpleNamespace(
        **dict(
            dtype=DType.kFloat4E2M1, internal=False, optimize_for_gemm=False, rowwise_usage=True, columnwise_usage=True,
            stochastic_rounding=False, with_rht=False, with_2d_quantization=False, with_amax_reduction=False,
        ) | changes
    )  # fmt: skip

    def storage(**fields: Any) -> Any:
        return SimpleNamespace(**{f"_{name}": value for name, value in fields.items()})

    tensor = nvfp4_format.create(quantizer, tuple(values.shape), values.dtype, SimpleNamespace(NVFP4Tensor=storage))
    nvfp4_format.fill(quantizer, values, tensor)
    return tensor


def test_the_stand_in_is_the_format() -> None:
    """As torchao has it; the other half is that of the transpose, and transformed where that is asked for."""
    recorded = load_file(TORCHAO)
    values = recorded["values"][:16]
    values[0, 0] = recorded["values"].abs().max()  # torchao's scale is that of all rows
    tensor = stored(values)
    torch.testing.assert_close(nvfp4_format.read(tensor, False)[1:], recorded["nvfp4"][1:16], rtol=1e-6, atol=0)
    turned = stored(values.T.contiguous())
    assert torch.equal(nvfp4_format.read(tensor, True), nvfp4_format.read(turned, False).T)
    assert nvfp4_format.shape_of(tensor) == (16, 128)
    signs = torch.tensor([1.0, -1.0] * 8).diag()
    transformed = stored(values, with_rht=True, rht_matrix=signs)
    flipped = values * signs.diagonal()[:, None]
    assert torch.equal(nvfp4_format.read(transformed, True), nvfp4_format.read(stored(flipped), True))
    squares = nvfp4_format.read(stored(values, with_2d_quantization=True), False)
    assert torch.equal(squares, nvfp4_format.read(stored(values, with_2d_quantization=True), True)), "one rounding"
    with pytest.raises(RuntimeError, match="divisible by 16"):
        stored(values[:, :24])
    with pytest.raises(RuntimeError, match="rounded to nearest alone"):
        stored(values, stochastic_rounding=True)


@pytest.mark.parametrize(
    ("more", "tolerance"), [({"first_last_layers_bf16": True, "num_layers_at_start_in_bf16": 0}, 1e-5), ({}, 0.05)]
)
def test_equal_to_the_emulation(
    more: dict[str, Any], tolerance: float, wide: dict[str, dict[str, Any]], engine_pool: EnginePool, tmp_path: Path
) -> None:
    """A step of four micro-batches; control: the same in fp32.

    With both layers in NVFP4 a value lies on a tie of the rounding in the backward pass of the second one: 1e-7 decides
    where it goes, and the gradients below it follow.
    """
    job, path = wide["dense"], str(tmp_path / "reference.pt")
    settings = {**job["settings"], "seq_length": 32, "global_batch_size": 4, "fp4_recipe": "nvfp4", **more}
    shared: dict[str, Any] = dict(checkpoint=job["checkpoint"], num_steps=1, in_fp32=True, relative=True)
    (expected,) = engine_pool.run("local_steps", 1, settings=settings, save_reference=path, **shared)
    engine = {**settings, "transformer_impl": "auto", **fusions("dense")}
    (found,) = engine_pool.run("train_steps", 1, capability=BLACKWELL, settings=engine, reference=path, **shared)
    assert engine_pool.calls["quantize"] > 0
    plain = {name: value for name, value in settings.items() if name not in ("fp4_recipe", *more)}
    (control,) = engine_pool.run("local_steps", 1, settings=plain, reference=path, **shared)
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-6)
    assert found["gradient_distance"] < tolerance < 0.1 < control["gradient_distance"]
