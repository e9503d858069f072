"""Start or resume: the checkpoint that a run starts from, and which settings a resumed run may change.

A resumed run must be the run that was stopped. Its settings are of three kinds:

fixed      what determines samples and noise (seed, seq_length, reset_attention_mask, reset_position_ids,
           random_length_prob, eod_mask_loss, the schedule of batch sizes, and the tokens: train_data_fingerprint), the
           objective (all diffusion settings), the dtype (bf16), and which optimizer has state for which parameter
           (optimizer, muon_router): another value is an error.
reported   the settings of the optimizer and of load balancing, FP8 or FP4 and the layers that are kept in bf16, forced
           load balancing, and the run's length may change; the log says so. If a role was frozen (--lr-mult ROLE=0) and
           no longer is, its moments start at zero: the checkpoint has none.
free       the layout, micro_batch_size, intervals, paths, workers, what is verified.

Samples that the checkpoint's run skipped (--skip-samples) stay skipped; later ones may be added.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from megatron_a2d.checkpoint.directory import (
    directory_name,
    iteration_of,
    latest_iteration,
    list_iterations,
    read_run_settings,
    resolve,
)
from megatron_a2d.checkpoint.manifest import MANIFEST, check_manifest
from megatron_a2d.checkpoint.training_facts import contradictions, read_trained
from megatron_a2d.config.balancing_config import BalancingConfig
from megatron_a2d.config.optimization_config import OptimizationConfig
from megatron_a2d.config.settings import (
    ALTERNATIVES,
    DataConfig,
    DiffusionConfig,
    RunConfig,
    TrainingConfig,
    flag,
)
from megatron_a2d.config.skipped_samples import SkippedSamples
from megatron_a2d.config.validate import NO_START
from megatron_a2d.utils.errors import UserError

# Skipped samples may be added if they are still ahead (`with_skipped`).
_FREE = {"train_data_path", "valid_data_path", "data_mixture", "verify_tokenizer", "num_workers", "skip_samples"}
FIXED = (
    "global_batch_size", "rampup_batch_size", "batch_schedule", "bf16", "optimizer", "muon_router",
    *(
        item.name
        for group in (DataConfig, DiffusionConfig)
        for item in dataclasses.fields(group)
        if item.name not in _FREE
    ),
)  # fmt: skip
# The run's length is that of the learning rate's decay.
REPORTED = (
    "train_iters", "train_samples", "train_tokens", "fp8_recipe", "fp4_recipe", "fp8_output_proj",
    "first_last_layers_bf16", "num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16",
    "moe_router_force_load_balancing",
    *(
        item.name
        for group in (OptimizationConfig, BalancingConfig)
        for item in dataclasses.fields(group)
        if item.name not in FIXED
    ),
)  # fmt: skip


class Start(NamedTuple):
    """An iteration's directory, and whether only its weights are taken."""

    directory: Path
    weights_only: bool


def find_start(config: RunConfig, report: Callable[[str], None] = lambda line: None) -> Start:
    """The checkpoint that a run starts from: the newest intact one in --save, or else --load.

    `report` receives a line for each damaged checkpoint that is skipped. A checkpoint that --ckpt-step or --load names
    must be intact. UserError if there is none, or if a fixed setting differs from `config`. Reads the candidates' files
    completely: one rank does it and sends the others the result.
    """
    training = config.training
    if own := list_iterations(training.save) if training.save else []:
        start = Start(_find_in_save(config, own, report), weights_only=False)
    elif training.load:
        start = _find_in_load(config, report)
    else:
        raise UserError(NO_START)
    if not start.weights_only:
        if problems := differences(config, start.directory):
            raise UserError(problems)
        for name, was, now in _changes(config, start.directory, REPORTED):
            if name in ALTERNATIVES[0] and getattr(config.training, name) is None:
                continue  # the length is now given by another setting, which is reported
            if name in ALTERNATIVES[0] and was == str(None):
                was = _recorded_length(start.directory)
            iteration = iteration_of(start.directory)
            report(f"{flag(name)} {now}: was {was} until iteration {iteration}, and applies from now on")
    return start


def _find_in_save(config: RunConfig, iterations: list[int], report: Callable[[str], None]) -> Path:
    """The directory in --save that the run resumes from: --ckpt-step, or the newest intact one."""
    training = config.training
    assert training.save is not None
    save = Path(training.save)
    if training.ckpt_step is not None:
        directory = _iteration("--save", save, iterations, training.ckpt_step)
        if problems := _damage(directory, training):
            raise UserError(f"{problem}; leave out --ckpt-step {training.ckpt_step}" for problem in problems)
    else:
        directory = _newest_intact(save, iterations, training, report)
    # Until grafting ends, the causal attention that it replaces is read from --load.
    grafts = iteration_of(directory) < config.grafting_iters
    if training.load and grafts and (problems := _damage(resolve(training.load, "--load"), training)):
        raise UserError(f"{problem}; restore the file" for problem in problems)
    return directory


def _newest_intact(save: Path, iterations: list[int], training: TrainingConfig, report: Callable[[str], None]) -> Path:
    """The newest checkpoint in --save, of these iterations, whose files match its manifest."""
    # Without a tracker the run ended before its first one was written. Later iterations were moved away by the user.
    candidates = iterations
    try:
        if (latest := latest_iteration(save)) is None:
            pass
        elif latest in list_iterations(save):
            candidates = [iteration for iteration in iterations if iteration <= latest]
        else:  # it was removed, or a torn write has cut the number
            report(f"{save / directory_name(latest)}: is missing")
            candidates = _as_written(save, iterations)
    except UserError as error:  # a torn write: what is intact is known without it
        report(f"{str(error).partition(';')[0]}; the newest intact checkpoint is used")
        candidates = _as_written(save, iterations)
    skipped: list[str] = []
    for iteration in reversed(candidates):
        directory = save / directory_name(iteration)
        problems = _damage(directory, training)
        if not problems:
            return directory
        skipped += problems
        for problem in problems:
            report(f"{problem}; {directory.name} is skipped")
    raise UserError([*skipped, f"--save {save}: contains no intact checkpoint; empty it to start from --load again"])


def _as_written(save: Path, iterations: list[int]) -> list[int]:
    """The directories in the order of writing: after a rollback, later iterations of the abandoned branch are older."""
    return sorted(iterations, key=lambda iteration: ((save / directory_name(iteration)).stat().st_mtime, iteration))


def newest_intact_until(training: TrainingConfig, iteration: int, report: Callable[[str], None]) -> Path | None:
    """The newest intact checkpoint in --save of that iteration or an earlier one; None if there is none."""
    assert training.save is not None
    earlier = [number for number in list_iterations(training.save) if number <= iteration]
    try:
        return _newest_intact(Path(training.save), earlier, training, report) if earlier else None
    except UserError:
        return None


def with_skipped(config: RunConfig, skipped: SkippedSamples, consumed_samples: int) -> RunConfig:
    """`config` with the samples that its checkpoint has `skipped`, too. UserError if it would skip a trained one."""
    try:
        together = skipped.with_more(config.skipped, consumed_samples)
    except ValueError as error:
        iteration = config.batch_sizes.iteration_of(consumed_samples)
        raise UserError(
            f"--skip-samples {' '.join(config.data.skip_samples)}: {error} until iteration {iteration}; skip later "
            "ones, or resume from an earlier checkpoint with --ckpt-step"
        ) from None
    return dataclasses.replace(config, data=dataclasses.replace(config.data, skip_samples=together.texts()))


def _find_in_load(config: RunConfig, report: Callable[[str], None]) -> Start:
    """The checkpoint in --load that the run starts from, or resumes from if it was written in training."""
    training = config.training
    assert training.load is not None
    path = Path(training.load)
    if training.ckpt_step is not None:
        path = _iteration("--load", path, list_iterations(path), training.ckpt_step)
    directory = resolve(path, "--load")
    if problems := _damage(directory, training):
        raise UserError(f"{problem}; restore the file, or use another iteration" for problem in problems)
    is_random = config.diffusion.conversion == "random"  # not even the weights are taken
    weights_only = training.finetune or is_random or iteration_of(directory) == 0
    if weights_only and not is_random:
        _check_weights(config, directory, report)
    return Start(directory, weights_only)


def _check_weights(config: RunConfig, directory: Path, report: Callable[[str], None]) -> None:
    """Report what the weights were trained for if this run trains them for something else.

    Another objective or noise schedule is what such a run is for. Another label shift changes which token a position
    predicts: a UserError, unless --finetune confirms it.
    """
    for line in contradictions(config, read_trained(directory), directory):
        if line.startswith(flag("label_shift")) and not config.training.finetune:
            raise UserError(f"{line}; leave the flag out, or confirm the change with --finetune")
        report(f"{line}; this run changes that")


def differences(config: RunConfig, directory: Path) -> list[str]:
    """A line for each fixed setting in which `config` differs from the run that wrote `directory`."""
    remedy = f"start a new run from its weights: --load {directory} --finetune and another --save"
    lines = []
    for name, was, now in _changes(config, directory, FIXED):
        if name == "train_data_fingerprint":
            source = "train_data_path" if config.data.train_data_path else "data_mixture"
            lines.append(
                f"{flag(source)} {getattr(config.data, source)}: holds other tokens, other weights or another order "
                f"of sources than {directory} was trained on; restore them, or {remedy}"
            )
        else:
            lines.append(f"{flag(name)} {now}: {directory} was trained with {was}; resume with that, or {remedy}")
    return lines


def _changes(config: RunConfig, directory: Path, names: tuple[str, ...]) -> list[tuple[str, str, str]]:
    """(name, value then, value now) where they differ.

    A setting that the checkpoint does not record was added later; the run behaved as with its default.
    """
    recorded = read_run_settings(directory)
    now, defaults = config.to_dict(), RunConfig().to_dict()
    pairs = [(name, recorded.get(name, defaults[name]), now[name]) for name in names]
    return [
        (name, _text(was), _text(value))
        for name, was, value in pairs
        # The fingerprint is empty if it was not recorded, or is not computed yet.
        if was != value and (name != "train_data_fingerprint" or (was and value))
    ]


def _recorded_length(directory: Path) -> str:
    """The length of the run that wrote `directory`, as a flag."""
    recorded = read_run_settings(directory)
    given = {flag(name): recorded[name] for name in ALTERNATIVES[0] if recorded.get(name) is not None}
    return " ".join(f"{name} {value}" for name, value in given.items())


def _iteration(name: str, root: Path, there: list[int], wanted: int) -> Path:
    """The directory of iteration `wanted` in the flag's directory `root`; UserError if it is not there."""
    if wanted not in there:
        held = ", ".join(map(str, there)) or "no iteration"
        raise UserError(f"--ckpt-step {wanted}: {name} {root} contains {held}; choose one of its iterations")
    return root / directory_name(wanted)


def _damage(directory: Path, training: TrainingConfig) -> list[str]:
    """What is wrong with the files of a checkpoint, one line each."""
    if not training.verify_checkpoint and not (directory / MANIFEST).exists():
        return []  # written by another program, and --no-verify-checkpoint is set
    return check_manifest(directory, training.verify_checkpoint)


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key}={factor}" for key, factor in value.items()) or "no factors"
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return str(value).lower() if isinstance(value, bool) else str(value)
