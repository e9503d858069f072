"""Random weights for a run from scratch (--conversion random), the same in every layout.

Each element is a function of (seed, the tensor's name in the checkpoint, the element's place in the whole tensor): a
rank draws what it holds, and need not know what the others hold. As Hugging Face's Qwen3: matrices and embeddings are
normal with the architecture's `initializer_range`, norms are one.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import numpy as np
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

from megatron_a2d.training.setup import TrainState

_PIECE = 1 << 22  # elements that are drawn at once


@torch.no_grad()
def draw_weights(state: TrainState, seed: int, standard_deviation: float) -> None:
    """Fill the model's weights; the optimizer follows."""
    for model in state.models:
        parameters = list(model.parameters())
        for parameter in parameters:
            parameter.fill_(float("nan"))
        sharded = model.sharded_state_dict(metadata={"dp_cp_group": None})
        apply_factories(sharded)  # their parts are views of the parameters
        for shard in nested_values(sharded):
            if isinstance(shard, ShardedTensor):
                _fill(shard, seed, standard_deviation)
        assert not any(bool(parameter.isnan().any()) for parameter in parameters), "a weight was left out"
    state.optimizer.reload_model_params()


def normals(seed: int, name: str, start: int, count: int) -> np.ndarray:
    """The elements start .. start + count - 1 of a tensor, standard normal, [count] float32."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    # A Philox counter stands for four numbers of 64 bits: four elements, of 32 bits each for radius and angle.
    first, skipped = divmod(start, 4)
    generator = np.random.Philox(key=int.from_bytes(digest[:16], "little"), counter=first)
    bits = generator.random_raw(skipped + count)[skipped:]
    radius = np.sqrt(-2 * np.log(((bits >> np.uint64(32)).astype(np.float64) + 0.5) * 2.0**-32))
    angle = (bits & np.uint64(0xFFFFFFFF)).astype(np.float64) * (2 * math.pi * 2.0**-32)
    return (radius * np.cos(angle)).astype(np.float32)


def _fill(shard: ShardedTensor, seed: int, standard_deviation: float) -> None:
    data = shard.data
    assert data is not None
    if "norm" in shard.key:
        data.fill_(1)
        return
    for row, start in _rows(shard):
        for first in range(0, row.numel(), _PIECE):
            count = min(_PIECE, row.numel() - first)
            values = normals(seed, shard.key, start + first, count) * np.float32(standard_deviation)
            row[first : first + count] = torch.from_numpy(values).to(row)


def _rows(shard: ShardedTensor) -> Iterator[tuple[torch.Tensor, int]]:
    """The runs of a shard that are contiguous in the whole tensor, [n], with their place in it."""
    shape = shard.global_shape
    local = (1,) * shard.prepend_axis_num + tuple(shard.data.shape)
    # Axes from the last one on that the shard holds whole; the one before them may be a part.
    whole = len(shape)
    while whole > 0 and local[whole - 1] == shape[whole - 1]:
        whole -= 1
    outer = max(whole - 1, 0)
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    view = shard.data.view(local)
    for place in np.ndindex(*local[:outer]):
        run = view[place].view(-1)
        at = [*place, *([0] * (len(shape) - outer))]
        yield run, sum((a + o) * s for a, o, s in zip(at, shard.global_offset, strides, strict=True))
