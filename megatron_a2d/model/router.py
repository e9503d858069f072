"""The router of a MoE layer: each token's experts, and their weights.

megatron.core's router with its load balancing off, which depends on the layout (load_balancing.py has ours). Everything
here is in the original numbering of experts, but for the output of `forward`, whose columns are those of the slots that
hold them (expert_placement.py). Shapes: s this rank's slice of the sequence, b batch, T = s b tokens, E experts.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.moe.moe_utils import apply_router_token_dropping, topk_routing_with_score_function
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor, nn

from megatron_a2d.model.expert_placement import Slots
from megatron_a2d.model.load_balancing import AttachLoss, LoadBalancing

EXPERT_BIAS = "expert_bias"  # the buffer's name, as in Megatron


class Router(TopKRouter):
    """The k experts of each token with the largest scores, weighted by the softmax of the architecture."""

    slots: Slots | None = None  # None: slot j holds expert j
    balancing: LoadBalancing | None = None  # set for training
    expert_bias: Tensor | None  # [E] fp32, added to the scores in the choice of experts only

    def add_expert_bias(self) -> None:
        """Register the bias, which is then part of checkpoints. (megatron.core's own needs sigmoid scores.)"""
        del self.expert_bias
        self.register_buffer(EXPERT_BIAS, torch.zeros(self.num_experts, device=self.weight.device))

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
        weights_TE, chosen_TE = self._choose(logits.view(-1, self.num_experts))
        weights_TE, served_TE = self._drop(weights_TE, chosen_TE)
        if self.balancing is not None:
            loss = self.balancing.see_choices(self.layer_number - 1, logits, chosen_TE, served_TE)
            weights_TE = weights_TE if loss is None else AttachLoss.apply(weights_TE, loss)
        return weights_TE, served_TE

    def _choose(self, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and choices of all tokens."""
        if self.expert_bias is not None:
            return self._choose_with_bias(logits_TE, self.expert_bias)
        weights_TE, chosen_TE = topk_routing_with_score_function(
            logits_TE,
            self.topk,
            use_pre_softmax=self.config.moe_router_pre_softmax,
            score_function=self.score_function,
            fused=self.config.moe_router_fusion,
        )
        return weights_TE, chosen_TE

    def _choose_with_bias(self, logits_TE: Tensor, bias_E: Tensor) -> tuple[Tensor, Tensor]:
        scores_TE = torch.softmax(logits_TE, dim=-1)
        experts_TK = (scores_TE.detach() + bias_E).topk(self.topk, dim=-1).indices
        if self.config.moe_router_pre_softmax:
            weights_TK = scores_TE.gather(1, experts_TK)
        else:
            weights_TK = torch.softmax(logits_TE.gather(1, experts_TK), dim=-1)
        chosen_TE = torch.zeros_like(logits_TE, dtype=torch.bool).scatter(1, experts_TK, True)
        return torch.zeros_like(logits_TE).scatter(1, experts_TK, weights_TK), chosen_TE

    def _drop(self, weights_TE: Tensor, chosen_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Without the choices beyond an expert's capacity, which is that of a rank and a micro-batch."""
        config = self.config
        if config.moe_expert_capacity_factor is None:
            return weights_TE, chosen_TE
        served: tuple[Tensor, Tensor] = apply_router_token_dropping(
            weights_TE,
            chosen_TE,
            self.topk,
            config.moe_expert_capacity_factor,
            config.moe_token_drop_policy,
            config.moe_pad_expert_input_to_capacity,
        )
        return served


def routers(model: nn.Module) -> list[Router]:
    """The routers of a model chunk, by layer."""
    return [module for module in model.modules() if isinstance(module, Router)]
