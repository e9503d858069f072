"""Result files of a study: a table in JSON lines, and a Markdown page.

The page is created once with a heading for conclusions; later only the results between its marks are replaced, so that
conclusions written by hand are kept.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_a2d.utils.atomic_write import finite, new_file, read_text
from megatron_a2d.utils.errors import UserError

_BEGIN, _END = "<!-- results -->", "<!-- end of results -->"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; cells are converted by str()."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def write_page(path: Path, title: str, question: str, results: str) -> None:
    """Write `results` between the marks of the page, which is created with title and question if missing."""
    block = f"{_BEGIN}\n{results.strip()}\n{_END}\n"
    if path.is_file():
        page = read_text(path, "the page")
        pattern = re.compile(f"{_BEGIN}.*?{_END}\n", re.DOTALL)
        if not pattern.search(page):
            raise UserError(f"{path}: has no mark for results ({_BEGIN}); name another directory with --page")
        page = pattern.sub(lambda match: block, page)
    else:
        page = f"# {title}\n\n{question.strip()}\n\n{block}"
    with new_file(path) as partial:
        partial.write_text(page, encoding="utf-8")


def write_lines(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """One JSON object per line; NaNs and infinities become null."""
    with new_file(path) as partial:
        partial.write_text("".join(json.dumps(finite(record)) + "\n" for record in records), encoding="utf-8")
