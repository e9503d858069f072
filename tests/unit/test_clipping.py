"""Clipping reads the gradients where the optimizer keeps them: --use-precision-aware-optimizer has them elsewhere."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_a2d import runtime
from megatron_a2d.training.optimizer import update_parameters

runtime.install()


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
        step_with_ready_grads=lambda: seen.append(float(gradient.norm())),
        config=SimpleNamespace(clip_grad=clip_grad, use_precision_aware_optimizer_no_fp8_or_ds_fp8=precise),
    )
    assert update_parameters(optimizer) == 200.0  # type: ignore[arg-type]
    assert seen == [pytest.approx(1.0 if clip_grad == 1.0 else 200.0)]
