"""Checks that take a moment, before torch is imported: the settings against the shape of the run's checkpoint."""

from __future__ import annotations

from pathlib import Path

from megatron_a2d.checkpoint.directory import HF_FILES, list_iterations, resolve
from megatron_a2d.config.model_config import Architecture, read_architecture
from megatron_a2d.config.settings import RunConfig
from megatron_a2d.config.validate import find_problems, missing_inputs
from megatron_a2d.utils.errors import UserError


def check_early(config: RunConfig, processes: int) -> None:
    """UserError with everything that is wrong, as far as it shows without torch and without the data."""
    if problems := missing_inputs(config) + find_problems(config, _shape(config), processes):
        raise UserError(problems)


def _shape(config: RunConfig) -> Architecture | None:
    """Of the run's checkpoint; None where it cannot be read, for then the check of the checkpoint says why. UserError
    where there is none."""
    save, load = config.training.save, config.training.load
    if load and not Path(load).exists() and not (save and list_iterations(save)):
        resolve(load)  # says so
    for directory in (save, load):
        try:
            if directory:
                return read_architecture(resolve(Path(directory)) / HF_FILES)
        except (UserError, OSError):
            continue
    return None
