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
from bench.result_file import RESULTS, read, sources
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
    "convert_cpu": Benchmark(6, "convert"),
    "tokenize_cpu": Benchmark(3, "tokenize"),
    "mixing_cpu": Benchmark(2, "mixing"),
    "loader_cpu": Benchmark(1, "loader"),
    "masked_head_cpu": Benchmark(1, "chunked_head"),
    "block_attention_cpu": Benchmark(6, "block_attention"),
    "sampling_cpu": Benchmark(2, "sampling", ("--model", "DEMO/exported", "--data", "DEMO/corpus_valid")),
    "block_sampling_cpu": Benchmark(6, "block_sampling"),
