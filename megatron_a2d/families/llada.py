"""LLaDA-8B (Nie et al. 2025): Llama's layers under OLMo's names, trained as a diffusion model, without label shift."""

from __future__ import annotations

from typing import Any

from megatron_a2d.families.family import Diffusion, Family, ModelType, PublicCode

MASK_TOKEN_ID = 126336

_LAYER, _BLOCK = "model.layers.{layer}.", "model.transformer.blocks.{layer}."
TENSOR_NAMES = {
    "model.embed_tokens.weight": "model.transformer.wte.weight",
    _LAYER + "input_layernorm.weight": _BLOCK + "attn_norm.weight",
    _LAYER + "self_attn.q_proj.weight": _BLOCK + "q_proj.weight",
    _LAYER + "self_attn.k_proj.weight": _BLOCK + "k_proj.weight",
    _LAYER + "self_attn.v_proj.weight": _BLOCK + "v_proj.weight",
    _LAYER + "self_attn.q_proj.bias": _BLOCK + "q_proj.bias",
    _LAYER + "self_attn.k_proj.bias": _BLOCK + "k_proj.bias",
    _LAYER + "self_attn.v_proj.bias": _BLOCK + "v_proj.bias",
    _LAYER + "self_attn.o_proj.weight": _BLOCK + "attn_out.weight",
    _LAYER + "post_attention_layernorm.weight": _BLOCK + "ff_norm.weight",
    _LAYER + "mlp.gate_proj.weight": _BLOCK + "ff_proj.weight",
    _LAYER + "mlp.up_proj.weight": _BLOCK + "up_proj.weight",
    _LAYER + "mlp.down_proj.weight": _BLOCK + "ff_out.weight",
    "model.norm.weight": "model.transformer.ln_f.weight",
    "lm_head.weight": "model.transformer.ff_out.weight",
}

# setting -> its spelling in config.json
KEYS = {
    "hidden_size": ("d_model",),
    "num_hidden_layers": ("n_layers",),
    "num_attention_heads": ("n_heads",),
    "num_key_value_heads": ("n_kv_heads",),
    "intermediate_size": ("mlp_hidden_size",),
    "vocab_size": ("embedding_size", "vocab_size"),
    "max_position_embeddings": ("max_sequence_length",),
    "tie_word_embeddings": ("weight_tying",),
    "initializer_range": ("init_std",),
    "add_qkv_bias": ("include_qkv_bias",),
}

# The only values that are implemented, and what OLMo's class takes for keys that are missing: another model.
_FIXED: dict[str, Any] = {
    "block_type": "llama", "block_group_size": 1, "activation_type": "silu", "layer_norm_type": "rms",
    "layer_norm_with_affine": True, "bias_for_layer_norm": False, "include_bias": False, "rope": True, "alibi": False,
    "attention_layer_norm": False, "input_emb_norm": False, "scale_logits": False, "multi_query_attention": False,
    "attention_dropout": 0.0, "residual_dropout": 0.0, "embedding_dropout": 0.0,
}  # fmt: skip
_ABSENT: dict[str, Any] = {
    "block_type": "sequential", "activation_type": "swiglu", "layer_norm_type": "default", "rope": False,
    "attention_dropout": 0.1, "residual_dropout": 0.1, "embedding_dropout": 0.1,
    "weight_tying": True, "max_sequence_length": 1024, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
}  # fmt: skip


def hub_config(**overrides: Any) -> dict[str, Any]:
    """config.json of LLaDA-8B, Base and Instruct, in the hub's spelling."""
    return _FIXED | {
        "architectures": ["LLaDAModelLM"], "model_type": "llada", "d_model": 4096, "n_layers": 32, "n_heads": 32,
        "n_kv_heads": 32, "mlp_hidden_size": 12288, "mlp_ratio": 4, "vocab_size": 126464, "embedding_size": 126464,
        "max_sequence_length": 4096, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "weight_tying": False,
        "include_qkv_bias": False, "init_std": 0.02, "mask_token_id": MASK_TOKEN_ID, "eos_token_id": 126081,
        "pad_token_id": 126081, "torch_dtype": "bfloat16",
    } | overrides  # fmt: skip


LLADA = Family(
    title="LLaDA",
    model_types=(ModelType("llada", "LLaDAModelLM", absent=_ABSENT),),
    add_qkv_bias=None,
    qk_layernorm=False,
    keys=KEYS,
    fixed={**_FIXED, "rope_scaling": None},  # which its class ignores
    tensor_names=TENSOR_NAMES,
    diffusion=Diffusion(label_shift=False, mask_token_id=MASK_TOKEN_ID),
    heads_fill_hidden=True,
    export_format="llada",
    code=PublicCode(
        "GSAI-ML/LLaDA-8B-Base",
        {
            "AutoConfig": "configuration_llada.LLaDAConfig",
            "AutoModel": "modeling_llada.LLaDAModelLM",
            "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
        },
    ),
    owners=("GSAI-ML",),
    published={"LLaDA-8B": hub_config(), "LLaDA-1.5": hub_config()},
)
