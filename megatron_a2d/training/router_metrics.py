"""Router metrics, for masked and for unmasked tokens: expert load, entropy, dropped and overflowing tokens, ranks.

Counts are sums over all tokens of an iteration, over ranks and micro-batches: the same under every layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_a2d.megatron_compat.device import device
from megatron_a2d.megatron_compat.versions import is_recomputed
from megatron_a2d.model.diffusion_lm import DiffusionLM
from megatron_a2d.training.load_metrics import load_metrics
from megatron_a2d.training.param_shards import over_ranks

_UNMASKED, _MASKED = 0, 1
KINDS = {"masked": _MASKED, "unmasked": _UNMASKED}


class RouterCounts:
    """Counters of the routers of this rank's model chunks; their hooks do nothing outside `counting`."""

    def __init__(self, models: list[DiffusionLM], mask_token_id: int | None):
        config = models[0].config
        self._num_experts, self._top_k = config.num_moe_experts, config.moe_router_topk
        self._mask_token_id, self._sequence_parallel = mask_token_id, config.sequence_parallel
        self._expert_orders = models[0].expert_orders
        self._active = False
        self._is_masked_sb: Tensor | None = None
        # By layer and kind of token: choices of each expert, then tokens, then the sum of their entropies.
        self._table = torch.zeros(config.num_layers, 2, self._num_experts + 2, dtype=torch.float64, device=device())
        for model in models:
            model.watch_tokens = self._see_tokens
            for module in model.modules():
                if isinstance(module, TopKRouter):
                    module.register_forward_hook(self._see_choices)

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count the forward passes inside this context."""
        self._table.zero_()
        self._active = True
        try:
            yield
        finally:
            self._active = False
            self._is_masked_sb = None

    def _see_tokens(self, tokens_bs: Tensor) -> None:
        if not self._active:
            return
        masked_sb = (tokens_bs == (-1 if self._mask_token_id is None else self._mask_token_id)).T
        if self._sequence_parallel:
            tp_size = parallel_state.get_tensor_model_parallel_world_size()
            masked_sb = masked_sb.chunk(tp_size)[parallel_state.get_tensor_model_parallel_rank()]
        self._is_masked_sb = masked_sb

    @torch.no_grad()
    def _see_choices(self, router: Any, arguments: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        if not self._active or is_recomputed():
            return
        assert self._is_masked_sb is not None
        masked_N = self._is_masked_sb.reshape(-1)
        log_probs_NE = torch.log_softmax(router.gating(arguments[0]).float(), dim=-1).view(-1, self._num_experts)
        entropy_N = -(log_probs_NE.exp() * log_probs_NE).sum(-1)
        chosen_NE = output[1].view(-1, self._num_experts)
        if slots := getattr(router, "slots", None):
            chosen_NE = slots.by_expert(chosen_NE)
        columns = torch.cat([chosen_NE, torch.ones_like(entropy_N)[:, None], entropy_N[:, None]], dim=1)
        self._table[router.layer_number - 1].index_add_(0, masked_N.long(), columns.to(self._table))

    def choices(self) -> Tensor:
        """[layers, kinds, experts]: choices of the last `counting`. Collective."""
        return over_ranks(self._table[..., : self._num_experts].clone()).cpu()

    def read(self) -> dict[str, Any]:
        """Metrics of the last `counting`. Collective.

        load_imbalance: max load / mean load, mean over layers; entropy: of a token's distribution over experts, nats;
        load_tv_distance: total variation distance between the loads of masked and unmasked tokens; dropped_token_frac:
        share of token-expert assignments that were dropped; over_mean_load_frac: share above the mean load, which a
        capacity factor of 1 would drop. Those of load_metrics.py. by_layer: lists.
        """
        table = over_ranks(self._table.clone()).cpu()
        counts, tokens, entropy = table[..., : self._num_experts], table[..., -2], table[..., -1]
        shares = counts / counts.sum(-1, keepdim=True).clamp(min=1)
        values: dict[str, Any] = {}
        by_layer: dict[str, Any] = {}
        present = {name: kind for name, kind in KINDS.items() if float(tokens[:, kind].sum()) > 0}
        for name, kind in present.items():
            load = shares[:, kind].max(-1).values * self._num_experts
            mean_entropy = entropy[:, kind] / tokens[:, kind].clamp(min=1)
            by_layer[f"load_imbalance_{name}"], by_layer[f"entropy_{name}"] = load.tolist(), mean_entropy.tolist()
            values[f"load_imbalance_{name}"], values[f"entropy_{name}"] = float(load.mean()), float(mean_entropy.mean())
        if len(present) == 2:
            difference = (shares[:, _MASKED] - shares[:, _UNMASKED]).abs().sum(-1) / 2
            by_layer["load_tv_distance"] = difference.tolist()
            values["load_tv_distance"] = float(difference.mean())
        wanted = tokens.sum() * self._top_k
        served = counts.sum(1)
        even = tokens.sum(1, keepdim=True) * self._top_k / self._num_experts
        values["dropped_token_frac"] = float((wanted - served.sum()) / wanted)
        values["over_mean_load_frac"] = float((served - even).clamp(min=0).sum() / wanted)
        of_experts, of_experts_by_layer = load_metrics(counts, self._by_slot(counts.sum(1)))
        return {**values, **of_experts, "by_layer": {**by_layer, **of_experts_by_layer}}

    def _by_slot(self, choices_LE: Tensor) -> Tensor:
        """Choices in the order in which expert-parallel ranks hold the experts."""
        orders = self._expert_orders
        return choices_LE if orders is None else choices_LE.gather(1, torch.tensor(orders))
