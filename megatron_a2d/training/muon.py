"""Muon by megatron.core: which parameters it updates, its options, and a check that it does.

Muon (Jordan et al. 2024; at scale: Liu et al. 2025) orthogonalises the mean of a matrix's gradients. megatron-core
0.19.2 gives every two-dimensional parameter to it that is not marked as embedding or head, and all others to AdamW,
without a word: routers are orthogonalised, stacked experts are not, and it is AdamW for everything unless the
configuration's `optimizer` says muon, from `get_megatron_muon_optimizer` too (0.16.1's gives Muon whatever the field
says). Here the role decides, and a run whose matrices are not all with Muon does not start.

Q, K and V are orthogonalised apart, gate and up together. Under tensor parallelism each rank gathers the whole gradient
(`duplicated`; megatron.core's default orthogonalises each rank's slice, so that the result depends on the layout).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch import nn

from megatron_a2d.config.optimization_config import OptimizationConfig
from megatron_a2d.utils.errors import UserError


def muon_options(settings: OptimizationConfig) -> dict[str, Any]:
    """The fields of megatron.core's OptimizerConfig; none without --optimizer muon (0.16.1 has other ones)."""
    if settings.optimizer != "muon":
        return {}
    return {
        "muon_momentum": settings.muon_momentum,
        "muon_nesterov": settings.muon_use_nesterov,
        "muon_num_ns_steps": settings.muon_num_ns_steps,
        "muon_scale_mode": settings.muon_scale_mode,
        "muon_extra_scale_factor": settings.muon_extra_scale_factor,
        "muon_fp32_matmul_prec": settings.muon_fp32_matmul_prec,
        "muon_tp_mode": "duplicated",
    }


def tag_for_muon(
    chunks: list[DistributedDataParallel], role_of: Callable[[str], str], settings: OptimizationConfig
) -> None:
    """Set `muon` on every parameter, and megatron.core's mark on those that AdamW updates.

    UserError if the package cannot be imported, which megatron.core takes for one that is not installed.
    """
    try:
        importlib.import_module("emerging_optimizers.orthogonalized_optimizers")
    except ImportError as error:
        raise UserError(
            f"--optimizer muon: emerging-optimizers cannot be imported ({error}); reinstall it with "
            "pip install emerging-optimizers==0.3.0, or use adam"
        ) from None
    roles = {"attention", "mlp"} | ({"router"} if settings.muon_router else set())
    for name, parameter in _parameters(chunks):
        parameter.muon = role_of(name) in roles and parameter.dim() > 1  # type: ignore[attr-defined]
        # The only mark that its choice reads (optimizer/emerging_optimizers.py, _is_nonlinear_or_embedding).
        parameter.is_embedding_or_output_parameter = not parameter.muon  # type: ignore[attr-defined]


def check_muon(optimizer: MegatronOptimizer, chunks: list[DistributedDataParallel]) -> None:
    """UserError unless Muon updates the parameters that it is meant for, and no others, as whole matrices."""
    module = importlib.import_module("megatron.core.optimizer.emerging_optimizers")
    found = {
        id(parameter)
        for part in getattr(optimizer, "chained_optimizers", [optimizer])
        if isinstance(part.optimizer, module.TensorParallelMuon)
        for parameter in _updated_by(part)
    }
    divided = parallel_state.get_tensor_model_parallel_world_size() > 1
    for name, parameter in _parameters(chunks):
        if not parameter.requires_grad:
            continue
        is_meant = bool(parameter.muon)  # type: ignore[attr-defined]
        if (id(parameter) in found) != is_meant:
            which = "AdamW" if is_meant else "Muon"
            raise UserError(
                f"--optimizer muon: megatron-core would update {name} {list(parameter.shape)} with {which}; "
                "install megatron-core==0.19.2 and emerging-optimizers==0.3.0, or use adam"
            )
        is_slice = getattr(parameter, "tensor_model_parallel", False) and ".experts." not in name
        if is_meant and divided and is_slice and getattr(parameter, "partition_dim", -1) not in (0, 1):
            raise UserError(
                f"--optimizer muon: {name} is one rank's slice and does not say of which dimension; use "
                "--tensor-model-parallel-size 1"
            )


def _updated_by(part: Any) -> Iterator[nn.Parameter]:
    """The model's parameters that an optimizer updates; of lower precision ones it has main copies."""
    if hasattr(part, "float16_groups"):
        for group in (*part.float16_groups, *part.fp32_from_fp32_groups):
            yield from group
    else:
        yield from part.get_parameters()


def _parameters(chunks: list[DistributedDataParallel]) -> Iterator[tuple[str, nn.Parameter]]:
    for chunk in chunks:
        yield from chunk.named_parameters()
