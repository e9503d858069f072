"""On-disk response cache (JSONL), from which an interrupted evaluation resumes.

One JSON object per line, {"key": ..., "value": ...}. A key is a hash of everything that the response depends on, so
that nothing is reused after a change of settings. A truncated last line is ignored.
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


class ResponseCache:
    """Responses by key. With `path` None they are kept in memory only; with `writes` False the file is read only."""

    def __init__(self, path: Path | None, settings: Any, writes: bool = True):
        self._settings = json.dumps(settings, sort_keys=True)
        self._responses: dict[str, Any] = {}
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
                    self._responses[record["key"]] = record["value"]
            if not writes:
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open_log(path)
            self._file.write("\n")  # ends a truncated line
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"--out {path.parent}: {path.name} cannot be used ({error}); choose another directory"
            ) from None

    def key(self, *parts: Any) -> str:
        return hashlib.sha256(json.dumps([self._settings, *parts], sort_keys=True).encode()).hexdigest()

    def get(self, key: str) -> Any:
        """The response, or None if there is none."""
        return self._responses.get(key)

    def add(self, responses: dict[str, Any]) -> None:
        """Store the responses and flush them to disk."""
        self._responses |= responses
        if self._file:
            self._file.writelines(json.dumps({"key": key, "value": value}) + "\n" for key, value in responses.items())
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file:
            self._file.close()
