"""Load balancing of a MoE model's routers: the experts' loads and the auxiliary losses, exact in every layout.

For each layer, over the N routed tokens of the global batch (every position of every sample),

    aux = 1/N sum over tokens i and experts e of g[group(i), e] p[i, e]        z = 1/N sum over i of logsumexp(x[i])^2

x are the router's logits, p their softmax over all experts, and g[group, e] is the expert's share of the group's
choices times E: 1 in a balanced layer. g is constant: no gradient flows through it. The scale is that of Fedus et al.
2021 (Switch Transformers, eq. 4 to 6) and Megatron's. A group is the global batch (Qiu et al. 2025, "Demons in the
Detail") or a sample, and can be one kind of its tokens, masked or unmasked.

coefficient * aux and coefficient * z of all layers are added to the loss. They are not in its value: a router attaches
them to its weights, as their gradient alone is wanted. megatron.core divides all gradients by the number D of maskable
tokens of the global batch, so every term is attached times D / N.

Shapes: s this rank's slice of the sequence, b samples, T = s b tokens, E experts, L layers of the model. The kinds of
tokens are 0, unmasked, and 1, masked.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_a2d.config.balancing_config import BalancingConfig
from megatron_a2d.megatron_compat.device import device
from megatron_a2d.megatron_compat.versions import is_recomputed

UNMASKED, MASKED = 0, 1


class LoadBalancing:
    """What the routers of a rank's model chunks share: settings, the kinds of tokens, and the counts of a step.

    Routers do nothing with it outside `counting` and `training`. Counts are of this rank's tokens.
    """

    def __init__(self, settings: BalancingConfig, config: TransformerConfig, mask_token_id: int | None):
        """`mask_token_id`: None where nothing is masked, and all tokens count as unmasked."""
        assert config.num_moe_experts is not None
        self._settings, self._mask_token_id = settings, mask_token_id
        self._sequence_parallel, self._num_experts = config.sequence_parallel, config.num_moe_experts
        self.choices_per_token = config.moe_router_topk
        self._is_active = self._is_training = False
        self._is_masked_sb: Tensor | None = None
        # Of each layer, the tokens of micro-batches whose layer is going to be recomputed, oldest first.
        self._recomputed: dict[int, deque[Tensor]] = {}
        self.records_entropy = False
        layers, experts = config.num_layers, config.num_moe_experts
        self.choices = torch.zeros(layers, 2, experts, dtype=torch.int64, device=device())  # before any is dropped
        self.num_dropped = torch.zeros(layers, 2, dtype=torch.int64, device=device())
        self.entropies = torch.zeros(layers, 2, dtype=torch.float64, device=device())  # sums over tokens, nats
        self.losses = torch.zeros(layers, 2, dtype=torch.float64, device=device())  # N aux, N z
        self.loads: Tensor | None = None  # [L, 2, E], the choices of a whole global batch
        self._scale: Tensor | None = None  # D / N

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Forward passes without gradients, whose choices are counted."""
        with self._pass(is_training=False):
            yield

    @contextmanager
    def training(self, scale: Tensor | None) -> Iterator[None]:
        """Forward and backward passes of a global batch; `scale`: D / N, or None for passes without the losses."""
        self._scale = scale
        with self._pass(is_training=True):
            yield

    @contextmanager
    def _pass(self, is_training: bool) -> Iterator[None]:
        for table in (self.choices, self.num_dropped, self.entropies, self.losses):
            table.zero_()
        self._recomputed.clear()
        self._is_active, self._is_training = True, is_training
        try:
            yield
        finally:
            self._is_active, self._is_masked_sb = False, None

    def see_tokens(self, tokens_bs: Tensor) -> None:
        """The tokens of the micro-batch that is computed next; called by every stage of the model."""
        if not self._is_active:
            return
        masked_sb = (tokens_bs == (-1 if self._mask_token_id is None else self._mask_token_id)).T
        if self._sequence_parallel:
            tp_size = parallel_state.get_tensor_model_parallel_world_size()
            masked_sb = masked_sb.chunk(tp_size)[parallel_state.get_tensor_model_parallel_rank()]
        self._is_masked_sb = masked_sb

    def see_choices(self, layer: int, logits_sbE: Tensor, chosen_TE: Tensor, served_TE: Tensor) -> Tensor | None:
        """Count the choices of a layer (0 ... L - 1); the loss to attach to its weights, or None.

        `served_TE`: the choices without those that were dropped.
        """
        if not self._is_active:
            return None
        masked_sb = self._kinds(layer)
        with torch.no_grad():
            if not is_recomputed():
                self._count(layer, masked_sb, logits_sbE, chosen_TE, served_TE)
        if not (self._is_training and self._settings.has_losses and torch.is_grad_enabled()) or self._scale is None:
            return None
        return self._loss(layer, masked_sb, logits_sbE, chosen_TE.view_as(logits_sbE)) * self._scale

    def _kinds(self, layer: int) -> Tensor:
        """[s, b] bool, which of the tokens are masked.

        Between a layer's first pass and its recomputation lie other micro-batches. Their order is the same in both.
        """
        if is_recomputed():
            return self._recomputed[layer].popleft()
        assert self._is_masked_sb is not None
        if self._is_training and not torch.is_grad_enabled():  # the first pass of a layer that is recomputed
            self._recomputed.setdefault(layer, deque()).append(self._is_masked_sb)
        return self._is_masked_sb

    def _count(self, layer: int, masked_sb: Tensor, logits_sbE: Tensor, chosen_TE: Tensor, served_TE: Tensor) -> None:
        kinds_2T = _kinds_apart(masked_sb.reshape(-1))
        for kind, of_kind_T in enumerate(kinds_2T):
            self.choices[layer, kind] += (chosen_TE & of_kind_T[:, None]).sum(0)
            if served_TE is not chosen_TE:
                self.num_dropped[layer, kind] += (chosen_TE & ~served_TE & of_kind_T[:, None]).sum()
        if self.records_entropy:
            log_probs_TE = torch.log_softmax(logits_sbE.float(), dim=-1).view(-1, self._num_experts)
            entropy_T = -(log_probs_TE.exp() * log_probs_TE).sum(-1).double()
            self.entropies[layer] += (kinds_2T * entropy_T).sum(-1)

    def _loss(self, layer: int, masked_sb: Tensor, logits_sbE: Tensor, chosen_sbE: Tensor) -> Tensor:
        """The layer's part of the loss times N, of this rank's tokens of a micro-batch."""
        settings, zero = self._settings, torch.zeros((), device=logits_sbE.device)
        aux, z = zero, zero
        if settings.has_aux_loss:
            loads_2bE = self._relative_loads(layer, masked_sb, chosen_sbE)
            unmasked_bE, masked_bE = loads_2bE
            loads_sbE = torch.where(masked_sb[..., None], masked_bE, unmasked_bE)
            aux = (loads_sbE * torch.softmax(logits_sbE.float(), dim=-1)).sum()
        if settings.moe_z_loss_coeff:
            z = torch.logsumexp(logits_sbE.float(), dim=-1).square().sum()
        self.losses[layer] += torch.stack([aux, z]).detach()
        return settings.moe_aux_loss_coeff * aux + settings.moe_z_loss_coeff * z

    @torch.no_grad()
    def _relative_loads(self, layer: int, masked_sb: Tensor, chosen_sbE: Tensor) -> Tensor:
        """g of unmasked and of masked tokens, [2, b, E] or, if it is that of all samples, [2, 1, E]."""
        if self._settings.moe_router_load_balancing_type == "global_aux_loss":
            assert self.loads is not None
            counts_2bE = self.loads[layer, :, None].float()
        else:
            kinds_2sb = _kinds_apart(masked_sb)
            counts_2bE = (chosen_sbE & kinds_2sb[..., None]).sum(1).float()
            group = parallel_state.get_tensor_and_context_parallel_group()
            if group.size() > 1:  # they hold other parts of the same samples
                dist.all_reduce(counts_2bE, group=group)
        if self._settings.moe_aux_loss_tokens == "all":
            counts_2bE = counts_2bE.sum(0).expand_as(counts_2bE)
        loads_2bE = self._num_experts * counts_2bE / counts_2bE.sum(-1, keepdim=True).clamp(min=1)
        if self._settings.moe_aux_loss_tokens == "unmasked":
            loads_2bE[MASKED] = 0
        return loads_2bE


def _kinds_apart(masked: Tensor) -> Tensor:
    """Whether a token is unmasked, and whether it is masked: [2, ...] bool."""
    return torch.stack([~masked, masked])


class AttachLoss(torch.autograd.Function):
    """The identity of its first argument, whose backward pass also starts that of a loss."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, loss: Tensor) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (gradient,) = gradients
        return gradient, torch.ones((), dtype=torch.float32, device=gradient.device)
