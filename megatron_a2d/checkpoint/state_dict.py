"""Sharded state dicts of model and optimizer, in one form for every layout, implementation and kind of optimizer.

Model. Transformer Engine keeps an extra state in each of its modules, norms included: pickled bytes that it unpickles
on load. None of it is needed (FP8 scales are recomputed; delayed scaling starts a new history), and a checkpoint is
data: the items that megatron's own linear layers have are written, empty, and none is read. FP8 weights are written
dequantised, in the parameters' dtype.

Optimizer. Each parameter's state is stored under `optimizer.state.NAME.PARAMETER`, in the parameter's own shape and
sharding: NAME is exp_avg, exp_avg_sq (of Muon: momentum_buffer), and fp32_param for the main copy of a parameter in
lower precision. The only other item is the number of updates, Adam's step. megatron.core's optimizers write the same
tensors, but each kind wraps them in its own way, with its parameter groups in its own order, so that a checkpoint of
one kind loads into no other. Here only tensors and step are stored; the groups, with their learning rates and decays,
follow from the settings.

A parameter that was frozen when the checkpoint was written has no state in it. If it is trained now, its moments start
at zero, and its main copy as its weight; Adam's step is shared by all parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedBase, ShardedObject
from megatron.core.dist_checkpointing.utils import force_all_tensors_to_non_fp8
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import nn

from megatron_a2d.megatron_compat.device import device
from megatron_a2d.megatron_compat.optimizer_chain import members, whole_matrix_members
from megatron_a2d.utils.errors import UserError

# Optimizer state that any other layout can load, without a prefix that depends on the number of chained optimizers.
CONTENT_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}

_EXTRA = "_extra_state"
# The modules whose empty extra state megatron expects: those of conversion/weight_map.py.
_MODULES = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "output_layer")


def sharding_metadata() -> dict[str, Any]:
    """The `metadata` of megatron's sharded_state_dict methods."""
    return {**CONTENT_METADATA, "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}


def models_to_save(models: Sequence[nn.Module]) -> dict[str, Any]:
    """The sharded state of this rank's models (virtual pipeline stages); the optimizer matches its parameters to it."""
    return {name: state_to_save(model, sharding_metadata()) for name, model in _by_key(models).items()}


def models_to_load(models: Sequence[nn.Module]) -> dict[str, Any]:
    """The sharded state of this rank's models to request from a checkpoint."""
    return {name: state_to_load(model, sharding_metadata()) for name, model in _by_key(models).items()}


def fill_models(models: Sequence[nn.Module], loaded: dict[str, Any]) -> None:
    """Copy what was loaded for `models_to_load` into the models."""
    for name, model in _by_key(models).items():
        fill_model(model, loaded[name])


def _by_key(models: Sequence[nn.Module]) -> dict[str, nn.Module]:
    """Models by the keys that megatron's optimizers expect: "model", or "model0", ... (virtual stages)."""
    return {"model": models[0]} if len(models) == 1 else {f"model{n}": model for n, model in enumerate(models)}


def state_to_save(model: Any, metadata: dict[str, Any]) -> dict[str, Any]:
    """The sharded state of a model for a checkpoint; tensors are the model's own, except where they are FP8."""
    state = {}
    for name, value in model.sharded_state_dict(metadata=metadata).items():
        if isinstance(value, ShardedObject) and _EXTRA in value.key:
            if value.key.removesuffix(f".{_EXTRA}").rpartition(".")[2] not in _MODULES:
                continue
            value.data = None
        state[name] = value
    return state


def state_to_load(model: Any, metadata: dict[str, Any]) -> dict[str, Any]:
    """The sharded state of a model to request from a checkpoint."""
    state = model.sharded_state_dict(metadata=metadata)
    return {
        name: value for name, value in state.items() if not (isinstance(value, ShardedObject) and _EXTRA in value.key)
    }


def dequantise(state: Any) -> None:
    """Replace the FP8 tensors of a sharded state by their dequantised values."""
    force_all_tensors_to_non_fp8(state)


def fill_model(model: nn.Module, loaded: dict[str, Any]) -> None:
    """Copy loaded tensors into a model; UserError if a parameter is missing."""
    result = model.load_state_dict(loaded, strict=False)
    optional = (_EXTRA, "router.expert_bias")  # biases that a checkpoint lacks are zero (load.py)
    missing = [name for name in result.missing_keys if not any(part in name for part in optional)]
    if missing or result.unexpected_keys:
        raise UserError(f"the checkpoint does not fill the model: missing {missing}, unknown {result.unexpected_keys}")


def optimizer_step(optimizer: MegatronOptimizer) -> int:
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
        has_no_state: Callable[[str], bool] = lambda name: False,
    ) -> None:
        """Collective. `model`: the result of `models_to_save`. `has_no_state`: whether the checkpoint lacks state for
        the parameter of a given name.
        """
        chunks = model if len(model) > 1 else next(iter(model.values()))
        self._parts = {
            number: (part, part.sharded_state_dict(chunks, is_loading=is_loading, metadata=metadata))
            for number, part in enumerate(members(optimizer))
            if not getattr(part, "is_stub_optimizer", False)
        }
        # An fp32 parameter is its own main copy: it is in the checkpoint once, as the model's.
        self._own_copies = [pair for part, state in self._parts.values() for pair in _take_own_copies(part, state)]
        self.tensors: dict[str, Any] = {}  # to be saved, or to be requested from the checkpoint
        self._slots: dict[str, tuple[Any, Any]] = {}
        self._initial: list[tuple[Any, Any, Callable[[], torch.Tensor]]] = []
        on_this_rank_alone = whole_matrix_members(optimizer)
        for number, (part, state) in self._parts.items():
            copied = {(id(container), key): parameter for container, key, parameter in _main_copies(part, state)}
            for container, key, value in _leaves(state):
                # The distributed optimizer calls it param, the other optimizer fp32_param.
                value.key = value.key.replace("optimizer.state.param.", "optimizer.state.fp32_param.")
                if part in on_this_rank_alone:  # no data-parallel rank has another copy
                    value.replica_id = (*value.replica_id[:2], 0)
                if has_no_state(value.key.split(".", 3)[3]):
                    self._initial.append((container, key, _first_value(value, copied.get((id(container), key)))))
                    continue
                slot = f"{number}.{len(self._slots)}"
                self.tensors[slot], self._slots[slot] = value, (container, key)

    def load(self, loaded: dict[str, Any], step: int) -> None:
        """Load what was read for `tensors`, and the step, into the optimizer; the model must be loaded already."""
        for container, parameter in self._own_copies:
            container["param"] = parameter.data
        for slot, (container, key) in self._slots.items():
            container[key] = loaded[slot]
        for container, key, first_value in self._initial:
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
    """Initial value of a moment, 0, or of the main copy of `parameter`, which must be loaded before the call."""
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
    """Remove fp32 parameters from the distributed optimizer's state; returns each with the dict that held it."""
    if not isinstance(part, DistributedOptimizer):
        return []
    parameters = [parameter for buffer in part.buffers for parameter in buffer.param_index_map]
    own = [
        pair for pair in zip(state["param_state"].values(), parameters, strict=True) if pair[1].dtype == torch.float32
    ]
    for container, _ in own:
        del container["param"]
    return own
