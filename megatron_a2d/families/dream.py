"""Dream-v0 (Ye et al. 2025): Qwen2.5-7B turned into a diffusion model with label shift and its own mask token.

DiffuCoder and Dream-Coder have the same form. Tensors have the standard names.
"""

from __future__ import annotations

from typing import Any

from megatron_a2d.families import qwen2
from megatron_a2d.families.family import Diffusion, Family, ModelType, PublicCode

MASK_TOKEN_ID = 151666


def hub_config(**overrides: Any) -> dict[str, Any]:
    """config.json of Dream-v0-7B, Base and Instruct, in the hub's spelling."""
    own = {
        "architectures": ["DreamModel"],
        "model_type": "Dream",
        "mask_token_id": MASK_TOKEN_ID,
        "pad_token_id": 151643,
        "rope_scaling": None,
        "use_cache": True,
    }
    return qwen2.hub_config("7B") | own | overrides


DREAM = Family(
    title="Dream",
    model_types=(ModelType("Dream", "DreamModel", absent={"num_key_value_heads": 32, "rope_theta": 10000.0}),),
    add_qkv_bias=True,
    qk_layernorm=False,
    fixed=qwen2.QWEN2.fixed,
    diffusion=Diffusion(label_shift=True, mask_token_id=MASK_TOKEN_ID),
    heads_fill_hidden=True,
    export_format="dream",
    code=PublicCode(
        "Dream-org/Dream-v0-Base-7B",
        {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
    ),
    owners=("Dream-org", "apple"),
    published={
        "Dream-v0-7B": hub_config(),
        "Dream-Coder-v0-7B": hub_config(),
        "DiffuCoder-7B": hub_config(),
    },
)
