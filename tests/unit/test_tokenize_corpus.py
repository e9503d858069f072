"""data_prep.tokenize_corpus: documents come back, held-out documents, tokenizers of other kinds, bad input."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_prep import dedup_and_split, tokenize_corpus, tokenize_shards
from data_prep.corpus_shards import Counts, read_documents
from data_prep.encoders import open_encoder
from data_prep.formats import Document
from megatron_a2d.data.indexed_dataset import TokenFile, read_metadata
from megatron_a2d.utils.errors import UserError
from tests.unit import stdlib_tokenizer
from tests.unit.stdlib_tokenizer import VOCAB_SIZE, problem, tokenize, write_jsonl

texts = stdlib_tokenizer.texts
corpus = stdlib_tokenizer.corpus
tokenizer = stdlib_tokenizer.tokenizer


def is_held_out(text: str, fraction: float) -> bool:
    return bool(
        dedup_and_split.is_held_out(
            np.frombuffer(tokenize_shards.digest(text.encode()), dtype="<u8").reshape(1, 2), fraction
        )[0]
    )


def test_documents_come_back(corpus, texts, tokenizer, tmp_path):
    prefix = tmp_path / "deep" / "c"
    tokenize("--input", corpus, "--tokenizer", tokenizer, "--output-prefix", prefix, "--valid-fraction", 0)
    assert sorted(path.name for path in prefix.parent.iterdir()) == [
        "c.bin", "c.idx", "c.json", "c.report.json", "c.sums"
    ]  # fmt: skip
    file, encoder = TokenFile(prefix, VOCAB_SIZE - 8), open_encoder(tokenizer, append_eod=True, workers=1)
    assert file.num_documents == len(texts) and file.dtype == np.uint16
    for number, text in enumerate(texts):
        tokens = file.document(number).tolist()
        assert tokens[-1] == encoder.eod_token_id
        assert encoder.decode(tokens[:-1]) == text
    described = {
        "tokenizer": str(tokenizer), "vocab_size": VOCAB_SIZE - 8, "eod_token_id": encoder.eod_token_id,
        "documents": len(texts), "tokens": file.num_tokens, "max_token_id": encoder.eod_token_id, "max_token_document": 0,
    }  # fmt: skip
    assert described.items() <= read_metadata(prefix).items()
    assert read_metadata(tmp_path / "none") is None


def test_held_out_documents(corpus, texts, tokenizer, tmp_path):
    tokenize(
        "--input",
        corpus,
        "--tokenizer",
        tokenizer,
        "--output-prefix",
        tmp_path / "c",
        "--valid-fraction",
        0.3,
    )
    encoder = open_encoder(tokenizer, append_eod=False, workers=1)

    def documents(prefix: Path) -> list[str]:
        file = TokenFile(prefix)
        return [encoder.decode(file.document(n)[:-1].tolist()) for n in range(file.num_documents)]

    train, valid = documents(tmp_path / "c_train"), documents(tmp_path / "c_valid")
    assert train == [text for text in texts if not is_held_out(text, 0.3)]
    assert valid == [text for text in texts if is_held_out(text, 0.3)]
    assert not set(train) & set(valid)
    assert 0.2 < len(valid) / len(texts) < 0.4
    # A smaller fraction holds out a part of the same documents.
    assert all(is_held_out(text, 0.3) for text in texts if is_held_out(text, 0.1))
    assert is_held_out("hello", 0.498) and not is_held_out("hello", 0.497)  # as on every machine, for ever


def test_output_does_not_depend_on_workers_or_batches(corpus, tokenizer, tmp_path, monkeypatch):
    arguments = ["--input", str(corpus), "--tokenizer", str(tokenizer), "--output-prefix", "out"]
    directories = [tmp_path / name for name in ("default", "processes", "single")]
    for directory in directories:
        directory.mkdir()
    # The library's threads start once in a process, so another number of them needs another process.
    environment = {**os.environ, "PYTHONPATH": str(Path(tokenize_corpus.__file__).parents[1])}
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "data_prep.tokenize_corpus",
        *arguments,
        "--workers",
        "3",
    ]
    subprocess.run(command, check=True, cwd=directories[1], env=environment, timeout=600)
    monkeypatch.chdir(directories[0])
    tokenize(*arguments, "--workers", 1)
    monkeypatch.chdir(directories[2])
    monkeypatch.setattr(tokenize_shards, "batches", lambda documents: ([document] for document in documents))
    tokenize(*arguments)
    outputs = [
        {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "out.report.json"}
        for directory in directories
    ]
    assert len(outputs[0]) == 8 and outputs[0] == outputs[1] == outputs[2]


def test_batches_bound_what_is_held():
    documents = [Document(b"x" * size, size) for size in (5, 5, 5, 30, 1)]
    sizes = [[len(document.text) for document in batch] for batch in tokenize_shards.batches(iter(documents), 10)]
    assert sizes == [[5, 5], [5, 30], [1]]


def test_text_files_keys_and_end_of_document(tokenizer, tmp_path):
    (tmp_path / "one.txt").write_text("def f():\n    return 1\n")
    other = write_jsonl(tmp_path / "two.jsonl", ["x = 1", "  \n", "y = 2"], key="content")
    (tmp_path / "two.jsonl").write_text("\ufeff" + other.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    prefix = tmp_path / "c"
    tokenize(
        "--input", tmp_path / "one.txt", "--input", other, "--json-keys", "content", "--tokenizer", tokenizer / "tokenizer.json",
        "--output-prefix", prefix, "--no-append-eod", "--valid-fraction", 0,
    )  # fmt: skip
    encoder, file = open_encoder(tokenizer, append_eod=False, workers=1), TokenFile(prefix)
    found = [encoder.decode(file.document(n).tolist()) for n in range(file.num_documents)]
    assert found == ["def f():\n    return 1\n", "x = 1", "y = 2"]
    assert read_metadata(prefix)["eod_token_id"] is None
    counts = Counts()
    assert [document.text for document in read_documents([other], "content", counts)] == ["x = 1", "y = 2"]
    assert counts == Counts(documents=2, empty=1)


def test_wide_vocabulary_takes_more_bytes(tmp_path):
    """Megatron's choice of type follows the largest id that the tokenizer can give."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"near": 0, "far": 70000, "<|endoftext|>": 1}, unk_token="near"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("near far near")
    arguments = ["--input", tmp_path / "a.txt", "--tokenizer", tmp_path, "--output-prefix", tmp_path / "c"]
    tokenize(*arguments, "--valid-fraction", 0)
    file = TokenFile(tmp_path / "c")
    assert file.dtype == np.int32 and read_metadata(tmp_path / "c")["vocab_size"] == 70001
    assert file.document(0).tolist() == [0, 70000, 0, 1]


def test_truncation_and_padding_of_the_tokenizer_are_not_applied(corpus, tokenizer, tmp_path):
    from tokenizers import Tokenizer

    altered = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    altered.enable_truncation(4)
    altered.enable_padding(length=16)
    altered.save(str(tmp_path / "tokenizer.json"))
    long = "x = 1\n" * 50
    plain = open_encoder(tokenizer, append_eod=True, workers=1).encode([long, "x"])
    assert open_encoder(tmp_path, append_eod=True, workers=1).encode([long, "x"]) == plain
    assert len(plain[0]) > 16 and len(plain[1]) == 2


def test_sentencepiece(texts, tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "lines.txt").write_text("".join(texts), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "lines.txt"), model_prefix=str(tmp_path / "sp"), vocab_size=500, minloglevel=2
    )
    (tmp_path / "a.txt").write_text("def f(self):")
    for name in ("sp.model", "."):
        encoder = open_encoder(tmp_path / name, append_eod=True, workers=2)
        assert encoder.vocab_size == 500 and encoder.eod_token_id == 2
    prefix = tmp_path / "c"
    tokenize(
        "--input",
        tmp_path / "a.txt",
        "--tokenizer",
        tmp_path / "sp.model",
        "--output-prefix",
        prefix,
        "--valid-fraction",
        0,
    )
    tokens = TokenFile(prefix).document(0).tolist()
    assert tokens[-1] == 2 and encoder.decode(tokens[:-1]) == "def f(self):"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"{oops", "not valid JSON"),
        (b"[1]", "holds a JSON list"),
        (b'{"txt": "a"}', "no key 'text' (did you mean txt?) (set the text's key with --json-keys)"),
        (b'{"body": "a", "id": 1}', "no key 'text'; the line has body, id"),
        (b'{"text": 5}', "'text' is int, not a string"),
        (b'{"text": null}', "'text' is NoneType, not a string"),
        (b'{"text": "\\ud800"}', "an unpaired surrogate"),
        (b'{"text": "\xff"}', "not UTF-8 (byte 10 is 0xff)"),
    ],
)
def test_bad_lines_name_file_and_line_and_leave_nothing(tokenizer, tmp_path, line, words):
    path = tmp_path / "c.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    message = problem(
        tokenize_corpus.main, "--input", path, "--tokenizer", tokenizer, "--output-prefix", tmp_path / "out"
    )
    assert message.startswith(f"{path}:3: ") and words in message
    assert [entry.name for entry in tmp_path.iterdir()] == ["c.jsonl"]


def test_bad_inputs(corpus, tokenizer, tmp_path):
    def line(path: object, *more: object) -> str:
        rest = more or ("--tokenizer", tokenizer)
        return problem(tokenize_corpus.main, "--input", path, "--output-prefix", tmp_path / "out", *rest)

    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "blank.jsonl").write_text('\n{"text": " "}\n')
    (tmp_path / "table.csv").write_text("a")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    assert "does not exist" in line(tmp_path / "missing.jsonl")
    assert "is empty" in line(tmp_path / "empty.jsonl")
    assert "holds no text at all" in line(tmp_path / "blank.jsonl")
    assert "unknown file format" in line(tmp_path / "table.csv")
    (tmp_path / "hollow").mkdir()
    assert "holds no .jsonl, .jsonl.gz" in line(tmp_path / "hollow")
    assert "matches no file" in line(tmp_path / "x*.jsonl")
    assert "not UTF-8 (byte 3 is 0xe9)" in line(tmp_path / "latin.txt")
    missing = line(corpus, "--tokenizer", tmp_path / "none")
    assert f"{tmp_path / 'none'}: does not exist" in missing and missing.count("none") == 1
    os.mkfifo(tmp_path / "pipe.json")
    assert "pipe.json: is not a regular file" in line(corpus, "--tokenizer", tmp_path / "pipe.json")
    assert "contains neither a tokenizer.json nor a .model" in line(corpus, "--tokenizer", tmp_path)
    assert "neither a .json nor a .model" in line(corpus, "--tokenizer", tmp_path / "table.csv")
    (tmp_path / "bad.json").write_text("{}")
    assert "bad.json: the tokenizer cannot be read" in line(corpus, "--tokenizer", tmp_path / "bad.json")
    (tmp_path / "bad.model").write_text("{}")
    assert "bad.model: cannot be read" in line(corpus, "--tokenizer", tmp_path / "bad.model")
    assert "--valid-fraction 1.0" in line(corpus, "--tokenizer", tokenizer, "--valid-fraction", 1)
    assert "--workers 0" in line(corpus, "--tokenizer", tokenizer, "--workers", 0)
    one = write_jsonl(tmp_path / "one.jsonl", ["only one"])
    assert "out_valid would get none of the 1 documents" in line(one)
    with pytest.raises(UserError) as caught:
        tokenize(
            "--input",
            tmp_path / "x.txt",
            tmp_path / "y.txt",
            "--tokenizer",
            tokenizer,
            "--output-prefix",
            "o",
        )
    assert len(caught.value.problems) == 2
    assert not [entry for entry in tmp_path.iterdir() if "out" in entry.name]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "--valid-fraction 0.02: .*_valid would get none of the 21 documents"),
        (("--valid-fraction", 0.999999), "--valid-fraction 0.999999: .*_train would get none of the 21 documents"),
        (("--min-tokens", 1000), "--min-tokens, --max-tokens: exclude every document"),
    ],
)
def test_what_would_be_empty_is_refused_before_anything_is_written(flags, message, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenize_corpus, "open_writers", lambda *a: pytest.fail("token files were opened"))
    path = write_jsonl(tmp_path / "c.jsonl", [f"text {number}" for number in range(21)])
    prefix = tmp_path / "new" / "directory" / "out"
    arguments = ("--input", path, "--tokenizer", tokenizer, "--output-prefix", prefix, *flags)
    assert re.match(message, problem(tokenize_corpus.main, *arguments))
    assert list(tmp_path.iterdir()) == [path]


def test_existing_output_is_not_overwritten(corpus, tokenizer, tmp_path):
    arguments = ["--input", corpus, "--tokenizer", tokenizer, "--output-prefix", tmp_path / "c"]
    tokenize(*arguments)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert "c_train.bin already exists" in problem(tokenize_corpus.main, *arguments)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_tokenizer_without_end_of_document(corpus, tokenizer, tmp_path):
    contents = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))
    contents["added_tokens"] = [token for token in contents["added_tokens"] if token["content"] != "<|endoftext|>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(contents))
    with pytest.raises(UserError, match="has no end-of-document token"):
        open_encoder(tmp_path, append_eod=True, workers=1)
    assert open_encoder(tmp_path, append_eod=False, workers=1).eod_token_id is None
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|im_end|>"}}')
    encoder = open_encoder(tmp_path, append_eod=True, workers=1)
    assert encoder.encode(["<|im_end|>"]) == [[encoder.eod_token_id] * 2]


def test_command_line_exits_with_2(tmp_path):
    command = [sys.executable, "-W", "ignore", "-m", "data_prep.tokenize_corpus", "--input", "no.jsonl"]
    command += ["--tokenizer", "none", "--output-prefix", str(tmp_path / "c")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 2 and not list(tmp_path.iterdir())
    assert re.fullmatch(r"error: --tokenizer none: .*\n", result.stderr)
