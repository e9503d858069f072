"""Configuration of an A2D model: the keys of Qwen3's and Qwen3-MoE's `config.json`, and those of diffusion.

Both spellings of the hub's keys are read, that of transformers 4 (`rope_theta`, `rope_scaling`, `num_experts`) and that
of transformers 5 (`rope_parameters`, `num_local_experts`); the first one is written. Two spellings that differ, and a
key that this code does not implement, are errors: ignoring them would give wrong logits.
"""

from __future__ import annotations

import math
from typing import Any

from transformers import PretrainedConfig


class A2DConfig(PretrainedConfig):
    """A dense model (`num_experts` 0) or a mixture of experts whose attention is bidirectional.

    Args beyond Qwen3's:
        mask_token_id: the mask token; never predicted.
        label_shift: True if the logits at position i - 1 predict the token at position i (the convention of the
            autoregressive base model, kept by RND1); False if those at position i do.
        num_diffusion_steps: the default number of denoising steps for sampling.
        block_length: tokens in a block of block diffusion: a position attends to the blocks up to its own. 0: to all.
        ar_loss_weight: weight of the next-token loss in training. Above 0, finished blocks attend causally.
        add_qkv_bias: biases of queries, keys and values, as in Qwen2.5.
        qk_layernorm: norms on queries and keys, as in Qwen3.
    """

    model_type = "a2d"
    attribute_map = {"num_local_experts": "num_experts"}  # noqa: RUF012 (transformers reads a class attribute)
    # transformers 5 has a property of this name that would write `rope_parameters`.
    rope_scaling = None  # type: ignore[assignment]

    def __init__(
        self,
        vocab_size: int = 151936,
        hidden_size: int = 1024,
        num_hidden_layers: int = 28,
        num_attention_heads: int = 16,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        intermediate_size: int = 3072,
        max_position_embeddings: int = 40960,
        rms_norm_eps: float = 1e-6,
        rope_theta: float | None = None,
        rope_parameters: dict[str, Any] | None = None,
        rope_scaling: Any = None,
        initializer_range: float = 0.02,
        tie_word_embeddings: bool = False,
        num_experts: int | None = None,
        num_local_experts: int | None = None,
        num_experts_per_tok: int | None = None,
        moe_intermediate_size: int | None = None,
        norm_topk_prob: bool = False,
        mask_token_id: int | None = None,
        label_shift: bool = True,
        num_diffusion_steps: int = 256,
        block_length: int = 0,
        ar_loss_weight: float = 0.0,
        add_qkv_bias: bool = False,
        qk_layernorm: bool = True,
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        **kwargs: Any,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.intermediate_size = intermediate_size
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta, self.rope_scaling = _rotary(
            rope_theta, rope_scaling, rope_parameters, max_position_embeddings, kwargs
        )
        self.initializer_range = initializer_range
        self.num_experts = _agreed({"num_experts": num_experts, "num_local_experts": num_local_experts}) or 0
        self.num_experts_per_tok = num_experts_per_tok or 0
        self.moe_intermediate_size = moe_intermediate_size or 0
        self.norm_topk_prob = norm_topk_prob
        self.mask_token_id = mask_token_id
        self.label_shift = label_shift
        self.num_diffusion_steps = num_diffusion_steps
        self.block_length = block_length
        self.ar_loss_weight = ar_loss_weight
        self.add_qkv_bias = add_qkv_bias
        self.qk_layernorm = qk_layernorm
        if self.num_experts and not (num_experts_per_tok and moe_intermediate_size):
            raise ValueError("a config with num_experts needs num_experts_per_tok and moe_intermediate_size")
        _refuse_unsupported(kwargs)
        types = {key: kwargs[key] for key in ("torch_dtype", "dtype") if kwargs.get(key) is not None}
        _agreed({key: str(value).removeprefix("torch.") for key, value in types.items()})
        kwargs.update(
            is_causal=False,
            use_cache=False,
            tie_word_embeddings=tie_word_embeddings,
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
        )
        super().__init__(**kwargs)


def _agreed(spellings: dict[str, Any]) -> Any:
    """The value of a setting with several spellings; None if it is not set."""
    found = {key: value for key, value in spellings.items() if value is not None}
    first = next(iter(found.values()), None)
    if any(value != first for value in found.values()):
        raise ValueError(" and ".join(f"{key} is {value!r}" for key, value in found.items()) + ", which contradict")
    return first


def _rotary(
    theta: float | None, scaling: Any, parameters: Any, longest: int, others: dict[str, Any]
) -> tuple[float, dict[str, Any] | None]:
    """`rope_theta`, and `rope_scaling` with all settings of YaRN or llama3; None without them."""
    objects = {"rope_scaling": scaling or {}, "rope_parameters": parameters or {}}
    places = {f"{key}.rope_theta": found.get("rope_theta") for key, found in objects.items()}
    base = _agreed({"rope_theta": theta, **places})
    if scaling and theta is None and places["rope_scaling.rope_theta"] is None and base is not None:
        raise ValueError("rope_theta is only in rope_parameters, which transformers ignores next to rope_scaling")
    original = others.pop("original_max_position_embeddings", None)
    read = [_scaling(found, original, longest) for found in objects.values() if found]
    if len(read) == 2 and read[0] != read[1]:
        raise ValueError(f"rope_scaling is {scaling} and rope_parameters is {parameters}, which contradict")
    for found in (others, *objects.values()):
        if found.get("partial_rotary_factor") not in (None, 1):
            raise ValueError(f"partial_rotary_factor is {found['partial_rotary_factor']!r}; this model supports 1 only")
    return float(base or 1e6), read[0] if read else None


def _scaling(found: dict[str, Any], original: int | None, longest: int) -> dict[str, Any] | None:
    kind = _agreed({key: found.get(key) for key in ("rope_type", "type")}) or "default"
    if kind == "default":
        return None
    name = "original_max_position_embeddings"
    original = _agreed({name: original, f"in the scaling, {name}": found.get(name)})
    if kind == "yarn":
        return _yarn(found, name, original or longest, longest)
    if kind != "llama3":
        raise ValueError(f"rotary embeddings of type {kind!r} are not supported, only 'default', 'yarn' and 'llama3'")
    numbers = {key: found.get(key) for key in ("factor", "low_freq_factor", "high_freq_factor")} | {name: original}
    if missing := [key for key, value in numbers.items() if not value]:
        raise ValueError(f"llama3's {', '.join(missing)} must be positive numbers")
    return {"rope_type": "llama3", "attention_factor": 1.0, **numbers}


def _yarn(found: dict[str, Any], name: str, original: int, longest: int) -> dict[str, Any]:
    factor = found.get("factor") or longest / original
    if factor < 1 or (factor == 1 and not found.get("factor")):
        raise ValueError(f"YaRN's factor is {found.get('factor')!r}, and it must be at least 1")

    def temperature(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0

    attention = found.get("attention_factor")
    above, below = found.get("mscale"), found.get("mscale_all_dim")
    if attention is None:
        attention = temperature(above) / temperature(below) if above and below else temperature(1.0)
    return {
        "rope_type": "yarn", "factor": float(factor), name: int(original), "attention_factor": float(attention),
        "beta_fast": float(found.get("beta_fast") or 32), "beta_slow": float(found.get("beta_slow") or 1),
        "truncate": found.get("truncate", True),
    }  # fmt: skip


def _refuse_unsupported(config: dict[str, Any]) -> None:
    supported = {
        "hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0, "use_sliding_window": False,
        "mlp_only_layers": [], "decoder_sparse_step": 1,
    }  # fmt: skip
    for key, value in supported.items():
        if config.get(key) not in (None, value):
            raise ValueError(f"config key {key} is {config[key]!r}; this model supports {value!r} only")
    if set(config.get("layer_types") or ()) - {"full_attention"} or config.get("per_layer_config"):
        raise ValueError("per-layer settings (layer_types, per_layer_config) are not supported")


A2DConfig.register_for_auto_class()
