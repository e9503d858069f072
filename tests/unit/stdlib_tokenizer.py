"""A tokenizer trained on a few modules of the standard library, and data_prep's commands as tests call them.

A test file binds the fixture as its own (`tokenizer = stdlib_tokenizer.tokenizer`), and `texts` and `corpus` with it.
"""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

import pytest

from data_prep import stdlib_corpus, tokenize_corpus, train_tokenizer
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


def tokenize(*arguments: object) -> None:
    tokenize_corpus.main([str(argument) for argument in arguments])


def problem(function, *arguments: object) -> str:
    """The one line that a command gives."""
    with pytest.raises(UserError) as caught:
        function([str(argument) for argument in arguments])
    (line,) = caught.value.problems
    assert "\n" not in line
    return line
