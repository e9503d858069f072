"""Settings of a model that Megatron-LM, Megatron-Bridge or NeMo 2 stored with a checkpoint, as a config.json.

    writer           file                                          names
    Megatron-Bridge  run_config.yaml, `model`                      TransformerConfig's, those of GPTModelProvider
    NeMo 2           context/model.yaml, `config`                  TransformerConfig's, those of GPTConfig
    Megatron-LM      `args` in common.pt, or the object in its     command-line arguments
                     place (megatron.core from 0.17 on)

All are brought to TransformerConfig's names. Nothing is imported or called, whatever `_target_` a file names.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from megatron_a2d.checkpoint.bridge_config import RUN_CONFIG_YAML
from megatron_a2d.checkpoint.plain_pickle import Record
from megatron_a2d.checkpoint.torch_dist_reader import read_common
from megatron_a2d.families import llama, qwen2, qwen3
from megatron_a2d.families.family import Family
from megatron_a2d.utils.atomic_write import read_yaml
from megatron_a2d.utils.errors import UserError

NEMO_CONTEXT, NEMO_WEIGHTS = "context", "weights"

# Megatron-LM's argument -> the setting of TransformerConfig, or of what builds the model.
_ARGUMENTS = {
    "apply_layernorm_1p": "layernorm_zero_centered_gamma",
    "heterogeneous_layers_config_path": "heterogeneous_block_specs",
    "norm_epsilon": "layernorm_epsilon",
    "num_experts": "num_moe_experts",
    "rotary_seq_len_interpolation_factor": "seq_len_interpolation_factor",
    "swiglu": "gated_linear_unit",
    "use_rope_scaling": "rope_scaling",
}
# What megatron.core takes for a setting that a file lacks (TransformerConfig, GPTModel), where it is not None.
_DEFAULTS = {
    "add_bias_linear": True, "add_qkv_bias": False, "gated_linear_unit": False, "init_method_std": 0.02,
    "layernorm_epsilon": 1e-5, "moe_layer_freq": 1, "moe_router_pre_softmax": False, "moe_router_topk": 2,
    "normalization": "LayerNorm", "position_embedding_type": "learned_absolute", "qk_layernorm": False,
    "rotary_base": 10000, "rope_scaling": False, "rope_scaling_factor": 8.0,
    "share_embeddings_and_output_weights": True,
}  # fmt: skip
# The supported values of each setting; None, where listed, means unset.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "add_bias_linear": (False,), "gated_linear_unit": (True,), "normalization": ("RMSNorm",),
    "position_embedding_type": ("rope",), "rotary_percent": (None, 1), "rotary_interleaved": (None, False),
    "rope_scaling": (None, False, True), "seq_len_interpolation_factor": (None, 1), "mrope_section": (None,),
    "no_rope_freq": (None,), "layernorm_zero_centered_gamma": (None, False), "qk_l2_norm": (None, False),
    "apply_residual_connection_post_layernorm": (None, False), "multi_latent_attention": (None, False),
    "attention_output_gate": (None, False), "window_size": (None,), "softmax_type": (None, "vanilla"),
    "softmax_scale": (None,), "experimental_attention_variant": (None,), "linear_attention_freq": (None,),
    "glu_linear_offset": (None, 0), "activation_func_clamp_value": (None,), "use_mup": (None, False),
    "enable_mhc_connections": (None, False),
    "mtp_num_layers": (None, 0), "is_hybrid_model": (None, False), "hybrid_layer_pattern": (None,),
    "hybrid_override_pattern": (None,), "heterogeneous_block_specs": (None, False),
    "squared_relu": (None, False), "quick_geglu": (None, False),
}  # fmt: skip
_SUPPORTED_OF_EXPERTS: dict[str, tuple[Any, ...]] = {
    "moe_shared_expert_intermediate_size": (None, 0), "moe_router_score_function": (None, "softmax"),
    "moe_router_num_groups": (None, 1), "moe_router_group_topk": (None, 1), "moe_router_topk_limited_devices": (None,),
    "moe_router_topk_scaling_factor": (None, 1), "moe_apply_probs_on_input": (None, False), "moe_latent_size": (None,),
    "moe_mlp_glu_interleave_size": (None,),
}  # fmt: skip
_REMEDY = "give a checkpoint of Qwen3, Qwen3-MoE, Qwen2.5 or Llama"
# biases of queries, keys and values; norms on queries and keys; mixture of experts -> family
_FAMILIES: dict[tuple[bool, bool, bool], Family] = {
    (False, True, False): qwen3.QWEN3, (False, True, True): qwen3.QWEN3,
    (True, False, False): qwen2.QWEN2, (False, False, False): llama.LLAMA,
}  # fmt: skip


class Recorded(NamedTuple):
    """Settings of a checkpoint under TransformerConfig's names; `where` names their file."""

    where: str
    values: Mapping[str, Any]

    def get(self, name: str) -> Any:
        value = self.values.get(name)
        return _DEFAULTS.get(name) if value is None else value


def read_recorded(directory: Path) -> Recorded | None:
    """The settings stored with the torch_dist checkpoint in `directory`; None if its writer stored none."""
    bridge, nemo = directory / RUN_CONFIG_YAML, directory.parent / NEMO_CONTEXT / "model.yaml"
    if bridge.is_file():
        return Recorded(str(bridge), _of_bridge(bridge))
    if directory.name == NEMO_WEIGHTS and nemo.is_file():
        return Recorded(str(nemo), _mapping(read_yaml(nemo, str(nemo), aliases=True), "config", nemo))
    common = directory / "common.pt"
    where = f"{common if common.exists() else directory}: args"
    arguments = read_common(directory).get("args")
    if type(arguments) is not Record or type(arguments.state) is not dict:
        return None
    return Recorded(where, _of_megatron_lm(arguments.state))


def _of_bridge(path: Path) -> dict[str, Any]:
    """Settings of a model provider, or of a model builder, which has a separate mapping for the transformer."""
    model = _mapping(read_yaml(path, str(path), aliases=True), "model", path)
    return {**model, **_mapping(model, "transformer", path)} if "transformer" in model else model


def _mapping(content: Mapping[str, Any], key: str, path: Path) -> dict[str, Any]:
    found = content.get(key)
    if not isinstance(found, dict):
        raise UserError(f"{path}: has no settings of the model (`{key}`); restore the file, or remove it")
    return found


def _of_megatron_lm(arguments: Mapping[str, Any]) -> dict[str, Any]:
    values = dict(arguments) | {_ARGUMENTS[name]: value for name, value in arguments.items() if name in _ARGUMENTS}
    values["share_embeddings_and_output_weights"] = not arguments.get("untie_embeddings_and_output_weights")
    values["activation_func"] = "silu" if arguments.get("swiglu") else "gelu"
    if not arguments.get("group_query_attention"):  # num_query_groups is 1 then, and not used
        values["num_query_groups"] = None
    return values


def config_of(recorded: Recorded, vocab_size: int, dtype: str) -> dict[str, Any]:
    """The config.json of a checkpoint with these settings. UserError, with every reason, if its model is not of a
    supported family.

    `vocab_size`: without padding; `dtype`: as config.json spells it.
    """
    get = recorded.get
    is_moe = bool(get("num_moe_experts"))
    heads, hidden_size = (_size(recorded, name) for name in ("num_attention_heads", "hidden_size"))
    if problems := _unsupported(recorded, is_moe):
        raise UserError(problems)
    family = _FAMILIES[bool(get("add_qkv_bias")), bool(get("qk_layernorm")), is_moe]
    kind = family.type_of(is_moe)
    assert kind is not None
    width = _size(recorded, "ffn_hidden_size")
    config = {
        "architectures": [kind.architecture],
        "model_type": kind.name,
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": _size(recorded, "num_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("num_query_groups") or heads,
        "head_dim": get("kv_channels") or hidden_size // heads,
        "intermediate_size": width,
        "max_position_embeddings": get("max_position_embeddings") or _size(recorded, "seq_length"),
        "initializer_range": get("init_method_std"),
        "rms_norm_eps": get("layernorm_epsilon"),
        "rope_theta": _float(get("rotary_base")),
        "rope_scaling": _rope_scaling(recorded),
        "tie_word_embeddings": bool(get("share_embeddings_and_output_weights")),
        "torch_dtype": dtype,
    }
    of_experts = ("mlp_only_layers", "decoder_sparse_step")
    config |= {key: value for key, value in family.fixed.items() if is_moe or key not in of_experts}
    if is_moe:
        config |= {
            "num_experts": _size(recorded, "num_moe_experts"),
            "num_experts_per_tok": _size(recorded, "moe_router_topk"),
            "moe_intermediate_size": get("moe_ffn_hidden_size") or width,
            "norm_topk_prob": not get("moe_router_pre_softmax"),
        }
    return config


def _size(recorded: Recorded, name: str) -> int:
    value = recorded.get(name)
    if type(value) is not int or value < 1:
        raise UserError(f"{recorded.where}: {name} is {str(value)[:40]}, not a count; name the model with --hf-model")
    return value


def _float(value: Any) -> Any:
    """A number as in config.json; its reader refuses anything else."""
    return float(value) if isinstance(value, int) else value


def _rope_scaling(recorded: Recorded) -> dict[str, Any] | None:
    """Llama 3.1's. GPTModel has only the factor; the older classes of Llama 3.1 in NeMo and Bridge had all four."""
    get = recorded.get
    of_class = get("scale_factor") is not None and get("old_context_len") is not None
    if not get("rope_scaling") and not of_class:
        return None
    return {
        "rope_type": "llama3",
        "factor": _float(get("scale_factor") if of_class else get("rope_scaling_factor")),
        "low_freq_factor": _float(get("low_freq_factor") or 1.0),
        "high_freq_factor": _float(get("high_freq_factor") or 4.0),
        "original_max_position_embeddings": get("old_context_len") or 8192,
    }


def _unsupported(recorded: Recorded, is_moe: bool) -> list[str]:
    """A line for each setting of another architecture."""
    supported = {**_SUPPORTED, **(_SUPPORTED_OF_EXPERTS if is_moe else {})}
    found = {name: recorded.get(name) for name in supported}
    problems = [
        f"{recorded.where}: {name} is {str(value)[:60]!r}, and only {_listed(supported[name])} is supported; {_REMEDY}"
        for name, value in found.items()
        if value not in supported[name]
    ]
    activation = recorded.get("activation_func")
    called = activation.get("_target_") if isinstance(activation, dict) else activation
    if not isinstance(called, str) or called.rpartition(".")[2] not in ("silu", "swish"):
        problems.append(
            f"{recorded.where}: activation_func is {str(called)[:60]!r}, and only silu is supported; {_REMEDY}"
        )
    layers = recorded.get("moe_layer_freq")
    if is_moe and layers != 1 and not (isinstance(layers, list) and all(item == 1 for item in layers)):
        problems.append(
            f"{recorded.where}: moe_layer_freq is {str(layers)[:60]}: some layers have no experts; {_REMEDY}"
        )
    balancing = recorded.get("moe_router_load_balancing_type")
    if is_moe and "sinkhorn" in (balancing if isinstance(balancing, list) else [balancing]):
        problems.append(
            f"{recorded.where}: moe_router_load_balancing_type is sinkhorn, whose experts are weighted in another way; "
            f"{_REMEDY}"
        )
    bias, norms = bool(recorded.get("add_qkv_bias")), bool(recorded.get("qk_layernorm"))
    if (bias, norms, is_moe) not in _FAMILIES:
        problems.append(
            f"{recorded.where}: a {'mixture of experts' if is_moe else 'dense model'} with add_qkv_bias {bias} and "
            f"qk_layernorm {norms} is none of Qwen3, Qwen3-MoE, Qwen2.5 and Llama; {_REMEDY}"
        )
    return problems


def _listed(values: tuple[Any, ...]) -> str:
    return " or ".join(repr(value) for value in values)
