"""Model shapes of the published Qwen3 sizes, from their `config.json`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from megatron_a2d.config.model_config import ModelConfig, model_config_from_hf, read_model_config
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


def named_model_config(name: str) -> ModelConfig:
    """The shape of --model: a directory with a config.json, or a published Qwen3 by name (without network access).

    Raises UserError for any other name.
    """
    if Path(name).is_dir():
        return read_model_config(name)
    match = re.fullmatch(r"(?:Qwen/)?Qwen3-([\w.]+(?:-A\d+B)?)(?:-(?:Base|Instruct|Thinking)(?:-\d+)?)?", name)
    if not match or match[1] not in SIZES:
        known = [f"Qwen/Qwen3-{size}" for size in SIZES]
        raise UserError(
            f"--model {name}: is neither a directory nor a Qwen3{nearest(name, known)}; give one such as "
            f"Qwen/Qwen3-8B-Base ({', '.join(SIZES)})"
        )
    return model_config_from_hf(hub_config(match[1]), name)


def shape_problems(named: str, found: ModelConfig) -> list[str]:
    """One line for each dimension in which the checkpoint differs from --model."""
    expected = named_model_config(named)
    sizes = [
        "num_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size",
        "tie_word_embeddings", "num_experts", "num_experts_per_tok",
        "moe_intermediate_size" if expected.is_moe else "intermediate_size",
    ]  # fmt: skip
    return [
        f"--model {named}: has {size} {getattr(expected, size)}, the checkpoint {getattr(found, size)}; "
        "load that model's checkpoint, or change --model"
        for size in sizes
        if getattr(expected, size) != getattr(found, size)
    ]
