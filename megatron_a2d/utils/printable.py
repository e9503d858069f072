"""Untrusted text (names, file contents, model output), escaped for terminals and logs.

Control characters can move the cursor and overwrite output, line breaks can forge a line that scripts take for ours,
and bidirectional marks can reorder a line. All of them are shown as Python escapes.
"""

from __future__ import annotations

import re
import sys
from typing import TextIO

LONGEST = 8_000  # characters in a line; more, such as a quoted file, is cut

# Cc, Cs (lone surrogates, including undecodable bytes of file names), line and paragraph separators, and the explicit
# bidirectional marks.
_CONTROL = r"\x00-\x1f\x7f-\x9f\ud800-\udfff\u2028\u2029\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"
_ON_A_LINE = re.compile(f"[{_CONTROL}]")
_IN_A_TEXT = re.compile(f"(?![\n\t])[{_CONTROL}]")


def one_line(text: object) -> str:
    """`text` as one line of printable characters; a very long one is cut in the middle."""
    line = _ON_A_LINE.sub(_escape, str(text))
    if len(line) > LONGEST:
        line = f"{line[: LONGEST // 2]} [...] {line[-LONGEST // 2 :]}"
    return line


def is_name(value: object) -> bool:
    """Whether `value` is a safe name for a file, a table or a log: printable, not a path, no leading dot."""
    return (
        isinstance(value, str)
        and 0 < len(value.encode("utf-8", "replace")) <= 200
        and value.isprintable()
        and not value.startswith(".")
        and not set("/\\") & set(value)
    )


def lines_of(text: str) -> str:
    """`text` with all control characters escaped except line breaks and tabs."""
    return _IN_A_TEXT.sub(_escape, text)


def print_line(text: object, file: TextIO | None = None) -> None:
    """Print one line to `file` (default: stdout) with a single write, and flush."""
    stream = file or sys.stdout
    stream.write(f"{one_line(text)}\n")
    stream.flush()


def print_text(text: str) -> None:
    """Print a multi-line text to stdout: unchanged to a file or a pipe, escaped to a terminal."""
    sys.stdout.write(f"{lines_of(text) if sys.stdout.isatty() else text}\n")
    sys.stdout.flush()


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode("ascii")


def without_passwords(text: str) -> str:
    """`text` with user and password removed from its URLs, as libraries may quote them in error messages."""
    return re.sub(r"(?<=://)[^/\s]*@", "***@", text)
