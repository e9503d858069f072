"""Safe `from_pretrained` for untrusted HF directories: config.json sets the model's shape and nothing else.

transformers takes more than the shape from that file: `attn_implementation` and `experts_implementation` can name
kernels that are fetched from the hub and run; an adapter_config.json next to it loads another model; and weights may be
pickles.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from megatron_a2d.utils.errors import UserError

ADAPTER = "adapter_config.json"
_STEERING = re.compile(r"_implementation|kernel|^extra_|_plan$|quantization|compression|^adapter")


def load(model_class: Any, directory: Path, trust_remote_code: bool = False, **options: Any) -> Any:
    """`model_class.from_pretrained(directory, **options)` with PyTorch's own attention, from safetensors alone.

    Pass `trust_remote_code` only for code that is known to be ours. Raises UserError for an adapter of another model,
    and for files that the library cannot load.
    """
    if (directory / ADAPTER).exists():
        raise UserError(f"{directory}: holds {ADAPTER}, an adapter of another model; merge the two and use the result")
    try:
        return _load(model_class, directory, trust_remote_code, options)
    except Exception as error:  # settings of the wrong type make the library raise all kinds of errors
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{directory}: cannot be loaded ({reason}); fetch or export it again") from error


def diffusion_classes() -> dict[str, Any]:
    """model_type of an export -> its model class; their import takes seconds."""
    from megatron_a2d.hf.modeling_a2d import A2DForMaskedLM
    from megatron_a2d.hf.modeling_rnd import RND1LM
    from megatron_a2d.hf.modeling_sdar import SDARForCausalLM, SDARMoeForCausalLM

    return {"a2d": A2DForMaskedLM, "rnd1": RND1LM, "sdar": SDARForCausalLM, "sdar_moe": SDARMoeForCausalLM}


def _load(model_class: Any, directory: Path, trust_remote_code: bool, options: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    if own := getattr(model_class, "config_class", None):
        config = own.from_pretrained(directory, local_files_only=True)
    else:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=trust_remote_code)
        options["trust_remote_code"] = trust_remote_code
    for name in [name for name in vars(config) if _STEERING.search(name)]:
        delattr(config, name)
    config._attn_implementation, config._experts_implementation = "sdpa", None
    return model_class.from_pretrained(
        directory, config=config, attn_implementation="sdpa", use_safetensors=True, local_files_only=True, **options
    )
