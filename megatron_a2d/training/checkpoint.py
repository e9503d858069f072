"""Checkpoints of model and optimizer that load under any layout (megatron.core's torch_dist format).

A checkpoint is written beside its final name and renamed when it is complete; the tracker file that names the
newest one is written last.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state

from megatron_a2d.config import RunConfig
from megatron_a2d.conversion.checkpoint import (
    HF_FILES,
    RUN_CONFIG,
    TRACKER,
    copy_hf_files,
    directory_name,
    iteration_of,
    resolve,
)
from megatron_a2d.errors import UserError
from megatron_a2d.files import fsync_path, new_file, write_json
from megatron_a2d.model.diffusion_lm import DiffusionLM
from megatron_a2d.training.setup import TrainState

# Optimizer state that any other layout can load; the experts' optimizer is not told apart by its position.
_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def save_checkpoint(state: TrainState, config: RunConfig, hf_files: Path) -> Path:
    """Write `--save`/iter_NNNNNNN; collective. `hf_files` holds the source model's configuration and tokenizer."""
    assert config.training.save is not None
    root = Path(config.training.save)
    final = root / directory_name(state.iteration)
    partial = root / f".{final.name}.partial"
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(_sharded_state(state, is_loading=False), str(partial), content_metadata=dict(_FORMAT))
    if dist.get_rank() == 0:
        (partial / HF_FILES).mkdir()
        copy_hf_files(hf_files, partial / HF_FILES)
        write_json(partial / RUN_CONFIG, config.to_dict())
        for entry in partial.rglob("*"):
            fsync_path(entry)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(partial, final)
        fsync_path(root)
        with new_file(root / TRACKER) as tracker:
            tracker.write_text(f"{state.iteration}\n")
    dist.barrier()
    return final


def load_checkpoint(state: TrainState, directory: Path, weights_only: bool) -> None:
    """Fill `state` from the iteration directory `directory`; collective."""
    if weights_only:
        loaded = _load(_sharded_model(state), directory)
        _load_model(state, loaded)
        state.optimizer.reload_model_params()
        return
    loaded = _load(_sharded_state(state, is_loading=True), directory)
    _load_model(state, loaded)
    state.optimizer.load_state_dict(loaded["optimizer"])
    state.scheduler.load_state_dict(loaded["scheduler"])
    state.iteration = loaded["iteration"]
    state.consumed_samples = loaded["consumed_samples"]


def find_start(config: RunConfig) -> tuple[Path, bool]:
    """Where a run starts: (iteration directory, weights only?). A checkpoint in --save comes before --load."""
    training = config.training
    if training.save and (Path(training.save) / TRACKER).exists():
        directory = resolve(training.save)
        return directory, False
    if not training.load:
        raise UserError(
            "--load: is missing; give the checkpoint to start from, as python -m checkpoints_tools.convert_hf writes it"
        )
    directory = resolve(training.load)
    return directory, training.finetune or iteration_of(directory) == 0


def _metadata() -> dict[str, Any]:
    return {**_FORMAT, "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}


def _models(state: TrainState) -> dict[str, DiffusionLM]:
    """By the names that megatron's optimizers expect: "model", or "model0", ... with virtual stages."""
    models = state.models
    return {"model": models[0]} if len(models) == 1 else {f"model{n}": model for n, model in enumerate(models)}


def _sharded_model(state: TrainState) -> dict[str, Any]:
    return {name: model.sharded_state_dict(metadata=_metadata()) for name, model in _models(state).items()}


def _sharded_state(state: TrainState, is_loading: bool) -> dict[str, Any]:
    models = _sharded_model(state)
    parameters = models if len(models) > 1 else models["model"]
    return {
        **models,
        "optimizer": state.optimizer.sharded_state_dict(parameters, is_loading=is_loading, metadata=_metadata()),
        "scheduler": state.scheduler.state_dict(),
        "iteration": state.iteration,
        "consumed_samples": state.consumed_samples,
    }


def _load(wanted: dict[str, Any], directory: Path) -> dict[str, Any]:
    try:
        return dist_checkpointing.load(wanted, str(directory))
    except (dist_checkpointing.core.CheckpointingException, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{directory}: does not fit this run ({type(error).__name__}: {reason}); resume with the settings in its "
            "run.json, or take only its weights with --finetune"
        ) from error


def _load_model(state: TrainState, loaded: dict[str, Any]) -> None:
    for name, model in _models(state).items():
        model.load_state_dict(loaded[name])
