"""Vocabulary fingerprints: whether token files were made with the same vocabulary, and with the model's.

`data_prep.tokenize_corpus` records a fingerprint of the vocabulary (which id is which token) and the added tokens. The
added ones are compared one by one: a checkpoint's tokenizer may have more (a mask token), and that changes no text.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from megatron_a2d.data.checksums import checksum
from megatron_a2d.utils.atomic_write import read_json
from megatron_a2d.utils.errors import UserError


class Described(Protocol):
    """A `TokenFile`. (Its module takes seconds to import, which data_prep does not wait for.)"""

    prefix: str
    metadata: dict[str, Any]


# What it can raise to take values of other types for a vocabulary.
_NO_VOCABULARY = (AttributeError, LookupError, TypeError, ValueError)


class Vocabulary(NamedTuple):
    """The tokens that a tokenizer can produce."""

    fingerprint: str  # of all (id, token) but the added ones, 16 hexadecimal digits
    added: dict[int, str]  # special tokens and the like, by their ids

    def description(self) -> dict[str, Any]:
        """What a token file's description says of it."""
        return {"vocabulary": self.fingerprint, "added_tokens": {str(i): token for i, token in self.added.items()}}


def vocabulary_of(tokenizer: Path) -> Vocabulary | None:
    """Vocabulary of a tokenizer.json, sentencepiece .model, or directory with either or a vocab.json; None without."""
    candidates = [tokenizer]
    if tokenizer.is_dir():
        candidates = [tokenizer / "tokenizer.json", tokenizer / "vocab.json", *sorted(tokenizer.glob("*.model"))]
    path = next((path for path in candidates if path.is_file()), None)
    if path is None:
        return None
    if path.suffix == ".model":
        return _of_pairs(enumerate(_pieces(path)), {})
    content = read_json(path, "the tokenizer")
    try:
        if path.name == "vocab.json":
            return _of_pairs(((i, token) for token, i in content.items()), _declared(path.parent))
        return vocabulary_in(content)
    except _NO_VOCABULARY:
        raise UserError(f"{path}: the tokenizer holds no vocabulary that can be read; copy it again") from None


def vocabulary_in(content: dict[str, Any]) -> Vocabulary:
    """Vocabulary of a parsed tokenizer.json."""
    model = content.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    added = {item["id"]: item["content"] for item in content.get("added_tokens") or []}
    if isinstance(vocabulary, list):  # unigram: [token, score], the id is the position
        return _of_pairs(enumerate(item[0] for item in vocabulary), added)
    return _of_pairs(((i, token) for token, i in (vocabulary or {}).items()), added)


def _of_pairs(pairs: Any, added: dict[int, str]) -> Vocabulary:
    plain = sorted([i, token] for i, token in pairs if i not in added)
    return Vocabulary(checksum(json.dumps(plain).encode()), dict(sorted(added.items())))


def _declared(directory: Path) -> dict[int, str]:
    path = directory / "tokenizer_config.json"
    content = read_json(path, "the tokenizer's configuration") if path.is_file() else {}
    return {int(i): item["content"] for i, item in (content.get("added_tokens_decoder") or {}).items()}


def _pieces(path: Path) -> list[str]:
    from sentencepiece import SentencePieceProcessor

    try:
        processor = SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise UserError(f"{path}: the tokenizer cannot be read ({error}); fetch it again") from None
    return [processor.id_to_piece(i) for i in range(processor.vocab_size())]


def recorded_vocabulary(file: Described) -> Vocabulary | None:
    """The vocabulary in a token file's description; if it has only a path, that of the tokenizer there."""
    metadata = file.metadata
    if isinstance(fingerprint := metadata.get("vocabulary"), str):
        try:
            added = {int(i): str(token) for i, token in (metadata.get("added_tokens") or {}).items()}
        except _NO_VOCABULARY:
            raise UserError(f"{file.prefix}.json: its added_tokens are damaged; copy it again") from None
        return Vocabulary(fingerprint, added)
    named = metadata.get("tokenizer")
    return vocabulary_of(Path(named)) if isinstance(named, str) and named and os.path.exists(named) else None


def find_foreign_tokens(files: Sequence[Described], model: Vocabulary | None) -> Iterator[str]:
    """A line for each file whose vocabulary is not the model's or, without a model, that of the first file with one."""
    remedy = "tokenise with the checkpoint's tokenizer, or pass with --no-verify-tokenizer"
    against, whose = model, "the checkpoint's tokenizer"
    ends: tuple[int | None, str] | None = None
    for file in files:
        name = f"{file.prefix}, made by {file.metadata.get('tokenizer')}"
        mine = recorded_vocabulary(file)
        if mine and against and mine.fingerprint != against.fingerprint:
            yield f"{name}: its tokens come from another vocabulary than {whose}; {remedy}"
        elif mine and against:
            for i in sorted(mine.added.keys() & against.added.keys()):
                if mine.added[i] != against.added[i]:
                    yield f"{name}: token {i} is {mine.added[i]!r}, and {against.added[i]!r} in {whose}; {remedy}"
                    break
        elif mine:
            against, whose = mine, f"{file.prefix}"
        if "eod_token_id" in file.metadata:
            here = file.metadata["eod_token_id"], file.prefix
            ends = ends or here
            if ends[0] != here[0]:
                yield (
                    f"{name}: its documents end with {_end(here[0])}, those of {ends[1]} with {_end(ends[0])}; "
                    "tokenise all sources alike, or pass with --no-verify-tokenizer"
                )


def _end(token: int | None) -> str:
    return "no token" if token is None else f"token {token}"
