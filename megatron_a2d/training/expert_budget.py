"""Token budget of each expert-parallel rank (--moe-expert-rank-capacity-factor): no token is dropped because of it.

With a budget HybridEP's buffers have a fixed size, and the host never waits for the number of tokens that a rank
receives. HybridEP drops tokens beyond the budget, so a step in which any rank exceeds it is repeated without a budget,
as in Megatron-LM's own training loop (megatron.core's PagedStashRunner). All other passes (validation, monitoring) have
no budget.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_layer import MoELayer


@contextmanager
def without_budget(chunks: list[Any]) -> Iterator[None]:
    """Context in which ranks accept any number of tokens."""
    managers = _managers(chunks)
    budgets = [manager.moe_expert_rank_capacity_factor for manager in managers]
    for manager in managers:
        manager.moe_expert_rank_capacity_factor = None
    try:
        yield
    finally:
        for manager, budget in zip(managers, budgets, strict=True):
            manager.moe_expert_rank_capacity_factor = budget


def exceeded_budget(chunks: list[Any]) -> bool:
    """Whether any rank was sent more tokens than its budget since the last call. Collective where there is a budget."""
    managers = _managers(chunks)
    if not managers:
        return False
    exceeded = torch.stack([manager.over_budget.view(-1)[0] for manager in managers]).any().int()
    for manager in managers:
        manager.over_budget.zero_()
    dist.all_reduce(exceeded, op=dist.ReduceOp.MAX)
    return bool(exceeded)


def _managers(chunks: list[Any]) -> list[Any]:
    """HybridEP's part of each MoE layer; none without a budget."""
    if getattr(chunks[0].config, "moe_expert_rank_capacity_factor", None) is None:
        return []
    layers = [module for chunk in chunks for module in chunk.modules() if isinstance(module, MoELayer)]
    return [layer.token_dispatcher._comm_manager for layer in layers]
