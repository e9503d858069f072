"""Llama 2, 3 and 3.x text models (Meta, 2023 and 2024): no biases, no norms on queries and keys."""

from __future__ import annotations

from typing import Any

from megatron_a2d.families.family import Family, ModelType

# hidden size, layers, heads, KV heads, MLP width, vocabulary, positions, rms_norm_eps, rope_theta, factor of llama3's
# scaling (0: none), tied embeddings
SIZES: dict[str, tuple] = {
    "Llama-2-7b": (4096, 32, 32, 32, 11008, 32000, 4096, 1e-5, 10000.0, 0, False),
    "Llama-2-13b": (5120, 40, 40, 40, 13824, 32000, 4096, 1e-5, 10000.0, 0, False),
    "Llama-2-70b": (8192, 80, 64, 8, 28672, 32000, 4096, 1e-5, 10000.0, 0, False),
    "Meta-Llama-3-8B": (4096, 32, 32, 8, 14336, 128256, 8192, 1e-5, 500000.0, 0, False),
    "Meta-Llama-3-70B": (8192, 80, 64, 8, 28672, 128256, 8192, 1e-5, 500000.0, 0, False),
    "Llama-3.1-8B": (4096, 32, 32, 8, 14336, 128256, 131072, 1e-5, 500000.0, 8, False),
    "Llama-3.1-70B": (8192, 80, 64, 8, 28672, 128256, 131072, 1e-5, 500000.0, 8, False),
    "Llama-3.2-1B": (2048, 16, 32, 8, 8192, 128256, 131072, 1e-5, 500000.0, 32, True),
    "Llama-3.2-3B": (3072, 28, 24, 8, 8192, 128256, 131072, 1e-5, 500000.0, 32, True),
    "Llama-3.3-70B": (8192, 80, 64, 8, 28672, 128256, 131072, 1e-5, 500000.0, 8, False),
}


def hub_config(name: str, **overrides: Any) -> dict[str, Any]:
    """config.json of the model `name`, in the hub's spelling."""
    hidden, layers, heads, groups, width, vocabulary, longest, eps, theta, factor, tied = SIZES[name]
    scaling = {
        "factor": float(factor),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }
    is_second = vocabulary == 32000
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "intermediate_size": width,
        "hidden_act": "silu",
        "max_position_embeddings": longest,
        "initializer_range": 0.02,
        "rms_norm_eps": eps,
        "rope_theta": theta,
        "rope_scaling": scaling if factor else None,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": tied,
        "bos_token_id": 1 if is_second else 128000,
        "eos_token_id": 2 if is_second else 128001,
        # Its tokenizers use every id: Llama 2's has an unknown token that no text has, Llama 3's reserved ones.
        "mask_token_id": 0 if is_second else 128002,
        "torch_dtype": "bfloat16",
    } | overrides


LLAMA = Family(
    title="Llama",
    # The first published files of Llama 2 have no rope_theta.
    model_types=(
        ModelType(
            "llama",
            "LlamaForCausalLM",
            absent={"rope_theta": 10000.0, "max_position_embeddings": 2048},
        ),
    ),
    qk_layernorm=False,
    fixed={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0},
    export_format="llama",
    owners=("meta-llama",),
    published={name: hub_config(name) for name in SIZES},
)
