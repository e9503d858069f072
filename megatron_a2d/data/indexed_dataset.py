"""Token files: `PREFIX.bin` (the tokens) and `PREFIX.idx` (lengths and documents), Megatron's indexed format.

megatron.core's IndexedDataset reads and writes the same bytes. This reader validates first: on a damaged file theirs
fails with a bare assertion, or not at all. Layout of the index, little endian:

    9 bytes magic, u64 version 1, u8 dtype code, u64 S sequences, u64 D document marks,
    i32[S] lengths in tokens, i64[S] byte offsets, i64[D] document marks (0, ..., S)
"""

from __future__ import annotations

import bisect
import os
import struct
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_a2d.data.checksums import BLOCK, INDEX_CHECKSUM, REWRITE, checksum, open_checksums, read_at, read_metadata
from megatron_a2d.utils.atomic_write import regular
from megatron_a2d.utils.errors import UserError

__all__ = ["INTEGER_TYPES", "TokenFile", "read_metadata"]

# The dtype code in an index -> the integers that it stands for: megatron.core's DType, whose import takes seconds.
INTEGER_TYPES = {
    code: np.dtype(name)
    for code, name in {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}.items()
}
_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\x00\x00"
_CHUNK = 1 << 24  # items processed at a time: bounds memory, large enough for full speed
# Opening a file takes bounded time: at most this many bytes of tokens and sequences of the index are checked when the
# file is opened (all of an ordinary corpus), the rest when it is read.
_SCANNED_BYTES = 1 << 30
_SCANNED_SEQUENCES = 1 << 24


class TokenFile:
    """A contiguous stream of tokens with document boundaries.

    `vocab_size`, if given, is the size of the model's embedding: a token id outside it is a UserError
    that names the document. Every read is verified against the file's checksums, if it has any, and against size,
    time and identity of the files when they were opened: a changed file is a UserError, not different tokens.
    Tokens are read, not memory-mapped: truncation of a mapped file by another process would kill the reader.
    """

    def __init__(
        self,
        prefix: str | Path,
        vocab_size: int | None = None,
        scan: bool = True,
        mask_token_id: int | None = None,
        eod_token_id: int | None = None,
    ):
        """`scan`: check the first GiB of the file for damage and invalid tokens now; reads check them in any case.

        mask_token_id: a token that must not occur either. eod_token_id: the end-of-document token of a file without a
        description, written by another tool.
        """
        self.prefix = str(prefix)
        self.vocab_size, self.mask_token_id = vocab_size, mask_token_id
        self._eod_token_id = eod_token_id
        self._state = {path: _file_state(path) for path in (f"{self.prefix}.bin", f"{self.prefix}.idx")}
        index = _open_index(self.prefix)
        self.dtype = index.dtype
        self._offsets, self._marks = index.offsets, index.marks
        self.num_tokens = Path(f"{self.prefix}.bin").stat().st_size // self.dtype.itemsize
        self.metadata = read_metadata(self.prefix) or {}
        self._checksums = open_checksums(self.prefix, self.metadata, whole=scan)
        self._descriptor = regular(f"{self.prefix}.bin", os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)
        if vocab_size is not None:
            self._check_largest_id()
            if scan:
                for _ in self.scan(0, _SCANNED_BYTES // self.dtype.itemsize):
                    pass

    @property
    def num_documents(self) -> int:
        return len(self._marks) - 1

    @property
    def has_checksums(self) -> bool:
        """Whether every read detects damaged tokens."""
        return self._checksums is not None

    @property
    def eod_token_id(self) -> int | None:
        """The end-of-document token in the file's description, or None."""
        return self.metadata.get("eod_token_id") if self.is_described else self._eod_token_id

    @property
    def is_described(self) -> bool:
        """Whether the description has the end-of-document token; the index then has every document."""
        return "eod_token_id" in self.metadata

    @property
    def may_hold_mask(self) -> bool:
        """Whether only a scan of the tokens can rule out the mask token."""
        largest = self.metadata.get("max_token_id")
        return self.mask_token_id is not None and not (isinstance(largest, int) and largest < self.mask_token_id)

    @property
    def needs_scan(self) -> bool:
        """Whether a scan of all tokens can find problems that description and checksums do not exclude."""
        return self.may_hold_mask or not self.has_checksums

    def fingerprint(self) -> str:
        """Fingerprint of the tokens and their order, 16 hexadecimal digits."""
        if self._checksums is not None:
            known = f"{self.num_tokens} {self._checksums.digest} {self.metadata.get(INDEX_CHECKSUM)}"
            return checksum(known.encode())

        # Without checksums: a hash of samples spread over tokens, sequences and documents.
        def spread(count: int) -> list[tuple[int, int]]:
            starts = np.linspace(0, max(0, count - 1024), 64).astype(int).tolist()
            return [(start, min(1024, count - start)) for start in starts]

        pieces = [self.read(start, count).tobytes() for start, count in spread(self.num_tokens)]
        for array in (self._offsets, self._marks):
            pieces += [array[start : start + count].tobytes() for start, count in spread(len(array))]
        return checksum(f"{self.num_tokens} {self.num_documents}".encode() + b"".join(pieces))

    def document_lengths(self) -> np.ndarray:
        """Tokens of each document, end-of-document token included, [num_documents] int64."""
        ends = np.append(self._offsets, self.num_tokens * self.dtype.itemsize)
        return np.diff(ends[self._marks]) // self.dtype.itemsize

    def document_of(self, position: int) -> int:
        """Number of the document with the token at `position` of the stream."""
        return int(self.document_numbers(position, 1)[0])

    def document_numbers(self, start: int, count: int) -> np.ndarray:
        """Document number of each token start .. start + count - 1, [count] int64."""
        self._check_unchanged(f"{self.prefix}.idx")
        # Not numpy's searchsorted: the arrays of an index are unaligned, so it would copy them entirely.
        first = bisect.bisect_right(self._offsets, start * self.dtype.itemsize) - 1
        last = bisect.bisect_right(self._offsets, (start + count - 1) * self.dtype.itemsize) - 1
        borders = [0, *(self._offsets[first + 1 : last + 1] // self.dtype.itemsize - start).tolist(), count]
        documents = [bisect.bisect_right(self._marks, sequence) - 1 for sequence in range(first, last + 1)]
        return np.repeat(np.array(documents, dtype=np.int64), np.diff(borders))

    def segments(self, start: int, count: int) -> np.ndarray:
        """[count] int64, a different number in each document. In a file of another tool, whose index may have one entry
        for many documents, an end-of-document token also ends a document, as in Megatron."""
        numbers = self.document_numbers(start, count)
        if self.is_described or self._eod_token_id is None:
            return numbers
        ends = self._copy(start, count) == self._eod_token_id
        return numbers + np.cumsum(ends) - ends

    def ends_documents(self) -> bool:
        """Whether there is an end-of-document token in the part that is scanned when the file is opened."""
        stop = min(self.num_tokens, _SCANNED_BYTES // self.dtype.itemsize)
        pieces = (self._copy(start, min(_CHUNK, stop - start)) for start in range(0, stop, _CHUNK))
        return self.eod_token_id is not None and any((piece == self.eod_token_id).any() for piece in pieces)

    def document(self, number: int) -> np.ndarray:
        """The tokens of a document, [n] int64."""
        start, stop = (self._position(int(mark)) for mark in self._marks[number : number + 2])
        return self.read(start, stop - start)

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens start .. start + count - 1 of the stream, [count] int64, checked against the vocabulary."""
        tokens = self._copy(start, count).astype(np.int64)
        if self.vocab_size is not None:
            self._check_ids(tokens, start)
        return tokens

    def chunks(self, chunk_size: int = _CHUNK) -> Iterator[np.ndarray]:
        """The entire stream in order, in chunks of at most `chunk_size` tokens, int64."""
        for start in range(0, self.num_tokens, chunk_size):
            yield self.read(start, min(chunk_size, self.num_tokens - start))

    def scan(self, start: int = 0, stop: int | None = None) -> Iterator[int]:
        """Check the tokens from `start` to `stop` (default: the end); yields the number of tokens of each chunk."""
        stop = self.num_tokens if stop is None else min(stop, self.num_tokens)
        for begin in range(start, stop, _CHUNK):
            count = min(_CHUNK, stop - begin)
            tokens = self._copy(begin, count)
            if self.vocab_size is not None:
                self._check_ids(tokens, begin)
            yield count

    def _position(self, sequence: int) -> int:
        """Start of a sequence in the stream; for one past the last sequence, the stream's end."""
        if sequence == len(self._offsets):
            return self.num_tokens
        return int(self._offsets[sequence]) // self.dtype.itemsize

    def _copy(self, start: int, count: int) -> np.ndarray:
        if not 0 <= start <= start + count <= self.num_tokens:
            raise IndexError(f"tokens {start}..{start + count - 1} are outside {self.prefix}'s {self.num_tokens}")
        path = f"{self.prefix}.bin"
        self._check_unchanged(path)
        begin, size = start * self.dtype.itemsize, count * self.dtype.itemsize
        if self._checksums is None:
            data = read_at(self._descriptor, begin, size)
        else:
            # Complete blocks, so that each can be verified.
            first, last = begin // BLOCK, -(-(begin + size) // BLOCK)
            blocks = read_at(self._descriptor, first * BLOCK, (last - first) * BLOCK)
            damaged = self._checksums.first_difference(blocks, first)
            if damaged is not None:
                document = self.document_of(min(damaged * BLOCK // self.dtype.itemsize, self.num_tokens - 1))
                raise UserError(
                    f"{path}: checksum mismatch from byte {damaged * BLOCK} on (document {document}), the "
                    f"file is damaged; copy it again, or {REWRITE}"
                )
            data = blocks[begin - first * BLOCK :][:size]
        if len(data) != size:
            raise UserError(f"{path}: was truncated while it was read; copy it again, or {REWRITE}")
        return np.frombuffer(data, dtype=self.dtype)

    def _check_unchanged(self, path: str) -> None:
        if _file_state(path) != self._state[path]:
            raise UserError(
                f"{path}: has changed since it was opened; a run needs the tokens that it started with: restore the "
                "file, or start another run"
            )

    def _check_largest_id(self) -> None:
        """Check the largest id, which is in the description, so that no scan is needed."""
        largest = self.metadata.get("max_token_id")
        if isinstance(largest, int) and self.vocab_size is not None and largest >= self.vocab_size:
            raise UserError(_outside(self.prefix, self.metadata.get("max_token_document"), largest, self.vocab_size))

    def _check_ids(self, tokens: np.ndarray, position: int) -> None:
        unsigned = tokens.view(f"u{tokens.itemsize}")  # a negative id becomes a huge one: one comparison covers both
        assert self.vocab_size is not None
        if unsigned.max(initial=0) >= self.vocab_size:
            first = int(np.argmax(unsigned >= self.vocab_size))
            document = self.document_of(position + first)
            raise UserError(_outside(self.prefix, document, int(tokens[first]), self.vocab_size))
        if self.may_hold_mask and (masks := tokens == self.mask_token_id).any():
            raise UserError(
                f"{self.prefix}: document {self.document_of(position + int(masks.argmax()))} contains the mask token "
                f"{self.mask_token_id}, which is not allowed; remove it from the text and tokenise again, or convert "
                "with another --mask-token-id"
            )


def _outside(prefix: str, document: Any, token: int, vocab_size: int) -> str:
    return (
        f"{prefix}: document {document} holds token id {token}, but the model's vocabulary has {vocab_size}; tokenise "
        "with the model's own tokenizer"
    )


def _file_state(path: str) -> tuple[int, ...] | None:
    """Size, time and identity of a file, which change when it is written or replaced; None if it does not exist."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ino


class _Index(NamedTuple):
    dtype: np.dtype
    lengths: np.ndarray  # [S] int32, tokens of each sequence
    offsets: np.ndarray  # [S] int64, byte offset of each sequence
    marks: np.ndarray  # [D] int64, the first sequence of each document, and S


def _open_index(prefix: str) -> _Index:
    """The arrays of `PREFIX.idx`, memory-mapped and checked against `PREFIX.bin`."""
    index_path, tokens_path = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    _check_pair(prefix, index_path, tokens_path)
    dtype, num_sequences, num_marks = _read_header(index_path)
    if num_sequences == 0 or num_marks < 2 or tokens_path.stat().st_size == 0:
        raise UserError(f"{prefix}: holds no tokens; {REWRITE} from documents that have text")
    data = np.memmap(index_path, mode="r", dtype=np.uint8)[_HEADER.size :]
    lengths, offsets, marks = np.split(data, [4 * num_sequences, 12 * num_sequences])
    index = _Index(dtype, lengths.view("<i4"), offsets.view("<i8"), marks.view("<i8"))

    itemsize = dtype.itemsize
    few_lengths, few_offsets = index.lengths[:_SCANNED_SEQUENCES], index.offsets[:_SCANNED_SEQUENCES]
    ends = np.cumsum(few_lengths, dtype=np.int64) * itemsize
    contiguous = np.all(few_lengths >= 0) and few_offsets[0] == 0 and np.array_equal(few_offsets[1:], ends[:-1])
    few_marks = index.marks[:_SCANNED_SEQUENCES]
    in_order = index.marks[0] == 0 and index.marks[-1] == num_sequences and np.all(np.diff(few_marks) >= 0)
    expected, size = int(index.offsets[-1]) + int(index.lengths[-1]) * itemsize, tokens_path.stat().st_size
    if not in_order:
        raise UserError(f"{index_path}: its documents are not consecutive, the file is damaged; {REWRITE}")
    if not contiguous:
        raise UserError(f"{index_path}: its sequences are not consecutive: {_what_else(index, size)}")
    if size != expected:
        raise UserError(
            f"{tokens_path}: has {size} bytes where its index says {expected}; copy both files again, or {REWRITE}"
            + ("; or it is a partial index, which is not supported" if size > expected else "")
        )
    return index


def _what_else(index: _Index, size: int) -> str:
    """Describe an index whose sequences are not consecutive: Megatron accepts any that point into the tokens."""
    begins, counts = index.offsets.astype(np.int64), index.lengths.astype(np.int64)
    ends = begins + counts * index.dtype.itemsize
    outside = (counts < 0) | (begins < 0) | (begins > size) | (ends > size)
    if outside.any() or (begins % index.dtype.itemsize).any():
        return f"the file is damaged; {REWRITE}"
    order = np.lexsort((ends, begins))
    reached = np.maximum.accumulate(np.append(0, ends[order]))
    gaps, overlaps = begins[order] > reached[:-1], begins[order] < reached[:-1]
    kinds = {
        "reordered (in a different order from the tokens)": (np.diff(begins) < 0).any(),
        "partial (omits tokens)": gaps.any() or reached[-1] < size,
        "repeating (has some tokens more than once)": (overlaps & (counts[order] > 0)).any(),
    }
    found = " and ".join(kind for kind, is_so in kinds.items() if is_so)
    return (
        f"it is {found or 'irregular'}, or damaged; such an index is not supported: write the sequences in its order "
        "to a new file with megatron.core's IndexedDatasetBuilder"
    )


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
        raise UserError(f"{prefix}: {missing.name} is missing next to {present[0].name}; copy it too, or {REWRITE}")


def _read_header(index_path: Path) -> tuple[np.dtype, int, int]:
    """Dtype, number of sequences, number of document entries."""
    size = index_path.stat().st_size
    with open(index_path, "rb", opener=regular) as stream:
        header = stream.read(_HEADER.size)
    if not header:
        raise UserError(f"{index_path}: is empty; {REWRITE}")
    if not header.startswith(_MAGIC[: len(header)]):
        raise UserError(f"{index_path}: is not a Megatron index (it starts with {header[:9]!r}); {REWRITE}")
    if len(header) < _HEADER.size:
        raise UserError(f"{index_path}: is truncated at {size} bytes; copy it again, or {REWRITE}")
    _, version, code, num_sequences, num_marks = _HEADER.unpack(header)
    if version != 1 or code not in INTEGER_TYPES:
        raise UserError(f"{index_path}: version {version} with data type {code} is unknown; {REWRITE}")
    expected = _HEADER.size + 12 * num_sequences + 8 * num_marks
    if size == expected + num_sequences and num_sequences:
        raise UserError(f"{index_path}: is a multimodal index, but only text is supported; {REWRITE}")
    if size != expected:
        raise UserError(f"{index_path}: has {size} bytes where its header says {expected}; copy it again, or {REWRITE}")
    return INTEGER_TYPES[code], num_sequences, num_marks
