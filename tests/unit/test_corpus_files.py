"""What a corpus consists of, and how much of a stranger's file is held at a time."""

from __future__ import annotations

import gzip
import json
import os
import tracemalloc
from pathlib import Path

import pytest

from data_prep import tokenize_corpus
from data_prep.corpus_files import find_inputs, kind_of
from data_prep.corpus_shards import Counts, plan_shards, read_file_range
from data_prep.formats import READERS, Document, FileRange
from data_prep.memory_limits import DEFAULT_LIMITS, Limits
from megatron_a2d.utils.errors import UserError

SMALL = Limits(document_bytes=1000, window_bytes=1 << 23)


def fill(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f'{{"text": "{name}"}}\n')


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.jsonl", ".jsonl"), ("a.JSONL", ".jsonl"), ("a.ndjson", ".jsonl"), ("a.b.JsonL.GZ", ".jsonl.gz"),
        ("a.json.gz", ".jsonl.gz"), ("a.ndjson.zst", ".jsonl.zst"), ("a.json.zstd", ".jsonl.zst"),
        ("A.TXT", ".txt"), ("a.Parquet", ".parquet"),
        ("a.json", None), ("a.gz", None), ("a.txt.gz", None), ("jsonl", None), (".jsonl", None), ("a.jsonl.bak", None),
    ],
)  # fmt: skip
def test_endings(name, kind):
    assert kind_of(Path(name)) == kind


def test_every_file_below_a_directory_is_read_or_listed(tmp_path):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    fill(root, "b.jsonl", "a.JSONL", "deep/er/c.ndjson", "deep/README.md", "d.json", "plain")
    fill(elsewhere, "e.txt", "below/f.jsonl", "below/g.csv")
    (root / "link").symlink_to(elsewhere)
    (root / "again").symlink_to(elsewhere / "below")
    (root / "h.jsonl").symlink_to(elsewhere / "e.txt")  # its own name decides
    (root / "b2.jsonl").symlink_to(root / "b.jsonl")
    (root / "nowhere.jsonl").symlink_to(tmp_path / "none")
    (elsewhere / "below" / "up").symlink_to(tmp_path)
    (root / "deep" / "loop").symlink_to(root)
    (root / "self").symlink_to(root / "self")
    os.mkfifo(root / "pipe.jsonl")
    found = find_inputs([root])
    read = {path.relative_to(root).as_posix() for path in found.paths}
    assert read == {"b.jsonl", "a.JSONL", "deep/er/c.ndjson", "h.jsonl", "again/f.jsonl"}
    assert found.paths == sorted(found.paths)
    listed = {Path(line.split(": ")[0]).relative_to(root).as_posix(): line.split(": ")[1] for line in found.passed_over}
    assert listed == {
        "deep/README.md": "there is no reader for .md", "d.json": "there is no reader for .json",
        "plain": "there is no reader for files without a suffix", "again/g.csv": "there is no reader for .csv",
        "link/e.txt": f"is the same file as {root / 'h.jsonl'}", "b2.jsonl": f"is the same file as {root / 'b.jsonl'}",
        "nowhere.jsonl": "is a broken link", "self": "is a broken link",
        "again/up": "links to a directory that contains it",
        "deep/loop": "links to a directory that contains it",
        "link/below": f"links to {elsewhere / 'below'}, which has been read already",
        "pipe.jsonl": "is not a regular file",
    }  # fmt: skip


def test_globs_take_directories_and_no_file_twice(tmp_path):
    fill(tmp_path, "a.jsonl", "deep/b.jsonl", "deep/er/c.jsonl")
    every = [tmp_path / name for name in ("a.jsonl", "deep/b.jsonl", "deep/er/c.jsonl")]
    for pattern in ("*", "**", "**/*"):
        assert find_inputs([tmp_path / pattern]) == (every, [])
    (tmp_path / "c.jsonl").symlink_to(tmp_path / "deep/er/c.jsonl")
    with pytest.raises(UserError, match=r"deep/er/c.jsonl: is given twice, also as .*/c.jsonl"):
        find_inputs([tmp_path / "c.jsonl", tmp_path / "deep"])
    with pytest.raises(UserError, match=r"none\*: matches no file"):
        find_inputs([tmp_path / "none*"])
    (tmp_path / "lost.jsonl").symlink_to(tmp_path / "gone.jsonl")
    with pytest.raises(UserError) as error:
        find_inputs([tmp_path / "*.jsonl"])
    assert error.value.problems == [f"--input {tmp_path / 'lost.jsonl'}: is a broken link; repair it, or leave it out"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: holds no \.jsonl"):
        find_inputs([tmp_path / "empty"])


def test_skipped_files_are_listed(tmp_path, capsys, monkeypatch):
    fill(tmp_path / "c", "a.jsonl", *(f"{n}.csv" for n in range(12)))
    found = find_inputs([tmp_path / "c"])
    found.show_passed_over()
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 11 and said[0] == f"skipped: {tmp_path}/c/0.csv: there is no reader for .csv"
    assert said[-1] == "skipped: 2 more files"


# ---- bounds


def read(path: Path, limits: Limits) -> list[str]:
    """Each document's first characters, and each problem."""
    counts, items = Counts(), []
    for shard in plan_shards([path], skip_invalid=True):
        for file_range in shard.file_ranges:
            items += [document.text[:8] for document in read_file_range(file_range, "text", counts, True, limits)]
    return [*items, *counts.problems]


def compress(kind: str, parts: list[bytes]) -> bytes:
    if kind == ".jsonl.gz":
        return gzip.compress(b"".join(parts))
    if kind == ".jsonl.zst":
        packer = pytest.importorskip("zstandard").ZstdCompressor().compressobj()
        return b"".join(map(packer.compress, parts)) + packer.flush()
    return b"".join(parts)


@pytest.mark.parametrize("kind", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_long_lines_are_problems_and_what_follows_is_read(kind, tmp_path):
    path = tmp_path / f"a{kind}"
    fits = json.dumps({"text": "fits" + "x" * (1000 - 4 - 12)}).encode()
    assert len(fits) == 1000
    lines = [b'{"text": "one"}\n', fits[:-2] + b'y"}\n', b'{"text": "two"}\n', b'{"text": "' + b"z" * 5000 + b'"}\n']
    path.write_bytes(compress(kind, [*lines, b'{"text": "three"}\n', b"\n", fits[:500] + b"x" * 5000]))
    too_long = [f"{path}:{n}: the line is longer than --max-document-megabytes 0" for n in (2, 4, 7)]
    assert read(path, SMALL) == ["one", "two", "three", *too_long]
    path.write_bytes(compress(kind, [fits]))
    assert read(path, SMALL) == ["fitsxxxx"]
    if kind == ".jsonl":  # a range that begins within a long line
        path.write_bytes(b"".join(lines) + b'{"text": "five"}\n')
        for step in (100, 2500):
            file_ranges = [
                FileRange(str(path), kind, start, start + step, 1) for start in range(0, path.stat().st_size, step)
            ]
            items = [item for file_range in file_ranges for item in READERS[kind](file_range, "text", SMALL)]
            found = [item.text if isinstance(item, Document) else item.where[-2:] for item in items]
            assert found == ["one", ":2", "two", ":4", "five"]


@pytest.mark.parametrize("kind", [".jsonl.gz", ".jsonl.zst"])
def test_small_files_that_unpack_to_much(kind, tmp_path):
    path = tmp_path / f"bomb{kind}"
    path.write_bytes(compress(kind, [b'{"text": "', *[b"a" * (1 << 20)] * 100, b'"}\n{"text": "b"}\n']))
    assert path.stat().st_size < 110_000
    tracemalloc.start()
    limits = Limits(1_000_000, 1 << 27)
    assert read(path, limits) == ["b", f"{path}:1: the line is longer than --max-document-megabytes 1"]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50e6
    assert read(path, Limits(200_000_000, 1 << 27)) == ["aaaaaaaa", "b"]


def test_windows_of_zst(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    path = tmp_path / "a.jsonl.zst"
    window = zstandard.ZstdCompressionParameters(window_log=24)
    packer = zstandard.ZstdCompressor(compression_params=window).compressobj()
    path.write_bytes(packer.compress(b'{"text": "a"}\n') + packer.flush())
    (problem,) = read(path, SMALL)
    assert "its window is larger than --max-window-megabytes 8; raise that" in problem
    assert read(path, Limits(1000, 1 << 24)) == ["a"]


@pytest.mark.parametrize("compression", ["zstd", "snappy"])
@pytest.mark.parametrize("kind", ["string", "large_string"])
def test_parquet_that_unpacks_to_much(compression, kind, tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path, pool = tmp_path / "a.parquet", arrow.default_memory_pool()
    table = arrow.table({"text": arrow.array(["a" * 1_000_000, None] * 100, type=getattr(arrow, kind)())})
    parquet.write_table(table, path, compression=compression)
    del table
    assert path.stat().st_size < 60_000
    before = pool.bytes_allocated()
    seen = 0
    for item in READERS[".parquet"](plan_shards([path])[0].file_ranges[0], "text", DEFAULT_LIMITS):
        seen += isinstance(item, Document)
        assert pool.bytes_allocated() - before < 20e6
    assert seen == 100
    assert "--max-document-megabytes" in read(path, SMALL)[0]


def test_parquet_without_a_dictionary(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(arrow.table({"text": ["a" * 1_000_000] * 20}), path, compression="zstd", use_dictionary=False)
    (problem,) = read(path, DEFAULT_LIMITS)
    assert (
        problem.startswith(f"{path}: row 1: row group 0 decompresses") and "raise --max-document-megabytes" in problem
    )
    assert read(path, Limits(30_000_000, 1)) == ["a" * 8] * 20
    parquet.write_table(arrow.table({"text": [f"text {n}" for n in range(600)]}), path, use_dictionary=False)
    assert read(path, DEFAULT_LIMITS) == [f"text {n}" for n in range(600)]


def test_long_text_files(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("a" * 1001)
    assert read(path, SMALL) == [f"{path}: the file is longer than --max-document-megabytes 0"]
    path.write_text("a" * 1000)
    assert read(path, SMALL) == ["aaaaaaaa"]


@pytest.mark.parametrize(
    "words", [["--workers", "1000000000"], ["--max-document-megabytes", "0"], ["--max-window-megabytes", "4096"]]
)
def test_bounds_of_the_bounds(words):
    with pytest.raises(UserError, match=rf"{words[0]} {words[1]}: must lie in 1 .. \d+"):
        tokenize_corpus.main(["--input", "a", "--tokenizer", "t", "--output-prefix", "o", *words])
