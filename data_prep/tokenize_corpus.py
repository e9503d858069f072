"""Tokenisation of a text corpus to token files for training: PREFIX.bin and PREFIX.idx, as megatron.core writes them.

    python -m data_prep.tokenize_corpus --input corpus/ 'more/*.zst' --tokenizer tokenizer --output-prefix data/corpus

reads .jsonl, .jsonl.gz, .jsonl.zst, .parquet and .txt, and writes data/corpus_train.{bin,idx,json,sums} and
data/corpus_valid.*; `--valid-fraction 0` writes only data/corpus.*. The train/validation split is a hash of
the document's text, so it is independent of the tokenizer and of the rest of the corpus, and duplicates fall on the
same side. data/corpus.report.json lists what was read and what was skipped.

The corpus is tokenised in shards by --workers processes; memory does not grow with its size. An interrupted job resumes
with the missing shards when the same command is run again. Until the end the tokens are on disk twice.

On several machines (launch/tokenize.sbatch): the same command with `--shard 1/N` to `--shard N/N`, then with
`--merge-shards`. The bytes are those of one machine.
"""

from __future__ import annotations

import argparse
import errno
import glob
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from typing import IO, Any, NamedTuple

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from data_prep.corpus_files import find_inputs
from data_prep.corpus_shards import Shard, plan_shards
from data_prep.corpus_shares import check_any, check_complete, parse_share, pieces_of
from data_prep.dedup_and_split import count_documents, merge
from data_prep.encoders import Encoder, open_encoder, tokenizer_file
from data_prep.gigatoken_encoder import choose, corpus_sample
from data_prep.indexed_dataset_writer import TokenWriter, check_free, open_writers
from data_prep.memory_limits import add_limits, read_limits
from data_prep.tokenize_shards import Job, hold, is_done, start_workers, tokenize_shards
from megatron_a2d.config.cli import Parser
from megatron_a2d.data.checksums import file_checksum
from megatron_a2d.data.tokenizer_fingerprint import vocabulary_of
from megatron_a2d.terminal.console import console, entry_point, human, progress
from megatron_a2d.utils.atomic_write import write_json, write_problems
from megatron_a2d.utils.errors import UserError
from megatron_a2d.utils.partial_files import remove_abandoned

SHOWN_PROBLEMS = 10
MAX_WORKERS = 1024
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


@contextmanager
def _progress(total: int, done: int) -> Iterator[Any]:
    """A progress bar with B/s and tokens/s; yields `advance(num_bytes, num_tokens)`."""
    columns = (
        TextColumn("tokenise"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[speed]}", style="cyan"),
        TimeElapsedColumn(), TextColumn("eta"), TimeRemainingColumn(),
    )  # fmt: skip
    start, num_bytes, num_tokens = time.perf_counter(), 0, 0
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=total, completed=done, speed="")

        def advance(more_bytes: int, more_tokens: int) -> None:
            nonlocal num_bytes, num_tokens
            num_bytes, num_tokens = num_bytes + more_bytes, num_tokens + more_tokens
            seconds = time.perf_counter() - start
            speed = f"{human(num_bytes / seconds, 'B')}/s  {human(num_tokens / seconds)} tokens/s"
            bar.update(task, advance=more_bytes, speed=speed)

        yield advance


def prefixes_of(arguments: argparse.Namespace, json_key: str) -> tuple[str, list[str]]:
    """The prefix for one JSON key, and the prefixes of its token files."""
    prefix = arguments.output_prefix if len(arguments.json_keys) == 1 else f"{arguments.output_prefix}_{json_key}"
    return prefix, [f"{prefix}_train", f"{prefix}_valid"] if arguments.valid_fraction else [prefix]


def is_written(prefix: str, token_files: list[str]) -> bool:
    """Whether an earlier command wrote a key's token files, and was interrupted before it had written all keys'."""
    return os.path.isdir(f"{prefix}.parts") and all(os.path.exists(f"{name}.idx") for name in token_files)


class KeyJob(NamedTuple):
    """The texts under one JSON key, how they are encoded, and where their token files go."""

    job: Job
    encoder: Encoder
    facts: dict[str, Any]  # for the report
    prefix: str
    token_files: list[str]  # prefixes

    @property
    def is_written(self) -> bool:
        return is_written(self.prefix, self.token_files)


def plan_key(
    arguments: argparse.Namespace, reference: Encoder, shards: list[Shard], passed_over: list[str], json_key: str
) -> KeyJob:
    """Choose the encoder of the texts under one JSON key."""
    prefix, token_files = prefixes_of(arguments, json_key)
    limits = read_limits(arguments)
    chosen = choose(arguments.tokenizer, reference, arguments.encoder, corpus_sample(shards, json_key, limits))
    job = Job(
        directory=Path(f"{prefix}.parts"), encoder=chosen.name, eod_token_id=reference.eod_token_id,
        append_eod=arguments.append_eod, json_key=json_key, min_tokens=arguments.min_tokens,
        max_tokens=arguments.max_tokens, skip_invalid=arguments.on_error == "skip", limits=limits,
        tokenizer_checksum=file_checksum(tokenizer_file(arguments.tokenizer)), share=arguments.shard,
    )  # fmt: skip
    facts = {"encoder": chosen.reason, "passed_over": passed_over}
    return KeyJob(job, chosen.encoder, facts, prefix, token_files)


def tokenize(arguments: argparse.Namespace, shards: list[Shard], keys: list[KeyJob]) -> None:
    """Read and encode the texts under all keys, and then write their token files: a key's pieces stay until all keys
    are written, so that the same command resumes at any point."""
    begin = time.perf_counter()
    if arguments.merge_shards:
        for key in keys:
            check_any(key.job)  # before the directories are made
    with ExitStack() as stack:
        locks: list[IO[str]] = []
        for key in keys:
            stack.callback(_remove_empty, [path for path in key.job.directory.parents if not path.exists()])
            locks += stack.enter_context(hold(key.job.directory, key.job.share))
            if key.is_written and any(not is_done(key.job, *shard) for shard in enumerate(shards)):
                check_free(key.token_files)  # they are of another command
            if arguments.merge_shards:
                check_complete(key.job, shards)
            else:
                tokenize_missing(arguments, key.encoder, shards, key.job, locks)
        if arguments.shard:
            return
        to_write = [key for key in keys if not key.is_written]
        for key in to_write:
            check_not_empty(arguments, key, len(shards))  # all of them before the first is written
        for key in to_write:
            write_token_files(arguments, key, len(shards), begin)
        for key in keys:
            shutil.rmtree(key.job.directory)


def _remove_empty(directories: list[Path]) -> None:
    """Remove those of a command's new directories, the deepest first, in which nothing was left."""
    for directory in directories:
        try:
            directory.rmdir()
        except OSError:
            return


def tokenize_missing(
    arguments: argparse.Namespace, encoder: Encoder, shards: list[Shard], job: Job, locks: list[IO[str]]
) -> None:
    """Tokenise the shards of this job's share that are not done yet."""
    mine = pieces_of(job.share, shards) if job.share else dict(enumerate(shards))
    todo = missing_shards(job, mine)
    size, left = (sum(shard.num_bytes for shard in some) for some in (mine.values(), todo.values()))
    encoder.use_threads(arguments.workers)
    try:
        with (
            start_workers(job, encoder, min(arguments.workers, len(todo)), locks) as workers,
            _progress(size, size - left) as advance,
        ):
            tokenize_shards(job, todo, encoder, workers, advance)
    except UserError:
        if not job.share and not list(job.directory.glob("*.npz")):
            shutil.rmtree(job.directory, ignore_errors=True)  # there is nothing to resume from
        raise
    if job.share:
        console.print(
            f"shard {job.share}: {len(mine)} of {len(shards)} pieces are done, {human(size, 'B')}; when all are, run "
            "the same command with --merge-shards",
            soft_wrap=True,
        )


def write_token_files(arguments: argparse.Namespace, key: KeyJob, num_shards: int, begin: float) -> None:
    """Merge the tokenised shards. `begin`: when the command began, for the report."""
    job = key.job
    description = {"tokenizer": str(arguments.tokenizer), "eod_token_id": job.eod_token_id}
    if vocabulary := vocabulary_of(tokenizer_file(arguments.tokenizer)):
        description |= vocabulary.description()
    with open_writers(key.token_files, key.encoder.vocab_size, description) as writers:
        total = sum(path.stat().st_size for path in job.directory.glob("*.tokens")) // writers[0].dtype.itemsize
        with progress("write", total, "tokens") as advance_tokens:
            counts = merge(job, num_shards, writers, arguments.valid_fraction, arguments.deduplicate, advance_tokens)
    counts["seconds"] = round(time.perf_counter() - begin, 3)
    counts |= key.facts
    files = {writer.prefix: writer.num_documents for writer in writers}
    write_json(f"{key.prefix}.report.json", counts | {"files": files})
    report(writers, counts, f"{key.prefix}.report.json")


def missing_shards(job: Job, shards: dict[int, Shard]) -> dict[int, Shard]:
    """Those of `shards` that are not yet tokenised: all of them, unless an earlier command was interrupted."""
    for partial in job.directory.glob(".*.partial-*"):
        number = partial.name[1:].partition(".")[0]
        if number.isdigit() and int(number) in shards:
            remove_abandoned(job.directory, glob.escape(partial.name))
    missing = {number: shard for number, shard in shards.items() if not is_done(job, number, shard)}
    if len(missing) < len(shards):
        console.print(f"resuming: {len(shards) - len(missing)} of {len(shards)} pieces are done")
    return missing


def check_not_empty(arguments: argparse.Namespace, key: KeyJob, num_shards: int) -> None:
    """UserError if one of the token files would be empty. The tokens, for which there is no use, are then removed."""
    counts = count_documents(key.job, num_shards, arguments.valid_fraction)
    kept = counts.training + counts.held_out
    problem = ""
    if not counts.documents:
        invalid = f" ({counts.invalid:,} invalid, the first: {counts.first_problem})" if counts.invalid else ""
        problem = f"--input {' '.join(map(str, arguments.input))}: holds no text at all{invalid}; give documents"
    elif not kept:
        problem = "--min-tokens, --max-tokens: exclude every document; widen them"
    elif arguments.valid_fraction and not (counts.training and counts.held_out):
        train, valid = key.token_files
        problem = (
            f"--valid-fraction {arguments.valid_fraction}: {valid if counts.training else train} would get none of the "
            f"{kept:,} documents; give more documents or another fraction (0: hold out none)"
        )
    if problem:
        if not arguments.merge_shards:  # other machines' work, and another fraction can be tried on it
            shutil.rmtree(key.job.directory)
        raise UserError(problem)


def report(writers: list[TokenWriter], counts: dict[str, Any], path: str) -> None:
    """Print what was read, skipped and written."""
    table = Table()
    for heading in ("file", "documents", "tokens", "bytes"):
        table.add_column(heading, justify="left" if heading == "file" else "right", overflow="fold")
    for writer in writers:
        num_bytes = os.path.getsize(writer.prefix + ".bin")
        table.add_row(writer.prefix, f"{writer.num_documents:,}", f"{writer.num_tokens:,}", human(num_bytes, "B"))
    console.print(table)
    left_out = {name.replace("_", " "): counts[name] for name in ("too_short", "too_long", "duplicates", "invalid")}
    others = "".join(f", {count:,} {name}" for name, count in left_out.items() if count)
    console.print(f"{counts['empty']:,} empty documents skipped{others}", soft_wrap=True)
    for problem in counts["problems"][:SHOWN_PROBLEMS]:
        console.print(f"  {problem}", soft_wrap=True)
    if counts["invalid"] > SHOWN_PROBLEMS:
        console.print(f"  ... and {counts['invalid'] - SHOWN_PROBLEMS:,} more: {path}", soft_wrap=True)
    console.print(f"encoded by {counts['encoder']}", soft_wrap=True)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m data_prep.tokenize_corpus", description="Tokenise text into Megatron's .bin/.idx files."
    )
    parser.add_argument(
        "--input", required=True, nargs="+", action="append", metavar="FILE|DIR|GLOB",
        help=".jsonl (one object per line), .jsonl.gz, .jsonl.zst, .parquet and .txt (one document each): files, "
        "directories or globs",
    )  # fmt: skip
    parser.add_argument(
        "--json-keys", nargs="+", default=["text"],
        help="key or column of the text; with several, each gets its own files, PREFIX_KEY",
    )  # fmt: skip
    parser.add_argument(
        "--tokenizer", required=True, type=Path,
        help="Hugging Face directory, tokenizer.json or sentencepiece .model",
    )  # fmt: skip
    parser.add_argument(
        "--encoder", choices=("auto", "gigatoken", "reference"), default="auto",
        help="auto: gigatoken if it gives the same ids as the tokenizer's own library on a sample of this corpus",
    )  # fmt: skip
    parser.add_argument("--output-prefix", required=True, metavar="PREFIX", help="path without .bin and .idx")
    parser.add_argument("--valid-fraction", type=float, default=0.02, help="fraction of documents to hold out; 0: none")
    parser.add_argument(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="append the end-of-document token to each document",
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that read and encode")
    parser.add_argument("--deduplicate", action="store_true", help="keep only the first of identical documents")
    parser.add_argument("--min-tokens", type=int, default=1, help="skip shorter documents")
    parser.add_argument("--max-tokens", type=int, help="skip longer documents; default: no limit")
    parser.add_argument(
        "--on-error", choices=("fatal", "skip"), default="fatal",
        help="what to do with a line that is not UTF-8, not JSON or has no text, and with a file that is empty or "
        "cannot be opened: end the job, or report and skip it",
    )  # fmt: skip
    parser.add_argument("--shard", metavar="I/N", help="tokenise one of N equal shares of the corpus, without merging")
    parser.add_argument(
        "--merge-shards", action="store_true", help="merge the results of all --shard jobs, without tokenising"
    )
    add_limits(parser)
    arguments = parser.parse_args(argv)
    arguments.input = list(chain.from_iterable(arguments.input))
    if arguments.shard and arguments.merge_shards:
        raise UserError(f"--shard {arguments.shard}, --merge-shards: choose one; the merge comes after all shards")
    arguments.shard = parse_share(arguments.shard) if arguments.shard is not None else None
    if not 0 <= arguments.valid_fraction < 1:
        raise UserError(f"--valid-fraction {arguments.valid_fraction}: must be at least 0 and below 1")
    if not 1 <= arguments.workers <= MAX_WORKERS:
        raise UserError(f"--workers {arguments.workers}: must lie in 1 .. {MAX_WORKERS}; one per CPU is best")
    read_limits(arguments)
    if arguments.min_tokens < 1:
        raise UserError(f"--min-tokens {arguments.min_tokens}: must be positive; give 1 or more")
    if arguments.max_tokens is not None and arguments.max_tokens < arguments.min_tokens:
        raise UserError(f"--max-tokens {arguments.max_tokens}: is below --min-tokens {arguments.min_tokens}; raise it")
    return arguments


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    prefix = arguments.output_prefix
    if prefix.endswith("/") or Path(prefix).is_dir():
        raise UserError(f"--output-prefix {prefix}: is a directory; append a file name prefix")
    if problems := write_problems(Path(prefix).parent, f"--output-prefix {prefix}"):
        raise UserError(problems)
    reference = open_encoder(arguments.tokenizer, arguments.append_eod, workers=1)
    files = [prefixes_of(arguments, key) for key in arguments.json_keys]
    check_free([name for key_prefix, names in files if not is_written(key_prefix, names) for name in names])
    skip_invalid = arguments.on_error == "skip"
    inputs = find_inputs(arguments.input, skip_invalid)
    inputs.show_passed_over()
    shards = plan_shards(inputs.paths, skip_invalid=skip_invalid)
    try:
        keys = [plan_key(arguments, reference, shards, inputs.passed_over, key) for key in arguments.json_keys]
        tokenize(arguments, shards, keys)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise UserError(
            f"--output-prefix {prefix}: cannot be written ({error.strerror}); free disk space for twice the "
            "tokens, and run the same command again to resume"
        ) from None


if __name__ == "__main__":
    entry_point(main)
