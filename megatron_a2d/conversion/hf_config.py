"""config.json and generation_config.json of an exported model (read back by config/model_config.py).

Keys are spelled as on the hub (`rope_theta`, `num_experts`, `torch_dtype`): transformers 4 silently ignores
the new spellings of transformers 5, while 5 reads both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from megatron_a2d.checkpoint.training_facts import Trained
from megatron_a2d.config.model_config import ModelConfig
from megatron_a2d.conversion import public_form
from megatron_a2d.conversion.end_tokens import EndTokens
from megatron_a2d.families.family import Family
from megatron_a2d.families.registry import autoregressive_formats, export_formats, family_of_format

Format = str  # one of `FORMATS`
FORMATS = tuple(export_formats())

# By model_type.
AUTO_MAPS = {
    "a2d": {
        "AutoConfig": "configuration_a2d.A2DConfig",
        "AutoModel": "modeling_a2d.A2DModel",
        "AutoModelForMaskedLM": "modeling_a2d.A2DForMaskedLM",
    },
    "rnd1": {
        "AutoConfig": "configuration_rnd.RND1Config",
        "AutoModel": "modeling_rnd.RND1Model",
        "AutoModelForMaskedLM": "modeling_rnd.RND1LM",
    },
    # LMDeploy takes the model class from the last part of AutoModelForCausalLM, SGLang from `architectures`.
    "sdar": {
        "AutoConfig": "configuration_sdar.SDARConfig",
        "AutoModel": "modeling_sdar.SDARModel",
        "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM",
    },
    "sdar_moe": {
        "AutoConfig": "configuration_sdar.SDARMoeConfig",
        "AutoModel": "modeling_sdar.SDARMoeModel",
        "AutoModelForCausalLM": "modeling_sdar.SDARMoeForCausalLM",
    },
}
# What the engines that run SDAR models have in their code (LMDeploy 0.18.0, SGLang 0.5.23): the mask token; LMDeploy
# divides its max_prefill_token_num by the block length for the number of requests in a batch.
SDAR_MASK_TOKEN_ID, SDAR_MASK_TOKEN = 151669, "<|MASK|>"
LONGEST_SDAR_BLOCK = 8192
NUM_DIFFUSION_STEPS = 256
# Training settings that every export records; others only where they differ from the default.
_RECORDED = ("objective", "label_shift", "noise_schedule", "document_attention")
_NONE = Trained().as_exported()
_OF_EXPERTS = ("decoder_sparse_step", "mlp_only_layers")


class AuxLossCoefficient(NamedTuple):
    """A source's `router_aux_loss_coef`, and --moe-aux-loss-coeff of equal effect where all layers route alike."""

    source: float
    ours: float


def aux_loss_coefficient(config: Mapping[str, Any], model_config: ModelConfig) -> AuxLossCoefficient | None:
    """The coefficient in a source's config.json; None for a dense model, or without one.

    Hugging Face's loss pools the tokens of all L layers, and is k, the experts per token, at balance; ours
    (model/load_balancing.py) is a sum over layers, of 1 each.
    """
    source = config.get("router_aux_loss_coef")
    if not model_config.is_moe or not isinstance(source, float | int) or not math.isfinite(source):
        return None
    return AuxLossCoefficient(source, source * model_config.num_experts_per_tok / model_config.num_layers)


class Exported(NamedTuple):
    """The inputs of an export's configuration."""

    model_config: ModelConfig
    source: dict[str, Any]  # hf/config.json of the checkpoint
    source_generation: dict[str, Any]  # its generation_config.json, or {}
    dtype: str  # of the embedding: bfloat16, float16, float32
    trained: Trained
    ends: EndTokens


def refusals(kind: Format, model: Exported, allow_objective_mismatch: bool = False) -> list[str]:
    """Why this model cannot be expressed in format `kind`; empty if it can.

    `allow_objective_mismatch` permits a format with another attention than the model was trained with.
    """
    problems = []
    a, trained = model.model_config, model.trained
    if not allow_objective_mismatch and (mismatch := objective_mismatch(kind, model)):
        instead = autoregressive_format(a) or "qwen3" if model.trained.objective == "ar" else "a2d"
        problems.append(
            f"--format {kind}: {mismatch}; use --format {instead}, or --allow-objective-mismatch to export it anyway"
        )
    problems += _layer_refusals(kind, model)
    if kind == "rnd1":
        reasons = {
            "it does not normalise the weights of the chosen experts (norm_topk_prob), and RND1 does": (
                a.is_moe and not a.norm_topk_prob
            ),
            "its LM head is tied to its embedding, and RND1's is not": a.tie_word_embeddings,
            "it was trained without the label shift, and RND1 with it": not trained.label_shift,
        }
        problems += [f"--format rnd1: {why}; use --format a2d" for why, holds in reasons.items() if holds]
        if trained.block_length:
            problems.append(
                f"--format rnd1: the model was trained in blocks of {trained.block_length} (--objective block), and "
                f"RND1 has none; use --format {'a2d' if trained.label_shift else 'sdar'}"
            )
    if kind == "sdar":
        problems += _sdar_refusals(a, trained)
    family = family_of_format(kind)
    if family is not None and public_form.is_public_form(family):
        instead = "sdar" if trained.block_length and not trained.label_shift else "a2d"
        problems += [
            f"--format {kind}: {why}; use --format {instead}" for why in public_form.refusals(family, a, trained)
        ]
    if not is_autoregressive(kind) and a.mask_token_id is None:
        problems.append(f"--format {kind}: the checkpoint's hf/config.json has no mask_token_id; convert it again")
    return problems


def is_autoregressive(kind: Format) -> bool:
    """Whether a format is for models that predict the next token, which transformers' own classes read."""
    return kind in autoregressive_formats()


def autoregressive_format(a: ModelConfig) -> str | None:
    """The format in which transformers' own classes read a model with these layers; None if there is none."""
    fitting = (name for name, family in autoregressive_formats().items() if not _differences(family, a))
    return next(fitting, None)


def _differences(family: Family, a: ModelConfig) -> list[str]:
    """How a model's layers differ from those of a family."""
    shape = "a mixture of experts" if a.is_moe else "dense"
    found = [] if family.type_of(a.is_moe) else [f"it is {shape}, and {family.title} models are not"]
    for has, there, what in (
        (a.add_qkv_bias, family.add_qkv_bias, "biases of queries, keys and values"),
        (a.qk_layernorm, family.qk_layernorm, "norms on queries and keys"),
    ):
        if there not in (None, has):
            found.append(
                f"it has {what}, and {family.title} none" if has else f"it has no {what}, and {family.title} does"
            )
    return found


def _layer_refusals(kind: Format, model: Exported) -> list[str]:
    family, a = family_of_format(kind), model.model_config
    assert family is not None, kind
    instead = (autoregressive_format(a) if is_autoregressive(kind) else None) or "a2d"
    return [f"--format {kind}: {difference}; use --format {instead}" for difference in _differences(family, a)]


def _sdar_refusals(a: ModelConfig, trained: Trained) -> list[str]:
    """Why the engines that run SDAR models would not run this one, or would silently compute another model."""
    longest = min(a.context_length, LONGEST_SDAR_BLOCK)
    reasons = {
        "it was not trained in blocks (--objective block), and engines fill texts block by block": (
            trained.objective != "block"
        ),
        "it was trained with the label shift, and engines read the prediction of token i at position i": (
            trained.is_diffusion and trained.label_shift
        ),
        f"its mask token is {a.mask_token_id}, and engines fill masks of the fixed id {SDAR_MASK_TOKEN_ID}": (
            a.mask_token_id not in (None, SDAR_MASK_TOKEN_ID)
        ),
        f"its blocks have {trained.block_length} tokens, and engines accept at most {longest}": (
            trained.block_length > longest
        ),
        "its rotary embedding is scaled (YaRN or llama3), and SDAR's form has rope_scaling null": a.rope_scaling
        is not None,
    }
    return [f"--format sdar: {why}; use --format a2d" for why, holds in reasons.items() if holds]


def objective_mismatch(kind: Format, model: Exported) -> str | None:
    """How format `kind` contradicts the training objective; None if it does not, or none is recorded."""
    trained = model.trained
    if is_autoregressive(kind) and trained.is_diffusion and not trained.is_causal:
        return (
            f"the model was trained for masked diffusion (--objective {trained.objective}), and this format predicts "
            "the next token with causal attention"
        )
    if kind == "sdar" and trained.objective == "block" and trained.ar_loss_weight > 0:
        return (
            f"the model was trained with --ar-loss-weight {trained.ar_loss_weight:g}, so its finished blocks attend "
            "causally, and engines let them attend to their whole block"
        )
    if not is_autoregressive(kind) and trained.objective == "ar":
        return (
            "the model was trained to predict the next token (--objective ar), and this format fills masks with "
            "bidirectional attention"
        )
    return None


def config_json(kind: Format, model: Exported) -> dict[str, Any]:
    """The export's config.json."""
    a = model.model_config
    family = family_of_format(kind)
    described = family.type_of(a.is_moe) if family else None
    assert family is not None and described is not None, "refused before"
    if public_form.is_public_form(family):
        more = {
            **_special_tokens(model, first_only=False),
            "torch_dtype": model.dtype,
            "mask_token_id": a.mask_token_id,
        }
        return public_form.public_config(family, model.source, _settings(a, family), model.trained, more)
    config: dict[str, Any] = {"architectures": [described.architecture], "model_type": described.name}
    if described.name in AUTO_MAPS:
        config["auto_map"] = AUTO_MAPS[described.name]
    config |= _shape(a, family)
    config |= {
        key: model.source[key]
        for key in ("max_window_layers", "output_router_logits", "router_aux_loss_coef")
        if model.source.get(key) is not None
    }
    config |= _special_tokens(model, first_only=kind in ("rnd1", "sdar"))
    config["torch_dtype"] = model.dtype
    scaling = a.rope_scaling.to_rope_scaling() if a.rope_scaling else None
    config |= _training(kind, model)
    if is_autoregressive(kind):
        return config | {"rope_scaling": scaling, "sliding_window": None, "use_cache": True}
    config |= {
        "mask_token_id": a.mask_token_id,
        "num_diffusion_steps": num_diffusion_steps(model.source),
        "is_causal": False,
        "use_cache": False,
    }
    if kind == "sdar":
        config |= {"block_size": config.pop("block_length"), "tie_word_embeddings": False, "sliding_window": None}
        config["fuse_cross_entropy"] = True  # SDAR's own modelling code asks for it
        # LMDeploy needs a number.
        config["pad_token_id"] = next(x for x in (config["pad_token_id"], *model.ends.ids, 0) if x is not None)
    if kind == "rnd1":
        del config["bos_token_id"]
        return config | {"moe_backend": "hf", "rope_scaling": scaling or False, "sliding_window": False}
    return config | {"rope_scaling": scaling}


def generation_json(kind: Format, model: Exported) -> dict[str, Any]:
    """The export's generation_config.json, with all end tokens. RND1's loader reads the mask token from it."""
    ends: dict[str, Any] = {}
    if model.ends.ids:
        ends["eos_token_id"] = model.ends.ids[0] if len(model.ends.ids) == 1 else list(model.ends.ids)
    if is_autoregressive(kind):
        return model.source_generation | ends
    family = family_of_format(kind)
    came_so = (
        family is not None and public_form.is_public_form(family) and public_form.came_in_form(model.source, family)
    )
    if came_so and model.source_generation:  # Dream's class fails without the file
        return model.source_generation
    tokens = _special_tokens(model, first_only=kind == "rnd1")
    if kind == "rnd1":
        del tokens["bos_token_id"]
    return {name: value for name, value in (tokens | ends).items() if value is not None} | {
        "mask_token_id": model.model_config.mask_token_id,
        "num_diffusion_steps": num_diffusion_steps(model.source),
        "use_cache": False,
    }


def num_diffusion_steps(config: Mapping[str, Any]) -> int:
    """The default number of denoising steps: config.json's, else RND1's."""
    value = config.get("num_diffusion_steps")
    return value if type(value) is int and value > 0 else NUM_DIFFUSION_STEPS


def _training(kind: Format, model: Exported) -> dict[str, Any]:
    """The training settings that converting the export back needs (training_facts.py); none for a causal model."""
    trained = model.trained
    if is_autoregressive(kind) and not trained.is_diffusion:
        return {}
    facts = {name: value for name, value in trained.as_exported().items() if name in _RECORDED or value != _NONE[name]}
    if is_autoregressive(kind):
        facts["mask_token_id"] = model.model_config.mask_token_id
    return facts


def _shape(a: ModelConfig, family: Family) -> dict[str, Any]:
    shape: dict[str, Any] = {
        "vocab_size": a.vocab_size,
        "hidden_size": a.hidden_size,
        "num_hidden_layers": a.num_layers,
        "num_attention_heads": a.num_attention_heads,
        "num_key_value_heads": a.num_key_value_heads,
        "head_dim": a.head_dim,
        "intermediate_size": a.intermediate_size,
        "max_position_embeddings": a.max_position_embeddings,
        "initializer_range": a.initializer_range,
        "rms_norm_eps": a.rms_norm_eps,
        "rope_theta": a.rope_theta,
        "tie_word_embeddings": a.tie_word_embeddings,
    } | {key: value for key, value in family.fixed.items() if a.is_moe or key not in _OF_EXPERTS}
    if family.add_qkv_bias is None and a.add_qkv_bias:
        shape["add_qkv_bias"] = True
    if family.qk_layernorm is None and not a.qk_layernorm:
        shape["qk_layernorm"] = False
    if a.is_moe:
        shape |= {
            "num_experts": a.num_experts,
            "num_experts_per_tok": a.num_experts_per_tok,
            "moe_intermediate_size": a.moe_intermediate_size,
            "norm_topk_prob": a.norm_topk_prob,
        }
    return shape


def _settings(a: ModelConfig, family: Family) -> dict[str, Any]:
    """The settings that vary within a family of published diffusion models."""
    shape = {name: value for name, value in _shape(a, family).items() if name not in family.fixed}
    if family.heads_fill_hidden:
        del shape["head_dim"]
    if family.norm_topk_prob is not None:
        shape.pop("norm_topk_prob", None)
    if family.add_qkv_bias is None:
        shape["add_qkv_bias"] = a.add_qkv_bias
    if family.qk_layernorm is None:
        shape["qk_layernorm"] = a.qk_layernorm
    if "rope_scaling" not in family.fixed:
        shape["rope_scaling"] = a.rope_scaling.to_rope_scaling() if a.rope_scaling else None
    return shape


def _special_tokens(model: Exported, first_only: bool) -> dict[str, Any]:
    """bos, eos and pad ids: from config.json, else from generation_config.json. pad defaults to eos."""
    result: dict[str, Any] = {}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = model.source.get(key)
        value = model.source_generation.get(key) if value is None else value
        if value is None and key == "pad_token_id":
            value = result["eos_token_id"]
        if isinstance(value, list) and (first_only or key == "pad_token_id"):
            value = value[0] if value else None
        result[key] = value
    return result
