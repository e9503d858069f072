"""Initialisation of a run: model, optimizer and schedule are built, then filled from a checkpoint or randomly.

    build_train_state -> build_model for each virtual pipeline stage        weights uninitialised
    initialize_state  -> load_checkpoint      resume, or the weights of a converted checkpoint
                      -> draw_weights         --conversion random
                      -> set_to_mean          --mask-token-init mean: the mask token's embedding

Random weights are the same in every layout: each element is a pure function of (seed, the tensor's name in the
checkpoint, the element's index in the full tensor), so a rank draws only what it holds. As in Hugging Face's Qwen3,
matrices and embeddings are normal with the architecture's `initializer_range`, norms are one.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)

from megatron_a2d.checkpoint.directory import iteration_of, read_run_settings, resolve
from megatron_a2d.checkpoint.load import load_state
from megatron_a2d.checkpoint.state_dict import (
    OptimizerState,
    fill_models,
    models_to_load,
    models_to_save,
    sharding_metadata,
)
from megatron_a2d.checkpoint.torch_dist_reader import EXPERT_BIAS, read_common
from megatron_a2d.config.core_attention import isolates_documents, own_attention_reason
from megatron_a2d.config.fp8_recipe import emulation_of, engine_scaling
from megatron_a2d.config.model_config import ModelConfig
from megatron_a2d.config.settings import RunConfig
from megatron_a2d.config.skipped_samples import SkippedSamples
from megatron_a2d.megatron_compat import schedule_plans
from megatron_a2d.megatron_compat.device import compute_capability, cuda_version, device
from megatron_a2d.megatron_compat.versions import mark_expert_parameters
from megatron_a2d.model.diffusion_lm import DiffusionLM
from megatron_a2d.model.emulated_layers import follow_batches
from megatron_a2d.model.layer_specs import build_block_spec, choose_implementation, output_layer
from megatron_a2d.model.router import routers
from megatron_a2d.model.transformer_config import build_transformer_config
from megatron_a2d.training.balancing import RunBalancing
from megatron_a2d.training.grafting import Grafting
from megatron_a2d.training.muon import tag_for_muon, whole_matrix_layout
from megatron_a2d.training.optimizer import (
    build_optimizer,
    build_scheduler,
    freeze_roles,
    frozen_roles,
    reuses_gradient_buffer,
    role_of,
)
from megatron_a2d.training.train_state import TrainState
from megatron_a2d.utils.errors import UserError

_MAX_DRAW = 1 << 22  # elements drawn at once: bounds memory


def build_train_state(model_config: ModelConfig, config: RunConfig) -> TrainState:
    """Model, optimizer and schedule at iteration 0."""
    if config.performance.overlap_moe_expert_parallel_comm:
        schedule_plans.install()
    virtual = config.parallel.virtual_pipeline_size
    models = [build_model(model_config, config, vp_stage) for vp_stage in (range(virtual) if virtual else [None])]
    performance, scaling = config.performance, engine_scaling(config, compute_capability(), cuda_version())
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=performance.grad_reduce_in_fp32,
        fp8_param_gather=performance.fp8_param_gather,
        reuse_grad_buf_for_mxfp8_param_ag=reuses_gradient_buffer(config, scaling),
        delay_wgrad_compute=performance.delay_wgrad_compute,
        use_distributed_optimizer=config.parallel.use_distributed_optimizer,
        overlap_grad_reduce=config.parallel.overlap_grad_reduce,
        overlap_param_gather=config.parallel.overlap_param_gather,
        # Gradients are summed; the one division is by the global number of maskable tokens.
        average_in_collective=False,
    )
    chunks = []
    tied = model_config.tie_word_embeddings
    for number, model in enumerate(models):
        mark_expert_parameters(model)
        freeze_roles(model, config.optimization.lr_mult, tied)
        # Buckets are for overlap with the backward pass; later chunks' gradients are ready when the first one's are.
        options: dict[str, Any] = {"disable_bucketing": number > 0}
        if config.optimization.optimizer == "muon":
            tag_for_muon(model, role_of, config.optimization)
            if ddp_config.use_distributed_optimizer:
                options |= whole_matrix_layout(model, ddp_config, is_first_chunk=number == 0)
        chunks.append(DistributedDataParallel(model.config, ddp_config, model, **options))
        follow_batches(chunks[-1])
    optimizer = build_optimizer(config, chunks, tied)
    for model in models:
        model.config.finalize_model_grads_func = finalize_model_grads
        model.config.grad_scale_func = optimizer.scale_loss
        if config.parallel.overlap_grad_reduce:
            model.config.no_sync_func = [chunk.no_sync for chunk in chunks] if virtual else chunks[0].no_sync
    balancing = None
    if model_config.is_moe:
        masked = config.diffusion.objective != "ar"
        balancing = RunBalancing(models, config, model_config.mask_token_id if masked else None)
    scheduler, counts_samples = build_scheduler(config, optimizer), config.train_samples is not None
    return TrainState(chunks, optimizer, scheduler, balancing, counts_samples=counts_samples)


def build_model(model_config: ModelConfig, config: RunConfig, vp_stage: int | None = None) -> DiffusionLM:
    """This rank's pipeline stage of the model, or one of its virtual stages; the weights are uninitialised."""
    transformer_config = build_transformer_config(model_config, config)
    implementation, emulation = choose_implementation(config), emulation_of(config)
    own_attention = own_attention_reason(config) is not None
    spec = build_block_spec(
        transformer_config,
        implementation,
        causal=config.diffusion.objective == "ar",
        vp_stage=vp_stage,
        grafts=config.diffusion.conversion == "grafting",
        own_attention=own_attention,
        emulation=emulation,
    )
    model = DiffusionLM(
        transformer_config,
        model_config,
        spec,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        vp_stage=vp_stage,
        packs_documents=implementation == "transformer_engine" and isolates_documents(config) and not own_attention,
        output_layer=output_layer(emulation),
    ).to(device())
    if config.balancing.moe_router_enable_expert_bias:
        for router in routers(model):
            router.add_expert_bias()
    return model


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
    source = config.training.load
    grafting = Grafting(config.grafting_iters, model_config.num_layers)
    unfinished = grafting.is_active(0 if weights_only else iteration_of(directory))
    if unfinished and not weights_only:
        if not source:
            raise UserError(
                f"--load: is missing; {directory} is from before the end of the {config.grafting_iters} iterations of "
                "grafting, which need the checkpoint that the run started from; pass it again"
            )
        load_checkpoint(state, resolve(source), weights_only=True)
        grafting.remember(state)
    load_checkpoint(state, directory, weights_only)
    if unfinished and weights_only:
        grafting.remember(state)
    return grafting


def load_checkpoint(state: TrainState, directory: Path, weights_only: bool) -> None:
    """Load the iteration directory `directory` into `state`: model, optimizer, schedule and counters. Collective.

    `weights_only` loads only the model and leaves the rest as built. UserError on all ranks if the checkpoint is
    damaged or does not fit the run.
    """
    if weights_only:
        loaded = load_state(models_to_load(state.models), directory)
        fill_models(state.models, loaded)
        if state.has_fp8_weights:
            state.take_main_weights(loaded)
        else:
            state.optimizer.reload_model_params()
        return
    common = read_common(directory)
    if missing := {"optimizer_step", "scheduler", "iteration", "consumed_samples"} - common.keys():
        raise UserError(
            f"{directory}: its optimizer state is in an unknown format (it has no "
            f"{', '.join(sorted(missing))}); load only its weights with --finetune"
        )
    step: int = common["optimizer_step"]
    scheduler = {name: common["scheduler"].get(name) for name in state.scheduler.state_dict()}
    scheduler["num_steps"] = common["consumed_samples" if state.counts_samples else "iteration"]  # may have changed
    if any(type(value) not in (int, float, str, bool) for value in scheduler.values()):
        raise UserError(f"{directory}: the schedule in common.pt is damaged; use another iteration")
    optimizer = None
    if step:  # otherwise every step was skipped, and there is no optimizer state yet
        model, metadata = models_to_save(state.models), sharding_metadata()
        was_frozen = _was_frozen(directory, tied=state.models[0].share_embeddings_and_output_weights)
        optimizer = OptimizerState(state.optimizer, model, is_loading=True, metadata=metadata, has_no_state=was_frozen)
    wanted = {**models_to_load(state.models), "optimizer": optimizer.tensors if optimizer else {}}
    loaded = load_state(wanted, directory)
    fill_models(state.models, loaded)
    if optimizer:
        optimizer.load(loaded["optimizer"], step)
        if state.has_fp8_weights:
            state.restore_weights()
    else:
        state.optimizer.reload_model_params()
    state.scheduler.load_state_dict(scheduler)
    state.iteration = common["iteration"]
    state.consumed_samples = common["consumed_samples"]
    state.skipped = SkippedSamples.of(common.get("skipped_samples", []))
    state.rollbacks = common.get("rollbacks", 0)
    if state.balancing:
        try:
            state.balancing.load_state(common.get("router_loads"))
        except ValueError:  # rows of unequal length, or another model's
            raise UserError(f"{directory}: router_loads in common.pt is damaged; use another iteration") from None


def _was_frozen(directory: Path, tied: bool) -> Callable[[str], bool]:
    """Predicate on parameter names: frozen when the checkpoint was written, so it has no optimizer state there."""
    frozen = frozen_roles(read_run_settings(directory))
    return lambda name: role_of(name, tied) in frozen


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
            if isinstance(shard, ShardedTensor) and not shard.key.endswith(EXPERT_BIAS):
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
