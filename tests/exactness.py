"""docs/exactness.md: what `make test-parity` and `make test-faults` measured, each in sections of its own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from tests.parity.layouts import Layout

TITLE = """# Exactness

Every figure here was measured by a test. `make test-parity` writes the first four sections, `make test-faults` the last.
All runs are on CPUs with gloo, through megatron.core's own schedules and checkpoints; nothing here was run on GPUs.
"""


class Compared(NamedTuple):
    """The largest differences of a layout from one process."""

    layout: Layout
    differences: dict[str, float]


class Resharded(NamedTuple):
    """A checkpoint saved under one layout and continued under another."""

    case: str
    saved: str
    loaded: str
    difference: float  # largest relative difference of the next three losses from the unbroken run's


class Fault(NamedTuple):
    """Something that was done to a run."""

    name: str
    tries: int
    lost: str
    end: str


class Exactness:
    """Collects figures; `write` replaces the sections of the page that they belong to."""

    def __init__(self) -> None:
        self.is_partial = False  # tests were left out or skipped: the page is not written
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
largest relative difference. Gradients (where they are whole: not under the distributed optimizer) and parameters after
the second step: largest absolute difference of any element. The tolerance is 1e-6; the largest difference of all is {worst:.1e}.

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

The same in bf16, held against what one process does to itself. It runs again with its sums in another order: **split**,
every contraction of a matrix product in 2, 3, 4 or 8 pieces, each rounded to bf16, as tensor parallelism sums them;
**batch**, micro-batches of 2, 4 and 8 samples; **order**, the samples of the batch reversed. A layout does these three
things to the sums, possibly all at once: where distances at most add up, its own is at most the sum of the largest of each
kind, and that sum is the bound. It is an estimate from a few reorderings, not a proof. Loss and gradient norm: relative (for
the bound: the norm of the gradients' difference). Gradients and parameters after the second step: the worst tensor's
root mean square difference, relative to its root mean square. The MoE model sends every token to all of its experts: where a
router chooses, the last bit decides between two experts, and no bound on sums holds for what follows.

{table(["one process", *quantities], own)}

{table(["model", "layout", "processes", *quantities], rows)}
"""


def _resume(resumed: list[tuple[str, int]]) -> str:
    rows = [[name, str(ranks), "equal in every bit", "equal in every bit"] for name, ranks in resumed]
    return f"""## Resume

Four steps, against two steps, an end without warning, and two more by new process groups. Warm-up, decay and learning rates
by role are in force.

{table(["layout", "processes", "losses", "weights and Adam's moments"], rows)}
"""


def _reshard(resharded: list[Resharded], saved: dict[str, float]) -> str:
    rows = [[item.case, item.saved, item.loaded, f"{item.difference:.1e}"] for item in resharded]
    worst, content = max(item.difference for item in resharded), max(saved.values())
    return f"""## Resharding

Model and optimizer saved under one layout after two steps, loaded under another, and three steps more: the largest
relative difference of those losses from an unbroken run on one process. Each layout is saved and loaded at least once, and six that
differ most in every pair. What the {len(saved)} layouts save is also compared tensor by tensor with what one process saves: the same
names and shapes, largest absolute difference {content:.1e}. Largest difference of the losses: {worst:.1e}.

{table(["model", "saved under", "continued under", "next three losses"], rows)}
"""


FAULTS = """What was done to runs of the tiny MoE model on two processes, and what it cost.
"""
