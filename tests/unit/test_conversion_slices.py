"""Rows on their way: cut, put together, cast, judged, written and read back."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from megatron_a2d.checkpoint import tensor_rows
from megatron_a2d.checkpoint.tensor_rows import (
    FiniteCheck,
    OpenFiles,
    Remapped,
    RowRange,
    StreamedFile,
    account,
    bytes_of,
    cast,
    is_finite,
    num_bytes,
    slabs,
)
from megatron_a2d.utils.errors import UserError


class Tensors:
    """A source in memory."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]):
        self._tensors = tensors
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def read(self, row_range: RowRange, memory: memoryview | None = None) -> torch.Tensor:
        return self._tensors[row_range.name][row_range.lead][row_range.start : row_range.stop]


@pytest.mark.parametrize(
    ("shape", "itemsize"), [((10, 3), 4), ((10,), 4), ((10, 2, 3), 2), ((10, 100), 4), ((10, 0), 4)]
)
@pytest.mark.parametrize("limit", [1, 11, 12, 24, 25, 1000])
@pytest.mark.parametrize(("start", "stop"), [(0, 10), (3, 8), (4, 5), (6, 6)])
def test_slabs_are_as_large_as_they_may_be(
    shape: tuple[int, ...], itemsize: int, limit: int, start: int, stop: int
) -> None:
    row = math.prod(shape[1:]) * itemsize
    cut = list(slabs(shape, start, stop, itemsize, limit))
    assert [place for pair in cut for place in range(*pair)] == list(range(start, stop))
    sizes = [last - first for first, last in cut]
    most = 1 if row > limit else limit // row if row else limit
    assert all(size == most for size in sizes[:-1]) and all(0 < size <= most for size in sizes)


def test_slabs_have_4_mib_unless_said_otherwise() -> None:
    assert list(slabs((5000, 1024), 0, 5000, 2)) == [(0, 2048), (2048, 4096), (4096, 5000)]


def test_tensors_are_put_together_from_rows_elsewhere() -> None:
    source = Tensors({"a": torch.arange(12.0).view(6, 2), "b": -torch.arange(12.0).view(2, 3, 2)})
    places = {(0, 3): [RowRange("a", (), 4, 6), RowRange("b", (1,), 0, 1)], (3, 4): [RowRange("a", (), 0, 1)]}
    remapped = Remapped(
        source, {"c": (4, 2)}, {"c": torch.bfloat16}, lambda row_range: places[row_range.start, row_range.stop]
    )
    assert remapped.dtype("c") == torch.bfloat16 and remapped.shapes == {"c": (4, 2)}
    for row_range, expected in (
        (RowRange("c", (), 0, 3), [[8, 9], [10, 11], [-6, -7]]),
        (RowRange("c", (), 3, 4), [[0, 1]]),
    ):
        found = remapped.read(row_range)
        assert found.dtype == torch.bfloat16 and found.tolist() == expected
    assert num_bytes(source) == 24 * 4 and num_bytes(remapped) == 8 * 2


def test_casts_that_would_make_infinities() -> None:
    values = torch.tensor([1.0, -2.0])
    assert cast(values, torch.float32, "w") is values
    assert cast(values, torch.float16, "w").tolist() == [1.0, -2.0]
    assert cast(torch.tensor([1e30]), torch.bfloat16, "w").isfinite().all()
    for large in (1e30, -1e30):
        with pytest.raises(UserError, match=r"^w: has values beyond the range of torch.float16"):
            cast(torch.tensor([1.0, large]), torch.float16, "w")
    assert cast(torch.tensor([1.0, math.inf]), torch.float16, "w").tolist() == [1.0, math.inf], "it was none before"
    assert cast(torch.tensor([math.nan]), torch.float16, "w").isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_finite(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    for values in ([], [1.0, -2.0], [0.0], [-1.0], [-0.0, -1.0], [largest, -largest], [torch.finfo(dtype).tiny]):
        assert is_finite(torch.tensor(values, dtype=dtype))
    negative_nan = torch.tensor(math.nan, dtype=dtype).neg()
    for bad in (math.inf, -math.inf, math.nan, negative_nan):
        for others in ([], [1.0], [-1.0], [largest, -largest]):
            assert not is_finite(torch.tensor([*others, bad, *others], dtype=dtype))
    assert not is_finite(torch.tensor([[1.0, math.inf], [2.0, 3.0]], dtype=dtype).T)  # not contiguous


def test_tensors_that_are_not_finite_are_named_in_the_models_order() -> None:
    bad = torch.tensor([1.0, math.nan])
    check = FiniteCheck(Tensors({"z": bad, "m": torch.ones(2), "a": bad}))
    assert check.dtype("m") == torch.float32 and list(check.shapes) == ["z", "m", "a"]
    for name in ("a", "m"):
        check.read(RowRange(name, (), 0, 2))
    check.read(RowRange("z", (), 0, 1))
    assert check.non_finite == {"a"}
    assert check.read(RowRange("z", (), 1, 2)).isnan().all() and check.non_finite == {"a", "z"}
    lines = check.problems(Path("model"))
    assert [line.partition(" has values")[0] for line in lines] == ["model: tensor z", "model: tensor a"]


def test_every_difference_is_listed() -> None:
    expected = {"missing": (1,), "same": (2, 3), "other": (4,)}
    found = {"same": [2, 3], "other": (5, 4), "unknown": (7,)}
    starts = [line.partition("; ")[0] for line in account(expected, found, "here")]
    assert starts == [
        "here: tensor missing is missing",
        "here: tensor unknown [7] is unknown",
        "here: tensor other has shape [5, 4], but config.json asks for [4]",
    ]
    assert account(expected, expected, "here") == []


def test_writing_through_the_memory_of_a_tensor() -> None:
    tensor = torch.zeros(2, 2, dtype=torch.int16)
    bytes_of(tensor)[:] = bytes([1, 0, 2, 0, 3, 0, 4, 1])
    assert tensor.tolist() == [[1, 2], [3, 260]]


@pytest.mark.parametrize("cuts", [[], [1], [4096], [4095, 8192], [100, 4000, 9000], [12288]])
@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 12288, 13000])
def test_a_file_does_not_depend_on_the_pieces_it_was_written_in(
    size: int, cuts: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With blocks of a page; the system takes fewer bytes than it is given."""
    monkeypatch.setattr(tensor_rows, "_BLOCK_BYTES", 4096)
    write = os.write
    monkeypatch.setattr(
        os, "write", lambda descriptor, data: write(descriptor, data[: max(len(data) // 2 // 512 * 512, 512)])
    )
    data = torch.arange(size).to(torch.uint8).numpy().tobytes()
    borders = [0, *(min(cut, size) for cut in cuts), size]
    (tmp_path / "file").write_bytes(b"what was there before, and longer" * 500)
    with StreamedFile(tmp_path / "file") as file:
        for first, last in itertools.pairwise(borders):
            file.write(memoryview(data)[first:last])
    assert (tmp_path / "file").read_bytes() == data


def test_reads_that_come_in_pieces_and_files_that_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(torch.arange(100, dtype=torch.int16).numpy().tobytes())
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda descriptor, buffers, offset: preadv(descriptor, [buffers[0][:7]], offset))
    files = OpenFiles()
    assert files.read_bytes(tmp_path / "file", 4, 4) == bytes([2, 0, 3, 0])
    assert files.read_tensor(tmp_path / "file", 20, (3, 2), torch.int16).tolist() == [[10, 11], [12, 13], [14, 15]]
    with pytest.raises(UserError, match=r"file: ends after byte 200"):
        files.read_tensor(tmp_path / "file", 198, (2,), torch.int16)
    with pytest.raises(UserError, match=r"file: ends after byte 200"):
        files.read_bytes(tmp_path / "file", 198, 3)
    with pytest.raises(UserError, match=r"none: cannot be read \(No such file"):
        files.read_bytes(tmp_path / "none", 0, 1)
    descriptor = files._descriptor(tmp_path / "file")
    assert files._descriptor(tmp_path / "file") == descriptor
    files.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    assert files.read_bytes(tmp_path / "file", 2, 2) == bytes([1, 0]), "it may be opened again"
    files.close()
