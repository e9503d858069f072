"""Writer of `.metadata`, the index of a torch_dist checkpoint: the counterpart of metadata_index.py.

The file is a pickle of torch's planner's objects. It is written instruction by instruction (pickletools), in protocol
2, so that neither torch.distributed.checkpoint is imported, which takes a second, nor a hundred thousand objects are
built to be pickled. torch reads it as what it would have written itself (tests/unit/test_metadata_writer.py).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_a2d.checkpoint.metadata_index import Index, Location

_DCP = "torch.distributed.checkpoint"
_METADATA, _FILESYSTEM = f"{_DCP}.metadata", f"{_DCP}.filesystem"
_VERSION = "1.0.0"  # of the format: torch's CURRENT_DCP_VERSION

# Instructions, under their names in pickletools.
_PROTO, _STOP, _MARK, _NONE, _NEWTRUE, _NEWFALSE = b"\x80", b".", b"(", b"N", b"\x88", b"\x89"
_BININT1, _BININT, _LONG1, _BINUNICODE = b"K", b"J", b"\x8a", b"X"
_EMPTY_TUPLE, _TUPLE, _EMPTY_LIST, _APPENDS, _EMPTY_DICT, _SETITEMS = b")", b"t", b"]", b"e", b"}", b"u"
_GLOBAL, _REDUCE, _NEWOBJ, _BUILD = b"c", b"R", b"\x81", b"b"
_LONG_BINGET, _LONG_BINPUT = b"j", b"r"


def write_index(directory: Path, index: Index) -> None:
    """Write `.metadata` of the checkpoint in `directory`."""
    with open(directory / ".metadata", "wb") as file:
        writer = _Pickle(file.write)
        writer.emit(_PROTO + b"\x02")
        _write_metadata(writer, index)
        writer.emit(_STOP)


class _Pickle:
    """A pickle that is written value by value; strings and names that recur are written once."""

    def __init__(self, emit: Callable[[bytes], Any]):
        self.emit = emit
        self._memo: dict[tuple[str, ...], int] = {}

    def plain(self, value: Any) -> None:
        if value is None:
            self.emit(_NONE)
        elif type(value) is bool:
            self.emit(_NEWTRUE if value else _NEWFALSE)
        elif type(value) is int:
            self._integer(value)
        elif type(value) is str:
            data = value.encode()
            self._once((value,), _BINUNICODE + struct.pack("<I", len(data)) + data)
        elif type(value) is tuple:
            self._tuple(value)
        else:
            raise TypeError(f"a {type(value).__name__} is not written to .metadata")

    def name(self, module: str, name: str) -> None:
        """A class or a function."""
        self._once((module, name), _GLOBAL + f"{module}\n{name}\n".encode())

    def call(self, module: str, name: str, *arguments: Any) -> None:
        self.name(module, name)
        self.plain(arguments)
        self.emit(_REDUCE)

    def object(self, module: str, name: str) -> None:
        """An object without state; a state may follow, and _BUILD."""
        self.name(module, name)
        self.emit(_EMPTY_TUPLE + _NEWOBJ)

    def fields(self, module: str, name: str, **values: Callable[[], None] | Any) -> None:
        """An object with attributes: plain values, or functions that write them."""
        self.object(module, name)
        self.emit(_EMPTY_DICT + _MARK)
        for key, value in values.items():
            self.plain(key)
            value() if callable(value) else self.plain(value)
        self.emit(_SETITEMS + _BUILD)

    def _integer(self, value: int) -> None:
        if 0 <= value < 1 << 8:
            self.emit(_BININT1 + bytes([value]))
        elif -(1 << 31) <= value < 1 << 31:
            self.emit(_BININT + struct.pack("<i", value))
        else:
            data = value.to_bytes(8, "little", signed=True)
            self.emit(_LONG1 + bytes([len(data)]) + data)

    def _tuple(self, value: tuple[Any, ...]) -> None:
        self.emit(_MARK)
        for item in value:
            self.plain(item)
        self.emit(_TUPLE)

    def _once(self, key: tuple[str, ...], code: bytes) -> None:
        known = self._memo.get(key)
        if known is not None:
            self.emit(_LONG_BINGET + struct.pack("<I", known))
        else:
            self._memo[key] = len(self._memo)
            self.emit(code + _LONG_BINPUT + struct.pack("<I", self._memo[key]))


def _write_metadata(out: _Pickle, index: Index) -> None:
    out.fields(
        _METADATA,
        "Metadata",
        state_dict_metadata=partial(_write_kinds, out, index),
        planner_data=None,
        storage_data=partial(_write_locations, out, index),
        storage_meta=partial(_write_storage_meta, out),
        version=_VERSION,
    )


def _write_kinds(out: _Pickle, index: Index) -> None:
    """Name -> what is stored under it."""
    out.emit(_EMPTY_DICT + _MARK)
    for name in index.objects:
        out.plain(name)
        out.object(_METADATA, "BytesStorageMetadata")
    for name, tensor in index.tensors.items():
        out.plain(name)
        out.fields(
            _METADATA,
            "TensorStorageMetadata",
            properties=partial(_write_properties, out, tensor.dtype),
            size=partial(_write_size, out, tensor.shape),
            chunks=partial(_write_chunks, out, tensor.chunks),
        )
    out.emit(_SETITEMS)


def _write_chunks(out: _Pickle, chunks: Iterable[Any]) -> None:
    out.emit(_EMPTY_LIST + _MARK)
    for chunk in chunks:
        out.fields(
            _METADATA,
            "ChunkStorageMetadata",
            offsets=partial(_write_size, out, chunk.offsets),
            sizes=partial(_write_size, out, chunk.sizes),
        )
    out.emit(_APPENDS)


def _write_properties(out: _Pickle, dtype: torch.dtype) -> None:
    """dtype, layout, requires_grad, memory format, pin_memory."""
    out.object(_METADATA, "TensorProperties")
    out.emit(_MARK)
    out.name("torch", str(dtype).removeprefix("torch."))
    out.call("torch.serialization", "_get_layout", "torch.strided")
    out.plain(False)
    out.call(_METADATA, "_MEM_FORMAT_ENCODING", 0)
    out.plain(False)
    out.emit(_TUPLE + _BUILD)


def _write_locations(out: _Pickle, index: Index) -> None:
    """(name, offsets of a chunk) -> its place."""
    out.emit(_EMPTY_DICT + _MARK)
    for name, location in index.objects.items():
        out.fields(_METADATA, "MetadataIndex", fqn=name, index=None)
        _write_location(out, location)
    for name, tensor in index.tensors.items():
        for number, chunk in enumerate(tensor.chunks):
            out.fields(
                _METADATA,
                "MetadataIndex",
                fqn=name,
                index=number,
                offset=partial(_write_size, out, chunk.offsets),
            )
            _write_location(out, chunk.location)
    out.emit(_SETITEMS)


def _write_location(out: _Pickle, location: Location) -> None:
    file, offset, length = location
    out.fields(_FILESYSTEM, "_StorageInfo", relative_path=file, offset=offset, length=length)


def _write_storage_meta(out: _Pickle) -> None:
    """Without the directory that it was written to."""
    nothing: Mapping[str, Any] = dict.fromkeys(("checkpoint_id", "save_id", "load_id"))
    out.fields(_METADATA, "StorageMeta", **nothing, modules=partial(out.emit, _EMPTY_LIST))


def _write_size(out: _Pickle, size: tuple[int, ...]) -> None:
    out.call("torch", "Size", size)
