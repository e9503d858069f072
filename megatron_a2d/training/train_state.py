"""Train state: what changes during training and is stored in a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from megatron_a2d.checkpoint.placement_file import ExpertPlacement
from megatron_a2d.config.batch_schedule import BatchSchedule
from megatron_a2d.config.skipped_samples import NONE_SKIPPED, Range, SkippedSamples
from megatron_a2d.megatron_compat.optimizer_chain import members
from megatron_a2d.model.diffusion_lm import DiffusionLM
from megatron_a2d.training.balancing import RunBalancing
from megatron_a2d.training.param_gather import gather_weights


@dataclass
class TrainState:
    """Model, optimizer, schedule and counters of a run; built and initialised in initialization.py."""

    chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    balancing: RunBalancing | None = None  # of the routers; None for a dense model
    iteration: int = 0
    consumed_samples: int = 0
    skipped: SkippedSamples = NONE_SKIPPED  # so far
    rollbacks: int = 0  # of --on-spike, so far
    counts_samples: bool = False  # the scheduler's steps are samples; else iterations
    placement: ExpertPlacement | None = None  # of the experts of `models`, for this layout or another one

    @property
    def models(self) -> list[DiffusionLM]:
        """The bare models of this rank's chunks."""
        return [chunk.module for chunk in self.chunks]

    def place_experts(self, placement: ExpertPlacement) -> None:
        """Lay the experts out by `placement` if it was made for this layout, and keep it for the run's checkpoints.

        Before weights are loaded.
        """
        self.placement = placement
        if placement.applies_to(self.models[0].config.expert_model_parallel_size):
            for model in self.models:
                model.place_experts(placement.order)

    @property
    def has_fp8_weights(self) -> bool:
        """--fp8-param-gather: the model's weights are quantised from the optimizer's main weights, not vice versa."""
        return any(chunk.ddp_config.fp8_param_gather for chunk in self.chunks)

    def take_main_weights(self, loaded: dict[str, Any]) -> None:
        """Set the optimizer's main weights to the loaded tensors, of which FP8 weights are only the rounded values.

        `loaded`: the result of loading `models_to_load` (checkpoint/state_dict.py). (megatron.core matches parts of
        names, and leaves the experts' optimizer out.)
        """
        tensors = loaded.values() if len(self.chunks) > 1 else [loaded["model"]]
        read = {
            parameter: chunk_tensors[name]
            for model, chunk_tensors in zip(self.models, tensors, strict=True)
            for name, parameter in model.named_parameters()
        }
        for part in members(self.optimizer):
            part._build_model_param_to_state_dict_param_map = lambda _: read
            part.reload_model_params(state_dict=loaded)

    def samples_since(self, iteration: int, batch_sizes: BatchSchedule) -> Range:
        """The indices of the samples of the iterations after `iteration`, up to the present one."""
        places = batch_sizes.samples_before(iteration), self.consumed_samples - 1
        return Range(*map(self.skipped.index_of, places))

    def tensors(self) -> Iterator[Tensor]:
        """Tensors that a step changes: weights, gradients, and the optimizer's main weights and moments."""
        for chunk in self.chunks:
            yield from chunk.parameters()
            yield from (buffer.grad_data for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers))
        for part in members(self.optimizer):
            for parameter, moments in part.optimizer.state.items() if part.optimizer else ():
                yield parameter
                yield from (value for value in moments.values() if isinstance(value, Tensor))

    def restore_weights(self) -> None:
        """Set the model's weights from the main weights, for a resumed run. Collective."""
        if self.chunks[0].ddp_config.reuse_grad_buf_for_mxfp8_param_ag:
            self.gather_parameters()
            return
        for part in members(self.optimizer):
            part._copy_main_params_to_model_params()
        for chunk in self.chunks:
            chunk.start_param_sync(force_sync=True)

    def gather_parameters(self) -> None:
        """All-gather what the last step updated; with --overlap-param-gather the next step would do it. Collective."""
        gather_weights(self.chunks, self.optimizer)
