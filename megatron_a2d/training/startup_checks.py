"""Checks before a run starts: everything that one process can find out before the process group is formed.

check_early -> settings against the model's shape: takes a moment, imports neither torch nor numpy
check_run   -> resume.find_start: newest intact checkpoint in --save, else --load
            -> settings, memory, tensors of the checkpoint, data
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import NamedTuple

from megatron_a2d.checkpoint.directory import HF_FILES, list_iterations, resolve
from megatron_a2d.checkpoint.placement_file import ExpertPlacement, find_placement
from megatron_a2d.config.installed_versions import find_version_problems
from megatron_a2d.config.model_config import ModelConfig, read_model_config
from megatron_a2d.config.named_models import shape_problems
from megatron_a2d.config.settings import RunConfig
from megatron_a2d.config.skipped_samples import SkippedSamples
from megatron_a2d.config.validate import find_problems, missing_inputs
from megatron_a2d.distributed.environment import rank
from megatron_a2d.planner.cluster import Cluster
from megatron_a2d.planner.memory import check_memory
from megatron_a2d.training.resume import Start, differences, find_start, with_skipped
from megatron_a2d.utils.atomic_write import write_problems
from megatron_a2d.utils.errors import UserError
from megatron_a2d.utils.printable import print_line


def check_early(config: RunConfig, processes: int) -> None:
    """UserError with every problem of the settings, by themselves and for the model's shape."""
    problems = missing_inputs(config) + find_version_problems(config)
    if (save := config.training.save) and rank() == 0:  # thousands of ranks would load the file system
        problems += write_problems(Path(save), f"--save {save}")
    if problems := problems + find_problems(config, _shape(config), processes):
        raise UserError(problems)


def _shape(config: RunConfig) -> ModelConfig | None:
    """Shape of the run's model. None if it cannot be read: `check_run` reports that. UserError if there is none."""
    save, load = config.training.save, config.training.load
    if load and not Path(load).is_dir() and not (save and list_iterations(save)):
        resolve(load, "--load")  # raises
    for directory in (save, load):
        try:
            if directory:
                return read_model_config(resolve(Path(directory)) / HF_FILES)
        except (UserError, OSError):
            continue
    return None


class Checked(NamedTuple):
    """Where a run starts, and its settings after all checks."""

    start: Start
    model_config: ModelConfig
    config: RunConfig  # with the fingerprint of the data
    placement: ExpertPlacement | None
    epochs: dict[str, float]  # of the run over its data, by source


def check_run(config: RunConfig, processes: int, cluster: Cluster | None = None) -> Checked:
    """Every check that one process can make, of checkpoint and data too; UserError with the problems."""
    from megatron_a2d.checkpoint.torch_dist_reader import check_pickles, read_common
    from megatron_a2d.conversion.mask_token import choose_mask_token
    from megatron_a2d.conversion.sources import open_checkpoint
    from megatron_a2d.data.diffusion_samples import make_sample
    from megatron_a2d.training.data_setup import open_datasets

    start = find_start(config, report=_warn)
    model_config = read_model_config(start.directory / HF_FILES)
    problems = shape_problems(config.training.model, model_config) if config.training.model else []
    if problems := problems + find_problems(config, model_config, processes):
        raise UserError(problems)
    check_memory(config, model_config, processes, cluster)
    placement = find_placement(config, model_config, start.directory)
    check_pickles(start.directory)  # before megatron.core unpickles whatever it finds
    if not start.weights_only:
        common = read_common(start.directory)
        consumed, ranges = common.get("consumed_samples") or 0, common.get("skipped_samples", [])
        config = with_skipped(config, SkippedSamples.of(ranges), consumed)
    with open_checkpoint(start.directory, allow_expert_bias=True):
        pass  # raises unless it has exactly the model's tensors, in their shapes
    if config.diffusion.objective != "ar":
        choose_mask_token(start.directory / HF_FILES, model_config.vocab_size, None, model_config.mask_token_id)
    train_data, _ = open_datasets(config, model_config, start.directory / HF_FILES)
    data = dataclasses.replace(config.data, train_data_fingerprint=train_data.fingerprint())
    config = dataclasses.replace(config, data=data)
    if not start.weights_only and (problems := differences(config, start.directory)):
        raise UserError(problems)
    make_sample(config, model_config, train_data, data.seed)
    epochs = train_data.epochs(config.num_texts)
    return Checked(start, model_config, config, placement, epochs)


def input_files(config: RunConfig, start: Path) -> list[Path]:
    """The files that every node must see: the tokens, and those of the checkpoint directory `start`."""
    from megatron_a2d.data.blended_dataset import read_mixture

    data = config.data
    prefixes = [data.train_data_path, data.valid_data_path]
    if data.data_mixture:
        prefixes = [
            path for source in read_mixture(data.data_mixture) for path in (source.train_path, source.valid_path)
        ]
    files = [Path(f"{prefix}{suffix}") for prefix in prefixes if prefix for suffix in (".bin", ".idx")]
    return files + sorted(path for path in start.iterdir() if path.is_file())


def _warn(line: str) -> None:
    print_line(f"warning: {line}", sys.stderr)
