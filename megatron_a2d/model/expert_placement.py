"""Expert placement: which expert each expert-parallel rank holds, layer by layer.

A rank of n experts holds n slots; without a placement slot j holds expert j. A placement is a permutation, and changes
nothing that is computed: routers, their counts, checkpoints and exports keep the original numbers. In two places only,
numbers become slots: in the router's output (router.py), and in the sharded state dict, by which checkpoints are read
and written. Shapes: T tokens, E experts or slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedObject, ShardedTensorFactory
from torch import Tensor

from megatron_a2d.megatron_compat.device import device


class Slots:
    """The experts of a layer's slots."""

    def __init__(self, order: Sequence[int]):
        assert sorted(order) == list(range(len(order)))
        self.order = list(order)
        self._expert_E = torch.tensor(self.order, device=device())
        self._slot_E = self._expert_E.argsort()

    def by_slot(self, by_expert_TE: Tensor) -> Tensor:
        """Columns of experts as columns of slots."""
        columns: Tensor = _Columns.apply(by_expert_TE, self._expert_E, self._slot_E)
        return columns


class _Columns(torch.autograd.Function):
    """Permuted columns. (The gradient of `index_select` would add into zeros, by atomics on a GPU.)"""

    @staticmethod
    def forward(ctx: Any, columns_TE: Tensor, order_E: Tensor, inverse_E: Tensor) -> Tensor:
        ctx.inverse_E = inverse_E
        return columns_TE.index_select(1, order_E)

    @staticmethod
    def backward(ctx: Any, gradient_TE: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return gradient_TE.index_select(1, ctx.inverse_E), None, None


def with_original_numbers(state: dict[str, Any], prefix: str, slots: Slots) -> None:
    """Give this rank's experts in a sharded state dict the numbers that they have in a checkpoint.

    `prefix`: of the names of a layer's experts. Any implementation of experts will do, local or Transformer Engine's,
    grouped or not: their shards begin with the slot.
    """
    for name, value in state.items():
        if name.startswith(prefix):
            state[name] = _renumbered(value, slots.order)


def _renumbered(value: ShardedBase, order: list[int]) -> ShardedBase:
    if isinstance(value, ShardedObject):  # the extra state of an expert
        return replace(value, global_offset=(*value.global_offset[:-1], order[value.global_offset[-1]]))
    if isinstance(value, ShardedTensor) and _is_one(value):
        return _one(value, order)
    original = value

    # The optimizer builds the shards of its own tensors in this way.
    def build(key: str, data: Tensor, replica_id: Any, flattened_range: Any) -> list[list[ShardedTensor]]:
        if isinstance(original, ShardedTensorFactory):
            built = list(nested_values(original.build_fn(key, data, replica_id, flattened_range)))
        else:
            built = [replace(original, key=key, data=data, dtype=data.dtype, replica_id=replica_id)]
        return [[_one(part, order) for part in _experts(shard)] for shard in built]

    def merge(loaded: list[list[Tensor]]) -> Tensor:
        whole = [experts[0] if len(experts) == 1 else torch.cat(experts) for experts in loaded]
        merged: Tensor = original.merge_fn(whole) if isinstance(original, ShardedTensorFactory) else whole[0]
        return merged

    return ShardedTensorFactory(original.key, original.data, build, merge, original.replica_id)


def _axis(shard: ShardedTensor) -> int:
    """The axis of the experts in a tensor [(layers), experts, rows, columns]."""
    return len(shard.global_shape) - 3


def _is_one(shard: ShardedTensor) -> bool:
    return _axis(shard) < shard.prepend_axis_num


def _experts(shard: ShardedTensor) -> list[ShardedTensor]:
    """The shard of each expert."""
    if _is_one(shard):
        return [shard]
    axis = _axis(shard)
    assert axis == shard.prepend_axis_num, f"{shard.key} does not begin with its experts"
    first, total = shard.global_offset[axis], shard.global_shape[axis]
    return [
        replace(
            shard,
            data=None if shard.data is None else shard.data[number : number + 1],
            local_shape=(1, *shard.local_shape[1:]),
            global_offset=(*shard.global_offset[:axis], first + number, *shard.global_offset[axis + 1 :]),
            axis_fragmentations=(*shard.axis_fragmentations[:axis], total, *shard.axis_fragmentations[axis + 1 :]),
        )
        for number in range(shard.local_shape[0])
    ]


def _one(shard: ShardedTensor, order: list[int]) -> ShardedTensor:
    axis = _axis(shard)
    number = order[shard.global_offset[axis]]
    return replace(shard, global_offset=(*shard.global_offset[:axis], number, *shard.global_offset[axis + 1 :]))
