"""HF models with random weights in the shape of any published model, for tests and benchmarks of conversion.

Each value is a function of its tensor's name and its index. Matrices and biases have the standard
deviation `initializer_range`, norms vary around one, so that swapping any two tensors is detected.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from megatron_a2d.checkpoint.directory import copy_hf_files
from megatron_a2d.checkpoint.tensor_rows import RowRange, num_bytes
from megatron_a2d.config.model_config import model_config_from_hf
from megatron_a2d.conversion.hf_to_torch_dist import check_space
from megatron_a2d.conversion.resumable_output import resumable_directory
from megatron_a2d.conversion.safetensors_files import write_safetensors
from megatron_a2d.conversion.weight_map import WeightMap
from megatron_a2d.families.registry import kind_of
from megatron_a2d.terminal.console import progress
from megatron_a2d.utils.atomic_write import write_json

_POOL = 4_194_301  # values drawn once, a prime number; each tensor reads them from a different offset


class RandomWeights:
    """A `RowSource` of any architecture; with `fused` all experts of a layer share a tensor."""

    def __init__(self, config: dict[str, Any], dtype: torch.dtype, fused: bool = False, seed: int = 0):
        model_config = model_config_from_hf(config, "the configuration")
        renamed = kind_of(config, "the configuration").family.tensor_names
        names = [
            f"model.layers.{layer}.mlp.experts.{name}"
            for layer in range(model_config.num_layers)
            for name in ("gate_up_proj", "down_proj")
        ]
        self.shapes: Mapping[str, tuple[int, ...]] = WeightMap(model_config, names if fused else (), renamed).hf_shapes
        self._dtype, self._seed, self._scale = dtype, seed, model_config.initializer_range

    def dtype(self, name: str) -> torch.dtype:
        return self._dtype

    def read(self, row_range: RowRange, memory: memoryview | None = None) -> torch.Tensor:
        shape = self.shapes[row_range.name]
        width = torch.Size(shape[1:]).numel()
        count = (row_range.stop - row_range.start) * width
        start = (zlib.crc32(f"{self._seed} {row_range.name}".encode()) + row_range.start * width) % _POOL
        rows = torch.empty(count, dtype=self._dtype)
        is_norm = len(shape) == 1 and not row_range.name.endswith(".bias")
        pool = self._norms if is_norm else self._matrices
        filled = 0
        while filled < count:
            take = min(_POOL - start, count - filled)
            rows[filled : filled + take] = pool[start : start + take]
            filled, start = filled + take, 0
        return rows.view(row_range.stop - row_range.start, *shape[1:])

    @cached_property
    def _matrices(self) -> torch.Tensor:
        return (self._scale * self._normals).to(self._dtype)

    @cached_property
    def _norms(self) -> torch.Tensor:
        return (1 + 0.2 * self._normals).to(self._dtype)

    @cached_property
    def _normals(self) -> torch.Tensor:
        return torch.randn(_POOL, generator=torch.Generator().manual_seed(self._seed))


def write_synthetic(
    out: Path,
    config: dict[str, Any],
    dtype: torch.dtype = torch.bfloat16,
    fused: bool = False,
    max_shard_bytes: int = 4_000_000_000,
    tokenizer: Path | None = None,
    seed: int = 0,
) -> int:
    """Write the directory `out`, which must be new; returns the bytes of its weights. `tokenizer` is a directory
    whose tokenizer is copied."""
    weights = RandomWeights(config, dtype, fused, seed)
    size = num_bytes(weights)
    config = config | {"torch_dtype": str(dtype).removeprefix("torch.")}
    check_space(out, size)
    identity = {"config": config, "fused": fused, "shard": max_shard_bytes, "seed": seed}
    with resumable_directory(out, "--out", identity) as work:
        if tokenizer:
            copy_hf_files(tokenizer, work.directory)
        with progress("random weights", size, "B") as advance:
            write_safetensors(work, weights, max_shard_bytes, advance)
        write_json(work.directory / "config.json", config)
    return size
