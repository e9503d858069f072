"""Well-known families that are close to the supported ones, and what of each is not implemented."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_VISION = "it has a vision tower, and rotary positions in sections for images"
_HYBRID = "three of four layers are gated delta nets (linear attention), and the others have gated outputs"
_SHARED_EXPERT = "each layer has a shared expert beside the routed ones"
_LATENT = "its keys and values are low-rank (multi-head latent attention)"
_GEMMA = "its norms scale by 1 + weight, there are norms after each block, and its MLP is a GeGLU"
_FUSED = "its query, key, value and gate, up matrices are stored as one tensor each"

# By the beginning of model_type; the longest match holds.
_REASONS = {
    "qwen2_vl": _VISION,
    "qwen2_5_vl": _VISION,
    "qwen2_5_omni": "it has towers for images and sound, and a second model that speaks",
    "qwen2_audio": "it has a tower for sound",
    "qwen2_moe": f"{_SHARED_EXPERT}, with a gate of its own",
    "qwen3_vl": _VISION,
    "qwen3_omni": "it has towers for images and sound, and a second model that speaks",
    "qwen3_next": f"{_HYBRID}, and {_SHARED_EXPERT}",
    "qwen3_5": f"{_HYBRID}, and it has a vision tower",
    "gpt_oss": (
        "its attention has sinks and, in every other layer, a sliding window, its experts and router have biases and a "
        "clamped activation, and its weights are MXFP4"
    ),
    "llama4": "it has a vision tower, layers without rotary positions, chunked attention and a shared expert",
    "mllama": "it has a vision tower and cross-attention layers",
    "llava": "it has a vision tower",
    "mistral": "its attention has a sliding window, or its positions a scaling of their own",
    "mixtral": "its experts have names and a window of attention of their own",
    "gemma": _GEMMA,
    "phi3": _FUSED,
    "glm4": "there are norms after each block, part of each head is not rotated, and gate and up are one tensor",
    "olmo2": "its norms follow the blocks, and those of queries and keys span all heads",
    "olmoe": "its norms of queries and keys span all heads",
    "deepseek_v2": f"{_LATENT}, and {_SHARED_EXPERT}",
    "deepseek_v3": f"{_LATENT}, {_SHARED_EXPERT}, and its router picks groups by sigmoid scores",
    "llada2_moe": f"its router picks groups by sigmoid scores, {_SHARED_EXPERT}, and its first layer is dense",
    "minimax": "most of its layers are linear attention",
    "granite": "its residual stream, scores and logits are multiplied by constants",
    "cohere": "attention and MLP run in parallel, and its norms subtract the mean",
    "nemotron": "its MLP is a squared ReLU, and its norms subtract the mean",
}
# Keys that only models with further towers have, whatever their model_type.
_TOWERS = ("vision_config", "audio_config", "speech_config", "image_token_id", "vision_start_token_id")


def what_is_unsupported(config: Mapping[str, Any]) -> str | None:
    """What a config.json asks for that is not implemented; None for a supported family, or one that is not known."""
    named = config.get("model_type")
    known = [name for name in _REASONS if isinstance(named, str) and named.startswith(name)]
    if known:
        return _REASONS[max(known, key=len)]
    if towers := [key for key in _TOWERS if config.get(key) is not None]:
        return f"{', '.join(towers)}: it is more than a language model"
    return None
