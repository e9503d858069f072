"""Checkpoints of a training run: when they are written, atomically, and which are kept.

    CheckpointManager.save (called by the training loop)
        -> CheckpointWriter: one save from the sharded state to the final name     (this file)
            -> checkpoint/state_dict.py: what is stored of model and optimizer
            -> checkpoint/save.py: the files, with failures that every rank learns of; manifest, rename, tracker
                -> checkpoint/async_writer.py: the process that writes a rank's chunks

A checkpoint is written under a temporary name next to its final one, its manifest last, and renamed once it is
complete. Then the tracker file is updated, and --keep-latest-k removes older checkpoints. A run that is killed at any
point leaves the previous checkpoint as it was. The format is megatron.core's torch_dist, which any layout loads
(initialization.py).
"""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_a2d.checkpoint.async_writer import BackgroundWriter
from megatron_a2d.checkpoint.bridge_config import write_run_config
from megatron_a2d.checkpoint.directory import (
    HF_FILES,
    RUN_CONFIG,
    copy_hf_files,
    directory_name,
    list_iterations,
)
from megatron_a2d.checkpoint.manifest import Entry
from megatron_a2d.checkpoint.placement_file import carried
from megatron_a2d.checkpoint.save import CollectiveSave, commit
from megatron_a2d.checkpoint.state_dict import (
    CONTENT_METADATA,
    OptimizerState,
    dequantise,
    models_to_save,
    optimizer_step,
    sharding_metadata,
)
from megatron_a2d.config.settings import RunConfig, TrainingConfig
from megatron_a2d.conversion.torch_dist_writer import FORMAT
from megatron_a2d.distributed.hang_watchdog import note_progress
from megatron_a2d.distributed.process_groups import from_first_rank
from megatron_a2d.megatron_compat.device import device
from megatron_a2d.terminal.console import human
from megatron_a2d.training.logger import RunLog
from megatron_a2d.training.train_state import TrainState
from megatron_a2d.utils.atomic_write import write_json
from megatron_a2d.utils.errors import SaveError
from megatron_a2d.utils.partial_files import partial_path, remove_abandoned
from megatron_a2d.utils.printable import print_line

_WARNED: set[str] = set()  # warnings that were printed; each is printed once


class CheckpointManager:
    """The run's saves, at most one of them in progress. All methods are collective.

    A failed save ends the run with SaveError unless --on-save-error is continue; a failure of the last one always does.
    """

    def __init__(self, state: TrainState, config: RunConfig, hf_files: Path, log: RunLog):
        self._config, self._hf_files, self._log = config, hf_files, log
        self._running: CheckpointWriter | None = None
        is_async = config.training.save is not None and config.training.async_save
        self._background = BackgroundWriter(state.tensors) if is_async else None
        self._begin = self._seconds = 0.0
        # Even if this run saves nothing more: a completed run may have been killed while it removed an old checkpoint.
        if config.training.save and dist.get_rank() == 0:
            remove_unfinished(Path(config.training.save))

    def save(self, state: TrainState, last: bool) -> None:
        """Save this iteration; with --async-save only start the save, unless it is the run's `last` checkpoint."""
        self.finish(last=False)
        background = None if last else self._background
        try:
            self._begin = time.perf_counter()
            self._running = CheckpointWriter(state, self._config, self._hf_files, background)
            self._seconds = time.perf_counter() - self._begin
        except SaveError as error:
            self._failed(error, state.iteration, last)
        if background is None:
            self.finish(last)

    def poll(self) -> None:
        """Complete the background save if all ranks have written their files."""
        if self._running and self._running.is_written():
            self.finish(last=False)

    def finish(self, last: bool) -> None:
        """Wait for the background save, if there is one, and complete it."""
        if not self._running:
            return
        save, self._running = self._running, None
        begin = time.perf_counter()
        try:
            path = save.finish()
        except SaveError as error:
            self._failed(error, save.iteration, last)
            return
        # --keep-latest-k may remove the checkpoint that the run started from: the next save copies hf/ from this one.
        self._hf_files = path / HF_FILES
        end = time.perf_counter()
        self._log.checkpoint(save.iteration, path, seconds=end - self._begin, stall=self._seconds + end - begin)
        if dist.get_rank() == 0:
            note_progress(save.iteration)
            try:
                remove_old(self._config.training, save.iteration)
            except OSError as error:
                self._log.say(f"warning: --keep-latest-k: an old checkpoint could not be removed ({error})")

    def close(self) -> None:
        """End the background writer, even while it writes."""
        if self._background:
            self._background.close()

    def _failed(self, error: SaveError, iteration: int, last: bool) -> None:
        self._log.event("save_error", iteration=iteration, error=str(error))
        if last or self._config.training.on_save_error == "stop":
            raise error
        self._log.say(f"error: {error}")


class CheckpointWriter:
    """One save: the checkpoint `--save`/iter_NNNNNNN of the state at construction, complete when `finish` returns.

    `hf_files` holds the source model's configuration and tokenizer; `background` writes while training continues. All
    methods are collective. The constructor and `finish` raise SaveError on all ranks if any rank cannot write; earlier
    checkpoints are then unchanged.
    """

    def __init__(
        self, state: TrainState, config: RunConfig, hf_files: Path, background: BackgroundWriter | None = None
    ):
        assert config.training.save is not None
        self._config, self._hf_files, self.iteration = config, hf_files, state.iteration
        self._placement = state.placement
        self._root = Path(config.training.save)
        self._final = self._root / directory_name(state.iteration)
        # A random suffix: a writer process that outlives a killed run must not touch the next run's files.
        partial = partial_path(self._root / f"{self._final.name}.{secrets.token_hex(4)}")
        self._partial = self._root / from_first_rank(partial.name)
        self._save = CollectiveSave(background)
        with self._all_or_nothing():
            if dist.get_rank() == 0:
                self._save.attempt(_make_room, self._root, self._partial)
            self._save.raise_on_failure()
            tensors = _sharded_state(state, config)
            self._save.start_writing(tensors, self._partial, dict(CONTENT_METADATA))

    def is_written(self) -> bool:
        """Whether all ranks have written their files, so that `finish` does not wait for a disk."""
        written = torch.tensor(int(self._save.is_written()), device=device())
        dist.all_reduce(written, op=dist.ReduceOp.MIN)
        return bool(written)

    def finish(self) -> Path:
        """Wait for the files, write the manifest, rename; returns the checkpoint's final path."""
        with self._all_or_nothing():
            known = self._save.finish_writing()
            if dist.get_rank() == 0:
                if self._placement:
                    self._save.attempt(carried(self._placement, known).write, self._partial)
                self._save.attempt(
                    _complete, self._partial, self._final, self._config, self._hf_files, known, self.iteration
                )
            self._save.raise_on_failure()
        return self._final

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        try:
            yield
        except SaveError as error:
            root = self._root
            free = shutil.disk_usage(next(path for path in (root, *root.absolute().parents) if path.exists())).free
            dist.barrier()  # every rank has read the free space before rank 0 removes files
            if dist.get_rank() == 0:
                shutil.rmtree(self._partial, ignore_errors=True)
            earlier = [iteration for iteration in list_iterations(root) if iteration != self.iteration]
            is_full = any(text in str(error) for text in ("No space left", "Disk quota", "file write failed"))
            raise SaveError(
                f"--save {root}: the checkpoint of iteration {self.iteration} could not be written ({error}; "
                f"{human(free, 'B')} were free); the newest checkpoint is "
                + (f"that of iteration {earlier[-1]}" if earlier else "what the run started from")
                + f". {'Free disk space' if is_full else 'Fix the cause'}, then run the same command again"
            ) from None


def _sharded_state(state: TrainState, config: RunConfig) -> dict[str, Any]:
    """Everything that a checkpoint stores: models, optimizer, schedule, counters."""
    state.gather_parameters()
    model, step = models_to_save(state.models), optimizer_step(state.optimizer)
    optimizer = None
    if step:  # otherwise every step so far was skipped, and there is no optimizer state yet
        optimizer = OptimizerState(state.optimizer, model, is_loading=False, metadata=sharding_metadata())
    dequantise(model)  # only now: the optimizer matches the original tensors
    loads = state.balancing.state() if state.balancing else None
    return {
        **model,
        "optimizer": optimizer.tensors if optimizer else {},
        "optimizer_step": step,
        "scheduler": state.scheduler.state_dict(),
        "iteration": state.iteration,
        "consumed_samples": state.consumed_samples,
        "consumed_tokens": state.consumed_samples * config.data.seq_length,
        "skipped_samples": [list(item) for item in state.skipped.ranges],
        "rollbacks": state.rollbacks,
        **({} if loads is None else {"router_loads": loads}),
    }


def _make_room(root: Path, partial: Path) -> None:
    """Create the empty directory `partial`, and remove the partial directories of interrupted saves."""
    partial.mkdir(parents=True)
    remove_unfinished(root, besides=partial)


def _complete(
    partial: Path, final: Path, config: RunConfig, hf_files: Path, known: dict[str, Entry], iteration: int
) -> None:
    """Write the remaining files, then commit the checkpoint."""
    (partial / HF_FILES).mkdir()
    copy_hf_files(hf_files, partial / HF_FILES)
    write_run_config(partial, hf_files, torch.bfloat16 if config.training.bf16 else torch.float32)
    write_json(partial / RUN_CONFIG, config.to_dict())
    write_json(partial / "metadata.json", FORMAT)
    commit(partial, final, known, iteration)


def remove_old(training: TrainingConfig, newest: int) -> None:
    """Remove old checkpoints from --save by --keep-latest-k and --save-retain-interval; `newest` is always kept.

    Iterations after `newest` come from a part of the run that was abandoned: they are neither counted nor removed.
    """
    if not training.keep_latest_k:
        return
    assert training.save is not None
    root = Path(training.save)
    for iteration in [other for other in list_iterations(root) if other <= newest][: -training.keep_latest_k]:
        if training.save_retain_interval and iteration % training.save_retain_interval == 0:
            continue
        # Renamed first, so that a kill during the removal leaves no incomplete checkpoint under a checkpoint's name.
        doomed = partial_path(root / directory_name(iteration))
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(root / directory_name(iteration), doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def remove_unfinished(root: Path, besides: Path | None = None) -> None:
    """Remove the partial directories that killed runs left in --save: saves, removals or replacements cut short.

    Each takes as much disk space as a checkpoint. Kept are `besides` and, with a warning that is printed once, those
    that another host may still be writing.
    """
    for line in remove_abandoned(root, ".iter_*.partial*", besides):
        if line not in _WARNED:
            print_line(f"warning: {line}", sys.stderr)
            _WARNED.add(line)
