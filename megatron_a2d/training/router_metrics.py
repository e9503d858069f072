"""Router metrics, for masked and for unmasked tokens: expert load, entropy, dropped and overflowing tokens, ranks.

Counts are sums over all tokens of an iteration, over ranks and micro-batches: the same under every layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from megatron_a2d.model.load_balancing import MASKED, UNMASKED
from megatron_a2d.training.balancing import RunBalancing
from megatron_a2d.training.load_metrics import load_metrics
from megatron_a2d.training.param_shards import over_ranks

KINDS = {"masked": MASKED, "unmasked": UNMASKED}


class RouterCounts:
    """What the routers chose in the forward passes of a step (model/load_balancing.py), by layer and kind of token."""

    def __init__(self, balancing: RunBalancing, expert_orders: Sequence[Sequence[int]] | None):
        self._balancing, self._routing, self._expert_orders = balancing, balancing.routing, expert_orders

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Observe the training passes inside this context."""
        self._balancing.is_observed = self._routing.records_entropy = True
        try:
            yield
        finally:
            self._balancing.is_observed = self._routing.records_entropy = False

    def read(self) -> dict[str, Any]:
        """Metrics of the last `counting`. Collective.

        load_imbalance: max load / mean load, mean over layers; entropy: of a token's distribution over experts, nats;
        load_tv_distance: total variation distance between the loads of masked and unmasked tokens; dropped_token_frac:
        share of token-expert assignments that were dropped; over_mean_load_frac: share above the mean load, which a
        capacity factor of 1 would drop. Those of load_metrics.py. by_layer: lists.
        """
        routing = self._routing
        columns = [routing.choices, routing.num_dropped[..., None], routing.entropies[..., None]]
        table = over_ranks(torch.cat([column.double() for column in columns], dim=-1)).cpu()
        counts, dropped, entropy = table[..., :-2], table[..., -2], table[..., -1]
        num_experts, tokens = counts.size(-1), counts.sum(-1) / routing.choices_per_token
        shares = counts / counts.sum(-1, keepdim=True).clamp(min=1)
        values: dict[str, Any] = {}
        by_layer: dict[str, Any] = {}
        present = {name: kind for name, kind in KINDS.items() if float(tokens[:, kind].sum()) > 0}
        for name, kind in present.items():
            load = shares[:, kind].max(-1).values * num_experts
            mean_entropy = entropy[:, kind] / tokens[:, kind].clamp(min=1)
            by_layer[f"load_imbalance_{name}"], by_layer[f"entropy_{name}"] = load.tolist(), mean_entropy.tolist()
            values[f"load_imbalance_{name}"], values[f"entropy_{name}"] = float(load.mean()), float(mean_entropy.mean())
        if len(present) == 2:
            difference = (shares[:, MASKED] - shares[:, UNMASKED]).abs().sum(-1) / 2
            by_layer["load_tv_distance"] = difference.tolist()
            values["load_tv_distance"] = float(difference.mean())
        loads = counts.sum(1)
        values["dropped_token_frac"] = float(dropped.sum() / loads.sum())
        over_mean = (loads - loads.mean(-1, keepdim=True)).clamp(min=0)
        values["over_mean_load_frac"] = float(over_mean.sum() / loads.sum())
        of_experts, of_experts_by_layer = load_metrics(counts, self._by_slot(loads))
        return {**values, **of_experts, "by_layer": {**by_layer, **of_experts_by_layer}}

    def _by_slot(self, choices_LE: Tensor) -> Tensor:
        """Choices in the order in which expert-parallel ranks hold the experts."""
        orders = self._expert_orders
        return choices_LE if orders is None else choices_LE.gather(1, torch.tensor(orders))
