"""The language model: embedding, transformer block, and a head that sees only the rows that carry loss.

About half of a diffusion batch's positions are not masked and have no loss. At a vocabulary of 152k the
logits are the model's largest tensor, so the masked rows are gathered before the head, which takes a few of them at a
time (chunked_cross_entropy.py). Which rows they are is known before the forward pass, on the host: no GPU has to be
asked. Shapes: s sequence, b batch, h hidden, N rows with loss, V vocabulary.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from torch import Tensor

from megatron_a2d.config.model_config import Architecture
from megatron_a2d.diffusion.attention_masks import annealed, block_causal_mask
from megatron_a2d.distributed.step_timers import both_ways
from megatron_a2d.megatron_compat.device import has_cuda, send
from megatron_a2d.model.chunked_cross_entropy import OutputLayer
from megatron_a2d.model.schedule_plan import InParts


def cp_slice(tensor: Tensor, dim: int) -> Tensor:
    """This context-parallel rank's contiguous piece of the sequence, which runs along `dim`."""
    size = parallel_state.get_context_parallel_world_size()
    return tensor if size == 1 else tensor.chunk(size, dim)[parallel_state.get_context_parallel_rank()]


def packed_sequences(documents: Tensor | None, length: int) -> PackedSeqParams:
    """The documents of one sample as Transformer Engine's packed ("thd") sequences.

    `documents` [1, length] best lie on the host: their lengths are asked for.
    """
    starts = torch.zeros(1, dtype=torch.int64)
    if documents is not None:
        changes = (documents[0, 1:] != documents[0, :-1]).nonzero()[:, 0].cpu() + 1
        starts = torch.cat([starts, changes])
    bounds = torch.cat([starts, torch.tensor([length])]).int()
    longest, bounds = int(bounds.diff().max()), send(bounds)
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=longest, max_seqlen_kv=longest
    )


class YarnAngles(YarnRotaryEmbedding):
    """megatron's YaRN without its tables of sine and cosine, which only its own decoding reads."""

    def _set_cos_sin_cache(self, *_: Any, **__: Any) -> None:
        pass


def rotary_embedding(architecture: Architecture) -> RotaryEmbedding:
    """The angles of positions, scaled by YaRN where the architecture says so; on the device that trains."""
    common: dict[str, Any] = dict(rotary_base=architecture.rope_theta, use_cpu_initialization=not has_cuda())
    yarn = architecture.yarn
    if yarn is None:
        return RotaryEmbedding(architecture.head_dim, rotary_percent=1.0, **common)
    return YarnAngles(
        architecture.head_dim,
        scaling_factor=yarn.factor,
        original_max_position_embeddings=yarn.original_max_position_embeddings,
        beta_fast=yarn.beta_fast,
        beta_slow=yarn.beta_slow,
        correction_range_round_to_int=yarn.truncate,
        **common,
    )


class TokenLosses(NamedTuple):
    """What the last stage computes for the rows with loss of a micro-batch, in the order of (b, s)."""

    losses: Tensor  # [N] fp32, cross-entropy in nats
    correct: Tensor  # [N] bool, the label is the most likely token


class DiffusionLM(InParts, LanguageModule):
    """One pipeline stage of the model. Middle stages take and return hidden states [s, b, h]."""

    position_embedding_type = "rope"  # asked for where kernels are recorded
    watch_tokens: Callable[[Tensor], None] | None = None  # is shown the tokens [b, s] of every micro-batch

    def __init__(
        self,
        config: TransformerConfig,
        architecture: Architecture,
        block_spec: TransformerBlockSubmodules,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
        packs_documents: bool = False,
    ):
        super().__init__(config=config)
        self.packs_documents = packs_documents
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.share_embeddings_and_output_weights = architecture.tie_word_embeddings
        self.model_type = ModelType.encoder_or_decoder
        if pre_process:
            self.embedding = LanguageModelEmbedding(
                config,
                architecture.vocab_size,
                architecture.max_position_embeddings,
                position_embedding_type="rope",
            )
        self.rotary_pos_emb = rotary_embedding(architecture)
        self.decoder = TransformerBlock(
            config, block_spec, pre_process=pre_process, post_process=post_process, vp_stage=vp_stage
        )
        if post_process:
            head_config = copy.copy(config)
            # That of megatron's own linear layer needs apex; the head adds its gradients up in any case.
            head_config.gradient_accumulation_fusion = False
            self.output_layer = OutputLayer(
                config.hidden_size,
                architecture.vocab_size,
                config=head_config,
                init_method=config.init_method,
                bias=False,
                gather_output=False,
                skip_weight_param_allocation=pre_process and architecture.tie_word_embeddings,
            )
            # The rows are gathered from the sequence-parallel regions here, not by the layer.
            self.output_layer.sequence_parallel = False
            self.output_layer.allreduce_dgrad = config.tensor_model_parallel_size > 1
        if pre_process or post_process:
            self.setup_embeddings_and_output_layer()

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """The hidden states of the previous stage; called by megatron's schedules."""
        self.decoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def forward(
        self,
        tokens_bs: Tensor,
        labels_N: Tensor | None = None,
        rows_N: Tensor | None = None,
        documents: Tensor | None = None,
        positions: Tensor | None = None,
        annealing: Tensor | None = None,
        levels: Tensor | None = None,
    ) -> Tensor | TokenLosses:
        """Losses of the rows `rows_N`, indices into (b, s); without labels their hidden states [N, h], for `head`;
        without both, this rank's logits [b, s, V / tp].

        Under context parallelism s is this rank's piece of the sequence. `documents` [b, whole sequence], on the host,
        isolates the documents from one another, as a mask or, with `packs_documents`, as packed sequences.
        `positions` [b, whole sequence] are those of the rotary embedding, 0, 1, ... without. `annealing` [b, 2]: causal
        but for random entries. `levels` [b, whole sequence]: block by block (both: diffusion/attention_masks.py).
        """
        self._show(tokens_bs)
        hidden = self.embedding(tokens_bs, None) if self.pre_process else None
        if hidden is not None and not hidden.requires_grad and torch.is_grad_enabled() and not self.post_process:
            hidden.requires_grad_()  # all of a first stage may be frozen; the schedule wants a gradient of each stage
        mask, packed = self._attention_inputs(tokens_bs, documents, annealing, levels)
        rotary = self._rotary(hidden, positions)
        hidden = self.decoder(hidden, attention_mask=mask, rotary_pos_emb=rotary, packed_seq_params=packed)
        return self._head(hidden, labels_N, rows_N) if self.post_process else hidden

    def _show(self, tokens_bs: Tensor) -> None:
        if self.watch_tokens is not None:
            self.watch_tokens(tokens_bs)

    def _attention_inputs(
        self, tokens_bs: Tensor, documents: Tensor | None, annealing: Tensor | None = None, levels: Tensor | None = None
    ) -> tuple[Tensor | None, PackedSeqParams | None]:
        """The mask, or the packed sequences."""
        if self.packs_documents:
            assert len(tokens_bs) == 1, "packed sequences go with one sample a micro-batch"
            return None, packed_sequences(documents, tokens_bs.size(1))
        return self._forbidden(tokens_bs, None if documents is None else send(documents), annealing, levels), None

    def _head(self, hidden: Tensor, labels_N: Tensor | None, rows_N: Tensor | None) -> Tensor | TokenLosses:
        """What `forward` returns on the last stage, of the decoder's output."""
        if self.config.sequence_parallel:
            # All tensor-parallel ranks now hold the same rows, so the gradient is split, not summed.
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        if rows_N is None:
            return self._logits(hidden.transpose(0, 1))
        length, batch = hidden.shape[:2]
        places_N = rows_N % length * batch + rows_N // length  # in (s, b), as hidden states lie
        hidden_Nh = hidden.flatten(0, 1).index_select(0, places_N)
        if labels_N is None:
            return hidden_Nh
        return both_ways("head", self._row_losses, hidden_Nh, labels_N)

    def _row_losses(self, hidden_Nh: Tensor, labels_N: Tensor) -> TokenLosses:
        losses_N, correct_N = self.output_layer(hidden_Nh, weight=self._tied_weight(), labels_N=labels_N)
        assert correct_N is not None
        return TokenLosses(losses_N, correct_N)

    def head(self, hidden_Nh: Tensor) -> Tensor:
        """Logits over the whole vocabulary, [N, V], on every tensor-parallel rank; last stage only."""
        return tensor_parallel.gather_from_tensor_model_parallel_region(self._logits(hidden_Nh))

    def _rotary(self, hidden: Tensor | None, positions: Tensor | None) -> Tensor:
        """Rotary angles of this rank's piece of the sequence, [s, b or 1, 1, head size]."""
        length = self.rotary_pos_emb.get_rotary_seq_len(None, self.decoder, hidden, self.config, None)
        # packed_seq=True: no slicing by megatron, whose pieces are made for causal masks.
        angles = self.rotary_pos_emb(length, packed_seq=True)
        if isinstance(angles, tuple):
            angles, _ = angles  # YaRN's attention factor is in config.softmax_scale
        if positions is None or self.packs_documents:  # packed sequences are counted from 0 by megatron
            return cp_slice(angles, dim=0)
        return angles[cp_slice(positions, dim=1).T, 0]

    def _forbidden(
        self, tokens_bs: Tensor, documents: Tensor | None, annealing: Tensor | None, levels: Tensor | None
    ) -> Tensor | None:
        """[b, 1, this rank's piece, whole sequence], True where a token may not look; None: nowhere."""
        allowed = []
        if documents is not None:
            allowed.append(cp_slice(documents, dim=1)[:, :, None] == documents[:, None, :])
        if annealing is not None:
            length = tokens_bs.size(1) * parallel_state.get_context_parallel_world_size()
            queries = cp_slice(torch.arange(length, device=tokens_bs.device), dim=0)
            allowed.append(annealed(annealing, queries, length))
        if levels is not None:
            allowed.append(block_causal_mask(cp_slice(levels, dim=1), levels))
        return ~functools.reduce(torch.logical_and, allowed)[:, None] if allowed else None

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.output_layer(hidden, weight=self._tied_weight())[0]

    def _tied_weight(self) -> Tensor | None:
        return self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
