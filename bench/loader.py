"""Benchmark of the data loader: samples/s of one core, including corruption, and waiting times of a training step.

    python -m bench.loader [--seconds 10] [--out bench/results/loader_cpu.json]

Token files with checksums (uint16, documents of 50 to 1,500 tokens), samples of 4,096, micro-batches of 4. First one
thread prepares batches as fast as it can: tokens/s/core, for the plain masked diffusion objective and with
all options (a mixture of three sources, document masking, positions reset, 1% random lengths). Then batches are
prefetched, as in training, while the main thread sleeps for the time of a step on an accelerator: the time that it
waits for a batch, and its share of the total at steps of 100 ms.
"""

from __future__ import annotations

import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from bench.mixing import VOCABULARY, WEIGHTS, ours, write_sources
from bench.result_file import Figure, add_arguments, write
from megatron_a2d.config.cli import Parser
from megatron_a2d.config.model_config import ModelConfig
from megatron_a2d.config.settings import build
from megatron_a2d.terminal.console import console, entry_point

LENGTH, SIZE, STEP_SECONDS = 4096, 4, 0.1
EVERYTHING = {"reset_attention_mask": True, "reset_position_ids": True, "random_length_prob": 0.01}


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="bench.loader", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=10, help="seconds per measurement")
    add_arguments(parser, rounds=5)
    options = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory(prefix="bench_loader") as name:
        write_sources(Path(name), 40_000_000)
        figures = measure(Path(name), options.seconds, options.rounds)
    for figure in figures:
        console.print(f"{figure.name}: {figure.text()}")
    write(options.out, "loader", [], figures, {"seq_length": LENGTH, "micro_batch_size": SIZE})


def measure(directory: Path, seconds: float, rounds: int) -> list[Figure]:
    from megatron_a2d.data.dataloader import MicroBatches
    from megatron_a2d.data.diffusion_samples import make_sample
    from megatron_a2d.data.packed_dataset import PackedDataset

    model_config = ModelConfig(2, 64, 4, 2, 24, 160, VOCABULARY + 1, LENGTH, 1e-6, 1e6, False, mask_token_id=VOCABULARY)
    plain = PackedDataset(directory / next(iter(WEIGHTS)), LENGTH, vocab_size=VOCABULARY)
    mixed, _ = ours(directory, LENGTH)
    figures = []
    for name, data, settings in (("plain", plain, {}), ("all options", mixed, EVERYTHING)):
        maker = make_sample(build({"seq_length": LENGTH, **settings}), model_config, data, 1, for_training=True)
        arguments: dict[str, Any] = {"micro_batch_size": SIZE, "global_batch_size": SIZE}
        with MicroBatches(data, maker, num_workers=0, **arguments) as batches:
            speeds = [_speed(batches, seconds / rounds) for _ in range(rounds)]
        with MicroBatches(data, maker, num_workers=1, **arguments) as batches:
            waits = _waits(batches, seconds)
        part = 100 * sum(waits) / (sum(waits) + STEP_SECONDS * len(waits))
        figures += [
            Figure(f"one core, {name}", "tokens/s", speeds),
            Figure(f"wait for a batch, median of {len(waits)}, {name}", "ms", [1e3 * statistics.median(waits)]),
            Figure(f"share of steps of {1e3 * STEP_SECONDS:.0f} ms spent waiting, {name}", "%", [part]),
        ]
    return figures


def _speed(batches: Any, seconds: float) -> float:
    next(batches)
    begin, count = time.perf_counter(), 0
    spent = time.thread_time()
    while time.perf_counter() - begin < seconds:
        next(batches)
        count += 1
    # CPU time of this thread, not wall time, so that other work on the machine does not count.
    return count * SIZE * LENGTH / (time.thread_time() - spent)


def _waits(batches: Any, seconds: float) -> list[float]:
    waits = []
    next(batches)
    for _ in range(max(3, round(seconds / STEP_SECONDS))):
        time.sleep(STEP_SECONDS)
        begin = time.perf_counter()
        next(batches)
        waits.append(time.perf_counter() - begin)
    return waits


if __name__ == "__main__":
    entry_point(main)
