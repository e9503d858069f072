"""A demo corpus that every machine has: the source code of Python's standard library, as .jsonl documents.

    python -m data_prep.stdlib_corpus --out corpus.jsonl [--max-chars 4000]

Each line is {"text", "source"}. A module becomes one document, or several when it is longer than
`--max-chars`: it is then split before top-level definitions, before methods where a definition alone is too
long, and at blank lines or line ends as a last resort. The documents of a module, joined, are the module.
The same Python gives the same bytes.
"""

from __future__ import annotations

import json
import re
import sysconfig
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

from megatron_a2d.config.cli import Parser
from megatron_a2d.terminal.console import console, entry_point, human, progress
from megatron_a2d.utils.atomic_write import new_file
from megatron_a2d.utils.errors import UserError

SKIPPED_DIRECTORIES = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}

# Where a text may be cut, best first; the cut is before the match. Decorators and comments above a definition
# stay with it.
_DEFINITION = r"(?:[@#].*\n(?:{0}[@#].*\n)*{0})?(?:async def|def|class) "
CUTS = (
    re.compile("^" + _DEFINITION.format(""), re.MULTILINE),
    re.compile("^    " + _DEFINITION.format("    "), re.MULTILINE),
    re.compile(r"(?<=\n\n)(?=[^\n])"),
    re.compile(r"^", re.MULTILINE),
)


def split_text(text: str, max_chars: int, cuts: Sequence[re.Pattern[str]] = CUTS) -> list[str]:
    """Split `text` into chunks of at most `max_chars` characters; "".join(chunks) == text.

    A single line is never split, so a longer line is a longer chunk.
    """
    if len(text) <= max_chars or not cuts:
        return [text] if text else []
    starts = sorted({0, len(text), *(match.start() for match in cuts[0].finditer(text))})
    chunks: list[str] = []
    may_grow = False  # whether the next part may be appended to the last chunk
    for start, stop in pairwise(starts):
        part = text[start:stop]
        if len(part) > max_chars:
            chunks += split_text(part, max_chars, cuts[1:])
            may_grow = False
        elif may_grow and len(chunks[-1]) + len(part) <= max_chars:
            chunks[-1] += part
        else:
            chunks.append(part)
            may_grow = True
    return chunks


def source_files(root: Path) -> list[Path]:
    """The library's modules without tests and installed packages, ordered by their path."""
    files = [path for path in root.rglob("*.py") if not SKIPPED_DIRECTORIES & set(path.relative_to(root).parts[:-1])]
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def read_documents(root: Path, files: Sequence[Path], max_chars: int) -> Iterator[tuple[int, list[dict[str, str]]]]:
    """Size in bytes and documents of each file; (size, []) if it is not UTF-8."""
    for path in files:
        data = path.read_bytes()
        try:
            # As Python itself reads a module: without a byte order mark, with "\n" line ends.
            text = data.decode("utf-8-sig").replace("\r\n", "\n")
        except UnicodeDecodeError:
            yield len(data), []
            continue
        source = path.relative_to(root).as_posix()
        chunks = (chunk for chunk in split_text(text, max_chars) if chunk.strip())
        yield len(data), [{"text": chunk, "source": source} for chunk in chunks]


def main(argv: list[str] | None = None) -> None:
    parser = Parser(
        prog="python -m data_prep.stdlib_corpus", description="Write Python's standard library as .jsonl documents."
    )
    parser.add_argument("--out", required=True, type=Path, help="the .jsonl file to write")
    parser.add_argument("--max-chars", type=int, default=4000, help="longest document, in characters")
    arguments = parser.parse_args(argv)
    if arguments.max_chars < 1:
        raise UserError(f"--max-chars {arguments.max_chars}: must be positive; give 1 or more")
    root = Path(sysconfig.get_paths()["stdlib"])
    files = source_files(root)
    if not files:
        raise UserError(f"{root}: holds no .py files: this Python has no readable standard library; use another Python")

    num_documents = num_characters = num_skipped = 0
    size = sum(path.stat().st_size for path in files)
    with new_file(arguments.out) as partial, open(partial, "w", encoding="utf-8", newline="\n") as stream:
        with progress("standard library", size, "B") as advance:
            for num_bytes, documents in read_documents(root, files, arguments.max_chars):
                for document in documents:
                    stream.write(json.dumps(document, ensure_ascii=False) + "\n")
                    num_characters += len(document["text"])
                num_documents += len(documents)
                num_skipped += bool(num_bytes) and not documents
                advance(num_bytes)
    console.print(
        f"{arguments.out}: {num_documents:,} documents, {human(num_characters)} characters "
        f"from {len(files):,} modules ({num_skipped} skipped: not UTF-8 or blank)"
    )


if __name__ == "__main__":
    entry_point(main)
