"""safetensors files of HF models: a reader that indexes the headers, and a writer that streams shards.

A safetensors file is an 8-byte header length, a JSON header (name -> dtype, shape, [begin, end) of its
bytes), then the values, little-endian, without gaps. Reading and writing hold one slab at a time in memory.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath
from typing import Any

import torch

from megatron_a2d.checkpoint.tensor_rows import OpenFiles, RowRange, RowSource, StreamedFile, bytes_of, slabs
from megatron_a2d.config.model_config import quantised
from megatron_a2d.conversion.resumable_output import ResumableOutput
from megatron_a2d.conversion.workers import run_jobs
from megatron_a2d.utils.atomic_write import read_json, regular
from megatron_a2d.utils.errors import UserError
from megatron_a2d.utils.parsing import ParseError, parse_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000
MOST_AXES = 16  # multiplying a hundred thousand dimensions would take minutes
TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
NAMES_OF_DTYPES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """The location of a tensor."""

    path: Path
    offset: int  # bytes from the start of the file
    shape: tuple[int, ...]
    dtype: torch.dtype


class SafetensorsDirectory:
    """The tensors of an HF directory, single-file or sharded. A `RowSource`."""

    def __init__(self, directory: Path, from_disk: bool = False):
        """Read all headers. Damaged files raise UserError; tensors that are in two files, or not in the file that the
        index lists, are reported in `problems`. `from_disk`: as in OpenFiles."""
        if not directory.is_dir():
            raise UserError(f"{directory}: no such directory; give the directory of a Hugging Face model")
        self.entries: dict[str, Entry] = {}
        self.problems: list[str] = []
        self._files = OpenFiles(from_disk)
        damage: list[str] = []
        foreign: dict[str, str] = {}  # tensor -> its unsupported dtype
        weight_map = _weight_map(directory)
        for file in dict.fromkeys(weight_map.values()) or [SINGLE_FILE]:
            path = directory / file
            for name, entry in _read_header(path, damage, foreign).items():
                if name in self.entries:
                    self.problems.append(f"{path}: tensor {name} is also in {self.entries[name].path.name}; keep one")
                elif weight_map and weight_map.get(name) != file:
                    self.problems.append(f"{path}: tensor {name} is not listed in {INDEX_FILE}; fetch both again")
                self.entries[name] = entry
        if foreign:
            kinds, first = ", ".join(sorted(set(foreign.values()))), next(iter(foreign))
            raise UserError(f"{directory}: {quantised(f'{kinds}: {first} and {len(foreign) - 1} others')}")
        if damage:
            raise UserError(damage)
        for name, file in weight_map.items():
            if name not in self.entries:
                self.problems.append(f"{directory / file}: lacks tensor {name}, which {INDEX_FILE} lists")
        self.shapes: Mapping[str, tuple[int, ...]] = {name: entry.shape for name, entry in self.entries.items()}

    def dtype(self, name: str) -> torch.dtype:
        return self.entries[name].dtype

    def read(self, row_range: RowRange, memory: memoryview | None = None) -> torch.Tensor:
        entry = self.entries[row_range.name]
        axes = len(row_range.lead)
        rest = entry.shape[axes + 1 :]
        first = 0
        for size, index in zip(entry.shape, (*row_range.lead, row_range.start), strict=False):
            first = first * size + index
        offset = entry.offset + first * math.prod(rest) * entry.dtype.itemsize
        shape = (row_range.stop - row_range.start, *rest)
        return self._files.read_tensor(entry.path, offset, shape, entry.dtype, memory)

    def close(self) -> None:
        self._files.close()


@contextmanager
def open_safetensors(directory: Path, from_disk: bool = False) -> Iterator[SafetensorsDirectory]:
    opened = SafetensorsDirectory(directory, from_disk)
    try:
        yield opened
    finally:
        opened.close()


def _weight_map(directory: Path) -> dict[str, str]:
    """Tensor -> file of a sharded directory; empty for a single file. UserError if a listed file is missing."""
    if not (directory / INDEX_FILE).exists():
        if not (directory / SINGLE_FILE).exists():
            others = sorted(path.name for pattern in ("*.safetensors", "*.bin") for path in directory.glob(pattern))
            seen = f" (found {', '.join(others[:4])})" if others else ""
            raise UserError(
                f"{directory}: holds neither {SINGLE_FILE} nor {INDEX_FILE}{seen}; "
                "give a complete Hugging Face directory with safetensors weights"
            )
        return {}
    index = directory / INDEX_FILE
    weight_map = read_json(index, "the index of the weight files").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: has no weight_map; fetch it again")
    files = sorted({str(name) for name in weight_map.values()})
    problems = [
        f"{index}: lists the file {name!r}, which is outside the directory; fetch it again"
        for name in files
        if PurePath(name).name != name
    ]
    if not problems:
        problems = [
            f"{directory / name}: is missing, though {INDEX_FILE} lists it; fetch the complete model"
            for name in files
            if not (directory / name).is_file()
        ]
    if SINGLE_FILE not in files and (directory / SINGLE_FILE).exists():
        problems.append(f"{directory}: holds {SINGLE_FILE} and {INDEX_FILE}, two models; remove one")
    if problems:
        raise UserError(problems)
    return {str(name): str(file) for name, file in weight_map.items()}


def _read_header(path: Path, problems: list[str], foreign: dict[str, str]) -> dict[str, Entry]:
    """The tensors of one file; appends its problems to `problems`, tensors of unsupported dtypes to `foreign`."""
    try:
        size = path.stat().st_size
        with open(path, "rb", opener=regular) as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                problems.append(f"{path}: is truncated or not a safetensors file ({size} bytes); fetch it again")
                return {}
            header = parse_json(file.read(length))
    except OSError as error:
        problems.append(f"{path}: cannot be read ({error.strerror}); check the file")
        return {}
    except ParseError as error:
        problems.append(f"{path}: its header is damaged ({error}); fetch it again")
        return {}
    if not isinstance(header, dict):
        problems.append(f"{path}: its header is damaged (not a JSON object); fetch it again")
        return {}
    if not isinstance(header.pop("__metadata__", {}), dict):
        problems.append(f"{path}: its header is damaged (__metadata__ is not an object); fetch it again")
    entries: dict[str, Entry] = {}
    end = 0
    found = _entries(path, 8 + length, header, problems, foreign)
    for name, (begin, stop, entry) in sorted(found.items(), key=lambda item: item[1][0]):
        if begin != end:
            problems.append(f"{path}: tensor {name} starts at byte {begin} of the values, not {end}; fetch it again")
        entries[name], end = entry, stop
    if len(entries) == len(header) and end != size - 8 - length:
        problems.append(
            f"{path}: holds {size - 8 - length} bytes of values where its header describes {end}; "
            "the download is truncated or damaged, fetch it again"
        )
    return entries


def _entries(
    path: Path, base: int, header: dict[str, Any], problems: list[str], foreign: dict[str, str]
) -> dict[str, tuple[int, int, Entry]]:
    """name -> (begin, end, entry) of the well-formed items of a header; `base` is the file offset of the values."""
    result = {}
    for name, item in header.items():
        try:
            begin, end = item["data_offsets"]
            shape, kind = tuple(item["shape"]), item["dtype"]
            if any(type(n) is not int for n in (begin, end, *shape)) or type(kind) is not str or len(shape) > MOST_AXES:
                raise ValueError
        except (TypeError, ValueError, KeyError):
            problems.append(f"{path}: tensor {name}: its header entry is damaged; fetch the file again")
            continue
        if kind not in TORCH_DTYPES:
            foreign[name] = kind
        elif min((*shape, begin), default=0) < 0 or end - begin != math.prod(shape) * TORCH_DTYPES[kind].itemsize:
            problems.append(
                f"{path}: tensor {name}: {end - begin} bytes do not hold {kind} {list(shape)}; fetch it again"
            )
        else:
            result[name] = (begin, end, Entry(path, base + begin, shape, TORCH_DTYPES[kind]))
    return result


def write_safetensors(
    work: ResumableOutput, source: RowSource, max_shard_bytes: int, advance: Callable[[float], None], workers: int = 1
) -> dict[str, str]:
    """Write all tensors of `source`, in its order, as one file or several with an index, `workers` at a time.

    Shards that an earlier run completed are kept. `advance` is called with bytes written. Returns file name -> SHA-256.
    """
    sizes = {name: math.prod(shape) * source.dtype(name).itemsize for name, shape in source.shapes.items()}
    shards = plan_shards(sizes, max_shard_bytes)
    weight_map: dict[str, str] = {}
    jobs = []
    for number, names in enumerate(shards, 1):
        file = SINGLE_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map.update(dict.fromkeys(names, file))
        if file not in work.done:
            jobs.append(partial(_write_file, work, file, source, names))
    run_jobs(jobs, workers, advance)
    digests = {file: work.done[file]["sha256"] for file in dict.fromkeys(weight_map.values())}
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(sizes.values())},
            "weight_map": dict(sorted(weight_map.items())),
        }
        text = (json.dumps(index, indent=2) + "\n").encode()
        (work.directory / INDEX_FILE).write_bytes(text)
        digests[INDEX_FILE] = hashlib.sha256(text).hexdigest()
    return digests


def plan_shards(sizes: Mapping[str, int], max_shard_bytes: int) -> list[list[str]]:
    """Split tensors (name -> bytes), in their order, into few shards of about equal size.

    A shard exceeds `max_shard_bytes` only if a single tensor does. Equal sizes keep all workers busy to the end.
    """
    total = sum(sizes.values())
    share = total / math.ceil(total / max_shard_bytes)
    shards: list[list[str]] = [[]]
    filled = assigned = 0
    for name, size in sizes.items():
        if shards[-1] and (filled + size > max_shard_bytes or assigned + size / 2 > share * len(shards)):
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled, assigned = filled + size, assigned + size
    return shards


def _write_file(
    work: ResumableOutput, file_name: str, source: RowSource, names: Sequence[str], advance: Callable[[float], None]
) -> None:
    # Wide dtypes first, so that every tensor is aligned to its dtype.
    names = sorted(names, key=lambda name: -source.dtype(name).itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        shape, dtype = source.shapes[name], source.dtype(name)
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES_OF_DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with StreamedFile(work.directory / file_name) as file:
        for part in (len(text).to_bytes(8, "little"), text):
            file.write(part)
            digest.update(part)
        for name in names:
            shape = source.shapes[name]
            size = math.prod(shape[1:]) * source.dtype(name).itemsize
            for start, stop in slabs(shape, 0, shape[0], source.dtype(name).itemsize):
                room = file.room((stop - start) * size)
                rows = source.read(RowRange(name, (), start, stop), room).contiguous()
                digest.update(bytes_of(rows))
                file.write_tensor(rows)
                advance(rows.nbytes)
    work.record(file_name, {"sha256": digest.hexdigest()})
