"""Small token files in Megatron's format, with and without the checksums that tokenize_corpus writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_a2d.data import checksums

DOCUMENTS = [[5, 6, 7], [], [1], [2, 3], [9, 8, 7, 6, 5, 4]]


def write(prefix: Path, documents: list[list[int]], dtype: type = np.uint16) -> str:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        builder.add_document(np.array(document, dtype=np.int64), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    return write(tmp_path / "tokens", DOCUMENTS)


def stream() -> list[int]:
    return [token for document in DOCUMENTS for token in document]


def with_checksums(prefix: str, **description) -> str:
    """A description and a checksum table next to a token file, as tokenize_corpus writes them."""
    hasher, data = checksums.BlockHasher(), Path(f"{prefix}.bin").read_bytes()
    Path(f"{prefix}.sums").write_bytes(hasher.update(memoryview(data)) + hasher.finish())
    values = {
        checksums.INDEX_CHECKSUM: checksums.file_checksum(Path(f"{prefix}.idx")),
        checksums.TABLE_CHECKSUM: checksums.file_checksum(Path(f"{prefix}.sums")),
        **description,
    }
    checksums.write_metadata(Path(f"{prefix}.json"), values)
    return prefix
