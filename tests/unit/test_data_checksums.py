"""Checksums of token files: their table, damage found when read, descriptions, fingerprints."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest
import xxhash

from megatron_a2d.data import checksums, indexed_dataset
from megatron_a2d.data.indexed_dataset import TokenFile
from megatron_a2d.utils.errors import UserError
from tests.unit import token_files
from tests.unit.token_files import with_checksums, write

prefix = token_files.prefix


def blocks_of(data: bytes, size: int) -> list[bytes]:
    return [data[start : start + size] for start in range(0, len(data), size)]


@pytest.mark.parametrize("cuts", [[], [1], [16], [17], [15, 16], [3, 5, 8, 40], [32, 48], [10, 10, 26, 60]])
@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 61, 64])
def test_the_table_of_checksums_does_not_depend_on_how_a_file_was_written(length, cuts, monkeypatch):
    monkeypatch.setattr(checksums, "BLOCK", 16)
    data, hasher = bytes(range(length)), checksums.BlockHasher()
    borders = [0, *(min(cut, length) for cut in cuts), length]
    table = b"".join(hasher.update(memoryview(data)[a:b]) for a, b in itertools.pairwise(borders)) + hasher.finish()
    expected = [xxhash.xxh3_64_intdigest(block) for block in blocks_of(data, 16)]
    assert np.frombuffer(table, "<u8").tolist() == expected
    known = checksums.Checksums(np.array(expected, dtype=np.uint64), "")
    for first in range(len(expected) + 1):
        assert known.first_difference(data[16 * first :], first) is None
    for wrong in range(length):
        damaged = bytearray(data)
        damaged[wrong] ^= 1
        assert known.first_difference(bytes(damaged), 0) == wrong // 16
        assert known.first_difference(bytes(damaged)[wrong // 16 * 16 :], wrong // 16) == wrong // 16
    assert known.first_difference(data + bytes(16), 0) == length // 16, "more than the table knows"


def test_reads_that_come_in_pieces(tmp_path, monkeypatch):
    """One call gives 2 GiB at most; here 3 bytes."""
    (tmp_path / "file").write_bytes(bytes(range(100)))
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda descriptor, size, offset: pread(descriptor, min(size, 3), offset))
    with (tmp_path / "file").open("rb") as file:
        assert checksums.read_at(file.fileno(), 10, 20) == bytes(range(10, 30))
        assert checksums.read_at(file.fileno(), 95, 20) == bytes(range(95, 100))
        assert checksums.read_at(file.fileno(), 100, 20) == b""


def test_checksums_of_files_and_bytes_are_xxh3(tmp_path):
    data = np.random.default_rng(0).bytes((1 << 22) + 12345)  # more than is read at once
    (tmp_path / "file").write_bytes(data)
    assert (
        checksums.file_checksum(tmp_path / "file")
        == checksums.checksum(data)
        == f"{xxhash.xxh3_64_intdigest(data):016x}"
    )


def test_reads_over_the_borders_of_blocks(tmp_path, monkeypatch):
    """Blocks of 16 bytes, tokens of 2: any range of the stream, and the document in which a damaged block begins."""
    for module in (checksums, indexed_dataset):
        monkeypatch.setattr(module, "BLOCK", 16)
    documents = [list(range(start, start + 7)) for start in range(0, 63, 7)]
    prefix = with_checksums(write(tmp_path / "tokens", documents))
    file = TokenFile(prefix)
    assert file.has_checksums and file.num_tokens == 63
    for start, stop in itertools.combinations(range(64), 2):
        assert file.read(start, stop - start).tolist() == list(range(start, stop))
    assert [chunk.tolist() for chunk in file.chunks(25)] == [list(range(25)), list(range(25, 50)), list(range(50, 63))]
    for damaged in range(0, 126, 5):
        data = bytearray(Path(f"{prefix}.bin").read_bytes())
        data[damaged] ^= 1
        Path(f"{prefix}.bin").write_bytes(data)
        file, block = TokenFile(prefix), damaged // 16
        if block:
            assert file.read(0, 8 * block).tolist() == list(range(8 * block))
            before = 8 * block - 8
            assert file.read(before, 8).tolist() == list(range(before, before + 8)), (
                "a read looks at its own blocks alone"
            )
        with pytest.raises(UserError, match=rf"from byte {16 * block} on \(document {8 * block // 7}\)"):
            file.read(8 * block, min(8, 63 - 8 * block))
        data[damaged] ^= 1
        Path(f"{prefix}.bin").write_bytes(data)


def test_a_table_that_is_not_the_files(tmp_path, prefix):
    with_checksums(prefix)
    table = Path(f"{prefix}.sums")
    good = table.read_bytes()
    for content, message in (
        (good + bytes(8), "has 16 bytes where tokens.bin needs 8"),
        (good[:7], "has 7 bytes where"),
        (bytes(8), "is damaged"),
    ):
        table.write_bytes(content)
        with pytest.raises(UserError, match=message):
            TokenFile(prefix)
    TokenFile(prefix, scan=False)  # compared when it is read
    table.unlink()
    with pytest.raises(UserError, match=r"tokens.sums is missing next to tokens.bin"):
        TokenFile(prefix)


@pytest.mark.parametrize(
    "name", ["vocab_size", "documents", "tokens", "max_token_id", "max_token_document", "eod_token_id"]
)
def test_a_description_that_was_changed(name, prefix):
    path = Path(f"{prefix}.json")
    assert checksums.read_metadata(prefix) is None
    checksums.write_metadata(path, {name: 3, "tokenizer": "t"})
    assert checksums.read_metadata(prefix) == {name: 3, "tokenizer": "t"}
    checksums.write_metadata(path, {name: None})
    assert checksums.read_metadata(prefix) == {name: None}
    path.write_text(json.dumps({name: 3, "tokenizer": "t"}))  # of another tool, without a checksum
    assert checksums.read_metadata(prefix) == {name: 3, "tokenizer": "t"}
    for content in (
        {name: "3"},
        {name: 3, checksums.OWN_CHECKSUM: "0" * 16},
        {name: 3, checksums.TABLE_CHECKSUM: "0" * 16},
    ):
        path.write_text(json.dumps(content))
        with pytest.raises(UserError, match="was changed or is damaged"):
            checksums.read_metadata(prefix)


def test_fingerprints_without_checksums_never_change(tmp_path):
    """Older runs store them: 64 slices of 1,024 tokens as int64, then of offsets and document marks as stored."""
    documents = [list(range(length)) for length in (2000, 1, 3000)]
    prefix, tokens = write(tmp_path / "tokens", documents), [token for document in documents for token in document]

    def spread(values: np.ndarray) -> bytes:
        last = max(0, len(values) - 1024)
        return b"".join(values[int(last * piece / 63) :][:1024].tobytes() for piece in range(64))

    arrays = (np.array(tokens, "<i8"), np.array([0, 4000, 4002], "<i8"), np.array([0, 1, 2, 3], "<i8"))
    expected = xxhash.xxh3_64_hexdigest(b"5001 3" + b"".join(map(spread, arrays)))
    assert TokenFile(prefix).fingerprint() == expected
