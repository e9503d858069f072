"""Clipping reads the gradients where the optimizer keeps them: --use-precision-aware-optimizer has them elsewhere."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from megatron_a2d import megatron_compat
from megatron_a2d.config.model_config import model_config_from_hf
from megatron_a2d.config.settings import build
from megatron_a2d.distributed import process_groups
from megatron_a2d.training.initialization import build_train_state
from megatron_a2d.training.optimizer import update_parameters
from megatron_a2d.training.param_shards import owned_shards, squares_by_role
from tests.tiny import hub_config

megatron_compat.install()


@pytest.mark.parametrize("precise", [False, True])
@pytest.mark.parametrize("clip_grad", [1.0, 0.0, 1000.0])
def test_gradients_are_clipped(precise: bool, clip_grad: float) -> None:
    """A gradient of norm 200; the other place is empty, as megatron.core leaves it."""
    parameter, gradient, seen = torch.nn.Parameter(torch.zeros(4)), torch.full((4,), 100.0), []
    if precise:
        parameter.decoupled_grad = gradient  # type: ignore[attr-defined]
    else:
        parameter.grad = gradient
    optimizer = SimpleNamespace(
        prepare_grads=lambda: False,
        get_grad_norm=lambda: 200.0,
        get_parameters=lambda: [parameter],
        param_groups=[],
        step_with_ready_grads=lambda: seen.append(float(gradient.norm())),
        config=SimpleNamespace(clip_grad=clip_grad, use_precision_aware_optimizer_no_fp8_or_ds_fp8=precise),
    )
    assert update_parameters(optimizer) == 200.0  # type: ignore[arg-type]
    assert seen == [pytest.approx(1.0 if clip_grad == 1.0 else 200.0)]


def test_norm_clipping_and_monitoring_read_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """megatron.core's distributed optimizer, made precision-aware as far as gradients go: on a CPU there is no Adam for it."""
    config = build({"bf16": True, "use_distributed_optimizer": True, "train_iters": 10, "clip_grad": 1.0})
    process_groups.initialize(config.parallel)
    try:
        state = build_train_state(model_config_from_hf(hub_config("moe"), "moe"), config)
        for part in state.optimizer.chained_optimizers:
            part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = True
            for group, shards in zip(part.optimizer.param_groups, part.shard_float16_groups, strict=True):
                group["params"] = shards
        generator, squares = torch.Generator().manual_seed(0), 0.0
        for parameter in state.models[0].parameters():
            parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
            squares += float(parameter.main_grad.double().square().sum())
        monkeypatch.setattr(state.optimizer, "step_with_ready_grads", lambda: True)
        assert update_parameters(state.optimizer) == pytest.approx(math.sqrt(squares), rel=1e-5)
        seen = squares_by_role(owned_shards(state), lambda _, shard: shard.gradient())
        assert float(seen.sum().sqrt()) == pytest.approx(1.0, rel=1e-5)
    finally:
        process_groups.finalize()
