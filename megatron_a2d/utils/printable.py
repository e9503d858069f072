"""Text of other people (names, file contents, a model's words) as a terminal and a log may show it.

Control characters move the cursor and rewrite what was printed; a line break makes a second line that scripts take for
a message of ours; marks of writing direction reorder a line. All of them are shown as Python would write them.
"""

from __future__ import annotations

import re
import sys
from typing import TextIO

LONGEST = 8_000  # characters of a line; an error that quotes a whole file helps nobody

# Cc, Cs (halves of characters, and bytes of file names that are not UTF-8), line and paragraph separators,
# and the explicit marks of writing direction.
_CONTROL = r"\x00-\x1f\x7f-\x9f\ud800-\udfff\u2028\u2029\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"
_ON_A_LINE = re.compile(f"[{_CONTROL}]")
_IN_A_TEXT = re.compile(f"(?![\n\t])[{_CONTROL}]")


def one_line(text: object) -> str:
    """`text` as one line of printable characters; the middle of a very long one is left out."""
    line = _ON_A_LINE.sub(_escape, str(text))
    if len(line) > LONGEST:
        line = f"{line[: LONGEST // 2]} [...] {line[-LONGEST // 2 :]}"
    return line


def is_name(value: object) -> bool:
    """Whether `value` can name something in a directory, a table or a log: printable, no path, not hidden."""
    return (
        isinstance(value, str)
        and 0 < len(value.encode("utf-8", "replace")) <= 200
        and value.isprintable()
        and not value.startswith(".")
        and not set("/\\") & set(value)
    )


def lines_of(text: str) -> str:
    """`text` with its line breaks and tabs, and no other control character."""
    return _IN_A_TEXT.sub(_escape, text)


def print_line(text: object, file: TextIO | None = None) -> None:
    """Print one line, on stdout unless `file` says otherwise, at once and in one piece."""
    stream = file or sys.stdout
    stream.write(f"{one_line(text)}\n")
    stream.flush()


def print_text(text: str) -> None:
    """Print a text of several lines on stdout: in a file or a pipe as it is, byte for byte, else what is harmless."""
    sys.stdout.write(f"{lines_of(text) if sys.stdout.isatty() else text}\n")
    sys.stdout.flush()


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode("ascii")


def without_passwords(text: str) -> str:
    """`text` whose addresses have lost user and password: a library's message may quote the one that was set."""
    return re.sub(r"(?<=://)[^/\s]*@", "***@", text)
