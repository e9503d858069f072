"""Validation of a run's length, batch sizes and learning rate schedule, which are counted in iterations or samples."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_a2d.config.batch_schedule import BatchSchedule
from megatron_a2d.config.settings import ALTERNATIVES, RunConfig, flag


def find_length_problems(config: RunConfig) -> list[str]:
    """Problems that leave the number of iterations, or the batch size of one, undefined."""
    given = [value for name in ALTERNATIVES[0] if (value := getattr(config.training, name)) is not None]
    problems = list(_batch_size_problems(config))
    if not given:
        problems.append("--train-iters: is missing; give it, --train-samples or --train-tokens")
    elif len(given) > 1:
        problems.append(f"{config.length}: are different lengths of one run; give one of them")
    elif given[0] < 1:
        problems.append(f"{config.length}: must be at least 1")
    elif not problems and not config.num_iterations:
        problems.append(
            f"{config.length}: {config.train_samples} samples are less than the first global batch of "
            f"{config.batch_sizes.batch_size_at(0)}; raise it"
        )
    return problems


def _batch_size_problems(config: RunConfig) -> Iterator[str]:
    training = config.training
    ramp, pairs = training.rampup_batch_size, training.batch_schedule
    if training.global_batch_size < 1:
        yield f"--global-batch-size {training.global_batch_size}: must be at least 1"
    elif ramp and pairs:
        yield "--rampup-batch-size, --batch-schedule: are different schedules of one run; give one of them"
    else:
        try:
            _ = config.batch_sizes
        except ValueError as error:
            name, value = ("rampup_batch_size", " ".join(map(str, ramp))) if ramp else ("batch_schedule", pairs[:60])
            yield f"{flag(name)} {value}: {error}"


def find_schedule_problems(config: RunConfig) -> Iterator[str]:
    """Problems of what happens at some iteration or sample. Only for a run without `find_length_problems`."""
    training, optimization = config.training, config.optimization
    counts_samples = config.train_samples is not None
    if training.profile and training.profile_step_end > config.num_iterations:
        yield f"--profile-step-end {training.profile_step_end}: exceeds {_in_iterations(config)}"

    # The phases of the learning rate have the unit of the run's length, as in Megatron.
    unit, other = ("samples", "iters") if counts_samples else ("iters", "samples")
    total, warmup, decay = config.lr_schedule
    warmup_flag, decay_flag = flag(f"lr_warmup_{unit}"), flag(f"lr_wsd_decay_{unit}")
    for name in (f"lr_warmup_{other}", f"lr_wsd_decay_{other}"):
        if value := getattr(optimization, name):
            remedy = "use that, or --train-samples"
            if counts_samples and 0 < value <= config.num_iterations:
                remedy = f"use that, with {_in_samples(config, name, value)}"
            yield f"{flag(name)} {value}: with {config.length} this is {flag(name.replace(other, unit))}; {remedy}"
    if warmup >= max(2, total):
        yield f"{warmup_flag} {warmup}: the warm-up does not end within {config.length}; shorten it"
    if optimization.lr_decay_style == "WSD":
        if not 1 <= decay <= total - warmup:
            yield f"{decay_flag} {decay}: WSD's final decay must be at least 1 and fit into {config.length}"
    elif decay:
        yield f"{decay_flag} {decay}: has no effect with --lr-decay-style {optimization.lr_decay_style}; remove it"


def _in_iterations(config: RunConfig) -> str:
    return (
        config.length if config.train_samples is None else f"the {config.num_iterations} iterations of {config.length}"
    )


def _in_samples(config: RunConfig, name: str, iterations: int) -> int:
    """Samples of a phase of the learning rate that lasts so many iterations."""
    sizes, whole = config.batch_sizes, config.num_iterations
    if name == "lr_warmup_iters":
        return sizes.samples_before(iterations)
    return sizes.samples_before(whole) - sizes.samples_before(whole - iterations)


def changes_batch_size(config: RunConfig) -> bool:
    """Whether the run's iterations have different batch sizes."""
    return not any(_batch_size_problems(config)) and not config.batch_sizes.is_constant


def find_undividable(sizes: BatchSchedule, micro_batch_size: int, dp: int, stages: int) -> list[str]:
    """The first batch size of a schedule that `dp` data-parallel ranks cannot divide: one line, or none.

    `stages`: pipeline stages whose number must divide the number of micro-batches (the interleaved schedule), or 1.
    """
    share = micro_batch_size * dp
    for span in sizes.spans:
        where = f"--global-batch-size {span.batch_size}"
        if not sizes.is_constant:
            where += f", from sample {span.sample} (iteration {span.iteration}) on"
        if span.batch_size % share:
            return [
                f"{where}: is not a multiple of --micro-batch-size {micro_batch_size} x {dp} data-parallel processes; "
                f"use a multiple of {share}"
            ]
        if span.batch_size // share % stages:
            return [
                f"{where}: the interleaved schedule needs a multiple of {stages} micro-batches, not "
                f"{span.batch_size // share}; use a multiple of {share * stages}"
            ]
    return []


def find_odd(sizes: BatchSchedule) -> str:
    """Where a schedule's batch has an odd size, in words; '' if it has none."""
    for span in sizes.spans:
        if span.batch_size % 2:
            place = "" if sizes.is_constant else f" from sample {span.sample} on"
            return f"needs an even --global-batch-size, not {span.batch_size}{place}"
    return ""
