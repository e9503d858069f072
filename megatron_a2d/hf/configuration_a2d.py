"""Configuration of an A2D model: the keys of Qwen3's and Qwen3-MoE's `config.json`, and those of diffusion.

Both spellings of the hub's keys are read, that of transformers 4 (`rope_theta`, `num_experts`) and that of
transformers 5 (`rope_parameters`, `num_local_experts`); the first one is written. A key that this code does
not implement is an error, because ignoring it would give wrong logits.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class A2DConfig(PretrainedConfig):
    """A Qwen3 (`num_experts` 0) or Qwen3-MoE model whose attention is bidirectional.

    Args beyond Qwen3's:
        mask_token_id: the token that stands for "not yet known"; never predicted.
        label_shift: True when the logits of row i - 1 predict the token at position i (the convention of the
            autoregressive model that it came from, kept by RND1); False when row i predicts position i.
        num_diffusion_steps: the number of denoising steps that samplers use unless told otherwise.
    """

    model_type = "a2d"
    attribute_map = {"num_local_experts": "num_experts"}  # noqa: RUF012 (transformers reads a class attribute)

    def __init__(
        self,
        vocab_size: int = 151936,
        hidden_size: int = 1024,
        num_hidden_layers: int = 28,
        num_attention_heads: int = 16,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        intermediate_size: int = 3072,
        max_position_embeddings: int = 40960,
        rms_norm_eps: float = 1e-6,
        rope_theta: float | None = None,
        rope_parameters: dict[str, Any] | None = None,
        rope_scaling: Any = None,
        initializer_range: float = 0.02,
        tie_word_embeddings: bool = False,
        num_experts: int | None = None,
        num_local_experts: int | None = None,
        num_experts_per_tok: int | None = None,
        moe_intermediate_size: int | None = None,
        norm_topk_prob: bool = False,
        mask_token_id: int | None = None,
        label_shift: bool = True,
        num_diffusion_steps: int = 256,
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        **kwargs: Any,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.intermediate_size = intermediate_size
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = _rope_theta(rope_theta, rope_parameters or rope_scaling or {})
        self.initializer_range = initializer_range
        self.num_experts = num_experts or num_local_experts or 0
        self.num_experts_per_tok = num_experts_per_tok or 0
        self.moe_intermediate_size = moe_intermediate_size or 0
        self.norm_topk_prob = norm_topk_prob
        self.mask_token_id = mask_token_id
        self.label_shift = label_shift
        self.num_diffusion_steps = num_diffusion_steps
        if self.num_experts and not (num_experts_per_tok and moe_intermediate_size):
            raise ValueError("a config with num_experts needs num_experts_per_tok and moe_intermediate_size")
        _refuse_unsupported(kwargs)
        kwargs.update(
            is_causal=False,
            use_cache=False,
            tie_word_embeddings=tie_word_embeddings,
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
        )
        super().__init__(**kwargs)


def _rope_theta(rope_theta: float | None, parameters: dict[str, Any]) -> float:
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind != "default":
        raise ValueError(f"rotary embeddings of type {kind!r} are not supported, only 'default'")
    return float(rope_theta or parameters.get("rope_theta") or 1e6)


def _refuse_unsupported(config: dict[str, Any]) -> None:
    supported = {
        "hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0, "use_sliding_window": False,
        "mlp_only_layers": [], "decoder_sparse_step": 1,
    }  # fmt: skip
    for key, value in supported.items():
        if config.get(key) not in (None, value):
            raise ValueError(f"config key {key} is {config[key]!r}; this model supports {value!r} only")


A2DConfig.register_for_auto_class()
