"""Schedule of block lengths over a run (--block-length-schedule, --block-length-schedule-samples).

Blocks of one token are autoregressive, so a run that begins with them and lengthens its blocks leaves the original
model by small steps (LLaDA2.0, 2025; I-DLM). The length is a function of the sample's index, or of its iteration.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from megatron_a2d.config.settings import RunConfig, flag


class Stage(NamedTuple):
    length: int  # tokens per block
    duration: int  # iterations, or samples


@functools.cache
def stages(schedule: str) -> tuple[Stage, ...]:
    """The stages of a schedule "LENGTH:COUNT,..."; ValueError with the part that is wrong."""
    found = []
    for text in schedule.split(",") if schedule else []:
        length, colon, count = (part.strip() for part in text.partition(":"))
        if not (colon and length.isdecimal() and count.isdecimal() and int(length) and int(count)):
            raise ValueError(text.strip())
        found.append(Stage(int(length), int(count)))
    return tuple(found)


def block_length_at(place: int, schedule: str, last_length: int) -> int:
    """Tokens per block in the iteration or sample, counted from 0; `last_length` after the schedule's stages."""
    for stage in stages(schedule):
        if place < stage.duration:
            return stage.length
        place -= stage.duration
    return last_length


def find_block_schedule_problems(config: RunConfig, has_length: bool) -> list[str]:
    """One line for each problem of the run's schedules. `has_length`: the run's number of iterations is known."""
    diffusion = config.diffusion
    if diffusion.block_length_schedule and diffusion.block_length_schedule_samples:
        return ["--block-length-schedule, --block-length-schedule-samples: are two schedules of one run; give one"]
    problems = []
    for name, unit in (("block_length_schedule", "iterations"), ("block_length_schedule_samples", "samples")):
        schedule = getattr(diffusion, name)
        where = f"{flag(name)} {schedule}"
        try:
            found = stages(schedule)
        except ValueError as error:
            problems.append(
                f"{where}: {str(error)!r} is not LENGTH:{unit.upper()}, two positive whole numbers; for example "
                "1:500,4:500"
            )
            continue
        problems += [
            f"{where}: blocks of {stage.length} tokens are longer than --seq-length {config.data.seq_length}"
            for stage in found
            if stage.length > config.data.seq_length
        ]
        total = sum(stage.duration for stage in found)
        if found and has_length and total >= getattr(config, f"num_{unit}"):
            problems.append(
                f"{where}: its {total} {unit} leave none of {config.length} for --block-length "
                f"{diffusion.block_length}; shorten them"
            )
    return problems
