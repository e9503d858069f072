"""Tokenising on several machines: --shard and --merge-shards give one machine's bytes, or one line that says why not."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from data_prep import tokenize_corpus, tokenize_shards, train_tokenizer
from data_prep.corpus_shards import Shard, plan_shards
from data_prep.corpus_shares import owners, parse_share
from data_prep.formats import FileRange
from data_prep.tokenize_shards import Share
from megatron_a2d.utils.errors import UserError
from tests.unit import corpus_kinds
from tests.unit.corpus_kinds import TEXTS, contents, problem, run, write_jsonl, write_kind

tokenizer = corpus_kinds.tokenizer
KINDS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".txt")
# Held-out documents and copies are found in the merge.
SPLIT = ("--valid-fraction", "0.2", "--deduplicate")


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(tokenize_corpus, "plan_shards", lambda paths, **options: plan_shards(paths, 6000, **options))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> list[Path]:
    """One large file, one of each other kind, and some of its documents again."""
    root = tmp_path_factory.mktemp("corpus")
    for kind in KINDS:
        (root / kind).mkdir()
    large = write_jsonl(root / "large.jsonl", [f"{text} {n}" for n in range(3) for text in TEXTS])
    copies = write_jsonl(root / "zcopies.jsonl", TEXTS[50:100])
    return [large, *(write_kind(root / kind, kind, TEXTS[:40]) for kind in KINDS), copies]


def shares(tokenizer: Path, prefix: Path, of: int, *arguments: object) -> None:
    for number in range(of, 0, -1):
        run(tokenizer, prefix, *arguments, "--shard", f"{number}/{of}")


def files(prefix: Path) -> dict[str, bytes]:
    return {
        f"{part}{end}": data for part in ("_train", "_valid") for end, data in contents(Path(f"{prefix}{part}")).items()
    }


def test_the_bytes_are_those_of_one_machine(tokenizer, corpus, tmp_path):
    run(tokenizer, tmp_path / "one", "--input", *corpus, *SPLIT)
    expected = files(tmp_path / "one")
    for of in (1, 2, 3, 7):
        prefix = tmp_path / f"of{of}"
        shares(tokenizer, prefix, of, "--input", *corpus, *SPLIT)
        assert not list(tmp_path.glob(f"of{of}*.bin"))
        run(tokenizer, prefix, "--input", *corpus, *SPLIT, "--merge-shards")
        assert files(prefix) == expected and not Path(f"{prefix}.parts").exists()
        assert "already exists" in problem(tokenizer, prefix, "--input", *corpus, *SPLIT, "--shard", "1/2")


def test_one_large_file_is_shared_equally(tmp_path):
    path = write_jsonl(tmp_path / "large.jsonl", TEXTS)
    shards = plan_shards([path], 300)
    for of in (1, 2, 3, 7):
        owner = owners(shards, of)
        sizes = [sum(shard.num_bytes for shard, o in zip(shards, owner, strict=True) if o == k + 1) for k in range(of)]
        assert sum(sizes) == path.stat().st_size and max(sizes) - min(sizes) <= 450
    uneven = [Shard([FileRange("x", ".jsonl.gz", 0, 0, size)]) for size in (1, 1, 9, 1, 4, 4, 1, 3)]
    assert owners(uneven, 2) == [1, 1, 1, 1, 2, 2, 2, 2] and owners(uneven[:1], 3) == [1]


def test_an_interrupted_share_does_only_what_is_missing(tokenizer, corpus, tmp_path, monkeypatch):
    arguments = ("--input", *corpus)
    original, done = tokenize_shards.tokenize_shard, []
    monkeypatch.setattr(
        tokenize_shards, "tokenize_shard", lambda job, n, *rest: (done.append(n), original(job, n, *rest))
    )
    run(tokenizer, tmp_path / "one", *arguments)
    number_of_pieces = len(done)
    run(tokenizer, tmp_path / "c", *arguments, "--shard", "2/2")
    mine = done[number_of_pieces:]
    parts = tmp_path / "c.parts"
    (parts / f"{mine[1]:05d}.npz").unlink()
    (parts / f"{mine[2]:05d}.tokens").write_bytes(bytes((parts / f"{mine[2]:05d}.tokens").stat().st_size))
    other = next(n for n in range(number_of_pieces) if n not in mine)
    theirs = [parts / f".{number:05d}.tokens.partial-{where}" for number, where in ((other, "x-1"), (mine[0], "1"))]
    for path in theirs:
        path.write_text("being written")
        os.utime(path, (0, 0))  # long ago, so that its age does not keep it
    done.clear()
    run(tokenizer, tmp_path / "c", *arguments, "--shard", "2/2")
    assert done == sorted(mine[1:3])
    assert [path.exists() for path in theirs] == [True, False]  # another machine's stays
    done.clear()
    run(tokenizer, tmp_path / "c", *arguments, "--shard", "1/3")  # another number of shards: what is done stays done
    run(tokenizer, tmp_path / "c", *arguments)  # and one machine can do the rest
    assert sorted(done) == sorted(set(range(number_of_pieces)) - set(mine))
    assert contents(tmp_path / "c") == contents(tmp_path / "one")


def test_what_is_missing_or_foreign_is_refused_in_a_line(tokenizer, corpus, tmp_path):
    large, arguments = corpus[0], ("--input", corpus[0])
    prefix, parts = tmp_path / "c", tmp_path / "c.parts"

    def refusal(*changed: object) -> str:
        return problem(tokenizer, prefix, *(changed or arguments), "--merge-shards")

    assert "there are no shards in" in refusal() and not parts.exists()
    run(tokenizer, prefix, *arguments, "--shard", "1/3")
    with pytest.raises(UserError) as caught:
        run(tokenizer, prefix, *arguments, "--merge-shards")
    missing = caught.value.problems
    assert all(f"; run --shard {number}/3 again" in line for number, line in zip((2, 3), missing, strict=True))
    assert all("pieces are missing or unreadable (the first: " in line for line in missing)
    run(tokenizer, prefix, *arguments, "--shard", "2/3")
    run(tokenizer, prefix, *arguments, "--shard", "3/3", "--min-tokens", 9, "--no-append-eod")
    assert "pieces are made with another --append-eod and --min-tokens (" in refusal()
    assert "run --shard 3/3 again, with the other arguments as here" in refusal()
    foreign = tmp_path / "foreign"
    train_tokenizer.main(["--input", str(large), "--vocab-size", "290", "--out", str(foreign)])
    run(foreign, prefix, *arguments, "--shard", "3/3")
    assert "pieces are made with another --tokenizer (" in refusal()
    run(tokenizer, prefix, *arguments, "--shard", "3/3")
    assert not list(tmp_path.glob("c*.bin"))

    saved = shutil.copytree(parts, tmp_path / "saved")
    with tokenize_shards.hold(parts, Share(2, 3)):  # still at work, here or on another machine
        assert "another process is writing" in refusal()
        twice = problem(tokenizer, prefix, *arguments, "--shard", "2/3")
        assert f"another process is writing --shard 2/3 of {parts};" in twice
        run(tokenizer, prefix, *arguments, "--shard", "3/3")
    with tokenize_shards.hold(parts):
        assert "another process is writing" in problem(tokenizer, prefix, *arguments, "--shard", "3/3")
    status = os.stat(large)
    os.utime(large, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))  # any file system has seconds
    with pytest.raises(UserError, match="made from another --input"):
        run(tokenizer, prefix, *arguments, "--merge-shards")
    os.utime(large, ns=(status.st_atime_ns, status.st_mtime_ns))
    stranger = shutil.copy(parts / "00000.npz", parts / "00999.npz")
    assert "00999.npz is of another corpus" in refusal()
    Path(stranger).unlink()
    (parts / "00001.npz").write_bytes(b"torn")
    assert "1 of " in refusal() and "missing or unreadable" in refusal()
    shutil.copy(saved / "00001.npz", parts)
    tokens = parts / "00001.tokens"
    tokens.write_bytes(bytes(tokens.stat().st_size))
    assert "00001.tokens: has changed since it was written; remove it and rerun" in refusal()
    tokens.unlink()
    assert "1 of " in refusal() and "missing or unreadable" in refusal()
    assert not list(tmp_path.glob("c*.bin")) and not list(tmp_path.glob(".c*"))
    shutil.copy(saved / "00001.tokens", parts)
    assert "would get none of the" in problem(
        tokenizer, prefix, *arguments, "--merge-shards", "--valid-fraction", 1e-9
    )  # the shards stay
    run(tokenizer, prefix, *arguments, "--merge-shards")


def test_more_shares_than_pieces(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS[:5])
    shares(tokenizer, tmp_path / "c", 3, "--input", path)
    run(tokenizer, tmp_path / "c", "--input", path, "--merge-shards")
    assert contents(tmp_path / "c") == contents(run(tokenizer, tmp_path / "one", "--input", path))


def test_skipped_documents_are_not_merged_unasked(tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\nnot JSON\n{"text": "two"}\n')
    assert "not valid JSON" in problem(tokenizer, tmp_path / "c", "--input", path, "--shard", "1/1")
    run(tokenizer, tmp_path / "c", "--input", path, "--shard", "1/1", "--on-error", "skip")
    said = problem(tokenizer, tmp_path / "c", "--input", path, "--merge-shards")
    assert "1 of 1 pieces is made with --on-error skip" in said
    run(tokenizer, tmp_path / "c", "--input", path, "--merge-shards", "--on-error", "skip")


@pytest.mark.parametrize(
    "given", ["", "3", "0/3", "4/3", "1/0", "-1/3", "1/3/5", "a/b", "1/9999999", "1/200000", "٣/٤"]
)
def test_a_share_is_one_of_its_number(given, tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"--shard .*(is not of the form I/N|must lie in)"):
        parse_share(given)
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS[:5])
    assert "--shard" in problem(tokenizer, tmp_path / "c", "--input", path, "--shard", given)
    assert parse_share("3/7") == (3, 7)


def test_the_merge_is_no_share(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS[:5])
    assert "choose one" in problem(tokenizer, tmp_path / "c", "--input", path, "--shard", "1/2", "--merge-shards")
