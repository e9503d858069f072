"""Reading a torch_dist checkpoint of any layout without megatron.core, a few rows at a time.

`.metadata` is a pickle that lists, for every tensor, its chunks and where each lies: (file, offset, length).
A chunk is an uncompressed torch.save archive. Both kinds of pickle are read with allow-lists, so that a
checkpoint from a stranger can be wrong but cannot run code.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from megatron_a2d.conversion.rows import OpenFiles, Span
from megatron_a2d.conversion.torch_archive import DAMAGED, find_values
from megatron_a2d.errors import UserError
from megatron_a2d.files import read_json

_DCP = "torch.distributed.checkpoint"
ALLOWED_IN_METADATA = {
    f"{_DCP}.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    f"{_DCP}.planner": {"BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    f"{_DCP}.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch": {
        "Size", "bfloat16", "bool", "float16", "float32", "float64", "float8_e4m3fn", "float8_e5m2",
        "int16", "int32", "int64", "int8", "uint8",
    },
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath"},
}  # fmt: skip
# Besides the weights a trained checkpoint holds optimizer state and random generators.
NOT_WEIGHTS = ("optimizer.", "chained_", "rng_state", "rerun_state_machine_state")


class Chunk(NamedTuple):
    """A stored box of a tensor, and the part of a file that holds it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    offset: int
    length: int


class Box(NamedTuple):
    start: tuple[int, ...]
    stop: tuple[int, ...]

    def intersect(self, other: Box) -> Box | None:
        start = tuple(map(max, self.start, other.start))
        stop = tuple(map(min, self.stop, other.stop))
        return Box(start, stop) if all(a < b for a, b in zip(start, stop, strict=True)) else None

    def num_elements(self) -> int:
        return math.prod(b - a for a, b in zip(self.start, self.stop, strict=True))


@dataclass
class _Stored:
    """A tensor's type and chunks, found by their index in the leading axes along which all are 1 long."""

    dtype: torch.dtype
    num_lead_axes: int
    chunks: dict[tuple[int, ...], list[Chunk]]

    def near(self, lead: tuple[int, ...]) -> list[Chunk]:
        if len(lead) >= self.num_lead_axes:
            return self.chunks.get(lead[: self.num_lead_axes], [])
        return [chunk for chunks in self.chunks.values() for chunk in chunks]


class TorchDistCheckpoint:
    """The weights of an iteration's directory, under megatron's names. A `RowSource`."""

    def __init__(self, directory: Path):
        self._directory = directory
        self._files = OpenFiles()
        self._payloads: dict[Chunk, int] = {}
        backend = read_json(directory / "metadata.json", "the checkpoint's format").get("sharded_backend")
        if backend != "torch_dist":
            raise UserError(f"{directory}: is in the format {backend!r}; only torch_dist can be read")
        metadata = _load_metadata(directory / ".metadata")
        self.shapes: Mapping[str, tuple[int, ...]]
        try:
            self.shapes, self._stored = _index(metadata)
        except DAMAGED as error:
            raise UserError(f"{directory / '.metadata'}: is damaged ({error!r}); use another iteration") from None

    def dtype(self, name: str) -> torch.dtype:
        return self._stored[name].dtype

    def read(self, span: Span) -> torch.Tensor:
        """Put together from all chunks that overlap; every element must be stored exactly once."""
        axes, stored = len(span.lead), self._stored[span.name]
        rest = self.shapes[span.name][axes + 1 :]
        box = Box((*span.lead, span.start, *(0 for _ in rest)), (*(i + 1 for i in span.lead), span.stop, *rest))
        pieces = []
        for chunk in stored.near(span.lead):
            whole = Box(chunk.offsets, tuple(map(sum, zip(chunk.offsets, chunk.sizes, strict=True))))
            if overlap := box.intersect(whole):
                pieces.append((chunk, overlap))
        self._check_cover(span, box, [overlap for _, overlap in pieces])
        if len(pieces) == 1:
            return self._read_piece(*pieces[0], axes, stored.dtype)
        rows = torch.empty((span.stop - span.start, *rest), dtype=stored.dtype)
        for chunk, overlap in pieces:
            target = [slice(a - b, c - b) for a, b, c in zip(overlap.start, box.start, overlap.stop, strict=True)]
            rows[tuple(target[axes:])] = self._read_piece(chunk, overlap, axes, stored.dtype)
        return rows

    def close(self) -> None:
        self._files.close()

    def _check_cover(self, span: Span, box: Box, overlaps: list[Box]) -> None:
        twice = any(a.intersect(b) for i, a in enumerate(overlaps) for b in overlaps[:i])
        stored = sum(overlap.num_elements() for overlap in overlaps)
        if twice or stored != box.num_elements():
            raise UserError(
                f"{self._directory}: {span.name} {list(span.lead)} rows {span.start} to {span.stop}: "
                + ("some elements are stored twice" if twice else f"{stored} of {box.num_elements()} elements stored")
                + "; the checkpoint is damaged, use another iteration"
            )

    def _read_piece(self, chunk: Chunk, box: Box, axes: int, dtype: torch.dtype) -> torch.Tensor:
        """The part `box` (global indices) of a chunk, without its `axes` leading axes. Reads whole rows."""
        strides = [math.prod(chunk.sizes[axis + 1 :]) for axis in range(len(chunk.sizes))]
        local = [a - b for a, b in zip(box.start, chunk.offsets, strict=True)]
        first = sum(index * stride for index, stride in zip(local[: axes + 1], strides, strict=False))
        shape = (box.stop[axes] - box.start[axes], *chunk.sizes[axes + 1 :])
        position = self._payload(chunk, dtype) + first * dtype.itemsize
        rows = self._files.read_tensor(self._directory / chunk.file, position, shape, dtype)
        columns = [
            slice(index, index + b - a)
            for index, a, b in zip(local[axes + 1 :], box.start[axes + 1 :], box.stop[axes + 1 :], strict=True)
        ]
        return rows[(slice(None), *columns)]

    def _payload(self, chunk: Chunk, dtype: torch.dtype) -> int:
        """Where in its file the values of `chunk` begin."""
        if chunk not in self._payloads:
            path = self._directory / chunk.file
            try:
                self._payloads[chunk] = find_values(self._files, path, chunk.offset, chunk.length, dtype, chunk.sizes)
            except DAMAGED as error:
                raise UserError(f"{path}: the chunk at byte {chunk.offset} is damaged ({error})") from None
        return self._payloads[chunk]


def check_pickles(directory: Path) -> None:
    """UserError unless every pickle of the checkpoint loads under an allow-list: weights, optimizer state, the rest.

    torch and megatron.core read .metadata and the byte items of the .distcp files (extra states, the optimizer's
    parameter groups) without any restriction: this comes before they do. They read tensors and common.pt with
    torch's own allow-list, weights_only; common.pt is tried here too, because the environment can switch that off.
    """
    read_common(directory)
    metadata = _load_metadata(directory / ".metadata")
    try:
        # By type, as torch decides, not by attributes: those are the file's own.
        is_bytes = {
            name for name, item in metadata.state_dict_metadata.items() if isinstance(item, BytesStorageMetadata)
        }
        places = [(index.fqn, _file_of(info), info) for index, info in metadata.storage_data.items()]
    except DAMAGED as error:
        raise UserError(f"{directory / '.metadata'}: is damaged ({error!r}); use another iteration") from None
    files = OpenFiles()
    try:
        for name, file, info in places:
            if name in is_bytes:
                _check_bytes(files, directory / file, name, info)
    finally:
        files.close()


def _check_bytes(files: OpenFiles, path: Path, name: str, info: Any) -> None:
    try:
        blob = io.BytesIO(files.read_bytes(path, int(info.offset), int(info.length)))
        torch.load(blob, map_location="cpu", weights_only=True)
    except DAMAGED as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{path}: {name} is refused ({reason}); use a checkpoint that you trust") from None


@contextmanager
def open_torch_dist(directory: Path) -> Iterator[TorchDistCheckpoint]:
    opened = TorchDistCheckpoint(directory)
    try:
        yield opened
    finally:
        opened.close()


def read_common(directory: Path) -> dict[str, Any]:
    """The unsharded part of a checkpoint: iteration, consumed_samples and so on."""
    path = directory / "common.pt"
    try:
        common = torch.load(path, map_location="cpu", weights_only=True)
    except (*DAMAGED, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path}: cannot be read ({reason}); use another iteration") from None
    if not isinstance(common, dict):
        raise UserError(f"{path}: holds a {type(common).__name__}, not a dict; use another iteration")
    return common


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in ALLOWED_IN_METADATA.get(module, ()):
            raise pickle.UnpicklingError(f"it wants to load {module}.{name}, which is not allowed")
        return super().find_class(module, name)


def _load_metadata(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            return _MetadataUnpickler(file).load()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); the checkpoint is incomplete") from None
    except DAMAGED as error:
        raise UserError(f"{path}: is refused: {error}; use a checkpoint that megatron.core wrote") from None


def _index(metadata: Any) -> tuple[dict[str, tuple[int, ...]], dict[str, _Stored]]:
    """Shapes and chunks of all weights. Raises one of DAMAGED when the metadata contradicts itself."""
    places = {
        (index.fqn, tuple(index.offset)): info
        for index, info in metadata.storage_data.items()
        if index.offset is not None
    }
    shapes, stored = {}, {}
    for name, tensor in metadata.state_dict_metadata.items():
        if name.startswith(NOT_WEIGHTS) or not hasattr(tensor, "chunks"):
            continue
        shapes[name] = tuple(map(int, tensor.size))
        chunks = [_chunk(item, places[name, tuple(item.offsets)], shapes[name]) for item in tensor.chunks]
        axes = 0
        while axes < len(shapes[name]) - 1 and all(chunk.sizes[axes] == 1 for chunk in chunks):
            axes += 1
        stored[name] = _Stored(tensor.properties.dtype, axes, {})
        for chunk in chunks:
            stored[name].chunks.setdefault(chunk.offsets[:axes], []).append(chunk)
    return shapes, stored


def _chunk(item: Any, info: Any, shape: tuple[int, ...]) -> Chunk:
    offsets, sizes = tuple(map(int, item.offsets)), tuple(map(int, item.sizes))
    if any(a < 0 or n < 1 or a + n > m for a, n, m in zip(offsets, sizes, shape, strict=True)):
        raise ValueError(f"a chunk at {offsets} of size {sizes} lies outside the shape {shape}")
    file = _file_of(info)
    if int(info.offset) < 0 or int(info.length) < 0:
        raise ValueError(f"a chunk lies at byte {info.offset}, {info.length} long")
    return Chunk(offsets, sizes, file, int(info.offset), int(info.length))


def _file_of(info: Any) -> str:
    """The chunk's file: in this very directory, and as it is."""
    file = info.relative_path
    if not isinstance(file, str) or PurePath(file).name != file or not file.endswith(".distcp"):
        raise ValueError(f"the path {file!r} lies outside the checkpoint")
    if getattr(info, "transform_descriptors", None):
        raise ValueError("chunks are compressed or encrypted")
    return file
