"""What a study runs, as data: training runs and measurements, each a directory of its own under --out.

A study is a function from the settings of the base run (recipe and flags, any size, any layout) to a list of jobs.
It varies those settings in proportion and names nothing that depends on the machine: the same plan is run
on a laptop's CPU and, with another recipe and --launcher, on a cluster.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from megatron_a2d.config.settings import RunConfig
from megatron_a2d.utils.errors import UserError

# Seeds of a study's runs: the order of samples and their noise. Validation has a seed of its own, the same for all.
FIRST_SEED = 1000
BASE = ""  # as `Job.start`: the checkpoint that was given with --load


class Measure(NamedTuple):
    """One measurement of a checkpoint (measure.py): its kind, and what differs from the run's own settings."""

    name: str  # the key of its numbers in the results
    kind: str
    settings: dict[str, Any] = {}  # noqa: RUF012  (never written to)
    options: dict[str, Any] = {}  # noqa: RUF012


class Job(NamedTuple):
    """A training run from `start`, measured at its end; without `trains` only the measurements, of `start` itself."""

    name: str
    tags: dict[str, Any]  # what tells it from the others: the columns of the table
    settings: dict[str, Any]  # on top of the base run's
    start: str = BASE  # another job's name
    measures: tuple[Measure, ...] = ()
    trains: bool = True


def resolved(base: RunConfig, job: Job) -> dict[str, Any]:
    """All settings of a job but for its paths.

    Every branch begins with its start's weights and a new optimizer, and is judged at its end: one checkpoint will do.
    """
    return {**base.to_dict(), "finetune": True, "keep_latest_k": base.training.keep_latest_k or 1, **job.settings}


def scaled_batch(base: RunConfig, factor: float, largest: int = 1) -> dict[str, Any]:
    """The settings of the base run at another batch size and equal tokens.

    The learning rate follows the square root of the batch (for Adam: Malladi et al. 2022; so branch Merrill et al.
    2025); warm-up and decay keep their places in tokens. The base's iterations (of training, warm-up, decay,
    validation) are first rounded to multiples of the `largest` factor that a study takes, so that all its branches see
    exactly the same tokens and are judged by the same held-out samples. UserError where a batch would not be whole.
    """
    training, optimization = base.training, base.optimization
    if training.global_batch_size * factor % 1:
        raise UserError(
            f"--global-batch-size {training.global_batch_size}: the study divides it by {round(1 / factor)}; "
            "take a multiple of that"
        )
    batch = int(training.global_batch_size * factor)

    def scaled(count: int, least: int) -> int:
        return round(max(least, round(count / largest)) * largest / factor)

    values = {
        "global_batch_size": batch,
        "micro_batch_size": min(training.micro_batch_size, batch),
        "train_iters": scaled(training.train_iters, 1),
        "lr_warmup_iters": scaled(optimization.lr_warmup_iters, 0),
        "lr_wsd_decay_iters": scaled(optimization.lr_wsd_decay_iters, 0),
        "lr": optimization.lr * factor**0.5,
        "min_lr": optimization.min_lr * factor**0.5,
        "log_interval": max(1, round(training.log_interval / factor)),
        "save_interval": max(1, round(training.save_interval / factor)),
        "eval_iters": scaled(training.eval_iters, 1),
    }
    assert values.keys() <= base.to_dict().keys()
    return values


def ar_settings(base: RunConfig) -> dict[str, Any]:
    """What turns a run's settings into those of the autoregressive objective: noise has no place there."""
    defaults = dataclasses.asdict(type(base.diffusion)())
    return {**defaults, "objective": "ar"}
