"""The fast encoder gigatoken: the reference's ids, or the reference instead."""

from __future__ import annotations

import json
import random
import sys
import unicodedata

import numpy as np
import pytest

from data_prep import gigatoken_encoder, tokenize_shards
from data_prep.corpus_shards import Shard, plan_shards
from data_prep.encoders import END_OF_TEXT, Encoded, open_encoder
from data_prep.memory_limits import DEFAULT_LIMITS
from tests.unit import corpus_kinds
from tests.unit.corpus_kinds import TEXTS, contents, problem, run, write_jsonl, write_kind

tokenizer = corpus_kinds.tokenizer


def test_another_encoder_does_not_take_up_old_shards(tokenizer, tmp_path):
    pytest.importorskip("gigatoken")
    (shard,) = plan_shards([write_kind(tmp_path, ".jsonl", TEXTS)])
    keys = {
        tokenize_shards.key_of(
            tokenize_shards.Job(tmp_path, name, True, eod, "text", 1, None, False, DEFAULT_LIMITS, "sum"),
            shard,
        )
        for name in ("gigatoken", "reference")
        for eod in (0, 1)
    }
    assert len(keys) == 4


def test_gigatoken_gives_the_reference_ids(tokenizer):
    pytest.importorskip("gigatoken")
    texts = [*map(str.encode, gigatoken_encoder.PROBES), *map(str.encode, TEXTS)]
    for append_eod in (True, False):
        slow = open_encoder(tokenizer, append_eod, workers=1)
        chosen = gigatoken_encoder.choose(tokenizer, slow, "auto", texts)
        assert chosen.name == "gigatoken" and f"{len(texts) + len(gigatoken_encoder.PROBES)} texts" in chosen.reason
        fast = gigatoken_encoder.GigatokenEncoder(tokenizer / "tokenizer.json", slow)
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


def test_documents_that_are_encoded_together_have_their_own_ids(tokenizer, monkeypatch):
    """Also next to others that spell the end of a document, or that the reference must encode."""
    pytest.importorskip("gigatoken")
    texts = ["", "a", "  b ", "u\u0308 c", f"d {END_OF_TEXT}", "\n", "<|endoftext|", f"{END_OF_TEXT}<|", "e\u0301", "f"]
    draw = random.Random(0)
    for append_eod in (True, False):
        slow = open_encoder(tokenizer, append_eod, workers=1)
        fast = gigatoken_encoder.GigatokenEncoder(tokenizer / "tokenizer.json", slow)
        assert fast.delimiter() == (END_OF_TEXT.encode() if append_eod else None)
        counted = _Counted(fast._tokenizer)
        monkeypatch.setattr(fast, "_tokenizer", counted)
        for count in (1, 2, 3, 10, 40):
            some = [text.encode() for text in draw.choices(texts, k=count)]
            one, other = fast.encode_batch(some), slow.encode_batch(some)
            assert one.ids.tolist() == other.ids.tolist() and one.lengths.tolist() == other.lengths.tolist()
        counted.calls = 0
        fast.encode_batch([b"x"] * 40)
        assert counted.calls == (1 if append_eod else 40)


class _Counted:
    """gigatoken's tokenizer, whose calls are counted."""

    def __init__(self, tokenizer):
        self._tokenizer, self.calls = tokenizer, 0

    def encode(self, text):
        self.calls += 1
        return self._tokenizer.encode(text)


@pytest.mark.parametrize(
    ("token", "given"),
    [
        ("", True), ("<|end|>", True), ("x<", False), (f"a{END_OF_TEXT[:6]}", False), (f"a{END_OF_TEXT}b", False),
        ("strips", False), ("single_word", False),
    ],
)  # fmt: skip
def test_an_end_that_may_be_read_otherwise_delimits_nothing(token, given, tokenizer, tmp_path):
    content = json.loads((tokenizer / "tokenizer.json").read_text())
    (end,) = (item for item in content["added_tokens"] if item["content"] == END_OF_TEXT)
    if token in ("strips", "single_word"):
        end["lstrip" if token == "strips" else token] = True
    elif token:
        content["added_tokens"].append({**end, "id": 400, "content": token})
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert open_encoder(tmp_path, append_eod=True, workers=1).delimiter() == (END_OF_TEXT.encode() if given else None)


def test_whether_a_text_is_normal_is_seen_around_its_other_letters():
    """The letters near one that is not ASCII decide, so every order of marks, letters and ASCII ones is tried."""
    draw = random.Random(0)
    marks = [c for c in map(chr, range(0x80, 0x3200)) if unicodedata.combining(c) or unicodedata.decomposition(c)]
    letters = ["e", "=", "\n", "\u00e9", "\u4f60", "\U0001f468", "\u0378", *marks]
    weights = [100] * 6 + [20] + [3] * len(marks)
    texts = ["".join(draw.choices(letters, weights, k=5)) for _ in range(4000)]
    expected = [
        unicodedata.is_normalized("NFC", text) and not any(unicodedata.category(letter) == "Cn" for letter in text)
        for text in texts
    ]
    assert 1000 < sum(expected) < 3500
    assert [gigatoken_encoder.is_normal(text.encode()) for text in texts] == expected
    few = [number for number, normal in enumerate(expected) if not normal][:60:20]
    some = [text for number, text in enumerate(texts) if expected[number] or number in few]
    for part in (texts, some, few and [texts[few[0]]], [], ["a", "\u0301"], ["\u0301"]):
        assert gigatoken_encoder.not_normal([text.encode() for text in part]) == [
            number
            for number, text in enumerate(part)
            if not unicodedata.is_normalized("NFC", text)
            or any(unicodedata.category(letter) == "Cn" for letter in text)
        ]


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
