"""MoE layer of the local implementation: megatron's, with fewer copies of tokens where one rank holds all experts.

megatron.core's dispatcher gathers each expert's tokens, exchanges them, and adds the outputs up with scatter_add.
Shapes: T tokens, E experts, R rows, the choices by expert and then by token, h hidden.
"""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor

from megatron_a2d.model.token_rows import copied, rows_of, summed


class LocalMoELayer(MoELayer):
    """megatron.core's MoE layer."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        dispatcher = self.token_dispatcher
        self._holds_all = (
            isinstance(dispatcher, MoEAlltoAllTokenDispatcher)
            and not dispatcher.drop_and_pad
            and dispatcher.ep_size * dispatcher.tp_size == 1
        )
        if self._holds_all:
            # Read in the condition of its second sort only, that of the ranks' chunks by this rank's experts.
            dispatcher.num_local_experts = 1

    def forward(self, hidden_states: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, None]:
        """The output [s, b, h] and no bias, as megatron.core calls it."""
        if not self._holds_all or self.moe_layer_recompute or hidden_states.device.type != "cpu":
            return super().forward(hidden_states, *arguments, **options)  # type: ignore[no-any-return]
        weights_TE, chosen_TE = self.route(hidden_states)
        rows = rows_of(chosen_TE)
        weights_R = weights_TE.T.masked_select(chosen_TE.T)
        outputs_Rh, _bias = self.experts(copied(hidden_states.flatten(0, 1), rows), chosen_TE.sum(0), weights_R)
        return summed(outputs_Rh, rows).view_as(hidden_states), None
