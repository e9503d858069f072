"""The description of a model family.

All families are one architecture (Llama's): pre-norm transformer layers of RMS norms, grouped-query attention with
rotary positions, and a SwiGLU MLP or a mixture of such experts. What varies between them is data: below, and for a
single model in its sizes (config/model_config.py). Readers, weight map, layers, planner and exports follow from it.

Names of settings are Hugging Face's (`num_key_value_heads`), as most files of the hub spell them; of what has no key
there, Megatron's (`add_qkv_bias`). Names of tensors: conversion/weight_map.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class ModelType:
    """One kind of model of a family."""

    name: str
    """`model_type` of config.json"""
    architecture: str
    """its model class, which `architectures` of config.json lists"""
    is_moe: bool | None = False
    """a mixture of experts; None: if its config.json has experts"""
    absent: Mapping[str, Any] = field(default_factory=dict)
    """what the class assumes for keys that config.json lacks"""


@dataclass(frozen=True)
class Diffusion:
    """How a family of diffusion models was trained, unless config.json says otherwise."""

    objective: Literal["mdlm", "block"] = "mdlm"
    label_shift: bool = True
    """the logits at position i - 1 predict token i"""
    mask_token_id: int | None = None
    """that of models whose config.json has none"""
    mask_token: str | None = None
    """a token of text that is the mask token, as the tokenizer declares it. Where config.json is an autoregressive
    family's, it tells the models apart (registry.py, `read_config`)"""


@dataclass(frozen=True)
class PublicCode:
    """A family's modelling code on the hub, which exports in its form refer to."""

    repository: str
    auto_map: Mapping[str, str]
    """that of its config.json"""


@dataclass(frozen=True)
class Family:
    """A model family. A setting that is None varies within the family, and is read from config.json."""

    title: str
    model_types: tuple[ModelType, ...]
    add_qkv_bias: bool | None = False
    """biases of queries, keys and values"""
    qk_layernorm: bool | None = True
    """RMS norms of each head's queries and keys, before the rotary embedding"""
    norm_topk_prob: bool | None = None
    """the chosen experts' probabilities are renormalised"""
    keys: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """setting -> its spellings in config.json, where they are not Hugging Face's"""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """keys of config.json of which one value is implemented; null is taken as that value"""
    per_layer: Mapping[str, Any] = field(default_factory=dict)
    """keys of config.json that list a value for each layer, of which one is implemented"""
    tensor_names: Mapping[str, str] = field(default_factory=dict)
    """standard name of a tensor -> the family's; empty: the names are the standard ones"""
    diffusion: Diffusion | None = None
    """None: the models are autoregressive"""
    heads_fill_hidden: bool = False
    """a head's size is the hidden size over the heads, whatever config.json says"""
    export_format: str | None = None
    """`export_hf --format` that writes models of this family; None: there is none"""
    code: PublicCode | None = None
    """None: transformers, or this project, has it"""
    owners: tuple[str, ...] = ()
    """who publishes the family's models on the hub"""
    published: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """name on the hub, without owner and variant -> config.json"""

    def describes(self, add_qkv_bias: bool, qk_layernorm: bool) -> bool:
        """Whether layers of this kind can be those of a model of the family."""
        return self.add_qkv_bias in (None, add_qkv_bias) and self.qk_layernorm in (None, qk_layernorm)

    def type_of(self, is_moe: bool) -> ModelType | None:
        """The kind of the family's dense models, or of its mixtures of experts; None if it has no such models."""
        return next((kind for kind in self.model_types if kind.is_moe in (None, is_moe)), None)
