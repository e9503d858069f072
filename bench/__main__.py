"""All benchmarks on a CPU, one after another: `make bench`.

    python -m bench                          # those whose result is of other code, of another form, or noisy
    python -m bench train_step_cpu convert_cpu    # these
    python -m bench --all
    python -m bench --against ../older       # steps, starts, block attention also against the build in another checkout

Needs a finished `make demo` (--demo) for those that measure its model, and an idle machine. Each writes its file in
bench/results/, so that an interrupted command continues where it was; afterwards the documents' tables are made anew.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from bench import report
from bench.process_tree import module
from bench.result_file import RESULTS, build_name, read, sources
from megatron_a2d.config.cli import Parser
from megatron_a2d.terminal.console import console, entry_point
from megatron_a2d.utils.errors import UserError


class Benchmark(NamedTuple):
    """A module of bench/ with its arguments, by the name of its result file; DEMO is the demo's directory."""

    minutes: float  # on two cores
    module: str
    arguments: tuple[str, ...] = ()
    has_against: bool = False  # compares with another build


BENCHMARKS = {
    "train_step_cpu": Benchmark(3, "cpu_train_step", has_against=True),
    "start_cpu": Benchmark(4, "start", has_against=True),
    "async_save_cpu": Benchmark(1, "async_save"),
    "protections_cpu": Benchmark(3, "protections"),
    "convert_cpu": Benchmark(6, "convert"),
    "tokenize_cpu": Benchmark(3, "tokenize"),
    "mixing_cpu": Benchmark(2, "mixing"),
    "loader_cpu": Benchmark(1, "loader"),
    "masked_head_cpu": Benchmark(1, "chunked_head"),
    "block_attention_cpu": Benchmark(6, "block_attention", has_against=True),
    "sampling_cpu": Benchmark(6, "sampling", ("--model", "DEMO/exported", "--data", "DEMO/corpus_valid")),
    "block_sampling_cpu": Benchmark(8, "block_sampling"),
    "likelihood_cpu": Benchmark(1, "likelihood"),
    "choice_decisions_cpu": Benchmark(8, "choice_decisions", ("--model", "DEMO/exported")),
    "speculative_decoding_cpu": Benchmark(9, "speculative_decoding", ("--demo", "DEMO", "--runs", "DEMO/speculation")),
    "monitoring_cpu": Benchmark(1, "monitoring"),
    "aux_loss_cpu": Benchmark(1, "aux_loss"),
    "placed_experts_cpu": Benchmark(3, "placed_experts", ("--demo", "DEMO")),
    "scaling_cpu": Benchmark(8, "scaling"),
}


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="bench", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(BENCHMARKS)}; default: those out of date")
    parser.add_argument("--all", action="store_true", help="those that are up to date as well")
    parser.add_argument("--demo", type=Path, default=Path("demo_run"), help="directory of a finished make demo")
    parser.add_argument(
        "--against", type=Path, metavar="DIRECTORY", help="a checkout of another commit to compare with"
    )
    options = parser.parse_args(argv)
    if unknown := [name for name in options.names if name not in BENCHMARKS]:
        raise UserError([f"bench {name}: there are {', '.join(BENCHMARKS)}" for name in unknown])
    chosen = options.names or [name for name in BENCHMARKS if options.all or not is_current(name)]
    uses_demo = any("DEMO" in " ".join(BENCHMARKS[name].arguments) for name in chosen)
    if uses_demo and not (options.demo / "exported").is_dir():
        raise UserError(f"--demo {options.demo}: is not the directory of a finished demo; run make demo")
    if options.against:
        build_name(options.against)  # before hours of measuring
        if not any(BENCHMARKS[name].has_against for name in chosen):
            compare = ", ".join(name for name, benchmark in BENCHMARKS.items() if benchmark.has_against)
            raise UserError(f"--against {options.against}: only {compare} compare builds; name one, or leave it out")
    for name in (name for name in BENCHMARKS if name not in chosen and not options.names):
        console.print(f"{name}: up to date")
    for number, name in enumerate(chosen, start=1):
        left = sum(BENCHMARKS[other].minutes for other in chosen[number - 1 :])
        console.print(f"{number} of {len(chosen)}, {name}: {time.strftime('%H:%M')}, about {left:.0f} minutes left")
        run(name, options.demo, options.against)
    report.main([])
    noisy = [name for name in BENCHMARKS if (result := read(name)) and result.noisy]
    if noisy:
        console.print(f"noisy in part: {', '.join(noisy)}; the same command on an idle machine repeats them")


def is_current(name: str) -> bool:
    """Whether the result is of this code and has no noisy figure."""
    result = read(name)
    return result is not None and result.about["sources"] == sources() and not result.noisy


def run(name: str, demo: Path, against: Path | None) -> None:
    """Run a benchmark; its progress is shown."""
    benchmark = BENCHMARKS[name]
    words = [word.replace("DEMO", str(demo)) for word in benchmark.arguments]
    if against and benchmark.has_against:
        words += ["--against", str(against)]
    command = module(f"bench.{benchmark.module}", *words, "--out", RESULTS / f"{name}.json")
    code = subprocess.run(command).returncode
    if code:
        console.print(f"{name}: failed with exit code {code}")
        sys.exit(code)


if __name__ == "__main__":
    entry_point(main)
