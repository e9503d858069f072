"""User errors. Any other exception is a bug and keeps its traceback.

A message is one line: what is wrong (the flag or file and its value), why, and what to do. Anything it quotes is
escaped to printable characters on that line, so that the contents of a file cannot forge an error message.
`console.entry_point` prints the lines and exits with code 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from megatron_a2d.utils.exit_codes import SAVE_FAILED
from megatron_a2d.utils.printable import one_line


class UserError(Exception):
    """One or more problems with the user's input, each one line with reason and remedy."""

    def __init__(self, problems: str | Iterable[str]):
        self.problems = [one_line(line) for line in ([problems] if isinstance(problems, str) else problems)]
        super().__init__("\n".join(self.problems))


class SaveError(Exception):
    """A checkpoint could not be written: one line for the user, raised on all ranks."""

    EXIT_CODE = SAVE_FAILED


def nearest(word: str, candidates: Iterable[str]) -> str:
    """' (did you mean X?)' for the candidate closest to `word`, or '' if none is close."""
    match = difflib.get_close_matches(word, list(candidates), n=1)
    return f" (did you mean {match[0]}?)" if match else ""
