"""On one GPU: Transformer Engine's layers against the local ones, and its FP8 against the emulated products.

The cases are those of tests/transformer_engine that need one process, where a stand-in of the kernels computes them in
fp32. The kernels know 16 bits and less, so here every gradient's distance is held against what rounding alone does:
the local layers' distance, in bf16, from themselves in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.result_tables import can_compile
from megatron_a2d.megatron_compat.device import device
from tests.gpu.gpu_train import REHEARSAL, Model
from tests.transformer_engine.engine_cases import CASES, DENSE_FUSIONS, EngineCase, variant_of

ENGINE: dict[str, Any] = {"transformer_impl": "transformer_engine", "bf16": True}
LOCAL: dict[str, Any] = {"transformer_impl": "local"}
# All of them are rehearsed in fp32 by `make test-te`; here the way is.
_REHEARSED = ("moe: no fusion", "frozen: all fusions")
ONE_GPU = [case for case in CASES if case.layout.ranks == 1 and (not REHEARSAL or str(case) in _REHEARSED)]
RECIPES: dict[str, dict[str, Any]] = {
    "tensorwise": {"fp8_recipe": "tensorwise"},
    "delayed": {"fp8_recipe": "delayed"},
    "blockwise": {"fp8_recipe": "blockwise"},
    "mxfp8": {"fp8_recipe": "mxfp8"},
    "nvfp4": {"fp4_recipe": "nvfp4"},
}
Steps = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def steps(models: dict[str, Model], tmp_path_factory: pytest.TempPathFactory) -> Steps:
    """steps(kind, settings, against): one step, and its distances from one with the other settings.

    (A second step would begin from other weights, and on random data its gradient is small.)
    """
    from bench.train_step_vs_hf import free_memory
    from megatron_a2d.config.settings import build
    from megatron_a2d.distributed import process_groups
    from tests.parity.parity_jobs import train_steps

    root = tmp_path_factory.mktemp("references")
    made: dict[str, Path] = {}

    def run(kind: str, settings: dict[str, Any], **files: Any) -> dict[str, Any]:
        free_memory()
        process_groups.initialize(build({}).parallel)
        model = models[kind if kind in models else "moe"]
        sizes = {"micro_batch_size": 1, "global_batch_size": 4 if REHEARSAL else 8, "bf16": False}
        own = model.settings | sizes | variant_of(kind) | settings
        return train_steps(model.checkpoint, own, num_steps=1, relative=True, **files)

    def measure(kind: str, settings: dict[str, Any], against: dict[str, Any]) -> dict[str, Any]:
        name = f"{kind} {sorted(against.items())}"
        if name not in made:
            made[name] = root / f"{len(made)}.pt"
            run(kind, against, save_reference=str(made[name]))
        return run(kind, settings, reference=str(made[name]))

    # What rounding does is asked by many cases alike.
    found: dict[str, dict[str, Any]] = {}

    def remembered(kind: str, settings: dict[str, Any], against: dict[str, Any]) -> dict[str, Any]:
        name = f"{kind} {sorted(settings.items())} {sorted(against.items())}"
        if name not in found:
            found[name] = measure(kind, settings, against)
        return found[name]

    return remembered


@pytest.mark.parametrize("case", ONE_GPU, ids=str)
def test_engine_vs_local(case: EngineCase, steps: Steps, record: Callable[[str, Any], None]) -> None:
    if case.layout.settings.get("moe_permute_fusion") and not can_compile():
        pytest.skip("the fused permutation is triton's, which needs a C compiler")
    kind, exact = case.layout.case, LOCAL | case.shared
    engine = steps(kind, case.shared | case.layout.settings | ENGINE, exact)
    rounded = steps(kind, exact | {"bf16": True}, exact)
    for name in ("gradient_distance", "parameters"):
        record(name, [engine[name], rounded[name]])
    assert engine["losses"] == pytest.approx(rounded["losses"], rel=0.01)
    assert engine["gradient_distance"] < 2 * rounded["gradient_distance"] + 0.01


def test_a_causal_mask_is_seen(steps: Steps, record: Callable[[str, Any], None]) -> None:
    """The control: how far a run is that attends to the past alone."""
    causal = steps("dense", ENGINE | {"objective": "ar"}, LOCAL)
    rounded = steps("dense", LOCAL | {"bf16": True}, LOCAL)
    record("gradient_distance", [causal["gradient_distance"], rounded["gradient_distance"]])
    assert causal["gradient_distance"] > 5 * (2 * rounded["gradient_distance"] + 0.01)


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe != "delayed"])
def test_fp8_products_vs_emulation(recipe: str, models: dict[str, Model], record: Callable[[str, Any], None]) -> None:
    """A linear layer's three products of the same operands: what is left is the order of sums, and bf16's last place.

    (nvfp4's random bits differ: its gradients are not compared. delayed begins with scales of 1.)
    """
    if reason := _lacks(recipe):
        pytest.skip(reason)
    torch.manual_seed(0)
    tokens, weight, gradient = (
        torch.randn(shape, device=device()).bfloat16() for shape in ((256, 512), (384, 512), (256, 384))
    )
    tokens[3, 5], gradient[7, 11] = 40.0, -30.0
    plain = tokens @ weight.T, gradient @ weight, gradient.T @ tokens
    kernels, emulated = _engine_products(recipe, tokens, weight, gradient), _emulated(recipe, tokens, weight, gradient)
    compared = ("fprop",) if recipe == "nvfp4" else ("fprop", "dgrad", "wgrad")
    for name, one, other, exact in zip(compared, kernels, emulated, plain, strict=False):
        distance, rounded = (float((x - other).float().norm() / other.float().norm()) for x in (one, exact))
        record(name, [distance, rounded])
        assert rounded > 0.02, "the emulation rounds nothing"
        assert distance < rounded / 4, name


@pytest.mark.parametrize("kind", ["dense"] if REHEARSAL else ["dense", "moe"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_steps_vs_emulation(recipe: str, kind: str, steps: Steps, record: Callable[[str, Any], None]) -> None:
    """A whole model's gradients are nearer to the emulation's than bf16's are. Norms that are not rounded to bf16 before
    FP8, and values on a tie, fall to either side, and what follows from them differs."""
    if reason := _lacks(recipe):
        pytest.skip(reason)
    emulated = LOCAL | RECIPES[recipe] | {"bf16": True}
    kernels = steps(kind, RECIPES[recipe] | ENGINE | DENSE_FUSIONS, emulated)
    plain = steps(kind, LOCAL | {"bf16": True}, emulated)
    for name in ("gradient_distance", "parameters"):
        record(name, [kernels[name], plain[name]])
    assert kernels["gradient_distance"] < plain["gradient_distance"]


def _engine_products(recipe: str, tokens: Tensor, weight: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
    """Of Transformer Engine's Linear."""
    import transformer_engine.pytorch as engine
    from transformer_engine.common import recipe as recipes

    scaling = {
        "tensorwise": "Float8CurrentScaling", "blockwise": "Float8BlockScaling", "mxfp8": "MXFP8BlockScaling",
        "nvfp4": "NVFP4BlockScaling",
    }[recipe]  # fmt: skip
    layer = engine.Linear(weight.size(1), weight.size(0), bias=False, params_dtype=torch.bfloat16, device=device())
    with torch.no_grad():
        layer.weight.copy_(weight)
    tokens = tokens.clone().requires_grad_()
    with engine.fp8_autocast(enabled=True, fp8_recipe=getattr(recipes, scaling)()):
        result = layer(tokens)
    result.backward(gradient)
    assert tokens.grad is not None
    return result.detach(), tokens.grad, layer.weight.grad


def _emulated(recipe: str, tokens: Tensor, weight: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
    from megatron_a2d.model import emulated_layers

    tokens, weight = tokens.clone().requires_grad_(), weight.clone().requires_grad_()
    result = emulated_layers.EmulatedProduct.apply(tokens, weight, emulated_layers._ROUNDINGS[recipe])
    result.backward(gradient)
    assert tokens.grad is not None and weight.grad is not None
    return result.detach(), tokens.grad, weight.grad


def _lacks(recipe: str) -> str | None:
    """Why this card does not compute the recipe."""
    from megatron_a2d.config.fp8_recipe import engine_scaling
    from megatron_a2d.config.settings import build
    from megatron_a2d.training import initialization
    from megatron_a2d.utils.errors import UserError

    try:
        engine_scaling(build(RECIPES[recipe]), initialization.compute_capability(), initialization.cuda_version())
    except UserError as error:
        return str(error)
    return None
