"""Loading of a checkpoint with its model, optimizer and data, for measurements."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from megatron_a2d.checkpoint.directory import HF_FILES, resolve
from megatron_a2d.config.model_config import ModelConfig, read_model_config
from megatron_a2d.config.settings import RunConfig, build
from megatron_a2d.config.validate import find_problems
from megatron_a2d.data.blended_dataset import MixedDataset
from megatron_a2d.data.packed_dataset import PackedDataset
from megatron_a2d.distributed import process_groups
from megatron_a2d.training.data_setup import open_datasets
from megatron_a2d.training.initialization import build_train_state, load_checkpoint
from megatron_a2d.training.train_state import TrainState
from megatron_a2d.utils.errors import UserError


@dataclass
class LoadedRun:
    """A run's checkpoint with its data, laid out over the processes."""

    config: RunConfig
    model_config: ModelConfig
    state: TrainState
    train_data: PackedDataset | MixedDataset
    valid_data: PackedDataset  # the first source of a mixture


def load_run(values: dict[str, Any]) -> LoadedRun:
    """Load the weights of `values["load"]` in the layout of the settings. Collective."""
    config = build(values)
    assert config.training.load is not None
    directory = resolve(config.training.load)
    model_config = read_model_config(directory / HF_FILES)
    if problems := find_problems(config, model_config, process_groups.world_size()):
        raise UserError(problems)
    train_data, valid_data = open_datasets(config, model_config, directory / HF_FILES)
    if not valid_data:
        raise UserError("--valid-data-path: is missing; a study evaluates its runs on held-out data")
    process_groups.initialize(config.parallel)
    state = build_train_state(model_config, config)
    load_checkpoint(state, directory, weights_only=True)
    return LoadedRun(config, model_config, state, train_data, next(iter(valid_data.values())))


@contextmanager
def other_weights(loaded: LoadedRun, checkpoint: str) -> Iterator[None]:
    """The model with the weights of another checkpoint, then with its own again. Collective."""
    load_checkpoint(loaded.state, resolve(checkpoint), weights_only=True)
    yield
    assert loaded.config.training.load is not None
    load_checkpoint(loaded.state, resolve(loaded.config.training.load), weights_only=True)
