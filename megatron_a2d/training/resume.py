"""Where a run starts: the checkpoint to take, whether its files are whole, and whether its settings are this run's.

A resumed run must be the run that was stopped. Its settings fall in three kinds:

bound    what decides samples and noise (seed, seq_length, reset_attention_mask, reset_position_ids, random_length_prob,
         eod_mask_loss, global_batch_size, and what the tokens are: train_data_fingerprint), the objective (all
         diffusion settings), and the numbers' type (bf16): another value is an error.
noted    the optimizer's settings, fp8_recipe and the layers that are kept in bf16, routing that is forced to be even,
         and train_iters hold from now on, as the learning rate of a run that is mended must; a change is told. Where a
         role was frozen (--lr-mult ROLE=0) and is not any longer, its moments begin at zero: the checkpoint has none.
free     the layout, micro_batch_size, intervals, paths, workers, what is verified.
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
from megatron_a2d.config.settings import (
    DataConfig,
    DiffusionConfig,
    OptimizationConfig,
    RunConfig,
    flag,
    settings,
)
from megatron_a2d.config.validate import NO_START
from megatron_a2d.utils.errors import UserError

_FREE = {"train_data_path", "valid_data_path", "data_mixture", "verify_tokenizer", "num_workers"}
BOUND = (
    "global_batch_size", "bf16",
    *(
        item.name
        for group in (DataConfig, DiffusionConfig)
        for item in dataclasses.fields(group)
        if item.name not in _FREE
    ),
)  # fmt: skip
# train_iters is the length of the learning rate's decay.
NOTED = (
    "train_iters", "fp8_recipe", "first_last_layers_bf16", "num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16",
    "moe_router_force_load_balancing",
    *(item.name for item in dataclasses.fields(OptimizationConfig)),
)  # fmt: skip


class Start(NamedTuple):
    """An iteration's directory, and whether only its weights are taken."""

    directory: Path
    weights_only: bool


def find_start(config: RunConfig, report: Callable[[str], None] = lambda line: None) -> Start:
    """The checkpoint that a run starts from; one in --save comes before --load.

    In --save the newest whole one is taken, and `report` is told what is wrong with newer ones. A checkpoint that was
    asked for must be whole. UserError when there is none, or when its settings differ from `config`.
    Reads the candidates' files whole: one rank does it and tells the others.
    """
    training = config.training

    def damage(directory: Path) -> list[str]:
        return _damage(directory, training.verify_checkpoint)

    if own := list_iterations(training.save) if training.save else []:
        assert training.save is not None
        directory = _own_start(Path(training.save), own, training.ckpt_step, damage, report)
        weights_only = False
        # Until grafting ends the attention that it replaces is read from --load too.
        grafts = iteration_of(directory) < config.diffusion.grafting_iters
        if training.load and grafts and (problems := damage(resolve(training.load))):
            raise UserError(f"{problem}; restore the file" for problem in problems)
    elif training.load:
        wanted = Path(training.load)
        if training.ckpt_step is not None:
            _need_iteration("--load", wanted, list_iterations(wanted), training.ckpt_step)
            wanted /= directory_name(training.ckpt_step)
        directory = resolve(wanted)
        if problems := damage(directory):
            raise UserError(f"{problem}; restore the file, or use another iteration" for problem in problems)
        # --conversion random takes not even those.
        is_drawn = config.diffusion.conversion == "random"
        weights_only = training.finetune or is_drawn or iteration_of(directory) == 0
        if weights_only and not is_drawn:
            _check_training(config, directory, report)
    else:
        raise UserError(NO_START)
    if not weights_only:
        if problems := differences(config, directory):
            raise UserError(problems)
        for name, was, now in _changes(config, directory, NOTED):
            report(f"{flag(name)} {now}: was {was} until iteration {iteration_of(directory)}, and holds from now on")
    return Start(directory, weights_only)


def _check_training(config: RunConfig, directory: Path, report: Callable[[str], None]) -> None:
    """A new run may teach the weights another objective or schedule, and is told so; that rows stand for other tokens
    than they were trained for is an error unless --finetune says that it is meant."""
    for line in contradictions(config, read_trained(directory), directory):
        if line.startswith(flag("label_shift")) and not config.training.finetune:
            raise UserError(f"{line}; leave the flag out, or teach it the other one with --finetune")
        report(f"{line}, and this run goes on from it otherwise")


def differences(config: RunConfig, directory: Path) -> list[str]:
    """A line for each bound setting in which `config` is not the run that wrote `directory`."""
    remedy = f"start a new run from its weights: --load {directory} --finetune and another --save"
    lines = []
    for name, was, now in _changes(config, directory, BOUND):
        if name == "train_data_fingerprint":
            source = "train_data_path" if config.data.train_data_path else "data_mixture"
            lines.append(
                f"{flag(source)} {getattr(config.data, source)}: holds other tokens, other weights, or its sources in "
                f"another order, than {directory} was trained on; give it what that run had, or {remedy}"
            )
        else:
            lines.append(f"{flag(name)} {now}: {directory} was trained with {was}; resume with that, or {remedy}")
    return lines


def _changes(config: RunConfig, directory: Path, names: tuple[str, ...]) -> list[tuple[str, str, str]]:
    """(name, value then, value now) where they differ.

    A setting that the checkpoint does not know is younger than it and had the default's effect.
    """
    recorded = read_run_settings(directory)
    now = config.to_dict()
    pairs = [(name, recorded.get(name, settings()[name].default), now[name]) for name in names]
    return [
        (name, _text(was), _text(value))
        for name, was, value in pairs
        # The data's fingerprint may be older than the setting, or not looked at yet.
        if was != value and (name != "train_data_fingerprint" or (was and value))
    ]


def _own_start(
    save: Path,
    iterations: list[int],
    wanted: int | None,
    damage: Callable[[Path], list[str]],
    report: Callable[[str], None],
) -> Path:
    """The directory in --save that the run resumes from."""
    if wanted is not None:
        _need_iteration("--save", save, iterations, wanted)
        if problems := damage(save / directory_name(wanted)):
            raise UserError(f"{problem}; leave out --ckpt-step {wanted}" for problem in problems)
        return save / directory_name(wanted)
    latest = latest_iteration(save)
    # Without a tracker the run ended before its first one was written. What lies beyond it was set aside by hand.
    candidates = [iteration for iteration in iterations if latest is None or iteration <= latest]
    if latest is not None and latest not in iterations:
        report(f"{save / directory_name(latest)}: is missing")
    passed_over: list[str] = []
    for iteration in reversed(candidates):
        directory = save / directory_name(iteration)
        problems = damage(directory)
        if not problems:
            return directory
        passed_over += problems
        for problem in problems:
            report(f"{problem}; {directory.name} is passed over")
    raise UserError([*passed_over, f"--save {save}: holds no whole checkpoint; empty it to start from --load again"])


def _need_iteration(name: str, root: Path, there: list[int], wanted: int) -> None:
    if wanted not in there:
        held = ", ".join(map(str, there)) or "no iteration"
        raise UserError(f"--ckpt-step {wanted}: {name} {root} holds {held}; choose one of its iterations")


def _damage(directory: Path, checksums: bool) -> list[str]:
    if not checksums and not (directory / MANIFEST).exists():
        return []  # written by something else; the user has said not to look
    return check_manifest(directory, checksums)


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key}={factor}" for key, factor in value.items()) or "no factors"
    return str(value).lower() if isinstance(value, bool) else str(value)
