"""Flags shared by generate and evaluate (sampling, parallel layout), and the model they load."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_a2d.checkpoint.directory import check_directory, check_hf_directory, is_checkpoint, resolve
from megatron_a2d.checkpoint.training_facts import read_trained
from megatron_a2d.config.settings import flag
from megatron_a2d.diffusion.sampling_options import SAMPLERS, SELF_SPECULATIVE, SamplingOptions, SamplingOptionsError
from megatron_a2d.families.registry import autoregressive_types, is_diffusion_family, read_config
from megatron_a2d.utils.errors import UserError

if TYPE_CHECKING:
    from megatron_a2d.inference.loaded_model import LoadedModel

# The settings (config/settings.py) of a parallel layout for sampling and evaluation.
LAYOUT = (
    "tensor_model_parallel_size", "sequence_parallel", "pipeline_model_parallel_size", "expert_model_parallel_size",
    "expert_tensor_parallel_size", "moe_token_dispatcher_type", "bf16", "transformer_impl",
)  # fmt: skip
LAYOUT_HELP = {"bf16": "run a checkpoint's model in bfloat16; otherwise in fp32"}
TEMPERATURE = 0.1  # by default, as RND1's
# Sampling setting (its flag has the same name) -> help.
SAMPLING = {
    "sampler": "tokens unmasked per step; rnd1: lowest entropy first, on a fixed schedule; confidence: highest "
    "probability first (low-confidence remasking); eb: entropy-bounded; threshold: all above a probability; "
    "entropy, maskgit_plus, topk_margin: Dream's `alg`s, on its schedule; "
    "self_speculative: autoregressive decoding of drafted blocks, for models trained with --ar-loss-weight",
    "num_steps": "denoising steps, at most; with blocks at least one per block (default: the model's "
    "num_diffusion_steps)",
    "gamma": "sampler eb: entropy bound per step, nats",
    "threshold": "sampler threshold: probability above which a token is unmasked",
    "block_length": "fill holes from left to right in blocks of N tokens (semi-autoregressive); 0: all at once",
    "cache": "with blocks: KV cache of the tokens before the block (prefix) or around it (dual); approximate, but for "
    "block diffusion models prefix is exact, and the default",
    "remask": "share of a block's decided tokens that each step masks again, least certain first; 0: none",
    "temperature": "0: always the most likely token (default: {temperature:g})",
    "top_k": "sample from the K most likely tokens; 0: all",
    "top_p": "sample from the most likely tokens with total probability P",
    "greedy": "take the most likely token; the temperature then only affects the order by entropy",
    "cfg_scale": "classifier-free guidance scale; 0: off",
}


def add_sampling_flags(group: Any, temperature: float = TEMPERATURE) -> None:
    """Add a flag per setting of SAMPLING; only those given on the command line are set. `temperature`: the default."""
    choices = {
        "sampler": SAMPLERS, "cache": ("none", "prefix", "dual"),
    }  # fmt: skip
    whole = ("num_steps", "block_length", "top_k")
    for name, text in SAMPLING.items():
        kind: dict[str, Any] = {"type": int if name in whole else float, "metavar": "N" if name in whole else "X"}
        if name in choices:
            kind = {"choices": choices[name]}
        elif name == "greedy":
            kind = {"action": "store_true"}
        group.add_argument(flag(name), help=text.format(temperature=temperature), default=argparse.SUPPRESS, **kind)


def sampling_options(options: argparse.Namespace, loaded: LoadedModel, **defaults: Any) -> SamplingOptions:
    """The sampling options from the flags; UserError if they conflict with each other or with the model."""
    given = {name: getattr(options, name) for name in SAMPLING if hasattr(options, name)}
    if loaded.block_length:
        if given.get("block_length", loaded.block_length) != loaded.block_length:
            raise UserError(
                f"--block-length {given['block_length']}: the model was trained in blocks of {loaded.block_length}; "
                "give that, or leave the flag out"
            )
        given |= {"block_length": loaded.block_length, "aligned_blocks": True}
        defaults = {"cache": "prefix", **defaults}
    try:
        chosen = SamplingOptions(
            **{"temperature": TEMPERATURE, "num_steps": loaded.num_diffusion_steps, **defaults, **given}
        )
    except SamplingOptionsError as error:
        raise UserError(error.lines(flag)) from None
    if chosen.cache != "none" and not loaded.has_caches:
        raise UserError(f"--cache {chosen.cache}: needs an exported model, and this is a checkpoint; export it")
    if chosen.sampler == "self_speculative" and not loaded.causal_context:
        raise UserError(
            f"--sampler {chosen.sampler}: needs a block diffusion model with an autoregressive co-loss (trained with "
            f"--objective block and --ar-loss-weight above 0), which {loaded.name} is not; choose another sampler"
        )
    scheduled = tuple(sampler for sampler in SAMPLERS if sampler != SELF_SPECULATIVE)
    meaning = {"gamma": ("eb",), "threshold": ("threshold",), "num_steps": scheduled}
    for name, samplers in meaning.items():
        if name in given and chosen.sampler not in samplers:
            raise UserError(f"{flag(name)} {given[name]}: has no effect with --sampler {chosen.sampler}; remove it")
    return chosen


def check_model(directory: str, layout: dict[str, Any]) -> None:
    """Checks before torch's slow import. UserError if this is not a model, or for layout flags with an export."""
    path, where = Path(directory), f"--model {directory}"
    check_directory(path, where, "give one that export_hf wrote, or a checkpoint")
    if is_checkpoint(path):
        resolve(path, "--model")
    elif layout:
        raise UserError(f"{flag(next(iter(layout)))}: needs a checkpoint; an exported model runs in one process")
    else:
        check_hf_directory(path, where)


def own_objective(directory: str) -> str:
    """ar for a model of an autoregressive class and a checkpoint trained as one, else mdlm. UserError if unreadable."""
    path = Path(directory)
    if is_checkpoint(path):
        return "ar" if read_trained(resolve(path)).objective == "ar" else "mdlm"
    config = read_config(path)
    return "ar" if config.get("model_type") in autoregressive_types() and not is_diffusion_family(config) else "mdlm"


def load_model(directory: str, layout: dict[str, Any], objective: str = "mdlm") -> LoadedModel:
    """Load an HF model, or a checkpoint over torchrun's processes with the settings `layout` (names of LAYOUT)."""
    check_model(directory, layout)
    if is_checkpoint(Path(directory)):
        from megatron_a2d.inference.parallel_model import load_parallel_model

        return load_parallel_model(directory, layout, objective)
    from megatron_a2d.inference.hf_model import load_hf_model

    return load_hf_model(directory, objective)


def close_model() -> None:
    """Destroy the process group of a parallel model, if there is one."""
    if "megatron_a2d.distributed.process_groups" in sys.modules:
        sys.modules["megatron_a2d.distributed.process_groups"].finalize()
