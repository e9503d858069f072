"""Benchmark of convert_hf and export_hf against `cp` of the same bytes on the same disk: time and peak memory.

    python -m bench.convert [--work DIR] [--rounds 3] [--out bench/results/convert_cpu.json]

A synthetic checkpoint (at least 8 GB; Qwen3-30B-A3B's shape with 6 of 48 layers) is converted and copied alternately,
then the converted one is exported and copied; the disk is synced before each run, and the order alternates between
rounds. Times are of complete commands, including interpreter start and imports; ours flush to disk, cp does not
(its time with `sync` is also given). Verification and the report, which run by default, are timed separately.
Peak memory is also measured with the number of tensors of the full 30B and 235B models, with narrow matrices.
Needs about 18 GB of disk space.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory
from typing import Any, NamedTuple

from bench.result_tables import machine
from megatron_a2d.config.cli import Parser
from megatron_a2d.conversion.qwen3_shapes import hub_config
from megatron_a2d.conversion.random_weights import write_synthetic
from megatron_a2d.conversion.workers import DEFAULT_WORKERS
from megatron_a2d.terminal.console import entry_point
from megatron_a2d.utils.atomic_write import write_json

NARROW: dict[str, Any] = dict(
    hidden_size=64, head_dim=16, moe_intermediate_size=32, vocab_size=1024, mask_token_id=1023, bos_token_id=0,
    eos_token_id=0,
)  # fmt: skip


class Measured(NamedTuple):
    seconds: float
    peak_bytes: int


def main() -> None:
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--work", type=Path, default=Path("."), metavar="DIR", help="a directory on the disk to measure"
    )
    parser.add_argument("--num-hidden-layers", type=int, default=6, help="layers of the 30B-A3B shape; 6 are 8.7 GB")
    parser.add_argument("--rounds", type=int, default=3, help="pairs of runs")
    parser.add_argument("--workers", type=int, default=DEFAULT_WORKERS, help="threads of the converters")
    parser.add_argument("--out", type=Path, default=None, help="write the result as JSON")
    options = parser.parse_args()
    result: dict[str, Any] = {"machine": machine(), "workers": options.workers}
    with TemporaryDirectory(dir=options.work, prefix="bench_convert_") as name:
        work = Path(name)
        config = hub_config("30B-A3B", num_hidden_layers=options.num_hidden_layers)
        result["num_bytes"] = write_synthetic(work / "hf", config)
        workers = ["--workers", str(options.workers)]
        convert = ["checkpoints_tools.convert_hf", "--hf-model", str(work / "hf"), *workers]
        result["convert"] = against_cp(convert, work / "hf", work, options.rounds)
        run([*convert, "--out", str(work / "checkpoint"), "--no-verify"])
        shutil.rmtree(work / "hf")
        export = ["checkpoints_tools.export_hf", "--checkpoint", str(work / "checkpoint"), *workers, "--format", "rnd1"]
        result["export"] = against_cp(export, work / "checkpoint", work, options.rounds)
        shutil.rmtree(work / "checkpoint")
        result["peak_bytes_by_number_of_tensors"] = {
            size: peak_with_all_tensors(size, work, workers) for size in ("30B-A3B", "235B-A22B")
        }
    if options.out:
        write_json(options.out, result)


def against_cp(command: list[str], source: Path, work: Path, rounds: int) -> dict[str, Any]:
    """Times of alternating runs, ratios of their medians, and one run with the default verification and report."""
    name = command[0].rpartition(".")[2]
    ours, copies, synced = [], [], []
    for number in range(rounds):
        for which in ("ours", "cp") if number % 2 else ("cp", "ours"):
            os.sync()
            if which == "ours":
                ours.append(run([*command, "--out", str(work / "out"), "--no-verify"]))
            else:
                begin = time.perf_counter()
                subprocess.run(["cp", "-r", str(source), str(work / "out")], check=True)
                copies.append(time.perf_counter() - begin)
                os.sync()
                synced.append(time.perf_counter() - begin)
            shutil.rmtree(work / "out")
    os.sync()
    whole = run([*command, "--out", str(work / "out")])
    shutil.rmtree(work / "out")
    seconds = statistics.median(item.seconds for item in ours)
    figures = {
        "ratio_to_cp": seconds / statistics.median(copies),
        "ratio_to_cp_and_sync": seconds / statistics.median(synced),
        "ratio_with_verification_and_report": whole.seconds / statistics.median(copies),
        "peak_bytes": max(item.peak_bytes for item in [*ours, whole]),
    }
    print(f"{name:10} {seconds:.1f} s   cp {statistics.median(copies):.1f} s   " + describe(figures), flush=True)
    return figures | {
        "seconds": [item.seconds for item in ours],
        "cp_seconds": copies,
        "cp_and_sync_seconds": synced,
        "seconds_with_verification_and_report": whole.seconds,
    }


def peak_with_all_tensors(size: str, work: Path, workers: list[str]) -> dict[str, int]:
    """Peak memory of both directions for a model with the number of tensors of `size`."""
    write_synthetic(work / "narrow", hub_config(size, **NARROW))
    checkpoint, out = work / "checkpoint", work / "out"
    peaks = {
        "convert": run(
            ["checkpoints_tools.convert_hf", "--hf-model", str(work / "narrow"), "--out", str(checkpoint), *workers]
        ).peak_bytes,
        "export": run(
            ["checkpoints_tools.export_hf", "--checkpoint", str(checkpoint), "--out", str(out), *workers]
        ).peak_bytes,
    }
    for path in (work / "narrow", checkpoint, out):
        shutil.rmtree(path)
    print(f"{size:10} all tensors, narrow: " + describe(peaks), flush=True)
    return peaks


def describe(figures: dict[str, Any]) -> str:
    return "   ".join(
        f"{name} {value / 1e6:.0f} MB" if value > 1000 else f"{name} {value:.2f}" for name, value in figures.items()
    )


# Not getrusage: its peak includes that of the parent process.
RUN = """
import runpy, sys
out, sys.argv = sys.argv[1], sys.argv[2:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
open(out, "w").write(peak.split()[1])
"""


def run(command: list[str]) -> Measured:
    """Run a command of this project in a separate process."""
    with NamedTemporaryFile("r") as peak:
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-c", RUN, peak.name, *command], stdout=subprocess.DEVNULL, check=True)
        return Measured(time.perf_counter() - begin, int(peak.read()) * 1024)


if __name__ == "__main__":
    entry_point(main)
