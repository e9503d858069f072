"""The training loop itself as a job of the pool, undisturbed or with faults."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import itertools
import logging
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from megatron_a2d import megatron_compat
from megatron_a2d.checkpoint import async_writer
from megatron_a2d.checkpoint.directory import iteration_of, latest_iteration
from megatron_a2d.checkpoint.placement_file import find_placement
from megatron_a2d.config.model_config import read_model_config
from megatron_a2d.config.settings import build
from megatron_a2d.distributed import process_groups
from megatron_a2d.training import checkpointing, train_loop, train_step
from megatron_a2d.training.resume import find_start
from megatron_a2d.training.train_state import TrainState
from megatron_a2d.utils.errors import SaveError
from tests.parity.parity_jobs import SETTINGS
from tests.unpickling import nothing_unpickled


def run(settings: dict[str, Any], **faults: Any) -> dict[str, Any]:
    """Train by `settings` with the `faults` that `Faults` describes; losses, where it began and how it ended."""
    megatron_compat.install()
    config = build(SETTINGS | settings)
    process_groups.initialize(config.parallel)
    start, weights_only = process_groups.from_first_rank(find_start(config) if dist.get_rank() == 0 else None)
    model_config = read_model_config(start / "hf")
    placement = find_placement(config, model_config, start)
    result: dict[str, Any] = {"start": 0 if weights_only else iteration_of(start)}
    disturbed = Faults(save=config.training.save, **faults)
    try:
        with disturbed.installed():
            state, exit_code = train_loop.train(config, model_config, start, weights_only, placement)
    except SaveError as error:
        return {**result, "losses": disturbed.losses, "error": str(error), "partials": disturbed.partials}
    except _StoppedError:
        return {**result, "losses": disturbed.losses}
    return {
        **result,
        **_fingerprints(state),
        "losses": disturbed.losses,
        "iteration": state.iteration,
        "newest_when_released": disturbed.newest,
        "exit_code": exit_code,
    }


def command(module: str, arguments: list[str]) -> None:
    """`python -m MODULE ARGUMENTS` in this process, which outlives it."""
    with mock.patch.object(process_groups, "finalize"), mock.patch.object(logging, "disable"):
        importlib.import_module(module).main(arguments)


def guarded(module: str, arguments: list[str]) -> None:
    """`command` where whatever would unpickle raises."""
    with nothing_unpickled():
        command(module, arguments)


@dataclass
class Faults:
    """What is done to a run, and what is seen of it.

    stop_at: end after that step as if the process had been stopped there. finish_saves: with stop_at, wait for a save in
    the background first. poison: steps of this process in which the last rank's loss is not a number. signal_at: (step,
    rank, signal) sent in the middle of a step. unwritable: a directory in the place of this file keeps every checkpoint
    from being written. hold_writer: (file, step): chunks are written when the file is there, which the first rank makes
    before that step. kill_writer: the rank whose first writing process gets SIGKILL. spikes: numbers of the logged
    losses, counted from 1, that are spikes.
    """

    save: str | None
    stop_at: int | None = None
    finish_saves: bool = False
    poison: tuple[int, ...] = ()
    signal_at: tuple[int, int, int] | None = None
    unwritable: str | None = None
    hold_writer: tuple[str, int] | None = None
    kill_writer: int | None = None
    spikes: tuple[int, ...] = ()
    losses: list[float] = field(default_factory=list)
    newest: list[int | None] = field(default_factory=list)
    partials: list[int] = field(default_factory=list)  # partial directories there are when a save begins, its own too
    _managers: list[Any] = field(default_factory=list)
    _num_saves: int = 0
    _originals: dict[str, Any] = field(default_factory=dict)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        replacements = [
            (train_loop, "train_step", self._train_step), (train_loop, "CheckpointManager", self._remember_manager),
            (checkpointing, "CheckpointWriter", self._count_save), (async_writer, "_write", self._write),
            (checkpointing, "_make_room", self._make_room), (train_loop, "SpikeDetector", self._spike_detector),
        ]  # fmt: skip
        with contextlib.ExitStack() as stack:
            for owner, name, replacement in replacements:
                self._originals[name] = getattr(owner, name)
                stack.enter_context(mock.patch.object(owner, name, replacement))
            yield

    def _train_step(self, *arguments: Any) -> Any:
        number = len(self.losses) + 1
        if number - 1 == self.stop_at:
            if self.finish_saves:
                self._managers[-1].finish(last=False)
            raise _StoppedError
        if self.hold_writer and self.hold_writer[1] == number and dist.get_rank() == 0:
            self.newest.append(latest_iteration(str(self.save)))
            Path(self.hold_writer[0]).touch()
        if self.signal_at and self.signal_at[:2] == (number, dist.get_rank()):
            os.kill(os.getpid(), self.signal_at[2])
        with _poisoned(number in self.poison and dist.get_rank() == dist.get_world_size() - 1):
            result = self._originals["train_step"](*arguments)
        totals = result.totals.clone()
        dist.all_reduce(totals)
        self.losses.append(float(totals[0] / totals[4]))
        return result

    def _spike_detector(self) -> Any:
        if not self.spikes:
            return self._originals["SpikeDetector"]()
        numbers = itertools.count(1)
        return SimpleNamespace(is_spike=lambda loss: next(numbers) in self.spikes)

    def _remember_manager(self, *arguments: Any) -> Any:
        self._managers.append(self._originals["CheckpointManager"](*arguments))
        return self._managers[-1]

    def _count_save(self, *arguments: Any) -> Any:
        self._num_saves += 1
        return self._originals["CheckpointWriter"](*arguments)

    def _write(self, *arguments: Any) -> Any:
        if self.kill_writer == dist.get_rank() and self._num_saves <= 1:  # forked before the first save, or for it
            os.kill(os.getpid(), signal.SIGKILL)
        while self.hold_writer and not Path(self.hold_writer[0]).exists():
            time.sleep(0.01)
        return self._originals["_write"](*arguments)

    def _make_room(self, root: Path, partial: Path) -> None:
        self._originals["_make_room"](root, partial)
        self.partials.append(len(list(root.glob(".iter_*"))))
        if self.unwritable:
            (partial / self.unwritable).mkdir()


@contextlib.contextmanager
def _poisoned(active: bool) -> Iterator[None]:
    """Every loss of this process is not a number."""
    original = train_step._loss

    def poisoned(*arguments: Any) -> Any:
        *before, rows = arguments
        return original(*before, rows._replace(losses=rows.losses * float("nan")))

    with mock.patch.object(train_step, "_loss", poisoned if active else original):
        yield


def _fingerprints(state: TrainState) -> dict[str, str]:
    """Of this rank's weights, and of its optimizer: every bit counts."""
    weights, moments = hashlib.sha256(), hashlib.sha256()
    for parameter in (parameter for model in state.models for parameter in model.parameters()):
        weights.update(_bits(parameter))
    for optimizer in state.optimizer.chained_optimizers:
        for group in optimizer.param_groups:
            moments.update(repr((group["lr"], group.get("step"), group["weight_decay"])).encode())
            for parameter in group["params"]:
                for name, value in sorted(optimizer.optimizer.state[parameter].items()):
                    moments.update(name.encode() + _bits(value))
    return {"weights": weights.hexdigest(), "optimizer": moments.hexdigest()}


def _bits(tensor: torch.Tensor) -> bytes:
    if not tensor.dim():
        return repr(tensor).encode()
    values = tensor.dequantize() if hasattr(tensor, "_quantizer") else tensor  # Transformer Engine's, in FP8
    return values.detach().contiguous().view(torch.uint8).numpy().tobytes()


class _StoppedError(Exception):
    """Stands for the end of the process."""
