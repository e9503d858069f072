"""Benchmark of data_prep.tokenize_corpus against Megatron-LM's preprocessing and against the tokenizer library alone.

    python -m bench.tokenize [--megabytes 320] [--workers 2] [--rounds 3] [--out bench/results/tokenize_cpu.json]

The corpus is available in every installation: source code and documentation of Python's standard library and of the
installed packages (.py, .pyi, .md, .rst, .txt), one document per file, at most 20,000 characters each. It is repeated
up to the requested size, and in every pass but the first one word in eight is respelt, with letters derived from the
file's name, the pass and the word, so that the tokenizer always meets new words and its cache does not make the work
trivial. The tokenizer is trained on the first pass, with a vocabulary of 16,384 and Qwen's splitting pattern.

classic    the loop of preprocess_data.py: lines of the file go through a multiprocessing pool, 32 at a time; a worker
           parses one and calls the Hugging Face tokenizer on it; the first process adds it to megatron.core's builder
ours       the complete command in a separate process: start, reading, parsing, validating, encoding, writing
gigatoken  the same work by the library alone, in a separate process: its own reader of the same file, encode_files with
           as many threads, the tokens written and flushed; without checks, checksums, split and resumption
encode     encode_batch of gigatoken on a list in memory: without start, reading and writing

Ours, gigatoken, encode: the entire corpus. Ours and classic: the first 21 MB. In turns, on the same cores; the corpus
in the page cache (warm) and dropped from it (cold, checked; encode reads nothing while it is timed). `gigatoken / ours`
is the part of the library's speed that is left, `encode / ours` the share of encoding.

Memory: total resident memory of all processes of a job, sampled, once for each size.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

from bench.page_cache import CACHES, before
from bench.paired import Usage, compare
from bench.process_tree import command, module, peak_memory, run
from bench.result_file import Figure, add_arguments, write
from megatron_a2d.config.cli import Parser
from megatron_a2d.terminal.console import console, entry_point
from megatron_a2d.utils.errors import UserError

KINDS, MAX_CHARS = {".py", ".pyi", ".md", ".rst", ".txt"}, 20_000
VOCABULARY = 16_384
BEGINNING = 21_000_000  # bytes that the classic method processes


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="bench.tokenize", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--megabytes", type=int, default=320, help="size of the corpus")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes or threads")
    parser.add_argument("--work", type=Path, default=None, metavar="DIR", help="a folder on the disk to measure")
    add_arguments(parser, rounds=3)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="bench_tokenize", dir=options.work) as directory:
        measure(Path(directory), options.megabytes * 1_000_000, options.workers, options.rounds, options.out)


def measure(directory: Path, size: int, workers: int, rounds: int, out: Path | None) -> None:
    corpus, beginning, training, tokenizer = (directory / name for name in ("all.jsonl", "some.jsonl", "t.jsonl", "t"))
    sizes, documents = write_corpus(corpus, beginning, training, size)
    console.print(f"{sizes['all'] / 1e6:.1f} MB of text in {documents:,} documents")
    run(module("data_prep.train_tokenizer", "--input", training, "--vocab-size", VOCABULARY, "--out", tokenizer))

    def tokenize(text: Path, name: str) -> list[str]:
        return module(
            "data_prep.tokenize_corpus", "--input", text, "--tokenizer", tokenizer, "--output-prefix", directory / name,
            "--valid-fraction", 0, "--workers", workers, "--encoder", "gigatoken",
        )  # fmt: skip

    threads = {"RAYON_NUM_THREADS": str(workers)}
    alone = module("bench.tokenize_raw", "files", corpus, tokenizer, workers, directory / "gigatoken")

    def encode() -> Usage:
        words = module("bench.tokenize_raw", "encode", corpus, tokenizer, workers)
        environment = {**os.environ, **threads}
        printed = subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout
        return Usage(*map(float, printed.split()))

    classic_words = module("bench.tokenize", "--classic", beginning, tokenizer, directory / "classic", workers)
    compared = [
        compare(
            name, sides, pairs, rounds=rounds, cache=cache, warm_up=0,
            prepare=before(
                cache, [text],
                [directory / f"{name}.{end}" for name in written for end in ("bin", "idx", "json", "sums")],
            ),
        )
        for cache in CACHES
        for name, written, text, sides, pairs in (
            (f"{sizes['all'] / 1e6:.0f} MB", ("all", "gigatoken"), corpus,
             {"ours": command(tokenize(corpus, "all")), "gigatoken": command(alone, threads), "encode": encode},
             [("gigatoken", "ours"), ("encode", "ours")]),
            (f"{sizes['beginning'] / 1e6:.0f} MB", ("some",), beginning,
             {"ours": command(tokenize(beginning, "some")), "classic": command(classic_words)}, [("classic", "ours")]),
        )
    ]  # fmt: skip
    run(alone, threads)
    if (directory / "gigatoken.idx").stat().st_size != 4 * documents:  # its reader ends at a line that it cannot read
        raise UserError("bench.tokenize: gigatoken has not read all documents; the comparison is invalid")
    figures = [
        Figure(f"peak memory, {sizes[key] / 1e6:.0f} MB", "bytes", [float(peak_memory(tokenize(text, f"peak_{key}")))])
        for key, text in (("beginning", beginning), ("all", corpus))
    ]
    ends = (".bin", ".idx")
    if any(_digest(directory / f"peak_beginning{end}") != _digest(directory / f"classic{end}") for end in ends):
        raise UserError("bench.tokenize: ours and classic wrote different files; the comparison is invalid")
    settings = {"bytes": sizes, "documents": documents, "workers": workers, "vocabulary": VOCABULARY}
    write(out, "tokenize", compared, figures, settings)


def write_corpus(path: Path, beginning: Path, training: Path, size: int) -> tuple[dict[str, int], int]:
    """Write all documents, the first ones, and some to train a tokenizer; returns bytes of text, and documents."""
    num_documents = trained = 0
    sizes = {"all": 0, "beginning": 0}
    with ExitStack() as stack:
        everything, some, few = (
            stack.enter_context(open(p, "w", encoding="utf-8")) for p in (path, beginning, training)
        )
        for text in texts():
            line = json.dumps({"text": text}, ensure_ascii=False) + "\n"
            everything.write(line)
            if num_documents % 8 == 0 and trained < 20_000_000:
                few.write(line)
                trained += len(line)
            num_bytes = len(text.encode())
            if sizes["beginning"] < BEGINNING:
                some.write(line)
                sizes["beginning"] += num_bytes
            sizes["all"] += num_bytes
            num_documents += 1
            if sizes["all"] >= size:
                break
    return sizes, num_documents


def texts() -> Iterator[str]:
    roots = sorted(
        {sysconfig.get_paths()[name] for name in ("stdlib", "purelib")} | {p for p in sys.path if "site-" in p}
    )
    files = sorted(
        {file for root in roots for file in Path(root).rglob("*") if file.suffix in KINDS and file.is_file()}
    )
    for number in count():
        for file in files:
            try:
                text = file.read_text(encoding="utf-8")[:MAX_CHARS]
            except (OSError, UnicodeDecodeError):
                continue
            if text.strip():
                yield respell(text, f"{file.name} {number}") if number else text


def respell(text: str, key: str) -> str:
    """Replace one word in eight by other letters, the same ones wherever the word occurs."""
    salt = hashlib.blake2b(key.encode()).digest()

    def other(match: re.Match[str]) -> str:
        word = match.group()
        drawn = hashlib.blake2b(word.encode(), key=salt[:16], digest_size=16).digest()
        if drawn[0] >= 32:
            return word
        return "".join("etaoinshrdlucmfw"[drawn[1 + i % 15] >> 4] for i in range(len(word)))

    return re.sub(r"[A-Za-z]{4,}", other, text)


class Encoder:
    """Worker of the classic method."""

    tokenizer: Any = None

    @classmethod
    def start(cls, path: str) -> None:
        from transformers import AutoTokenizer

        cls.tokenizer = AutoTokenizer.from_pretrained(path)

    @classmethod
    def encode(cls, line: str) -> list[int]:
        return [*cls.tokenizer(json.loads(line)["text"]).input_ids, cls.tokenizer.eos_token_id]


def classic(corpus: Path, tokenizer: Path, out: Path, workers: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{out}.bin", dtype=DType.optimal_dtype(VOCABULARY))
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers, Encoder.start, (str(tokenizer),)) as pool, open(corpus, encoding="utf-8") as lines:
        for ids in pool.imap(Encoder.encode, lines, 32):
            builder.add_document(ids, [len(ids)])
    builder.finalize(f"{out}.idx")


def _digest(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--classic"]:  # the other side, in a separate process
        corpus, tokenizer, out = map(Path, sys.argv[2:5])
        classic(corpus, tokenizer, out, int(sys.argv[5]))
    else:
        entry_point(main)
