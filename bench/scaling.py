"""Benchmark of how times and memory grow with sizes, on a CPU: curves, their exponents, and docs/scaling.png.

    python -m bench.scaling [--work DIR] [--out bench/results/scaling_cpu.json]     # interrupted: the same again
    python -m bench.scaling --curves tokens gpus ...                               # these alone

A point is the median of several runs in a separate process (bench/scaling_jobs.py). The exponent b of y = a x^b is a
least-squares fit of log y over log x, of the whole curve and of its upper half: what is constant at small sizes, such
as the cost of starting, hides in the whole. Peaks of memory and the planner's search are of one run. Points of other
code or of another machine, and noisy ones, are measured anew.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench.paired import Spread
from bench.process_tree import module
from bench.result_file import RESULTS, ROOT, commit, sources
from bench.result_tables import machine
from megatron_a2d.config.cli import Parser
from megatron_a2d.report.plot_style import figure
from megatron_a2d.study.results_page import markdown_table
from megatron_a2d.terminal.console import console, entry_point
from megatron_a2d.utils.atomic_write import write_json

PLOT = ROOT / "docs" / "scaling.png"


class Curve(NamedTuple):
    """What is measured over which sizes; `on_ranks`: each size is a number of processes."""

    title: str
    x: str
    y: str  # with its unit
    sizes: tuple[int, ...]
    on_ranks: bool = False


CURVES = {
    "tokens": Curve("tokens of a step, MoE", "tokens", "CPU s per step", (512, 1024, 2048, 4096, 8192)),
    "length": Curve("length of one sample, dense", "tokens", "CPU s per step", (128, 256, 512, 1024, 2048)),
    "experts": Curve("experts, top 2, 512 tokens", "experts", "CPU s per step", (4, 8, 16, 32, 64)),
    "data parallel": Curve("data-parallel processes, 4,096 tokens", "processes", "CPU s, busiest", (1, 2, 4), True),
    "expert parallel": Curve("expert-parallel processes, 4,096 tokens", "processes", "CPU s, busiest", (1, 2, 4), True),
    "samples": Curve("samples in a token file", "samples", "CPU s to start", tuple(10**n for n in range(6, 11))),
    "documents": Curve("documents in a token file", "documents", "CPU s to start", tuple(10**n for n in range(3, 8))),
    "tensors": Curve(
        "conversion: number of tensors", "tensors", "peak bytes", tuple(393 * n + 3 for n in (2, 6, 18, 48, 94))
    ),
    "tensor bytes": Curve(
        "conversion: size of a tensor", "bytes", "peak bytes", tuple(2 * 2 ** (2 * n) for n in (7, 8, 9, 10, 11))
    ),
    "ranks": Curve("checkpoint: ranks that write it", "processes", "CPU s, busiest", (1, 2, 4), True),
    "gpus": Curve("planner's search: GPUs", "GPUs", "CPU s", (8, 32, 128, 512, 2048)),
}


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="bench.scaling", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--curves", nargs="+", choices=CURVES, default=list(CURVES), help="measure these")
    parser.add_argument("--work", type=Path, default=None, metavar="DIR", help="a folder on the disk to write to")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each point")
    parser.add_argument("--out", type=Path, default=RESULTS / "scaling_cpu.json", help="result file")
    options = parser.parse_args(argv)
    points = earlier(options.out)
    wanted = [(name, size) for name in options.curves for size in CURVES[name].sizes]
    for number, (name, size) in enumerate(wanted, start=1):
        own = points.setdefault(name, {})
        if str(size) in own:
            continue
        own[str(size)] = measure(name, size, options.rounds, options.work)
        console.print(f"{number} of {len(wanted)}, {name} {size:,}: {statistics.median(own[str(size)]):.4g}")
        content = {"benchmark": "scaling", "commit": commit(), "sources": sources(), "machine": machine()}
        write_json(options.out, content | {"points": points})
    for name in options.curves:
        console.print(f"{name}: exponent {exponents(points[name])}")
    if options.out.resolve().parent == RESULTS:
        plot(points)


def earlier(out: Path) -> dict[str, dict[str, list[float]]]:
    """Points of the same code and machine in the result file that are not noisy."""
    stored = json.loads(out.read_text()) if out.is_file() else {}
    if (stored.get("sources"), stored.get("machine")) != (sources(), machine()):
        return {}
    return {
        name: {size: values for size, values in points.items() if not is_noisy(values)}
        for name, points in stored["points"].items()
    }


def is_noisy(values: list[float]) -> bool:
    """Whether several runs of a point differ too much; a single one cannot show it."""
    return len(values) > 1 and Spread.of(values).noisy


def measure(name: str, size: int, rounds: int, work: Path | None) -> list[float]:
    """Values of one point."""
    ranks = ["torch.distributed.run", "--standalone", "--nproc-per-node", size, "-m"] if CURVES[name].on_ranks else []
    with tempfile.TemporaryDirectory(prefix="bench_scaling", dir=work) as folder:
        words = module(*map(str, [*ranks, "bench.scaling_jobs", name, size, rounds]))
        environment = {**os.environ, "A2D_BENCH_WORK": folder, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(words, env=environment, capture_output=True, text=True)
        if done.returncode:
            console.print(done.stderr[-3000:])
            sys.exit(done.returncode)
        return [float(value) for value in json.loads(done.stdout.splitlines()[-1])]


def fit(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The exponent b of values = a sizes^b, by least squares of the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def medians(points: dict[str, list[float]]) -> tuple[list[int], list[float]]:
    sizes = sorted(map(int, points))
    return sizes, [statistics.median(points[str(size)]) for size in sizes]


def exponents(points: dict[str, list[float]]) -> str:
    """Of the whole curve and of its upper half; `noisy` if a point is."""
    sizes, values = medians(points)
    if len(sizes) < 2:
        return "-"
    if any(map(is_noisy, points.values())):
        return "noisy"
    half = min(len(sizes) // 2, len(sizes) - 2)
    return f"{fit(sizes, values):.2f}, {fit(sizes[half:], values[half:]):.2f}"


def block(stored: dict[str, Any]) -> str:
    """The documents' table, from the result file."""
    rows = []
    for name, curve in CURVES.items():
        if name not in stored["points"]:
            continue
        points = stored["points"][name]
        sizes, values = medians(points)
        noisy = [is_noisy(found) for _, found in sorted(points.items(), key=_size)]
        shown = ["noisy" if bad else _text(value) for value, bad in zip(values, noisy, strict=True)]
        rows.append(
            [curve.title, f"{sizes[0]:,} to {sizes[-1]:,}", f"{shown[0]} to {shown[-1]} {curve.y}", exponents(points)]
        )
    machine_ = stored["machine"]
    about = f"{machine_['cpu']}, {machine_['cores']} cores, one thread a process, torch {machine_['torch']}"
    table = markdown_table(["growth with", "sizes", "measured", "exponent: all, upper half"], rows)
    return f"{table}\n{about}; `python -m bench.scaling` at {stored['commit']}.\n"


def _size(item: tuple[str, Any]) -> int:
    return int(item[0])


def _text(value: float) -> str:
    return f"{value / 1e6:,.0f}M" if value >= 1e6 else f"{value:.3g}"


def plot(points: dict[str, dict[str, list[float]]], path: Path = PLOT) -> None:
    """All curves, logarithmic on both axes."""
    names = [name for name in CURVES if name in points]
    with figure(path, columns=4, rows=-(-len(names) // 4), size=(3.4, 2.8)) as axes:
        for axis, name in zip(axes, names, strict=False):
            sizes, values = medians(points[name])
            axis.loglog(sizes, values, marker="o")
            axis.set_title(f"{CURVES[name].title}\nexponent {exponents(points[name])}", fontsize=9)
            axis.set_xlabel(CURVES[name].x)
            axis.set_ylabel(CURVES[name].y)
        for axis in axes[len(names) :]:
            axis.set_visible(False)


if __name__ == "__main__":
    entry_point(main)
