"""Settings of a MoE model's load balancing, declared as in settings.py (what they compute: docs/performance.md)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class BalancingConfig:
    """Load balancing of the experts; all auxiliary losses are sums over the global batch, divided once."""

    moe_router_load_balancing_type: Literal["none", "aux_loss", "seq_aux_loss", "global_aux_loss"] = "none"
    """auxiliary loss on the experts' loads; global_aux_loss: those of a global batch; seq_aux_loss: those of each
    sample; aux_loss: the same, as Megatron computes it with micro-batches of one sample"""
    moe_aux_loss_coeff: float = 0.0
    """coefficient of the auxiliary loss, which is 1 in a balanced layer, and is summed over layers"""
    moe_aux_loss_tokens: Literal["all", "by_kind", "unmasked"] = "all"
    """tokens to balance; all: together; by_kind: masked and unmasked ones separately; unmasked: only those"""
    moe_aux_loss_loads: Literal["previous", "current"] = "previous"
    """global_aux_loss: loads of the previous step's global batch, or of the step's own, counted in an extra forward
    pass"""
    moe_z_loss_coeff: float = 0.0
    """coefficient of the router z-loss, the mean over tokens of logsumexp(logits) squared, summed over layers"""
    moe_router_enable_expert_bias: bool = False
    """balance by a bias on each expert's score, in the choice of experts only; it is annealed to zero over the last
    tenth of the run"""
    moe_router_bias_update_rate: float = 1e-3
    """with moe_router_enable_expert_bias: change of a bias per step"""
    moe_expert_capacity_factor: float | None = None
    """drop choices beyond this multiple of an expert's even share, by process and micro-batch: the result then depends
    on the layout"""
    moe_token_drop_policy: Literal["probs", "position"] = "probs"
    """with moe_expert_capacity_factor: drop the choices of smallest weight, or the last ones"""
    moe_pad_expert_input_to_capacity: bool = False
    """with moe_expert_capacity_factor: pad each expert's input to its capacity, so that shapes are static"""

    @property
    def has_aux_loss(self) -> bool:
        return self.moe_router_load_balancing_type != "none"

    @property
    def has_losses(self) -> bool:
        return self.has_aux_loss or self.moe_z_loss_coeff > 0

    @property
    def balances(self) -> bool:
        """Whether anything is done about the experts' loads, or about the logits that decide them."""
        return self.has_losses or self.moe_router_enable_expert_bias or self.moe_expert_capacity_factor is not None
