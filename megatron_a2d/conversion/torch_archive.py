"""Where the values of one tensor lie inside a torch.save archive, so that any rows can be read or written alone.

The archive is an uncompressed zip: `data.pkl` describes the tensor, `data/0` is its storage. The pickle is
read with an allow-list that rebuilds nothing.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.serialization import get_crc32_options, set_crc32_options

from megatron_a2d.conversion.rows import OpenFiles

DTYPES_OF_STORAGES = {
    "BFloat16Storage": torch.bfloat16, "HalfStorage": torch.float16, "FloatStorage": torch.float32,
}  # fmt: skip

# What reading a pickle or a zip can raise on damaged or hostile bytes.
DAMAGED = (
    pickle.UnpicklingError, zipfile.BadZipFile, struct.error, EOFError, AttributeError, ImportError,
    IndexError, KeyError, TypeError, ValueError, RuntimeError, OverflowError,
)  # fmt: skip

ReadBytes = Callable[[int, int], bytes]  # offset, length


def find_values(
    files: OpenFiles, path: Path, offset: int, length: int, dtype: torch.dtype, shape: Sequence[int]
) -> int:
    """The absolute position of the values of the archive at `offset` of the file `path`.

    Raises one of DAMAGED unless the archive holds one contiguous tensor of `dtype` and `shape`.
    """
    return _find(partial(files.read_bytes, path), offset, length, dtype, shape)


def _find(read_bytes: ReadBytes, offset: int, length: int, dtype: torch.dtype, shape: Sequence[int]) -> int:
    view = _Slice(read_bytes, offset, length)
    with zipfile.ZipFile(view) as archive:
        records = {info.filename.partition("/")[2]: info for info in archive.infolist()}

    if not {"data.pkl", "data/0"} <= records.keys():
        raise ValueError("it holds no tensor")
    if min(record.header_offset for record in records.values()) != 0:
        raise ValueError("it does not begin there")

    def position(name: str) -> int:
        # A record's own header may be padded differently from its entry in the zip's directory.
        header = read_bytes(offset + records[name].header_offset, 30)
        name_length, extra_length = struct.unpack_from("<HH", header, 26)
        return offset + records[name].header_offset + 30 + name_length + extra_length

    def content(name: str) -> bytes:
        return read_bytes(position(name), records[name].file_size)

    if any(records[name].compress_type != zipfile.ZIP_STORED for name in ("data.pkl", "data/0")):
        raise ValueError("it is compressed")
    if "byteorder" in records and content("byteorder") != b"little":
        raise ValueError("it is not little-endian")
    tensor = _TensorUnpickler(io.BytesIO(content("data.pkl"))).load()
    num_elements = math.prod(shape)
    if not isinstance(tensor, _StoredTensor) or tensor[:4] != (dtype, num_elements, 0, tuple(shape)):
        raise ValueError(f"it holds {tensor}, not {dtype} {list(shape)}")
    strides = (math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    if any(n > 1 and a != b for n, a, b in zip(shape, strides, tensor.stride, strict=True)):
        raise ValueError(f"it is not contiguous (strides {tensor.stride})")
    begin, size = position("data/0"), num_elements * dtype.itemsize
    if records["data/0"].file_size != size or begin + size > offset + length:
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


class _TensorUnpickler(pickle.Unpickler):
    """Gives a `_StoredTensor` for the pickle of a tensor."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _describe
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and name in DTYPES_OF_STORAGES:
            return DTYPES_OF_STORAGES[name]
        raise pickle.UnpicklingError(f"it wants to load {module}.{name}, which is not allowed")

    def persistent_load(self, pid: Any) -> tuple[torch.dtype, int]:
        _, dtype, _, _, num_elements = pid
        return dtype, num_elements


def _describe(
    storage: tuple[torch.dtype, int], offset: int, shape: Sequence[int], stride: Sequence[int], *_: Any
) -> _StoredTensor:
    return _StoredTensor(*storage, offset, tuple(shape), tuple(stride))


class _Slice(io.RawIOBase):
    """Part of a file as a file of its own, for zipfile."""

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
