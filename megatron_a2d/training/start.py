"""What a run begins with: a checkpoint's state, or drawn weights."""

from __future__ import annotations

from pathlib import Path

from megatron_a2d.architecture import Architecture
from megatron_a2d.config import RunConfig
from megatron_a2d.conversion.checkpoint import iteration_of, resolve
from megatron_a2d.errors import UserError
from megatron_a2d.training.checkpoint import load_checkpoint
from megatron_a2d.training.grafting import Grafting
from megatron_a2d.training.initialise import draw_weights
from megatron_a2d.training.setup import TrainState


def begin(
    state: TrainState, config: RunConfig, architecture: Architecture, directory: Path, weights_only: bool
) -> Grafting:
    """Fill `state` from the checkpoint directory, or, where a run begins by --conversion random, from nothing.

    Returns the stages of --conversion grafting, which every other run has none of. Collective.
    """
    diffusion, source = config.diffusion, config.training.load
    if weights_only and diffusion.conversion == "random":
        draw_weights(state, config.data.seed, architecture.initializer_range)
        return Grafting()
    grafting = Grafting(diffusion.grafting_steps, architecture.num_layers)
    unfinished = grafting.is_active(0 if weights_only else iteration_of(directory))
    if unfinished and not weights_only:
        if not source:
            raise UserError(
                f"--load: is missing; {directory} lies before the end of --grafting-steps {diffusion.grafting_steps}, "
                "which needs the checkpoint that the run started from; give it again"
            )
        load_checkpoint(state, resolve(source), weights_only=True)
        grafting.remember(state)
    load_checkpoint(state, directory, weights_only)
    if unfinished and weights_only:
        grafting.remember(state)
    return grafting
