"""A checkpoint with everything that its training had, ready to be measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_a2d.architecture import Architecture, read_architecture
from megatron_a2d.checks import find_problems
from megatron_a2d.config import RunConfig, build
from megatron_a2d.conversion.checkpoint import HF_FILES, resolve
from megatron_a2d.data.dataset import PackedDataset
from megatron_a2d.data.mixture import MixedDataset
from megatron_a2d.errors import UserError
from megatron_a2d.training import loop, parallel
from megatron_a2d.training.checkpoint import load_checkpoint
from megatron_a2d.training.setup import TrainState, build_train_state


@dataclass
class OpenedRun:
    config: RunConfig
    architecture: Architecture
    state: TrainState
    train_data: PackedDataset | MixedDataset
    valid_data: PackedDataset  # of a mixture, the first source's


def open_run(values: dict[str, Any]) -> OpenedRun:
    """The weights of `values["load"]`, laid out as the settings say. Collective."""
    config = build(values)
    assert config.training.load is not None
    directory = resolve(config.training.load)
    architecture = read_architecture(directory / HF_FILES)
    if problems := find_problems(config, architecture, parallel.world_size()):
        raise UserError(problems)
    train_data, valid_data = loop.open_datasets(config, architecture, directory / HF_FILES)
    if not valid_data:
        raise UserError("--valid-data-path: is missing; a study judges its runs by held-out text")
    parallel.initialize(config.parallel)
    state = build_train_state(architecture, config)
    load_checkpoint(state, directory, weights_only=True)
    return OpenedRun(config, architecture, state, train_data, next(iter(valid_data.values())))
