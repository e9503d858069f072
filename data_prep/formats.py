"""Readers of corpus files, one per format: .jsonl, .jsonl.gz, .jsonl.zst, .parquet, .txt.

A reader yields a `Document` or a `Problem` for each line or row. It raises UserError for problems of the file as a
whole: a missing key or column, a missing package.
A small file may decompress to any size: a reader's memory is bounded by `Limits`, not by the file.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import orjson

from data_prep.memory_limits import MEGABYTE, Limits
from megatron_a2d.utils.errors import UserError, nearest

BUFFER = 1 << 20
_ZSTD_INPUT = 1 << 9  # decompresses to 16 MiB at most: a block of 4 bytes may expand to 128 KiB
_LARGEST_EXPANSION = 200  # accepted compression ratio of a parquet column; text has about a tenth of that
_ROWS_BYTES = 16 * MEGABYTE  # parquet rows held in memory at a time


class FileRange(NamedTuple):
    """A range of a file: bytes start .. stop - 1 of .jsonl, row groups of .parquet, otherwise the entire file."""

    path: str
    kind: str
    start: int
    stop: int
    num_bytes: int  # of the file, for progress


class Document(NamedTuple):
    """A document's text as UTF-8 bytes."""

    data: bytes
    num_bytes: int  # bytes of the file that it occupies, for the progress bar

    @property
    def text(self) -> str:
        return self.data.decode("utf-8")

    @property
    def is_blank(self) -> bool:
        # The first character nearly always decides; Unicode white space counts.
        return not (b" " < self.data[:1] < b"\x7f" or self.text.strip())


class Problem(NamedTuple):
    """A line, row or file without a valid document."""

    where: str  # file and line
    reason: str


Item = Document | Problem
Reader = Callable[[FileRange, str, Limits], Iterator[Item]]


def parse_line(line: bytes, json_key: str) -> bytes | str | None:
    """The text of one JSON line as bytes; a str that says why the line is invalid; None for a blank line."""
    try:
        return orjson.loads(line)[json_key].encode("utf-8")
    except (ValueError, LookupError, TypeError, AttributeError):
        pass  # the standard library decides about what orjson refuses, with a better message
    if line.isspace():
        return None
    try:
        content = line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return f"not UTF-8 (byte {error.start} is 0x{line[error.start]:02x})"
    try:
        value = json.loads(content)
    except (json.JSONDecodeError, RecursionError) as error:
        return f"not valid JSON ({error})" if content.strip() else None
    except ValueError as error:  # a number with thousands of digits
        return f"not valid JSON ({error})"
    if not isinstance(value, dict):
        return f"holds a JSON {type(value).__name__}, not an object"
    if json_key not in value:
        hint = nearest(json_key, value) or f"; the line has {', '.join(list(value)[:8]) or 'none'}"
        return f"no key {json_key!r}{hint} (set the text's key with --json-keys)"
    text = value[json_key]
    if not isinstance(text, str):
        return f"{json_key!r} is {type(text).__name__}, not a string"
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        return f"{json_key!r} holds an unpaired surrogate, which is not valid text"


def read_jsonl(file_range: FileRange, json_key: str, limits: Limits) -> Iterator[Item]:
    """One JSON object per line that begins within the range; blank lines are skipped."""
    with open(file_range.path, "rb", buffering=BUFFER) as stream:
        if file_range.start:  # a line that began earlier belongs to the previous range
            stream.seek(file_range.start - 1)
            _skip_line(stream)
        position = stream.tell()
        number = 0
        while position < file_range.stop and (line := stream.readline(limits.document_bytes + 1)):
            number += 1
            text = parse_line(line, json_key) if len(line) <= limits.document_bytes else _too_long("line", limits)
            if isinstance(text, str):
                yield Problem(f"{file_range.path}:{_lines_before(file_range) + number}", text)
            elif text is not None:
                yield Document(text, len(line))
            position += len(line)
            if len(line) > limits.document_bytes and not line.endswith(b"\n"):
                position += _skip_line(stream)


def _skip_line(stream: IO[bytes]) -> int:
    """Skip to the end of a line of any length; returns the number of bytes."""
    size = 0
    while part := stream.readline(BUFFER):
        size += len(part)
        if part.endswith(b"\n"):
            break
    return size


def _too_long(what: str, limits: Limits) -> str:
    return f"the {what} is longer than --max-document-megabytes {limits.document_bytes // MEGABYTE}"


def _lines_before(file_range: FileRange) -> int:
    """Number of lines that begin before the range. Counted only when a problem is reported."""
    if file_range.start == 0:
        return 0
    count, left, last = 0, file_range.start, b""
    with open(file_range.path, "rb") as stream:
        while left and (last := stream.read(min(left, 1 << 22))):
            count += last.count(b"\n")
            left -= len(last)
    return count + (not last.endswith(b"\n"))


def _read_lines(
    file_range: FileRange,
    json_key: str,
    lines: IO[bytes],
    raw: IO[bytes],
    broken: tuple[type[Exception], ...],
    limits: Limits,
) -> Iterator[Item]:
    """The lines of a compressed stream; if it is truncated or damaged, a Problem, after which reading stops."""
    number = position = 0
    while True:
        try:
            line = lines.readline(limits.document_bytes + 1)
            if too_long := len(line) > limits.document_bytes and not line.endswith(b"\n"):
                _skip_line(lines)
        except broken as error:
            yield Problem(f"{file_range.path}:{number + 1}", f"the compressed data ends or is damaged here ({error})")
            return
        if not line:
            return
        number += 1
        text = _too_long("line", limits) if too_long else parse_line(line, json_key)
        now = raw.tell()
        if isinstance(text, str):
            yield Problem(f"{file_range.path}:{number}", text)
        elif text is not None:
            yield Document(text, now - position)
            position = now


def read_jsonl_gz(file_range: FileRange, json_key: str, limits: Limits) -> Iterator[Item]:
    with open(file_range.path, "rb") as raw, gzip.GzipFile(fileobj=raw) as lines:
        yield from _read_lines(file_range, json_key, lines, raw, (EOFError, OSError, zlib.error), limits)  # type: ignore[arg-type]


def read_jsonl_zst(file_range: FileRange, json_key: str, limits: Limits) -> Iterator[Item]:
    zstandard = _package("zstandard", file_range)
    with open(file_range.path, "rb") as raw, io.BufferedReader(_Zstandard(zstandard, raw, limits), BUFFER) as lines:
        yield from _read_lines(file_range, json_key, lines, raw, (zstandard.ZstdError, OSError, EOFError), limits)


class _Zstandard(io.RawIOBase):
    """The contents of a .zst file. The library accepts a file that is truncated within a frame, and decompresses all
    its input at once; this class raises for the former, and feeds the library small chunks."""

    def __init__(self, package: Any, raw: IO[bytes], limits: Limits):
        self._package, self._raw, self._limits = package, raw, limits
        self._decoder: Any = None
        self._packed = memoryview(b"")
        self._text = memoryview(b"")
        self._error: Exception | None = None  # raised once the data before it has been returned

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._text and self._error is None and (self._packed or self._fill()):
            try:
                self._unpack()
            except self._package.ZstdError as error:
                self._error = self._explained(error)
        if not self._text and self._error is not None:
            raise self._error
        size = min(len(buffer), len(self._text))
        buffer[:size] = self._text[:size]
        self._text = self._text[size:]
        return size

    def _fill(self) -> bool:
        self._packed = memoryview(self._raw.read(1 << 16))
        if not self._packed and self._decoder is not None:
            self._error = EOFError("the file is cut short")
        return bool(self._packed)

    def _unpack(self) -> None:
        if self._decoder is None:
            decompressor = self._package.ZstdDecompressor(max_window_size=self._limits.window_bytes)
            self._decoder = decompressor.decompressobj()
        some, self._packed = self._packed[:_ZSTD_INPUT], self._packed[_ZSTD_INPUT:]
        self._text = memoryview(self._decoder.decompress(some))
        if self._decoder.eof:
            self._packed = memoryview(self._decoder.unused_data + bytes(self._packed))
            self._decoder = None

    def _explained(self, error: Exception) -> Exception:
        if "too much memory" not in str(error):
            return error
        limit = f"--max-window-megabytes {self._limits.window_bytes >> 20}"
        return EOFError(f"its window is larger than {limit}; raise that, or compress without --long and --ultra")


def read_parquet(file_range: FileRange, json_key: str, limits: Limits) -> Iterator[Item]:
    """One document per row, with the text in the column `json_key`."""
    arrow = _package("pyarrow", file_range)
    try:
        file = _open_parquet(file_range.path, file_range)
    except UserError:
        if file_range.stop:
            raise
        yield Problem(file_range.path, "is not a parquet file or is damaged")
        return
    _check_column(file, file_range.path, json_key)
    file = arrow.parquet.ParquetFile(file_range.path, metadata=file.metadata, read_dictionary=[json_key])
    number = sum(file.metadata.row_group(group).num_rows for group in range(file_range.start))
    rows = sum(file.metadata.row_group(group).num_rows for group in range(file_range.start, file_range.stop))
    share = file_range.num_bytes // max(rows, 1)
    for group in range(file_range.start, file_range.stop):
        size, problem = _unpacked_size(file, group, json_key, limits)
        num_rows = file.metadata.row_group(group).num_rows
        if problem:
            yield Problem(f"{file_range.path}: row {number + 1}", problem)
            number += num_rows
            continue
        some = max(1, min(256, _ROWS_BYTES * num_rows // max(size, 1)))
        batches = file.iter_batches(batch_size=some, row_groups=[group], columns=[json_key])
        while True:
            try:
                batch = next(batches, None)
            except (OSError, arrow.ArrowException) as error:
                yield Problem(
                    f"{file_range.path}: row {number + 1}", f"the file is damaged here ({_first_line(error)})"
                )
                return
            if batch is None:
                break
            for value in _values(arrow, batch.column(0)):
                number += 1
                yield _row(f"{file_range.path}: row {number}", value, json_key, share, limits)


def _check_column(file: Any, path: str, json_key: str) -> None:
    """UserError unless the file has a column of strings under this name."""
    from pyarrow import types

    names = file.schema_arrow.names
    if json_key not in names:
        hint = nearest(json_key, names) or f"; it has {', '.join(names[:8])}"
        raise UserError(f"{path}: no column {json_key!r}{hint}; choose the text column with --json-keys")
    kind = file.schema_arrow.field(json_key).type
    plain = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(plain) or types.is_large_string(plain) or types.is_string_view(plain)):
        raise UserError(
            f"{path}: column {json_key!r} holds {kind}, not strings; choose the text column with --json-keys"
        )


def _unpacked_size(file: Any, group: int, json_key: str, limits: Limits) -> tuple[int, str]:
    """(uncompressed bytes of the texts of a row group, why they are not decompressed or '')."""
    metadata = file.metadata.row_group(group)
    columns = (metadata.column(number) for number in range(metadata.num_columns))
    column = next(column for column in columns if column.path_in_schema == json_key)
    size, packed = column.total_uncompressed_size, column.total_compressed_size
    if size <= max(limits.document_bytes, _LARGEST_EXPANSION * packed):
        return size, ""
    return size, (
        f"row group {group} decompresses {packed:,} bytes to {size:,}, a ratio that text does not reach; raise "
        "--max-document-megabytes if the file is intact"
    )


def _values(arrow: Any, column: Any) -> Iterator[bytes | None]:
    """The texts of a column; one that is shared by many rows is held once."""
    if not arrow.types.is_dictionary(column.type):
        yield from column.cast(arrow.large_binary()).to_pylist()
        return
    texts = column.dictionary.cast(arrow.large_binary())
    for index in column.indices.to_pylist():
        yield None if index is None else texts[index].as_py()


def _row(where: str, value: bytes | None, json_key: str, share: int, limits: Limits) -> Item:
    if value is None:
        return Problem(where, f"{json_key!r} is null, not a string")
    if len(value) > limits.document_bytes:
        return Problem(where, _too_long("text", limits))
    try:
        value.decode("utf-8")
    except UnicodeDecodeError as error:
        return Problem(where, f"not UTF-8 (byte {error.start} is 0x{value[error.start]:02x})")
    return Document(value, share)


def _open_parquet(path: str, file_range: FileRange | None = None) -> Any:
    arrow = _package("pyarrow", file_range or FileRange(path, ".parquet", 0, 0, 0))
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(path)
    except (OSError, arrow.ArrowException) as error:
        raise UserError(
            f"{path}: is not a parquet file or is damaged ({_first_line(error)}); download it again"
        ) from None


def read_text(file_range: FileRange, json_key: str, limits: Limits) -> Iterator[Item]:
    """The whole file is one document."""
    with open(file_range.path, "rb") as stream:
        data = stream.read(limits.document_bytes + 1)
    if len(data) > limits.document_bytes:
        yield Problem(file_range.path, _too_long("file", limits))
        return
    try:
        yield Document(data.decode("utf-8-sig").encode("utf-8"), len(data))
    except UnicodeDecodeError as error:
        yield Problem(file_range.path, f"not UTF-8 (byte {error.start} is 0x{data[error.start]:02x})")


READERS: dict[str, Reader] = {
    ".jsonl": read_jsonl,
    ".jsonl.gz": read_jsonl_gz,
    ".jsonl.zst": read_jsonl_zst,
    ".parquet": read_parquet,
    ".txt": read_text,
}


def num_units(path: Path, kind: str) -> int:
    """Units that a range counts: bytes, row groups, or 1 for a format that can only be read from the start."""
    if kind == ".jsonl":
        return path.stat().st_size
    if kind == ".parquet":
        return _open_parquet(str(path)).num_row_groups
    return 1


def _package(name: str, file_range: FileRange) -> Any:
    try:
        return __import__(name)
    except ImportError:
        raise UserError(
            f"{file_range.path}: {file_range.kind} needs {name}; in the clone, pip install --editable '.[data]'"
        ) from None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
