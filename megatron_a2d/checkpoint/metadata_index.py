"""Index of a torch_dist checkpoint, from its `.metadata`: the chunks of every tensor, and where each is stored.

The file is a pickle of torch's planner. It is read as data (plain_pickle.py), and every value that is used is checked:
exact types, sizes and offsets within bounds. None of it is passed to torch.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import torch

from megatron_a2d.checkpoint.plain_pickle import Name, Record, read_pickle
from megatron_a2d.checkpoint.torch_save_zip import DAMAGED
from megatron_a2d.utils.atomic_write import regular
from megatron_a2d.utils.errors import UserError

_DCP = "torch.distributed.checkpoint"
_DTYPES = (
    "bfloat16", "bool", "float16", "float32", "float64", "float8_e4m3fn", "float8_e5m2",
    "int16", "int32", "int64", "int8", "uint8",
)  # fmt: skip
ALLOWED = {
    f"{_DCP}.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    f"{_DCP}.planner": {"BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    f"{_DCP}.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch": {"Size", *_DTYPES},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath"},
}  # fmt: skip
_LARGEST_FILE = 2 << 30  # bytes; a checkpoint of 235B parameters and their optimizer has some 50 MB
_LARGEST_NUMBER = 1 << 62


class Location(NamedTuple):
    """A byte range in a file of the checkpoint."""

    file: str
    offset: int
    length: int


class Chunk(NamedTuple):
    """A stored box of a tensor, and the byte range that contains it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    location: Location


class StoredTensor(NamedTuple):
    """Dtype, shape and chunks of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: list[Chunk]


class Index(NamedTuple):
    """Everything that is stored, by name: tensors and pickled objects."""

    tensors: dict[str, StoredTensor]
    objects: dict[str, Location]


def read_index(directory: Path) -> Index:
    """The index of an iteration's directory; UserError if it is damaged or not that of a torch_dist checkpoint."""
    path = directory / ".metadata"
    try:
        with open(path, "rb", opener=regular) as file:
            if (size := os.fstat(file.fileno()).st_size) > _LARGEST_FILE:
                raise UserError(f"{path}: has {size} bytes, more than any checkpoint's; use another iteration")
            data = file.read()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); the checkpoint is incomplete") from None
    try:
        metadata = read_pickle(data, ALLOWED)
    except DAMAGED as error:
        raise UserError(f"{path}: is refused: {error}; use a checkpoint that megatron.core wrote") from None
    try:
        return _index(_fields(metadata, "metadata", "Metadata"))
    except DAMAGED as error:
        raise UserError(f"{path}: is damaged ({error or type(error).__name__}); use another iteration") from None


def _index(metadata: dict[Any, Any]) -> Index:
    locations: dict[tuple[str, tuple[int, ...] | None], Location] = {}
    for index, info in metadata["storage_data"].items():
        key = _fields(index, "metadata", "MetadataIndex")
        offset = key.get("offset")
        locations[_text(key["fqn"]), None if offset is None else _size(offset)] = _location(info)
    tensors: dict[str, StoredTensor] = {}
    objects: dict[str, Location] = {}
    for name, item in metadata["state_dict_metadata"].items():
        if _is(item, "metadata", "BytesStorageMetadata"):
            objects[_text(name)] = locations[name, None]
            continue
        fields = _fields(item, "metadata", "TensorStorageMetadata")
        shape = _size(fields["size"])
        chunks = [_chunk(chunk, name, shape, locations) for chunk in _list(fields["chunks"])]
        tensors[_text(name)] = StoredTensor(_dtype(fields["properties"]), shape, chunks)
    return Index(tensors, objects)


def _chunk(item: Any, name: str, shape: tuple[int, ...], locations: dict[Any, Location]) -> Chunk:
    fields = _fields(item, "metadata", "ChunkStorageMetadata")
    offsets, sizes = _size(fields["offsets"]), _size(fields["sizes"])
    if any(n < 1 or a + n > m for a, n, m in zip(offsets, sizes, shape, strict=True)):
        raise ValueError(f"a chunk at {offsets} of size {sizes} lies outside the shape {shape}")
    return Chunk(offsets, sizes, locations[name, offsets])


def _location(info: Any) -> Location:
    """Location of a chunk: in a file of the same directory, uncompressed."""
    fields = _fields(info, "filesystem", "_StorageInfo")
    file = _text(fields["relative_path"])
    if PurePath(file).name != file or not file.endswith(".distcp"):
        raise ValueError(f"the path {file!r} lies outside the checkpoint")
    if fields.get("transform_descriptors"):
        raise ValueError("chunks are compressed or encrypted")
    return Location(file, _number(fields["offset"]), _number(fields["length"]))


def _dtype(properties: Any) -> torch.dtype:
    if not _is(properties, "metadata", "TensorProperties"):
        raise ValueError("a tensor has no properties")
    dtype = properties.state[0]
    if type(dtype) is not Name or dtype.module != "torch" or dtype.name not in _DTYPES:
        raise ValueError("a tensor has no type")
    found: torch.dtype = getattr(torch, dtype.name)
    return found


def _is(value: Any, module: str, name: str) -> bool:
    return type(value) is Record and value.name == (f"{_DCP}.{module}", name)


def _fields(value: Any, module: str, name: str) -> dict[Any, Any]:
    if not _is(value, module, name) or type(value.state) is not dict:
        raise ValueError(f"it holds a {type(value).__name__} where a {name} belongs")
    return value.state


def _size(value: Any) -> tuple[int, ...]:
    if type(value) is not Record or value.name != ("torch", "Size") or type(value.arguments[0]) is not tuple:
        raise ValueError("it holds no size where one belongs")
    return tuple(_number(axis) for axis in value.arguments[0])


def _number(value: Any) -> int:
    if type(value) is not int or not 0 <= value < _LARGEST_NUMBER:
        # Not the value itself: the text of lists that contain one another would be endless.
        found = str(value)[:40] if type(value) is int else f"a {type(value).__name__}"
        raise ValueError(f"it holds {found} where a size or a position belongs")
    return value


def _text(value: Any) -> str:
    if type(value) is not str:
        raise ValueError(f"it holds a {type(value).__name__} where a name belongs")
    return value


def _list(value: Any) -> list[Any]:
    if type(value) is not list:
        raise ValueError(f"it holds a {type(value).__name__} where a list belongs")
    return value


class Box(NamedTuple):
    """Part of a tensor: from `start` up to `stop` along each axis."""

    start: tuple[int, ...]
    stop: tuple[int, ...]

    def intersect(self, other: Box) -> Box | None:
        start = tuple(map(max, self.start, other.start))
        stop = tuple(map(min, self.stop, other.stop))
        return Box(start, stop) if all(a < b for a, b in zip(start, stop, strict=True)) else None

    def num_elements(self) -> int:
        return math.prod(b - a for a, b in zip(self.start, self.stop, strict=True))


def are_disjoint(boxes: Sequence[Box], axis: int = 0, uncut: int = 0) -> bool:
    """Whether no two boxes share an element.

    The boxes are separated along one axis after another: comparing all pairs would take hours for the hundred thousand
    that a small file may list. Only boxes that no cut separates are compared pairwise.
    """
    if len(boxes) < 2:
        return True
    if uncut == len(boxes[0].start):
        if len(boxes) > 256:
            raise ValueError(f"{len(boxes)} chunks of a tensor form no grid")
        return not any(a.intersect(b) for a, b in itertools.combinations(boxes, 2))
    groups: list[list[Box]] = []
    end = -1
    for box in sorted(boxes, key=lambda box: box.start[axis]):
        if box.start[axis] >= end:
            groups.append([])
        groups[-1].append(box)
        end = max(end, box.stop[axis])
    uncut = uncut + 1 if len(groups) == 1 else 1
    return all(are_disjoint(group, (axis + 1) % len(box.start), uncut) for group in groups)
