"""The optimizer's part of a checkpoint, in one form for every layout and every kind of optimizer.

Each parameter's state lies in the checkpoint under `optimizer.state.NAME.PARAMETER`, in the parameter's own shape and
sharding: NAME is exp_avg, exp_avg_sq, and fp32_param for the main copy of a parameter in lower precision. One number
goes with them, Adam's step. megatron.core's optimizers write the same tensors, but each kind wraps them in its own way,
with its parameter groups in its own order: a checkpoint of one kind then loads into no other. Here only tensors
and step are kept; the groups, with their learning rates and decays, come from the settings.

A parameter that was frozen when the checkpoint was written has no state in it. Where it is trained now, its moments
begin at zero, and its main copy as its weight. Adam's step is that of all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedBase
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_a2d.megatron_compat.device import device


def adam_step(optimizer: MegatronOptimizer) -> int:
    """Number of updates so far; skipped steps do not count."""
    return max((int(group.get("step", 0)) for group in optimizer.param_groups), default=0)


class OptimizerState:
    """The optimizer's sharded tensors, for a save or for a load."""

    def __init__(
        self,
        optimizer: MegatronOptimizer,
        model: dict[str, Any],
        is_loading: bool,
        metadata: dict[str, Any],
        begins: Callable[[str], bool] = lambda name: False,
    ) -> None:
        """`model`: the sharded state of the model's chunks, as directory.py names them. `begins`: whether the
        checkpoint holds no state of the parameter with this name. Collective."""
        chunks = model if len(model) > 1 else next(iter(model.values()))
        self._parts = {
            number: (part, part.sharded_state_dict(chunks, is_loading=is_loading, metadata=metadata))
            for number, part in enumerate(getattr(optimizer, "chained_optimizers", [optimizer]))
            if not getattr(part, "is_stub_optimizer", False)
        }
        # An fp32 parameter is its own main copy: it is in the checkpoint once, as the model's.
        self._own_copies = [pair for part, state in self._parts.values() for pair in _take_own_copies(part, state)]
        self.tensors: dict[str, Any] = {}  # what goes to, or is asked of, the checkpoint
        self._places: dict[str, tuple[Any, Any]] = {}
        self._beginning: list[tuple[Any, Any, Callable[[], torch.Tensor]]] = []
        for number, (part, state) in self._parts.items():
            copied = {(id(container), key): parameter for container, key, parameter in _main_copies(part, state)}
            for container, key, value in _leaves(state):
                # The distributed optimizer calls it param, the other one fp32_param.
                value.key = value.key.replace("optimizer.state.param.", "optimizer.state.fp32_param.")
                if begins(value.key.split(".", 3)[3]):
                    self._beginning.append((container, key, _first_value(value, copied.get((id(container), key)))))
                    continue
                place = f"{number}.{len(self._places)}"
                self.tensors[place], self._places[place] = value, (container, key)

    def load(self, loaded: dict[str, Any], step: int) -> None:
        """Give the optimizer the tensors that were read for `tensors`, and the step. The model is loaded before."""
        for container, parameter in self._own_copies:
            container["param"] = parameter.data
        for place, (container, key) in self._places.items():
            container[key] = loaded[place]
        for container, key, first_value in self._beginning:
            container[key] = first_value()
        for part, state in self._parts.values():
            for group in state.get("optimizer", state)["param_groups"]:
                group["step"] = step
                if isinstance(numbers := group.get("params"), LocalNonpersistentObject):
                    group["params"] = numbers.unwrap()
            part.load_state_dict(state)


def _leaves(state: Any) -> Iterator[tuple[Any, Any, Any]]:
    """(container, key, tensor) of every sharded tensor in nested dicts and lists."""
    for key, value in list(state.items() if isinstance(state, dict) else enumerate(state)):
        if isinstance(value, ShardedBase):
            yield state, key, value
        elif isinstance(value, dict | list):
            yield from _leaves(value)


def _first_value(value: ShardedBase, parameter: torch.Tensor | None) -> Callable[[], torch.Tensor]:
    """Of a moment, or of the main copy of `parameter`, which is loaded by the time that this is called."""
    if parameter is not None:
        return lambda: parameter.detach().float()
    return lambda: torch.zeros(value.data.shape, dtype=value.data.dtype, device=device())


def _main_copies(part: MegatronOptimizer, state: dict[str, Any]) -> Iterator[tuple[Any, Any, torch.Tensor]]:
    """(container, key, parameter) of every main copy of a parameter in lower precision."""
    if isinstance(part, DistributedOptimizer):
        parameters = [parameter for buffer in part.buffers for parameter in buffer.param_index_map]
        for container, parameter in zip(state["param_state"].values(), parameters, strict=True):
            yield container, "param", parameter
        return
    for copies, group in zip(state.get("fp32_from_fp16_params", ()), getattr(part, "float16_groups", ()), strict=True):
        for number, parameter in enumerate(group):
            yield copies, number, parameter


def _take_own_copies(part: MegatronOptimizer, state: dict[str, Any]) -> list[tuple[dict[str, Any], torch.Tensor]]:
    """Remove fp32 parameters from the distributed optimizer's state; returns where each one was."""
    if not isinstance(part, DistributedOptimizer):
        return []
    parameters = [parameter for buffer in part.buffers for parameter in buffer.param_index_map]
    own = [
        pair for pair in zip(state["param_state"].values(), parameters, strict=True) if pair[1].dtype == torch.float32
    ]
    for container, _ in own:
        del container["param"]
    return own
