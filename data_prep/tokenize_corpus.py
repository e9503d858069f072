"""Text to token files that training reads: .jsonl or .txt in, PREFIX.bin and PREFIX.idx out.

    python -m data_prep.tokenize_corpus --input corpus.jsonl --tokenizer tokenizer --output-prefix data/corpus

writes data/corpus_train.{bin,idx,json} and data/corpus_valid.{bin,idx,json}; `--valid-fraction 0` writes only
data/corpus.{bin,idx,json}. Whether a document is held out is decided by a hash of its text: the same
document always falls on the same side, whatever else is in the corpus, and copies of it too.
The documents stream through in batches, so memory stays bounded; the output does not depend on `--workers`.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from data_prep.encoders import Encoder, open_encoder
from data_prep.readers import Counts, Document, input_size, read_documents
from megatron_a2d.cli import Parser
from megatron_a2d.console import console, entry_point, human
from megatron_a2d.errors import UserError
from megatron_a2d.files import new_file, write_json

# A batch is what is encoded at a time. By characters, so that long documents do not make it large.
BATCH_CHARACTERS = 1 << 21
SUFFIXES = (".bin", ".json", ".idx")  # in the order in which they appear: the index completes a token file


@dataclass
class TokenWriter:
    """One token file while it is written, under temporary names."""

    prefix: str
    partial: dict[str, Path]
    encoder: Encoder
    tokenizer: Path
    num_documents: int = 0
    num_tokens: int = 0
    builder: Any = field(init=False)

    def __post_init__(self) -> None:
        # Here, for it takes seconds: whoever asks for --help or mistypes a path need not wait.
        from megatron_a2d.data.indexed import DType, IndexedDatasetBuilder

        dtype = DType.optimal_dtype(self.encoder.vocab_size)
        self.builder = IndexedDatasetBuilder(str(self.partial[".bin"]), dtype=dtype)

    def add(self, token_ids: list[int]) -> None:
        self.builder.add_document(np.array(token_ids, dtype=np.int64), [len(token_ids)])
        self.num_documents += 1
        self.num_tokens += len(token_ids)

    def finish(self) -> None:
        self.builder.finalize(str(self.partial[".idx"]))
        description = {
            "tokenizer": str(self.tokenizer),
            "vocab_size": self.encoder.vocab_size,
            "eod_token_id": self.encoder.eod_token_id,
            "documents": self.num_documents,
            "tokens": self.num_tokens,
        }
        write_json(self.partial[".json"], description)


@contextmanager
def open_writers(prefixes: list[str], encoder: Encoder, tokenizer: Path) -> Iterator[list[TokenWriter]]:
    """Writers whose files get their final names together, when the block ends without an error."""
    taken = [prefix + suffix for prefix in prefixes for suffix in SUFFIXES if os.path.exists(prefix + suffix)]
    if taken:
        raise UserError(f"--output-prefix: {taken[0]} already exists; remove it or name another prefix")
    with ExitStack() as stack:
        writers = []
        for prefix in prefixes:
            # Leaving the stack renames in the reverse order of entering.
            partial = {suffix: stack.enter_context(new_file(prefix + suffix)) for suffix in reversed(SUFFIXES)}
            writers.append(TokenWriter(prefix, partial, encoder, tokenizer))
            stack.callback(writers[-1].builder.data_file.close)
        yield writers
        for writer in writers:
            writer.finish()


def is_held_out(text: str, valid_fraction: float) -> bool:
    """A stable draw by the document's text, the same on every machine."""
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "little") < valid_fraction * 2.0**64


def batches(documents: Iterator[Document], num_characters: int = BATCH_CHARACTERS) -> Iterator[list[Document]]:
    """Consecutive documents of about so many characters in all."""
    batch: list[Document] = []
    filled = 0
    for document in documents:
        batch.append(document)
        filled += len(document.text)
        if filled >= num_characters:
            yield batch
            batch, filled = [], 0
    if batch:
        yield batch


@contextmanager
def _progress(total: int) -> Iterator[Any]:
    """A bar with bytes and tokens a second; yields `advance(num_bytes, num_tokens)`."""
    columns = (
        TextColumn("tokenise"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[speed]}", style="cyan"),
        TimeElapsedColumn(), TextColumn("eta"), TimeRemainingColumn(),
    )  # fmt: skip
    start, num_bytes, num_tokens = time.perf_counter(), 0, 0
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=total, speed="")

        def advance(more_bytes: int, more_tokens: int) -> None:
            nonlocal num_bytes, num_tokens
            num_bytes, num_tokens = num_bytes + more_bytes, num_tokens + more_tokens
            seconds = time.perf_counter() - start
            speed = f"{human(num_bytes / seconds, 'B')}/s  {human(num_tokens / seconds)} tokens/s"
            bar.update(task, advance=more_bytes, speed=speed)

        yield advance


def tokenize(arguments: argparse.Namespace, encoder: Encoder, counts: Counts) -> list[TokenWriter]:
    """Read, encode and write everything; the writers' counts are final when this returns."""
    prefix, fraction = arguments.output_prefix, arguments.valid_fraction
    prefixes = [f"{prefix}_train", f"{prefix}_valid"] if fraction else [prefix]
    size = input_size(arguments.input)
    with open_writers(prefixes, encoder, arguments.tokenizer) as writers:
        with _progress(size) as advance:
            for batch in batches(read_documents(arguments.input, arguments.json_key, counts)):
                encoded = encoder.encode([document.text for document in batch])
                for document, token_ids in zip(batch, encoded, strict=True):
                    writers[bool(fraction) and is_held_out(document.text, fraction)].add(token_ids)
                advance(sum(document.num_bytes for document in batch), sum(map(len, encoded)))
        for writer in writers:
            if writer.num_tokens == 0:
                raise UserError(
                    f"--valid-fraction {fraction}: {writer.prefix} gets no token of the {counts.documents} "
                    "documents; give more documents or another fraction (0: hold out none)"
                )
    return writers


def report(writers: list[TokenWriter], counts: Counts) -> None:
    table = Table()
    for heading in ("file", "documents", "tokens", "bytes"):
        table.add_column(heading, justify="left" if heading == "file" else "right", overflow="fold")
    for writer in writers:
        num_bytes = os.path.getsize(writer.prefix + ".bin")
        table.add_row(writer.prefix, f"{writer.num_documents:,}", f"{writer.num_tokens:,}", human(num_bytes, "B"))
    console.print(table)
    console.print(f"{counts.empty:,} empty documents skipped")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="data_prep.tokenize_corpus", description="Tokenise text into Megatron's .bin/.idx files.")
    parser.add_argument(
        "--input", required=True, nargs="+", action="append", type=Path,
        help=".jsonl files (one object in each line) and .txt files (one document each)",
    )  # fmt: skip
    parser.add_argument("--json-key", default="text", help="the key of a document's text in .jsonl")
    parser.add_argument(
        "--tokenizer",
        required=True,
        type=Path,
        help="a Hugging Face directory, a tokenizer.json or a sentencepiece .model",
    )
    parser.add_argument("--output-prefix", required=True, help="path without .bin and .idx")
    parser.add_argument("--valid-fraction", type=float, default=0.02, help="part of the documents to hold out; 0: none")
    parser.add_argument(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end each document with its own token",
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="threads that encode")
    arguments = parser.parse_args(argv)
    arguments.input = list(chain.from_iterable(arguments.input))
    if not 0 <= arguments.valid_fraction < 1:
        raise UserError(f"--valid-fraction {arguments.valid_fraction}: must be at least 0 and below 1")
    if arguments.workers < 1:
        raise UserError(f"--workers {arguments.workers}: something must encode; give 1 or more")
    return arguments


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    encoder = open_encoder(arguments.tokenizer, arguments.append_eod, arguments.workers)
    counts = Counts()
    report(tokenize(arguments, encoder, counts), counts)


if __name__ == "__main__":
    entry_point(main)
