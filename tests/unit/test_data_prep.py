"""The command lines of data_prep: corpus, tokenizer, token files, inspection; and what they say to bad input."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from data_prep import dedup_and_split, inspect_dataset, stdlib_corpus, tokenize_corpus, tokenize_shards, train_tokenizer
from data_prep.corpus_shards import Counts, read_documents
from data_prep.encoders import open_encoder
from data_prep.formats import Document
from megatron_a2d.data.indexed_dataset import IndexedDatasetBuilder, TokenFile, read_metadata
from megatron_a2d.utils.errors import UserError

VOCAB_SIZE = 600


def write_jsonl(path: Path, texts: list[str], key: str = "text") -> Path:
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """A few real modules in documents."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [root / name for name in ("argparse.py", "json/decoder.py", "textwrap.py", "heapq.py")]
    return [piece for path in files for piece in stdlib_corpus.split_text(path.read_text(encoding="utf-8"), 1000)]


@pytest.fixture(scope="session")
def corpus(texts, tmp_path_factory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", texts)


@pytest.fixture(scope="session")
def tokenizer(corpus, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    train_tokenizer.main(["--input", str(corpus), "--vocab-size", str(VOCAB_SIZE), "--out", str(out)])
    return out


def is_held_out(text: str, fraction: float) -> bool:
    return bool(
        dedup_and_split.is_held_out(
            np.frombuffer(tokenize_shards.digest(text.encode()), dtype="<u8").reshape(1, 2), fraction
        )[0]
    )


def tokenize(*arguments: object) -> None:
    tokenize_corpus.main([str(argument) for argument in arguments])


def problem(function, *arguments: object) -> str:
    """The one line that a command gives."""
    with pytest.raises(UserError) as caught:
        function([str(argument) for argument in arguments])
    (line,) = caught.value.problems
    assert "\n" not in line
    return line


# ---- stdlib_corpus


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


# ---- train_tokenizer


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


# ---- tokenize_corpus


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
    assert "does not exist" in line(corpus, "--tokenizer", tmp_path / "none")
    assert "tokenizer.json does not exist" in line(corpus, "--tokenizer", tmp_path)
    assert "neither a .json nor a .model" in line(corpus, "--tokenizer", tmp_path / "table.csv")
    (tmp_path / "bad.json").write_text("{}")
    assert "bad.json: the tokenizer cannot be read" in line(corpus, "--tokenizer", tmp_path / "bad.json")
    (tmp_path / "bad.model").write_text("{}")
    assert "bad.model: cannot be read" in line(corpus, "--tokenizer", tmp_path / "bad.model")
    assert "--valid-fraction 1.0" in line(corpus, "--tokenizer", tokenizer, "--valid-fraction", 1)
    assert "--workers 0" in line(corpus, "--tokenizer", tokenizer, "--workers", 0)
    one = write_jsonl(tmp_path / "one.jsonl", ["only one"])
    assert "out_valid gets no token of the 1 documents" in line(one)
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


# ---- inspect_dataset


def test_inspect_shows_contents_and_masked_samples(corpus, texts, tokenizer, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    prefix = tmp_path / "c"
    tokenize("--input", corpus, "--tokenizer", tokenizer, "--output-prefix", prefix, "--valid-fraction", 0)
    capsys.readouterr()
    inspect_dataset.main(["--data-path", str(prefix), "--times", "0.5", "--show", "3", "--seq-length", "200"])
    out = capsys.readouterr().out
    assert re.search(rf"documents +│ +{len(texts):,} ", out) and "uint16" in out and "█" in out
    masked = [int(count) for count in re.findall(r"sample \d: t = 0.500, (\d+) of 200 tokens masked", out)]
    assert len(masked) == 3 and all(70 < count < 130 for count in masked) and "▒" in out
    inspect_dataset.main(["--data-path", str(prefix), "--times", "0", "--show", "1"])
    assert "▒" not in capsys.readouterr().out
    inspect_dataset.main(["--data-path", str(prefix), "--tokenizer", str(tokenizer), "--show", "1"])
    assert re.search(r"t = 0\.\d+, \d+ of 256 tokens masked", capsys.readouterr().out)
    inspect_dataset.main(["--data-path", str(prefix), "--times", "0.1", "0.9", "--show", "1"])
    few, many = (int(count) for count in re.findall(r"t = 0\.\d+, (\d+) of 256", capsys.readouterr().out))
    assert few < 60 < 180 < many
    inspect_dataset.main(["--data-path", str(prefix), "--show", "0"])
    out = " ".join(capsys.readouterr().out.split())
    assert "all checksums match; all end with token" in out
    (tmp_path / "c.json").unlink()
    inspect_dataset.main(["--data-path", str(prefix)])
    assert "set it with --tokenizer" in capsys.readouterr().out


def test_masked_text_hides_exactly_the_masked_tokens(tokenizer):
    encoder = open_encoder(tokenizer, append_eod=False, workers=1)
    tokens = np.array(encoder.encode(["1234"])[0])
    text = inspect_dataset.masked_text(tokens, np.array([False, True, True, False]), encoder)
    assert text.plain == "1▒▒4"


def test_inspect_bad_input(corpus, tokenizer, tmp_path, monkeypatch):
    builder = IndexedDatasetBuilder(str(tmp_path / "t.bin"), dtype=np.int32)
    builder.add_document(np.array([1, 2, VOCAB_SIZE]), [3])
    builder.finalize(str(tmp_path / "t.idx"))
    prefix = ["--data-path", tmp_path / "t"]
    inspect = inspect_dataset.main
    assert "document 0 holds token id 600" in problem(inspect, *prefix, "--tokenizer", tokenizer)
    assert "--times 1.5" in problem(inspect, *prefix, "--times", 0.5, 1.5)
    assert "--show -1" in problem(inspect, *prefix, "--show", -1)
    assert "--seq-length 0" in problem(inspect, *prefix, "--seq-length", 0)
    assert "there is no u.idx" in problem(inspect, "--data-path", tmp_path / "u")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "matplotlib is not installed" in problem(inspect, *prefix, "--show", 0, "--plot", tmp_path / "p.png")


def test_inspect_plots(tmp_path):
    pytest.importorskip("matplotlib")
    builder = IndexedDatasetBuilder(str(tmp_path / "t.bin"), dtype=np.int32)
    for length in (1, 0, 5, 300):
        builder.add_document(np.arange(length), [length])
    builder.finalize(str(tmp_path / "t.idx"))
    prefix = ["--data-path", str(tmp_path / "t"), "--show", "0"]
    inspect_dataset.main([*prefix, "--plot", str(tmp_path / "p.png")])
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert "unknown image format" in problem(inspect_dataset.main, *prefix, "--plot", tmp_path / "p.jpg")
