"""Schedule of block lengths over the iterations of a run (--block-length-schedule).

Blocks of one token are autoregressive, so a run that begins with them and lengthens its blocks leaves the original
model by small steps (LLaDA2.0, 2025; I-DLM). The length is a function of the iteration alone, and so of the sample's
index.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from megatron_a2d.config.settings import RunConfig, flag


class Stage(NamedTuple):
    length: int  # tokens per block
    iterations: int


@functools.cache
def stages(schedule: str) -> tuple[Stage, ...]:
    """The stages of a schedule "LENGTH:ITERATIONS,..."; ValueError with what is wrong with it."""
    found = []
    for text in schedule.split(",") if schedule else []:
        length, colon, iterations = (part.strip() for part in text.partition(":"))
        if not (colon and length.isdecimal() and iterations.isdecimal() and int(length) and int(iterations)):
            raise ValueError(f"{text.strip()!r} is not LENGTH:ITERATIONS, two positive whole numbers")
        found.append(Stage(int(length), int(iterations)))
    return tuple(found)


def block_length_at(iteration: int, schedule: str, last_length: int) -> int:
    """Tokens per block in the iteration, counted from 0; `last_length` after the schedule's stages."""
    for stage in stages(schedule):
        if iteration < stage.iterations:
            return stage.length
        iteration -= stage.iterations
    return last_length


def find_schedule_problems(config: RunConfig) -> list[str]:
    """One line for each problem of the run's schedule."""
    schedule, name = config.diffusion.block_length_schedule, flag("block_length_schedule")
    try:
        found = stages(schedule)
    except ValueError as error:
        return [f"{name} {schedule}: {error}; for example 1:500,4:500"]
    problems = [
        f"{name} {schedule}: blocks of {stage.length} tokens are longer than --seq-length {config.data.seq_length}"
        for stage in found
        if stage.length > config.data.seq_length
    ]
    total = sum(stage.iterations for stage in found)
    if found and total >= config.training.train_iters:
        problems.append(
            f"{name} {schedule}: its {total} iterations leave none of --train-iters {config.training.train_iters} for "
            f"--block-length {config.diffusion.block_length}; shorten them"
        )
    return problems
