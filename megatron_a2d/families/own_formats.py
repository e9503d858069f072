"""The forms that export_hf writes diffusion models in, with this project's modelling code: A2D, RND1 and SDAR.

RND1 (Radical Numerics, 2025) and SDAR are also published under these forms: Qwen3 models turned into diffusion models.
"""

from __future__ import annotations

from megatron_a2d.families.family import Diffusion, Family, ModelType
from megatron_a2d.families.qwen3 import QWEN3

# config.json of an `a2d` export says what kind of layers it has; without a word, those of Qwen3.
A2D = Family(
    title="A2D",
    model_types=(
        ModelType("a2d", "A2DForMaskedLM", is_moe=None, absent={"add_qkv_bias": False, "qk_layernorm": True}),
    ),
    add_qkv_bias=None,
    qk_layernorm=None,
    fixed=QWEN3.fixed,
    diffusion=Diffusion(),
    export_format="a2d",
)

RND1 = Family(
    title="RND1",
    # Its class renormalises the chosen experts, unlike Qwen3-MoE's.
    model_types=(
        ModelType(
            "rnd1", "RND1", is_moe=True, absent={"num_key_value_heads": 4, "head_dim": 128, "norm_topk_prob": True}
        ),
    ),
    fixed=QWEN3.fixed,
    diffusion=Diffusion(),
    export_format="rnd1",
)

SDAR = Family(
    title="SDAR",
    model_types=(
        ModelType("sdar", "SDARForCausalLM", absent={"num_key_value_heads": 32, "head_dim": 128}),
        ModelType("sdar_moe", "SDARMoeForCausalLM", is_moe=True),
    ),
    fixed=QWEN3.fixed,
    diffusion=Diffusion(objective="block", label_shift=False),
    export_format="sdar",
)
