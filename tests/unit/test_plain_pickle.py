"""Pickles and .metadata read as data: the right values, and one line for whatever else the bytes say."""

from __future__ import annotations

import builtins
import io
import os
import pickle
import random
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_a2d.checkpoint.metadata_index import Box, are_disjoint, read_index
from megatron_a2d.checkpoint.plain_pickle import Name, PickleError, Record, read_pickle
from megatron_a2d.checkpoint.torch_dist_reader import open_torch_dist
from megatron_a2d.checkpoint.torch_save_zip import DAMAGED, read_value
from megatron_a2d.utils.errors import UserError

VALUES = {
    "n": None, "t": [True, False], "i": [0, 255, 65535, -1, 2**31, -(2**70)], "f": 1.5e-300, "s": "ä\ud800" * 300,
    "b": [b"x", b"y" * 300, bytearray(b"z")], "c": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), {}, {1: {2.5: None}}],
}  # fmt: skip


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_values_are_what_they_were(protocol: int) -> None:
    allowed = {"_codecs": {"encode"}, "builtins": {"bytearray"}, "__builtin__": {"bytearray"}}
    values = VALUES if protocol > 2 else {**VALUES, "b": []}  # bytes are a call then
    values = values if protocol > 4 else {**values, "b": values["b"][:2]}  # type: ignore[index]
    assert read_pickle(pickle.dumps(values, protocol), allowed) == values
    shared = [1]
    first, second = read_pickle(pickle.dumps([shared, shared], protocol), {})
    assert first == [1] and first is second


def test_what_would_be_called_is_written_down() -> None:
    value = read_pickle(
        pickle.dumps({"f": builtins.len, "d": OrderedDict(a=1)}), {"builtins": {"len"}, "collections": {"OrderedDict"}}
    )
    assert value["f"] == Name("builtins", "len")
    assert type(value["d"]) is Record and value["d"].state == {"a": 1}
    with pytest.raises(PickleError, match=r"load builtins\.len, which is not allowed"):
        read_pickle(pickle.dumps(builtins.len), {"builtins": {"abs"}})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x80\x02K\x01K\x02R.", "calls something that is not a function"),
        (b"\x80\x02]}b.", "sets the state of something that is not a new object"),
        (b"\x80\x02cbuiltins\nlen\n)R}bN}b.", "sets the state of something that is not a new object"),
        (b"\x80\x02cbuiltins\nlen\n}b.", "sets the state of something that is not a new object"),
        (b"\x80\x02N(K\x01e.", "appends to a NoneType"),
        (b"\x80\x02]K\x01K\x02s.", "sets items of a list"),
        (b"\x80\x02})K\x01s.", "a tuple as the key"),
        (b"\x80\x02I1\n.", "instruction 'I'"),
        (b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.", "cut short"),
        (b"\x80\x02r\xff\xff\xff\xff.", "cut short"),
        (b"", "cut short"),
    ],
)
def test_other_instructions_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(PickleError, match=message):
        read_pickle(data, {"builtins": {"len"}})


def test_a_large_number_of_the_memo_takes_no_memory() -> None:
    assert read_pickle(b"\x80\x02Nr\xff\xff\xff\xff.", {}) is None


def test_lists_that_hold_one_another_have_an_end() -> None:
    """Forty levels, each holding the one below twice, are 400 bytes and 2^40 values."""
    levels = b"".join(b"](h%ch%ceq%c" % (level, level, level + 1) for level in range(40))
    blob = io.BytesIO()
    with zipfile.ZipFile(blob, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02]q\x00" + levels + b".")
    data = blob.getvalue()
    with pytest.raises(ValueError, match="more than 1,048,576 values"):
        read_value(lambda offset, length: data[offset : offset + length], 0, len(data))


def test_many_names_take_no_longer_than_they_are_long() -> None:
    """Each used to copy what is left of the file: minutes for two megabytes."""
    data = b"\x80\x02" + b"ctorch\nSize\n" * 200_000 + b"."
    begin = time.process_time()
    assert read_pickle(data, {"torch": {"Size"}}) == Name("torch", "Size")
    assert time.process_time() - begin < 20


def test_damaged_bytes_are_one_kind_of_error() -> None:
    """2,000 changes of a real pickle and of an archive of torch: read, or refused; nothing else is raised."""
    draw = random.Random(0)
    blob = io.BytesIO()
    torch.save({**VALUES, "s": "x", "b": [], "tensor": torch.zeros(2)}, blob)
    refused = 0
    for number in range(2000):
        data = bytearray(pickle.dumps(VALUES) if number % 2 else blob.getvalue())
        for _ in range(draw.randint(1, 4)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        data = data[: draw.randrange(len(data))] if number % 5 == 0 else data
        try:
            if number % 2:
                read_pickle(bytes(data), {})
            else:
                read_value(lambda offset, length, data=data: bytes(data[offset : offset + length]), 0, len(data))
        except DAMAGED:
            refused += 1
    assert 0 < refused < 2000  # both happen


def write(directory: Path, change: Callable[[Metadata], Any] = lambda metadata: None) -> Path:
    """A checkpoint of one tensor in two chunks, and one object; `change` spoils its .metadata."""
    directory.mkdir()
    files = b""
    places = {}
    for name, offset, value in (("w", (0, 0), torch.ones(2, 3)), ("w", (2, 0), torch.ones(2, 3)), ("o", None, [None])):
        blob = io.BytesIO()
        torch.save(value, blob)
        places[MetadataIndex(name, offset)] = _StorageInfo("__0_0.distcp", len(files), len(blob.getvalue()))
        files += blob.getvalue()
    (directory / "__0_0.distcp").write_bytes(files)
    (directory / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    chunks = [ChunkStorageMetadata(torch.Size((row, 0)), torch.Size((2, 3))) for row in (0, 2)]
    tensor = TensorStorageMetadata(TensorProperties(torch.float32), torch.Size((4, 3)), chunks)
    metadata = Metadata({"w": tensor, "o": BytesStorageMetadata()}, storage_data=places)
    change(metadata)
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))
    return directory


def set_place(name: str, **values: Any) -> Callable[[Metadata], None]:
    def change(metadata: Metadata) -> None:
        for index, info in metadata.storage_data.items():
            if index.fqn == name:
                vars(info).update(values)

    return change


def set_chunk(**values: Any) -> Callable[[Metadata], None]:
    return lambda metadata: vars(metadata.state_dict_metadata["w"].chunks[1]).update(values)  # type: ignore[union-attr]


def set_tensor(**values: Any) -> Callable[[Metadata], None]:
    return lambda metadata: vars(metadata.state_dict_metadata["w"]).update(values)


def _list_again(times: int) -> Callable[[Metadata], None]:
    """The same bytes as many other objects, each a byte longer."""

    def change(metadata: Metadata) -> None:
        place = next(info for index, info in metadata.storage_data.items() if index.fqn == "o")
        for number in range(times):
            longer = _StorageInfo(place.relative_path, place.offset, place.length + number)
            metadata.storage_data[MetadataIndex(f"o{number}")] = longer
            metadata.state_dict_metadata[f"o{number}"] = BytesStorageMetadata()

    return change


def _nested(levels: int) -> list[Any]:
    """Of 2^levels values, and a pickle of a few hundred bytes."""
    value: list[Any] = []
    for _ in range(levels):
        value = [value, value]
    return value


SPOILED: dict[str, tuple[Callable[[Metadata], Any], str]] = {
    "negative offset": (set_place("w", offset=-1), "where a size or a position belongs"),
    "negative length": (set_place("w", length=-8), "where a size or a position belongs"),
    "a length of 2^40": (set_place("w", length=2**40), "truncated|refused"),
    "an object of 2^40 bytes": (set_place("o", length=2**40), "lists objects of 1099511627776 bytes"),
    "a thousand objects in one place": (_list_again(1000), "lists objects of"),
    "an object of 2^80 bytes": (set_place("o", length=2**80), "where a size or a position belongs"),
    "an object with a negative length": (set_place("o", length=-1), "where a size or a position belongs"),
    "an object elsewhere": (set_place("o", relative_path="/etc/x.distcp"), "lies outside the checkpoint"),
    "a path that is a number": (set_place("w", relative_path=7), "where a name belongs"),
    "a length that is text": (set_place("w", length="8"), "where a size or a position belongs"),
    "a length that is lists": (set_place("w", length=_nested(40)), "a list where a size or a position"),
    "a length that is true": (set_place("w", length=True), "where a size or a position belongs"),
    "compressed": (set_place("w", transform_descriptors=["zstd"]), "compressed"),
    "negative sizes": (set_chunk(sizes=torch.Size((-2, 3))), "where a size or a position belongs"),
    "a chunk outside": (set_chunk(offsets=torch.Size((3, 0))), "lies outside the shape"),
    "a chunk of no size": (set_chunk(sizes=torch.Size((0, 3))), "lies outside the shape"),
    "a chunk with other axes": (set_chunk(sizes=torch.Size((2,))), "damaged"),
    "sizes that are a list": (set_chunk(sizes=[2, 3]), "no size where one belongs"),
    "a negative shape": (set_tensor(size=torch.Size((-4, 3))), "where a size or a position belongs"),
    "no type": (set_tensor(properties=None), "no properties"),
    "chunks that are a dict": (set_tensor(chunks={}), "where a list belongs"),
    "no storage": (lambda metadata: vars(metadata).update(storage_data=None), "damaged"),
    "no tensors": (lambda metadata: vars(metadata).update(state_dict_metadata=[]), "damaged"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_spoiled_metadata_is_one_line(name: str, tmp_path: Path) -> None:
    change, message = SPOILED[name]
    directory = write(tmp_path / "iter_0000001", change)
    with pytest.raises(UserError, match=message) as caught, open_torch_dist(directory) as stored:
        stored.read_box("w", Box((0, 0), (4, 3)))
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


def test_metadata_that_is_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    directory = write(tmp_path / "iter_0000001")
    (directory / ".metadata").unlink()
    os.mkfifo(directory / ".metadata")
    with pytest.raises(UserError, match="is not a regular file"):
        read_index(directory)


def test_whole_metadata_is_read(tmp_path: Path) -> None:
    """Control for the above."""
    with open_torch_dist(write(tmp_path / "iter_0000001")) as stored:
        assert torch.equal(stored.read_box("w", Box((1, 1), (3, 3))), torch.ones(2, 2))
    assert set(read_index(tmp_path / "iter_0000001").objects) == {"o"}


def test_boxes_that_share_no_element() -> None:
    grid = [Box((a, b), (a + 1, b + 2)) for a in range(300) for b in range(0, 300, 2)]  # 45,000: not pair by pair
    assert are_disjoint(grid)
    assert not are_disjoint([*grid, Box((7, 3), (8, 4))])
    pinwheel = [Box((0, 0), (1, 2)), Box((0, 2), (2, 3)), Box((2, 1), (3, 3)), Box((1, 0), (3, 1)), Box((1, 1), (2, 2))]
    assert are_disjoint(pinwheel) and not are_disjoint([*pinwheel, Box((0, 0), (3, 3))])
    assert are_disjoint([Box((), ())]) and not are_disjoint([Box((), ()), Box((), ())])
