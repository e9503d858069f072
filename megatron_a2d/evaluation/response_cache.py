"""Answers that were found, on disk as soon as they are known, so that an interrupted evaluation goes on.

One JSON object a line, {"key": ..., "value": ...}. A key is the hash of everything that the answer depends on: with
other settings nothing matches and everything is found anew. A last line that was cut short is left out.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from megatron_a2d.utils.errors import UserError
from megatron_a2d.utils.parsing import ParseError, parse_json
from megatron_a2d.utils.partial_files import open_log


class Journal:
    """`path` None keeps answers in memory alone; `writes` False reads the file and leaves it as it is."""

    def __init__(self, path: Path | None, settings: Any, writes: bool = True):
        self._settings = json.dumps(settings, sort_keys=True)
        self._known: dict[str, Any] = {}
        self._file = None
        if path is None:
            return
        try:
            for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
                try:
                    record = parse_json(line)
                except ParseError:
                    continue
                if isinstance(record, dict) and isinstance(record.get("key"), str) and "value" in record:
                    self._known[record["key"]] = record["value"]
            if not writes:
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open_log(path)
            self._file.write("\n")  # ends a line that was cut short
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--out {path.parent}: {path.name} cannot be used ({error}); name another place") from None

    def key(self, *parts: Any) -> str:
        return hashlib.sha256(json.dumps([self._settings, *parts], sort_keys=True).encode()).hexdigest()

    def get(self, key: str) -> Any:
        """The answer, or None."""
        return self._known.get(key)

    def add(self, answers: dict[str, Any]) -> None:
        """Keep and write them; they survive the end of the process."""
        self._known |= answers
        if self._file:
            self._file.writelines(json.dumps({"key": key, "value": value}) + "\n" for key, value in answers.items())
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file:
            self._file.close()
