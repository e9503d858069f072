"""Writer of token files: Megatron's .bin and .idx, with our description and checksums (data/checksums.py).

Memory does not grow with the number of documents. megatron.core, whose import alone takes seconds, is not used; a test
checks that the bytes are those that it would write.
"""

from __future__ import annotations

import glob
import os
import shutil
import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.encoders import token_dtype
from megatron_a2d.data.checksums import INDEX_CHECKSUM, TABLE_CHECKSUM, BlockHasher, file_checksum, write_metadata
from megatron_a2d.data.indexed_dataset import INTEGER_TYPES
from megatron_a2d.utils.atomic_write import new_file
from megatron_a2d.utils.errors import UserError

SUFFIXES = (".bin", ".sums", ".json", ".idx")  # in the order in which they appear: the index completes a token file
_DTYPE_CODES = {dtype: code for code, dtype in INTEGER_TYPES.items()}
_CHUNK = 1 << 20


class TokenWriter:
    """A token file that is being written, under temporary names."""

    def __init__(self, prefix: str, partial: dict[str, Path], vocab_size: int, description: dict[str, Any]):
        self.prefix, self.dtype = prefix, token_dtype(vocab_size)
        self._partial = partial
        self._description = {**description, "vocab_size": vocab_size}
        self.num_documents = self.num_tokens = 0
        self._largest: tuple[int, int] | None = None  # token id, document
        self._hasher = BlockHasher()
        self._lengths = partial[".idx"].with_name(partial[".idx"].name + ".lengths")
        self._files = {path: open(path, "wb") for path in (partial[".bin"], partial[".sums"], self._lengths)}  # noqa: SIM115

    def add(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents: `ids` of all of them, concatenated, in this file's dtype."""
        assert ids.dtype == self.dtype and len(ids) == lengths.sum()
        data = memoryview(ids).cast("B")  # type: ignore[arg-type]
        self._files[self._partial[".bin"]].write(data)
        self._files[self._partial[".sums"]].write(self._hasher.update(data))
        self._files[self._lengths].write(lengths.astype("<i4").tobytes())
        largest = int(ids.max(initial=0))
        if len(ids) and (self._largest is None or largest > self._largest[0]):
            offset = int((ids == largest).argmax())  # of booleans: ends at the first
            document = int(np.searchsorted(np.cumsum(lengths), offset, side="right"))
            self._largest = largest, self.num_documents + document
        self.num_documents += len(lengths)
        self.num_tokens += len(ids)

    def finish(self) -> None:
        self._files[self._partial[".sums"]].write(self._hasher.finish())
        self.close()
        self._write_index()
        largest, document = self._largest or (None, None)
        write_metadata(
            self._partial[".json"],
            {
                **self._description, "documents": self.num_documents, "tokens": self.num_tokens,
                "max_token_id": largest, "max_token_document": document,
                INDEX_CHECKSUM: file_checksum(self._partial[".idx"]),
                TABLE_CHECKSUM: file_checksum(self._partial[".sums"]),
            },
        )  # fmt: skip

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def discard(self) -> None:
        self.close()
        self._lengths.unlink(missing_ok=True)

    def _write_index(self) -> None:
        """Write the .idx: lengths, byte offsets and document boundaries, each document one sequence."""
        with open(self._partial[".idx"], "wb") as index, open(self._lengths, "rb") as lengths:
            header = (b"MMIDIDX\x00\x00", 1, _DTYPE_CODES[self.dtype], self.num_documents, self.num_documents + 1)
            index.write(struct.pack("<9sQBQQ", *header))
            shutil.copyfileobj(lengths, index)
            lengths.seek(0)
            offset = 0
            while data := lengths.read(4 * _CHUNK):
                ends = offset + np.cumsum(np.frombuffer(data, "<i4"), dtype=np.int64) * self.dtype.itemsize
                index.write(np.concatenate([[offset], ends[:-1]]).astype("<i8").tobytes())
                offset = int(ends[-1])
            for start in range(0, self.num_documents + 1, _CHUNK):
                index.write(np.arange(start, min(start + _CHUNK, self.num_documents + 1), dtype="<i8").tobytes())


def check_free(prefixes: Sequence[str]) -> None:
    """UserError if one of the files to write exists."""
    taken = [prefix + suffix for prefix in prefixes for suffix in SUFFIXES if os.path.exists(prefix + suffix)]
    if taken:
        raise UserError(f"--output-prefix: {taken[0]} already exists; remove it or choose another prefix")


@contextmanager
def open_writers(prefixes: Sequence[str], vocab_size: int, description: dict[str, Any]) -> Iterator[list[TokenWriter]]:
    """Writers whose files get their final names together, when the block ends without an error."""
    check_free(prefixes)
    for prefix in prefixes:  # leftovers of a killed process, as large as the corpus
        directory, name = os.path.split(prefix)
        for suffix in SUFFIXES:
            for leftover in glob.glob(os.path.join(glob.escape(directory), f".{glob.escape(name + suffix)}.partial-*")):
                os.unlink(leftover)
    with ExitStack() as stack:
        writers = []
        for prefix in prefixes:
            # The stack exits, and so renames, in reverse order.
            partial = {suffix: stack.enter_context(new_file(prefix + suffix)) for suffix in reversed(SUFFIXES)}
            writers.append(TokenWriter(prefix, partial, vocab_size, description))
            stack.callback(writers[-1].discard)
        yield writers
        for writer in writers:
            writer.finish()
