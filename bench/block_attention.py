"""Benchmark of block diffusion on a CPU: attention that computes few masked entries, against a dense mask.

    python -m bench.block_attention [--rounds 5] [--out bench/results/block_attention_cpu.json]
    git worktree add ../older c26157c && python -m bench.block_attention --against ../older --out FILE

Forward and backward pass of one layer's attention, 8 heads of 64, blocks of 32, for samples of 512 to 4,096 tokens:
twice as many positions, of whose pairs a quarter is open. The mask is made in every pass; its tiles are made in the
first, as in training without document masking. And a training step of a model of 4 layers at 2,048 tokens. --against: a
checkout of another commit. Every side is a process of its own, of which one runs at a time (block_worker.py); peak
memory is the growth of the first pass. Ratios are above 1 where this build, which computes few masked entries, is
faster.
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench.cpu_train_step import COMMON, OURS
from bench.paired import Comparison, compare
from bench.process_tree import Worker
from bench.result_file import ROOT, Figure, add_arguments, build_name, write
from megatron_a2d.config.cli import Parser
from megatron_a2d.terminal.console import entry_point

SIZES = {"block_length": 32, "heads": 8, "head_size": 64}
LENGTHS, STEP_LENGTH = (512, 1024, 2048, 4096), 2048
MODEL: dict[str, Any] = COMMON | dict(
    model_type="qwen3", hidden_size=512, intermediate_size=1536, num_hidden_layers=4, head_dim=64,
    max_position_embeddings=8192,
)  # fmt: skip


def main() -> None:
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--against", type=Path, metavar="DIRECTORY", help="a checkout of another commit")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS), help="tokens of the samples")
    parser.add_argument("--step-length", type=int, default=STEP_LENGTH, help="tokens of the training step's sample")
    add_arguments(parser, rounds=5)
    options = parser.parse_args()
    places = {OURS: (ROOT, False), "dense mask": (ROOT, True)}
    if options.against:
        places[build_name(options.against)] = (options.against.resolve(), False)
    jobs = {f"attention, {length:,} tokens": {"kind": "attention", "length": length} for length in options.lengths}
    jobs[f"training step, {options.step_length:,} tokens"] = {
        "kind": "step", "length": options.step_length, "model": MODEL,
    }  # fmt: skip
    compared, figures = [], []
    for name, job in jobs.items():
        comparison, peaks = measure(name, job | SIZES, places, options.rounds)
        compared.append(comparison)
        figures += [Figure(f"{name}: peak memory, {side}", "bytes", [float(peak)]) for side, peak in peaks.items()]
        print(f"{name}: peak memory " + ", ".join(f"{side} {peak / 1e6:.0f} MB" for side, peak in peaks.items()))
    write(options.out, "block_attention", compared, figures, SIZES | {"step": MODEL})


def measure(
    name: str, job: dict[str, Any], places: dict[str, tuple[Path, bool]], rounds: int
) -> tuple[Comparison, dict[str, int]]:
    """All sides in turns, and the peak memory of each in bytes."""
    with ExitStack() as stack:
        workers = {
            side: stack.enter_context(Worker(words(job | {"dense": dense}), directory))
            for side, (directory, dense) in places.items()
        }
        pairs = [(side, OURS) for side in workers if side != OURS]
        compared = compare(name, dict(workers), pairs, rounds=rounds)
    return compared, {side: worker.ready["peak_bytes"] for side, worker in workers.items()}


def words(job: dict[str, Any]) -> list[str]:
    """The command of a worker."""
    return [sys.executable, "-P", "-W", "ignore", str(ROOT / "bench" / "block_worker.py"), json.dumps(job)]


if __name__ == "__main__":
    entry_point(main)
