"""A corpus as a file of every kind that data_prep reads, and its tokens.

A test file binds the fixture as its own (`tokenizer = corpus_kinds.tokenizer`).
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from data_prep import tokenize_corpus, train_tokenizer
from megatron_a2d.utils.errors import UserError

TEXTS = [f"def f{n}(x):\n    return {n} + x  # ünï {'ab ' * (n % 40)}\n" for n in range(300)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("tokenizer")
    corpus = write_jsonl(root / "c.jsonl", TEXTS)
    train_tokenizer.main(["--input", str(corpus), "--vocab-size", "310", "--out", str(root / "t")])
    return root / "t"


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text, "n": n}) + "\n" for n, text in enumerate(texts)))
    return path


def run(tokenizer: Path, prefix: Path, *arguments: object) -> Path:
    words = ["--tokenizer", tokenizer, "--output-prefix", prefix, "--valid-fraction", 0, *arguments]
    if "--workers" not in words:
        words += ["--workers", 1]
    tokenize_corpus.main([str(word) for word in words])
    return prefix


def problem(*arguments: object) -> str:
    with pytest.raises(UserError) as caught:
        run(*arguments)
    (line,) = caught.value.problems
    assert "\n" not in line
    return line


def contents(prefix: Path) -> dict[str, bytes]:
    return {end: Path(f"{prefix}{end}").read_bytes() for end in (".bin", ".idx", ".json", ".sums")}


def write_kind(root: Path, kind: str, texts: list[str]) -> Path:
    """`texts` as a file, or a directory of them, of a kind."""
    path = root / f"docs{kind}"
    plain = write_jsonl(root / "plain", texts).read_bytes()
    (root / "plain").unlink()
    if kind == ".jsonl":
        path.write_bytes(plain)
    elif kind == ".jsonl.gz":
        path.write_bytes(gzip.compress(plain[:5000]) + gzip.compress(plain[5000:]))  # two members
    elif kind == ".jsonl.zst":
        zstandard = pytest.importorskip("zstandard")
        frames = [zstandard.ZstdCompressor().compress(part) for part in (plain[:5000], plain[5000:])]
        path.write_bytes(b"".join(frames))
    elif kind == ".parquet":
        arrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(arrow.table({"n": range(len(texts)), "text": texts}), path, row_group_size=70)
    else:
        path.mkdir()
        for number, text in enumerate(texts):
            (path / f"{number:04d}.txt").write_text(text)
    return path
