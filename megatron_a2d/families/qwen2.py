"""Qwen2 and Qwen2.5, dense (Qwen, 2024): biases of queries, keys and values, no norms on them."""

from __future__ import annotations

from typing import Any

from megatron_a2d.families.family import Family, ModelType

# hidden size, layers, heads, KV heads, MLP width, vocabulary, tied embeddings
SIZES: dict[str, tuple] = {
    "0.5B": (896, 24, 14, 2, 4864, 151936, True),
    "1.5B": (1536, 28, 12, 2, 8960, 151936, True),
    "3B": (2048, 36, 16, 2, 11008, 151936, True),
    "7B": (3584, 28, 28, 4, 18944, 152064, False),
    "14B": (5120, 48, 40, 8, 13824, 152064, False),
    "32B": (5120, 64, 40, 8, 27648, 152064, False),
    "72B": (8192, 80, 64, 8, 29568, 152064, False),
}
MASK_TOKEN_ID = 151665  # the first id that the tokenizer does not use


def hub_config(size: str, **overrides: Any) -> dict[str, Any]:
    """config.json of Qwen2.5 of `size`, in the hub's spelling."""
    hidden, layers, heads, groups, width, vocabulary, tied = SIZES[size]
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "intermediate_size": width,
        "hidden_act": "silu",
        "max_position_embeddings": 131072 if size not in ("0.5B", "1.5B", "3B") else 32768,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6 if size not in ("14B", "32B", "72B") else 1e-5,
        "rope_theta": 1000000.0,
        "use_sliding_window": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": tied,
        "bos_token_id": 151643,
        "eos_token_id": 151643,
        "mask_token_id": MASK_TOKEN_ID,
        "torch_dtype": "bfloat16",
    } | overrides


QWEN2 = Family(
    title="Qwen2.5",
    model_types=(ModelType("qwen2", "Qwen2ForCausalLM", absent={"num_key_value_heads": 32}),),
    add_qkv_bias=True,
    qk_layernorm=False,
    fixed={"hidden_act": "silu", "attention_dropout": 0.0, "use_sliding_window": False},
    export_format="qwen2",
    owners=("Qwen",),
    published={f"Qwen2.5-{size}": hub_config(size) for size in SIZES},
)
