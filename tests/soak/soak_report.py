"""What a soak says: a row per fault, the targets, and the result file from which the document's table is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from rich.table import Table

from tests.soak.soak_run import BATCH, HANG_LIMIT, SAVE_INTERVAL

# A rank that hangs is named after the limit, a heartbeat of up to ten seconds, and one round of the watchdog.
HANG_FOUND = HANG_LIMIT + 30.0


@dataclass
class Row:
    """A fault and what became of it."""

    kind: str
    what: str  # in detail
    step: int  # the last one before it
    found_after: float | None = None  # seconds
    by: str = ""
    named: str = ""  # the line of the log that names it
    resumed: int | None = None  # iteration at which the run was resumed; None: it continued
    expected: int | None = None  # the newest checkpoint that the fault had left whole
    steps_again: int = 0
    bound: int = SAVE_INTERVAL  # steps that it may cost at most, of the checkpoints that the fault had left whole
    seconds_lost: float = 0.0  # until the run was again where it had been
    limit: float | None = None  # seconds within which it is to be found
    code: int | None = None  # exit code of the start that it ended
    problem: str = ""  # what else was not as it should be

    @property
    def beyond(self) -> int:
        """Steps lost that should not have been."""
        if self.resumed is None or self.expected is None:
            return 0
        return max(0, self.expected - self.resumed) + max(0, self.step - self.expected - self.bound)

    @property
    def is_late(self) -> bool:
        return self.limit is not None and (self.found_after is None or self.found_after > self.limit)


class Target(NamedTuple):
    """A line of the summary."""

    name: str
    wanted: str
    found: str
    is_met: bool


def targets(
    rows: Sequence[Row], wanted: int, kinds: Sequence[str], partial: list[str], differences: list[str]
) -> list[Target]:
    """All targets of a soak; `differences`: what of the run is not that of the unbroken one, one line each."""
    beyond = sum(row.beyond for row in rows)
    unnamed = [row for row in rows if not row.named]
    late = [row for row in rows if row.is_late]
    problems = [row for row in rows if row.problem]
    missing = sorted(set(kinds) - {row.kind for row in rows})
    hangs = [row.found_after or 0.0 for row in rows if row.limit is not None]
    slowest = f", the slowest after {max(hangs):.0f} s" if hangs else ""
    return [
        Target("faults", f">= {wanted}", str(len(rows)), len(rows) >= wanted),
        Target("kinds left out", "0", _listed(missing), not missing),
        Target("steps lost beyond the last interval", "0", str(beyond), beyond == 0),
        Target("faults that no log names", "0", _listed([row.kind for row in unnamed]), not unnamed),
        Target("hangs found too late", "0", _listed([row.kind for row in late]) + slowest, not late),
        Target("ends that were not expected", "0", _listed([row.problem for row in problems]), not problems),
        Target("partial directories left", "0", _listed(partial), not partial),
        Target("differences from the unbroken run", "0", _listed(differences), not differences),
    ]


def _listed(names: Sequence[str]) -> str:
    return str(len(names)) + (f": {'; '.join(names[:4])}{' ...' if len(names) > 4 else ''}" if names else "")


HEAD = ("", "fault", "at step", "found after", "by", "samples again", "time lost")


def cells(number: int, row: Row) -> tuple[str, ...]:
    found = "-" if row.found_after is None else f"{row.found_after:.1f} s"
    lost = f"{row.seconds_lost:.0f} s" if row.seconds_lost else "0"
    marks = (
        " BEYOND" * (row.beyond > 0) + " UNNAMED" * (not row.named) + " LATE" * row.is_late + " !" * bool(row.problem)
    )
    return str(number), row.what + marks, str(row.step), found, row.by, str(row.steps_again * BATCH), lost


def table(rows: Sequence[Row], title: str) -> Table:
    made = Table(title=title, title_justify="left")
    for number, name in enumerate(HEAD):
        made.add_column(name, justify="left" if number in (1, 4) else "right")
    for number, row in enumerate(rows, start=1):
        made.add_row(*cells(number, row))
    return made


def summary(found: Sequence[Target]) -> Table:
    made = Table(title="targets", title_justify="left")
    for name in ("", "target", "found", ""):
        made.add_column(name)
    for target in found:
        made.add_row(target.name, target.wanted, target.found, "met" if target.is_met else "MISSED")
    return made


def to_json(rows: Sequence[Row], found: Sequence[Target], **about: Any) -> dict[str, Any]:
    made = [asdict(row) | {"samples_again": row.steps_again * BATCH} for row in rows]
    return {**about, "rows": made, "targets": [target._asdict() for target in found]}
