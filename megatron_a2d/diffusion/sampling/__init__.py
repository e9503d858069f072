"""Sampling, pure, over any `Model` (diffusion/forward.py): `denoise` fills the holes of a `Canvas`.

loop.py         forward, score, decide
../sampling_options.py   samplers and their settings, without torch
schedules.py    how much a forward decides, and blocks
scores.py       temperature, filters, guidance, entropy, draws
selection.py    which positions a forward decides
endings.py      when a text has ended
randomness.py   seeds
"""

from megatron_a2d.diffusion.sampling.canvas import Canvas, make_canvas
from megatron_a2d.diffusion.sampling.endings import kept_positions
from megatron_a2d.diffusion.sampling.loop import OnStep, Sampled, denoise
from megatron_a2d.diffusion.sampling.randomness import row_seed
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
