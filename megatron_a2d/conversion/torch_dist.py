"""Writing a torch_dist checkpoint of megatron.core without a model: one chunk at a time.

torch.distributed.checkpoint does the writing; a planner of ours hands it each chunk when its turn comes.
Chunks end where megatron would cut fc1 (gate | up) and hold at most rows.SLAB_BYTES, because every loader
reads whole chunks, whatever part of them it needs.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from megatron_a2d.conversion.rows import RowSource, Span, slabs
from megatron_a2d.conversion.table import WeightMap
from megatron_a2d.files import write_json

# What megatron.core's loader reads to recognise the format.
FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


def write_torch_dist(
    directory: Path,
    source: RowSource,
    weights: WeightMap,
    common: dict[str, Any],
    advance: Callable[[float], None],
) -> None:
    """Write the tensors of `source`, which carry megatron's names, into the existing empty `directory`.

    `common` becomes common.pt. `advance` is told of the bytes written.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*assuming the intent is to save in a single process")
        # One thread: torch loses errors of others. Files are flushed to disk when the directory is renamed.
        writer = _Writer(directory, thread_count=1, sync_files=False, per_thread_copy_ahead=0)
        try:
            dcp.save({}, storage_writer=writer, planner=_LazyPlanner(source, weights, advance), no_dist=True)
        except dcp.CheckpointException as error:  # wraps whatever happened, Ctrl-C too
            raise error.failures[0][0] from None
    torch.save(common, directory / "common.pt")
    write_json(directory / "metadata.json", FORMAT)  # last: it marks the checkpoint as complete


class _Writer(dcp.FileSystemWriter):
    """Does not record where the checkpoint was written."""

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()


class _LazyPlanner(SavePlanner):
    """Plans all chunks from shapes alone and reads each one's rows when the writer asks for it."""

    def __init__(self, source: RowSource, weights: WeightMap, advance: Callable[[float], None]):
        self._source, self._weights, self._advance = source, weights, advance
        self._spans: dict[MetadataIndex, Span] = {}
        blob = io.BytesIO()
        torch.save([None], blob)
        self._empty_state = blob.getvalue()

    def set_up_planner(
        self, state_dict: Any, storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        """Nothing: the state is not in memory."""

    def create_local_plan(self) -> SavePlan:
        items = [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in self._weights.extra_state_keys()]
        for span in self._chunks():
            shape = self._weights.megatron_shapes[span.name]
            rest = shape[len(span.lead) + 1 :]
            chunk = ChunkStorageMetadata(
                offsets=torch.Size((*span.lead, span.start, *(0 for _ in rest))),
                sizes=torch.Size((*(1 for _ in span.lead), span.stop - span.start, *rest)),
            )
            properties = TensorProperties(dtype=self._source.dtype(span.name))
            index = MetadataIndex(span.name, chunk.offsets)
            self._spans[index] = span
            data = TensorWriteData(chunk=chunk, properties=properties, size=torch.Size(shape))
            items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        return SavePlan(items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            return io.BytesIO(self._empty_state)
        span = self._spans[write_item.index]
        rows = self._source.read(span)
        self._advance(rows.nbytes)
        return rows.reshape((*(1 for _ in span.lead), *rows.shape))

    def _chunks(self) -> Iterator[Span]:
        for block in self._weights.blocks():
            matrix = (block.num_rows, *self._weights.megatron_shapes[block.key][len(block.lead) + 1 :])
            itemsize = self._source.dtype(block.key).itemsize
            begin = 0
            for length in [block.num_rows] if block.turns > 1 else [part.stop for part in block.parts]:
                for start, stop in slabs(matrix, begin, begin + length, itemsize):
                    yield Span(block.key, block.lead, start, stop)
                begin += length
