"""Configuration of an SDAR model (block diffusion without label shift): an A2D model under SDAR's public names.

Serving engines build their own model from this configuration. They read `rope_theta` as an attribute, so it is set here
(classes derived from transformers' Qwen3 lose it under transformers 5), and the length of a block from their command
line: `block_size` is for this code and for people.
"""

from __future__ import annotations

from typing import Any

from .configuration_a2d import A2DConfig


class SDARConfig(A2DConfig):
    """A dense `A2DConfig` in blocks of `block_size` tokens."""

    model_type = "sdar"

    def __init__(self, block_size: int = 4, **kwargs: Any):
        if kwargs.pop("block_length", block_size) != block_size:
            raise ValueError("block_length and block_size are two names of one setting, and they differ")
        if kwargs.pop("label_shift", False):
            raise ValueError("label_shift is true; an SDAR model predicts token i at position i")
        self.block_size = block_size
        super().__init__(block_length=block_size, label_shift=False, **kwargs)


class SDARMoeConfig(SDARConfig):
    """A mixture of experts; the chosen experts' weights are renormalised unless `norm_topk_prob` is false."""

    model_type = "sdar_moe"

    def __init__(self, norm_topk_prob: bool = True, **kwargs: Any):
        super().__init__(norm_topk_prob=norm_topk_prob, **kwargs)


SDARConfig.register_for_auto_class()
SDARMoeConfig.register_for_auto_class()
