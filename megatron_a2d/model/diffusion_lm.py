"""The language model: embedding, transformer block, and an LM head at the loss positions only.

About half of a diffusion batch's positions are not masked and have no loss. At a vocabulary of 152k the logits are the
model's largest tensor, so the hidden states of the loss positions are gathered before the head, which processes them in
chunks (chunked_cross_entropy.py). The loss positions are known on the host before the forward pass, so no
device-to-host synchronisation is needed. Shapes: s this rank's slice of the sequence, b batch, h hidden, N loss
positions, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.models.common.model_chunk_schedule_plan import TransformerModelChunkSchedulePlan
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from torch import Tensor

from megatron_a2d.config.model_config import ModelConfig
from megatron_a2d.config.rotary import Llama3Scaling
from megatron_a2d.diffusion.attention_masks import encoded_mask
from megatron_a2d.distributed.step_timers import both_ways
from megatron_a2d.megatron_compat.device import has_cuda, send
from megatron_a2d.model.chunked_cross_entropy import OutputLayer
from megatron_a2d.model.expert_placement import Slots, with_original_numbers
from megatron_a2d.model.local_layers import AttentionCache


def cp_slice(tensor: Tensor, dim: int) -> Tensor:
    """This context-parallel rank's contiguous slice of a tensor whose sequence dimension is `dim`."""
    size = parallel_state.get_context_parallel_world_size()
    return tensor if size == 1 else tensor.chunk(size, dim)[parallel_state.get_context_parallel_rank()]


def packed_sequences(documents: Tensor | None, length: int) -> PackedSeqParams:
    """The documents of one sample as Transformer Engine's packed ("thd") sequences.

    `documents` [1, length] should be on the host: reading their lengths from a GPU would synchronise.
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
    """megatron's YaRN without its tables of sine and cosine, which only megatron's own decoding reads."""

    def _set_cos_sin_cache(self, *_: Any, **__: Any) -> None:
        pass


class Llama3Angles(RotaryEmbedding):
    """megatron's rotary embedding with Llama 3.1's scaling; of its settings megatron's own takes the factor alone."""

    def __init__(self, head_dim: int, scaling: Llama3Scaling, **common: Any):
        super().__init__(head_dim, rotary_percent=1.0, **common)
        frequencies: Tensor = self.inv_freq  # type: ignore[has-type]
        self.inv_freq = self._apply_scaling(
            frequencies,
            scaling.factor,
            scaling.low_freq_factor,
            scaling.high_freq_factor,
            scaling.original_max_position_embeddings,
        )


def rotary_embedding(model_config: ModelConfig) -> RotaryEmbedding:
    """The rotary embedding, scaled as the architecture says, on the device used for training."""
    common: dict[str, Any] = dict(rotary_base=model_config.rope_theta, use_cpu_initialization=not has_cuda())
    yarn = model_config.rope_scaling
    if yarn is None:
        return RotaryEmbedding(model_config.head_dim, rotary_percent=1.0, **common)
    if isinstance(yarn, Llama3Scaling):
        return Llama3Angles(model_config.head_dim, yarn, **common)
    return YarnAngles(
        model_config.head_dim,
        scaling_factor=yarn.factor,
        original_max_position_embeddings=yarn.original_max_position_embeddings,
        beta_fast=yarn.beta_fast,
        beta_slow=yarn.beta_slow,
        correction_range_round_to_int=yarn.truncate,
        **common,
    )


class TokenLosses(NamedTuple):
    """The last stage's output for the N loss positions of a micro-batch, ordered by sample, then position."""

    losses: Tensor  # [N] fp32, cross-entropy in nats
    correct: Tensor  # [N] bool, the label is the most likely token


class DiffusionLM(LanguageModule):
    """One pipeline stage of the model. Middle stages take and return hidden states [s, b, h]."""

    position_embedding_type = "rope"  # read by megatron when it captures CUDA graphs
    watch_tokens: Callable[[Tensor], None] | None = None  # called with the tokens [b, s] of every micro-batch
    expert_orders: Sequence[Sequence[int]] | None = None  # see `place_experts`
    balancing: Any = None  # the run's load balancing (training/balancing.py), for the training step
    _correct: Tensor | None = None  # [N] bool, kept for `correct_of`

    def __init__(
        self,
        config: TransformerConfig,
        model_config: ModelConfig,
        block_spec: TransformerBlockSubmodules,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
        packs_documents: bool = False,
        output_layer: type[OutputLayer] = OutputLayer,
    ):
        super().__init__(config=config)
        self.packs_documents = packs_documents
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.share_embeddings_and_output_weights = model_config.tie_word_embeddings
        self.model_type = ModelType.encoder_or_decoder
        if pre_process:
            self.embedding = LanguageModelEmbedding(
                config,
                model_config.vocab_size,
                model_config.max_position_embeddings,
                position_embedding_type="rope",
            )
        self.rotary_pos_emb = rotary_embedding(model_config)
        self.decoder = TransformerBlock(
            config, block_spec, pre_process=pre_process, post_process=post_process, vp_stage=vp_stage
        )
        if post_process:
            head_config = copy.copy(config)
            # megatron's own fusion needs apex; this head accumulates gradients in any case.
            head_config.gradient_accumulation_fusion = False
            self.output_layer = output_layer(
                config.hidden_size,
                model_config.vocab_size,
                config=head_config,
                init_method=config.init_method,
                bias=False,
                gather_output=False,
                skip_weight_param_allocation=pre_process and model_config.tie_word_embeddings,
            )
            # `_full_sequence` gathers from the sequence-parallel region, not the layer.
            self.output_layer.sequence_parallel = False
            self.output_layer.allreduce_dgrad = config.tensor_model_parallel_size > 1
        if pre_process or post_process:
            self.setup_embeddings_and_output_layer()

    def place_experts(self, orders: Sequence[Sequence[int]]) -> None:
        """Lay the experts out over expert-parallel ranks: orders[l][j] is the expert in slot j of the model's layer l.

        Before weights are loaded.
        """
        self.expert_orders = orders
        for layer in self.decoder.layers:
            layer.mlp.router.slots = Slots(orders[layer.layer_number - 1])

    def sharded_state_dict(self, prefix: str = "", *arguments: Any, **options: Any) -> dict[str, Any]:
        """megatron's, with the experts' original numbers."""
        state: dict[str, Any] = super().sharded_state_dict(prefix, *arguments, **options)
        for number, layer in enumerate(self.decoder.layers):
            if slots := getattr(getattr(layer.mlp, "router", None), "slots", None):
                with_original_numbers(state, f"{prefix}decoder.layers.{number}.mlp.experts.", slots)
        return state

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """The hidden states of the previous stage; called by megatron's schedules."""
        self.decoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    # Three methods run the stage, one for each kind of output of the last pipeline stage. Any other stage returns its
    # hidden states [s, b, h] for the next one from all of them. Their common arguments:
    #   tokens_bs   [b, s]
    #   indices_N   the loss positions, as indices into the flattened (b, s)
    #   documents   [b, full sequence], on the host: attention stays within documents, by a mask or, with
    #               `packs_documents`, by packed sequences
    #   positions   [b, full sequence], those of the rotary embedding; None: 0, 1, ...
    #   annealing   [b, 2]: causal attention plus random later entries (diffusion/attention_masks.py)
    #   levels      [b, full sequence]: block-causal attention (ditto)

    def forward(
        self,
        tokens_bs: Tensor,
        labels_N: Tensor,
        indices_N: Tensor,
        documents: Tensor | None = None,
        positions: Tensor | None = None,
        annealing: Tensor | None = None,
        levels: Tensor | None = None,
    ) -> TokenLosses | Tensor:
        """Training and validation: losses of the loss positions.

        It is `forward` because megatron's pipeline schedules call the model through DistributedDataParallel, which
        forwards only that method. They also pass the hidden states between stages: hence two return types.
        """
        hidden_sbh = self._decode(tokens_bs, documents, positions, annealing, levels)
        return self._losses(hidden_sbh, labels_N, indices_N) if self.post_process else hidden_sbh

    def hidden_states(
        self,
        tokens_bs: Tensor,
        indices_N: Tensor,
        documents: Tensor | None = None,
        positions: Tensor | None = None,
        levels: Tensor | None = None,
        cache: AttentionCache | None = None,
    ) -> Tensor:
        """Inference: hidden states [N, h] of the chosen positions, of which `head` makes logits.

        With a `cache` the tokens [1, s] are packed positions of several sequences, and the cache has their mask.
        """
        hidden_sbh = self._decode(tokens_bs, documents, positions, None, levels, cache)
        return self._select(self._full_sequence(hidden_sbh), indices_N) if self.post_process else hidden_sbh

    def logits(
        self,
        tokens_bs: Tensor,
        documents: Tensor | None = None,
        positions: Tensor | None = None,
        levels: Tensor | None = None,
    ) -> Tensor:
        """Logits of all positions, [b, s, V / tp]: materialised, so for comparisons of small models only."""
        hidden_sbh = self._decode(tokens_bs, documents, positions, None, levels)
        if not self.post_process:
            return hidden_sbh
        return self._local_logits(self._full_sequence(hidden_sbh).transpose(0, 1))

    def head(self, hidden_Nh: Tensor) -> Tensor:
        """LM head: logits over the full vocabulary, [N, V], on every tensor-parallel rank; last stage only."""
        return tensor_parallel.gather_from_tensor_model_parallel_region(self._local_logits(hidden_Nh))

    def _decode(
        self,
        tokens_bs: Tensor,
        documents: Tensor | None,
        positions: Tensor | None,
        annealing: Tensor | None,
        levels: Tensor | None,
        cache: AttentionCache | None = None,
    ) -> Tensor:
        """Embedding (first stage) and transformer layers: the stage's hidden states [s, b, h]."""
        if self.watch_tokens is not None:
            self.watch_tokens(tokens_bs)
        hidden = self.embedding(tokens_bs, None) if self.pre_process else None
        if hidden is not None and not hidden.requires_grad and torch.is_grad_enabled() and not self.post_process:
            hidden.requires_grad_()  # all of a first stage may be frozen; the schedule wants a gradient of each stage
        mask: Any
        if cache is None:
            mask, packed = self._attention_inputs(tokens_bs, documents, annealing, levels)
            rotary = self._rotary(hidden, positions)
        else:
            mask, packed = cache, None
            rotary = self._rotary(hidden, positions, cache.length)
        return self.decoder(hidden, attention_mask=mask, rotary_pos_emb=rotary, packed_seq_params=packed)

    # For --overlap-moe-expert-parallel-comm, megatron.core interleaves the forward pass of one micro-batch with the
    # backward pass of another, layer by layer, so that the all-to-all of one overlaps with the computation of the
    # other. That schedule calls the model by the following names: `build_schedule_plan` instead of `forward`, then
    # `_preprocess` before the layers and `_postprocess` after them.

    def build_schedule_plan(
        self,
        tokens_bs: Tensor,
        labels_N: Tensor,
        indices_N: Tensor,
        documents: Tensor | None = None,
        positions: Tensor | None = None,
        annealing: Tensor | None = None,
        levels: Tensor | None = None,
    ) -> TransformerModelChunkSchedulePlan:
        """A plan of `forward` with the same inputs, which megatron runs layer by layer."""
        if self.watch_tokens is not None:
            self.watch_tokens(tokens_bs)
        mask, packed = self._attention_inputs(tokens_bs, documents, annealing, levels)
        # megatron passes loss_mask through to _postprocess, so it carries the loss positions.
        return TransformerModelChunkSchedulePlan(
            self, tokens_bs, positions, mask, labels=labels_N, packed_seq_params=packed, loss_mask=indices_N
        )

    def correct_of(self, plan: TransformerModelChunkSchedulePlan) -> Tensor:
        """[N] bool, `TokenLosses.correct` of the last forward pass; megatron returns only its losses."""
        correct, self._correct = self._correct, None
        assert correct is not None, "the plan has not been run"
        return correct

    def _preprocess(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        decoder_input: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **_: Any,
    ) -> tuple[Tensor | None, ...]:
        """Hidden states, rotary angles, and four values that only other models have."""
        hidden = self.embedding(input_ids, None) if self.pre_process else decoder_input
        if hidden is not None and not hidden.requires_grad and torch.is_grad_enabled():
            hidden.requires_grad_()  # the embedding may be frozen; the plan needs a gradient of its output
        return hidden, self._rotary(hidden, position_ids), None, None, None, None

    def _postprocess(self, hidden_states: Tensor, labels: Tensor, loss_mask: Tensor, **_: Any) -> Tensor:
        """Losses [N] of the loss positions."""
        output = self._losses(hidden_states, labels, loss_mask)
        self._correct = output.correct
        return output.losses

    def _attention_inputs(
        self, tokens_bs: Tensor, documents: Tensor | None, annealing: Tensor | None, levels: Tensor | None
    ) -> tuple[Tensor | None, PackedSeqParams | None]:
        """The encoded attention mask, or the packed sequences."""
        if self.packs_documents:
            assert len(tokens_bs) == 1, "packed sequences need micro-batches of one sample"
            return None, packed_sequences(documents, tokens_bs.size(1))
        documents = None if documents is None else send(documents)
        length = tokens_bs.size(1) * parallel_state.get_context_parallel_world_size()
        return encoded_mask(documents, annealing, levels, length), None

    def _rotary(self, hidden: Tensor | None, positions: Tensor | None, length: int | None = None) -> Tensor:
        """Rotary angles of this rank's slice of the sequence, [s, b or 1, 1, head size].

        `length`: the positions are below it; None: below the length of the sequence.
        """
        length = length or self.rotary_pos_emb.get_rotary_seq_len(None, self.decoder, hidden, self.config, None)
        # packed_seq=True: megatron must not slice the angles itself; its slices are balanced for causal masks.
        angles = self.rotary_pos_emb(length, packed_seq=True)
        if isinstance(angles, tuple):
            angles, _ = angles  # YaRN's attention factor is in config.softmax_scale
        if positions is None or self.packs_documents:  # megatron counts packed sequences from 0 itself
            return cp_slice(angles, dim=0)
        return angles[cp_slice(positions, dim=1).T, 0]

    def _full_sequence(self, hidden_sbh: Tensor) -> Tensor:
        """The decoder's output gathered from the sequence-parallel region."""
        if not self.config.sequence_parallel:
            return hidden_sbh
        # All tensor-parallel ranks then hold the same hidden states, so the gradient is split, not summed.
        return tensor_parallel.gather_from_sequence_parallel_region(hidden_sbh, tensor_parallel_output_grad=False)

    def _select(self, hidden_sbh: Tensor, indices_N: Tensor) -> Tensor:
        """Hidden states [N, h] of the given positions."""
        length, batch = hidden_sbh.shape[:2]
        sample_N, position_N = indices_N // length, indices_N % length
        # Hidden states are [s, b, h]: position p of sample i is at index p * b + i of the flattened tensor.
        return hidden_sbh.flatten(0, 1).index_select(0, position_N * batch + sample_N)

    def _losses(self, hidden_sbh: Tensor, labels_N: Tensor, indices_N: Tensor) -> TokenLosses:
        """Losses of the loss positions, from the decoder's output."""

        def token_losses(hidden_Nh: Tensor, labels_N: Tensor) -> TokenLosses:
            return TokenLosses(*self.output_layer(hidden_Nh, weight=self._tied_weight(), labels_N=labels_N))

        return both_ways("head", token_losses, self._select(self._full_sequence(hidden_sbh), indices_N), labels_N)

    def _local_logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V / tp] over this tensor-parallel rank's part of the vocabulary."""
        return self.output_layer(hidden, weight=self._tied_weight())[0]

    def _tied_weight(self) -> Tensor | None:
        return self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
