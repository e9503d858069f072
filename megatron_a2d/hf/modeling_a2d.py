"""Transformers of Llama's, Qwen2.5's, Qwen3's and Qwen3-MoE's kind with bidirectional attention, for masked diffusion.

Equal to Hugging Face's Qwen3ForCausalLM, Qwen2ForCausalLM and so on without the causal mask; parameters have the
same names (with separate experts). Needs only torch and transformers (4.57 or 5).

Shapes: B batch, L sequence, D hidden, N = B * L tokens, K experts per token, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput
from transformers.utils import can_return_tuple

from .configuration_a2d import A2DConfig
from .generation_a2d import DiffusionGeneration
from .kv_cache_a2d import KeyValueCache


class A2DRMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in fp32."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def rotary_angles(positions_BL: torch.Tensor, config: A2DConfig) -> torch.Tensor:
    """Angles [B, 1, L, head_dim / 2] in fp32.

    Recomputed in each forward pass: transformers 5 builds a model without storage and fills in only the tensors of
    the checkpoint, so that a non-persistent buffer would stay uninitialised.
    """
    size = config.head_dim
    exponents = torch.arange(0, size, 2, device=positions_BL.device, dtype=torch.float32) / size
    frequencies = 1.0 / config.rope_theta**exponents
    if scaling := config.rope_scaling:
        if scaling["rope_type"] == "llama3":
            slowed = llama3_blend(frequencies, scaling)
        else:
            slowed = yarn_blend(size, config.rope_theta, scaling).to(frequencies.device)
        frequencies = frequencies / scaling["factor"] * slowed + frequencies * (1 - slowed)
    return (positions_BL.float()[..., None] * frequencies)[:, None]


def yarn_blend(size: int, theta: float, yarn: dict[str, Any]) -> torch.Tensor:
    """YaRN's interpolation weight of each frequency (Peng et al. 2023), [size / 2]: from 0 (fast ones) to 1."""
    length = yarn["original_max_position_embeddings"]
    low, high = (
        size * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))
        for turns in (yarn["beta_fast"], yarn["beta_slow"])
    )
    if yarn["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    if low == high:
        high += 0.001
    return ((torch.arange(size // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)


def llama3_blend(frequencies: torch.Tensor, scaling: dict[str, Any]) -> torch.Tensor:
    """Llama 3.1's interpolation weight of each frequency, [size / 2]: from 0 (fast ones) to 1."""
    turns = frequencies * scaling["original_max_position_embeddings"] / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    return ((high - turns) / (high - low)).clamp(0, 1)


def rotate(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotate x [B, heads, L, head_dim]: element j pairs with j + head_dim / 2."""
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class A2DAttention(nn.Module):
    """Grouped-query attention; masks are those of padding and of blocks."""

    def __init__(self, config: A2DConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        # YaRN's attention factor scales both queries and keys.
        scaling = config.rope_scaling
        self.scale = scaling["attention_factor"] ** 2 / config.head_dim**0.5 if scaling else None
        self.queries_per_key = config.num_attention_heads // config.num_key_value_heads
        query_size = config.num_attention_heads * config.head_dim
        key_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.add_qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=config.add_qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=config.add_qkv_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)
        norms = [
            A2DRMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_layernorm else nn.Identity() for _ in range(2)
        ]
        self.q_norm, self.k_norm = norms

    def forward(
        self, x: torch.Tensor, angles: torch.Tensor, visible: torch.Tensor | None, cache: KeyValueCache | None
    ) -> torch.Tensor:
        heads = (*x.shape[:-1], -1, self.head_dim)
        query = rotate(self.q_norm(self.q_proj(x).view(heads)).transpose(1, 2), angles)
        key = rotate(self.k_norm(self.k_proj(x).view(heads)).transpose(1, 2), angles)
        value = self.v_proj(x).view(heads).transpose(1, 2)
        if cache is not None:
            query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
            return self.o_proj(cache.attend(self.layer, query, key, value, self.scale).flatten(1))[None]
        # Keys and values are repeated rather than grouped inside the kernel: with a padding mask, PyTorch's
        # fused kernels refuse grouped queries and it falls back to one that stores all attention weights.
        key, value = (t.repeat_interleave(self.queries_per_key, dim=1) for t in (key, value))
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=self.scale)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class A2DMLP(nn.Module):
    """SwiGLU; also one expert."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class A2DMixtureOfExperts(nn.Module):
    """MoE layer: each token is processed by its K likeliest experts; no token is dropped.

    Probabilities: softmax in fp32 over all experts, then the K largest, renormalised if `norm_topk_prob`.
    """

    def __init__(self, config: A2DConfig):
        super().__init__()
        self.experts_per_token = config.num_experts_per_tok
        self.renormalise = config.norm_topk_prob
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(
            A2DMLP(config.hidden_size, config.moe_intermediate_size) for _ in range(config.num_experts)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x_ND = x.flatten(0, -2)
        probabilities = self.gate(x_ND).softmax(dim=-1, dtype=torch.float32)
        weights_NK, experts_NK = probabilities.topk(self.experts_per_token, dim=-1)
        if self.renormalise:
            weights_NK = weights_NK / weights_NK.sum(dim=-1, keepdim=True)
        # Sorted by expert, so that each expert reads a contiguous slice.
        order = experts_NK.flatten().argsort(stable=True)
        counts = experts_NK.flatten().bincount(minlength=len(self.experts)).tolist()
        weights = weights_NK.to(x.dtype).flatten()
        out_ND = torch.zeros_like(x_ND)
        for expert, assignments in zip(self.experts, order.split(counts), strict=True):
            if len(assignments):
                tokens = assignments // self.experts_per_token
                piece = expert(x_ND[tokens]) * weights[assignments, None]
                out_ND.index_add_(0, tokens, piece.to(out_ND.dtype))
        return out_ND.view_as(x)


class A2DLayer(GradientCheckpointingLayer):
    """Pre-norm transformer layer: attention, then MLP or experts, each added to the residual stream."""

    def __init__(self, config: A2DConfig, layer: int):
        super().__init__()
        self.self_attn = A2DAttention(config, layer)
        if config.num_experts:
            self.mlp: nn.Module = A2DMixtureOfExperts(config)
        else:
            self.mlp = A2DMLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = A2DRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = A2DRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x: torch.Tensor,
        angles: torch.Tensor,
        visible: torch.Tensor | None,
        cache: KeyValueCache | None = None,
    ) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), angles, visible, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class A2DPreTrainedModel(PreTrainedModel):
    """Base class with the transformers settings common to all models of this file."""

    config_class: type[A2DConfig] = A2DConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["A2DLayer"]  # noqa: RUF012 (transformers reads a class attribute)


class A2DModel(A2DPreTrainedModel):
    """Token ids to hidden states, without the LM head."""

    def __init__(self, config: A2DConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(A2DLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = A2DRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        cache: KeyValueCache | None = None,
        visible: torch.Tensor | None = None,
    ) -> BaseModelOutput:
        """Hidden states [B, L, D] after the last norm.

        `attention_mask` [B, L] is nonzero at real tokens and 0 at padding, on either side; outputs at padded
        positions are meaningless. `position_ids` [B or 1, L] count the real tokens from 0 by default; blocks begin at
        the multiples of `config.block_length`.

        With a `cache` (after its `select`) the tokens are the selected positions of several sequences, [1, N], and
        `position_ids` gives their places; the cache has the mask. `visible` [B, 1, L, L], True where a query attends to
        a key, replaces the mask that follows from padding and blocks.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        padding = None
        if attention_mask is not None:
            if attention_mask.shape != x.shape[:2]:
                raise ValueError(
                    f"attention_mask has shape {tuple(attention_mask.shape)}; this model attends in both "
                    f"directions and takes the padding mask only, [batch, sequence] = {tuple(x.shape[:2])}"
                )
            padding = attention_mask.bool()
        if position_ids is None and padding is not None:
            position_ids = (padding.long().cumsum(1) - 1).clamp(min=0)
        elif position_ids is None:
            position_ids = torch.arange(x.shape[1], device=x.device)[None]
        if visible is None and cache is None:
            visible = self._visible(position_ids, padding, input_ids)
        angles = rotary_angles(position_ids, self.config)  # type: ignore[arg-type]
        for layer in self.layers:
            x = layer(x, angles, visible, cache)
        return BaseModelOutput(last_hidden_state=self.norm(x))

    def _visible(
        self, position_ids: torch.Tensor, padding: torch.Tensor | None, input_ids: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Mask of padding and blocks, broadcastable to [B, 1, L, keys]; None: all attend to all."""
        visible = None if padding is None else padding[:, None, None, :]
        if not self.config.block_length:
            return visible
        if input_ids is not None:
            masked = input_ids == self.config.mask_token_id
            first = position_ids.expand_as(masked).masked_fill(~masked, 1 << 62).amin(1)
        elif self.config.ar_loss_weight:
            raise ValueError("this model needs input_ids: the masks among them decide which blocks are finished")
        else:
            first = position_ids.new_zeros(1)
        blocks = self.block_mask(position_ids, position_ids, first)[:, None]
        return blocks if visible is None else blocks & visible

    def block_mask(self, queries_BA: torch.Tensor, keys_BK: torch.Tensor, first_mask_B: torch.Tensor) -> torch.Tensor:
        """[B, A, K] bool, True where a query attends to a key; both are given by their positions.

        A position attends to the blocks up to its own. After training with an autoregressive co-loss a position of a
        finished block, one before that of the first mask, attends to the positions up to itself.
        """
        length = self.config.block_length
        last_BA = queries_BA // length * length + length - 1
        if self.config.ar_loss_weight:
            finished_BA = queries_BA < (first_mask_B // length * length)[:, None]
            last_BA = torch.where(finished_BA, queries_BA, last_BA)
        return keys_BK[:, None, :] <= last_BA[:, :, None]


class A2DForMaskedLM(DiffusionGeneration, A2DPreTrainedModel):
    """The diffusion language model: hidden states, then the LM head; `generate` samples from it."""

    base_class: type[A2DModel] = A2DModel
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: A2DConfig):
        super().__init__(config)
        self.model = self.base_class(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> MaskedLMOutput:
        """Logits [B, L, V] of the LM head: with `config.label_shift` those at position i - 1 predict position i.

        `labels` [B, L] holds the target token of position i at position i, or -100 for no loss. The
        loss is the plain mean cross-entropy over those positions: the shift is applied here (no position predicts
        position 0), the diffusion objective's weights 1/t are not.
        """
        hidden = self.model(input_ids, attention_mask, position_ids, inputs_embeds)[0]
        logits = self.lm_head(hidden)
        loss = None
        if labels is not None:
            rows, targets = (logits[:, :-1], labels[:, 1:]) if self.config.label_shift else (logits, labels)
            loss = F.cross_entropy(rows.flatten(0, 1).float(), targets.flatten())
        return MaskedLMOutput(loss=loss, logits=logits)


A2DModel.register_for_auto_class("AutoModel")
A2DForMaskedLM.register_for_auto_class("AutoModelForMaskedLM")
