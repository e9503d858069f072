"""Which FP8 scaling a GPU gets, and in which format.

mxfp8      a scale for each block of 32, in hardware of 10.x and 11.x; e4m3 both ways
blockwise  a scale for each 128 x 128 block of a weight and 1 x 128 of an activation (DeepSeek-V3); e4m3 both ways
tensorwise a scale for each tensor, from its present values; e4m3, gradients e5m2
delayed    a scale for each tensor, from the history of its largest values; e4m3, gradients e5m2

What a GPU lacks is what Transformer Engine refuses it: its products of mxfp8 stop at 12.0 (GeForce's Blackwell), those
of blockwise begin with CUDA 12.9.
"""

from __future__ import annotations

from typing import NamedTuple

from megatron_a2d.utils.errors import UserError


class Scaling(NamedTuple):
    """megatron.core's names: TransformerConfig.fp8_recipe and .fp8."""

    recipe: str
    format: str


_FORMATS = {"mxfp8": "e4m3", "blockwise": "e4m3", "tensorwise": "hybrid", "delayed": "hybrid"}
# Compute capabilities: the least, and the first that has it no more.
_CAPABILITIES = {
    "mxfp8": ((10, 0), (12, 0)), "blockwise": ((9, 0), None), "tensorwise": ((8, 9), None), "delayed": ((8, 9), None),
}  # fmt: skip
_BLOCKWISE_CUDA = (12, 9)


def choose_scaling(
    wish: str, capability: tuple[int, int] | None, cuda: tuple[int, int] | None = None
) -> Scaling | None:
    """The scaling of --fp8-recipe on a GPU of this compute capability (None: no GPU) and CUDA release; None: no FP8."""
    if wish == "none":
        return None
    if capability is None:
        raise UserError(f"--fp8-recipe {wish}: this machine has no CUDA device; use none")
    recipe = wish
    if wish == "auto":
        recipe = "mxfp8" if _lacks("mxfp8", capability) is None else "tensorwise"
    if lacking := _lacks(recipe, capability):
        remedy = "use none" if _lacks("tensorwise", capability) else "use auto"
        raise UserError(f"--fp8-recipe {wish}: a GPU of compute capability {_dotted(capability)} {lacking}; {remedy}")
    if recipe == "blockwise" and cuda is not None and cuda < _BLOCKWISE_CUDA:
        raise UserError(
            f"--fp8-recipe {wish}: needs CUDA {_dotted(_BLOCKWISE_CUDA)}, and torch has {_dotted(cuda)}; use auto"
        )
    return Scaling(recipe, _FORMATS[recipe])


def _lacks(recipe: str, capability: tuple[int, int]) -> str | None:
    least, end = _CAPABILITIES[recipe]
    if capability < least:
        return f"has no {recipe}, which needs {_dotted(least)}"
    if end and capability >= end:
        return f"has no {recipe} in Transformer Engine, which has it below {_dotted(end)}"
    return None


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
