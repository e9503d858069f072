"""Well-known families that are close to the supported ones, and what each one needs that is not implemented."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_VISION = "it has a vision tower, and rotary positions in sections for images"
_HYBRID = "three of four layers are gated delta nets (linear attention), and the others have gated outputs"
_STATE_SPACE = "most of its layers are state-space models, without attention"
_SHARED_EXPERT = "each layer has a shared expert in addition to the routed ones"
_LATENT = "its keys and values are low-rank (multi-head latent attention)"
_SIGMOID = "its router picks groups by sigmoid scores"
_GEMMA = "its norms scale by 1 + weight and its MLP is a GeGLU"
_AROUND = "there are norms before and after each block"
_FUSED = "its query, key, value and gate, up matrices are stored as one tensor each"
_LAYER_NORM = "its norms subtract the mean and its MLP has no gate"
_LEARNED = f"its positions are learned, {_LAYER_NORM}"
_PARTIAL = "part of each head is not rotated"
_ENCODER = "it is an encoder, not a decoder that predicts the next token"
_SCALED = "its residual stream, scores and logits are multiplied by constants"
_SQUARED = "its MLP is a squared ReLU"

# By the beginning of model_type; the longest match holds.
_REASONS = {
    "qwen2_vl": _VISION,
    "qwen2_5_vl": _VISION,
    "qwen2_5_omni": "it has vision and audio towers, and a second model for speech",
    "qwen2_audio": "it has an audio tower",
    "qwen2_moe": f"{_SHARED_EXPERT}, with its own gate",
    "qwen3_vl": _VISION,
    "qwen3_omni": "it has vision and audio towers, and a second model for speech",
    "qwen3_next": f"{_HYBRID}, and {_SHARED_EXPERT}",
    "qwen3_5": f"{_HYBRID}, and it has a vision tower",
    "gpt_oss": (
        "its attention has sinks and, in every other layer, a sliding window, its experts and router have biases and a "
        "clamped activation, and its weights are MXFP4"
    ),
    "llama4": f"it has layers without rotary positions, chunked attention, scaled queries, and {_SHARED_EXPERT}",
    "mllama": "it has a vision tower and cross-attention layers",
    "llava": "it has a vision tower",
    "mistral3": "it has a vision tower",
    "ministral": "its attention has a sliding window, or its queries are scaled by position",
    "mixtral": "its experts have other tensor names (block_sparse_moe.experts.w1, w2, w3)",
    "gemma": _GEMMA,
    "gemma2": f"{_GEMMA}, {_AROUND}, every other layer has a sliding window, and scores and logits are capped",
    "gemma3": f"{_GEMMA}, {_AROUND}, and five of six layers have a sliding window with other rotary positions",
    "gemma3n": "each layer has its own embedding and several residual streams, and some share keys and values",
    "phi": f"its attention and MLP run in parallel, {_PARTIAL}, and {_LAYER_NORM}",
    "phi3": _FUSED,
    "phi4mm": f"it has vision and audio towers, and {_FUSED}",
    "phimoe": "its norms subtract the mean, its output has a bias, and its router samples experts one after the other",
    "glm": f"{_PARTIAL}, and gate and up are one tensor",
    "glm4": f"{_AROUND}, {_PARTIAL}, and gate and up are one tensor",
    "glm4_moe": f"{_PARTIAL}, {_SIGMOID}, {_SHARED_EXPERT}, and its first layers are dense",
    "chatglm": f"{_PARTIAL}, {_FUSED}, and its tensors have other names",
    "smollm3": "every fourth layer has no rotary positions",
    "olmo": "its norms have no weights and subtract the mean",
    "olmo2": "its norms follow the blocks, and those of queries and keys span all heads",
    "olmo3": (
        "its norms follow the blocks, those of queries and keys span all heads, and most layers have a sliding window"
    ),
    "olmoe": "its norms of queries and keys span all heads",
    "deepseek_v2": f"{_LATENT}, and {_SHARED_EXPERT}",
    "deepseek_v3": f"{_LATENT}, {_SHARED_EXPERT}, and {_SIGMOID}",
    "deepseek_v32": f"{_LATENT}, of a few positions each query picks, {_SHARED_EXPERT}, and {_SIGMOID}",
    "kimi_k2": f"{_LATENT}, {_SHARED_EXPERT}, and {_SIGMOID}",
    "llada2_moe": f"{_SIGMOID}, {_SHARED_EXPERT}, and its first layer is dense",
    "exaone4": "its norms follow the blocks, and three of four layers have a sliding window",
    "ernie4_5_moe": f"{_SHARED_EXPERT}, and its router picks experts by biased scores",
    "minicpm": _SCALED,
    "minimax": "most of its layers are linear attention",
    "granite": _SCALED,
    "cohere": "attention and MLP run in parallel, and its norms subtract the mean",
    "nemotron": f"{_SQUARED}, and its norms subtract the mean",
    "nemotron_h": _STATE_SPACE,
    "arcee": f"{_SQUARED}, without a gate",
    "apertus": "its MLP is an xIELU, without a gate",
    "mamba": _STATE_SPACE,
    "falcon_mamba": _STATE_SPACE,
    "jamba": _STATE_SPACE,
    "gpt2": _LEARNED,
    "opt": _LEARNED,
    "gpt_neox": f"its attention and MLP run in parallel, {_PARTIAL}, and {_LAYER_NORM}",
    "falcon": f"its query, key and value are one tensor, and {_LAYER_NORM}",
    "bloom": f"its positions are biases of the scores (ALiBi), and {_LAYER_NORM}",
    "starcoder2": f"all its matrices have biases, and {_LAYER_NORM}",
    "stablelm": f"{_PARTIAL}, and its norms subtract the mean",
    "internlm2": "its query, key and value are one tensor, and its tensors have other names",
    "baichuan": "its query, key and value are one tensor",
    "bert": _ENCODER,
    "roberta": _ENCODER,
    "modernbert": _ENCODER,
    "t5": "it is an encoder and a decoder, with cross-attention",
}
# A head that reads one number or class off a text.
_OTHER_HEAD = re.compile(r"For(?!CausalLM|MaskedLM|ConditionalGeneration)[A-Z]\w+$")
# Keys that only models with further towers have, whatever their model_type.
_TOWERS = ("vision_config", "audio_config", "speech_config", "image_token_id", "vision_start_token_id")


def what_is_unsupported(config: Mapping[str, Any]) -> str | None:
    """What a config.json requires that is not implemented; None for a supported or unknown family."""
    named = config.get("model_type")
    known = [name for name in _REASONS if isinstance(named, str) and named.startswith(name)]
    if named == "mistral":
        return _of_mistral(config)
    if known:
        return _REASONS[max(known, key=len)]
    if towers := [key for key in _TOWERS if config.get(key) is not None]:
        return f"{', '.join(towers)}: it is not only a language model"
    listed = config.get("architectures")
    for name in listed if isinstance(listed, list) else []:
        if isinstance(name, str) and _OTHER_HEAD.search(name):
            return f"a {name} has no language model head"
    return None


def _of_mistral(config: Mapping[str, Any]) -> str:
    """Mistral: Llama's layers; some models also have a sliding window."""
    if (window := config.get("sliding_window")) is not None:
        return f"its attention has a sliding window (sliding_window {window!r})"
    return (
        "without a sliding window, like this one, it is a Llama: set model_type to llama and architectures to "
        "LlamaForCausalLM in config.json"
    )
