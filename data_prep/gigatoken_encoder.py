"""gigatoken encoder: a byte-level BPE in Rust, many times faster than tokenizers, used where the ids are the same.

It is used only after a comparison with the reference on documents sampled across the corpus, and on a few texts on
which tokenizers differ. If one id differs, if gigatoken does not support the tokenizer, or if it is not installed (the
extra `data`), the reference encodes.
"""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Sequence
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
    """The gigatoken encoder; `reference` is the encoder whose ids it must reproduce.

    Documents that Unicode normal form NFC would change, or may change under a newer Unicode than Python's, are encoded
    by the reference: the two libraries implement different Unicode versions, order some combining marks differently
    (U+07F3 before U+07FD), and compose different letters (gigatoken 0.10.0 those of Unicode 16, as U+16D67 U+16D67).
    """

    name = "gigatoken"

    def __init__(self, path: Path, reference: Encoder):
        import gigatoken

        load: Any = gigatoken.Tokenizer.from_sentencepiece if path.suffix == ".model" else gigatoken.Tokenizer
        self._tokenizer = load(str(path))
        self.vocab_size, self.eod_token_id = reference.vocab_size, reference.eod_token_id
        self._end = np.array([] if self.eod_token_id is None else [self.eod_token_id], dtype=np.uint32)
        self._dtype = token_dtype(self.vocab_size)
        self._delimiter, self._reference = reference.delimiter(), reference

    def encode_batch(self, texts: list[bytes]) -> Encoded:
        changed = not_normal(texts)
        if not changed:
            return self._encode_normal(texts)
        left = [*texts]
        for number in changed:
            left[number] = b""
        encoded = self._encode_normal(left)
        ids, lengths = self._reference.encode_batch([texts[number] for number in changed])
        parts = np.split(encoded.ids, np.cumsum(encoded.lengths)[:-1])
        for number, part in zip(changed, np.split(ids, np.cumsum(lengths)[:-1]), strict=True):
            parts[number] = part
        encoded.lengths[changed] = lengths
        return Encoded(np.concatenate(parts), encoded.lengths)

    def _encode_normal(self, texts: list[bytes]) -> Encoded:
        """All texts in one call, with delimiters; by halves, down to a single text, where one spells the delimiter.

        A call for each text would take longer, and the library's batches import awkward, which takes 0.2 s.
        """
        if self._delimiter is None:
            return _concatenate([self._encode_one(text) for text in texts])
        ids = self._tokenizer.encode(self._delimiter.join([*texts, b""]))
        ends = np.flatnonzero(ids == self.eod_token_id) + 1
        if len(ends) == len(texts):
            return Encoded(ids.astype(self._dtype), np.diff(ends, prepend=0))
        if len(texts) == 1:
            return self._encode_one(texts[0])
        half = len(texts) // 2
        return _concatenate([self._encode_normal(texts[:half]), self._encode_normal(texts[half:])])

    def _encode_one(self, text: bytes) -> Encoded:
        ids = np.concatenate([self._tokenizer.encode(text), self._end], dtype=self._dtype, casting="unsafe")
        return Encoded(ids, np.array([len(ids)]))

    def encode(self, texts: list[str]) -> list[list[int]]:
        ids, lengths = self.encode_batch([text.encode("utf-8") for text in texts])
        return [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])]

    def decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids).decode("utf-8", "replace")

    def use_threads(self, count: int) -> None:
        self._reference.use_threads(count)  # its own encoding uses the calling thread

    def delimiter(self) -> bytes | None:
        return self._delimiter


def _concatenate(parts: list[Encoded]) -> Encoded:
    return Encoded(np.concatenate([part.ids for part in parts]), np.concatenate([part.lengths for part in parts]))


def not_normal(texts: list[bytes]) -> list[int]:
    """The numbers of the texts that are not `is_normal`, in order."""
    return _not_normal(texts, [number for number, text in enumerate(texts) if not text.isascii()])


def _not_normal(texts: list[bytes], numbers: list[int]) -> list[int]:
    """Those among `numbers`: together first, then by halves, since hardly any are."""
    # No character composes with a line feed.
    if not numbers or is_normal(b"\n".join([texts[number] for number in numbers])):
        return []
    if len(numbers) == 1:
        return numbers
    half = len(numbers) // 2
    return _not_normal(texts, numbers[:half]) + _not_normal(texts, numbers[half:])


def is_normal(text: bytes) -> bool:
    """Whether a text is in NFC, and has only characters that Python's version of Unicode knows."""
    if text.isascii():
        return True
    data = np.frombuffer(text, dtype=np.uint8)
    near = data > 127
    near[:-1] |= near[1:]  # an ASCII character composes with none before it, but may with a mark after it
    characters = data[near].tobytes().decode("utf-8")
    return unicodedata.is_normalized("NFC", characters) and not _holds_unknown(characters)


# For each code point: 0 not looked up yet, 1 assigned in Python's Unicode version, 2 unassigned.
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
    encoder: Encoder


def choose(tokenizer: Path, reference: Encoder, requested: Choice, texts: Sequence[bytes]) -> Chosen:
    """Whether gigatoken may encode a corpus of which `texts` are a sample."""
    if requested == "reference":
        return Chosen("reference", f"{reference.name}, as requested", reference)
    fast, outcome = _compare(tokenizer, reference, [*map(str.encode, PROBES), *texts])
    if fast:
        return Chosen("gigatoken", f"gigatoken, whose ids equal those of {reference.name} on {outcome}", fast)
    if requested == "gigatoken":
        raise UserError(f"--encoder gigatoken: {outcome}; leave the flag out to encode with {reference.name}")
    return Chosen("reference", f"{reference.name}, because {outcome}", reference)


def _compare(tokenizer: Path, reference: Encoder, texts: list[bytes]) -> tuple[GigatokenEncoder | None, str]:
    """(gigatoken, and what was compared), or (None, and why it cannot be used)."""
    try:
        fast = GigatokenEncoder(tokenizer_file(tokenizer), reference)
    except ImportError:
        return None, "gigatoken is not installed (in the clone, pip install --editable '.[data]')"
    # Its Rust code may also panic, which is not an Exception.
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        return None, f"gigatoken does not support this tokenizer ({' '.join(str(error).split())[:120]})"
    expected, found = reference.encode_batch(texts), fast.encode_batch(texts)
    if not np.array_equal(expected.lengths, found.lengths) or not np.array_equal(expected.ids, found.ids):
        bounds = np.cumsum(expected.lengths)[:-1]
        pairs = zip(
            texts, np.split(expected.ids, bounds), np.split(found.ids, np.cumsum(found.lengths)[:-1]), strict=True
        )
        text = next(text for text, ours, theirs in pairs if not np.array_equal(ours, theirs))
        return None, f"gigatoken gives different ids, for instance for {text[:40].decode('utf-8', 'ignore')!r}"
    return fast, f"{len(texts)} texts, {len(expected.ids):,} tokens of this corpus"


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
