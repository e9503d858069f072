"""Muon from its formulas, held against what a run does: jobs of the pool.

    M = mu M + (1 - mu) G        G' = (1 - mu) G + mu M with Nesterov, else M        W = W - lr (wd W + s O(G'))

O: Newton-Schulz iterations of G' over its Frobenius norm, on Q, K and V apart (Jordan et al. 2024). The five polynomials
are those of leloykun.github.io/ponder/muon-opt-coeffs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from megatron_a2d.checkpoint.directory import resolve
from megatron_a2d.config.model_config import ModelConfig, read_model_config
from megatron_a2d.config.optimization_config import OptimizationConfig
from megatron_a2d.training import optimizer as our_optimizer
from megatron_a2d.training.optimizer import role_of, update_parameters
from megatron_a2d.training.param_gather import zero_gradients
from megatron_a2d.training.train_step import forward_backward
from megatron_a2d.utils.errors import UserError
from tests.parity.parity_jobs import _one_iteration, _start

POLYNOMIALS = (
    (4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037), (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)  # fmt: skip
SCALES: dict[str, Callable[[int, int], float]] = {
    "spectral": lambda rows, columns: float(max(rows, columns) ** 0.5),
    "unit_rms_norm": lambda rows, columns: float((rows / columns) ** 0.5),
    "shape_scaling": lambda rows, columns: float(max(1, rows / columns) ** 0.5),
}


def orthogonalized(matrix: Tensor, steps: int) -> Tensor:
    """Without a transposition: the products of a tall matrix are the larger ones here."""
    x = matrix / matrix.norm()
    for step in range(steps):
        a, b, c = POLYNOMIALS[step % len(POLYNOMIALS)]
        square = x.T @ x
        x = a * x + x @ (b * square + c * square @ square)
    return x


def muon_update(name: str, gradient: Tensor, mean: Tensor, settings: OptimizationConfig, shape: ModelConfig) -> Tensor:
    """What is subtracted, over lr; `mean` is updated. Rows of Q, K and V are interleaved by key-value head."""
    mu = settings.muon_momentum
    mean += (1 - mu) * (gradient - mean)
    ahead = (1 - mu) * gradient + mu * mean if settings.muon_use_nesterov else mean

    def scaled(part: Tensor) -> Tensor:
        scale = SCALES[settings.muon_scale_mode](*part.shape) * settings.muon_extra_scale_factor
        return scale * orthogonalized(part, settings.muon_num_ns_steps)

    if "linear_qkv" not in name:
        return scaled(ahead)
    groups, size = shape.num_key_value_heads, shape.head_dim
    rows = ahead.view(groups, -1, ahead.size(1))
    parts = [scaled(part.flatten(0, 1)) for part in rows.split([rows.size(1) - 2 * size, size, size], dim=1)]
    return torch.cat([part.view(groups, -1, ahead.size(1)) for part in parts], dim=1).view_as(ahead)


def adam_update(gradient: Tensor, moments: list[Tensor], step: int, settings: OptimizationConfig) -> Tensor:
    for moment, beta, value in zip(
        moments, (settings.adam_beta1, settings.adam_beta2), (gradient, gradient**2), strict=True
    ):
        moment += (1 - beta) * (value - moment)
    mean, square = (
        moment / (1 - beta**step)
        for moment, beta in zip(moments, (settings.adam_beta1, settings.adam_beta2), strict=True)
    )
    return mean / (square.sqrt() + settings.adam_eps)


def muon_against_formulas(checkpoint: str, settings: dict[str, Any], num_steps: int) -> dict[str, Any]:
    """By role and optimizer: largest |weight - the formulas'| over lr in any step, and largest change over lr.

    On one rank, at a constant learning rate, without clipping.
    """
    config, state, batches = _start(checkpoint, settings)
    shape, optimization = read_model_config(resolve(checkpoint) / "hf"), config.optimization
    with_muon = {"attention", "mlp"} | ({"router"} if optimization.muon_router else set())
    parameters: dict[str, Any] = {name: item for chunk in state.chunks for name, item in chunk.named_parameters()}
    moments: dict[str, list[Tensor]] = {}
    found: dict[str, tuple[float, float]] = {}
    for step in range(1, num_steps + 1):
        before = {name: item.detach().double().clone() for name, item in parameters.items()}
        state.scheduler.step(1)
        zero_gradients(state.chunks, state.optimizer)
        forward_backward(state.chunks, _one_iteration(batches), forward_only=False)
        gradients = {name: item.main_grad.double().clone() for name, item in parameters.items()}
        update_parameters(state.optimizer)
        for name, gradient in gradients.items():
            role = role_of(name, shape.tie_word_embeddings)
            lr = optimization.lr * optimization.lr_mult.get(role, 1.0)
            decay = optimization.weight_decay if gradient.dim() > 1 else 0.0
            own = moments.setdefault(name, [torch.zeros_like(gradient), torch.zeros_like(gradient)])
            by_muon = role in with_muon and gradient.dim() > 1
            if by_muon:
                update = muon_update(name, gradient, own[0], optimization, shape)
            else:
                update = adam_update(gradient, own, step, optimization)
            expected = before[name] - lr * (decay * before[name] + update)
            error = float((parameters[name].detach().double() - expected).abs().max()) / lr
            change = float((expected - before[name]).abs().max()) / lr
            key = f"{role}, {'Muon' if by_muon else 'AdamW'}"
            worst, most = found.get(key, (0.0, 0.0))
            found[key] = max(worst, error), max(most, change)
    return found


def silent_adam(checkpoint: str, settings: dict[str, Any]) -> list[str]:
    """What is said where megatron.core would use AdamW: for all, as without the field `optimizer`; and for experts."""
    from megatron.core.optimizer import emerging_optimizers
    from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate

    lines = []
    configuration = our_optimizer.MegatronOptimizerConfig

    def without_field(**fields: Any) -> Any:
        return configuration(**{**fields, "optimizer": "adam"})

    entry = emerging_optimizers._EMERGING_OPTIMIZERS["muon"]
    usual = emerging_optimizers._is_nonlinear_or_embedding
    experts = ParamKey(predicate=ParamPredicate("experts too", lambda p: usual(p) or not getattr(p, "allreduce", True)))
    for replacement in (
        mock.patch.object(our_optimizer, "MegatronOptimizerConfig", without_field),
        mock.patch.object(entry, "default_param_overrides", {experts: {"optimizer": "adam"}}),
    ):
        with replacement:
            try:
                _start(checkpoint, settings)
            except UserError as error:
                lines.append(str(error))
    return lines
