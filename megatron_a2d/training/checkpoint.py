"""Checkpoints of model and optimizer that load under any layout (megatron.core's torch_dist format).

A checkpoint is written beside its final name, manifest last, and renamed when it is complete; then the tracker file
is made to name it, and older ones are removed as --keep-last says.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state

from megatron_a2d.config import RunConfig, TrainingConfig
from megatron_a2d.console import human
from megatron_a2d.conversion.checkpoint import (
    HF_FILES,
    RUN_CONFIG,
    TRACKER,
    copy_hf_files,
    directory_name,
    list_iterations,
)
from megatron_a2d.conversion.manifest import Entry, measure, write_manifest
from megatron_a2d.conversion.torch_dist import FORMAT
from megatron_a2d.errors import SaveError, UserError
from megatron_a2d.files import fsync_path, new_file, write_json
from megatron_a2d.model.diffusion_lm import DiffusionLM
from megatron_a2d.runtime.loading import load_state
from megatron_a2d.runtime.saving import Saving
from megatron_a2d.training.setup import TrainState

# Optimizer state that any other layout can load; the experts' optimizer is not told apart by its position.
_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def save_checkpoint(state: TrainState, config: RunConfig, hf_files: Path) -> Path:
    """Write `--save`/iter_NNNNNNN; collective. `hf_files` holds the source model's configuration and tokenizer.

    Raises SaveError on all ranks when one of them cannot write; earlier checkpoints are then as they were.
    """
    training = config.training
    assert training.save is not None
    root = Path(training.save)
    final = root / directory_name(state.iteration)
    partial = root / f".{final.name}.partial"
    on_first_rank = dist.get_rank() == 0
    saving = Saving()
    try:
        if on_first_rank:
            saving.attempt(_make_room, root, partial)
        saving.agree()
        saving.write_state(_sharded_state(state, is_loading=False), partial, dict(_FORMAT))
        entries: list[dict[str, Entry]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(entries, saving.attempt(_measure_own, partial) or {})
        saving.agree()
        known = {name: entry for part in entries for name, entry in part.items()}
        if on_first_rank:
            saving.attempt(_complete, partial, final, config, hf_files, known)
        saving.agree()
    except SaveError as error:
        free = shutil.disk_usage(next(path for path in (root, *root.absolute().parents) if path.exists())).free
        dist.barrier()  # all have looked, and none is reading what is now removed
        if on_first_rank:
            shutil.rmtree(partial, ignore_errors=True)
        earlier = [iteration for iteration in list_iterations(root) if iteration != state.iteration]
        raise SaveError(
            f"--save {root}: the checkpoint of iteration {state.iteration} could not be written ({error}; "
            f"{human(free, 'B')} were left); the newest one is "
            + (f"that of iteration {earlier[-1]}" if earlier else "what the run started from")
            + ". Make room, then start the same command again"
        ) from None
    if on_first_rank:
        remove_old(training, state.iteration)
    return final


def remove_old(training: TrainingConfig, newest: int) -> None:
    """Remove from --save what --keep-last and --keep-every do not keep; `newest` is complete and stays.

    Iterations beyond `newest` are of a part of the run that was given up: they are neither counted nor removed.
    """
    if not training.keep_last:
        return
    assert training.save is not None
    root = Path(training.save)
    for iteration in [other for other in list_iterations(root) if other <= newest][: -training.keep_last]:
        if training.keep_every and iteration % training.keep_every == 0:
            continue
        # Renamed first: whatever happens in between, no half of it bears a checkpoint's name.
        doomed = root / f".{directory_name(iteration)}.partial"
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(root / directory_name(iteration), doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _make_room(root: Path, partial: Path) -> None:
    """An empty `partial`, and nothing left of saves that were cut short."""
    for left in root.glob(".iter_*.partial"):
        shutil.rmtree(left, ignore_errors=True)
    partial.mkdir(parents=True)


def _measure_own(partial: Path) -> dict[str, Entry]:
    """Checksums of this rank's chunks: each rank reads back what it wrote, not the first one everything."""
    return measure(partial, [path.name for path in partial.glob(f"__{dist.get_rank()}_*.distcp")])


def _complete(partial: Path, final: Path, config: RunConfig, hf_files: Path, known: dict[str, Entry]) -> None:
    """The rest of the files, flushed, and the rename."""
    (partial / HF_FILES).mkdir()
    copy_hf_files(hf_files, partial / HF_FILES)
    write_json(partial / RUN_CONFIG, config.to_dict())
    write_json(partial / "metadata.json", FORMAT)
    write_manifest(partial, known)
    for entry in partial.rglob("*"):
        fsync_path(entry)
    fsync_path(partial)
    shutil.rmtree(final, ignore_errors=True)
    os.rename(partial, final)
    fsync_path(final.parent)
    with new_file(final.parent / TRACKER) as tracker:
        tracker.write_text(f"{int(final.name.removeprefix('iter_'))}\n")


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
        return load_state(wanted, directory)
    except (dist_checkpointing.core.CheckpointingException, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{directory}: does not fit this run ({type(error).__name__}: {reason}); resume with the settings in its "
            "run.json, or take only its weights with --finetune"
        ) from error


def _load_model(state: TrainState, loaded: dict[str, Any]) -> None:
    for name, model in _models(state).items():
        model.load_state_dict(loaded[name])
