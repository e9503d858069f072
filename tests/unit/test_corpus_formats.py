"""Corpus formats: JSONL, gzip, Zstandard, Parquet and text, whole and damaged."""

from __future__ import annotations

import contextlib
import json
import random
from pathlib import Path

import pytest

from data_prep import corpus_shards, tokenize_corpus
from data_prep.corpus_files import find_inputs
from data_prep.corpus_shards import Counts, plan_shards, read_file_range
from data_prep.encoders import open_encoder
from data_prep.formats import FileRange, Problem
from data_prep.memory_limits import DEFAULT_LIMITS, Limits
from megatron_a2d.data.indexed_dataset import TokenFile
from megatron_a2d.utils.errors import UserError
from tests.unit import corpus_kinds
from tests.unit.corpus_kinds import TEXTS, contents, problem, run, write_jsonl, write_kind

tokenizer = corpus_kinds.tokenizer


@pytest.mark.parametrize("kind", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".txt"])
def test_every_kind_gives_the_same_tokens(kind, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_shards, "plan_shards", lambda paths, **options: plan_shards(paths, 3000, **options))
    monkeypatch.setattr(tokenize_corpus, "plan_shards", lambda paths, **options: plan_shards(paths, 3000, **options))
    path = write_kind(tmp_path, kind, TEXTS)
    if kind in (".jsonl", ".parquet", ".txt"):
        assert len(plan_shards(find_inputs([path]).paths, 3000)) > 1
    run(tokenizer, tmp_path / "out", "--input", path)
    file, encoder = TokenFile(tmp_path / "out"), open_encoder(tokenizer, append_eod=False, workers=1)
    assert [encoder.decode(file.document(n)[:-1].tolist()) for n in range(file.num_documents)] == TEXTS


def test_spans_cover_every_line_once(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text("\ufeff" + write_jsonl(tmp_path / "x", TEXTS[:40]).read_text() + "\n\n" + '{"text": "last"}')
    size = path.stat().st_size
    for step in (1, 7, 100, 1000, size):
        counts = Counts()
        file_ranges = [
            FileRange(str(path), ".jsonl", start, min(start + step, size), step) for start in range(0, size, step)
        ]
        texts = [
            document.text for file_range in file_ranges for document in read_file_range(file_range, "text", counts)
        ]
        assert texts == [*TEXTS[:40], "last"]


BAD = [b'{"text": "fi', b'{"text": "\xff"}', b'{"body": "x"}', b"[]", b'{"text": 1}', b'{"text": "\\udc00"}', b'{"text": 1' + b"0" * 5000 + b"}"]  # fmt: skip


def test_what_cannot_be_read_is_fatal_or_reported(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenize_corpus, "plan_shards", lambda paths, **options: plan_shards(paths, 3000, **options))
    lines = write_kind(tmp_path, ".jsonl", TEXTS).read_bytes().splitlines()
    for number, line in enumerate(BAD):
        lines.insert(40 * (number + 1), line)
    corpus = tmp_path / "bad.jsonl"
    corpus.write_bytes(b"\n".join(lines))
    assert f"{corpus}:41: not valid JSON" in problem(tokenizer, tmp_path / "c", "--input", corpus)
    for workers in (1, 2):
        prefix = run(tokenizer, tmp_path / f"c{workers}", "--input", corpus, "--on-error", "skip", "--workers", workers)
        report = json.loads(Path(f"{prefix}.report.json").read_text())
        assert (report["documents"], report["invalid"], len(report["problems"])) == (300, len(BAD), len(BAD))
        assert [line.split(": ")[0] for line in report["problems"]] == [f"{corpus}:{40 * n + 1}" for n in range(1, 8)]
    assert contents(tmp_path / "c1") == contents(tmp_path / "c2")
    clean = contents(run(tokenizer, tmp_path / "clean", "--input", tmp_path / "docs.jsonl"))
    assert contents(tmp_path / "c1") == clean


@pytest.mark.parametrize("kind", [".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_damaged_containers(kind, tokenizer, tmp_path):
    path = write_kind(tmp_path, kind, TEXTS)
    whole = path.read_bytes()
    for size in (len(whole) - 5, len(whole) // 2, 9):
        path.write_bytes(whole[:size])
        assert str(path) in problem(tokenizer, tmp_path / "c", "--input", path)
    if kind != ".parquet":
        path.write_bytes(whole[: len(whole) - 5])
        run(tokenizer, tmp_path / "c", "--input", path, "--on-error", "skip")
        assert json.loads((tmp_path / "c.report.json").read_text())["invalid"] >= 1


def test_files_of_which_nothing_can_be_read(tokenizer, tmp_path):
    pytest.importorskip("pyarrow")
    good = write_kind(tmp_path, ".jsonl", TEXTS)
    damaged = write_kind(tmp_path, ".parquet", TEXTS)
    damaged.write_bytes(damaged.read_bytes()[:-5])
    empty = tmp_path / "empty.txt"
    empty.touch()
    inputs = ("--input", good, damaged, empty)
    assert f"{empty}: is empty" in problem(tokenizer, tmp_path / "c", *inputs)
    assert f"{damaged}: is not a parquet file" in problem(tokenizer, tmp_path / "c", "--input", good, damaged)
    prefix = run(tokenizer, tmp_path / "c", *inputs, "--on-error", "skip")
    problems = [f"{damaged}: is not a parquet file or is damaged", f"{empty}: is empty"]
    assert json.loads(Path(f"{prefix}.report.json").read_text())["problems"] == problems
    assert contents(prefix) == contents(run(tokenizer, tmp_path / "clean", "--input", good))


def test_zst_of_other_tools(tmp_path):
    """Large windows, frames that are skipped, one huge line; and what stands before damage is kept."""
    zstandard = pytest.importorskip("zstandard")
    plain = write_jsonl(tmp_path / "plain", TEXTS).read_bytes()
    frame, skipped = zstandard.ZstdCompressor().compress(plain), b"\x50\x2a\x4d\x18\x03\0\0\0abc"
    window = zstandard.ZstdCompressionParameters(window_log=30)
    long = zstandard.ZstdCompressor(compression_params=window).compressobj()
    huge = random.Random(0).randbytes(1 << 20).hex()
    path = tmp_path / "a.jsonl.zst"
    limits = Limits(DEFAULT_LIMITS.document_bytes, 1 << 30)

    def read(data: bytes) -> tuple[list[str], list[str]]:
        path.write_bytes(data)
        counts = Counts()
        (shard,) = plan_shards([path])
        texts = [document.text for document in read_file_range(shard.file_ranges[0], "text", counts, True, limits)]
        return texts, counts.problems

    assert read(long.compress(plain) + long.flush()) == (TEXTS, [])
    assert read(skipped + frame + skipped) == (TEXTS, [])
    line = b'{"text": "' + huge.encode() + b'"}\n'
    assert read(zstandard.ZstdCompressor().compress(line + line)) == ([huge, huge], [])
    texts, (only,) = read(frame + b"no frame at all")
    assert texts == TEXTS and only.startswith(f"{path}:301: the compressed data ends or is damaged here")


def test_parquet_columns(tokenizer, tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "t.parquet"
    parquet.write_table(arrow.table({"text": ["a", None, "b"], "n": [1, 2, 3]}), path)
    assert "no column 'txt' (did you mean text?)" in problem(
        tokenizer, tmp_path / "c", "--input", path, "--json-keys", "txt"
    )
    assert "column 'n' holds int64" in problem(tokenizer, tmp_path / "c", "--input", path, "--json-keys", "n")
    assert f"{path}: row 2: 'text' is null" in problem(tokenizer, tmp_path / "c", "--input", path)
    run(tokenizer, tmp_path / "c", "--input", path, "--on-error", "skip")
    assert TokenFile(tmp_path / "c").num_documents == 2
    parquet.write_table(arrow.table({"text": arrow.array(["a", "b", "a"]).dictionary_encode()}), path)
    run(tokenizer, tmp_path / "d", "--input", path)
    assert TokenFile(tmp_path / "d").num_documents == 3


def test_inputs_are_files_directories_and_globs(tmp_path):
    (tmp_path / "deep").mkdir()
    names = ["a.jsonl", "b.jsonl.gz", "deep/c.txt", "deep/d.parquet"]
    for name in [*names, "deep/notes.md"]:
        (tmp_path / name).write_text("x")
    assert find_inputs([tmp_path]).paths == [tmp_path / name for name in names]
    assert find_inputs([str(tmp_path / "**" / "*.txt"), str(tmp_path / "*.jsonl")]).paths == [
        tmp_path / "deep/c.txt",
        tmp_path / "a.jsonl",
    ]
    with pytest.raises(UserError, match="given twice"):
        find_inputs([tmp_path / "a.jsonl", tmp_path])


def test_problems_are_found_by_readers_not_raised(tmp_path):
    from data_prep.formats import parse_line, read_text

    for line in BAD:
        assert isinstance(parse_line(line, "text"), str)
    assert parse_line(b"  \n", "text") is None and parse_line(b'{"text": "a"}', "text") == b"a"
    (tmp_path / "a.txt").write_bytes(b"\xff")
    with contextlib.suppress(StopIteration):
        assert isinstance(
            next(iter(read_text(FileRange(str(tmp_path / "a.txt"), ".txt", 0, 1, 1), "", DEFAULT_LIMITS))), Problem
        )


@pytest.mark.parametrize("kind", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".txt"])
def test_damaged_inputs_never_crash(kind, tmp_path):
    """40 flips and cuts of each kind of input: documents, problems that are counted, or one clear line."""
    path = write_kind(tmp_path, kind, TEXTS[:60])
    path = path / "0000.txt" if kind == ".txt" else path
    whole, chance, refused = path.read_bytes(), random.Random(kind), 0
    for number in range(40):
        data = bytearray(whole if number % 2 else whole[: chance.randrange(1, len(whole))])
        for _ in range(number % 5):
            data[chance.randrange(len(data))] = chance.randrange(256)
        path.write_bytes(bytes(data))
        counts = Counts()
        try:
            for shard in plan_shards(find_inputs([path]).paths):
                for file_range in shard.file_ranges:
                    for document in read_file_range(file_range, "text", counts, skip_invalid=True):
                        document.text.encode("utf-8")
        except UserError as error:
            assert str(path) in error.problems[0] and "\n" not in error.problems[0]
            refused += 1
        assert all(str(path) in line and "\n" not in line for line in counts.problems)
        refused += bool(counts.invalid)
    assert refused >= 10
