"""Invalid settings and combinations of the optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from megatron_a2d.config.optimization_config import OptimizationConfig
from megatron_a2d.config.settings import RunConfig, flag, settings


def find_optimizer_problems(config: RunConfig) -> Iterator[str]:
    """A line for each setting of Muon that is invalid or has no effect."""
    optimization = config.optimization
    if optimization.optimizer != "muon":
        for name in (item.name for item in fields(OptimizationConfig) if item.name.startswith("muon_")):
            if (value := getattr(optimization, name)) != settings()[name].default:
                yield f"{flag(name)} {value}: has no effect without --optimizer muon; add that or remove this"
        return
    if not 0 <= optimization.muon_momentum < 1:
        yield f"--muon-momentum {optimization.muon_momentum}: must lie in [0, 1)"
    if not 1 <= optimization.muon_num_ns_steps <= 100:
        yield f"--muon-num-ns-steps {optimization.muon_num_ns_steps}: must lie between 1 and 100; 5 is usual"
    if not optimization.muon_extra_scale_factor > 0:
        yield f"--muon-extra-scale-factor {optimization.muon_extra_scale_factor}: must be positive"
    roles = ["attention", "mlp", *(["router"] if optimization.muon_router else [])]
    if all(optimization.lr_mult.get(role) == 0 for role in roles):
        yield f"--lr-mult {' '.join(f'{role}=0' for role in roles)}: freezes all that --optimizer muon is for; use adam"


def find_optimizer_layout_problems(config: RunConfig) -> Iterator[str]:
    """A line for each setting of the layout that Muon does not support."""
    parallel = config.parallel
    if config.optimization.optimizer != "muon":
        return
    for name in ("use_precision_aware_optimizer", "fp8_param_gather"):
        if getattr(config.performance, name):
            yield f"{flag(name)}: not with --optimizer muon, whose state and main weights are in fp32; drop one"
    if parallel.expert_tensor_parallel_size > 1:
        yield (
            f"--expert-tensor-parallel-size {parallel.expert_tensor_parallel_size}: divides the experts' matrices, and "
            "--optimizer muon needs whole ones; use --expert-model-parallel-size"
        )
