"""Jobs of a study: training runs and measurements, each in its own directory under --out.

A study is a function from the settings of the base run (recipe and flags, any size, any layout) to a list of jobs.
It varies these settings relative to the base and does not depend on the machine: the same plan runs on a laptop's CPU
and, with another recipe and --launcher, on a cluster.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from megatron_a2d.config.settings import RunConfig
from megatron_a2d.utils.errors import UserError

# Seeds of a study's runs: the order of samples and their noise. Validation has a separate seed, the same for all.
FIRST_SEED = 1000
_LENGTHS = ("train_iters", "lr_warmup_iters", "lr_wsd_decay_iters")
BASE = ""  # as `Job.start`: the checkpoint given with --load


class Measure(NamedTuple):
    """A measurement of a checkpoint (measure.py): its kind, and settings that differ from the run's."""

    name: str  # key of its results
    kind: str
    settings: dict[str, Any] = {}  # noqa: RUF012  (never written to)
    options: dict[str, Any] = {}  # noqa: RUF012


class Job(NamedTuple):
    """A training run from `start`, measured at its end; if not `trains`, only measurements of `start` itself."""

    name: str
    tags: dict[str, Any]  # distinguish it from the others: the table's columns
    settings: dict[str, Any]  # override those of the base run
    start: str = BASE  # another job's name
    measures: tuple[Measure, ...] = ()
    trains: bool = True


def resolved(base: RunConfig, job: Job) -> dict[str, Any]:
    """All settings of a job except its paths.

    Every branch starts from the weights of its start with a new optimizer, and is evaluated at its end, so one
    checkpoint is kept.
    """
    return {**base.to_dict(), "finetune": True, "keep_latest_k": base.training.keep_latest_k or 1, **job.settings}


def scaled_batch(base: RunConfig, factor: float, largest: int = 1) -> dict[str, Any]:
    """The settings of the base run at another batch size and the same number of tokens.

    The learning rate scales with the square root of the batch size (for Adam: Malladi et al. 2022; branches as in
    Merrill et al. 2025); warm-up and decay keep their lengths in tokens. The base's iterations (training, warm-up,
    decay, validation) are first rounded to multiples of the `largest` factor of a study, so that all branches see
    exactly the same tokens and are evaluated on the same held-out samples; lengths in samples, to multiples of its
    largest batch. UserError for a fractional batch size.
    """
    training, optimization = base.training, base.optimization
    if training.global_batch_size * factor % 1:
        raise UserError(
            f"--global-batch-size {training.global_batch_size}: the study divides it by {round(1 / factor)}; "
            "use a multiple of that"
        )
    batch = int(training.global_batch_size * factor)

    def scaled(count: int, least: int) -> int:
        return round(max(least, round(count / largest)) * largest / factor)

    def whole(samples: int, least: int) -> int:
        return (
            max(least, round(samples / (training.global_batch_size * largest))) * training.global_batch_size * largest
        )

    lengths: dict[str, Any] = {
        "train_iters": scaled(base.num_iterations, 1),
        "lr_warmup_iters": scaled(optimization.lr_warmup_iters, 0),
        "lr_wsd_decay_iters": scaled(optimization.lr_wsd_decay_iters, 0),
    }
    if base.train_samples is not None:
        lengths = {
            "train_samples": whole(base.train_samples, 1),
            "train_tokens": None,
            "lr_warmup_samples": whole(optimization.lr_warmup_samples, 0),
            "lr_wsd_decay_samples": whole(optimization.lr_wsd_decay_samples, 0),
        }
    values = {
        "global_batch_size": batch,
        "rampup_batch_size": [],
        "batch_schedule": "",
        "micro_batch_size": min(training.micro_batch_size, batch),
        **lengths,
        "lr": optimization.lr * factor**0.5,
        "min_lr": optimization.min_lr * factor**0.5,
        "log_interval": max(1, round(training.log_interval / factor)),
        "save_interval": max(1, round(training.save_interval / factor)),
        "eval_iters": scaled(training.eval_iters, 1),
    }
    assert values.keys() <= base.to_dict().keys()
    return values


def ramped_batch(base: RunConfig, factors: Sequence[float], largest: int = 1) -> dict[str, Any]:
    """The settings of the base run with a batch size that grows by `factors`, each for an equal part of the tokens.

    As many tokens, warm-up and decay as with `scaled_batch`; the learning rate is that of the first factor throughout.
    """
    first, last = (scaled_batch(base, factor, largest) for factor in (factors[0], factors[-1]))
    batch = first["global_batch_size"]
    if base.train_samples is None:
        in_samples = {name.replace("iters", "samples"): first[name] * batch for name in _LENGTHS}
        last |= in_samples | {"train_iters": None, "lr_warmup_iters": 0, "lr_wsd_decay_iters": 0}
    biggest = last["global_batch_size"]
    steps = last["train_samples"] // biggest
    sizes = [scaled_batch(base, factor, largest)["global_batch_size"] for factor in factors]
    begins = [round(number * steps / len(factors)) * biggest for number in range(len(factors))]
    pairs = dict(zip(begins, sizes, strict=True))  # with too few steps the larger of two batches
    schedule = ",".join(f"{begin}:{size}" for begin, size in pairs.items())
    return {**last, "batch_schedule": schedule, "lr": first["lr"], "min_lr": first["min_lr"]}


def optimizer_settings(base: RunConfig, optimizer: str) -> dict[str, Any]:
    """The settings that switch a run to an optimizer; those of Muon are the base's, or at their defaults."""
    if optimizer == base.optimization.optimizer:
        return {}
    defaults = dataclasses.asdict(type(base.optimization)())
    muon = {name: value for name, value in defaults.items() if name.startswith("muon_")}
    return {"optimizer": optimizer} | (muon if optimizer != "muon" else {})


def ar_settings(base: RunConfig) -> dict[str, Any]:
    """The settings that switch a run to the autoregressive objective, with all noise settings at their defaults."""
    defaults = dataclasses.asdict(type(base.diffusion)())
    return {**defaults, "objective": "ar", "moe_aux_loss_tokens": "all"}  # there are no masked tokens to tell apart
