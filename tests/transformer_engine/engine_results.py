"""tests/transformer_engine/RESULTS.md, written by `make test-te`: what each test measured, by section.

Each pair of releases (Transformer Engine, megatron-core) has a part of its own, which is replaced once all tests have
passed. Until then the rows of those that have are kept in pytest's cache, so that a run that was stopped resumes.
"""

from __future__ import annotations

import hashlib
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tests.exactness import table

ROOT = Path(__file__).resolve().parents[2]

TITLE = """# Transformer Engine's layers on a CPU

Every figure was measured by `make test-te`: Transformer Engine's own Python under megatron-core, over a stand-in of its
compiled kernels in plain torch (`stand_in/`), on CPUs over gloo. It shows that layers, sharding, caches and accumulation are
right. Not reached: the kernels' own rounding, streams, NCCL, CUDA graphs, DeepEP and HybridEP.
"""


class Section(NamedTuple):
    title: str
    text: str  # {count}: of its rows, {worst}: its largest figure
    labels: tuple[str, ...]  # headers of a row's labels; figures bring their own


SECTIONS = {
    "fp32": Section(
        "Layers and layouts, fp32",
        """{count} cases against the local layers of one process, which knows no Transformer Engine: two optimizer steps on the same
global batch of 8 samples. Loss and gradient norm: largest relative difference. Gradients (not sharded by the
distributed optimizer) and parameters after the second step: largest absolute difference of any element. Layouts have all
fusions (rotary embedding, gradient accumulation; experts: permutation and router). The tolerance is 1e-6; the largest
difference of all is {worst}.""",
        ("model", "case", "processes"),
    ),
    "refused": Section(
        "Layouts of the local layers alone",
        "The layouts of tests/parity that Transformer Engine's layers refuse, each with a message that names the settings.",
        ("model", "layout", "refused"),
    ),
    "products": Section(
        "FP8 and NVFP4 products, exactly",
        """Every linear layer of a step of four micro-batches, with fused accumulation of gradients, against the emulation
(`megatron_a2d/model/emulated_layers.py`, written apart from this) of the same inputs and output gradients: the largest
relative distance of any layer.""",
        ("model", "recipe"),
    ),
    "rounded": Section(
        "FP8, whole models",
        """One step, in fp32 but for the rounding of the layers' products, against the emulation on the local layers of one process.
Loss: largest relative difference. Gradients: norm of the difference of all together
over their norm; the last column is that difference without rounding, which is what the rounding amounts to.
Parameters: the worst tensor's root mean square difference over its root mean square. Where a last bit falls on the other side of
a tie of the rounding, or of a router's choice, what is computed of it follows. Tensorwise scaling under TP and CP is left out:
one scale for a matrix depends by definition on how the layout cuts it.""",
        ("model", "recipe", "layout"),
    ),
    "nvfp4": Section(
        "NVFP4, whole models",
        """The same in NVFP4, rounded to nearest (random bits cannot be compared), against the emulation in the same layout: one scale
for a matrix depends on how it is cut. A last bit: the gradients' distance of the emulation from itself where
each operand (weights excepted) is off by one last bit or none, at random; the largest of three draws. Where the layers' distance
is 1e-6, no value fell to the other side of a tie; where it is not, it is of the size that such a bit alone makes.""",
        ("model", "layout", "in NVFP4"),
    ),
    "training": Section(
        "Schedules, FP8 weights, checkpoints",
        "Largest relative difference of any step's loss; of schedules and of recomputation also of its gradient norm.",
        ("case", "model", "layout", "compared with"),
    ),
    "planted": Section(
        "Planted defects",
        "The same comparisons where a defect was planted (`defects.py`): the differences that they saw.",
        ("defect", "model"),
    ),
}


class Row(NamedTuple):
    section: str
    labels: list[str]
    figures: dict[str, float]  # not a number: sharded, so not compared

    @property
    def cells(self) -> list[str]:
        return [
            *self.labels,
            *("sharded" if math.isnan(value) else f"{value:.1e}" for value in self.figures.values()),
        ]


class EngineResults:
    """Rows by test; `keep` and `resume` carry those of passed tests from one run to the next."""

    def __init__(self) -> None:
        self.is_partial = False  # tests were deselected or skipped: nothing is written
        self.order: list[str] = []  # all tests, also those that are not run again
        self.passed: dict[str, list[Row]] = {}
        self._running: list[Row] = []
        self._cache: Any = None
        self._key = self._sources = ""

    def add(self, section: str, *labels: str, **figures: float) -> None:
        assert len(labels) == len(SECTIONS[section].labels)
        named = {name.replace("_", " "): value for name, value in figures.items()}
        self._running.append(Row(section, list(labels), named))

    def begin(self) -> None:
        self._running = []

    def resume(self, cache: Any, releases: str, order: list[str]) -> None:
        """Take over what tests measured that passed with the same code and releases."""
        self._cache, self._key, self._sources, self.order = cache, f"engine_results/{releases}", sources(), order
        kept = cache.get(self._key, {})
        if kept.get("sources") == self._sources:
            self.passed = {test: [Row(*row) for row in rows] for test, rows in kept["passed"].items() if test in order}

    def keep(self, test: str) -> None:
        """The running test has passed."""
        self.passed[test] = self._running
        if self._cache is not None:
            self._cache.set(self._key, {"sources": self._sources, "passed": self.passed})

    def write(self, path: Path, releases: str) -> None:
        """Replace the part of these releases, or add it."""
        rows = [row for test in self.order for row in self.passed[test]]
        block = "\n".join(
            [f"<!-- {releases} -->", f"## {releases}", "", *_sections(rows), f"<!-- end of {releases} -->"]
        )
        page = path.read_text(encoding="utf-8") if path.exists() else TITLE
        pattern = re.compile(f"<!-- {re.escape(releases)} -->.*?<!-- end of {re.escape(releases)} -->", re.DOTALL)
        page = pattern.sub(lambda _: block, page) if pattern.search(page) else f"{page}\n{block}\n"
        path.write_text(page, encoding="utf-8")


def sources() -> str:
    """A checksum of all that the tests run."""
    files = [
        path
        for folder in ("megatron_a2d", "checkpoints_tools", "bench", "tests")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if "tests/unit/" not in path.as_posix()
    ]
    total = hashlib.sha256(torch.__version__.encode())
    for path in files:
        total.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return total.hexdigest()


def _sections(rows: list[Row]) -> list[str]:
    texts = []
    for name, section in SECTIONS.items():
        own = [row for row in rows if row.section == name]
        if not own:
            continue
        figures = list(own[0].figures)
        worst = max((value for row in own for value in row.figures.values() if not math.isnan(value)), default=0.0)
        text = section.text.format(count=len(own), worst=f"{worst:.1e}")
        cells = table([*section.labels, *figures], [row.cells for row in own])
        texts.append(f"### {section.title}\n\n{text}\n\n{cells}\n")
    return texts
