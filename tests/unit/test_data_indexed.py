"""Token files: what megatron.core wrote is read back, and each kind of damage gets its own clear line."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from launch import unigram_baseline
from launch.unigram_baseline import unigram_counts, unigram_entropy
from megatron_a2d.data import indexed_dataset
from megatron_a2d.data.indexed_dataset import INTEGER_TYPES, TokenFile
from megatron_a2d.data.packed_dataset import PackedDataset
from megatron_a2d.utils.errors import UserError
from tests.unit import token_files
from tests.unit.token_files import DOCUMENTS, stream, write

prefix = token_files.prefix
HEADER_BYTES = 34


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_reads_what_megatron_wrote(tmp_path, dtype):
    prefix = write(tmp_path / "tokens", DOCUMENTS, dtype)
    file = TokenFile(prefix, vocab_size=10)
    assert (file.num_documents, file.num_tokens, file.dtype) == (5, 12, np.dtype(dtype))
    assert file.document_lengths().tolist() == [3, 0, 1, 2, 6]
    assert [file.document(number).tolist() for number in range(5)] == DOCUMENTS
    assert file.read(2, 4).tolist() == [7, 1, 2, 3] and file.read(2, 4).dtype == np.int64
    assert np.concatenate(list(file.chunks(5))).tolist() == stream()
    assert [file.document_of(position) for position in (0, 2, 3, 4, 5, 6, 11)] == [0, 0, 2, 3, 3, 4, 4]
    theirs = IndexedDataset(prefix)  # held: its arrays must not be touched after it
    assert [file.document(n).tolist() for n in range(5)] == [part.tolist() for part in theirs[:]]


def test_dtype_codes_are_megatrons() -> None:
    theirs = {dtype.value: np.dtype(DType.dtype_from_code(dtype.value)) for dtype in DType}
    assert {code: dtype for code, dtype in theirs.items() if dtype.kind in "iu"} == INTEGER_TYPES


def test_documents_of_several_sequences(tmp_path):
    builder = IndexedDatasetBuilder(str(tmp_path / "t.bin"), dtype=np.uint16)
    builder.add_document(np.array([1, 2, 3, 4]), [1, 3])
    builder.add_document(np.array([5, 6]), [2])
    builder.finalize(str(tmp_path / "t.idx"))
    file = TokenFile(tmp_path / "t")
    assert [file.document(n).tolist() for n in range(2)] == [[1, 2, 3, 4], [5, 6]]
    assert file.document_lengths().tolist() == [4, 2]
    assert [file.document_of(position) for position in range(6)] == [0, 0, 0, 0, 1, 1]


def test_reading_outside_is_an_error_not_another_file(prefix):
    file = TokenFile(prefix)
    for start, count in ((-1, 2), (10, 3), (13, 0)):
        with pytest.raises(IndexError):
            file.read(start, count)


def test_tokens_outlive_the_file(prefix):
    # megatron.core unmaps the file when its dataset is collected: a view would crash the process here.
    tokens = TokenFile(prefix).read(0, 12)
    assert tokens.tolist() == stream()


def problem(prefix: str, **kwargs) -> str:
    """The one line that opening `prefix` gives."""
    with pytest.raises(UserError) as caught:
        TokenFile(prefix, **kwargs)
    (line,) = caught.value.problems
    assert "\n" not in line and prefix in line
    return line


def patch(path: str, offset: int, data: bytes) -> None:
    with open(path, "r+b") as stream:
        stream.seek(offset)
        stream.write(data)


def truncate(path: str, size: int) -> None:
    with open(path, "r+b") as stream:
        stream.truncate(size)


def test_missing_files(prefix):
    assert "there is no tokens2.idx and no tokens2.bin" in problem(prefix + "2")
    assert f"give the prefix, {prefix}" in problem(prefix + ".bin")
    Path(prefix + ".bin").rename(prefix + ".away")
    assert "tokens.bin is missing" in problem(prefix)
    Path(prefix + ".away").rename(prefix + ".bin")
    TokenFile(prefix)
    Path(prefix + ".idx").unlink()
    assert "tokens.idx is missing" in problem(prefix)


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (0, "is empty"),
        (5, "truncated"),
        (20, "truncated"),
        (40, "has 40 bytes where its header says"),
        (-1, "header says"),
    ],
)
def test_truncated_index(prefix, size, words):
    path = Path(prefix + ".idx")
    truncate(str(path), size if size >= 0 else path.stat().st_size + size)
    assert words in problem(prefix)


def test_truncated_or_grown_tokens(prefix):
    truncate(prefix + ".bin", 23)
    assert "has 23 bytes where its index says 24" in problem(prefix)
    truncate(prefix + ".bin", 26)
    assert "has 26 bytes" in problem(prefix)
    truncate(prefix + ".bin", 0)
    assert "holds no tokens" in problem(prefix)


def test_foreign_headers(prefix):
    original = Path(prefix + ".idx").read_bytes()
    patch(prefix + ".idx", 0, b"\x93NUMPY\x01\x00\x76")
    assert "is not a Megatron index" in problem(prefix)
    Path(prefix + ".idx").write_bytes(original)
    patch(prefix + ".idx", 9, struct.pack("<Q", 2))
    assert "version 2" in problem(prefix)
    Path(prefix + ".idx").write_bytes(original)
    patch(prefix + ".idx", 17, struct.pack("<B", 6))  # float64
    assert "data type 6" in problem(prefix)
    Path(prefix + ".idx").write_bytes(original + b"\0" * len(DOCUMENTS))
    assert "multimodal" in problem(prefix)
    Path(prefix + ".idx").write_bytes(original)
    TokenFile(prefix)


def test_sequences_that_do_not_follow_one_another(prefix):
    offsets = HEADER_BYTES + 4 * len(DOCUMENTS)
    marks = offsets + 8 * len(DOCUMENTS)
    original = Path(prefix + ".idx").read_bytes()
    for place, value in (
        (offsets + 8 * 3, 2),
        (offsets, 2),
        (marks, 1),
        (marks + 8 * 2, 4),
        (marks + 8 * 5, 4),
    ):
        patch(prefix + ".idx", place, struct.pack("<q", value))
        line = problem(prefix)
        assert "are not consecutive" in line
        if place >= marks:
            assert "damaged" in line and "it is" not in line
        Path(prefix + ".idx").write_bytes(original)
    TokenFile(prefix)


@pytest.mark.parametrize(
    ("order", "kinds"),
    [
        ([1, 0, 2, 3, 4], "reordered (in a different order from the tokens)"),
        ([0, 2, 3, 4], "partial (omits tokens)"),
        ([2, 3, 4], "partial (omits tokens)"),
        ([0, 0, 1, 2, 3, 4], "repeating (has some tokens more than once)"),
        ([4, 2, 0], "reordered (in a different order from the tokens) and partial (omits tokens)"),
    ],
)
def test_an_index_of_another_kind_is_called_what_it_is(order, kinds, tmp_path):
    """Megatron reads any sequences that point into the tokens."""
    documents = [[5, 6, 7], [1], [2, 3], [9, 8, 7, 6], [4, 4, 4, 4, 4]]
    prefix = write(tmp_path / "t", documents)
    starts = np.cumsum([0, *map(len, documents)])
    data = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, len(order), len(order) + 1)
    data += np.array([len(documents[n]) for n in order], dtype="<i4").tobytes()
    data += np.array([2 * starts[n] for n in order], dtype="<i8").tobytes()
    Path(prefix + ".idx").write_bytes(data + np.arange(len(order) + 1, dtype="<i8").tobytes())
    theirs = IndexedDataset(prefix)
    assert [theirs[n].tolist() for n in range(len(order))] == [documents[n] for n in order]
    line = problem(prefix)
    assert f"are not consecutive: it is {kinds}, or damaged; such an index is not supported" in line


def test_an_index_that_leaves_out_the_end(tmp_path, prefix):
    whole = Path(prefix + ".bin").read_bytes()
    Path(prefix + ".bin").write_bytes(whole + whole)
    assert "has 48 bytes where its index says 24" in (line := problem(prefix)) and "partial index" in line


def test_dataset_without_tokens(tmp_path):
    assert "holds no tokens" in problem(write(tmp_path / "none", []))
    assert "holds no tokens" in problem(write(tmp_path / "blank", [[], []]))


def test_token_beyond_the_vocabulary_names_its_document(tmp_path, prefix):
    assert "document 4 holds token id 9, but the model's vocabulary has 9" in problem(prefix, vocab_size=9)
    TokenFile(prefix, vocab_size=10)
    TokenFile(prefix, vocab_size=151936)  # more than 16 bits
    negative = write(tmp_path / "negative", [[1], [2, -1]], np.int32)
    assert "document 1 holds token id -1" in problem(negative, vocab_size=10)


def test_token_beyond_the_scanned_part_is_found_when_read(prefix, monkeypatch):
    monkeypatch.setattr(indexed_dataset, "_SCANNED_BYTES", 6)
    dataset = PackedDataset(prefix, seq_length=4, shuffle=False, vocab_size=8)
    assert dataset.tokens(0).tolist() == [5, 6, 7, 1]
    with pytest.raises(UserError, match="document 4 holds token id 9"):
        dataset.tokens(1)


@pytest.mark.parametrize("group", [1 << 22, 4, 1])
def test_unigram_entropy(group, tmp_path, monkeypatch):
    monkeypatch.setattr(unigram_baseline, "_GROUP", group)
    train = TokenFile(write(tmp_path / "train", [[0, 0, 0, 1]]))
    valid = TokenFile(write(tmp_path / "valid", [[0, 1, 0, 0, 2, 2, 1]]))
    assert unigram_counts(train, 3).tolist() == [3, 1, 0]
    cost = -np.log(np.array([4, 2, 1]) / 7)  # add-one smoothing over three tokens
    pieces = np.array([cost[0] + cost[1], 2 * cost[0], 2 * cost[2]]) / 2  # the seventh token fills no sample
    estimate = unigram_entropy(train, valid, vocab_size=3, sample_length=2)
    assert estimate.mean == pytest.approx(pieces.mean(), abs=1e-12)
    assert estimate.standard_error == pytest.approx(pieces.std(ddof=1) / np.sqrt(3), abs=1e-12)
    with pytest.raises(UserError, match="do not fill one sample of 8"):
        unigram_entropy(train, valid, vocab_size=3, sample_length=8)


def test_unigram_entropy_of_uniform_tokens_is_log_vocabulary(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 50, size=200_000)
    train = TokenFile(write(tmp_path / "train", [tokens[:150_000].tolist()]))
    valid = TokenFile(write(tmp_path / "valid", [tokens[150_000:].tolist()]))
    estimate = unigram_entropy(train, valid, vocab_size=50, sample_length=100)
    assert estimate.mean == pytest.approx(np.log(50), abs=1e-3)
    assert estimate.standard_error < 1e-3


def test_a_scan_looks_at_every_token_in_pieces(prefix, monkeypatch):
    monkeypatch.setattr(indexed_dataset, "_CHUNK", 4)
    file = TokenFile(prefix)
    assert list(file.scan()) == [4, 4, 4] and list(file.scan(3, 9)) == [4, 2] and list(file.scan(9, 99)) == [3]
    for token, document in ((7, 0), (8, 4), (9, 4), (5, 0)):
        small = TokenFile(prefix, vocab_size=token, scan=False)
        first = next(place for place, value in enumerate(stream()) if value >= token)
        with pytest.raises(UserError, match=rf"document {document} holds token id {stream()[first]}, .* has {token};"):
            list(small.scan())
        assert sum(small.scan(0, first)) == first


def test_a_damaged_index_beyond_the_scanned_part_is_opened(tmp_path, monkeypatch):
    """Of an index of many sequences the first ones are looked at; the ends of both arrays always."""
    prefix = write(tmp_path / "many", [[1], [2, 3], [4], [5, 6], [7]])
    index = bytearray(Path(f"{prefix}.idx").read_bytes())
    struct.pack_into("<q", index, HEADER_BYTES + 5 * 4 + 3 * 8, 6)  # where the fourth sequence begins
    Path(f"{prefix}.idx").write_bytes(index)
    with pytest.raises(UserError, match="are not consecutive"):
        TokenFile(prefix)
    monkeypatch.setattr(indexed_dataset, "_SCANNED_SEQUENCES", 3)
    assert TokenFile(prefix).num_tokens == 7
    struct.pack_into("<q", index, HEADER_BYTES + 5 * 4 + 5 * 8 + 5 * 8, 4)  # the last mark
    Path(f"{prefix}.idx").write_bytes(index)
    with pytest.raises(UserError, match="are not consecutive"):
        TokenFile(prefix)
