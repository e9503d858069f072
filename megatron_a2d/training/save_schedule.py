"""When the loop saves: at once or in the background, and what follows when a checkpoint cannot be written."""

from __future__ import annotations

import time
from pathlib import Path

import torch.distributed as dist

from megatron_a2d.config import RunConfig
from megatron_a2d.conversion.checkpoint import HF_FILES
from megatron_a2d.errors import SaveError
from megatron_a2d.runtime.heartbeat import note_progress
from megatron_a2d.training.checkpoint import Save, remove_old, remove_unfinished
from megatron_a2d.training.log import RunLog
from megatron_a2d.training.setup import TrainState


class SaveSchedule:
    """At most one checkpoint is being written. All methods are collective.

    A failure ends the run unless --on-save-error says otherwise; that of the last checkpoint always does.
    """

    def __init__(self, config: RunConfig, hf_files: Path, log: RunLog):
        self._config, self._hf_files, self._log = config, hf_files, log
        self._running: Save | None = None
        self._seconds = 0.0
        # Also where this run will save nothing: one that is complete may have been killed while it removed an old one.
        if config.training.save and dist.get_rank() == 0:
            remove_unfinished(Path(config.training.save))

    def save(self, state: TrainState, last: bool) -> None:
        """Write the checkpoint of this iteration; with --async-save only begin it, unless it is the `last`."""
        self.finish(last=False)
        try:
            begin = time.perf_counter()
            self._running = Save(state, self._config, self._hf_files)
            self._seconds = time.perf_counter() - begin
        except SaveError as error:
            self._failed(error, state.iteration, last)
        if last or not self._config.training.async_save:
            self.finish(last)

    def poll(self) -> None:
        """Complete the checkpoint in the background if all ranks have written their part."""
        if self._running and self._running.is_written():
            self.finish(last=False)

    def finish(self, last: bool) -> None:
        """Wait for the checkpoint in the background, if there is one."""
        if not self._running:
            return
        save, self._running = self._running, None
        begin = time.perf_counter()
        try:
            path = save.finish()
        except SaveError as error:
            self._failed(error, save.iteration, last)
            return
        # `start` may be removed as an old checkpoint, so the next one copies the model's files from this one.
        self._hf_files = path / HF_FILES
        waited = self._seconds + time.perf_counter() - begin
        self._log.event("checkpoint", iteration=save.iteration, path=str(path), seconds_waited=round(waited, 3))
        self._log.say(f"checkpoint {path}")
        if dist.get_rank() == 0:
            note_progress(save.iteration)
            try:
                remove_old(self._config.training, save.iteration)
            except OSError as error:
                self._log.say(f"warning: --keep-last: an old checkpoint could not be removed ({error})")

    def _failed(self, error: SaveError, iteration: int, last: bool) -> None:
        self._log.event("save_error", iteration=iteration, error=str(error))
        if last or self._config.training.on_save_error == "stop":
            raise error
        self._log.say(f"error: {error}")
