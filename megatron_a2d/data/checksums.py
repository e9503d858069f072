"""Description (`PREFIX.json`) and checksums (`PREFIX.sums`) of a token file.

Megatron's format has no checksums. `data_prep.tokenize_corpus` writes one of 64 bits (XXH3) for every 16 KiB of
`PREFIX.bin`, and stores those of the index and of the table itself in the description, which has its own checksum.
A read verifies the blocks that it touches, at several GB/s, so that no scan is needed before a run and any flipped bit
is detected. Files without a description are read without verification.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megatron_a2d.utils.atomic_write import read_json, regular, write_json
from megatron_a2d.utils.errors import UserError

BLOCK = 1 << 14
REWRITE = "write it again with data_prep.tokenize_corpus"
INDEX_CHECKSUM, TABLE_CHECKSUM, OWN_CHECKSUM = "index_checksum", "sums_checksum", "checksum"
_NUMBERS = ("vocab_size", "documents", "tokens", "max_token_id", "max_token_document", "eod_token_id")


def checksum(data: bytes) -> str:
    """XXH3 of 64 bits, 16 hexadecimal digits."""
    return xxhash.xxh3_64_hexdigest(data)


def read_at(descriptor: int, offset: int, size: int) -> bytes:
    """Up to `size` bytes; fewer only at the end of the file."""
    data = os.pread(descriptor, size, offset)
    while len(data) < size and (more := os.pread(descriptor, size - len(data), offset + len(data))):
        data += more  # a single call reads at most 2 GiB
    return data


@dataclass(frozen=True)
class Checksums:
    """Checksum table of a token file."""

    blocks: np.ndarray  # [number of blocks] uint64, memory-mapped
    digest: str  # checksum of the table itself

    def first_difference(self, data: bytes, first_block: int) -> int | None:
        """Number of the first damaged block of `data`, which starts at block `first_block`; None if it is intact."""
        view = memoryview(data)
        for number, start in enumerate(range(0, len(data), BLOCK), start=first_block):
            if (
                number >= len(self.blocks)
                or xxhash.xxh3_64_intdigest(view[start : start + BLOCK]) != self.blocks[number]
            ):
                return number
        return None


def open_checksums(prefix: str, metadata: dict[str, Any], whole: bool) -> Checksums | None:
    """The checksum table, or None if the description has none. `whole`: also verify the checksums of table and index,
    and compare the lengths with the description."""
    digest = metadata.get(TABLE_CHECKSUM)
    if digest is None:
        return None
    table, tokens, index = Path(f"{prefix}.sums"), Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    if not table.is_file():
        raise UserError(f"{prefix}: {table.name} is missing next to {tokens.name}; copy it too, or {REWRITE}")
    expected = 8 * -(-tokens.stat().st_size // BLOCK)
    if table.stat().st_size != expected:
        raise UserError(
            f"{table}: has {table.stat().st_size} bytes where {tokens.name} needs {expected}; copy both again, "
            f"or {REWRITE}"
        )
    if whole:
        for path, known in ((table, digest), (index, metadata.get(INDEX_CHECKSUM))):
            if file_checksum(path) != known:
                raise UserError(
                    f"{path}: does not match its checksum in {prefix}.json, it is damaged; copy it again, or {REWRITE}"
                )
    return Checksums(np.memmap(table, mode="r", dtype="<u8"), str(digest))


def file_checksum(path: Path) -> str:
    digest = xxhash.xxh3_64()
    with open(path, "rb", opener=regular) as stream:
        while data := stream.read(1 << 22):
            digest.update(data)
    return digest.hexdigest()


class BlockHasher:
    """Computes the checksum table of a token file while it is written."""

    def __init__(self) -> None:
        self._open, self._filled = xxhash.xxh3_64(), 0  # the current, partial block

    def update(self, data: memoryview) -> bytes:
        """Add `data`; returns the entries of the blocks that it completes."""
        sums = []
        start = min(BLOCK - self._filled, len(data)) if self._filled else 0
        if self._filled:
            self._open.update(data[:start])
            self._filled += start
            if self._filled < BLOCK:
                return b""
            sums.append(self._open.intdigest())
        whole = len(data) - (len(data) - start) % BLOCK
        sums += [xxhash.xxh3_64_intdigest(data[at : at + BLOCK]) for at in range(start, whole, BLOCK)]
        self._open, self._filled = xxhash.xxh3_64(data[whole:]), len(data) - whole
        return np.array(sums, dtype="<u8").tobytes()

    def finish(self) -> bytes:
        """The entry of the last, partial block."""
        return np.array([self._open.intdigest()] if self._filled else [], dtype="<u8").tobytes()


def write_metadata(path: Path, values: dict[str, Any]) -> None:
    """Write a description together with its checksum."""
    write_json(path, {**values, OWN_CHECKSUM: _own_checksum(values)})


def read_metadata(prefix: str | Path) -> dict[str, Any] | None:
    """The description of a token file (`PREFIX.json`, from `data_prep.tokenize_corpus`); None if there is none.

    Keys: tokenizer, vocab_size (of the tokenizer), eod_token_id (or None), documents, tokens,
    max_token_id and max_token_document, and the checksums.
    """
    path = Path(f"{prefix}.json")
    if not path.exists():
        return None
    values = read_json(path, "the tokens' description")
    wrong = [name for name in _NUMBERS if not isinstance(values.get(name), int | None)]
    stamped = OWN_CHECKSUM in values or TABLE_CHECKSUM in values
    if wrong or (stamped and values.pop(OWN_CHECKSUM, None) != _own_checksum(values)):
        raise UserError(f"{path}: the description of the tokens was changed or is damaged; copy it again, or {REWRITE}")
    return values


def _own_checksum(values: dict[str, Any]) -> str:
    return checksum(json.dumps(values, sort_keys=True).encode())
