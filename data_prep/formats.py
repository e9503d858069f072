"""One reader for each kind of file: .jsonl, .jsonl.gz, .jsonl.zst, .parquet, .txt.

A reader yields a `Document` or a `Problem` for each line or row. It raises UserError for what is wrong with a whole
file's shape: a key or column that is not there, a package that is missing.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import orjson

from megatron_a2d.errors import UserError, nearest

BUFFER = 1 << 20


class Span(NamedTuple):
    """A part of a file: bytes start .. stop - 1 of .jsonl, row groups of .parquet, else all of it."""

    path: str
    kind: str
    start: int
    stop: int
    num_bytes: int  # of the file, for progress


class Document(NamedTuple):
    """A text, UTF-8."""

    data: bytes
    num_bytes: int  # of the file that it took, for progress

    @property
    def text(self) -> str:
        return self.data.decode("utf-8")

    @property
    def is_blank(self) -> bool:
        # The first characters nearly always tell; white space of all alphabets counts.
        return not (self.data[:64].decode("utf-8", "ignore").strip() or self.text.strip())


class Problem(NamedTuple):
    """Something that is no document."""

    where: str  # file and line
    reason: str


Item = Document | Problem
Reader = Callable[[Span, str], Iterator[Item]]


def parse_line(line: bytes, json_key: str) -> bytes | str | None:
    """The text of one JSON line as bytes; the reason why there is none; None for a blank line."""
    try:
        text = orjson.loads(line)[json_key]
        if isinstance(text, str):
            return text.encode("utf-8")
    except (ValueError, LookupError, TypeError):
        pass  # the standard library judges what orjson refuses, and says why
    try:
        content = line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return f"not UTF-8 (byte {error.start} is 0x{line[error.start]:02x})"
    try:
        value = json.loads(content)
    except (json.JSONDecodeError, RecursionError) as error:
        return f"not valid JSON ({error})" if content.strip() else None
    except ValueError as error:  # a number of thousands of digits
        return f"not valid JSON ({error})"
    if not isinstance(value, dict):
        return f"holds a JSON {type(value).__name__}, not an object"
    if json_key not in value:
        hint = nearest(json_key, value) or f"; the line has {', '.join(list(value)[:8]) or 'none'}"
        return f"no key {json_key!r}{hint} (--json-keys names the text's key)"
    text = value[json_key]
    if not isinstance(text, str):
        return f"{json_key!r} is {type(text).__name__}, not a string"
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        return f"{json_key!r} holds half of a surrogate pair, no text"


def read_jsonl(span: Span, json_key: str) -> Iterator[Item]:
    """One JSON object in each line that begins within the span; blank lines are passed over."""
    with open(span.path, "rb", buffering=BUFFER) as stream:
        if span.start:  # the line that runs into the span belongs to the one before
            stream.seek(span.start - 1)
            stream.readline()
        position = stream.tell()
        number = 0
        while position < span.stop and (line := stream.readline()):
            number += 1
            text = parse_line(line, json_key)
            if isinstance(text, str):
                yield Problem(f"{span.path}:{_lines_before(span) + number}", text)
            elif text is not None:
                yield Document(text, len(line))
            position += len(line)


def _lines_before(span: Span) -> int:
    """Lines that begin before the span. Counted only when something is to be reported."""
    if span.start == 0:
        return 0
    count, left, last = 0, span.start, b""
    with open(span.path, "rb") as stream:
        while left and (last := stream.read(min(left, 1 << 22))):
            count += last.count(b"\n")
            left -= len(last)
    return count + (not last.endswith(b"\n"))


def _read_lines(span: Span, json_key: str, lines: IO[bytes], raw: IO[bytes], broken: tuple[Any, ...]) -> Iterator[Item]:
    """The lines of a compressed stream; where it breaks off, a problem and the end."""
    number = position = 0
    while True:
        try:
            line = lines.readline()
        except broken as error:
            yield Problem(f"{span.path}:{number + 1}", f"the compressed data ends or is damaged here ({error})")
            return
        if not line:
            return
        number += 1
        text = parse_line(line, json_key)
        now = raw.tell()
        if isinstance(text, str):
            yield Problem(f"{span.path}:{number}", text)
        elif text is not None:
            yield Document(text, now - position)
            position = now


def read_jsonl_gz(span: Span, json_key: str) -> Iterator[Item]:
    with open(span.path, "rb") as raw, gzip.GzipFile(fileobj=raw) as lines:
        yield from _read_lines(span, json_key, lines, raw, (EOFError, OSError, zlib.error))  # type: ignore[arg-type]


def read_jsonl_zst(span: Span, json_key: str) -> Iterator[Item]:
    zstandard = _package("zstandard", span)
    size = Path(span.path).stat().st_size
    with open(span.path, "rb") as raw, _Zstandard(zstandard, raw) as lines:
        yield from _read_lines(span, json_key, lines, raw, (zstandard.ZstdError, OSError, EOFError))
        if lines.is_cut_short(size):
            yield Problem(span.path, "the compressed data is cut short")


class _Zstandard:
    """Lines of a .zst file. The library takes a file that ends within a frame for a whole one; this tells."""

    def __init__(self, package: Any, raw: IO[bytes]):
        self._package, self._raw = package, raw
        self._lines: deque[bytes] = deque()
        self._rest: list[bytes] = []  # the beginning of a line, in parts: a document may be large
        self._decoder: Any = None
        self._error: Exception | None = None  # raised after the lines that came before it

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: Any) -> None:
        self._decoder = None

    def is_cut_short(self, size: int) -> bool:
        return self._error is None and self._decoder is not None and self._raw.tell() >= size

    def readline(self) -> bytes:
        while not self._lines and self._error is None and (data := self._raw.read(1 << 16)):
            try:
                self._decompress(data)
            except self._package.ZstdError as error:
                self._error = error
        if self._lines:
            return self._lines.popleft()
        if self._error is not None:
            raise self._error
        line, self._rest = b"".join(self._rest), []
        return line

    def _decompress(self, data: bytes) -> None:
        while data:
            if self._decoder is None:
                # As large a window as the format's own tool takes with --long=31.
                self._decoder = self._package.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            self._split(self._decoder.decompress(data))
            data = self._decoder.unused_data if self._decoder.eof else b""
            if self._decoder.eof:
                self._decoder = None

    def _split(self, text: bytes) -> None:
        *lines, rest = text.split(b"\n")
        if lines:
            lines[0] = b"".join([*self._rest, lines[0]])
            self._rest = []
        self._lines.extend(line + b"\n" for line in lines)
        self._rest.append(rest)


def read_parquet(span: Span, json_key: str) -> Iterator[Item]:
    """One document in each row, the text in the column `json_key`."""
    arrow = _package("pyarrow", span)
    try:
        file = _open_parquet(span.path, span)
    except UserError:
        if span.stop:
            raise
        yield Problem(span.path, "is no parquet file or is damaged")
        return
    names = file.schema_arrow.names
    if json_key not in names:
        hint = nearest(json_key, names) or f"; it has {', '.join(names[:8])}"
        raise UserError(f"{span.path}: no column {json_key!r}{hint}; name the text's column with --json-keys")
    kind = file.schema_arrow.field(json_key).type
    types = arrow.types
    plain = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(plain) or types.is_large_string(plain) or types.is_string_view(plain)):
        raise UserError(f"{span.path}: column {json_key!r} holds {kind}, not strings; name the text's column")
    groups = range(span.start, span.stop)
    rows = sum(file.metadata.row_group(group).num_rows for group in groups)
    share = span.num_bytes // max(rows, 1)
    number = sum(file.metadata.row_group(group).num_rows for group in range(span.start))
    batches = file.iter_batches(batch_size=256, row_groups=list(groups), columns=[json_key])
    while True:
        try:
            batch = next(batches, None)
        except (OSError, arrow.ArrowException) as error:
            yield Problem(f"{span.path}: row {number + 1}", f"the file is damaged here ({_first_line(error)})")
            return
        if batch is None:
            return
        for value in batch.column(0).cast(plain).cast(arrow.large_binary()).to_pylist():
            number += 1
            yield _row(f"{span.path}: row {number}", value, json_key, share)


def _row(where: str, value: bytes | None, json_key: str, share: int) -> Item:
    if value is None:
        return Problem(where, f"{json_key!r} is null, not a string")
    try:
        value.decode("utf-8")
    except UnicodeDecodeError as error:
        return Problem(where, f"not UTF-8 (byte {error.start} is 0x{value[error.start]:02x})")
    return Document(value, share)


def _open_parquet(path: str, span: Span | None = None) -> Any:
    arrow = _package("pyarrow", span or Span(path, ".parquet", 0, 0, 0))
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(path)
    except (OSError, arrow.ArrowException) as error:
        raise UserError(f"{path}: is no parquet file or is damaged ({_first_line(error)}); fetch it again") from None


def read_text(span: Span, json_key: str) -> Iterator[Item]:
    """The whole file is one document."""
    data = Path(span.path).read_bytes()
    try:
        yield Document(data.decode("utf-8-sig").encode("utf-8"), len(data))
    except UnicodeDecodeError as error:
        yield Problem(span.path, f"not UTF-8 (byte {error.start} is 0x{data[error.start]:02x})")


READERS: dict[str, Reader] = {
    ".jsonl": read_jsonl,
    ".jsonl.gz": read_jsonl_gz,
    ".jsonl.zst": read_jsonl_zst,
    ".parquet": read_parquet,
    ".txt": read_text,
}


def num_units(path: Path, kind: str) -> int:
    """Of what a span counts: bytes, row groups, or 1 for files that cannot be entered in their middle."""
    if kind == ".jsonl":
        return path.stat().st_size
    if kind == ".parquet":
        return _open_parquet(str(path)).num_row_groups
    return 1


def _package(name: str, span: Span) -> Any:
    try:
        return __import__(name)
    except ImportError:
        raise UserError(
            f"{span.path}: {span.kind} needs {name}; in the clone, pip install --editable '.[data]'"
        ) from None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
