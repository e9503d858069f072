"""Validation of the load balancing settings, before anything is built."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from megatron_a2d.config.settings import RunConfig, flag, settings


def needs_experts(config: RunConfig) -> list[str]:
    """One line for each setting of load balancing, for a dense model."""
    return [f"{shown}: the model is dense and has no experts; remove it" for shown in _set(config).values()]


def find_balancing_problems(config: RunConfig) -> Iterator[str]:
    """One line per problem: flag and value, why, what to do."""
    shown = _set(config)
    yield from _range_problems(config)
    for name, needed in _without_effect(config).items():
        yield f"{shown[name]}: has no effect without {needed}; set that too, or remove this"
    yield from _contradictions(config, shown)


def _set(config: RunConfig) -> dict[str, str]:
    """The settings that differ from their defaults, as flags with values."""
    values: dict[str, Any] = {
        name: value for name, value in vars(config.balancing).items() if value != settings()[name].default
    }
    return {name: flag(name) if value is True else f"{flag(name)} {value}" for name, value in values.items()}


def _range_problems(config: RunConfig) -> Iterator[str]:
    balancing = config.balancing
    for name in ("moe_aux_loss_coeff", "moe_z_loss_coeff"):
        if getattr(balancing, name) < 0:
            yield f"{flag(name)} {getattr(balancing, name)}: must not be negative"
    if balancing.moe_router_bias_update_rate <= 0:
        yield f"--moe-router-bias-update-rate {balancing.moe_router_bias_update_rate}: must be positive; 0.001 is usual"
    capacity = balancing.moe_expert_capacity_factor
    if capacity is not None and not 0 < capacity < math.inf:
        yield f"--moe-expert-capacity-factor {capacity}: must be positive; leave it out to drop nothing"


def _without_effect(config: RunConfig) -> dict[str, str]:
    """Options that were set of something that is not enabled -> what enables it."""
    balancing = config.balancing
    kind = balancing.moe_router_load_balancing_type
    has_capacity, has_bias = balancing.moe_expert_capacity_factor is not None, balancing.moe_router_enable_expert_bias
    options = (
        ("moe_aux_loss_coeff", balancing.has_aux_loss, "--moe-router-load-balancing-type"),
        ("moe_aux_loss_tokens", balancing.has_aux_loss, "--moe-router-load-balancing-type"),
        ("moe_aux_loss_loads", kind == "global_aux_loss", "--moe-router-load-balancing-type global_aux_loss"),
        ("moe_router_load_balancing_type", balancing.moe_aux_loss_coeff != 0, "--moe-aux-loss-coeff"),
        ("moe_router_bias_update_rate", has_bias, "--moe-router-enable-expert-bias"),
        ("moe_token_drop_policy", has_capacity, "--moe-expert-capacity-factor"),
        ("moe_pad_expert_input_to_capacity", has_capacity, "--moe-expert-capacity-factor"),
    )
    return {name: needed for name, effective, needed in options if not effective and name in _set(config)}


def _contradictions(config: RunConfig, shown: dict[str, str]) -> Iterator[str]:
    balancing, performance = config.balancing, config.performance
    if balancing.moe_router_enable_expert_bias and balancing.has_aux_loss:
        yield (
            f"--moe-router-enable-expert-bias: {shown['moe_router_load_balancing_type']} balances the same experts by "
            "other choices than those that the bias makes; use one of the two"
        )
    if balancing.moe_router_enable_expert_bias and performance.moe_router_fusion:
        yield (
            "--moe-router-enable-expert-bias: the kernel of --moe-router-fusion has no bias for softmax scores; leave "
            "out one of the two"
        )
    if balancing.moe_aux_loss_tokens != "all" and config.diffusion.objective == "ar":
        yield (
            f"{shown['moe_aux_loss_tokens']}: has no effect with --objective ar, which masks no tokens; "
            "use --moe-aux-loss-tokens all"
        )
    yield from _capacity_problems(config)
    forced, graphed = performance.moe_router_force_load_balancing, _graphed(config)
    for name in _sources(config):
        if forced:
            yield f"{shown[name]}: has no effect with --moe-router-force-load-balancing; remove one of them"
        if graphed:
            yield (
                f"{shown[name]}: the choices inside a CUDA graph cannot be counted; leave moe_router out of "
                "--cuda-graph-scope"
            )


def _capacity_problems(config: RunConfig) -> Iterator[str]:
    capacity, pads = config.balancing.moe_expert_capacity_factor, config.balancing.moe_pad_expert_input_to_capacity
    if capacity is None:
        return
    if pads and capacity < 1:
        yield (
            f"--moe-expert-capacity-factor {capacity}: with --moe-pad-expert-input-to-capacity every expert computes "
            "its capacity, and below 1 choices would be dropped even if all loads were even; use at least 1"
        )
    if pads and config.parallel.moe_token_dispatcher_type != "alltoall":
        yield (
            "--moe-pad-expert-input-to-capacity: not with --moe-token-dispatcher-type "
            f"{config.parallel.moe_token_dispatcher_type}; use alltoall"
        )
    if config.performance.moe_expert_rank_capacity_factor is not None:
        yield (
            f"--moe-expert-capacity-factor {capacity}: not with --moe-expert-rank-capacity-factor, which drops "
            "nothing; remove one of them"
        )


def _sources(config: RunConfig) -> list[str]:
    """The settings that enable something."""
    switches = (
        "moe_router_load_balancing_type", "moe_z_loss_coeff", "moe_router_enable_expert_bias",
        "moe_expert_capacity_factor",
    )  # fmt: skip
    return [name for name in switches if name in _set(config)]


def _graphed(config: RunConfig) -> bool:
    """Whether routers run inside CUDA graphs."""
    return config.performance.cuda_graph_impl != "none" and "moe_router" in config.performance.cuda_graph_scope
