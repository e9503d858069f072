"""Initial state of a run: a loaded checkpoint, or random weights (--conversion random).

    initialize_state -> load_checkpoint (checkpointing.py)      resume, or the weights of a converted checkpoint
                     -> draw_weights                            --conversion random
                     -> set_to_mean                             --mask-token-init mean: the mask token's embedding

Random weights are the same in every layout: each element is a pure function of (seed, the tensor's name in the
checkpoint, the element's index in the full tensor), so a rank draws only what it holds. As in Hugging Face's Qwen3,
matrices and embeddings are normal with the architecture's `initializer_range`, norms are one.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

from megatron_a2d.checkpoint.directory import iteration_of, resolve
from megatron_a2d.config.model_config import ModelConfig
from megatron_a2d.config.settings import RunConfig
from megatron_a2d.training.checkpointing import load_checkpoint
from megatron_a2d.training.grafting import Grafting
from megatron_a2d.training.train_state import TrainState
from megatron_a2d.utils.errors import UserError

_MAX_DRAW = 1 << 22  # elements drawn at once: bounds memory


@torch.no_grad()
def draw_weights(state: TrainState, seed: int, standard_deviation: float) -> None:
    """Fill the model with random weights, and the optimizer's main weights from it."""
    for model in state.models:
        parameters = list(model.parameters())
        for parameter in parameters:
            parameter.fill_(float("nan"))
        sharded = model.sharded_state_dict(metadata={"dp_cp_group": None})
        apply_factories(sharded)  # what they build are views of the parameters
        for shard in nested_values(sharded):
            if isinstance(shard, ShardedTensor):
                _fill(shard, seed, standard_deviation)
        assert not any(bool(parameter.isnan().any()) for parameter in parameters), "a weight was not drawn"
    state.optimizer.reload_model_params()


def normals(seed: int, name: str, start: int, count: int) -> np.ndarray:
    """Standard normal values of the elements start .. start + count - 1 of the tensor `name`, [count] float32."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    # Box-Muller. One Philox counter yields four 64-bit words: four elements, each from 32 bits of radius and of angle.
    first, skipped = divmod(start, 4)
    generator = np.random.Philox(key=int.from_bytes(digest[:16], "little"), counter=first)
    bits = generator.random_raw(skipped + count)[skipped:]
    radius = np.sqrt(-2 * np.log(((bits >> np.uint64(32)).astype(np.float64) + 0.5) * 2.0**-32))
    angle = (bits & np.uint64(0xFFFFFFFF)).astype(np.float64) * (2 * math.pi * 2.0**-32)
    return (radius * np.cos(angle)).astype(np.float32)


def _fill(shard: ShardedTensor, seed: int, standard_deviation: float) -> None:
    data = shard.data
    assert data is not None
    if "norm" in shard.key:
        data.fill_(1)
        return
    for run, start in _contiguous_runs(shard):
        for first in range(0, run.numel(), _MAX_DRAW):
            count = min(_MAX_DRAW, run.numel() - first)
            values = normals(seed, shard.key, start + first, count) * np.float32(standard_deviation)
            run[first : first + count] = torch.from_numpy(values).to(run)


def _contiguous_runs(shard: ShardedTensor) -> Iterator[tuple[torch.Tensor, int]]:
    """The runs of a shard that are contiguous in the full tensor, [n] each, with their offset in it."""
    shape = shard.global_shape
    local = (1,) * shard.prepend_axis_num + tuple(shard.data.shape)
    # The shard holds the trailing axes `full`, ... completely; the axis before them may be a slice.
    full = len(shape)
    while full > 0 and local[full - 1] == shape[full - 1]:
        full -= 1
    outer = max(full - 1, 0)
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    view = shard.data.view(local)
    for index in np.ndindex(*local[:outer]):
        run = view[index].view(-1)
        first = [*index, *([0] * (len(shape) - outer))]
        yield run, sum((a + o) * s for a, o, s in zip(first, shard.global_offset, strides, strict=True))


def initialize_state(
    state: TrainState, config: RunConfig, model_config: ModelConfig, directory: Path, weights_only: bool
) -> Grafting:
    """Fill `state` from the checkpoint `directory`, or with random weights if a new run has --conversion random.

    Returns the stages of --conversion grafting (none for other conversions). UserError if a run that resumes during
    grafting has no --load. Collective.
    """
    diffusion = config.diffusion
    if weights_only and diffusion.conversion == "random":
        draw_weights(state, config.data.seed, model_config.initializer_range)
        grafting = Grafting()
    else:
        grafting = _load(state, config, model_config, directory, weights_only)
    if weights_only and diffusion.mask_token_init == "mean":
        assert model_config.mask_token_id is not None
        set_to_mean(state, model_config.mask_token_id)
    return grafting


def _load(
    state: TrainState, config: RunConfig, model_config: ModelConfig, directory: Path, weights_only: bool
) -> Grafting:
    diffusion, source = config.diffusion, config.training.load
    grafting = Grafting(diffusion.grafting_iters, model_config.num_layers)
    unfinished = grafting.is_active(0 if weights_only else iteration_of(directory))
    if unfinished and not weights_only:
        if not source:
            raise UserError(
                f"--load: is missing; {directory} is from before the end of --grafting-iters "
                f"{diffusion.grafting_iters}, which needs the checkpoint that the run started from; pass it again"
            )
        load_checkpoint(state, resolve(source), weights_only=True)
        grafting.remember(state)
    load_checkpoint(state, directory, weights_only)
    if unfinished and weights_only:
        grafting.remember(state)
    return grafting


@torch.no_grad()
def set_to_mean(state: TrainState, mask_token_id: int) -> None:
    """Set the mask token's embedding to the mean of all embeddings; a tied LM head follows. Collective."""
    for model in state.models:
        tables = [model.embedding.word_embeddings.weight] if model.pre_process else []
        if model.share_embeddings_and_output_weights and model.post_process and not model.pre_process:
            tables.append(model.output_layer.weight)  # the last stage holds its own copy
        for table in tables:
            rows = len(table)
            mean = table.double().sum(0)
            dist.all_reduce(mean, group=parallel_state.get_tensor_model_parallel_group())
            mean /= rows * parallel_state.get_tensor_model_parallel_world_size()
            row = mask_token_id - rows * parallel_state.get_tensor_model_parallel_rank()
            if 0 <= row < rows:
                table[row] = mean.to(table)
    state.optimizer.reload_model_params()
