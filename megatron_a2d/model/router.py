"""The router of a MoE layer: each token's experts, and their weights.

megatron.core's router with its load balancing off. Everything here is in the original numbering of experts, but for
the output of `forward`, whose columns are those of the slots that hold them (expert_placement.py).
Shapes: s this rank's slice of the sequence, b batch, T = s b tokens, E experts.
"""

from __future__ import annotations

from megatron.core.transformer.moe.moe_utils import apply_router_token_dropping, topk_routing_with_score_function
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_a2d.model.expert_placement import Slots


class Router(TopKRouter):
    """The k experts of each token with the largest logits, weighted by the softmax of the architecture."""

    slots: Slots | None = None  # None: slot j holds expert j

    def forward(self, input: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weights and choices of `routing`, by slot."""
        weights_TE, chosen_TE = super().forward(input, padding_mask)
        if self.slots is None:
            return weights_TE, chosen_TE
        return self.slots.by_slot(weights_TE), self.slots.by_slot(chosen_TE)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weights [T, E], 0 for experts that do not serve a token, and a bool map [T, E] of those that do.

        `logits`: [s, b, E] fp32. Called by megatron.core's `forward`.
        """
        assert padding_mask is None
        return self._drop(*self._choose(logits.view(-1, self.num_experts)))

    def _choose(self, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and choices of all tokens."""
        weights_TE, chosen_TE = topk_routing_with_score_function(
            logits_TE,
            self.topk,
            use_pre_softmax=self.config.moe_router_pre_softmax,
            score_function=self.score_function,
            fused=self.config.moe_router_fusion,
        )
        return weights_TE, chosen_TE

    def _drop(self, weights_TE: Tensor, chosen_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Without the choices beyond an expert's capacity, which is counted by rank and micro-batch."""
        factor = self.config.moe_expert_capacity_factor
        if factor is None:
            return weights_TE, chosen_TE
        kept_TE: tuple[Tensor, Tensor] = apply_router_token_dropping(
            weights_TE, chosen_TE, self.topk, factor, self.config.moe_token_drop_policy
        )
        return kept_TE
