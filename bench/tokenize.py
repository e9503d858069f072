"""Benchmark of data_prep.tokenize_corpus against Megatron-LM's preprocessing and against the bare tokenizer library.

    python -m bench.tokenize [--megabytes 640] [--workers 2] [--rounds 3] [--out bench/results/tokenize_cpu.json]

The corpus is available in every installation: source code and documentation of Python's standard library and of the
installed packages (.py, .pyi, .md, .rst, .txt), one document per file, at most 20,000 characters each. It is repeated
up to the requested size, and in every pass but the first one word in eight is respelt, with letters derived from the
file's name, the pass and the word, so that the tokenizer always meets new words and its cache does not make the work
trivial. The tokenizer is trained on the first pass, with a vocabulary of 16,384 and Qwen's splitting pattern.

classic    the loop of preprocess_data.py: lines of the file go through a multiprocessing pool, 32 at a time; a worker
           parses one and calls the Hugging Face tokenizer on it; the first process adds it to megatron.core's builder
ours       the complete command in a separate process: reading, parsing, validating, encoding, writing
raw        encode_batch of gigatoken on a list in memory, with as many threads, without reading and writing

Text is counted in UTF-8 bytes of the documents, without JSON. Classic and ours: the first 208 MB. Ours and raw: the
entire corpus, alternately, on the same cores; raw does not include its start-up, so `part_of_raw` includes all of ours,
and `part_of_raw_further` is the marginal speed (the corpus after the first 208 MB).

Memory: total resident memory of all processes of a job, sampled ten times per second, once for each size.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from itertools import count
from pathlib import Path
from typing import Any

import psutil

from bench.result_tables import machine
from megatron_a2d.config.cli import Parser
from megatron_a2d.terminal.console import console, entry_point
from megatron_a2d.utils.atomic_write import write_json
from megatron_a2d.utils.errors import UserError

KINDS, MAX_CHARS = {".py", ".pyi", ".md", ".rst", ".txt"}, 20_000
VOCABULARY = 16_384
BEGINNING = 208_000_000  # bytes that the classic method processes


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="bench.tokenize", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--megabytes", type=int, default=640, help="size of the corpus")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes or threads")
    parser.add_argument("--rounds", type=int, default=3, help="alternating runs of each")
    parser.add_argument("--out", type=Path, default=None, help="write the result as JSON")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="bench_tokenize") as directory:
        result = measure(Path(directory), options.megabytes * 1_000_000, options.workers, options.rounds)
    for name, speed in result["megabytes_per_second"].items():
        console.print(f"{name:14} {speed:8.2f} MB/s")
    for name in ("times_classic", "part_of_raw", "part_of_raw_further"):
        console.print(f"{name:20} {result[name]:8.2f}")
    for name, peak in result["peak_bytes"].items():
        console.print(f"{name:14} {peak / 1e6:8.0f} MB of memory")
    if not result["same_bytes_as_classic"]:
        raise UserError("bench.tokenize: ours and classic wrote different files; the comparison is invalid")
    if options.out:
        write_json(options.out, {"machine": machine(), **result})


def measure(directory: Path, size: int, workers: int, rounds: int) -> dict[str, Any]:
    corpus, beginning, training, tokenizer = (directory / name for name in ("all.jsonl", "some.jsonl", "t.jsonl", "t"))
    sizes, documents = write_corpus(corpus, beginning, training, size)
    console.print(f"{sizes['all'] / 1e6:.1f} MB of text in {documents:,} documents")
    _run("data_prep.train_tokenizer", "--input", training, "--vocab-size", VOCABULARY, "--out", tokenizer)

    def command(text: Path, out: str) -> tuple[object, ...]:
        return (
            "data_prep.tokenize_corpus", "--input", text, "--tokenizer", tokenizer, "--output-prefix", directory / out,
            "--valid-fraction", 0, "--workers", workers, "--encoder", "gigatoken",
        )  # fmt: skip

    def ours(text: Path, out: str) -> float:
        begin = time.perf_counter()
        _run(*command(text, out))
        return time.perf_counter() - begin

    seconds: dict[str, list[float]] = {"raw": [], "ours": [], "ours_beginning": [], "classic": []}
    for number in range(rounds):
        seconds["raw"].append(float(_run("bench.tokenize_raw", corpus, tokenizer, workers, threads=workers)))
        seconds["ours"].append(ours(corpus, f"all{number}"))
        seconds["ours_beginning"].append(ours(beginning, f"some{number}"))
        for path in directory.glob(f"all{number}.*"):
            path.unlink()
        begin = time.perf_counter()
        classic(beginning, tokenizer, directory / "classic", workers)
        seconds["classic"].append(time.perf_counter() - begin)
    same = all(_digest(directory / f"some0{end}") == _digest(directory / f"classic{end}") for end in (".bin", ".idx"))
    peaks = {path.stem: _peak_memory(*command(path, f"peak_{path.stem}")) for path in (beginning, corpus)}
    middle = {name: statistics.median(times) for name, times in seconds.items()}
    text = {"raw": "all", "ours": "all", "ours_beginning": "beginning", "classic": "beginning"}
    speed = {name: sizes[text[name]] / 1e6 / middle[name] for name in seconds}
    further = (sizes["all"] - sizes["beginning"]) / 1e6 / (middle["ours"] - middle["ours_beginning"])
    return {
        "bytes": sizes, "documents": documents, "workers": workers, "vocabulary": VOCABULARY, "seconds": seconds,
        "megabytes_per_second": speed, "times_classic": speed["ours_beginning"] / speed["classic"],
        "part_of_raw": speed["ours"] / speed["raw"], "part_of_raw_further": further / speed["raw"],
        "same_bytes_as_classic": same, "peak_bytes": {"beginning": peaks[beginning.stem], "all": peaks[corpus.stem]},
    }  # fmt: skip


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
    from megatron_a2d.data.indexed_dataset import DType, IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{out}.bin", dtype=DType.optimal_dtype(VOCABULARY))
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers, Encoder.start, (str(tokenizer),)) as pool, open(corpus, encoding="utf-8") as lines:
        for ids in pool.imap(Encoder.encode, lines, 32):
            builder.add_document(ids, [len(ids)])
    builder.finalize(f"{out}.idx")


def _peak_memory(module: object, *arguments: object) -> int:
    """Peak total memory of a command and its processes in bytes; shared memory counts for each."""
    peak = 0
    with subprocess.Popen(_command(module, *arguments), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as job:
        while job.poll() is None:
            held = 0
            with suppress(psutil.NoSuchProcess):
                for process in [watched := psutil.Process(job.pid), *watched.children(recursive=True)]:
                    held += process.memory_info().rss
            peak = max(peak, held)
            time.sleep(0.1)
    if job.returncode:
        raise RuntimeError(f"{module} failed with exit code {job.returncode}")
    return peak


def _command(module: object, *arguments: object) -> list[str]:
    return [sys.executable, "-W", "ignore", "-m", str(module), *map(str, arguments)]


def _run(module: object, *arguments: object, threads: int = 1) -> str:
    command = _command(module, *arguments)
    environment = {**os.environ, "RAYON_NUM_THREADS": str(threads)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}: {result.stderr[-2000:]}")
    return result.stdout


def _digest(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


if __name__ == "__main__":
    entry_point(main)
