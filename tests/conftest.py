"""Fixtures that all tests share, and the page that the layouts' differences are written to."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.parity.pool import Pool


class Measured(NamedTuple):
    """The largest differences of a layout from one process."""

    model: str
    layout: str
    num_processes: int
    differences: dict[str, float]


_MEASURED: list[Measured] = []


@pytest.fixture(scope="session")
def measured() -> list[Measured]:
    """Where the comparisons of layouts put their figures."""
    return _MEASURED


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Four processes that serve every layout (tests/parity/pool.py)."""
    pool = Pool(4)
    yield pool
    pool.close()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--exactness", type=Path, default=None, help="write the layouts' differences to this page")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    path: Path | None = session.config.getoption("--exactness")
    if path is not None and exitstatus == 0 and _MEASURED:
        path.write_text(exactness_page(_MEASURED), encoding="utf-8")


def exactness_page(rows: list[Measured]) -> str:
    """The page, in Markdown."""
    quantities = list(rows[0].differences)
    lines = [
        "# Exactness",
        "",
        f"Written by `make test-parity`. {len(rows)} layouts against one process, in fp32 on CPUs with gloo, through",
        "megatron.core's own schedules: two optimizer steps on the same global batch of 8 samples. Loss and gradient norm:",
        "largest relative difference. Gradients (where they are whole: not under the distributed optimizer) and",
        "parameters after the second step: largest absolute difference of any element. The tolerance is 1e-6.",
        "",
        "| model | layout | processes | " + " | ".join(quantities) + " |",
        "| --- " * (3 + len(quantities)) + "|",
    ]
    for row in rows:
        whole = "distributed optimizer" not in row.layout and not row.layout.endswith("overlap")
        figures = [
            "sharded" if name == "gradients" and not whole else f"{value:.1e}"
            for name, value in row.differences.items()
        ]
        lines.append(f"| {row.model} | {row.layout} | {row.num_processes} | " + " | ".join(figures) + " |")
    worst = max(value for row in rows for value in row.differences.values())
    lines += ["", f"Largest difference of all: {worst:.1e}.", ""]
    return "\n".join(lines)
