"""Everything that is built before the first step: model, optimizer, schedule, from one configuration."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_a2d.architecture import Architecture
from megatron_a2d.config import RunConfig
from megatron_a2d.model.diffusion_lm import DiffusionLM
from megatron_a2d.model.specs import build_block_spec, choose_implementation
from megatron_a2d.model.transformer_config import build_transformer_config
from megatron_a2d.runtime.device import device
from megatron_a2d.runtime.upstream import mark_expert_parameters
from megatron_a2d.training.optimizer import build_optimizer, build_scheduler


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


def build_model(architecture: Architecture, config: RunConfig) -> DiffusionLM:
    """This rank's part of the model, with uninitialised meaning: load a checkpoint next."""
    transformer_config = build_transformer_config(architecture, config)
    implementation = choose_implementation(config.training.transformer_impl)
    spec = build_block_spec(transformer_config, implementation, causal=config.diffusion.objective == "ar")
    return DiffusionLM(
        transformer_config,
        architecture,
        spec,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    ).to(device())


def build_train_state(architecture: Architecture, config: RunConfig) -> TrainState:
    """Model, optimizer and schedule at iteration 0."""
    model = build_model(architecture, config)
    mark_expert_parameters(model)
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=config.parallel.use_distributed_optimizer,
        # Gradients are summed; the one division is by the global number of maskable tokens.
        average_in_collective=False,
    )
    chunk = DistributedDataParallel(model.config, ddp_config, model)
    optimizer = build_optimizer(config, [chunk], tied=architecture.tie_word_embeddings)
    model.config.finalize_model_grads_func = finalize_model_grads
    model.config.grad_scale_func = optimizer.scale_loss
    return TrainState([chunk], optimizer, build_scheduler(config, optimizer))
