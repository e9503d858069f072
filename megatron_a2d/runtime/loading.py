"""Loading a checkpoint so that every byte is read once: by one rank, and only where it is needed.

megatron.core's default load reads whole chunks, however little of them a rank's slice needs, and what several ranks
hold is read by each. Here a slice's own bytes are read, and of equal slices one rank reads each and gives it to the
others (megatron.core's FullyParallelLoadStrategyWrapper).
"""

from __future__ import annotations

import itertools
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
from megatron.core.dist_checkpointing.strategies import torch as torch_strategies
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from megatron_a2d.conversion.rows import OpenFiles, bytes_of
from megatron_a2d.conversion.torch_archive import DAMAGED, DTYPES_OF_STORAGES, find_values
from megatron_a2d.errors import UserError

_READABLE = set(DTYPES_OF_STORAGES.values())
# Runs of a slice that are shorter (bytes) are read together with what lies between them: calls cost more than bytes.
_SHORTEST_RUN = 256


def load_state(wanted: dict[str, Any], directory: Path) -> dict[str, Any]:
    """dist_checkpointing.load. Collective; raises what that raises."""
    strategy = FullyParallelLoadStrategyWrapper(get_default_load_sharded_strategy(str(directory)))
    # megatron.core's strategy makes its reader by this name; each version asks it for other things.
    reader, init_data = torch_strategies._get_filesystem_reader, ShardedTensor.init_data
    torch_strategies._get_filesystem_reader = lambda directory, *_, **__: SliceReader(directory)
    if not torch.cuda.is_available():
        # The place to receive a slice is made on "cuda" by a torch.empty that was bound before runtime.install().
        ShardedTensor.init_data = lambda self, device, init_fn=torch.empty: init_data(self, "cpu", init_fn)
    try:
        return dist_checkpointing.load(wanted, str(directory), sharded_strategy=strategy)
    finally:
        torch_strategies._get_filesystem_reader, ShardedTensor.init_data = reader, init_data


class SliceReader(FileSystemReader):
    """Reads of each chunk the part that is asked for. Whatever is no plain tensor is read by torch."""

    def __init__(self, directory: str | os.PathLike[str]):
        super().__init__(directory)
        self._metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read once: a load asks for it several times. Not kept for longer, as another one may be written."""
        self._metadata = self._metadata or super().read_metadata(*args, **kwargs)
        return self._metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        super().set_up_storage_reader(metadata, is_coordinator, *args, **kwargs)
        self._sizes: dict[MetadataIndex, tuple[int, ...]] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        for name, item in metadata.state_dict_metadata.items():
            if isinstance(item, TensorStorageMetadata):
                self._dtypes[name] = item.properties.dtype
                for chunk in item.chunks:
                    self._sizes[MetadataIndex(name, chunk.offsets)] = tuple(chunk.sizes)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        others: list[ReadItem] = []
        files = OpenFiles()
        try:
            for item in plan.items:
                if item.type == LoadItemType.BYTE_IO or self._dtypes[item.storage_index.fqn] not in _READABLE:
                    others.append(item)
                    continue
                target = planner.resolve_tensor(item).detach()
                target.copy_(self._read(files, item))
                planner.commit_tensor(item, target)
        finally:
            files.close()
        return super().read_data(replace(plan, items=others), planner)

    def _read(self, files: OpenFiles, item: ReadItem) -> torch.Tensor:
        place = self.storage_data[item.storage_index]
        path, dtype = Path(self.path) / place.relative_path, self._dtypes[item.storage_index.fqn]
        sizes = self._sizes[item.storage_index]
        try:
            begin = find_values(files, path, place.offset, place.length, dtype, sizes)
        except DAMAGED as error:
            name = item.storage_index.fqn
            raise UserError(f"{path}: the chunk of {name} is refused ({error}); take another checkpoint") from None
        return read_box(files, path, begin, sizes, dtype, tuple(item.storage_offsets), tuple(item.lengths))


def read_box(
    files: OpenFiles,
    path: Path,
    begin: int,
    sizes: tuple[int, ...],
    dtype: torch.dtype,
    offsets: tuple[int, ...],
    lengths: tuple[int, ...],
) -> torch.Tensor:
    """The box of `lengths` at `offsets` of a contiguous tensor of `sizes`, whose values begin at byte `begin`."""
    axes = len(sizes)
    inner = axes  # from this axis on a run is contiguous
    while inner > 0 and all(offsets[i] == 0 and lengths[i] == sizes[i] for i in range(inner, axes)):
        inner -= 1
    run = math.prod(lengths[inner:]) * dtype.itemsize
    if inner > 0 and run < _SHORTEST_RUN:  # whole inner rows, then cut
        whole = (*offsets[:inner], *(0 for _ in sizes[inner:])), (*lengths[:inner], *sizes[inner:])
        rows = read_box(files, path, begin, sizes, dtype, *whole)
        cut: list[slice] = [slice(a, a + n) for a, n in zip(offsets[inner:], lengths[inner:], strict=True)]
        return rows[(slice(None),) * inner + tuple(cut)]
    strides = [math.prod(sizes[i + 1 :]) for i in range(axes)]
    result = torch.empty(lengths, dtype=dtype)
    data, position = bytes_of(result), 0
    for outer in itertools.product(*(range(offsets[i], offsets[i] + lengths[i]) for i in range(inner))):
        index = (*outer, *offsets[inner:])
        start = begin + sum(a * b for a, b in zip(index, strides, strict=True)) * dtype.itemsize
        files.read_into(path, start, data[position : position + run])
        position += run
    return result
