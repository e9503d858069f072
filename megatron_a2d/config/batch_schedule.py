"""Schedule of global batch sizes over the samples of a run: constant, Megatron's ramp, or the pairs of a file.

Samples are numbered continuously, whatever the batch: a schedule only says where an iteration ends. An iteration has
the batch size that is due at its first sample, as in Megatron, so iterations and samples determine one another.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from megatron_a2d.utils.atomic_write import read_text
from megatron_a2d.utils.errors import UserError

LARGEST = 1 << 53  # samples that a float counts exactly
MOST_STAGES = 10_000

_PAIRS = re.compile(r"\d+:\d+(,\d+:\d+)*")


class Stage(NamedTuple):
    """Iterations that begin at `first_sample` or later have `batch_size` samples, until the next stage."""

    first_sample: int
    batch_size: int


class Span(NamedTuple):
    """Consecutive iterations of one batch size: where the first of them begins."""

    iteration: int
    sample: int
    batch_size: int


@dataclass(frozen=True)
class BatchSchedule:
    """Batch sizes by stage; iterations and samples count from 0. ValueError for impossible stages."""

    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        if len(self.stages) > MOST_STAGES:
            raise ValueError(f"has {len(self.stages)} batch sizes; at most {MOST_STAGES} are supported")
        for before, stage in zip((None, *self.stages), self.stages, strict=False):
            check_stage(stage, before)

    @functools.cached_property
    def spans(self) -> tuple[Span, ...]:
        """The iterations of each stage, except stages during which no iteration begins."""
        spans: list[Span] = []
        iteration = sample = 0
        for stage, later in itertools.zip_longest(self.stages, self.stages[1:]):
            if later and later.first_sample <= sample:
                continue
            spans.append(Span(iteration, sample, stage.batch_size))
            if later:
                count = -(-(later.first_sample - sample) // stage.batch_size)
                iteration, sample = iteration + count, sample + count * stage.batch_size
        return tuple(spans)

    @property
    def is_constant(self) -> bool:
        return len({span.batch_size for span in self.spans}) == 1

    def batch_size_at(self, sample: int) -> int:
        """Batch size of the iteration that contains the sample."""
        return self._span_of(sample).batch_size

    def iteration_of(self, sample: int) -> int:
        """The iteration that contains the sample."""
        span = self._span_of(sample)
        return span.iteration + (sample - span.sample) // span.batch_size

    def samples_before(self, iteration: int) -> int:
        """Samples of all earlier iterations: the first sample of this one."""
        span = self.spans[bisect_right(self.spans, iteration, key=lambda span: span.iteration) - 1]
        return span.sample + (iteration - span.iteration) * span.batch_size

    def iterations_within(self, samples: int) -> int:
        """Whole iterations of the first `samples` samples."""
        return self.iteration_of(samples)

    def _span_of(self, sample: int) -> Span:
        return self.spans[bisect_right(self.spans, sample, key=lambda span: span.sample) - 1]


def check_stage(stage: Stage, before: Stage | None) -> None:
    """ValueError unless `stage` can follow the stage `before`; None: unless it can be the first."""
    if max(stage) >= LARGEST:
        raise ValueError(f"{max(stage)} is too large; numbers must be below 2**53")
    if stage.batch_size < 1:
        raise ValueError(f"the batch size from sample {stage.first_sample} on must be at least 1")
    if before is None and stage.first_sample:
        raise ValueError(f"begins at sample {stage.first_sample}; the first batch size must be that of sample 0")
    if before and stage.first_sample <= before.first_sample:
        raise ValueError(f"sample {stage.first_sample} does not come after sample {before.first_sample}")


@functools.cache
def batch_schedule(global_batch_size: int, rampup: tuple[int, ...] = (), pairs: str = "") -> BatchSchedule:
    """The schedule of --global-batch-size, --rampup-batch-size and --batch-schedule; ValueError if it is impossible.

    `rampup`: START INCREMENT SAMPLES, or (). `pairs`: as `read_pairs` returns them, or ''.
    """
    if rampup:
        return BatchSchedule(_ramp(global_batch_size, rampup))
    if not pairs:
        return BatchSchedule((Stage(0, global_batch_size),))
    if not _PAIRS.fullmatch(pairs):
        raise ValueError("is neither a file that was read nor SAMPLES:BATCH,... pairs")
    schedule = BatchSchedule(tuple(Stage(*map(int, pair.split(":"))) for pair in pairs.split(",")))
    if (last := schedule.stages[-1].batch_size) != global_batch_size:
        raise ValueError(f"ends with a batch of {last}, --global-batch-size is {global_batch_size}; make them equal")
    return schedule


def _ramp(global_batch_size: int, rampup: tuple[int, ...]) -> tuple[Stage, ...]:
    """Stages of Megatron's RampupBatchsizeNumMicroBatchesCalculator, whose division of floats is repeated here."""
    if len(rampup) != 3:
        raise ValueError("needs three numbers: START INCREMENT SAMPLES")
    start, increment, samples = rampup
    if start < 1 or increment < 1 or samples < 1:
        raise ValueError("START, INCREMENT and SAMPLES must be at least 1")
    if max(global_batch_size, samples) >= LARGEST:
        raise ValueError("numbers must be below 2**53")
    if start >= global_batch_size:
        raise ValueError(f"START must be below --global-batch-size {global_batch_size}")
    count, rest = divmod(global_batch_size - start, increment)
    if rest:
        raise ValueError(f"INCREMENT does not divide the {global_batch_size - start} samples from START to "
                         f"--global-batch-size {global_batch_size}")  # fmt: skip
    if count >= MOST_STAGES:
        raise ValueError(f"has {count} increments; fewer than {MOST_STAGES} are supported")
    per_increment = samples / count
    stages = {0: start}
    for step in range(1, count + 1):
        # Beyond `samples` the batch is full, whatever the division says.
        first = bisect_left(range(samples + 1), step, key=lambda consumed: int(consumed / per_increment))
        stages[first] = start + step * increment  # of several increments at one sample the last one counts
    return tuple(itertools.starmap(Stage, stages.items()))


def read_pairs(given: str) -> str:
    """--batch-schedule: the pairs of a file as "SAMPLES:BATCH,...", or such pairs themselves.

    A line of the file holds two whole numbers, divided by spaces or a comma; empty lines, a line of column names and
    what follows a # are ignored. ValueError names the file's line.
    """
    if not given or (_PAIRS.fullmatch(given) and not os.path.exists(given)):
        return given
    try:
        text = read_text(given, "the schedule")
    except UserError as error:
        raise ValueError(str(error).removeprefix(f"{given}: ")) from None
    stages: list[Stage] = []
    for number, stage in _lines(text):
        try:
            check_stage(stage, stages[-1] if stages else None)
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
        stages.append(stage)
    if not stages:
        raise ValueError("holds no pairs; write lines of the form SAMPLES BATCH")
    if len(stages) > MOST_STAGES:
        raise ValueError(f"holds {len(stages)} pairs; at most {MOST_STAGES} are supported")
    return ",".join(f"{stage.first_sample}:{stage.batch_size}" for stage in stages)


def _lines(text: str) -> Iterator[tuple[int, Stage]]:
    """Line numbers, and the stages of the lines that have one."""
    begun = False
    for number, line in enumerate(text.removeprefix("\ufeff").splitlines(), 1):
        words = line.partition("#")[0].replace(",", " ").split()
        is_header = not begun and not any(character.isdigit() for word in words for character in word)
        begun = begun or bool(words)
        if not words or is_header:
            continue
        numbers = [word.replace("_", "") for word in words]
        if len(numbers) != 2 or not all(word.isascii() and word.isdecimal() and len(word) < 20 for word in numbers):
            raise ValueError(f"line {number}: {line.strip()[:60]!r} is not two whole numbers, SAMPLES BATCH")
        yield number, Stage(int(numbers[0]), int(numbers[1]))
