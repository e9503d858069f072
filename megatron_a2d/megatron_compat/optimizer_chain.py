"""The optimizers inside megatron.core's chains, and fp32 parameters for its layer-wise optimizer.

`get_megatron_optimizer` returns a chain: AdamW for experts, AdamW for all other parameters. Muon with the distributed
optimizer is a chain inside the chain, LayerWiseDistributedOptimizer: each data-parallel rank has whole matrices of its
own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
from torch import nn

from megatron_a2d.megatron_compat.versions import is_before


def members(optimizer: Any) -> list[Any]:
    """The optimizers of a chain, and of the chains in it; an optimizer that is not a chain is its own member."""
    return [member for member, _ in _with_owner(optimizer, False)]


def whole_matrix_members(optimizer: Any) -> list[Any]:
    """The members of the layer-wise optimizer: they hold whole parameters, each on one data-parallel rank alone."""
    return [member for member, is_layer_wise in _with_owner(optimizer, False) if is_layer_wise]


def updated_by(member: Any) -> Iterator[nn.Parameter]:
    """The model's parameters that a member other than a distributed optimizer updates; of lower precision ones it has
    main copies."""
    if hasattr(member, "float16_groups"):
        for group in (*member.float16_groups, *member.fp32_from_fp32_groups):
            yield from group
    else:
        yield from member.get_parameters()


def _with_owner(optimizer: Any, is_layer_wise: bool) -> Iterator[tuple[Any, bool]]:
    if not hasattr(optimizer, "chained_optimizers"):
        yield optimizer, is_layer_wise
        return
    is_layer_wise = is_layer_wise or isinstance(optimizer, LayerWiseDistributedOptimizer)
    for member in optimizer.chained_optimizers:
        yield from _with_owner(member, is_layer_wise)


def install() -> None:
    """Make the layer-wise optimizer of 0.19.2 update fp32 parameters.

    It wraps the optimizers that it is given, torch's, in bf16 only: in fp32 they would never see a gradient, and it is
    not built, for they have no configuration.
    """
    if is_before(0, 17):
        return
    from megatron.core.optimizer.optimizer import FP32Optimizer

    initialize = LayerWiseDistributedOptimizer.__init__

    def wrapped(
        self: Any,
        optimizers: list[Any],
        config: Any,
        pg_collection: Any = None,
        init_state_fn_list: Any = None,
        model_chunks: Any = None,
    ) -> None:
        if not config.bf16:
            pairs = zip(optimizers, init_state_fn_list or [None] * len(optimizers), strict=True)
            optimizers = [FP32Optimizer(optimizer, config, init) for optimizer, init in pairs]
        initialize(self, optimizers, config, pg_collection, init_state_fn_list, model_chunks)

    LayerWiseDistributedOptimizer.__init__ = wrapped
