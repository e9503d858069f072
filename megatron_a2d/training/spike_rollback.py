"""--on-spike rollback: return to the newest checkpoint from before a loss spike, and skip the samples since then.

PaLM (Chowdhery et al. 2022, section 5.1) got past its spikes in this way, by hand. Here the skipped samples are
a range of indices, so the run after a rollback is exactly one that resumes from there with --skip-samples.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from megatron_a2d.checkpoint.directory import iteration_of
from megatron_a2d.config.settings import RunConfig
from megatron_a2d.config.skipped_samples import Range, SkippedSamples
from megatron_a2d.distributed.process_groups import from_first_rank
from megatron_a2d.training.logger import RunLog
from megatron_a2d.training.resume import newest_intact_until
from megatron_a2d.training.train_state import TrainState


class Rollback(NamedTuple):
    """The checkpoint to return to, the samples to skip, and the number of rollbacks, this one included."""

    start: Path
    samples: Range
    number: int

    def applied_to(self, config: RunConfig) -> RunConfig:
        """The run's settings from now on."""
        skipped = SkippedSamples.of([*config.skipped.ranges, self.samples])
        return dataclasses.replace(config, data=dataclasses.replace(config.data, skip_samples=skipped.texts()))


def find_rollback(config: RunConfig, state: TrainState, before: int, log: RunLog) -> Rollback | None:
    """The rollback for a spike after iteration `before`; None, and a line in the log, if there is none. Collective."""
    training = config.training
    if state.rollbacks >= training.max_rollbacks:
        log.say(f"no rollback: the run has already made {training.max_rollbacks} (--max-rollbacks); it continues")
        return None
    assert training.save is not None
    found = newest_intact_until(training, before, log.say) if dist.get_rank() == 0 else None
    start = from_first_rank(found)
    if start is None:
        log.say(f"no rollback: --save {training.save} holds no intact checkpoint from before; the run continues")
        return None
    samples = state.samples_since(iteration_of(start), config.batch_sizes)
    rollback = Rollback(start, samples, state.rollbacks + 1)
    log.rollback(state.iteration, iteration_of(start), rollback.samples, rollback.number, training.max_rollbacks)
    return rollback
