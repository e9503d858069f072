"""CUDA graphs of Transformer Engine layers (--cuda-graph-impl transformer_engine): captured after a few steps.

(With --cuda-graph-impl local megatron.core's schedule captures them itself.)
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_a2d.config.settings import RunConfig
from megatron_a2d.model.transformer_config import GRAPH_WARMUP_STEPS
from megatron_a2d.training.train_state import TrainState


class CudaGraphs:
    """CUDA graphs of a run's layers; does nothing without --cuda-graph-impl transformer_engine."""

    def __init__(self, state: TrainState, config: RunConfig):
        self._state, self._steps = state, 0
        self._helper: Any = None
        if config.performance.cuda_graph_impl != "transformer_engine":
            return
        from megatron.core.num_microbatches_calculator import reconfigure_num_microbatches_calculator
        from megatron.core.transformer.cuda_graphs import TECudaGraphHelper

        training = config.training
        reconfigure_num_microbatches_calculator(
            0, None, training.global_batch_size, training.micro_batch_size,
            config.data_parallel_size(torch.distributed.get_world_size()), False,
        )  # fmt: skip
        self._hooks = config.parallel.overlap_param_gather
        self._helper = TECudaGraphHelper(
            model=state.chunks,
            config=state.models[0].config,
            seq_length=config.data.seq_length,
            micro_batch_size=config.training.micro_batch_size,
            optimizers=[state.optimizer],
        )

    def before_step(self) -> None:
        """To be called before each training step."""
        if self._helper is not None and self._steps == GRAPH_WARMUP_STEPS:
            self._capture()
        self._steps += 1

    def _capture(self) -> None:
        # Hooks that wait for gathered weights cannot be captured; they are called manually before a replay.
        for chunk in self._state.chunks if self._hooks else ():
            chunk.disable_forward_pre_hook(param_sync=False)
        self._helper.create_cudagraphs()
        for chunk in self._state.chunks if self._hooks else ():
            chunk.enable_forward_pre_hook()
        if self._hooks:
            self._helper.cuda_graph_set_manual_hooks()
