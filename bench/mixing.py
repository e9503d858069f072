"""Benchmark of our mixture against megatron.core's GPTDataset and BlendedDataset on the same files: start-up, samples.

    python -m bench.mixing [--samples 100000000] [--out bench/results/mixing_cpu.json]

Three sources with weights 0.5, 0.3, 0.2, of uint16 tokens in documents of 50 to 1,500. megatron.core builds its
document, sample and shuffle indices for the samples that the run asks for, writes them to a cache, and a blending index
over them; the cache is empty at the start, as on the first start of a run. Ours opens the files, validates their
indices and descriptions, and computes the rest on the fly. `--samples`: size of the blend. Start-up is timed with
samples of 64 tokens (100 million of them are several epochs of small files), alternating, in separate processes,
without the imports, which are the same for both.

Time per sample: random access over a run of a million samples, 2,048 tokens each, all in the page cache; theirs returns
tokens, labels, loss mask and positions, ours tokens, labels and weights of the autoregressive objective. `corrupted`:
ours with the masks of the diffusion objective. Also measured: how far the realised shares are from the weights.
"""

from __future__ import annotations

import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from bench.result_tables import machine
from megatron_a2d.config.cli import Parser
from megatron_a2d.terminal.console import console, entry_point
from megatron_a2d.utils.atomic_write import write_json

WEIGHTS = {"a": 0.5, "b": 0.3, "c": 0.2}
START_LENGTH, SAMPLE_LENGTH, VOCABULARY = 64, 2048, 50_000


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="bench.mixing", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--samples", type=int, default=100_000_000, help="samples of the blend")
    parser.add_argument("--tokens", type=int, default=200_000_000, help="tokens in all three sources")
    parser.add_argument("--rounds", type=int, default=3, help="pairs of runs")
    parser.add_argument("--reads", type=int, default=2000, help="samples read per round")
    parser.add_argument("--job", help="measurement to run in this process (internal)")
    parser.add_argument("--directory", type=Path, help="with --job: directory of the files")
    parser.add_argument("--out", type=Path, default=None, help="write the result as JSON")
    options = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    if options.job:
        print(json.dumps(JOBS[options.job](options.directory, options.samples, options.reads)))
        return
    with tempfile.TemporaryDirectory(prefix="bench_mixing") as name:
        write_sources(Path(name), options.tokens)
        result = measure(Path(name), options)
    for key, value in result["ratios"].items():
        console.print(f"{key:40} {value:,.4g}")
    if options.out:
        write_json(options.out, {"machine": machine(), **result})


def measure(directory: Path, options: Any) -> dict[str, Any]:
    seconds: dict[str, list[Any]] = {name: [] for name in JOBS}
    for _ in range(options.rounds):
        for name in JOBS:
            words = ["--job", name, "--directory", directory, "--samples", options.samples, "--reads", options.reads]
            command = [sys.executable, "-W", "ignore", "-m", "bench.mixing", *map(str, words)]
            run = subprocess.run(command, capture_output=True, text=True, env=os.environ)
            if run.returncode:
                raise RuntimeError(run.stderr[-3000:])
            seconds[name].append(json.loads(run.stdout.splitlines()[-1]))
    middle = {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for name, runs in seconds.items()
    }
    start, read = "startup_seconds", "microseconds_a_sample"
    return {
        "samples": options.samples, "tokens": options.tokens, "runs": seconds,
        "ratios": {
            "start-up, theirs / ours": middle["start_theirs"][start] / middle["start_ours"][start],
            "start-up, theirs, seconds": middle["start_theirs"][start],
            "start-up, ours, seconds": middle["start_ours"][start],
            "index files, theirs, bytes": middle["start_theirs"]["index_bytes"],
            "index files, ours, bytes": middle["start_ours"]["index_bytes"],
            "memory, theirs, MB": middle["start_theirs"]["megabytes"],
            "memory, ours, MB": middle["start_ours"]["megabytes"],
            "sample, theirs, microseconds": middle["read_theirs"][read],
            "sample, ours, microseconds": middle["read_ours"][read],
            "sample, ours / theirs": middle["read_ours"][read] / middle["read_theirs"][read],
            "sample, ours corrupted, microseconds": middle["read_ours"]["corrupted_microseconds"],
            "largest error of a share, of 1M samples": shares(),
        },
    }  # fmt: skip


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
    begin = time.perf_counter()
    builder = BlendedMegatronDatasetBuilder(GPTDataset, [num_samples, None, None], lambda: True, config)
    dataset = builder.build()[0]
    return dataset, time.perf_counter() - begin


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
    begin = time.perf_counter()
    dataset = MixedDataset(sources, length, seed=1, vocab_size=VOCABULARY, scan=False)
    dataset.tokens(0)
    return dataset, time.perf_counter() - begin


def _started(seconds: float, index_bytes: int, before: int) -> dict[str, float]:
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"startup_seconds": seconds, "index_bytes": index_bytes, "megabytes": grown / 1024}


def start_theirs(directory: Path, num_samples: int, reads: int) -> dict[str, float]:
    before = _warm()
    with tempfile.TemporaryDirectory(dir=directory) as cache:
        dataset, seconds = theirs(directory, START_LENGTH, num_samples, Path(cache))
        dataset[0]
        size = sum(path.stat().st_size for path in Path(cache).rglob("*") if path.is_file())
        return _started(seconds, size, before)


def start_ours(directory: Path, num_samples: int, reads: int) -> dict[str, float]:
    before = _warm()
    files = set(directory.iterdir())
    dataset, seconds = ours(directory, START_LENGTH)
    dataset.tokens(num_samples - 1)
    return _started(seconds, sum(path.stat().st_size for path in set(directory.iterdir()) - files), before)


def _warm() -> int:
    """Import everything before timing; returns the peak resident size so far, in KiB."""

    import megatron_a2d.data.blended_dataset  # noqa: F401

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _microseconds(read: Any, indices: list[int]) -> float:
    for index in indices[:100]:
        read(index)
    begin = time.perf_counter()
    for index in indices:
        read(index)
    return (time.perf_counter() - begin) / len(indices) * 1e6


def read_theirs(directory: Path, num_samples: int, reads: int) -> dict[str, float]:
    num_samples = 1_000_000
    with tempfile.TemporaryDirectory(dir=directory) as cache:
        dataset, _ = theirs(directory, SAMPLE_LENGTH, num_samples, Path(cache))
        indices = random.Random(0).choices(range(num_samples), k=reads)
        return {"microseconds_a_sample": _microseconds(dataset.__getitem__, indices)}


def read_ours(directory: Path, num_samples: int, reads: int) -> dict[str, float]:
    from megatron_a2d.diffusion.corruption import corrupt, next_token
    from megatron_a2d.diffusion.rng import Noise

    dataset, _ = ours(directory, SAMPLE_LENGTH)
    noise = Noise(seed=1, mask_token_id=VOCABULARY)
    indices = random.Random(0).choices(range(1_000_000), k=reads)
    return {
        "microseconds_a_sample": _microseconds(lambda index: next_token(dataset.tokens(index)), indices),
        "corrupted_microseconds": _microseconds(lambda index: corrupt(dataset.tokens(index), index, noise), indices),
    }


def shares() -> float:
    """The largest relative difference between a source's share of a million samples and its weight."""
    from fractions import Fraction

    from megatron_a2d.data.blended_dataset import SourceChoice

    choice = SourceChoice([Fraction(str(weight)) for weight in WEIGHTS.values()], seed=1)
    sources = np.fromiter((choice(index).source for index in range(1_000_000)), dtype=np.int8, count=1_000_000)
    counts = np.bincount(sources, minlength=3) / 1_000_000
    return max(abs(count / weight - 1) for count, weight in zip(counts, WEIGHTS.values(), strict=True))


JOBS = {"start_theirs": start_theirs, "start_ours": start_ours, "read_theirs": read_theirs, "read_ours": read_ours}

if __name__ == "__main__":
    entry_point(main)
