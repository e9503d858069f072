"""Configuration of an RND1 model (Radical Numerics, 2025): that of an A2D mixture of experts, named "rnd1".

Sizes come from config.json; missing ones default to those of RND1-Base (Qwen3-30B-A3B).
"""

from __future__ import annotations

from typing import Any

from .configuration_a2d import A2DConfig

_RND1_BASE: dict[str, Any] = {
    "vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32,
    "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 6144, "moe_intermediate_size": 768,
    "num_experts_per_tok": 8, "norm_topk_prob": True, "mask_token_id": 151669,
}  # fmt: skip


class RND1Config(A2DConfig):
    """An `A2DConfig` that is always a mixture of experts."""

    model_type = "rnd1"

    def __init__(self, **kwargs: Any):
        values = {**_RND1_BASE, **kwargs}
        if not (values.get("num_experts") or values.get("num_local_experts")):
            values["num_experts"] = 128
        super().__init__(**values)

    def to_dict(self) -> dict[str, Any]:
        # The published name of the architecture, which other tools look up; save_pretrained would write the
        # class name.
        return {**super().to_dict(), "architectures": ["RND1"]}


RND1Config.register_for_auto_class()
