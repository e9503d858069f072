"""DiffuLLaMA (Gong et al. 2025): Llama 2 7B turned into a diffusion model with label shift.

Its config.json and tensors are exactly a Llama's. Only its tokenizer distinguishes it: it declares a token
of Llama 2's vocabulary as the mask: texts that contain it can be neither trained on nor prompted with.
"""

from __future__ import annotations

from typing import Any

from megatron_a2d.families import llama
from megatron_a2d.families.family import Diffusion, Family

MASK_TOKEN_ID, MASK_TOKEN = 811, "ти"


def hub_config(**overrides: Any) -> dict[str, Any]:
    """config.json of DiffuLLaMA, in the hub's spelling, and what its tokenizer says of it."""
    own = {"mask_token_id": MASK_TOKEN_ID, "objective": "mdlm"}
    return llama.hub_config("Llama-2-7b") | own | overrides


DIFFULLAMA = Family(
    title="DiffuLLaMA",
    model_types=llama.LLAMA.model_types,
    qk_layernorm=False,
    fixed=llama.LLAMA.fixed,
    diffusion=Diffusion(label_shift=True, mask_token_id=MASK_TOKEN_ID, mask_token=MASK_TOKEN),
    export_format="diffullama",
    owners=("diffusionfamily",),
    published={"diffullama": hub_config()},
)
