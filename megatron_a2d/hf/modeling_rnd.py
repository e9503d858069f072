"""The RND1 model under its published class names: an A2D mixture of experts with an `RND1Config`."""

from __future__ import annotations

from .configuration_rnd import RND1Config
from .generation_a2d import DiffusionGeneration
from .kv_cache_a2d import KeyValueCache
from .modeling_a2d import A2DForMaskedLM, A2DModel

# Imported here because transformers 4 copies only the files that this one imports directly.
__all__ = ["RND1LM", "DiffusionGeneration", "KeyValueCache", "RND1Model"]


class RND1Model(A2DModel):
    """Token ids to hidden states, without the LM head."""

    config_class = RND1Config


class RND1LM(A2DForMaskedLM):
    """The diffusion language model; the logits at position i - 1 predict position i."""

    config_class = RND1Config
    base_class = RND1Model


RND1Model.register_for_auto_class("AutoModel")
RND1LM.register_for_auto_class("AutoModelForMaskedLM")
