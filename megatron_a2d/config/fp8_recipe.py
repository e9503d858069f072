"""Choice of FP8 or FP4 scaling for a GPU: recipe and format, and whether they are emulated.

mxfp8      one scale per block of 32, in hardware on 10.x and 11.x; e4m3 forward and backward
blockwise  one scale per 128 x 128 block of a weight and 1 x 128 of an activation (DeepSeek-V3); e4m3 both
tensorwise one scale per tensor, from its current values; e4m3, gradients e5m2
delayed    one scale per tensor, from its amax history; e4m3, gradients e5m2
nvfp4      FP4 (e2m1) with a scale for each block of 16 and one for the tensor, in hardware from 10.0 on

The limits are Transformer Engine's: it has no MXFP8 GEMMs from compute capability 12.0 on (GeForce Blackwell), and
blockwise GEMMs need CUDA 12.9. With --transformer-impl local a recipe is emulated (model/emulated_layers.py).
"""

from __future__ import annotations

from typing import NamedTuple

from megatron_a2d.config.settings import RunConfig
from megatron_a2d.utils.errors import UserError


class Scaling(NamedTuple):
    """megatron.core's names: TransformerConfig.fp8_recipe and .fp8, or .fp4_recipe and .fp4."""

    recipe: str
    format: str

    @property
    def is_fp8(self) -> bool:
        return self.format != "e2m1"


class Emulation(NamedTuple):
    """A recipe whose products are emulated, and where."""

    recipe: str
    layers_at_start_in_bf16: int = 0
    layers_at_end_in_bf16: int = 0
    head: bool = False

    def of_layer(self, number: int, num_layers: int) -> str | None:
        """The recipe of a layer, counted from 0; None: the layer is kept in bf16."""
        kept = number < self.layers_at_start_in_bf16 or number >= num_layers - self.layers_at_end_in_bf16
        return None if kept else self.recipe

    def __str__(self) -> str:
        return (
            f"precision: {self.recipe} is emulated: operands are rounded as Transformer Engine rounds them, products "
            "summed in fp32; slow, and a study of precision, not of speed"
        )


_FORMATS = {"mxfp8": "e4m3", "blockwise": "e4m3", "tensorwise": "hybrid", "delayed": "hybrid", "nvfp4": "e2m1"}
# Compute capabilities: the first that supports the recipe, and the first that no longer does (None: no limit).
_CAPABILITIES = {
    "mxfp8": ((10, 0), (12, 0)), "blockwise": ((9, 0), None), "tensorwise": ((8, 9), None), "delayed": ((8, 9), None),
    "nvfp4": ((10, 0), None),
}  # fmt: skip
_BLOCKWISE_CUDA = (12, 9)


def chosen_recipe(config: RunConfig) -> str:
    """The value of --fp4-recipe or --fp8-recipe; none: all products are in the parameters' type."""
    performance = config.performance
    return performance.fp8_recipe if performance.fp4_recipe == "none" else performance.fp4_recipe


def emulation_of(config: RunConfig) -> Emulation | None:
    """What is emulated in a run, if anything is."""
    performance, recipe = config.performance, chosen_recipe(config)
    if recipe == "none" or config.training.transformer_impl != "local":
        return None
    ends = (0, 0)
    if performance.first_last_layers_bf16:
        ends = performance.num_layers_at_start_in_bf16, performance.num_layers_at_end_in_bf16
    return Emulation(recipe, *ends, performance.fp8_output_proj)


def engine_scaling(
    config: RunConfig, capability: tuple[int, int] | None, cuda: tuple[int, int] | None = None
) -> Scaling | None:
    """The scaling of Transformer Engine's products in a run; None: they are in bf16, or emulated."""
    return None if emulation_of(config) else choose_scaling(chosen_recipe(config), capability, cuda)


def choose_scaling(
    requested: str, capability: tuple[int, int] | None, cuda: tuple[int, int] | None = None
) -> Scaling | None:
    """The scaling of --fp8-recipe or --fp4-recipe on a GPU of this compute capability (None: no GPU) and CUDA release;
    None: no FP8 or FP4."""
    if requested == "none":
        return None
    name = f"--fp4-recipe {requested}" if requested == "nvfp4" else f"--fp8-recipe {requested}"
    if capability is None:
        raise UserError(f"{name}: this machine has no CUDA device; use none, or emulate it: --transformer-impl local")
    recipe = requested
    if requested == "auto":
        recipe = "mxfp8" if _lacks("mxfp8", capability) is None else "tensorwise"
    if lacking := _lacks(recipe, capability):
        remedy = "use none" if recipe == "nvfp4" or _lacks("tensorwise", capability) else "use auto"
        raise UserError(f"{name}: a GPU of compute capability {_dotted(capability)} {lacking}; {remedy}")
    if recipe == "blockwise" and cuda is not None and cuda < _BLOCKWISE_CUDA:
        raise UserError(f"{name}: needs CUDA {_dotted(_BLOCKWISE_CUDA)}, and torch has {_dotted(cuda)}; use auto")
    return Scaling(recipe, _FORMATS[recipe])


def _lacks(recipe: str, capability: tuple[int, int]) -> str | None:
    least, end = _CAPABILITIES[recipe]
    if capability < least:
        return f"has no {recipe}, which needs {_dotted(least)}"
    if end and capability >= end:
        return f"has no {recipe} in Transformer Engine, which supports it below {_dotted(end)}"
    return None


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
