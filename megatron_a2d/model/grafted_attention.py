"""Grafted self-attention: full attention trained to imitate the causal one it replaces (Chandrasegaran et al. 2025).

During the grafting steps a layer computes both operators on the same input: the old one, with its own weights and
causal mask, and the new one with full attention. The new one is regressed on the old one's output; the residual stream
continues with one of the two. Neither the input nor the stream carries a gradient, so every layer learns independently
and the pipeline schedule is unchanged: the loss joins the stream's backward pass like an auxiliary MoE loss.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from megatron_a2d.megatron_compat.versions import is_recomputed
from megatron_a2d.model.local_attention import LocalSelfAttention


class GraftedSelfAttention(SelfAttention):
    """SelfAttention that is bidirectional, and regressed on the causal operator after `start_grafting`."""

    _old_weights: dict[str, Tensor] | None = None
    _feeds_new = False
    _runs_old = False

    def remember_old(self) -> dict[str, Tensor]:
        """A copy of the current weights, for `start_grafting`."""
        return {name: parameter.detach().clone() for name, parameter in self.named_parameters()}

    def start_grafting(self, old_weights: dict[str, Tensor], feeds_new: bool) -> None:
        """Regress on the operator with `old_weights`; `feeds_new`: the residual stream takes the new output."""
        self._old_weights, self._feeds_new = old_weights, feeds_new
        self._error = torch.zeros((), dtype=torch.float64, device=self.linear_proj.weight.device)

    def stop_grafting(self) -> None:
        self._old_weights = None

    def take_error(self) -> Tensor:
        """This layer's part of the loss, summed over tokens since the last call."""
        error, self._error = self._error, torch.zeros_like(self._error)
        return error

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None, **options: Any) -> tuple[Tensor, Any]:
        if self._old_weights is None or self._runs_old:
            return super().forward(hidden_states, attention_mask, **options)
        read = hidden_states.detach()
        old = self._old_output(read, attention_mask, options)
        new, _ = super().forward(read, attention_mask, **options)
        loss = relative_errors(new, old).sum() / self.config.num_layers
        if not is_recomputed():
            self._error += loss.detach().double()
        stream = new.detach() if self._feeds_new else old
        return _WithLoss.apply(stream, loss, hidden_states), None

    @torch.no_grad()
    def _old_output(self, hidden_states: Tensor, attention_mask: Tensor | None, options: dict[str, Any]) -> Tensor:
        assert self._old_weights is not None
        self._runs_old = self.core_attention.is_causal = True
        try:
            arguments = (hidden_states, attention_mask)
            return torch.func.functional_call(self, self._old_weights, arguments, options)[0]
        finally:
            self._runs_old = self.core_attention.is_causal = False


class LocalGraftedSelfAttention(GraftedSelfAttention, LocalSelfAttention):
    """The same in the local layers."""


def relative_errors(new: Tensor, old: Tensor) -> Tensor:
    """|new - old|^2 / |old|^2 of each token's output, in fp32: 0 is a perfect match, 1 the error of predicting zero."""
    new, old = new.float(), old.float()
    return (new - old).square().sum(-1) / old.square().sum(-1).clamp(min=1e-12)


class _WithLoss(torch.autograd.Function):
    """Identity on `stream`; its backward pass starts that of `loss`, and gives `read` a zero gradient.

    So every parameter has a gradient, which --overlap-grad-reduce waits for.
    """

    @staticmethod
    def forward(ctx: Any, stream: Tensor, loss: Tensor, read: Tensor) -> Tensor:  # type: ignore[override]
        return stream

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, Tensor]:  # type: ignore[override]
        return None, torch.ones((), dtype=torch.float32, device=gradient.device), torch.zeros_like(gradient)
