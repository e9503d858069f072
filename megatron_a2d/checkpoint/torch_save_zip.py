"""Location of a tensor's values inside a torch.save archive, so that any rows can be read or written separately.

The archive is an uncompressed zip: `data.pkl` describes the tensor, `data/0` is its storage. The pickle is read as data
(plain_pickle.py): neither torch nor Python unpickles it.
"""

from __future__ import annotations

import io
import itertools
import math
import struct
import zipfile
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.serialization import get_crc32_options, set_crc32_options

from megatron_a2d.checkpoint.plain_pickle import PERSISTENT, Allowed, Name, Record, read_pickle
from megatron_a2d.checkpoint.tensor_rows import OpenFiles

DTYPES_OF_STORAGES = {
    "BFloat16Storage": torch.bfloat16, "HalfStorage": torch.float16, "FloatStorage": torch.float32,
}  # fmt: skip

# What reading a pickle or a zip can raise on damaged or hostile bytes.
DAMAGED = (
    zipfile.BadZipFile, struct.error, EOFError, AttributeError, IndexError, KeyError, TypeError, ValueError,
    RuntimeError, OverflowError,
)  # fmt: skip

_REBUILD = Name("torch._utils", "_rebuild_tensor_v2")
_ORDERED = Name("collections", "OrderedDict")
_IN_TENSORS: Allowed = {
    _REBUILD.module: {_REBUILD.name}, _ORDERED.module: {_ORDERED.name}, "torch": set(DTYPES_OF_STORAGES),
}  # fmt: skip
# Objects that Megatron-LM saves next to plain values (megatron.core.safe_globals): recorded, never constructed.
_IN_VALUES: Allowed = {
    **_IN_TENSORS,
    "torch": {
        "ByteStorage", "LongStorage", *DTYPES_OF_STORAGES,
        "bfloat16", "bool", "float16", "float32", "float64", "int32", "int64", "uint8",
    },
    "_codecs": {"encode"},
    "_io": {"BytesIO"},
    "argparse": {"Namespace"},
    "types": {"SimpleNamespace"},
    "pathlib": {"PosixPath"},
    "signal": {"Signals"},
    "numpy": {"dtype", "ndarray"},
    "numpy.core.multiarray": {"_reconstruct", "scalar"},
    "numpy._core.multiarray": {"_reconstruct", "scalar"},
    "numpy.dtypes": {"UInt32DType"},
    "megatron.core.enums": {"ModelType"},
    "megatron.core.optimizer.optimizer_config": {"OptimizerConfig"},
    "megatron.core.rerun_state_machine": {"RerunDiagnostic", "RerunMode", "RerunState"},
    "megatron.core.transformer.enums": {
        "AttnBackend", "CudaGraphScope", "CudaGraphModule", "InferenceCudaGraphScope",
    },
}  # fmt: skip
_LARGEST_TENSOR_PICKLE = 1 << 16  # bytes; torch writes some 200
_LARGEST_PICKLE = 64 << 20
_MOST_VALUES = 1_048_576  # of one object

ReadBytes = Callable[[int, int], bytes]  # offset, length


def find_values(
    files: OpenFiles, path: Path, offset: int, length: int, dtype: torch.dtype, shape: Sequence[int]
) -> int:
    """The absolute position of the values of the archive at `offset` of the file `path`.

    Raises one of DAMAGED unless the archive holds one contiguous tensor of `dtype` and `shape`.
    """
    return _find(partial(files.read_bytes, path), offset, length, dtype, shape)


def read_value(read_bytes: ReadBytes, offset: int, length: int) -> Any:
    """The plain values that torch.save wrote there: an OrderedDict becomes a dict; tensors, and the other objects that
    Megatron-LM saves, stay `Record`s. Raises one of DAMAGED for anything else."""
    archive = _Archive(read_bytes, offset, length)
    return _plain(read_pickle(archive.content("data.pkl", _LARGEST_PICKLE), _IN_VALUES), 0, itertools.count())


def _plain(value: Any, depth: int, seen: Iterator[int]) -> Any:
    """A copy without Records of OrderedDict. A list that holds another twice, which holds a third twice and so on, is a
    few bytes in a pickle, and without end here: `seen` counts the values."""
    if depth > 100 or next(seen) > _MOST_VALUES:
        raise ValueError("it is nested more than 100 deep, or holds more than 1,048,576 values")
    if type(value) is Record and value.name == _ORDERED:
        value = value.state or {}
    if type(value) is dict:
        return {key: _plain(item, depth + 1, seen) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_plain(item, depth + 1, seen) for item in value)
    return value


class _Archive:
    """The records of a torch.save archive."""

    def __init__(self, read_bytes: ReadBytes, offset: int, length: int):
        self._read_bytes, self._offset, self._end = read_bytes, offset, offset + length
        with zipfile.ZipFile(_Slice(read_bytes, offset, length)) as archive:
            self.records = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        if "data.pkl" not in self.records:
            raise ValueError("it holds no values")
        if min(record.header_offset for record in self.records.values()) != 0:
            raise ValueError("it does not begin there")
        if any(self.is_compressed(name) for name in ("data.pkl", "data/0")):
            raise ValueError("it is compressed")
        if "byteorder" in self.records and self.content("byteorder", 16) != b"little":
            raise ValueError("it is not little-endian")

    def is_compressed(self, name: str) -> bool:
        return name in self.records and self.records[name].compress_type != zipfile.ZIP_STORED

    def location(self, name: str) -> tuple[int, int]:
        """Absolute position and length."""
        # A record's own header may be padded differently from its entry in the zip's directory.
        start = self._offset + self.records[name].header_offset
        name_length, extra_length = struct.unpack_from("<HH", self._read_bytes(start, 30), 26)
        begin, size = start + 30 + name_length + extra_length, self.records[name].file_size
        if begin + size > self._end:
            raise ValueError("it is cut short")
        return begin, size

    def content(self, name: str, limit: int) -> bytes:
        begin, size = self.location(name)
        if size > limit:
            raise ValueError(f"its {name} has {size} bytes, more than {limit}")
        return self._read_bytes(begin, size)


def _find(read_bytes: ReadBytes, offset: int, length: int, dtype: torch.dtype, shape: Sequence[int]) -> int:
    archive = _Archive(read_bytes, offset, length)
    if "data/0" not in archive.records:
        raise ValueError("it holds no tensor")
    tensor = _describe(read_pickle(archive.content("data.pkl", _LARGEST_TENSOR_PICKLE), _IN_TENSORS))
    num_elements = math.prod(shape)
    if tensor[:4] != (dtype, num_elements, 0, tuple(shape)):
        raise ValueError(f"it holds {tensor}, not {dtype} {list(shape)}")
    strides = (math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    if any(n > 1 and a != b for n, a, b in zip(shape, strides, tensor.stride, strict=True)):
        raise ValueError(f"it is not contiguous (strides {tensor.stride})")
    begin, size = archive.location("data/0")
    if size != num_elements * dtype.itemsize:
        raise ValueError("it is cut short")
    return begin


@lru_cache(maxsize=256)
def archive_frame(dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[bytes, bytes]:
    """What torch.save writes before and after the values of a contiguous tensor.

    Without checksums of the values (no torch reads them; a checkpoint's manifest covers whole files) nothing else of an
    archive depends on them, so that an archive is prefix + values + suffix, of known length.
    """
    with_checksums = get_crc32_options()
    set_crc32_options(False)
    try:
        blob = io.BytesIO()
        torch.save(torch.zeros(shape, dtype=dtype), blob)
    finally:
        set_crc32_options(with_checksums)
    data = blob.getbuffer()
    size = math.prod(shape) * dtype.itemsize
    begin = _find(lambda offset, length: bytes(data[offset : offset + length]), 0, len(data), dtype, shape)
    return bytes(data[:begin]), bytes(data[begin + size :])


class _StoredTensor(NamedTuple):
    dtype: torch.dtype
    num_elements: int  # of the storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def _describe(value: Any) -> _StoredTensor:
    """The tensor that a pickle would have rebuilt."""
    if type(value) is not Record or value.name != _REBUILD:
        raise ValueError("it holds no tensor")
    storage, offset, shape, stride = value.arguments[:4]
    if type(storage) is not Record or storage.name != PERSISTENT:
        raise ValueError("its tensor has no storage")
    _, kind, _, _, num_elements = storage.arguments[0]
    if type(kind) is not Name or any(type(n) is not int for n in (offset, num_elements, *shape, *stride)):
        raise ValueError("its tensor is not described by numbers")
    return _StoredTensor(DTYPES_OF_STORAGES[kind.name], num_elements, offset, tuple(shape), tuple(stride))


class _Slice(io.RawIOBase):
    """Part of a file as a separate file object, for zipfile."""

    def __init__(self, read_bytes: ReadBytes, offset: int, length: int):
        self._read_bytes, self._offset, self._length, self._position = read_bytes, offset, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        if position < 0:
            raise OSError("seek before the beginning")
        self._position = position
        return position

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._length - self._position)
        size = left if size is None or size < 0 else min(size, left)
        data = self._read_bytes(self._offset + self._position, size)
        self._position += size
        return data
