"""The optimizer with a learning rate per parameter role, its schedule, and the update.

RND1 gives attention a high learning rate and all other parameters a low one: attention must learn to use later tokens,
the MLPs keep what they know. A parameter's role follows from its name; each role's factor becomes one parameter group.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, ParamKey, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import optimizer as megatron_optimizer
from megatron.core.optimizer.optimizer_config import ParamPredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, ParamGroupOverride
from torch import nn

from megatron_a2d.config.fp8_recipe import Scaling, engine_scaling
from megatron_a2d.config.settings import RunConfig
from megatron_a2d.megatron_compat.device import compute_capability, cuda_version
from megatron_a2d.megatron_compat.optimizer_chain import members
from megatron_a2d.training.muon import check_muon, count_muon_step, muon_options

# First match wins: a norm inside attention is a norm.
_ROLE_OF_NAME_PART = (
    ("norm", "norm"),
    ("router", "router"),
    ("self_attention", "attention"),
    ("mlp", "mlp"),
    ("embedding", "embedding"),
    ("output_layer", "head"),
)


_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def role_of(name: str, tied: bool = False) -> str:
    """The role of the parameter with this name in the model; a tied head is the embedding."""
    role = next(role for part, role in _ROLE_OF_NAME_PART if part in name)
    return "embedding" if role == "head" and tied else role


def build_optimizer(config: RunConfig, chunks: list[DistributedDataParallel], tied: bool) -> MegatronOptimizer:
    """The optimizer over all of this rank's model chunks."""
    settings, performance = config.optimization, config.performance
    scaling = engine_scaling(config, compute_capability(), cuda_version())
    precise = performance.use_precision_aware_optimizer
    scales = _tag_learning_rates(chunks, settings.lr_mult, tied)
    optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer=settings.optimizer,
            lr=settings.lr,
            min_lr=settings.min_lr,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.adam_beta1,
            adam_beta2=settings.adam_beta2,
            adam_eps=settings.adam_eps,
            clip_grad=settings.clip_grad,
            bf16=config.training.bf16,
            params_dtype=chunks[0].config.params_dtype,
            # megatron.core's flag that Muon's matrices are distributed as wholes (muon_options).
            use_distributed_optimizer=config.parallel.use_distributed_optimizer and settings.optimizer != "muon",
            overlap_param_gather=config.parallel.overlap_param_gather,
            fp8_recipe=scaling.recipe if scaling and scaling.is_fp8 else None,
            reuse_grad_buf_for_mxfp8_param_ag=reuses_gradient_buffer(config, scaling),
            use_precision_aware_optimizer=precise,
            main_grads_dtype=torch.bfloat16 if precise and not performance.grad_reduce_in_fp32 else torch.float32,
            exp_avg_dtype=_DTYPES[performance.exp_avg_dtype],
            exp_avg_sq_dtype=_DTYPES[performance.exp_avg_sq_dtype],
            **muon_options(config),
        ),
        chunks,
        config_overrides=_group_overrides(scales, settings.lr, settings.min_lr),
        use_gloo_process_groups=False,
    )
    if settings.optimizer == "muon":
        check_muon(optimizer, chunks)
    return optimizer


def reuses_gradient_buffer(config: RunConfig, scaling: Scaling | None) -> bool:
    """Whether MXFP8 weights are gathered through the gradient buffer, which is free at that time."""
    return config.performance.fp8_param_gather and scaling is not None and scaling.recipe == "mxfp8"


def build_scheduler(config: RunConfig, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """Warm-up and decay, counted in iterations, or in samples if the run's length is."""
    settings, schedule = config.optimization, config.lr_schedule
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=schedule.warmup,
        lr_decay_steps=schedule.total,
        lr_decay_style=settings.lr_decay_style,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=schedule.total,
        wd_incr_style="constant",
        wsd_decay_steps=schedule.wsd_decay or None,
        lr_wsd_decay_style="cosine" if settings.lr_decay_style == "WSD" else None,
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )


def update_parameters(optimizer: MegatronOptimizer) -> float:
    """Clip the gradient and update; returns the global gradient norm. If that is not finite, no rank updates.

    The norm is a sum over all ranks, so all of them take the same decision.
    """
    optimizer.prepare_grads()
    grad_norm = float(optimizer.get_grad_norm())
    if not math.isfinite(grad_norm):
        return grad_norm
    for part in members(optimizer):
        if part.config.clip_grad > 0 and (parameters := part.get_parameters()):
            megatron_optimizer.clip_grad_by_total_norm_fp32(
                parameters,
                part.config.clip_grad,
                grad_norm,
                # --use-precision-aware-optimizer: the gradients are in `decoupled_grad`, of their own type.
                use_decoupled_grad=part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8,
            )
    optimizer.step_with_ready_grads()
    count_muon_step(optimizer)
    return grad_norm


def frozen_roles(settings: dict[str, Any]) -> set[str]:
    """The roles that a run's settings freeze (--lr-mult ROLE=0)."""
    return {role for role, factor in (settings.get("lr_mult") or {}).items() if factor == 0}


def freeze_roles(model: nn.Module, factors: dict[str, float], tied: bool) -> None:
    """Freeze the roles with factor 0: no gradient, no moments, no decay.

    To be called before DistributedDataParallel allocates the gradient buffers.
    """
    for name, parameter in model.named_parameters():
        if factors.get(role_of(name, tied)) == 0:
            parameter.requires_grad_(False)


def _tag_learning_rates(chunks: list[DistributedDataParallel], factors: dict[str, float], tied: bool) -> list[float]:
    """Set `lr_scale` on every parameter; returns the scales other than 1, the same list on every rank."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            parameter.lr_scale = factors.get(role_of(name, tied), 1.0)
    return sorted(set(factors.values()) - {0.0, 1.0})


def _group_overrides(scales: list[float], lr: float, min_lr: float) -> dict[ParamKey, ParamGroupOverride]:
    # The scheduler reads max_lr and min_lr and never lr_mult; the checkpoint's key of a group reads lr_mult and
    # never max_lr. Without both, groups that differ in their learning rate alone would be confused on load.
    overrides = {ParamKey(predicate=ParamPredicate("vector", _is_vector)): ParamGroupOverride(wd_mult=0.0)}
    for scale in scales:
        key = ParamKey(predicate=ParamPredicate(f"lr_scale_{scale}", lambda p, scale=scale: p.lr_scale == scale))
        overrides[key] = ParamGroupOverride(max_lr=lr * scale, min_lr=min_lr * scale, lr_mult=scale)
    return overrides


def _is_vector(parameter: nn.Parameter) -> bool:
    return parameter.dim() == 1
