"""Measured tables in the marked sections of tests/parity/RESULTS.md (`make test-parity`, `make test-faults`)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from tests.parity.layouts import Layout

TITLE = """# Measured differences

Every figure was measured by a test on CPUs over gloo. `make test-parity` writes the first four sections, `make test-faults`
the last. Method, tolerances and a summary: [docs/exactness.md](../../docs/exactness.md).
"""


class Compared(NamedTuple):
    """The largest differences of a layout from one process."""

    layout: Layout
    differences: dict[str, float]


class Resharded(NamedTuple):
    """A checkpoint saved under one layout and resumed under another."""

    case: str
    saved: str
    loaded: str
    difference: float  # largest relative difference of the next three losses from the uninterrupted run's


class Fault(NamedTuple):
    """A fault injected into a run."""

    name: str
    tries: int
    lost: str
    end: str


class Exactness:
    """Collects figures; `write` replaces their sections in the file."""

    def __init__(self) -> None:
        self.is_partial = False  # tests were deselected or skipped: nothing is written
        self.fp32: list[Compared] = []
        self.bf16: list[Compared] = []
        self.bf16_bounds: dict[str, dict[str, float]] = {}
        self.resumed: list[tuple[str, int]] = []
        self.resharded: list[Resharded] = []
        self.saved: dict[str, float] = {}
        self.faults: list[Fault] = []

    def write(self, path: Path) -> None:
        page = path.read_text(encoding="utf-8") if path.exists() else TITLE
        for name, text in self._sections().items():
            block = f"<!-- {name} -->\n{text.strip()}\n<!-- end of {name} -->\n"
            pattern = re.compile(f"<!-- {name} -->.*?<!-- end of {name} -->\n", re.DOTALL)
            page = pattern.sub(lambda _, block=block: block, page) if pattern.search(page) else f"{page}\n{block}"
        path.write_text(page, encoding="utf-8")

    def faults_table(self) -> str:
        rows = [[fault.name, str(fault.tries), fault.lost, fault.end] for fault in self.faults]
        return table(["fault", "tries", "lost", "end"], rows)

    def _sections(self) -> dict[str, str]:
        sections = {}
        if self.fp32:
            sections["layouts"] = _layouts(self.fp32)
        if self.bf16:
            sections["bf16"] = _bf16(self.bf16, self.bf16_bounds)
        if self.resumed:
            sections["resume"] = _resume(self.resumed)
        if self.resharded:
            sections["reshard"] = _reshard(self.resharded, self.saved)
        if self.faults:
            sections["faults"] = f"## Faults\n\n{FAULTS}\n{self.faults_table()}"
        return sections


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _figures(layout: Layout, differences: dict[str, float]) -> list[str]:
    return [
        "sharded" if name == "gradients" and layout.is_sharded else f"{value:.1e}"
        for name, value in differences.items()
    ]


def _layouts(measured: list[Compared]) -> str:
    quantities = list(measured[0].differences)
    rows = []
    for layout, differences in measured:
        rows.append([layout.case, layout.name, str(layout.ranks), *_figures(layout, differences)])
    worst = max(value for item in measured for value in item.differences.values())
    return f"""## Layouts, fp32

{len(measured)} layouts against one process: two optimizer steps on the same global batch of 8 samples. Loss and gradient norm:
largest relative difference. Gradients (not sharded by the distributed optimizer) and parameters after the second step:
largest absolute difference of any element. The tolerance is 1e-6; the largest difference of all is {worst:.1e}.

{table(["model", "layout", "processes", *quantities], rows)}
"""


def _bf16(measured: list[Compared], bounds: dict[str, dict[str, float]]) -> str:
    quantities = list(measured[0].differences)
    own = [[name, *(f"{values[key]:.1e}" for key in quantities)] for name, values in bounds.items()]
    rows = [
        [layout.case, layout.name, str(layout.ranks), *_figures(layout, differences)]
        for layout, differences in measured
    ]
    return f"""## Layouts, bf16

The same in bf16, compared with the effect of reordered sums in one process: **split**, every contraction of a matrix product
in 2, 3, 4 or 8 slices, each rounded to bf16, as under tensor parallelism; **batch**, micro-batches of 2, 4 and 8 samples;
**order**, the samples of the batch reversed. A layout may do all three, so the bound is the sum of the largest difference of
each kind (twice that for the loss, a single number): an estimate from a few reorderings, not a proof. Loss and gradient norm: relative (bound: the norm of the
gradients' difference). Gradients and parameters after the second step: the worst tensor's root mean square difference,
relative to its root mean square. The MoE model routes every token to all experts: with top-k routing, the last bit can
decide between two experts, and no bound on sums holds afterwards.

{table(["one process", *quantities], own)}

{table(["model", "layout", "processes", *quantities], rows)}
"""


def _resume(resumed: list[tuple[str, int]]) -> str:
    rows = [[name, str(ranks), "bitwise equal", "bitwise equal"] for name, ranks in resumed]
    return f"""## Resume

Four uninterrupted steps against two steps, an abrupt end, and two more in new process groups, with warm-up, decay and
learning rates by role.

{table(["layout", "processes", "losses", "weights and Adam's moments"], rows)}
"""


def _reshard(resharded: list[Resharded], saved: dict[str, float]) -> str:
    rows = [[item.case, item.saved, item.loaded, f"{item.difference:.1e}"] for item in resharded]
    worst, content = max(item.difference for item in resharded), max(saved.values())
    return f"""## Resharding

Model and optimizer are saved under one layout after two steps, loaded under another, and trained for three more: the
largest relative difference of those losses from an uninterrupted run on one process. Every layout is saved and loaded at
least once, and six dissimilar ones in every pair. What the {len(saved)} layouts save is also compared tensor by
tensor with the checkpoint of one process: equal names and shapes, largest absolute difference {content:.1e}. Largest difference of the losses: {worst:.1e}.

{table(["model", "saved under", "resumed under", "next three losses"], rows)}
"""


FAULTS = """Faults injected into runs of the tiny MoE model on two processes, and what they cost.
"""
