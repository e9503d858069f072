"""Qwen3 and Qwen3-MoE (Qwen, 2025): norms on queries and keys, no biases; experts renormalised as config.json says."""

from __future__ import annotations

from typing import Any

from megatron_a2d.families.family import Family, ModelType
from megatron_a2d.utils.errors import UserError, nearest

# hidden size, layers, heads, KV heads, MLP width, tied embeddings; MoE also: experts, width of an expert
SIZES: dict[str, tuple] = {
    "0.6B": (1024, 28, 16, 8, 3072, True),
    "1.7B": (2048, 28, 16, 8, 6144, True),
    "4B": (2560, 36, 32, 8, 9728, True),
    "8B": (4096, 36, 32, 8, 12288, False),
    "14B": (5120, 40, 40, 8, 17408, False),
    "32B": (5120, 64, 64, 8, 25600, False),
    "30B-A3B": (2048, 48, 32, 4, 6144, False, 128, 768),
    "235B-A22B": (4096, 94, 64, 4, 12288, False, 128, 1536),
}
VOCAB_SIZE, MASK_TOKEN_ID = 151936, 151669  # the mask: the first id that the tokenizer does not use


def hub_config(size: str, **overrides: Any) -> dict[str, Any]:
    """config.json of the model of `size`, in the hub's spelling. Raises UserError for an unknown size."""
    if size not in SIZES:
        raise UserError(f"--size {size}: is not a Qwen3 size{nearest(size, SIZES)}; choose one of {', '.join(SIZES)}")
    hidden, layers, heads, groups, width, tied, *experts = SIZES[size]
    config: dict[str, Any] = {
        "architectures": ["Qwen3MoeForCausalLM" if experts else "Qwen3ForCausalLM"],
        "model_type": "qwen3_moe" if experts else "qwen3",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": 128,
        "intermediate_size": width,
        "hidden_act": "silu",
        "max_position_embeddings": 40960 if experts else 32768,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_scaling": None,
        "use_sliding_window": False,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": tied,
        "bos_token_id": 151643,
        "eos_token_id": 151643,
        "mask_token_id": MASK_TOKEN_ID,
        "torch_dtype": "bfloat16",
    }
    if experts:
        config |= {
            "num_experts": experts[0],
            "num_experts_per_tok": 8,
            "moe_intermediate_size": experts[1],
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    return config | overrides


QWEN3 = Family(
    title="Qwen3",
    model_types=(
        # What transformers 4.57 to 5.24 take for missing keys; Qwen3-MoE: hidden size / heads as head_dim.
        ModelType("qwen3", "Qwen3ForCausalLM", absent={"num_key_value_heads": 32, "head_dim": 128}),
        ModelType("qwen3_moe", "Qwen3MoeForCausalLM", is_moe=True, absent={"num_key_value_heads": 4}),
    ),
    fixed={
        "hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0, "use_sliding_window": False,
        "mlp_only_layers": [], "decoder_sparse_step": 1,
    },
    export_format="qwen3",
    owners=("Qwen",),
    published={f"Qwen3-{size}": hub_config(size) for size in SIZES},
)  # fmt: skip
