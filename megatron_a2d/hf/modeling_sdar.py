"""SDAR models, dense and mixtures of experts, under their public class names: A2D models in blocks."""

from __future__ import annotations

from .configuration_a2d import A2DConfig
from .configuration_sdar import SDARConfig, SDARMoeConfig
from .generation_a2d import DiffusionGeneration
from .kv_cache_a2d import KeyValueCache
from .modeling_a2d import A2DForMaskedLM, A2DModel

# Imported here because transformers 4 copies only the files that this one imports directly.
__all__ = [
    "A2DConfig",
    "DiffusionGeneration",
    "KeyValueCache",
    "SDARForCausalLM",
    "SDARModel",
    "SDARMoeForCausalLM",
    "SDARMoeModel",
]


class SDARModel(A2DModel):
    """Token ids to hidden states, without the LM head."""

    config_class = SDARConfig


class SDARForCausalLM(A2DForMaskedLM):
    """The diffusion language model; the logits at position i predict position i."""

    config_class = SDARConfig
    base_class = SDARModel


class SDARMoeModel(A2DModel):
    """Token ids to hidden states of a mixture of experts, without the LM head."""

    config_class = SDARMoeConfig


class SDARMoeForCausalLM(A2DForMaskedLM):
    """The diffusion language model as a mixture of experts; the logits at position i predict position i."""

    config_class = SDARMoeConfig
    base_class = SDARMoeModel


for base in (SDARModel, SDARMoeModel):
    base.register_for_auto_class("AutoModel")
for model in (SDARForCausalLM, SDARMoeForCausalLM):
    model.register_for_auto_class("AutoModelForCausalLM")
