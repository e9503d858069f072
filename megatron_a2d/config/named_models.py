"""--model: the model that a run or a plan is for, and how a checkpoint may differ from it."""

from __future__ import annotations

from pathlib import Path

from megatron_a2d.config.model_config import ModelConfig, model_config_from_hf, read_model_config
from megatron_a2d.families.registry import nearest_published, published_config, published_names
from megatron_a2d.utils.errors import UserError

_COMPARED = (
    "num_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size",
    "tie_word_embeddings", "add_qkv_bias", "qk_layernorm", "num_experts", "num_experts_per_tok",
)  # fmt: skip


def named_model_config(name: str) -> ModelConfig:
    """The shape of --model: a directory with a config.json, or a published model by name (without network access).

    Raises UserError for any other name.
    """
    if Path(name).is_dir():
        return read_model_config(name)
    config = published_config(name)
    if config is None:
        raise UserError(
            f"--model {name}: is neither a directory nor a known model{nearest_published(name)}; give one of "
            f"{', '.join(published_names())}, or a directory with the model's config.json"
        )
    return model_config_from_hf(config, name)


def shape_problems(named: str, found: ModelConfig) -> list[str]:
    """One line for each dimension in which the checkpoint differs from --model."""
    expected = named_model_config(named)
    sizes = [*_COMPARED, "moe_intermediate_size" if expected.is_moe else "intermediate_size"]
    return [
        f"--model {named}: has {size} {getattr(expected, size)}, the checkpoint {getattr(found, size)}; "
        "load that model's checkpoint, or change --model"
        for size in sizes
        if getattr(expected, size) != getattr(found, size)
    ]
