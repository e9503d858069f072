"""Encoders from text to token ids, one per tokenizer library; each encodes a batch on several threads.

The reference is the tokenizer's own library: tokenizers, or sentencepiece. gigatoken gives the same ids many times
faster; data_prep/gigatoken_encoder.py compares it with the reference before it is used.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from megatron_a2d.conversion.end_tokens import END_OF_TEXT, end_of_document
from megatron_a2d.conversion.mask_token import read_tokenizer_config
from megatron_a2d.utils.errors import UserError
from megatron_a2d.utils.tokenizer import read_tokenizer


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype that megatron.core chooses for a token file: two bytes if every id fits."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


class Encoded(NamedTuple):
    """A batch of encoded documents."""

    ids: np.ndarray  # [tokens of all documents], in the dtype of the token file
    lengths: np.ndarray  # [documents] int64, end-of-document tokens included

    @classmethod
    def of(cls, documents: list[list[int]], vocab_size: int) -> Encoded:
        dtype = token_dtype(vocab_size)
        lengths = np.fromiter(map(len, documents), dtype=np.int64, count=len(documents))
        ids = np.fromiter((token for ids in documents for token in ids), dtype=dtype, count=int(lengths.sum()))
        return cls(ids, lengths)


class Encoder(Protocol):
    name: str  # of the tokenizer library
    vocab_size: int  # the tokenizer's ids are 0 .. vocab_size - 1
    eod_token_id: int | None  # appended to each document unless None

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, end-of-document token included."""
        ...

    def encode_batch(self, texts: list[bytes]) -> Encoded:
        """The same for UTF-8 texts, all in one array of the token file's dtype."""
        ...

    def decode(self, token_ids: list[int]) -> str:
        """The text of the tokens, special ones included."""
        ...

    def use_threads(self, count: int) -> None:
        """Encode on `count` threads from now on; a process that was forked must use one."""
        ...

    def delimiter(self) -> bytes | None:
        """The text of the end-of-document token, if documents joined by it get the same ids as when encoded alone;
        None if they might not, or if there is no such token."""
        ...


class HFEncoder:
    """A `tokenizer.json`. Text that spells a special token becomes that token, as in transformers."""

    name = "tokenizers"

    def __init__(self, path: Path, append_eod: bool, workers: int):
        self.use_threads(workers)
        self._tokenizer = read_tokenizer(path, f"--tokenizer {path}")
        # Some tokenizer.json files were saved with truncation or padding enabled; a corpus must have neither.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.eod_token_id = self._end_of_document(path) if append_eod else None
        self._suffix = [] if self.eod_token_id is None else [self.eod_token_id]

    def _end_of_document(self, path: Path) -> int:
        token_id = end_of_document(self._tokenizer.token_to_id, read_tokenizer_config(path.parent))
        if token_id is None:
            raise UserError(
                f"--tokenizer {path}: has no end-of-document token ({END_OF_TEXT}, or eos_token in "
                "tokenizer_config.json); use --no-append-eod or another tokenizer"
            )
        return token_id

    def encode(self, texts: list[str]) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids + self._suffix for encoding in encodings]

    def encode_batch(self, texts: list[bytes]) -> Encoded:
        return Encoded.of(self.encode([text.decode("utf-8") for text in texts]), self.vocab_size)

    def decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)

    def use_threads(self, count: int) -> None:
        # The library starts its threads with the first batch on several; their number is fixed from then on.
        os.environ["RAYON_NUM_THREADS"] = str(count)
        os.environ["TOKENIZERS_PARALLELISM"] = "true" if count > 1 else "false"

    def delimiter(self) -> bytes | None:
        added = self._tokenizer.get_added_tokens_decoder()
        end = None if self.eod_token_id is None else added.get(self.eod_token_id)
        if end is None or end.lstrip or end.rstrip or end.single_word or end.normalized:
            return None
        # The leftmost of the added tokens is found: none may begin in the document and end in its delimiter.
        text = end.content
        for token in added.values():
            within = token is not end and text in token.content
            if within or any(token.content.endswith(text[:size]) for size in range(1, len(text))):
                return None
        return text.encode("utf-8")


class SentencePieceEncoder:
    """A sentencepiece `.model`; documents end with its </s>."""

    name = "sentencepiece"

    def __init__(self, path: Path, append_eod: bool, workers: int):
        from sentencepiece import SentencePieceProcessor

        try:
            self._processor = SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise UserError(f"--tokenizer {path}: cannot be read ({error}); download it again") from None
        self.use_threads(workers)
        self.vocab_size = self._processor.vocab_size()
        self.eod_token_id = self._processor.eos_id() if append_eod else None
        if self.eod_token_id is not None and self.eod_token_id < 0:
            raise UserError(f"--tokenizer {path}: has no </s> to end documents; use --no-append-eod or another one")
        self._suffix = [] if self.eod_token_id is None else [self.eod_token_id]

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [ids + self._suffix for ids in self._processor.encode(texts, num_threads=self._workers)]

    def encode_batch(self, texts: list[bytes]) -> Encoded:
        return Encoded.of(self.encode([text.decode("utf-8") for text in texts]), self.vocab_size)

    def decode(self, token_ids: list[int]) -> str:
        return self._processor.decode(token_ids)

    def use_threads(self, count: int) -> None:
        self._workers = count

    def delimiter(self) -> bytes | None:
        return None  # in a text </s> is text


def tokenizer_file(tokenizer: Path) -> Path:
    """The tokenizer.json or sentencepiece .model file of `tokenizer`, which is that file or its directory."""
    where, remedy = f"--tokenizer {tokenizer}", "give a tokenizer.json, a sentencepiece .model or a directory with one"
    if tokenizer.is_dir():
        files = (tokenizer / "tokenizer.json", *sorted(tokenizer.glob("*.model")))
        if found := next((file for file in files if file.is_file()), None):
            return found
        raise UserError(f"{where}: contains neither a tokenizer.json nor a .model file; {remedy}")
    if not tokenizer.is_file():
        raise UserError(f"{where}: {'is not a regular file' if tokenizer.exists() else 'does not exist'}; {remedy}")
    if tokenizer.suffix not in (".json", ".model"):
        raise UserError(f"{where}: is neither a .json nor a .model file; give one of these")
    return tokenizer


def open_encoder(tokenizer: Path, append_eod: bool, workers: int) -> Encoder:
    """The reference encoder for a Hugging Face directory, a tokenizer.json or a sentencepiece model."""
    path = tokenizer_file(tokenizer)
    if path.suffix == ".json":
        return HFEncoder(path, append_eod, workers)
    return SentencePieceEncoder(path, append_eod, workers)
