"""data_prep.stdlib_corpus and data_prep.train_tokenizer: split documents, special tokens, determinism, bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from data_prep import stdlib_corpus, train_tokenizer
from data_prep.encoders import open_encoder
from tests.unit import stdlib_tokenizer
from tests.unit.stdlib_tokenizer import VOCAB_SIZE, problem, write_jsonl

texts = stdlib_tokenizer.texts
corpus = stdlib_tokenizer.corpus
tokenizer = stdlib_tokenizer.tokenizer


def test_split_text_keeps_every_character_and_cuts_at_definitions():
    text = "import a\n\n# about f\n@cache\ndef f():\n    return 1\n\n\nclass C:\n    x = 1\n\n    def g(self):\n        pass\n"
    assert stdlib_corpus.split_text(text, 1000) == [text]
    pieces = stdlib_corpus.split_text(text, 45)
    assert pieces == [
        "import a\n\n",
        "# about f\n@cache\ndef f():\n    return 1\n\n\n",
        "class C:\n    x = 1\n\n",
        "    def g(self):\n        pass\n",
    ]
    assert "".join(stdlib_corpus.split_text(text, 1)) == text
    assert stdlib_corpus.split_text("", 10) == []
    assert stdlib_corpus.split_text("x" * 30 + "\ny\n", 10) == ["x" * 30 + "\n", "y\n"]


@pytest.mark.parametrize("max_chars", [100, 1000, 4000])
def test_split_text_on_real_modules(max_chars):
    for name in ("argparse.py", "typing.py", "pydoc_data/topics.py", "tarfile.py"):
        text = (Path(sysconfig.get_paths()["stdlib"]) / name).read_text(encoding="utf-8")
        pieces = stdlib_corpus.split_text(text, max_chars)
        assert "".join(pieces) == text
        assert all(len(piece) <= max_chars or piece.count("\n") <= 1 for piece in pieces)


def test_stdlib_corpus_of_a_small_library(tmp_path, monkeypatch, capsys):
    library = tmp_path / "lib"
    files = {
        "b.py": "x = 1\n", "a/c.py": "y = 2\n", "a/__init__.py": "", "data.txt": "no", "test/t.py": "no", "a/tests/t.py": "no",
        "site-packages/p.py": "no", "a/__pycache__/q.py": "no", "idlelib/idle_test/i.py": "no", "a/test.py": "z = 'tests'\n",
    }  # fmt: skip
    for name, content in files.items():
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        (library / name).write_text(content)
    (library / "latin.py").write_bytes(b"# coding: latin-1\ns = '\xe9'\n")
    (library / "mark.py").write_bytes(b"\xef\xbb\xbfw = 3\r\n")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(library)})
    stdlib_corpus.main(["--out", str(tmp_path / "out.jsonl")])
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert lines == [
        {"text": "y = 2\n", "source": "a/c.py"},
        {"text": "z = 'tests'\n", "source": "a/test.py"},
        {"text": "x = 1\n", "source": "b.py"},
        {"text": "w = 3\n", "source": "mark.py"},
    ]
    assert "1 skipped" in " ".join(capsys.readouterr().err.split())


def test_special_tokens_are_qwen3s_in_order(tokenizer):
    specials = [*train_tokenizer.CONTROL_TOKENS, *train_tokenizer.MARKUP_TOKENS]
    # Qwen3: 151643 <|endoftext|> ... 151656 <|video_pad|>, 151657 <tool_call> ... 151668 </think>
    assert len(specials) == 151668 - 151643 + 1 and len(train_tokenizer.CONTROL_TOKENS) == 151656 - 151643 + 1
    encoder = open_encoder(tokenizer, append_eod=True, workers=1)
    assert encoder.vocab_size == VOCAB_SIZE - 8
    first = VOCAB_SIZE - 8 - len(specials)
    assert encoder.encode(["".join(specials)]) == [[*range(first, VOCAB_SIZE - 8), first]]
    assert encoder.eod_token_id == first


def test_any_text_survives(tokenizer, texts):
    encoder = open_encoder(tokenizer, append_eod=False, workers=1)
    for text in [*texts, "naïve ☃ 𝄞 123 \t\r\n   x", "I'LL  \n\n  don't", "\x00\x7f"]:
        assert encoder.decode(encoder.encode([text])[0]) == text
    assert len(encoder.encode(["123"])[0]) == 3  # digits one by one, as Qwen's pattern has it


def test_training_is_deterministic(corpus, tokenizer, tmp_path):
    command = [
        sys.executable,
        "-m",
        "data_prep.train_tokenizer",
        "--input",
        str(corpus),
        "--vocab-size",
        str(VOCAB_SIZE),
    ]
    subprocess.run(
        [*command, "--out", str(tmp_path / "again")],
        check=True,
        env={**os.environ, "RAYON_NUM_THREADS": "3"},
        timeout=600,
    )
    names = sorted(path.name for path in tokenizer.iterdir())
    assert names == ["tokenizer.json", "tokenizer_config.json"]
    for name in names:
        assert (tokenizer / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_transformers_loads_the_directory(tokenizer, texts):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tokenizer)
    ours = open_encoder(tokenizer, append_eod=False, workers=1)
    sample = [*texts[:20], "<think>a</think><|im_end|>"]
    assert [theirs.encode(text, add_special_tokens=False) for text in sample] == ours.encode(sample)
    assert len(theirs) == VOCAB_SIZE - 8
    assert theirs.eos_token == theirs.pad_token == "<|endoftext|>"
    assert theirs.decode(theirs.encode("<think>x<|im_end|>"), skip_special_tokens=True) == "<think>x"


def test_train_tokenizer_bad_input(corpus, tmp_path):
    out = ["--out", tmp_path / "out"]
    train = train_tokenizer.main
    assert "--vocab-size 280: too small" in problem(train, "--input", corpus, "--vocab-size", 280, *out)
    assert "at most 4,194,304" in problem(train, "--input", corpus, "--vocab-size", 10**9, *out)
    assert "--reserved-tokens 0" in problem(train, "--input", corpus, "--reserved-tokens", 0, *out)
    small = write_jsonl(tmp_path / "small.jsonl", ["ab ab"])
    assert "this text yields only" in problem(train, "--input", small, *out)
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "a"}\n{oops\n')
    assert f"{broken}:2: not valid JSON" in problem(train, "--input", broken, *out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.jsonl", "small.jsonl"]
    assert "(set the text's key with --json-keys)" in problem(train, "--input", small, "--json-keys", "text", "q", *out)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    assert "already exists" in problem(train, "--input", corpus, *out)
