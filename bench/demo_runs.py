"""Runs that start from the converted checkpoint of a finished `make demo`, shared by benchmarks that train."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from megatron_a2d.checkpoint.directory import latest_iteration
from megatron_a2d.config.cli import Parser
from megatron_a2d.utils.errors import UserError

RECIPE = "launch/recipes/demo_cpu.yaml"


def add_arguments(parser: Parser) -> None:
    parser.add_argument("--demo", required=True, type=Path, metavar="DIR", help="directory of a finished `make demo`")
    parser.add_argument("--runs", required=True, type=Path, metavar="DIR", help="directory of the trained models")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the result as JSON")


def check(demo: Path) -> None:
    """UserError unless `demo` is the directory of a finished demo."""
    if not (demo / "checkpoint").is_dir():
        raise UserError(f"--demo {demo}: has no converted checkpoint; run `make demo` first")


def train(demo: Path, run: Path, flags: tuple[Any, ...]) -> None:
    """Train by the demo's recipe and `flags` to the end, in one process, unless that is done."""
    if not (run.is_dir() and latest_iteration(run)):
        python(
            "megatron_a2d.train", "--config", RECIPE, "--load", demo / "checkpoint", "--save", run,
            "--train-data-path", demo / "corpus_train", "--valid-data-path", demo / "corpus_valid", *flags,
        )  # fmt: skip


def python(module: str, *arguments: Any) -> None:
    """Run a module of this project."""
    subprocess.run([sys.executable, "-m", module, *map(str, arguments)], check=True)
