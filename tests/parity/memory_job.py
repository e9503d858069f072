"""What a rank really holds: every weight, gradient buffer and optimizer state, and what its layers keep for the backward
pass. The planner's figures are compared with it (tests/unit/test_planner_memory.py)."""

from __future__ import annotations

import gc
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core import parallel_state

from megatron_a2d.model import matrix_products
from megatron_a2d.training.train_state import TrainState
from tests.parity.parity_jobs import _start, _step


def measure_memory(checkpoint: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Counts and bytes on this rank after one step, as on a processor with bf16 products.

    Elsewhere attention keeps its operands in fp32, which the planner does not model.
    """
    config, state, batches = _start(checkpoint, settings)
    kept = [_Kept(model) for model in state.models]
    for watcher in kept:
        watcher.watch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matrix_products, "_has_bf16_products", lambda: True)
        _step(config, state, batches)
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    experts = parallel_state.get_expert_data_parallel_group()
    return {
        "stage": parallel_state.get_pipeline_model_parallel_rank(),
        "replica": (torch.distributed.get_rank(group), torch.distributed.get_rank(experts)),
        "parameters": [_parameters(model) for model in state.models],
        "buffers": [
            buffer.numel for chunk in state.chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)
        ],
        "gradient_bytes": sum(_buffer_bytes(state, "grad_data")),
        "optimizer_bytes": _optimizer_bytes(state),
        "layer_bytes": [watcher.largest for watcher in kept],
    }


def left_by_a_step(checkpoint: str, settings: dict[str, Any]) -> dict[str, list[str]]:
    """What outlives a step's passes: tensors in reference cycles, and tensors of modules that keep a graph."""
    config, state, batches = _start(checkpoint, settings)
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        _step(config, state, batches)
        gc.collect()
        cycles = [str(tuple(item.shape)) for item in gc.garbage if isinstance(item, torch.Tensor)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    return {"cycles": cycles, "graphs": [name for model in state.models for name in _graphs(model)]}


def _graphs(model: torch.nn.Module) -> Iterator[str]:
    """Attributes of modules and of their helpers, such as token dispatchers, that hold an autograd graph."""
    for name, module in model.named_modules():
        for helper in (module, *(value for value in vars(module).values() if hasattr(value, "__dict__"))):
            for attribute, value in vars(helper).items():
                if isinstance(value, torch.Tensor) and value.grad_fn is not None:
                    yield f"{name}: {type(helper).__name__}.{attribute}"


def _parameters(model: torch.nn.Module) -> dict[str, list[int]]:
    """Name, experts' numbers left out -> [values of one, how many]."""
    sizes, counts = {}, Counter[str]()
    for name, parameter in model.named_parameters():
        name = re.sub(r"local_experts\.\d+", "local_experts.*", name)
        sizes[name] = parameter.numel()
        counts[name] += 1
    return {name: [sizes[name], counts[name]] for name in sizes}


def _buffer_bytes(state: TrainState, what: str) -> list[int]:
    return [
        getattr(buffer, what).numel() * getattr(buffer, what).element_size()
        for chunk in state.chunks
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)
    ]


def _optimizer_bytes(state: TrainState) -> int:
    """Moments and main weights; those that are the model's own weights are not counted again."""
    own = {parameter.untyped_storage().data_ptr() for model in state.models for parameter in model.parameters()}
    total = 0
    for part in getattr(state.optimizer, "chained_optimizers", [state.optimizer]):
        adam = part.optimizer
        for group in adam.param_groups:
            for main in group["params"]:
                moments = [value for value in adam.state[main].values() if torch.is_tensor(value) and value.dim() > 0]
                total += sum(value.numel() * value.element_size() for value in moments)
                if main.untyped_storage().data_ptr() not in own:
                    total += main.numel() * main.element_size()
    return total


class _Kept:
    """Bytes that a model's layers keep in a forward pass: every storage once, no weights."""

    def __init__(self, model: Any):
        self._model, self.largest = model, 0

    def watch(self) -> None:
        forward = self._model.decoder.forward
        weights = {parameter.untyped_storage().data_ptr() for parameter in self._model.parameters()}

        def counted(*args: Any, **kwargs: Any) -> Any:
            found: dict[int, int] = {}

            def keep(tensor: torch.Tensor) -> torch.Tensor:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in weights:
                    found[storage.data_ptr()] = storage.nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                result = forward(*args, **kwargs)
            self.largest = max(self.largest, sum(found.values()))
            return result

        self._model.decoder.forward = counted
