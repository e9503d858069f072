"""run_config.yaml, which Megatron-Bridge requires next to a checkpoint's tensors: the settings to build the model with.

Bridge (`load_megatron_model`, `AutoBridge`) instantiates `model`, asks `checkpoint` whether there is optimizer state
that it could load (ours has a form of its own), and takes the tokenizer from `tokenizer`. Names and defaults are those
of its GPTModelProvider. It knows causal attention only: what it builds from a diffusion model has our weights, and
another mask.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml

from megatron_a2d.config.model_config import ModelConfig, read_model_config
from megatron_a2d.config.rotary import Llama3Scaling

RUN_CONFIG_YAML = "run_config.yaml"


def write_run_config(directory: Path, hf_files: Path, dtype: torch.dtype) -> None:
    """Write the file into an iteration's `directory`; `hf_files` has the model's config.json, `dtype` is its weights'.

    Nothing is written for positions that GPTModel cannot express: YaRN, and Llama 3's scaling with other constants.
    """
    model_config = read_model_config(hf_files)
    if model_config.rope_scaling is None or _is_llama3(model_config):
        text = yaml.safe_dump(run_config(model_config, dtype), sort_keys=False)
        (directory / RUN_CONFIG_YAML).write_text(text, encoding="utf-8")


def run_config(a: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The content of the file for a model without YaRN."""
    model: dict[str, Any] = {
        "_target_": "megatron.bridge.models.gpt_provider.GPTModelProvider",
        "num_layers": a.num_layers,
        "hidden_size": a.hidden_size,
        "ffn_hidden_size": a.intermediate_size,
        "num_attention_heads": a.num_attention_heads,
        "num_query_groups": a.num_key_value_heads,
        "kv_channels": a.head_dim,
        "normalization": "RMSNorm",
        "layernorm_epsilon": a.rms_norm_eps,
        "qk_layernorm": a.qk_layernorm,
        "add_bias_linear": False,
        "add_qkv_bias": a.add_qkv_bias,
        "gated_linear_unit": True,
        "activation_func": {"_target_": "torch.nn.functional.silu", "_call_": False},
        "position_embedding_type": "rope",
        "rotary_base": a.rope_theta,
        "rotary_percent": 1.0,
        "seq_length": a.max_position_embeddings,
        "share_embeddings_and_output_weights": a.tie_word_embeddings,
        "vocab_size": a.vocab_size,
        "should_pad_vocab": False,
        "init_method_std": a.initializer_range,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "params_dtype": {"_target_": str(dtype), "_call_": False},
        # Of the checkpoint: any layout can load it.
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "expert_model_parallel_size": 1,
    }
    if isinstance(a.rope_scaling, Llama3Scaling):
        model |= {"rope_scaling": True, "rope_scaling_factor": a.rope_scaling.factor}
    if a.is_moe:
        model |= {
            "num_moe_experts": a.num_experts,
            "moe_ffn_hidden_size": a.moe_intermediate_size,
            "moe_router_topk": a.num_experts_per_tok,
            "moe_router_pre_softmax": not a.norm_topk_prob,
            "moe_router_score_function": "softmax",
            "moe_router_load_balancing_type": "none",
            "moe_grouped_gemm": True,
            "moe_token_dispatcher_type": "alltoall",
        }
    tokenizer = {
        "_target_": "megatron.bridge.training.tokenizers.config.TokenizerConfig",
        "tokenizer_type": "HuggingFaceTokenizer",
        "tokenizer_model": None,  # Bridge does not search next to this file: give it the path of hf/
    }
    checkpoint = {"save_optim": False, "save_rng": False, "fully_parallel_save": True}
    return {"model": model, "tokenizer": tokenizer, "checkpoint": checkpoint}


def _is_llama3(a: ModelConfig) -> bool:
    """With the constants that megatron.core's RotaryEmbedding has in its code; only the factor is a setting."""
    scaling = a.rope_scaling
    return isinstance(scaling, Llama3Scaling) and (
        scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_position_embeddings,
    ) == (1.0, 4.0, 8192)  # fmt: skip
