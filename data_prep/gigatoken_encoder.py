"""gigatoken encoder: a byte-level BPE in Rust, many times faster than tokenizers, used where the ids are the same.

It is used only after a comparison with the reference on documents sampled across the corpus, and on a few texts on
which tokenizers differ. If one id differs, if gigatoken does not support the tokenizer, or if it is not installed (the
extra `data`), the reference encodes.
"""

from __future__ import annotations

import functools
import sys
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from data_prep.corpus_shards import Counts, Shard, read_file_range
from data_prep.encoders import END_OF_TEXT, Encoded, Encoder, token_dtype, tokenizer_file
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
    """The gigatoken encoder; `reference` opens the encoder whose ids it must reproduce.

    Documents that Unicode normal form NFC would change, or may change under a newer Unicode than Python's, are encoded
    by the reference: the two libraries implement different Unicode versions, order some combining marks differently
    (U+07F3 before U+07FD), and compose different letters (gigatoken 0.10.0 those of Unicode 16, as U+16D67 U+16D67).
    """

    name = "gigatoken"

    def __init__(self, path: Path, vocab_size: int, eod_token_id: int | None, reference: Callable[[], Encoder]):
        import gigatoken

        load: Any = gigatoken.Tokenizer.from_sentencepiece if path.suffix == ".model" else gigatoken.Tokenizer
        self._tokenizer = load(str(path))
        self.vocab_size, self.eod_token_id = vocab_size, eod_token_id
        self._end = np.array([] if eod_token_id is None else [eod_token_id], dtype=np.uint32)
        self._reference = functools.cache(reference)

    def encode_batch(self, texts: list[bytes]) -> Encoded:
        changed = {number: text for number, text in enumerate(texts) if not is_normal(text)}
        # Text by text is as fast as a batch, and does without awkward, whose import takes 0.2 s.
        fast = self._tokenizer.encode
        parts = [fast(b"" if number in changed else text) for number, text in enumerate(texts)]
        if changed:
            ids, lengths = self._reference().encode_batch([*changed.values()])
            for number, part in zip(changed, np.split(ids, np.cumsum(lengths)[:-1]), strict=True):
                parts[number] = part[: len(part) - len(self._end)]
        with_ends = [array for part in parts for array in (part, self._end)]
        # One pass over the ids: concatenates, and narrows them to the token file's dtype.
        ids = np.concatenate([self._end[:0], *with_ends], dtype=token_dtype(self.vocab_size), casting="unsafe")
        lengths = np.fromiter(map(len, parts), dtype=np.int64, count=len(parts)) + len(self._end)
        return Encoded(ids, lengths)

    def encode(self, texts: list[str]) -> list[list[int]]:
        ids, lengths = self.encode_batch([text.encode("utf-8") for text in texts])
        return [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])]

    def decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids).decode("utf-8", "replace")


def is_normal(text: bytes) -> bool:
    """Whether a text is in NFC, and has only characters that Python's version of Unicode knows."""
    if text.isascii():
        return True
    data = np.frombuffer(text, dtype=np.uint8)
    near = data > 127
    near[:-1] |= near[1:]  # an ASCII character composes with none before it, but may with a mark after it
    characters = data[near].tobytes().decode("utf-8")
    return unicodedata.is_normalized("NFC", characters) and not _holds_unknown(characters)


# Of each code point: 0 not asked for yet, 1 assigned in Python's Unicode version, 2 unassigned.
_assigned = np.zeros(sys.maxunicode + 1, dtype=np.uint8)


def _holds_unknown(characters: str) -> bool:
    """Whether a code point is unassigned in Python's Unicode version: a newer version may compose it with others."""
    codes = np.frombuffer(characters.encode("utf-32-le"), dtype="<u4")
    if not (known := _assigned[codes]).all():
        for code in np.unique(codes[known == 0]).tolist():
            _assigned[code] = 1 + (unicodedata.category(chr(code)) == "Cn")
        known = _assigned[codes]
    return bool((known == 2).any())


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
    try:
        path = tokenizer_file(tokenizer)
        fast = GigatokenEncoder(path, reference.vocab_size, reference.eod_token_id, lambda: reference)
    except ImportError:
        return "gigatoken is not installed (in the clone, pip install --editable '.[data]')", ""
    # Its Rust code may also panic, which is not an Exception.
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        return f"gigatoken does not support this tokenizer ({' '.join(str(error).split())[:120]})", ""
    expected, found = reference.encode_batch(texts), fast.encode_batch(texts)
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
