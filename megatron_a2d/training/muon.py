"""Muon by megatron.core: which parameters it updates, its options, and a check that it does.

Muon (Jordan et al. 2024; at scale: Liu et al. 2025) orthogonalises the mean of a matrix's gradients. megatron-core
0.19.2 gives every two-dimensional parameter to it that is not marked as embedding or head, and all others to AdamW,
without a word: routers are orthogonalised, stacked experts are not, and it is AdamW for everything unless the
configuration's `optimizer` says muon, from `get_megatron_muon_optimizer` too (0.16.1's gives Muon whatever the field
says). Here the role decides, and a run whose matrices are not all with Muon does not start.

Q, K and V are orthogonalised separately, gate and up together. Under tensor parallelism each rank gathers the complete
gradient (`duplicated`; megatron.core's default orthogonalises each rank's slice, so the result depends on the layout).

With the distributed optimizer each data-parallel rank updates its own matrices: in the gradient buffers none crosses
the border between two ranks' shards, and megatron.core's LayerWiseDistributedOptimizer gives a rank those of its shard.
Embedding, norms and the like are in other buffers, with the usual distributed optimizer.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer
from torch import nn

from megatron_a2d.config.optimization_config import OptimizationConfig
from megatron_a2d.config.settings import RunConfig
from megatron_a2d.megatron_compat.optimizer_chain import members, updated_by
from megatron_a2d.utils.errors import UserError


def muon_options(config: RunConfig) -> dict[str, Any]:
    """The fields of megatron.core's OptimizerConfig; none without --optimizer muon (0.16.1 has other ones)."""
    settings = config.optimization
    if settings.optimizer != "muon":
        return {}
    return {
        "use_layer_wise_distributed_optimizer": config.parallel.use_distributed_optimizer,
        "muon_momentum": settings.muon_momentum,
        "muon_nesterov": settings.muon_use_nesterov,
        "muon_num_ns_steps": settings.muon_num_ns_steps,
        "muon_scale_mode": settings.muon_scale_mode,
        "muon_extra_scale_factor": settings.muon_extra_scale_factor,
        "muon_fp32_matmul_prec": settings.muon_fp32_matmul_prec,
        "muon_tp_mode": "duplicated",
    }


def tag_for_muon(model: nn.Module, role_of: Callable[[str], str], settings: OptimizationConfig) -> None:
    """Set `muon` on every parameter, and megatron.core's mark on those that AdamW updates.

    To be called before DistributedDataParallel lays out the gradient buffers.

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
    for name, parameter in model.named_parameters():
        parameter.muon = role_of(name) in roles and parameter.dim() > 1  # type: ignore[attr-defined]
        # The only mark that its choice reads (optimizer/emerging_optimizers.py, _is_nonlinear_or_embedding).
        parameter.is_embedding_or_output_parameter = not parameter.muon  # type: ignore[attr-defined]


def whole_matrix_layout(
    model: nn.Module, ddp_config: DistributedDataParallelConfig, is_first_chunk: bool
) -> dict[str, Any]:
    """Arguments of DistributedDataParallel: gradient buffers in which each of Muon's matrices is in one rank's shard.

    Buckets are as without them: for overlap with the backward pass, in a first pipeline stage's first chunk.
    """
    from megatron.core.optimizer.layer_wise_optimizer import (
        LayerWiseDistributedOptimizer,
        tag_params_for_buffer_routing,
    )

    tag_params_for_buffer_routing([model])
    replicas = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    limit = None
    if ddp_config.overlap_grad_reduce and is_first_chunk and parallel_state.is_pipeline_first_stage():
        limit = max(40_000_000, 1_000_000 * parallel_state.get_data_parallel_world_size())
    layout = LayerWiseDistributedOptimizer.compute_full_param_layout(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        limit,
        replicas,
        ddp_config,
        expert_data_parallel_world_size=parallel_state.get_expert_data_parallel_world_size(),
    )
    # disable_bucketing would also put the buffers of both optimizers into one group of buckets, which is gathered once,
    # after the step of the optimizer that has its first bucket. Where that is Muon's, as with Transformer Engine,
    # AdamW's weights would never reach the other ranks (0.19.2).
    return {"full_param_layout": layout, "disable_bucketing": False}


def check_muon(optimizer: MegatronOptimizer, chunks: list[DistributedDataParallel]) -> None:
    """UserError unless Muon updates the parameters that it is meant for, and no others, as whole matrices."""
    module = importlib.import_module("megatron.core.optimizer.emerging_optimizers")
    found = {
        id(parameter)
        for part in members(optimizer)
        if isinstance(part.optimizer, module.TensorParallelMuon)
        for parameter in updated_by(part)
    }
    found |= {id(parameter) for parameter in _of_other_ranks(optimizer)}
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


def count_muon_step(optimizer: MegatronOptimizer) -> None:
    """Count an update in Muon's groups, as AdamW does in its own, which may all be frozen: a checkpoint after 0 updates
    has no optimizer state."""
    for part in members(optimizer):
        for group in part.param_groups:
            if "momentum" in group:
                group["step"] = group.get("step", 0) + 1


def _of_other_ranks(optimizer: Any) -> Iterator[nn.Parameter]:
    """The parameters that the layer-wise optimizer leaves to this rank or to another data-parallel one."""
    for part in (optimizer, *getattr(optimizer, "chained_optimizers", [])):
        for name in ("dp_cp_params_list", "expt_dp_params_list"):
            for parameters in getattr(part, name, None) or ():  # None: there is one rank
                yield from parameters


def _parameters(chunks: list[DistributedDataParallel]) -> Iterator[tuple[str, nn.Parameter]]:
    for chunk in chunks:
        yield from chunk.named_parameters()
