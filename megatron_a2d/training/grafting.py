"""Stages of --conversion grafting, as a function of the iteration alone.

    0 .. N-1   on clean text, each layer's bidirectional attention is regressed on the outputs of the causal one. The
               residual stream uses the new operator in the first floor(layers * iteration / N) layers and the old one
               in the others: the layers are swapped in one after another, and each regresses on its later inputs.
    N ..       the model is bidirectional and is trained like any other.

N is --grafting-iters. The weights of the old operators are those of the checkpoint in --load: a run that resumes before
N reads them from there again, so checkpoints contain only the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_a2d.megatron_compat.device import device
from megatron_a2d.model.grafted_attention import GraftedSelfAttention
from megatron_a2d.training.train_state import TrainState


class Grafting:
    """Grafting of a run; does nothing with `num_steps` 0."""

    def __init__(self, num_steps: int = 0, num_layers: int = 0):
        self._num_steps, self._num_layers = num_steps, num_layers
        self._old: dict[GraftedSelfAttention, dict[str, Tensor]] = {}
        self._has_own_tokens = False

    def remember(self, state: TrainState) -> None:
        """Use the model's current weights as those of the old operators."""
        modules = [module for model in state.models for module in model.modules()]
        self._old = {module: module.remember_old() for module in modules if isinstance(module, GraftedSelfAttention)}
        self._has_own_tokens = bool(state.models[0].config.sequence_parallel)

    def is_active(self, iteration: int) -> bool:
        """Whether the step that follows `iteration` completed ones regresses attention."""
        return iteration < self._num_steps

    @contextmanager
    def step(self, state: TrainState) -> Iterator[None]:
        """Context around a training step, after the step of the scheduler."""
        if not self.is_active(state.iteration):
            self._old = {}
            yield
            return
        swapped = self._num_layers * state.iteration // self._num_steps
        for module, weights in self._old.items():
            module.start_grafting(weights, feeds_new=module.layer_number <= swapped)
        # Only attention is trained: other gradients are zero, and weight decay must not change those weights.
        for group in state.optimizer.param_groups:
            group["weight_decay"] = 0.0
        if state.balancing:
            state.balancing.is_paused = True
        try:
            yield
        finally:
            if state.balancing:
                state.balancing.is_paused = False
            for module in self._old:
                module.stop_grafting()

    def take_error(self) -> Tensor:
        """The last step's regression errors, summed over this rank's tokens and averaged over layers; scalar float64.

        May be summed over ranks. A second call returns 0.
        """
        error = torch.zeros((), dtype=torch.float64, device=device())
        # Without sequence parallelism all tensor-parallel ranks have the same tokens: one of them reports.
        if parallel_state.get_tensor_model_parallel_rank() == 0 or self._has_own_tokens:
            for module in self._old:
                error += module.take_error()
        return error
