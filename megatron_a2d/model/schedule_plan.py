"""The model in parts, for --overlap-moe-expert-parallel-comm.

megatron.core interleaves the forward pass of one micro-batch with the backward pass of another, layer by layer, so that
one's tokens travel while the other computes.

That schedule asks its model for what comes before the layers and after them, by the names below.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.model_chunk_schedule_plan import TransformerModelChunkSchedulePlan
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


class InParts:
    """What DiffusionLM adds for that schedule."""

    def build_schedule_plan(
        self,
        tokens_bs: Tensor,
        labels_N: Tensor | None,
        rows_N: Tensor | None,
        documents: Tensor | None = None,
        positions: Tensor | None = None,
        annealing: Tensor | None = None,
        levels: Tensor | None = None,
    ) -> TransformerModelChunkSchedulePlan:
        """The inputs of `forward`, to be run part by part."""
        self._show(tokens_bs)  # type: ignore[attr-defined]
        mask, packed = self._attention_inputs(tokens_bs, documents, annealing, levels)  # type: ignore[attr-defined]
        # loss_mask is the place for the rows: megatron hands it through to _postprocess.
        return TransformerModelChunkSchedulePlan(
            self, tokens_bs, positions, mask, labels=labels_N, packed_seq_params=packed, loss_mask=rows_N
        )

    def correct_of(self, plan: TransformerModelChunkSchedulePlan) -> Tensor:
        """[N] bool of the micro-batch whose forward pass has just ended; its losses went through megatron."""
        correct, self._correct = self._correct, None
        assert correct is not None, "the plan has not been run"
        return correct

    _correct: Tensor | None = None

    def _preprocess(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        decoder_input: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **_: Any,
    ) -> tuple[Tensor | None, ...]:
        """Hidden states and rotary angles, and four things that only other models have."""
        model: Any = self
        hidden = model.embedding(input_ids, None) if model.pre_process else decoder_input
        if hidden is not None and not hidden.requires_grad and torch.is_grad_enabled():
            hidden.requires_grad_()  # of a frozen embedding; the plan asks it for a gradient
        return hidden, model._rotary(hidden, position_ids), None, None, None, None

    def _postprocess(self, hidden_states: Tensor, labels: Tensor, loss_mask: Tensor, **_: Any) -> Tensor:
        """Losses of the rows."""
        rows = self._head(hidden_states, labels, loss_mask)  # type: ignore[attr-defined]
        self._correct = rows.correct
        return rows.losses
