"""The flags that generation and evaluation share: how to sample, and how a checkpoint is laid out over processes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_a2d.checkpoint.directory import is_checkpoint
from megatron_a2d.config.settings import flag
from megatron_a2d.utils.errors import UserError

if TYPE_CHECKING:
    from megatron_a2d.diffusion.sampling import SamplingOptions
    from megatron_a2d.inference.loaded_model import Opened

# The settings (settings.py) that a layout for sampling and evaluation is made of.
LAYOUT = (
    "tensor_model_parallel_size", "sequence_parallel", "pipeline_model_parallel_size", "expert_model_parallel_size",
    "expert_tensor_parallel_size", "moe_token_dispatcher_type", "bf16", "transformer_impl",
)  # fmt: skip
# Sampling settings that are flags of their own name, and their help.
SAMPLING = {
    "sampler": "rnd1: lowest entropy first, on a fixed schedule; confidence: highest probability first; eb: "
    "entropy-bounded; threshold: all that are sure enough",
    "num_steps": "denoising steps, at most (default: the model's num_diffusion_steps)",
    "gamma": "sampler eb: nats of entropy that a step may decide at once",
    "threshold": "sampler threshold: probability from which a token is decided",
    "block_length": "fill holes in blocks of so many tokens from left to right; 0: all at once",
    "cache": "with blocks: keep keys and values before the block (prefix) or around it (dual); approximate",
    "temperature": "0: always the likeliest token",
    "top_k": "only the K likeliest tokens; 0: all",
    "top_p": "only the likeliest tokens of mass P",
    "greedy": "take the likeliest token; the temperature then only shapes the order",
    "cfg_scale": "classifier-free guidance; 0: none",
}


def add_sampling_flags(group: Any) -> None:
    """A flag for each setting of SAMPLING; only those that are given are set."""
    choices = {"sampler": ("rnd1", "eb", "confidence", "threshold"), "cache": ("none", "prefix", "dual")}
    whole = ("num_steps", "block_length", "top_k")
    for name, text in SAMPLING.items():
        kind: dict[str, Any] = {"type": int if name in whole else float, "metavar": "N" if name in whole else "X"}
        if name in choices:
            kind = {"choices": choices[name]}
        elif name == "greedy":
            kind = {"action": "store_true"}
        group.add_argument(flag(name), help=text, default=argparse.SUPPRESS, **kind)


def sampling_options(options: argparse.Namespace, opened: Opened, **defaults: Any) -> SamplingOptions:
    """The sampler's settings from the flags; UserError for a cache that the model does not have."""
    from megatron_a2d.diffusion.sampling import SamplingOptions

    given = {name: getattr(options, name) for name in SAMPLING if hasattr(options, name)}
    if opened.block_length:
        if given.get("block_length", opened.block_length) != opened.block_length:
            raise UserError(
                f"--block-length {given['block_length']}: the model was trained in blocks of {opened.block_length}; "
                "give that, or leave the flag out"
            )
        given |= {"block_length": opened.block_length, "aligned_blocks": True}
    try:
        chosen = SamplingOptions(**{"temperature": 0.1, "num_steps": opened.num_diffusion_steps, **defaults, **given})
    except ValueError as error:
        raise UserError([flag(problem) for problem in str(error).split("; ")]) from None
    if chosen.cache != "none" and not opened.has_caches:
        raise UserError(f"--cache {chosen.cache}: a model over several processes has no caches; use an export of it")
    meaning = {"gamma": ("eb",), "threshold": ("threshold",)}
    for name, samplers in meaning.items():
        if name in given and chosen.sampler not in samplers:
            raise UserError(f"{flag(name)} {given[name]}: has no effect with --sampler {chosen.sampler}; remove it")
    return chosen


def check_model(directory: str, layout: dict[str, Any]) -> None:
    """What shows without torch, whose import is slow. UserError where nothing is; for a layout of an export."""
    if not Path(directory).is_dir():
        raise UserError(f"--model {directory}: there is no such directory; give one that export_hf wrote")
    if layout and not is_checkpoint(Path(directory)):
        raise UserError(f"{flag(next(iter(layout)))}: only goes with a checkpoint; an export runs in one process")


def open_model(directory: str, layout: dict[str, Any], objective: str = "mdlm") -> Opened:
    """An export, or a checkpoint over the processes of torchrun with the settings `layout` of LAYOUT."""
    check_model(directory, layout)
    if is_checkpoint(Path(directory)):
        from megatron_a2d.inference.parallel_model import open_sharded

        return open_sharded(directory, layout, objective)
    from megatron_a2d.inference.hf_model import open_export

    return open_export(directory, objective)


def close_model() -> None:
    """Leave the process group, if a sharded model had joined one."""
    if "megatron_a2d.distributed.process_groups" in sys.modules:
        sys.modules["megatron_a2d.distributed.process_groups"].finalize()
