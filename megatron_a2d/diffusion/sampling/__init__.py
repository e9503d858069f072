"""Sampling from any `Model` (diffusion/model_interface.py): `denoise` fills the holes of a `Canvas`.

sampler.py                the loop: forward, score, unmask; which candidates a forward pass unmasks
batch_state.py            tokens, masks and caches of the batch; the canvas
self_speculation.py       self-speculative decoding
unmask_schedule.py        how many positions each forward pass unmasks, and the blocks
token_scores.py           temperature, filters, guidance, entropies, draws, seeds
early_stop.py             when a sequence's text has ended
../sampling_options.py    the samplers and their settings; imports no torch
"""

from megatron_a2d.diffusion.sampling.batch_state import Canvas, make_canvas
from megatron_a2d.diffusion.sampling.early_stop import kept_positions
from megatron_a2d.diffusion.sampling.sampler import OnStep, Sampled, denoise
from megatron_a2d.diffusion.sampling.token_scores import row_seed
from megatron_a2d.diffusion.sampling.unmask_schedule import most_forward_passes
from megatron_a2d.diffusion.sampling_options import CACHES, SAMPLERS, SamplingOptions

__all__ = [
    "CACHES",
    "SAMPLERS",
    "Canvas",
    "OnStep",
    "Sampled",
    "SamplingOptions",
    "denoise",
    "kept_positions",
    "make_canvas",
    "most_forward_passes",
    "row_seed",
]
