"""Tokenising at scale: every kind of input, the same bytes however it is done, interruptions, what is left out."""

from __future__ import annotations

import contextlib
import errno
import gzip
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from data_prep import (
    corpus_shards,
    dedup_and_split,
    gigatoken_encoder,
    tokenize_corpus,
    tokenize_shards,
    train_tokenizer,
)
from data_prep.corpus_files import find_inputs
from data_prep.corpus_shards import Counts, Shard, plan_shards, read_file_range
from data_prep.encoders import Encoded, open_encoder
from data_prep.formats import FileRange, Problem
from data_prep.memory_limits import DEFAULT_LIMITS, Limits
from megatron_a2d.data.indexed_dataset import TokenFile
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


def test_the_bytes_are_megatrons(tokenizer, tmp_path):
    corpus = write_kind(tmp_path, ".jsonl", TEXTS)
    run(tokenizer, tmp_path / "ours", "--input", corpus)
    encoder = open_encoder(tokenizer, append_eod=True, workers=1)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for ids in encoder.encode(TEXTS):
        builder.add_document(np.array(ids), [len(ids)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for end in (".bin", ".idx"):
        assert (tmp_path / f"ours{end}").read_bytes() == (tmp_path / f"theirs{end}").read_bytes()
    read = IndexedDataset(str(tmp_path / "ours"))
    assert [read[n].tolist() for n in range(len(TEXTS))] == encoder.encode(TEXTS)


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


def test_workers_and_interruption_change_no_byte(tokenizer, tmp_path, monkeypatch):
    corpus = write_kind(tmp_path, ".jsonl", TEXTS)
    monkeypatch.setattr(tokenize_corpus, "plan_shards", lambda paths, **options: plan_shards(paths, 3000, **options))
    expected = contents(run(tokenizer, tmp_path / "one", "--input", corpus))
    assert contents(run(tokenizer, tmp_path / "two", "--input", corpus, "--workers", 2)) == expected

    original, done = tokenize_shards.tokenize_shard, []

    def interrupted(job, number, *rest):
        if len(done) == 3:
            raise KeyboardInterrupt
        original(job, number, *rest)
        done.append(number)

    monkeypatch.setattr(tokenize_shards, "tokenize_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tokenizer, tmp_path / "three", "--input", corpus)
    assert not list(tmp_path.glob("three*.bin")) and (tmp_path / "three.parts" / "00002.npz").exists()
    (tmp_path / "three.parts" / "00001.npz").write_bytes(b"torn")
    again = []
    monkeypatch.setattr(
        tokenize_shards, "tokenize_shard", lambda job, n, *rest: (again.append(n), original(job, n, *rest))
    )
    assert contents(run(tokenizer, tmp_path / "three", "--input", corpus)) == expected
    assert again[:3] == [1, 3, 4] and not (tmp_path / "three.parts").exists()


@pytest.mark.parametrize("kind", ["empty", "pipe", "array", "other values"])
def test_an_odd_shard_is_none(kind, tmp_path):
    path = tmp_path / "shard.npz"
    if kind == "pipe":
        os.mkfifo(path)
    with contextlib.nullcontext() if kind == "pipe" else open(path, "wb") as stream:
        if kind == "array":
            np.save(stream, np.zeros(3))
        elif kind == "other values":
            np.savez(stream, lengths=np.zeros(1), digests=np.zeros(1), counts=np.frombuffer(b"[5]", dtype=np.uint8))
    job = SimpleNamespace(path=lambda number, suffix: path)
    with pytest.raises(UserError, match=r"shard\.npz: cannot be read"):
        tokenize_shards.read_result(job, 0)
    assert not tokenize_shards.is_done(job, 0, None)


def test_other_settings_do_not_take_up_old_shards(tokenizer, tmp_path, monkeypatch):
    corpus = write_kind(tmp_path, ".jsonl", TEXTS)
    expected = contents(run(tokenizer, tmp_path / "plain", "--input", corpus, "--no-append-eod"))
    monkeypatch.setattr(tokenize_corpus, "merge", lambda *_: sys.exit(1))
    with pytest.raises(SystemExit):
        run(tokenizer, tmp_path / "c", "--input", corpus)
    assert (tmp_path / "c.parts" / "00000.npz").exists()
    monkeypatch.setattr(tokenize_corpus, "merge", dedup_and_split.merge)
    assert contents(run(tokenizer, tmp_path / "c", "--input", corpus, "--no-append-eod")) == expected


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


def test_one_writer_at_a_time_and_nothing_left_behind(tokenizer, tmp_path, monkeypatch):
    corpus = write_kind(tmp_path, ".jsonl", TEXTS)
    abandoned = [tmp_path / f".c{end}.partial-1" for end in (".bin", ".sums", ".idx")] + [
        tmp_path / ".c.idx.partial-1.lengths"
    ]
    other = tmp_path / ".cc.bin.partial-1"
    for path in (*abandoned, other):
        path.write_text("left by SIGKILL")
    with tokenize_shards.hold(tmp_path / "c.parts"):
        assert "another process is writing" in problem(tokenizer, tmp_path / "c", "--input", corpus)
    run(tokenizer, tmp_path / "c", "--input", corpus)
    assert not any(path.exists() for path in abandoned) and other.exists() and not (tmp_path / "c.parts").exists()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tokenize_corpus, "tokenize_shards", full)
    assert "No space left on device); free disk space" in problem(tokenizer, tmp_path / "d", "--input", corpus)
    assert "cannot be written" in problem(tokenizer, corpus / "e", "--input", corpus)


def test_another_encoder_does_not_take_up_old_shards(tokenizer, tmp_path):
    pytest.importorskip("gigatoken")
    (shard,) = plan_shards([write_kind(tmp_path, ".jsonl", TEXTS)])
    keys = {
        tokenize_shards._key(
            tokenize_shards.Job(
                tmp_path, tokenizer, name, 310, True, eod, "text", 1, None, False, DEFAULT_LIMITS, "sum"
            ),
            shard,
        )
        for name in ("gigatoken", "reference")
        for eod in (0, 1)
    }
    assert len(keys) == 4


def test_workers_end_with_the_first_process():
    code = (
        "import multiprocessing, time; from data_prep import tokenize_shards\n"
        "worker = multiprocessing.get_context('spawn').Process(target=tokenize_shards._end_with_parent)\n"
        "worker.start(); print(worker.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout
        worker = Path("/proc") / first.stdout.readline().strip()
        time.sleep(0.5)
        assert worker.name.isdigit() and worker.exists()
        first.kill()
    end = time.monotonic() + 300
    while _alive(worker) and time.monotonic() < end:
        time.sleep(0.05)
    assert not _alive(worker)


def _alive(process: Path) -> bool:
    try:
        return process.joinpath("stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


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


def test_several_keys_become_several_files(tokenizer, tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text('{"q": "one", "a": "two two"}\n{"q": "three", "a": "four"}\n')
    run(tokenizer, tmp_path / "c", "--input", path, "--json-keys", "q", "a")
    encoder = open_encoder(tokenizer, append_eod=False, workers=1)
    for key, texts in (("q", ["one", "three"]), ("a", ["two two", "four"])):
        file = TokenFile(tmp_path / f"c_{key}")
        assert [encoder.decode(file.document(n)[:-1].tolist()) for n in range(2)] == texts


def test_copies_are_dropped_across_files(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(dedup_and_split, "GROUP", 16)  # several groups
    monkeypatch.setattr(dedup_and_split, "_CHUNK", 100)
    first, second = write_jsonl(tmp_path / "a.jsonl", TEXTS[:200]), write_jsonl(tmp_path / "b.jsonl", TEXTS[::-1])
    monkeypatch.setattr(tokenize_corpus, "plan_shards", lambda paths, **options: plan_shards(paths, 3000, **options))
    kept = [*TEXTS[:200], *TEXTS[:199:-1]]
    run(tokenizer, tmp_path / "c", "--input", first, second, "--deduplicate")
    assert json.loads((tmp_path / "c.report.json").read_text())["duplicates"] == 200
    expected = run(tokenizer, tmp_path / "d", "--input", write_jsonl(tmp_path / "d.jsonl", kept))
    assert contents(tmp_path / "c") == contents(expected)


def test_length_filters_count_tokens_of_the_text(tokenizer, tmp_path):
    encoder = open_encoder(tokenizer, append_eod=False, workers=1)
    lengths = [len(ids) for ids in encoder.encode(TEXTS)]
    low, high = sorted(lengths)[60], sorted(lengths)[200]
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    run(tokenizer, tmp_path / "c", "--input", path, "--min-tokens", low, "--max-tokens", high)
    expected = [length + 1 for length in lengths if low <= length <= high]
    assert TokenFile(tmp_path / "c").document_lengths().tolist() == expected
    report = json.loads((tmp_path / "c.report.json").read_text())
    assert report["too_short"] == sum(length < low for length in lengths) > 0
    assert report["too_long"] == sum(length > high for length in lengths) > 0
    assert "exclude every document" in problem(tokenizer, tmp_path / "e", "--input", path, "--min-tokens", 10**6)
    assert not list(tmp_path.glob("e*"))


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


# ---- the fast encoder


def test_gigatoken_gives_the_reference_ids(tokenizer):
    pytest.importorskip("gigatoken")
    texts = [*map(str.encode, gigatoken_encoder.PROBES), *map(str.encode, TEXTS)]
    plain = open_encoder(tokenizer, False, workers=1)
    for append_eod in (True, False):
        slow = open_encoder(tokenizer, append_eod, workers=1)
        chosen = gigatoken_encoder.choose(tokenizer, slow, "auto", texts)
        assert chosen.name == "gigatoken" and f"{len(texts) + len(gigatoken_encoder.PROBES)} texts" in chosen.reason
        fast = gigatoken_encoder.GigatokenEncoder(
            tokenizer / "tokenizer.json", slow.vocab_size, slow.eod_token_id, 1, lambda: plain
        )
        for some in (texts, texts[:1], [b""]):
            one, other = fast.encode_batch(some), slow.encode_batch(some)
            assert np.array_equal(one.ids, other.ids) and np.array_equal(one.lengths, other.lengths)
            assert one.ids.dtype == other.ids.dtype == np.uint16
        marks = [b"plain", "\u07f3\u07fd".encode(), "\u00fc".encode(), "u\u0308".encode()]
        assert fast.encode_batch(marks).ids.tolist() == slow.encode_batch(marks).ids.tolist()
        assert [gigatoken_encoder.is_normal(text) for text in marks] == [True, False, True, False]
        # Letters of Unicode 16 that one library composes and the other does not, and a code point of no version.
        newer = [text.encode() for text in ("\U00016d67\U00016d67", "a\U00011382\U000113c9", "\u0378")]
        assert fast.encode_batch(newer).ids.tolist() == slow.encode_batch(newer).ids.tolist()
        assert not any(gigatoken_encoder.is_normal(text) for text in newer)
        assert fast.decode(fast.encode(["ünï"])[0][:-1] if append_eod else fast.encode(["ünï"])[0]) == "ünï"


def test_gigatoken_is_not_used_where_one_id_differs(tokenizer, tmp_path, monkeypatch):
    pytest.importorskip("gigatoken")
    original = gigatoken_encoder.GigatokenEncoder.encode_batch

    def wrong(self, texts: list[bytes]) -> Encoded:
        ids, lengths = original(self, texts)
        ids = ids.copy()
        ids[-1] += 1
        return Encoded(ids, lengths)

    corpus = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    expected = contents(run(tokenizer, tmp_path / "c", "--input", corpus))
    monkeypatch.setattr(gigatoken_encoder.GigatokenEncoder, "encode_batch", wrong)
    run(tokenizer, tmp_path / "d", "--input", corpus)
    assert contents(tmp_path / "d") == expected
    assert "tokenizers, because gigatoken gives different ids" in (tmp_path / "d.report.json").read_text()
    assert "gives different ids" in problem(tokenizer, tmp_path / "e", "--input", corpus, "--encoder", "gigatoken")


def test_without_gigatoken_the_reference_encodes(tokenizer, tmp_path, monkeypatch):
    corpus = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    expected = contents(run(tokenizer, tmp_path / "c", "--input", corpus))
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    run(tokenizer, tmp_path / "d", "--input", corpus)
    assert contents(tmp_path / "d") == expected
    assert "gigatoken is not installed" in (tmp_path / "d.report.json").read_text()


def test_the_sample_comes_from_all_over(tmp_path):
    paths = [write_jsonl(tmp_path / f"{n:02d}.jsonl", [f"file {n} {text}" for text in TEXTS[:20]]) for n in range(50)]
    every = [Shard(plan_shards([path])[0].file_ranges) for path in paths]
    sample = b" ".join(gigatoken_encoder.corpus_sample(every, "text")).decode()
    assert sum(f"file {n} " in sample for n in range(50)) == gigatoken_encoder.SAMPLE_SHARDS


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
