"""Benchmark of our mixture against megatron.core's GPTDataset and BlendedDataset on the same files: start-up, samples.

    python -m bench.mixing [--samples 100000000] [--out bench/results/mixing_cpu.json]

Three sources with weights 0.5, 0.3, 0.2, of uint16 tokens in documents of 50 to 1,500. megatron.core builds its
document, sample and shuffle indices for the samples that the run asks for, writes them to a cache, and a blending index
over them; the cache is empty at the start, as on the first start of a run. Ours opens the files, validates their
indices and descriptions, and computes the rest on the fly. `--samples`: size of the blend. Start-up is timed with
samples of 64 tokens (100 million of them are several epochs of small files), in turns, in separate processes, without
the imports, which are the same for both; the files are in the page cache (warm) or dropped from it (cold, checked).

Samples: random access over a run of a million samples, 2,048 tokens each, all in the page cache; theirs returns
tokens, labels, loss mask and positions, ours tokens, labels and weights of the autoregressive objective. `corrupted`:
ours with the masks of the diffusion objective. Also measured: how far the realised shares are from the weights.
"""

from __future__ import annotations

import json
import random
import resource
import statistics
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.page_cache import CACHES, before
from bench.paired import Comparison, Side, Usage, compare, in_process
from bench.process_tree import module
from bench.result_file import Figure, add_arguments, write
from megatron_a2d.config.cli import Parser
from megatron_a2d.terminal.console import entry_point

WEIGHTS = {"a": 0.5, "b": 0.3, "c": 0.2}
START_LENGTH, SAMPLE_LENGTH, VOCABULARY = 64, 2048, 50_000


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="bench.mixing", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--samples", type=int, default=100_000_000, help="samples of the blend")
    parser.add_argument("--tokens", type=int, default=200_000_000, help="tokens in all three sources")
    parser.add_argument("--reads", type=int, default=20_000, help="samples read per round")
    parser.add_argument("--job", help="measurement to run in this process (internal)")
    parser.add_argument("--directory", type=Path, help="with --job: directory of the files")
    add_arguments(parser, rounds=5)
    options = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    if options.job:
        print(json.dumps(JOBS[options.job](options.directory, options.samples, options.reads)))
        return
    with tempfile.TemporaryDirectory(prefix="bench_mixing") as name:
        write_sources(Path(name), options.tokens)
        compared, figures = measure(Path(name), options)
    write(options.out, "mixing", compared, figures, {"samples": options.samples, "tokens": options.tokens})


def measure(directory: Path, options: Any) -> tuple[list[Comparison], list[Figure]]:
    others: dict[str, dict[str, list[float]]] = {name: {} for name in JOBS}

    def side(name: str) -> Usage:
        words = ["--job", name, "--directory", directory, "--samples", options.samples, "--reads", options.reads]
        run = subprocess.run(module("bench.mixing", *words), capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(run.stderr[-3000:])
        measured = json.loads(run.stdout.splitlines()[-1])
        usage = Usage(measured.pop("wall"), measured.pop("cpu"))
        for key, value in measured.items():
            others[name].setdefault(key, []).append(value)
        return usage

    def sides(*jobs: str) -> dict[str, Side]:
        return {LABELS[job]: partial(side, job) for job in jobs}

    start, read = ("start_theirs", "start_ours"), ("read_theirs", "read_ours", "read_corrupted")
    pairs = [(THEIRS, OURS)]
    compared = [
        compare("start-up", sides(*start), pairs, rounds=options.rounds, cache=cache, warm_up=0,
                prepare=before(cache, [directory]))
        for cache in CACHES
    ]  # fmt: skip
    name = f"{options.reads:,} samples"
    pairs.append((THEIRS, LABELS["read_corrupted"]))
    compared.append(compare(name, sides(*read), pairs, rounds=options.rounds, warm_up=0))
    figures = [
        Figure(f"{what}, {LABELS[job]}", "bytes", [statistics.median(others[job][key])])
        for key, what in (("index_bytes", "index files"), ("bytes", "memory of the start"))
        for job in start
    ]
    return compared, [*figures, Figure("largest relative error of a share, of 1M samples", "", [shares()])]


def write_sources(directory: Path, num_tokens: int) -> None:
    """Random tokens in files of data_prep.tokenize_corpus's format."""
    from data_prep.indexed_dataset_writer import open_writers

    generator = np.random.default_rng(0)
    for name, weight in WEIGHTS.items():
        left = int(num_tokens * weight)
        with open_writers([str(directory / name)], VOCABULARY, {"tokenizer": "", "eod_token_id": 0}) as (writer,):
            while left > 0:
                lengths = generator.integers(50, 1500, 5000)
                writer.add(generator.integers(1, VOCABULARY, lengths.sum()).astype(np.uint16), lengths)
                left -= int(lengths.sum())


def theirs(directory: Path, length: int, num_samples: int, cache: Path) -> Any:
    """A BlendedDataset over three GPTDatasets, built as Megatron-LM's pretrain_gpt.py builds it."""
    import torch

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    config = GPTDatasetConfig(
        random_seed=1, sequence_length=length, reset_position_ids=False, reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False, tokenizer=_Tokenizer(), path_to_cache=str(cache), mmap_bin_files=True,
        blend_per_split=[([str(directory / name) for name in WEIGHTS], list(WEIGHTS.values())), None, None],
    )  # fmt: skip
    builder = BlendedMegatronDatasetBuilder(GPTDataset, [num_samples, None, None], lambda: True, config)
    made: list[Any] = []
    used = in_process(lambda: made.append(builder.build()[0]))()
    return made[0], used


class _Tokenizer:
    """The part of a tokenizer that GPTDataset uses."""

    eod, pad, vocab_size = 0, 0, VOCABULARY
    unique_identifiers: dict[str, str] = {"class": "none"}  # noqa: RUF012


def ours(directory: Path, length: int) -> Any:
    from fractions import Fraction

    from megatron_a2d.data.blended_dataset import MixedDataset, Source

    sources = [
        Source(name, str(directory / name), None, Fraction(str(weight)), None, {}) for name, weight in WEIGHTS.items()
    ]
    made: list[Any] = []

    def start() -> None:
        made.append(MixedDataset(sources, length, seed=1, vocab_size=VOCABULARY, scan=False))
        made[0].tokens(0)

    used = in_process(start)()
    return made[0], used


def _started(used: Usage, index_bytes: int, before: int) -> dict[str, float]:
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {**used._asdict(), "index_bytes": index_bytes, "bytes": grown * 1024}


def start_theirs(directory: Path, num_samples: int, reads: int) -> dict[str, float]:
    before = _warm()
    with tempfile.TemporaryDirectory(dir=directory) as cache:
        dataset, used = theirs(directory, START_LENGTH, num_samples, Path(cache))
        dataset[0]
        size = sum(path.stat().st_size for path in Path(cache).rglob("*") if path.is_file())
        return _started(used, size, before)


def start_ours(directory: Path, num_samples: int, reads: int) -> dict[str, float]:
    before = _warm()
    files = set(directory.iterdir())
    dataset, used = ours(directory, START_LENGTH)
    dataset.tokens(num_samples - 1)
    return _started(used, sum(path.stat().st_size for path in set(directory.iterdir()) - files), before)


def _warm() -> int:
    """Import everything before timing; returns the peak resident size so far, in KiB."""

    import megatron_a2d.data.blended_dataset  # noqa: F401

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _reads(read: Callable[[int], object], num_reads: int) -> dict[str, float]:
    """Times of random reads over a run of a million samples, after reading them once: all in the page cache."""
    indices = random.Random(0).choices(range(1_000_000), k=num_reads)

    def run() -> None:
        for index in indices:
            read(index)

    run()
    return in_process(run)()._asdict()


def read_theirs(directory: Path, num_samples: int, reads: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory(dir=directory) as cache:
        dataset, _ = theirs(directory, SAMPLE_LENGTH, 1_000_000, Path(cache))
        return _reads(dataset.__getitem__, reads)


def read_ours(directory: Path, num_samples: int, reads: int) -> dict[str, float]:
    from megatron_a2d.diffusion.corruption import next_token

    dataset, _ = ours(directory, SAMPLE_LENGTH)
    return _reads(lambda index: next_token(dataset.tokens(index)), reads)


def read_corrupted(directory: Path, num_samples: int, reads: int) -> dict[str, float]:
    from megatron_a2d.diffusion.corruption import corrupt
    from megatron_a2d.diffusion.rng import Noise

    dataset, _ = ours(directory, SAMPLE_LENGTH)
    noise = Noise(seed=1, mask_token_id=VOCABULARY)
    return _reads(lambda index: corrupt(dataset.tokens(index), index, noise), reads)


def shares() -> float:
    """The largest relative difference between a source's share of a million samples and its weight."""
    from fractions import Fraction

    from megatron_a2d.data.blended_dataset import SourceChoice

    choice = SourceChoice([Fraction(str(weight)) for weight in WEIGHTS.values()], seed=1)
    sources = np.fromiter((choice(index).source for index in range(1_000_000)), dtype=np.int8, count=1_000_000)
    counts = np.bincount(sources, minlength=3) / 1_000_000
    return max(abs(count / weight - 1) for count, weight in zip(counts, WEIGHTS.values(), strict=True))


THEIRS, OURS = "megatron.core", "ours"
JOBS = {
    "start_theirs": start_theirs, "start_ours": start_ours, "read_theirs": read_theirs, "read_ours": read_ours,
    "read_corrupted": read_corrupted,
}  # fmt: skip
LABELS = {job: THEIRS if "theirs" in job else "ours, corrupted" if "corrupted" in job else OURS for job in JOBS}

if __name__ == "__main__":
    entry_point(main)
