"""Token files: `PREFIX.bin` (the tokens) and `PREFIX.idx` (lengths and documents), Megatron's indexed format.

megatron.core's own IndexedDataset reads them, after checks of ours: a damaged file makes it fail with a bare
assertion, or not at all. Layout of the index, little endian:

    9 bytes magic, u64 version 1, u8 dtype code, u64 S sequences, u64 D document marks,
    i32[S] lengths in tokens, i64[S] byte offsets, i64[D] document marks (0, ..., S)
"""

from __future__ import annotations

import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_a2d.errors import UserError
from megatron_a2d.files import read_json

with warnings.catch_warnings():
    # Importing megatron.core without Transformer Engine warns once a module; the data needs neither.
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

__all__ = ["DType", "IndexedDatasetBuilder", "TokenFile", "read_metadata"]

_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\x00\x00"
_CHUNK = 1 << 24  # items looked at in one go: bounds memory, large enough for full speed
# Opening a file takes bounded time: so many bytes of tokens and so many sequences of the index are checked
# at once, all of an ordinary corpus. What lies beyond is checked when it is read.
_SCANNED_BYTES = 1 << 30
_SCANNED_SEQUENCES = 1 << 24
_REWRITE = "write it again with data_prep.tokenize_corpus"


class TokenFile:
    """One contiguous stream of tokens, with the documents' boundaries.

    `vocab_size`, where given, is the number of rows of the model's embedding: a token outside is a UserError
    that names the document.
    """

    def __init__(self, prefix: str | Path, vocab_size: int | None = None, scan: bool = True):
        """`scan` looks for such tokens at once, in the file's first GiB; they are found when read in any case."""
        self.prefix = str(prefix)
        self.vocab_size = vocab_size
        index = _open_index(self.prefix)
        self.dtype = index.dtype
        self._offsets, self._marks = index.offsets, index.marks
        self.num_tokens = Path(f"{self.prefix}.bin").stat().st_size // self.dtype.itemsize
        # It unmaps the files when it is collected, and its arrays then point nowhere: everything is copied.
        self._dataset = IndexedDataset(self.prefix)
        if vocab_size is not None and scan:
            scanned = min(self.num_tokens, _SCANNED_BYTES // self.dtype.itemsize)
            for start in range(0, scanned, _CHUNK):
                self._check_ids(self._copy(start, min(_CHUNK, scanned - start), self.dtype), start)

    @property
    def num_documents(self) -> int:
        return len(self._marks) - 1

    def document_lengths(self) -> np.ndarray:
        """Tokens of each document, end-of-document token included, [num_documents] int64."""
        ends = np.append(self._offsets, self.num_tokens * self.dtype.itemsize)
        return np.diff(ends[self._marks]) // self.dtype.itemsize

    def document_of(self, position: int) -> int:
        """The number of the document that holds the token at `position` of the stream."""
        return int(self.document_numbers(position, 1)[0])

    def document_numbers(self, start: int, count: int) -> np.ndarray:
        """The number of the document of each token start .. start + count - 1, [count] int64."""
        bytes_before = np.arange(start, start + count, dtype=np.int64) * self.dtype.itemsize
        sequences = np.searchsorted(self._offsets, bytes_before, side="right") - 1
        return np.searchsorted(self._marks, sequences, side="right") - 1

    def document(self, number: int) -> np.ndarray:
        """The tokens of a document, [n] int64."""
        start, stop = (self._position(int(mark)) for mark in self._marks[number : number + 2])
        return self.read(start, stop - start)

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens start .. start + count - 1 of the stream, [count] int64, checked against the vocabulary."""
        tokens = self._copy(start, count, np.dtype(np.int64))
        if self.vocab_size is not None:
            self._check_ids(tokens, start)
        return tokens

    def chunks(self, chunk_size: int = _CHUNK) -> Iterator[np.ndarray]:
        """The whole stream in order, in pieces of at most `chunk_size` tokens, int64."""
        for start in range(0, self.num_tokens, chunk_size):
            yield self.read(start, min(chunk_size, self.num_tokens - start))

    def _position(self, sequence: int) -> int:
        """Where a sequence begins in the stream; one past the last sequence: where the stream ends."""
        if sequence == len(self._offsets):
            return self.num_tokens
        return int(self._offsets[sequence]) // self.dtype.itemsize

    def _copy(self, start: int, count: int, dtype: np.dtype) -> np.ndarray:
        if not 0 <= start <= start + count <= self.num_tokens:
            raise IndexError(f"tokens {start}..{start + count - 1} are outside {self.prefix}'s {self.num_tokens}")
        # Sequences are contiguous, so the first one's offsets reach everything.
        return self._dataset.get(0, offset=start, length=count).astype(dtype)

    def _check_ids(self, tokens: np.ndarray, position: int) -> None:
        unsigned = tokens.view(f"u{tokens.itemsize}")  # a negative id becomes a huge one: one comparison for both
        assert self.vocab_size is not None
        if unsigned.max(initial=0) < self.vocab_size:
            return
        first = int(np.argmax(unsigned >= self.vocab_size))
        document = self.document_of(position + first)
        raise UserError(
            f"{self.prefix}: document {document} holds token id {int(tokens[first])}, but the model's "
            f"vocabulary has {self.vocab_size}; tokenise with the model's own tokenizer"
        )


class _Index(NamedTuple):
    dtype: np.dtype
    lengths: np.ndarray  # [S] int32, tokens of each sequence
    offsets: np.ndarray  # [S] int64, byte offset of each sequence
    marks: np.ndarray  # [D] int64, the sequence with which each document begins, and S


def _open_index(prefix: str) -> _Index:
    """The arrays of `PREFIX.idx`, memory-mapped and checked against `PREFIX.bin`."""
    index_path, tokens_path = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    _check_pair(prefix, index_path, tokens_path)
    dtype, num_sequences, num_marks = _read_header(index_path)
    if num_sequences == 0 or num_marks < 2 or tokens_path.stat().st_size == 0:
        raise UserError(f"{prefix}: holds no tokens; {_REWRITE} from documents that have text")
    data = np.memmap(index_path, mode="r", dtype=np.uint8)[_HEADER.size :]
    lengths, offsets, marks = np.split(data, [4 * num_sequences, 12 * num_sequences])
    index = _Index(dtype, lengths.view("<i4"), offsets.view("<i8"), marks.view("<i8"))

    itemsize = dtype.itemsize
    few_lengths, few_offsets = index.lengths[:_SCANNED_SEQUENCES], index.offsets[:_SCANNED_SEQUENCES]
    ends = np.cumsum(few_lengths, dtype=np.int64) * itemsize
    contiguous = np.all(few_lengths >= 0) and few_offsets[0] == 0 and np.array_equal(few_offsets[1:], ends[:-1])
    few_marks = index.marks[:_SCANNED_SEQUENCES]
    in_order = index.marks[0] == 0 and index.marks[-1] == num_sequences and np.all(np.diff(few_marks) >= 0)
    if not (contiguous and in_order):
        raise UserError(f"{index_path}: its sequences do not follow one another, the file is damaged; {_REWRITE}")
    expected, size = int(index.offsets[-1]) + int(index.lengths[-1]) * itemsize, tokens_path.stat().st_size
    if size != expected:
        raise UserError(
            f"{tokens_path}: has {size} bytes where its index promises {expected}; copy both files again, or {_REWRITE}"
        )
    return index


def _check_pair(prefix: str, index_path: Path, tokens_path: Path) -> None:
    present = [path for path in (index_path, tokens_path) if path.is_file()]
    if not present:
        if prefix.endswith((".bin", ".idx")):
            hint = f"give the prefix, {prefix[:-4]}"
        else:
            hint = "check the path, a prefix without .bin and .idx"
        raise UserError(f"{prefix}: there is no {index_path.name} and no {tokens_path.name}; {hint}")
    if len(present) == 1:
        missing = tokens_path if present == [index_path] else index_path
        raise UserError(f"{prefix}: {missing.name} is missing beside {present[0].name}; copy it too, or {_REWRITE}")


def _read_header(index_path: Path) -> tuple[np.dtype, int, int]:
    """Data type, number of sequences, number of document marks."""
    size = index_path.stat().st_size
    with open(index_path, "rb") as stream:
        header = stream.read(_HEADER.size)
    if not header:
        raise UserError(f"{index_path}: is empty; {_REWRITE}")
    if not header.startswith(_MAGIC[: len(header)]):
        raise UserError(f"{index_path}: is no Megatron index (it begins with {header[:9]!r}); {_REWRITE}")
    if len(header) < _HEADER.size:
        raise UserError(f"{index_path}: is cut short at {size} bytes; copy it again, or {_REWRITE}")
    _, version, code, num_sequences, num_marks = _HEADER.unpack(header)
    if version != 1 or code not in {dtype.value for dtype in DType if "int" in dtype.name}:
        raise UserError(f"{index_path}: version {version} with data type {code} is unknown; {_REWRITE}")
    expected = _HEADER.size + 12 * num_sequences + 8 * num_marks
    if size == expected + num_sequences and num_sequences:
        raise UserError(f"{index_path}: is a multimodal index, and only text is supported; {_REWRITE}")
    if size != expected:
        raise UserError(
            f"{index_path}: has {size} bytes where its header says {expected}; copy it again, or {_REWRITE}"
        )
    return np.dtype(DType.dtype_from_code(code)), num_sequences, num_marks


def read_metadata(prefix: str | Path) -> dict[str, Any] | None:
    """What `data_prep.tokenize_corpus` wrote beside the tokens (`PREFIX.json`), None where there is nothing.

    Keys: tokenizer, vocab_size (ids that the tokenizer can give), eod_token_id (or None), documents, tokens.
    """
    path = Path(f"{prefix}.json")
    return read_json(path, "the tokens' description") if path.exists() else None
