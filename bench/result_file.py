"""Result files of all benchmarks on CPUs: bench/results/NAME.json, one form.

benchmark, command, commit, sources   what was measured: name, command line, commit ("+": with changes), and a checksum
                                      of all code, by which `make bench` knows that a result is up to date
machine                               CPU, cores, threads, versions
settings                              sizes
comparisons                           paired.Comparison: ratios with quartiles, medians, every run
figures                               others: {"name", "unit", "values"}, a value per run
"""

from __future__ import annotations

import hashlib
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.paired import Comparison, Spread
from bench.result_tables import machine
from megatron_a2d.config.cli import Parser
from megatron_a2d.utils.atomic_write import write_json
from megatron_a2d.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"


class Figure(NamedTuple):
    """Something measured that has no other side, once or in several runs."""

    name: str
    unit: str
    values: list[float]

    @property
    def noisy(self) -> bool:
        return len(self.values) > 1 and Spread.of(self.values).noisy

    def text(self) -> str:
        if self.noisy:
            return "noisy"
        spread = Spread.of(self.values)
        scales = {"GB": 1e9, "MB": 1e6} if self.unit == "bytes" else {}
        unit, scale = next((item for item in scales.items() if spread.median >= item[1]), (self.unit, 1.0))
        numbers = [_short(value / scale) for value in spread[:3]]
        return numbers[0] + (f" ({numbers[1]} to {numbers[2]})" if len(self.values) > 1 else "") + f" {unit}".rstrip()


def _short(value: float) -> str:
    """Three digits."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 1e-3 or not value else f"{value:.1e}"


class Result(NamedTuple):
    """What a benchmark measured."""

    benchmark: str
    comparisons: list[Comparison]
    figures: list[Figure]
    about: dict[str, Any]  # the rest of the file

    @property
    def noisy(self) -> bool:
        return any(item.noisy for item in self.comparisons) or any(item.noisy for item in self.figures)


def add_arguments(parser: Parser, rounds: int) -> None:
    """Flags of every benchmark."""
    parser.add_argument("--rounds", type=int, default=rounds, help="timed rounds; in each, every side runs once")
    parser.add_argument("--out", type=Path, default=None, help="write the result as JSON")


def write(
    out: Path | None,
    benchmark: str,
    comparisons: Sequence[Comparison],
    figures: Sequence[Figure] = (),
    settings: dict[str, Any] | None = None,
    **others: Any,
) -> None:
    """Write a result file, if `out` is given."""
    if out is None:
        return
    content = {
        "benchmark": benchmark,
        "command": _command(),
        "commit": commit(),
        "sources": sources(),
        "machine": machine(),
        "settings": settings or {},
        "comparisons": [compared.to_json() for compared in comparisons],
        "figures": [figure._asdict() for figure in figures],
    }
    write_json(out, content | others)


def _command() -> str:
    """This command, without --out, and without the folders of absolute paths."""
    words = list(sys.argv[1:])
    if "--out" in words:
        del words[words.index("--out") : words.index("--out") + 2]
    names = [Path(word).name if word.startswith("/") else word for word in words]
    return shlex.join(["python", "-m", f"bench.{Path(sys.argv[0]).stem}", *names])


def read(name: str, folder: Path = RESULTS) -> Result | None:
    """The result NAME.json; None if it is missing or in another format."""
    path = folder / f"{name}.json"
    stored = json.loads(path.read_text()) if path.is_file() else {}
    if "comparisons" not in stored:
        return None
    comparisons = [Comparison.from_json(item) for item in stored.pop("comparisons")]
    figures = [Figure(**item) for item in stored.pop("figures")]
    return Result(stored["benchmark"], comparisons, figures, stored)


def commit(directory: Path = ROOT) -> str | None:
    """The commit of a checkout, with a + if code differs from it; None outside a repository."""

    def git(*words: str) -> str:
        command = ("git", "-C", str(directory), *words)
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "*.py")
        return git("rev-parse", "--short=7", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def build_name(directory: Path) -> str:
    """What results call the build in another checkout; UserError if `directory` (--against) holds none."""
    if not (directory / "megatron_a2d").is_dir():
        raise UserError(f"--against {directory}: holds no megatron_a2d; give a checkout of this project")
    return f"build {commit(directory) or directory.resolve().name}"


def sources() -> str:
    """A checksum of all code of the product and of the benchmarks, and of the recipes with which they train."""
    total = hashlib.sha256()
    for folder in ("bench", "checkpoints_tools", "data_prep", "launch", "megatron_a2d"):
        for path in sorted([*(ROOT / folder).rglob("*.py"), *(ROOT / folder).rglob("*.yaml")]):
            total.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return total.hexdigest()[:16]
