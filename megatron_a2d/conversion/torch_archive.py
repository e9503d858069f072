"""Where the values of one tensor lie inside a torch.save archive, so that any rows can be read alone.

The archive is an uncompressed zip: `data.pkl` describes the tensor, `data/0` is its storage. The pickle is
read with an allow-list that rebuilds nothing.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_a2d.conversion.rows import OpenFiles

DTYPES_OF_STORAGES = {
    "BFloat16Storage": torch.bfloat16, "HalfStorage": torch.float16, "FloatStorage": torch.float32,
}  # fmt: skip

# What reading a pickle or a zip can raise on damaged or hostile bytes.
DAMAGED = (
    pickle.UnpicklingError, zipfile.BadZipFile, struct.error, EOFError, AttributeError, ImportError,
    IndexError, KeyError, TypeError, ValueError, RuntimeError, OverflowError,
)  # fmt: skip


def find_values(
    files: OpenFiles, path: Path, offset: int, length: int, dtype: torch.dtype, shape: Sequence[int]
) -> int:
    """The absolute position of the values of the archive at `offset` of the file `path`.

    Raises one of DAMAGED unless the archive holds one contiguous tensor of `dtype` and `shape`.
    """
    view = _Slice(files, path, offset, length)
    with zipfile.ZipFile(view) as archive:
        records = {info.filename.partition("/")[2]: info for info in archive.infolist()}

    if min(record.header_offset for record in records.values()) != 0:
        raise ValueError("it does not begin there")

    def position(name: str) -> int:
        # A record's own header may be padded differently from its entry in the zip's directory.
        header = files.read_bytes(path, offset + records[name].header_offset, 30)
        name_length, extra_length = struct.unpack_from("<HH", header, 26)
        return offset + records[name].header_offset + 30 + name_length + extra_length

    def content(name: str) -> bytes:
        return files.read_bytes(path, position(name), records[name].file_size)

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

    def __init__(self, files: OpenFiles, path: Path, offset: int, length: int):
        self._files, self._path, self._offset, self._length, self._position = files, path, offset, length, 0

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
        data = self._files.read_bytes(self._path, self._offset + self._position, size)
        self._position += size
        return data
