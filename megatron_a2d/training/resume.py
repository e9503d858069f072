"""Where a run starts: the checkpoint to take, whether its files are whole, and whether its settings are this run's.

A resumed run must be the run that was stopped. Its settings fall in two kinds:

bound   what decides samples and noise (seed, seq_length, document_attention, reset_position_ids, random_length_prob,
        eod_maskable, global_batch_size, and what the tokens are: train_data_fingerprint), the objective
        (all diffusion settings), the numbers' type (bf16), and the optimizer: its state and parameter groups are
        in the checkpoint, with their learning rates, decay and betas, so that new values would silently not count;
        the distributed optimizer stores it in another form (use_distributed_optimizer).
free    the layout, micro_batch_size, intervals, paths, workers; and the future: train_iters and the shape of the
        learning rate's schedule (lr_warmup_iters, lr_decay_style, lr_wsd_decay_iters), which hold from now on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from megatron_a2d.config import DataConfig, DiffusionConfig, OptimizationConfig, RunConfig, flag, settings
from megatron_a2d.conversion.checkpoint import (
    RUN_CONFIG,
    directory_name,
    iteration_of,
    latest_iteration,
    list_iterations,
    resolve,
)
from megatron_a2d.conversion.manifest import MANIFEST, check_manifest
from megatron_a2d.errors import UserError
from megatron_a2d.files import read_json

_FREE = {
    "train_data_path", "valid_data_path", "data_mixture", "num_workers", "lr_warmup_iters", "lr_decay_style",
    "lr_wsd_decay_iters",
}  # fmt: skip
BOUND = (
    "global_batch_size", "bf16", "use_distributed_optimizer",
    *(
        item.name
        for group in (DataConfig, DiffusionConfig, OptimizationConfig)
        for item in dataclasses.fields(group)
        if item.name not in _FREE
    ),
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
        directory = _own_start(Path(training.save), own, training.load_iteration, damage, report)
        weights_only = False
    elif training.load:
        wanted = Path(training.load)
        if training.load_iteration is not None:
            _need_iteration("--load", wanted, list_iterations(wanted), training.load_iteration)
            wanted /= directory_name(training.load_iteration)
        directory = resolve(wanted)
        if problems := damage(directory):
            raise UserError(f"{problem}; restore the file, or use another iteration" for problem in problems)
        weights_only = training.finetune or iteration_of(directory) == 0
    else:
        raise UserError(
            "--load: is missing; give the checkpoint to start from, as python -m checkpoints_tools.convert_hf writes it"
        )
    if not weights_only and (problems := differences(config, directory)):
        raise UserError(problems)
    return Start(directory, weights_only)


def differences(config: RunConfig, directory: Path) -> list[str]:
    """A line for each bound setting in which `config` is not the run that wrote `directory`.

    A setting that the checkpoint does not know is younger than it and had the default's effect.
    """
    recorded = read_json(directory / RUN_CONFIG, "the settings of the run that wrote the checkpoint")
    now = config.to_dict()
    lines = []
    for name in BOUND:
        was = recorded.get(name, settings()[name].default)
        if name == "train_data_fingerprint" and not (was and now[name]):
            continue  # older than the setting, or not looked at yet
        if was != now[name]:
            if name == "train_data_fingerprint":
                lines.append(
                    f"--train-data-path {now['train_data_path'] or now['data_mixture']}: holds other tokens, or other "
                    f"weights, than {directory} was trained on; give it what that run had, or start a new one from its "
                    f"weights: --load {directory} --finetune and another --save"
                )
                continue
            lines.append(
                f"{flag(name)} {_text(now[name])}: {directory} was trained with {_text(was)}; resume with that, or "
                f"start a new run from its weights: --load {directory} --finetune and another --save"
            )
    return lines


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
            raise UserError(f"{problem}; leave out --load-iteration {wanted}" for problem in problems)
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
        raise UserError(f"--load-iteration {wanted}: {name} {root} holds {held}; choose one of its iterations")


def _damage(directory: Path, checksums: bool) -> list[str]:
    if not checksums and not (directory / MANIFEST).exists():
        return []  # written by something else; the user has said not to look
    return check_manifest(directory, checksums)


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key}={factor}" for key, factor in value.items()) or "no factors"
    return str(value).lower() if isinstance(value, bool) else str(value)
