"""Expert loads of a checkpoint: the choices of its routers on held-out data, by micro-batch, layer and kind of token.

The forward pass is the one of training, with noise as in validation: times spread over (0, 1). Experts are distributed
over all processes that torchrun starts, and each process takes its own micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_a2d.checkpoint.directory import HF_FILES, RUN_CONFIG, read_run_settings
from megatron_a2d.checkpoint.torch_dist_reader import has_expert_bias, read_common
from megatron_a2d.checkpoint.training_facts import read_trained
from megatron_a2d.config.model_config import ModelConfig
from megatron_a2d.config.settings import RunConfig, build
from megatron_a2d.config.validate import find_problems
from megatron_a2d.conversion.end_tokens import read_end_tokens
from megatron_a2d.data.dataloader import MicroBatches
from megatron_a2d.data.packed_dataset import PackedDataset
from megatron_a2d.data.tokenizer_fingerprint import find_foreign_tokens, vocabulary_of
from megatron_a2d.distributed import process_groups
from megatron_a2d.inference.parallel_model import load_weights
from megatron_a2d.training.balancing import RunBalancing
from megatron_a2d.training.data_setup import VALIDATION_SEED, micro_batches
from megatron_a2d.training.train_step import forward_backward
from megatron_a2d.utils.errors import UserError

# Settings taken from the run that wrote the checkpoint, if there was one.
_RECORDED = ("seq_length", "micro_batch_size", "bf16")


def measuring_config(directory: Path, model_config: ModelConfig, given: dict[str, Any]) -> RunConfig:
    """The settings of the measurement: `given`, else those of the run that wrote the checkpoint `directory`.

    UserError if they do not fit the model or the number of processes.
    """
    recorded = read_run_settings(directory) if (directory / RUN_CONFIG).is_file() else {}
    values = {name: recorded[name] for name in _RECORDED if name in recorded} | given
    trained = {name: value for name, value in read_trained(directory)._asdict().items() if value is not None}
    trained["moe_router_enable_expert_bias"] = has_expert_bias(directory)
    processes = process_groups.world_size()
    config = build({**trained, **values, "expert_model_parallel_size": processes})
    config = build(
        {**trained, **values, "expert_model_parallel_size": processes, "num_workers": 0,
         "global_batch_size": processes * config.training.micro_batch_size}
    )  # fmt: skip
    if problems := find_problems(config, model_config, processes):
        raise UserError(problems)
    return config


def recorded_loads(directory: Path, model_config: ModelConfig) -> np.ndarray:
    """Choices in the last step of the run that wrote an iteration's `directory`, [1, layers, 2, experts].

    UserError if the run recorded none.
    """
    shape = (model_config.num_layers, 2, model_config.num_experts)
    try:
        return np.array(read_common(directory).get("router_loads", [])).reshape(1, *shape)
    except ValueError:
        raise UserError(
            f"--checkpoint {directory}: holds no loads of its routers, which only a run that balances them records; "
            "give held-out text with --valid-data"
        ) from None


def open_held_out(config: RunConfig, model_config: ModelConfig, directory: Path, prefix: str) -> PackedDataset:
    """The held-out token file `prefix`, in validation's order. UserError for tokens that are not the model's."""
    hf_files = directory / HF_FILES
    dataset = PackedDataset(
        prefix, config.data.seq_length, seed=VALIDATION_SEED, vocab_size=model_config.vocab_size,
        mask_token_id=model_config.mask_token_id if config.diffusion.objective != "ar" else None,
        eod_token_id=read_end_tokens(hf_files, model_config.vocab_size).document,
    )  # fmt: skip
    if problems := list(find_foreign_tokens([dataset.file], vocabulary_of(hf_files))):
        raise UserError(problems)
    return dataset


def micro_batches_of(config: RunConfig, model_config: ModelConfig, dataset: PackedDataset) -> MicroBatches:
    """This process's micro-batches of the held-out data."""
    return micro_batches(config, model_config, dataset, VALIDATION_SEED, 0, for_training=False)


def measure_loads(
    config: RunConfig,
    model_config: ModelConfig,
    directory: Path,
    dataset: PackedDataset,
    count: int,
    advance: Callable[[float], None] = lambda amount: None,
) -> np.ndarray:
    """Choices of each expert in the first `count` micro-batches of each process, in the order of their samples.

    [micro-batches, layers, 2, experts] int64, unmasked tokens before masked ones. Collective; `advance` gets the
    samples that are done.
    """
    process_groups.initialize(config.parallel)
    model = load_weights(model_config, config, directory)
    routing, tables = RunBalancing([model], config, model_config.mask_token_id).routing, []
    with micro_batches_of(config, model_config, dataset) as batches:
        for _ in range(count):
            with routing.counting(), torch.no_grad():
                forward_backward([model], [next(batches)], forward_only=True)
            tables.append(routing.choices.cpu().numpy().copy())
            advance(config.training.global_batch_size)
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, np.stack(tables))
    return np.stack(of_ranks, axis=1).reshape(-1, *tables[0].shape)
