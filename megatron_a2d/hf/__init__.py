"""Modelling code shipped with exported models: Qwen3, Qwen2.5 and Llama with bidirectional attention, or in blocks.

The files listed below are copied into an export, where `transformers` loads them with `trust_remote_code=True`;
therefore they import nothing but torch, transformers and each other (relatively). This file is not copied, and is
cheap to import. `verify` runs an export's code only if it equals these files byte for byte.
"""

from __future__ import annotations

from pathlib import Path

_A2D = ["configuration_a2d.py", "generation_a2d.py", "kv_cache_a2d.py", "modeling_a2d.py"]
_SDAR = [*_A2D, "configuration_sdar.py", "modeling_sdar.py"]
_FILES = {
    "a2d": _A2D, "rnd1": [*_A2D, "configuration_rnd.py", "modeling_rnd.py"], "sdar": _SDAR, "sdar_moe": _SDAR,
}  # fmt: skip

# export format or model_type -> the Python files copied into the exported directory
CODE_FILES: dict[str, list[Path]] = {
    kind: [Path(__file__).with_name(name) for name in names] for kind, names in _FILES.items()
}
