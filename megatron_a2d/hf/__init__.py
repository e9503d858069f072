"""The modelling code that an exported model carries: Qwen3 and Qwen3-MoE with bidirectional attention.

The other files of this folder are copied into an export, where `transformers` loads them with
`trust_remote_code=True`; therefore they import nothing but torch, transformers and one another (relatively).
This one stays here and is cheap to import.
"""

from __future__ import annotations

from pathlib import Path

_A2D = ["configuration_a2d.py", "generation_a2d.py", "modeling_a2d.py"]
_FILES = {"a2d": _A2D, "rnd1": [*_A2D, "configuration_rnd.py", "modeling_rnd.py"]}

# export format -> the files that must lie in the exported directory
TRAVELLING: dict[str, list[Path]] = {
    kind: [Path(__file__).with_name(name) for name in names] for kind, names in _FILES.items()
}
