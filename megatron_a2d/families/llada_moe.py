"""LLaDA-MoE-7B-A1B (Zhu et al. 2025): 64 experts of which 8 are chosen and not renormalised, norms on queries and keys.

Its config.json has LLaDA's model_type, and no mask token. Tensors have the standard names.
"""

from __future__ import annotations

from typing import Any

from megatron_a2d.families.family import Diffusion, Family, ModelType, PublicCode

MASK_TOKEN_ID = 156895

KEYS = {
    "moe_intermediate_size": ("expert_intermediate_size",),
    "intermediate_size": ("dense_intermediate_size",),
}
# Of null and the value, both mean the value. `shared_expert_intermediate_size` has none: any is a shared expert.
_FIXED: dict[str, Any] = {
    "hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0, "clip_qkv": None,
    "moe_router_enable_expert_bias": False, "moe_router_score_function": "softmax",
    "shared_expert_intermediate_size": None,
}  # fmt: skip


def hub_config(**overrides: Any) -> dict[str, Any]:
    """config.json of LLaDA-MoE-7B-A1B, Base and Instruct, in the hub's spelling."""
    return _FIXED | {
        "architectures": ["LLaDAMoEModelLM"], "model_type": "llada", "hidden_size": 2048, "num_hidden_layers": 16,
        "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 64, "num_experts_per_tok": 8,
        "expert_intermediate_size": 1024, "dense_intermediate_size": 8192, "moe_layer_freq": [1] * 16,
        "vocab_size": 157184, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 50000,
        "rope_scaling": None, "partial_rotary_factor": 1, "qk_layernorm": True, "norm_topk_prob": None,
        "routed_scaling_factor": 1, "router_aux_loss_coef": 0.01, "initializer_range": 0.02,
        "tie_word_embeddings": False, "eos_token_id": 156892, "pad_token_id": 156892, "torch_dtype": "bfloat16",
    } | overrides  # fmt: skip


LLADA_MOE = Family(
    title="LLaDA-MoE",
    model_types=tuple(ModelType(name, "LLaDAMoEModelLM", is_moe=True) for name in ("llada", "lladamoe", "llada_moe")),
    qk_layernorm=None,
    norm_topk_prob=False,
    keys=KEYS,
    fixed=_FIXED,
    per_layer={"moe_layer_freq": 1},
    diffusion=Diffusion(label_shift=False, mask_token_id=MASK_TOKEN_ID),
    heads_fill_hidden=True,
    export_format="llada_moe",
    code=PublicCode(
        "inclusionAI/LLaDA-MoE-7B-A1B-Base",
        {
            "AutoConfig": "configuration_lladamoe.LLaDAConfig",
            "AutoModel": "modeling_lladamoe.LLaDAMoEModelLM",
            "AutoModelForCausalLM": "modeling_lladamoe.LLaDAMoEModelLM",
        },
    ),
    owners=("inclusionAI",),
    published={"LLaDA-MoE-7B-A1B": hub_config()},
)
