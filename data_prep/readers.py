"""Text files as streams of documents. One reader for each file name extension; memory holds one document.

A reader yields `Document`s and raises UserError that names the file and the line of what it cannot read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from megatron_a2d.errors import UserError, nearest


class Document(NamedTuple):
    text: str
    num_bytes: int  # of the file that it took, for progress
    where: str  # file and line, for messages


Reader = Callable[[Path, str], Iterator[Document]]


@dataclass
class Counts:
    """Counts what `read_documents` has met."""

    documents: int = 0
    empty: int = 0


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: not UTF-8 (byte {error.start} is 0x{data[error.start]:02x}); convert the file to UTF-8"
        ) from None


def read_jsonl(path: Path, json_key: str) -> Iterator[Document]:
    """One JSON object in each line, the text under `json_key`. Blank lines are passed over."""
    with open(path, "rb") as stream:
        for number, line in enumerate(stream, start=1):
            where = f"{path}:{number}"
            if not (content := _decoded(line, where).strip()):
                continue
            try:
                value = json.loads(content)
            except (json.JSONDecodeError, RecursionError) as error:
                raise UserError(f"{where}: not valid JSON ({error}); correct or remove the line") from None
            if not isinstance(value, dict):
                raise UserError(f"{where}: holds a JSON {type(value).__name__}, not an object; correct the line")
            if json_key not in value:
                hint = nearest(json_key, value) or f"; the line has {', '.join(list(value)[:8]) or 'none'}"
                raise UserError(f"{where}: no key {json_key!r}{hint}; name the text's key with --json-key")
            text = value[json_key]
            if not isinstance(text, str):
                raise UserError(f"{where}: {json_key!r} is {type(text).__name__}, not a string; correct the line")
            if not _is_encodable(text):
                raise UserError(f"{where}: {json_key!r} holds half of a surrogate pair, no text; correct the line")
            yield Document(text, len(line), where)


def _is_encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def read_text(path: Path, json_key: str) -> Iterator[Document]:
    """The whole file is one document."""
    data = path.read_bytes()
    yield Document(_decoded(data, str(path)), len(data), str(path))


READERS: dict[str, Reader] = {".jsonl": read_jsonl, ".txt": read_text}


def check_inputs(paths: Sequence[Path]) -> None:
    """UserError with every file that is missing, empty or of a kind that no reader knows."""
    problems = []
    for path in paths:
        if not path.exists():
            problems.append(f"--input {path}: does not exist; check the path")
        elif not path.is_file():
            problems.append(f"--input {path}: is not a file; name the files in it")
        elif path.suffix not in READERS:
            problems.append(f"--input {path}: unknown kind of file; give {' or '.join(READERS)}")
        elif path.stat().st_size == 0:
            problems.append(f"--input {path}: is empty; leave it out or write it again")
    if problems:
        raise UserError(problems)


def input_size(paths: Sequence[Path]) -> int:
    """Bytes of all inputs; checks them first."""
    check_inputs(paths)
    return sum(path.stat().st_size for path in paths)


def read_documents(paths: Sequence[Path], json_key: str, counts: Counts) -> Iterator[Document]:
    """Every document that has text, in the order of the files; UserError where there is none at all."""
    check_inputs(paths)
    for path in paths:
        for document in READERS[path.suffix](path, json_key):
            if document.text.strip():
                counts.documents += 1
                yield document
            else:
                counts.empty += 1
    if counts.documents == 0:
        raise UserError(f"--input {' '.join(map(str, paths))}: holds no text at all; give documents")
