"""A model's sharded state: the same items, whichever layers it is built of, and whichever type its weights have.

Transformer Engine keeps an extra state in each of its modules, norms included: pickled bytes that it unpickles when
they are loaded. Nothing of it is needed (scales of FP8 are computed anew; delayed scaling begins a new history), and a
checkpoint is data: the items that megatron's own linear layers have are written, empty, and none is read.
Weights in FP8 are written as what they stand for, in the parameters' type.
"""

from __future__ import annotations

from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.utils import force_all_tensors_to_non_fp8
from torch import nn

from megatron_a2d.utils.errors import UserError

_EXTRA = "_extra_state"
# The modules whose empty extra state megatron expects: those of conversion/qwen3_weight_map.py.
_MODULES = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "output_layer")


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
    """What is asked of a checkpoint for a model."""
    state = model.sharded_state_dict(metadata=metadata)
    return {
        name: value for name, value in state.items() if not (isinstance(value, ShardedObject) and _EXTRA in value.key)
    }


def dequantise(state: Any) -> None:
    """Replace FP8 tensors in a sharded state by what they stand for."""
    force_all_tensors_to_non_fp8(state)


def fill_model(model: nn.Module, loaded: dict[str, Any]) -> None:
    """Copy loaded tensors into the model; every parameter must be there."""
    result = model.load_state_dict(loaded, strict=False)
    missing = [name for name in result.missing_keys if _EXTRA not in name]
    if missing or result.unexpected_keys:
        raise UserError(f"the checkpoint does not fill the model: missing {missing}, unknown {result.unexpected_keys}")
