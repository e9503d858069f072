"""Reader of torch_dist checkpoints of any layout, without megatron.core, one box of a tensor at a time.

`.metadata` lists the chunks of every tensor and where each is stored (metadata_index.py). A chunk is an uncompressed
torch.save archive (torch_save_zip.py). Both are read as data, here and nowhere else in the project: an untrusted
checkpoint can be wrong but cannot run code.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_a2d.checkpoint.metadata_index import Box, Chunk, Location, StoredTensor, are_disjoint, read_index
from megatron_a2d.checkpoint.tensor_rows import OpenFiles, RowRange, bytes_of
from megatron_a2d.checkpoint.torch_save_zip import DAMAGED, DTYPES_OF_STORAGES, find_values, read_value
from megatron_a2d.utils.atomic_write import read_json
from megatron_a2d.utils.errors import UserError

# Besides the weights a training checkpoint has optimizer state and RNG states.
NOT_WEIGHTS = ("optimizer.", "chained_", "rng_state", "rerun_state_machine_state")
# The routers' biases of runs with --moe-router-enable-expert-bias, which no exported model has.
EXPERT_BIAS = "decoder.layers.mlp.router.expert_bias"
# Where megatron.core from 0.17 on stores values outside of tensors; before, and here in any version, it is common.pt.
COMMON_OBJECT = "common_state/shard_0_1"
# Shorter runs of a box (bytes) are read together with the gaps between them: calls cost more than bytes.
_SHORTEST_RUN = 256


class TorchDistCheckpoint:
    """The tensors of an iteration's directory, under megatron's names. A `RowSource` of the weights."""

    def __init__(self, directory: Path, from_disk: bool = False):
        """`from_disk`: as in OpenFiles."""
        self._directory = directory
        self._files = OpenFiles(from_disk)
        self._payloads: dict[Location, int] = {}
        backend = read_json(directory / "metadata.json", "the checkpoint's format").get("sharded_backend")
        if backend != "torch_dist":
            raise UserError(f"{directory}: is in the format {backend!r}; only torch_dist can be read")
        tensors, self._objects = read_index(directory)
        self._tensors = {name: _Grid(tensor) for name, tensor in tensors.items()}
        self.all_shapes: Mapping[str, tuple[int, ...]] = {name: tensor.shape for name, tensor in tensors.items()}
        """Including the optimizer's state."""
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: shape
            for name, shape in self.all_shapes.items()
            if not name.startswith(NOT_WEIGHTS) and name != EXPERT_BIAS
        }
        self._check_objects()

    def dtype(self, name: str) -> torch.dtype:
        dtype = self._tensors[name].dtype
        if dtype not in DTYPES_OF_STORAGES.values():
            raise UserError(f"{self._directory}: {name} has the dtype {dtype}, which weights do not have")
        return dtype

    def read(self, row_range: RowRange, memory: memoryview | None = None) -> torch.Tensor:
        """Rows of a tensor, without its leading axes; in `memory` if one read gives them all."""
        rest = self.shapes[row_range.name][len(row_range.lead) + 1 :]
        box = Box(
            (*row_range.lead, row_range.start, *(0 for _ in rest)),
            (*(index + 1 for index in row_range.lead), row_range.stop, *rest),
        )
        return self.read_box(row_range.name, box, memory).reshape(row_range.stop - row_range.start, *rest)

    def read_box(self, name: str, box: Box, memory: memoryview | None = None) -> torch.Tensor:
        """A box of a tensor, assembled from all overlapping chunks; every element must be stored exactly once."""
        dtype, overlaps = self.dtype(name), []
        for chunk in self._tensors[name].near(box):
            stored = Box(chunk.offsets, tuple(map(sum, zip(chunk.offsets, chunk.sizes, strict=True))))
            if overlap := box.intersect(stored):
                overlaps.append((chunk, overlap))
        self._check_cover(name, box, [overlap for _, overlap in overlaps])
        if len(overlaps) == 1:
            return self._read_overlap(name, *overlaps[0], dtype, memory)
        result = torch.empty(tuple(b - a for a, b in zip(box.start, box.stop, strict=True)), dtype=dtype)
        for chunk, overlap in overlaps:
            target = [slice(a - b, c - b) for a, b, c in zip(overlap.start, box.start, overlap.stop, strict=True)]
            result[tuple(target)] = self._read_overlap(name, chunk, overlap, dtype)
        return result

    def has_expert_bias(self) -> bool:
        """Whether routers choose experts with a bias that is not zero."""
        shape = self.all_shapes.get(EXPERT_BIAS)
        return shape is not None and bool(self.read_box(EXPERT_BIAS, Box((0,) * len(shape), shape)).any())

    def read_common(self) -> Any:
        """The values stored outside of tensors (megatron.core from 0.17 on). Raises one of DAMAGED, or UserError."""
        if COMMON_OBJECT not in self._objects:
            raise UserError(f"{self._directory}: has no common.pt, nor {COMMON_OBJECT}; the checkpoint is incomplete")
        file, offset, length = self._objects[COMMON_OBJECT]
        (value,) = read_value(partial(self._files.read_bytes, self._directory / file), offset, length)
        return value

    def close(self) -> None:
        self._files.close()

    def _check_objects(self) -> None:
        """Refuse a checkpoint in which an object contains code, although only the common one is used."""
        locations = {location: name for name, location in self._objects.items()}
        if missing := sorted(
            {location.file for location in locations if not (self._directory / location.file).exists()}
        ):
            raise UserError(f"{self._directory / missing[0]}: is missing; restore the file, or use another iteration")
        stored = sum(path.stat().st_size for path in self._directory.glob("*.distcp"))
        if (listed := sum(location.length for location in locations)) > stored:  # each would be read
            raise UserError(
                f"{self._directory / '.metadata'}: lists objects of {listed} bytes in files of {stored}; it is "
                "damaged, use another iteration"
            )
        for (file, offset, length), name in locations.items():
            path = self._directory / file
            try:
                read_value(partial(self._files.read_bytes, path), offset, length)
            except DAMAGED as error:
                raise UserError(
                    f"{path}: {name} is refused ({error}); it is damaged or not plain data, use another one"
                ) from None

    def _check_cover(self, name: str, box: Box, overlaps: list[Box]) -> None:
        stored = sum(overlap.num_elements() for overlap in overlaps)
        missing = f"{stored} of {box.num_elements()} elements stored" if stored < box.num_elements() else ""
        if missing or stored > box.num_elements() or not are_disjoint(overlaps):
            raise UserError(
                f"{self._directory}: {name} from {list(box.start)} to {list(box.stop)}: "
                f"{missing or 'some elements are stored twice'}; the checkpoint is damaged, use another iteration"
            )

    def _read_overlap(
        self, name: str, chunk: Chunk, box: Box, dtype: torch.dtype, memory: memoryview | None = None
    ) -> torch.Tensor:
        """The part of a chunk in `box`, whose indices are those of the full tensor."""
        path, location = self._directory / chunk.location.file, chunk.location
        try:
            if location not in self._payloads:
                self._payloads[location] = find_values(
                    self._files, path, location.offset, location.length, dtype, chunk.sizes
                )
        except DAMAGED as error:
            raise UserError(
                f"{path}: the chunk of {name} is refused ({error}); it is damaged, use another iteration"
            ) from None
        offsets = tuple(a - b for a, b in zip(box.start, chunk.offsets, strict=True))
        lengths = tuple(b - a for a, b in zip(box.start, box.stop, strict=True))
        return read_box(self._files, path, self._payloads[location], chunk.sizes, dtype, offsets, lengths, memory)


class _Grid:
    """A tensor's chunks, found by their index in the leading axes along which all are 1 long."""

    def __init__(self, tensor: StoredTensor):
        self.dtype = tensor.dtype
        self._num_lead_axes = 0
        last = len(tensor.shape) - 1
        while self._num_lead_axes < last and all(chunk.sizes[self._num_lead_axes] == 1 for chunk in tensor.chunks):
            self._num_lead_axes += 1
        self._chunks: dict[tuple[int, ...], list[Chunk]] = {}
        for chunk in tensor.chunks:
            self._chunks.setdefault(chunk.offsets[: self._num_lead_axes], []).append(chunk)

    def near(self, box: Box) -> list[Chunk]:
        """A few chunks, among them all that overlap with `box`."""
        ends = zip(box.start[: self._num_lead_axes], box.stop[: self._num_lead_axes], strict=True)
        leads = itertools.product(*(range(start, stop) for start, stop in ends))
        return [chunk for lead in leads for chunk in self._chunks.get(lead, ())]


def read_box(
    files: OpenFiles,
    path: Path,
    begin: int,
    sizes: tuple[int, ...],
    dtype: torch.dtype,
    offsets: tuple[int, ...],
    lengths: tuple[int, ...],
    memory: memoryview | None = None,
) -> torch.Tensor:
    """The box of `lengths` at `offsets` of a contiguous tensor of `sizes`, whose values start at byte `begin`."""
    axes = len(sizes)
    inner = axes  # from this axis on a run is contiguous
    while inner > 0 and all(offsets[i] == 0 and lengths[i] == sizes[i] for i in range(inner, axes)):
        inner -= 1
    run = math.prod(lengths[inner:]) * dtype.itemsize
    if inner > 0 and run < _SHORTEST_RUN:  # complete inner rows, then cut
        full_rows = (*offsets[:inner], *(0 for _ in sizes[inner:])), (*lengths[:inner], *sizes[inner:])
        rows = read_box(files, path, begin, sizes, dtype, *full_rows)
        cut: list[slice] = [slice(a, a + n) for a, n in zip(offsets[inner:], lengths[inner:], strict=True)]
        return rows[(slice(None),) * inner + tuple(cut)]
    strides = [math.prod(sizes[i + 1 :]) for i in range(axes)]
    if inner == 0 or math.prod(lengths[:inner]) == 1:  # one run
        first = sum(a * b for a, b in zip(offsets, strides, strict=True))
        return files.read_tensor(path, begin + first * dtype.itemsize, lengths, dtype, memory)
    result = torch.empty(lengths, dtype=dtype)
    data, position = bytes_of(result), 0
    for outer in itertools.product(*(range(offsets[i], offsets[i] + lengths[i]) for i in range(inner))):
        index = (*outer, *offsets[inner:])
        start = begin + sum(a * b for a, b in zip(index, strides, strict=True)) * dtype.itemsize
        files.read_into(path, start, data[position : position + run])
        position += run
    return result


@contextmanager
def open_torch_dist(directory: Path, from_disk: bool = False) -> Iterator[TorchDistCheckpoint]:
    opened = TorchDistCheckpoint(directory, from_disk)
    try:
        yield opened
    finally:
        opened.close()


def has_expert_bias(directory: Path) -> bool:
    """Whether a checkpoint's routers choose experts with a bias that is not zero."""
    with open_torch_dist(directory) as stored:
        return stored.has_expert_bias()


def read_common(directory: Path) -> dict[str, Any]:
    """The values that a checkpoint stores outside of tensors: iteration, consumed_samples and so on."""
    path = directory / "common.pt"
    try:
        if path.exists():
            with closing(OpenFiles()) as files:
                common = read_value(partial(files.read_bytes, path), 0, path.stat().st_size)
        else:
            path = directory / ".metadata"
            with open_torch_dist(directory) as stored:
                common = stored.read_common()
    except (*DAMAGED, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path}: cannot be read ({reason}); use another iteration") from None
    if type(common) is not dict:
        raise UserError(f"{path}: holds a {type(common).__name__}, not a dict; use another iteration")
    if wrong := [name for name, is_right in _COMMON.items() if name in common and not is_right(common[name])]:
        raise UserError(f"{path}: its {', '.join(wrong)} is invalid; use another iteration")
    return common


def check_pickles(directory: Path) -> None:
    """UserError unless everything pickled in the checkpoint is data: .metadata, stored objects, common values.

    Later reads refuse the same; this finds it before the run starts.
    """
    read_common(directory)
    with open_torch_dist(directory):
        pass


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _are_counts(value: Any, axes: int) -> bool:
    if axes == 0:
        return _is_count(value)
    return type(value) is list and all(_are_counts(item, axes - 1) for item in value)


# The values that are read, and when each is valid.
_COMMON: dict[str, Callable[[Any], bool]] = {
    "iteration": _is_count,
    "consumed_samples": lambda value: value is None or _is_count(value),
    "consumed_tokens": _is_count,
    "skipped_samples": lambda value: _are_counts(value, axes=2) and all(len(ends) == 2 for ends in value),
    "rollbacks": _is_count,
    "averaged_iterations": lambda value: type(value) in (list, tuple) and all(map(_is_count, value)),
    "optimizer_step": _is_count,
    "router_loads": lambda value: _are_counts(value, axes=3),
    "scheduler": lambda value: type(value) is dict and _is_count(value.get("num_steps")),
}
