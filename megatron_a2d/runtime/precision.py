"""Which FP8 scaling a GPU gets, and in which format.

mxfp8      a scale for each block of 32, in hardware from Blackwell on; e4m3 both ways
blockwise  a scale for each 128 x 128 block of a weight and 1 x 128 of an activation (DeepSeek-V3); e4m3 both ways
tensorwise a scale for each tensor, from its present values; e4m3, gradients e5m2
delayed    a scale for each tensor, from the history of its largest values; e4m3, gradients e5m2
"""

from __future__ import annotations

from typing import NamedTuple

from megatron_a2d.errors import UserError


class Scaling(NamedTuple):
    """megatron.core's names: TransformerConfig.fp8_recipe and .fp8."""

    recipe: str
    format: str


_FORMATS = {"mxfp8": "e4m3", "blockwise": "e4m3", "tensorwise": "hybrid", "delayed": "hybrid"}
_LEAST_CAPABILITY = {"mxfp8": (10, 0), "blockwise": (9, 0), "tensorwise": (8, 9), "delayed": (8, 9)}


def choose_scaling(wish: str, capability: tuple[int, int] | None) -> Scaling | None:
    """--fp8 for a GPU of this compute capability (None: no GPU); None for "none"."""
    if wish == "none":
        return None
    if capability is None:
        raise UserError(f"--fp8 {wish}: this machine has no CUDA device; use none")
    recipe = wish
    if wish == "auto":
        recipe = "mxfp8" if capability >= (10, 0) else "tensorwise"
    least = _LEAST_CAPABILITY[recipe]
    if capability < least:
        have, need = (".".join(map(str, version)) for version in (capability, least))
        remedy = "use auto" if capability >= (8, 9) else "use none"
        raise UserError(f"--fp8 {wish}: this GPU has compute capability {have}, and {recipe} needs {need}; {remedy}")
    return Scaling(recipe, _FORMATS[recipe])
