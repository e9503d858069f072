"""Sampling, pure, over any `Model` (diffusion/model_interface.py): `denoise` fills the holes of a `Canvas`.

sampler.py         forward, score, decide
../sampling_options.py   samplers and their settings, without torch
unmask_schedule.py    how much a forward decides, and blocks
token_scores.py       temperature, filters, guidance, entropy, draws
sampler.py    which positions a forward decides
early_stop.py      when a text has ended
token_scores.py   seeds
"""

from megatron_a2d.diffusion.sampling.early_stop import kept_positions
from megatron_a2d.diffusion.sampling.sampler import Canvas, OnStep, Sampled, denoise, make_canvas
from megatron_a2d.diffusion.sampling.token_scores import row_seed
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
    "row_seed",
]
