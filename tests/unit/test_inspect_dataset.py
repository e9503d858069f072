"""data_prep.inspect_dataset: contents, masked samples, plots, bad input."""

from __future__ import annotations

import re
import sys

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from data_prep import inspect_dataset
from data_prep.encoders import open_encoder
from tests.unit import stdlib_tokenizer
from tests.unit.stdlib_tokenizer import VOCAB_SIZE, problem, tokenize

texts = stdlib_tokenizer.texts
corpus = stdlib_tokenizer.corpus
tokenizer = stdlib_tokenizer.tokenizer


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
