"""gigatoken encoder: a byte-level BPE in Rust, many times faster than tokenizers, used where the ids are the same.

It is used only after a comparison with the reference on documents sampled across the corpus, and on a few texts on
which tokenizers differ. If one id differs, if gigatoken does not support the tokenizer, or if it is not installed (the
extra `data`), the reference encodes.
"""

from __future__ import annotations

import functools
import os
import sys
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from data_prep.corpus_shards import Counts, Shard, read_file_range
from data_prep.encoders import END_OF_TEXT, Encoded, Encoder, open_encoder, token_dtype, tokenizer_file
from data_prep.memory_limits import DEFAULT_LIMITS, Limits
from megatron_a2d.utils.errors import UserError

Choice = Literal["auto", "gigatoken", "reference"]
SAMPLE_SHARDS, SAMPLE_BYTES = 32, 1 << 19  # at most this many shards, and this much text in all
# Special tokens, normal forms, white space, digits, contractions, control characters, scripts, emoji, lengths.
PROBES = (
    "", " ", "\n\n\n", "  \n \t x", f"a{END_OF_TEXT}b", "<|im_start|>user\n<|im_end|>", "<think>x</think>",
    "caf\u00e9 cafe\u0301 \ufb01 \u212b", "1234567890 3.14e-10 0x1F", "I'LL don't WE'VE \u2019s",
    "\x00\x01\x7f\u200b\ufeff", "\u4f60\u597d\u3002\u0628\u0631 \u0939\u093f \u0e44\u0e17\u0e22",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f3f3\ufe0f", "snake_case CamelCase a.b->c() {};//#!",
    "https://a.b/c?d=e&f=%20", "a" * 3000, "ab " * 1000, "\u00a0\u3000\r\n\r x",
    "\u07f3\u07fd e\u0323\u0302",
)  # fmt: skip


class GigatokenEncoder:
    """The gigatoken encoder; `reference` opens the encoder whose ids it must reproduce, without end-of-document tokens.

    Documents that Unicode normal form NFC would change, or may change under a newer Unicode than Python's, are encoded
    by the reference: the two libraries implement different Unicode versions, order some combining marks differently
    (U+07F3 before U+07FD), and compose different letters (gigatoken 0.10.0 those of Unicode 16, as U+16D67 U+16D67).
    """

    name = "gigatoken"

    def __init__(
        self, path: Path, vocab_size: int, eod_token_id: int | None, workers: int, reference: Callable[[], Encoder]
    ):
        os.environ["RAYON_NUM_THREADS"] = str(workers)
        import gigatoken

        load: Any = gigatoken.Tokenizer.from_sentencepiece if path.suffix == ".model" else gigatoken.Tokenizer
        self._tokenizer = load(str(path))
        self._parallel = workers > 1
        self.vocab_size, self.eod_token_id = vocab_size, eod_token_id
        self._reference = functools.cache(reference)

    def encode_batch(self, texts: list[bytes]) -> Encoded:
        changed = [number for number, text in enumerate(texts) if not is_normal(text)]
        if not changed:
            return self._fast(texts)
        fast = self._fast([b"" if number in set(changed) else text for number, text in enumerate(texts)])
        parts = np.split(fast.ids, np.cumsum(fast.lengths)[:-1])
        ids, lengths = self._reference().encode_batch([texts[number] for number in changed])
        suffix = np.array([] if self.eod_token_id is None else [self.eod_token_id], dtype=ids.dtype)
        for number, part in zip(changed, np.split(ids, np.cumsum(lengths)[:-1]), strict=True):
            parts[number] = np.concatenate([part, suffix])
        return Encoded(np.concatenate(parts), np.array([len(part) for part in parts], dtype=np.int64))

    def _fast(self, texts: list[bytes]) -> Encoded:
        layout = self._tokenizer.encode_batch(texts, parallel=self._parallel).layout
        offsets = np.asarray(layout.offsets)
        ids = np.asarray(layout.content.data)[offsets[0] : offsets[-1]].astype(token_dtype(self.vocab_size))
        lengths = np.diff(offsets).astype(np.int64)
        if self.eod_token_id is None:
            return Encoded(ids, lengths)
        return Encoded(np.insert(ids, np.cumsum(lengths), self.eod_token_id), lengths + 1)

    def encode(self, texts: list[str]) -> list[list[int]]:
        ids, lengths = self.encode_batch([text.encode("utf-8") for text in texts])
        return [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])]

    def decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids).decode("utf-8", "replace")


def is_normal(text: bytes) -> bool:
    """Whether a text is in NFC, and has only characters that Python's version of Unicode knows."""
    if text.isascii():
        return True
    characters = text.decode("utf-8")
    return unicodedata.is_normalized("NFC", characters) and not _holds_unknown(characters)


def _holds_unknown(characters: str) -> bool:
    """Whether a code point is unassigned in Python's Unicode version: a newer version may compose it with others."""
    codes = np.frombuffer(characters.encode("utf-32-le"), dtype="<u4")
    return bool(_unknown()[codes].any())


@functools.cache
def _unknown() -> np.ndarray:
    """[code points] bool."""
    return np.fromiter((unicodedata.category(chr(code)) == "Cn" for code in range(sys.maxunicode + 1)), dtype=bool)


class Chosen(NamedTuple):
    """The outcome of a comparison."""

    name: str  # "gigatoken" or "reference"
    reason: str  # one line for the report


def choose(tokenizer: Path, reference: Encoder, requested: Choice, texts: Sequence[bytes]) -> Chosen:
    """Whether gigatoken may encode a corpus of which `texts` are a sample."""
    if requested == "reference":
        return Chosen("reference", f"{reference.name}, as requested")
    problem, compared = _compare(tokenizer, reference, [*map(str.encode, PROBES), *texts])
    if problem and requested == "gigatoken":
        raise UserError(f"--encoder gigatoken: {problem}; leave the flag out to encode with {reference.name}")
    if problem:
        return Chosen("reference", f"{reference.name}, because {problem}")
    return Chosen("gigatoken", f"gigatoken, with the ids of {reference.name} on {compared}")


def _compare(tokenizer: Path, reference: Encoder, texts: list[bytes]) -> tuple[str, str]:
    """(why gigatoken cannot be used, or ''; what was compared)."""
    plain = open_encoder(tokenizer, append_eod=False, workers=1)
    try:
        fast = GigatokenEncoder(tokenizer_file(tokenizer), reference.vocab_size, None, 1, lambda: plain)
    except ImportError:
        return "gigatoken is not installed (in the clone, pip install --editable '.[data]')", ""
    # Its Rust code may also panic, which is not an Exception.
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        return f"gigatoken does not support this tokenizer ({' '.join(str(error).split())[:120]})", ""
    expected, found = plain.encode_batch(texts), fast.encode_batch(texts)
    if not np.array_equal(expected.lengths, found.lengths) or not np.array_equal(expected.ids, found.ids):
        bounds = np.cumsum(expected.lengths)[:-1]
        pairs = zip(
            texts, np.split(expected.ids, bounds), np.split(found.ids, np.cumsum(found.lengths)[:-1]), strict=True
        )
        text = next(text for text, ours, theirs in pairs if not np.array_equal(ours, theirs))
        return f"gigatoken gives different ids, for instance for {text[:40].decode('utf-8', 'ignore')!r}", ""
    return "", f"{len(texts)} texts, {len(expected.ids):,} tokens of this corpus"


def corpus_sample(shards: Sequence[Shard], json_key: str, limits: Limits = DEFAULT_LIMITS) -> list[bytes]:
    """The first documents of shards that are spread evenly over the corpus."""
    sample: list[bytes] = []
    count = min(len(shards), SAMPLE_SHARDS)
    for number in range(count):
        left = SAMPLE_BYTES // count
        for document in _documents(shards[number * len(shards) // count], json_key, limits):
            # Complete characters only: a UTF-8 sequence that was cut is dropped.
            sample.append(document[:left].decode("utf-8", "ignore").encode("utf-8"))
            left -= len(document)
            if left <= 0:
                break
    return sample


def _documents(shard: Shard, json_key: str, limits: Limits) -> Any:
    for file_range in shard.file_ranges:
        for document in read_file_range(file_range, json_key, Counts(), skip_invalid=True, limits=limits):
            yield document.data
