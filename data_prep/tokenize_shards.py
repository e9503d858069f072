"""Tokenisation of the shards of a corpus, each independently, into files that dedup_and_split.py combines.

PREFIX.parts/00042.tokens  the tokens of a shard's documents, concatenated
PREFIX.parts/00042.npz     lengths, digests of the texts, counts, a checksum of the tokens, the settings, and a key of
                           settings and input; written last

A shard's files depend only on its text and the settings: neither the number of workers nor an interruption changes a
byte. They are not flushed to the disk: a command that resumes compares the checksums.
"""

from __future__ import annotations

import fcntl
import gc
import json
import multiprocessing
import os
import signal
import threading
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import xxhash

from data_prep.corpus_shards import Counts, Shard, read_file_range
from data_prep.encoders import Encoder
from data_prep.formats import Document
from data_prep.memory_limits import Limits
from megatron_a2d.data.checksums import file_checksum
from megatron_a2d.utils.atomic_write import make_directory, new_file, regular
from megatron_a2d.utils.errors import UserError
from megatron_a2d.utils.parsing import parse_json
from megatron_a2d.utils.partial_files import open_lock

# Bytes of text encoded at a time. Not a number of documents, so that long documents do not make a batch large.
BATCH_BYTES = 1 << 20
# Workers have the modules and the tokenizer of the first process, which loads them once.
CONTEXT = multiprocessing.get_context("fork")


class Share(NamedTuple):
    """One of several machines' shares of the corpus (corpus_shares.py)."""

    number: int  # from 1
    of: int

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


@dataclass(frozen=True)
class Job:
    """Settings that the workers share."""

    directory: Path
    encoder: str  # "gigatoken" or "reference"
    append_eod: bool
    eod_token_id: int | None
    json_key: str
    min_tokens: int
    max_tokens: int | None
    skip_invalid: bool
    limits: Limits
    tokenizer_checksum: str
    share: Share | None = None  # None: the entire corpus

    def path(self, number: int, suffix: str) -> Path:
        return self.directory / f"{number:05d}{suffix}"


@contextmanager
def hold(directory: Path, share: Share | None = None) -> Iterator[list[IO[str]]]:
    """Create and lock `directory`; UserError if another process has it locked. Yields the open locks.

    Several shares can hold it at once, each of them once; they see each other across machines if the file system has
    locks across machines.
    """
    make_directory(directory, f"--output-prefix {directory.with_suffix('')}")  # PREFIX.parts
    wanted = [(".lock", fcntl.LOCK_SH if share else fcntl.LOCK_EX)]
    if share:
        wanted.append((f".lock_{share.number}_of_{share.of}", fcntl.LOCK_EX))
    with ExitStack() as stack:
        locks = []
        for name, kind in wanted:
            locks.append(stack.enter_context(open_lock(directory / name)))
            try:
                fcntl.flock(locks[-1], kind | fcntl.LOCK_NB)
            except BlockingIOError:
                what = f"--shard {share} of {directory}" if len(locks) == 2 else str(directory)
                raise UserError(
                    f"--output-prefix: another process is writing {what}; wait for it, or choose another prefix"
                ) from None
            except OSError:
                pass  # the file system has no locks
        yield locks


def settings_of(job: Job) -> dict[str, Any]:
    """The settings that determine a shard's tokens, as JSON would give them back."""
    return {
        "tokenizer": job.tokenizer_checksum, "encoder": job.encoder, "append_eod": job.append_eod,
        "eod_token_id": job.eod_token_id, "json_key": job.json_key, "min_tokens": job.min_tokens,
        "max_tokens": job.max_tokens, "limits": list(job.limits),
    }  # fmt: skip


def key_of(job: Job, shard: Shard) -> str:
    """Identifies the input and settings that determine a shard's tokens."""
    files = [
        (*file_range, *(os.stat(file_range.path).st_size, os.stat(file_range.path).st_mtime_ns))
        for file_range in shard.file_ranges
    ]
    return digest(repr((files, settings_of(job))).encode()).hex()


class ShardResult(NamedTuple):
    """Metadata of a tokenised shard."""

    lengths: np.ndarray  # [documents] int64, tokens, end-of-document token included
    digests: np.ndarray  # [documents, 2] uint64, XXH3 of the text, 128 bits
    counts: dict[str, Any]
    key: str
    checksum: str  # of the tokens
    settings: dict[str, Any]
    share: Share | None  # that it was tokenised for


def digest(data: bytes) -> bytes:
    """128-bit hash of a document's text, for the train/validation split and de-duplication."""
    return xxhash.xxh3_128_digest(data)


def batches(documents: Iterator[Document], num_bytes: int = BATCH_BYTES) -> Iterator[list[Document]]:
    """Batches of consecutive documents, about `num_bytes` each."""
    batch: list[Document] = []
    filled = 0
    for document in documents:
        batch.append(document)
        filled += len(document.data)
        if filled >= num_bytes:
            yield batch
            batch, filled = [], 0
    if batch:
        yield batch


def tokenize_shard(job: Job, number: int, shard: Shard, encoder: Encoder, report: Callable[[int, int], Any]) -> None:
    """Write the files of one shard. Calls `report(bytes read, tokens)` after each batch."""
    counts = Counts()
    lengths: list[np.ndarray] = []
    digests: list[bytes] = []
    too_short = too_long = 0
    documents = (
        document
        for file_range in shard.file_ranges
        for document in read_file_range(file_range, job.json_key, counts, job.skip_invalid, job.limits)
    )
    smallest = max(job.min_tokens, 1) + job.append_eod
    largest = None if job.max_tokens is None else job.max_tokens + job.append_eod
    checksum = xxhash.xxh3_64()
    with new_file(job.path(number, ".tokens"), durable=False) as partial, open(partial, "wb") as stream:
        for batch in batches(documents):
            data = [document.data for document in batch]
            encoded = encoder.encode_batch(data)
            keep = encoded.lengths >= smallest
            too_short += int((~keep).sum())
            if largest is not None:
                too_long += int((encoded.lengths > largest).sum())
                keep &= encoded.lengths <= largest
            ids = encoded.ids if keep.all() else encoded.ids[np.repeat(keep, encoded.lengths)]
            stream.write(memoryview(ids))  # type: ignore[arg-type]
            checksum.update(memoryview(ids))  # type: ignore[arg-type]
            lengths.append(encoded.lengths[keep])
            digests += [digest(text) for text, kept in zip(data, keep.tolist(), strict=True) if kept]
            report(sum(document.num_bytes for document in batch), len(encoded.ids))
    counted = {**asdict(counts), "too_short": too_short, "too_long": too_long}
    described = {
        "key": key_of(job, shard), "counts": counted, "checksum": checksum.hexdigest(), "settings": settings_of(job),
        "share": job.share,
    }  # fmt: skip
    with new_file(job.path(number, ".npz"), durable=False) as partial, open(partial, "wb") as stream:
        np.savez(
            stream,
            lengths=np.concatenate([*lengths, np.zeros(0, dtype=np.int64)]),
            digests=np.frombuffer(b"".join(digests), dtype="<u8").reshape(-1, 2),
            counts=np.frombuffer(json.dumps(described).encode(), dtype=np.uint8),
        )


def read_result(job: Job, number: int) -> ShardResult:
    """The metadata that `tokenize_shard` wrote next to the tokens."""
    try:
        with open(job.path(number, ".npz"), "rb", opener=regular) as stream, np.load(stream) as arrays:
            said = parse_json(arrays["counts"].tobytes())
            return ShardResult(
                arrays["lengths"], arrays["digests"], said["counts"], said["key"], said["checksum"],
                dict(said["settings"]), Share(*map(int, said["share"])) if said["share"] else None,
            )  # fmt: skip
    except (OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(f"{job.path(number, '.npz')}: cannot be read ({error}); remove it and run again") from None


def is_done(job: Job, number: int, shard: Shard) -> bool:
    """Whether an earlier command has tokenised the same input with the same settings."""
    if not job.path(number, ".npz").exists():
        return False
    try:
        result = read_result(job, number)
    except UserError:
        return False
    tokens = job.path(number, ".tokens")
    if result.key != key_of(job, shard) or not tokens.exists() or file_checksum(tokens) != result.checksum:
        return False
    return job.skip_invalid or not result.counts["invalid"]


class Workers(NamedTuple):
    """Processes that tokenise shards."""

    executor: ProcessPoolExecutor
    number: int
    shared: Any  # bytes read, tokens, whether to stop


@contextmanager
def start_workers(job: Job, encoder: Encoder, number: int, locks: list[IO[str]]) -> Iterator[Workers | None]:
    """`number` processes with the `encoder`; None for a single one. `locks` are not for them.

    They are forked at once, while this process has no threads yet: a progress bar is one.
    """
    if number <= 1:
        yield None
        return
    encoder.use_threads(1)
    gc.freeze()  # collections in the workers do not look at what they have from here
    shared = CONTEXT.Array("q", 3)
    with ProcessPoolExecutor(number, CONTEXT, _start_worker, (job, encoder, shared, locks)) as executor:
        try:
            executor.submit(int)
            gc.unfreeze()
            yield Workers(executor, number, shared)
        finally:
            shared[2] = 1  # workers that are still busy stop after their batch
            executor.shutdown(wait=False, cancel_futures=True)


def tokenize_shards(
    job: Job,
    todo: dict[int, Shard],
    encoder: Encoder,
    workers: Workers | None,
    advance: Callable[[int, int], Any],
) -> None:
    """Tokenise all shards of `todo` by the `workers`, or here if there are none."""
    if workers is None:
        for number, shard in todo.items():
            tokenize_shard(job, number, shard, encoder, advance)
        return
    # Longest first would finish sooner; in order, an interrupted job has a complete beginning.
    waiting = iter(todo.items())
    seen = [0, 0]
    running: set[Future[None]] = set()
    try:
        while True:
            while len(running) < 2 * workers.number and (item := next(waiting, None)):
                running.add(workers.executor.submit(_work, *item))
            if not running:
                return
            done, running = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
            now = list(workers.shared[:2])
            advance(now[0] - seen[0], now[1] - seen[1])
            seen = now
            for future in done:
                future.result()
    except BrokenProcessPool:
        raise UserError(
            "--workers: a worker was killed, most likely out of memory; run the same command again with fewer "
            "--workers to resume"
        ) from None


_worker: Any = None  # of this process: job, encoder, the array shared with the first process


def _start_worker(job: Job, encoder: Encoder, shared: Any, locks: list[IO[str]]) -> None:
    global _worker
    for lock in locks:
        lock.close()  # only the first process holds the directory
    # Ctrl-C reaches every process; only the first one handles it, and stops the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = job, encoder, shared


def _end_with_parent() -> None:
    """Exit with the first process: a worker would otherwise wait for work forever once that was killed."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


class _StoppedError(Exception):
    """The first process has asked the workers to stop."""


def _work(number: int, shard: Shard) -> None:
    job, encoder, shared = _worker

    def report(num_bytes: int, num_tokens: int) -> None:
        with shared.get_lock():
            shared[0] += num_bytes
            shared[1] += num_tokens
        if shared[2]:
            raise _StoppedError

    tokenize_shard(job, number, Shard([*shard.file_ranges]), encoder, report)
