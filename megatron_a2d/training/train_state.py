"""Everything that is built before the first step: model, optimizer, schedule, from one configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_a2d.config.fp8_recipe import choose_scaling
from megatron_a2d.config.model_config import ModelConfig
from megatron_a2d.config.settings import RunConfig
from megatron_a2d.config.validate_performance import isolates_documents
from megatron_a2d.megatron_compat.device import compute_capability, cuda_version, device
from megatron_a2d.megatron_compat.versions import allow_schedule_plans, mark_expert_parameters
from megatron_a2d.model.diffusion_lm import DiffusionLM
from megatron_a2d.model.layer_specs import build_block_spec, choose_implementation
from megatron_a2d.model.transformer_config import build_transformer_config
from megatron_a2d.training.optimizer import build_optimizer, build_scheduler, freeze_roles, reuses_gradient_buffer
from megatron_a2d.training.param_gather import gather_weights


@dataclass
class TrainState:
    """What changes in training, and what a checkpoint holds."""

    chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    iteration: int = 0
    consumed_samples: int = 0

    @property
    def models(self) -> list[DiffusionLM]:
        """The bare models of this rank's chunks."""
        return [chunk.module for chunk in self.chunks]

    @property
    def has_fp8_weights(self) -> bool:
        """--fp8-param-gather: the model's weights are made from the optimizer's main weights, not the other way."""
        return any(chunk.ddp_config.fp8_param_gather for chunk in self.chunks)

    def take_main_weights(self, loaded: dict[str, Any]) -> None:
        """Weights in FP8 are not what was read any more: the main weights are made of that, by the parameters' names.

        `loaded`: the chunks' tensors as checkpointing.py names them. (megatron.core matches parts of names, and gives
        the experts' optimizer nothing.)
        """
        tensors = loaded.values() if len(self.chunks) > 1 else [loaded["model"]]
        read = {
            parameter: chunk_tensors[name]
            for model, chunk_tensors in zip(self.models, tensors, strict=True)
            for name, parameter in model.named_parameters()
        }
        for part in self._optimizers:
            part._build_model_param_to_state_dict_param_map = lambda _: read
            part.reload_model_params(state_dict=loaded)

    @property
    def _optimizers(self) -> list[Any]:
        """The parts of a chained optimizer: that of the experts, and that of the rest."""
        return list(getattr(self.optimizer, "chained_optimizers", [self.optimizer]))

    def restore_weights(self) -> None:
        """Make the model's weights of the main weights, for a run that was resumed. Collective."""
        if self.chunks[0].ddp_config.reuse_grad_buf_for_mxfp8_param_ag:
            self.gather_parameters()
            return
        for part in self._optimizers:
            part._copy_main_params_to_model_params()
        for chunk in self.chunks:
            chunk.start_param_sync(force_sync=True)

    def gather_parameters(self) -> None:
        """Fetch what the last step updated: with --overlap-param-gather the next step would. Collective."""
        gather_weights(self.chunks, self.optimizer)


def build_model(model_config: ModelConfig, config: RunConfig, vp_stage: int | None = None) -> DiffusionLM:
    """This rank's part of the model, or one of its virtual stages; its weights mean nothing before a load."""
    transformer_config = build_transformer_config(model_config, config)
    implementation = choose_implementation(config)
    spec = build_block_spec(
        transformer_config,
        implementation,
        causal=config.diffusion.objective == "ar",
        vp_stage=vp_stage,
        grafts=config.diffusion.conversion == "grafting",
    )
    return DiffusionLM(
        transformer_config,
        model_config,
        spec,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        vp_stage=vp_stage,
        packs_documents=implementation == "transformer_engine" and isolates_documents(config),
    ).to(device())


def build_train_state(model_config: ModelConfig, config: RunConfig) -> TrainState:
    """Model, optimizer and schedule at iteration 0."""
    if config.performance.overlap_moe_expert_parallel_comm:
        allow_schedule_plans()
    virtual = config.parallel.virtual_pipeline_size
    models = [build_model(model_config, config, vp_stage) for vp_stage in (range(virtual) if virtual else [None])]
    performance, scaling = (
        config.performance,
        choose_scaling(config.performance.fp8_recipe, compute_capability(), cuda_version()),
    )
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
    for number, model in enumerate(models):
        mark_expert_parameters(model)
        freeze_roles(model, config.optimization.lr_mult, model_config.tie_word_embeddings)
        # Buckets are for overlap with the backward pass; later chunks' gradients are ready when the first one's are.
        chunks.append(DistributedDataParallel(model.config, ddp_config, model, disable_bucketing=number > 0))
    optimizer = build_optimizer(config, chunks, tied=model_config.tie_word_embeddings)
    for model in models:
        model.config.finalize_model_grads_func = finalize_model_grads
        model.config.grad_scale_func = optimizer.scale_loss
        if config.parallel.overlap_grad_reduce:
            model.config.no_sync_func = [chunk.no_sync for chunk in chunks] if virtual else chunks[0].no_sync
    return TrainState(chunks, optimizer, build_scheduler(config, optimizer))
