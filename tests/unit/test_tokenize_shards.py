"""Tokenising in shards: workers, interruption, Megatron's bytes, several keys, deduplication, length filters."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from data_prep import dedup_and_split, encoders, tokenize_corpus, tokenize_shards
from data_prep.corpus_shards import plan_shards
from data_prep.encoders import open_encoder
from megatron_a2d.data.indexed_dataset import TokenFile
from megatron_a2d.utils.errors import UserError
from tests.unit import corpus_kinds
from tests.unit.corpus_kinds import TEXTS, contents, problem, run, write_jsonl, write_kind

tokenizer = corpus_kinds.tokenizer


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
    lost = tmp_path / "three.parts" / "00000.tokens"  # of the right size, as after a power failure
    lost.write_bytes(bytes(lost.stat().st_size))
    again = []
    monkeypatch.setattr(
        tokenize_shards, "tokenize_shard", lambda job, n, *rest: (again.append(n), original(job, n, *rest))
    )
    assert contents(run(tokenizer, tmp_path / "three", "--input", corpus)) == expected
    assert again[:4] == [0, 1, 3, 4] and not (tmp_path / "three.parts").exists()


def test_shards_are_of_about_one_size_whatever_that_of_the_file(tmp_path):
    path = tmp_path / "a.jsonl"
    for size in (50, 99, 149, 151, 999, 1949, 1951, 1990):  # the last ones are rounded to ranges below 100 bytes
        path.write_bytes(b"x" * size)
        sizes = [shard.num_bytes for shard in plan_shards([path], 100)]
        assert sum(sizes) == size and all(50 <= part < 150 for part in sizes)


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


def test_workers_end_with_the_first_process():
    code = (
        "import time; from data_prep import tokenize_shards\n"
        "worker = tokenize_shards.CONTEXT.Process(target=tokenize_shards._end_with_parent)\n"
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


def test_workers_take_over_the_tokenizer_and_leave_the_lock(tokenizer, tmp_path, monkeypatch):
    """It is loaded once; and what kills the first process alone does not keep the directory locked."""
    corpus = write_kind(tmp_path, ".jsonl", TEXTS)
    loads = tmp_path / "loads"
    for name in ("HFEncoder", "SentencePieceEncoder"):
        kind = getattr(encoders, name)

        def start(self, *arguments, start=kind.__init__):
            with open(loads, "a") as stream:
                stream.write("x")
            start(self, *arguments)

        monkeypatch.setattr(kind, "__init__", start)
    monkeypatch.setattr(tokenize_corpus, "plan_shards", lambda paths, **options: plan_shards(paths, 3000, **options))
    run(tokenizer, tmp_path / "out", "--input", corpus, "--workers", 2)
    assert loads.read_text() == "x"

    encoder = SimpleNamespace(use_threads=lambda count: None)
    with (
        tokenize_shards.hold(tmp_path / "parts") as lock,
        tokenize_shards.start_workers(None, encoder, 2, lock) as workers,
    ):
        opened = workers.executor.submit(_opened_files).result()
        assert str(tmp_path / "parts" / ".lock") in _opened_files() and str(tmp_path / "parts" / ".lock") not in opened


def _opened_files() -> list[str]:
    links = [os.path.join("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
    return [os.readlink(link) for link in links if os.path.lexists(link)]


def _alive(process: Path) -> bool:
    try:
        return process.joinpath("stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_several_keys_become_several_files(tokenizer, tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text('{"q": "one", "a": "two two"}\n{"q": "three", "a": "four"}\n')
    run(tokenizer, tmp_path / "c", "--input", path, "--json-keys", "q", "a")
    encoder = open_encoder(tokenizer, append_eod=False, workers=1)
    for key, texts in (("q", ["one", "three"]), ("a", ["two two", "four"])):
        file = TokenFile(tmp_path / f"c_{key}")
        assert [encoder.decode(file.document(n)[:-1].tolist()) for n in range(2)] == texts


def test_an_interruption_between_keys_is_resumed(tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "c.jsonl"
    path.write_text('{"q": "one", "a": "two two"}\n{"q": "three", "a": "four"}\n')
    arguments = ("--input", path, "--json-keys", "q", "a")
    run(tokenizer, tmp_path / "whole", *arguments)
    expected = [contents(tmp_path / f"whole_{key}") for key in "qa"]
    original = tokenize_corpus.write_token_files

    def interrupted(arguments, key, *rest):
        if key.prefix.endswith("_a"):
            raise KeyboardInterrupt
        original(arguments, key, *rest)

    monkeypatch.setattr(tokenize_corpus, "write_token_files", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tokenizer, tmp_path / "c", *arguments)
    assert (tmp_path / "c_q.idx").exists() and not (tmp_path / "c_a.idx").exists()
    monkeypatch.setattr(tokenize_corpus, "write_token_files", original)
    assert "c_q.bin already exists" in problem(tokenizer, tmp_path / "c", *arguments, "--min-tokens", 2)
    run(tokenizer, tmp_path / "c", *arguments)
    assert [contents(tmp_path / f"c_{key}") for key in "qa"] == expected
    assert not list(tmp_path.glob("*.parts"))


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
