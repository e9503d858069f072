"""Errors that a user can cause. Everything else that is raised is a bug and keeps its traceback.

A message is one line: what (the flag or file and its value), why it is wrong, what to do. Whatever it quotes stays on
that line and prints as visible characters, so that nobody's file can write an error message of its own.
`console.entry_point` prints the lines and exits with code 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from megatron_a2d.utils.exit_codes import SAVE_FAILED
from megatron_a2d.utils.printable import one_line


class UserError(Exception):
    """One or more problems in what the user gave us, each a line that names remedy and reason."""

    def __init__(self, problems: str | Iterable[str]):
        self.problems = [one_line(line) for line in ([problems] if isinstance(problems, str) else problems)]
        super().__init__("\n".join(self.problems))


class SaveError(Exception):
    """A checkpoint could not be written: one line for the user, raised on all ranks together."""

    EXIT_CODE = SAVE_FAILED


def nearest(word: str, candidates: Iterable[str]) -> str:
    """' (did you mean X?)' for the candidate closest to `word`, or '' when nothing is close."""
    match = difflib.get_close_matches(word, list(candidates), n=1)
    return f" (did you mean {match[0]}?)" if match else ""
