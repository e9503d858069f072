"""The judgement of a soak: each target is missed by the rows, directories and weights that should miss it."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench.soak_table import block
from tests.soak.fault_kinds import flip_byte, took
from tests.soak.soak_report import HANG_FOUND, Row, targets, to_json
from tests.soak.soak_run import BATCH, EndedError, Run, Tail

KINDS = ["a", "b"]
GOOD = [
    Row("a", "a of 1", step=14, found_after=2.0, by="x", named="error: a", resumed=12, expected=12, steps_again=2),
    Row("b", "b", step=20, found_after=30.0, by="y", named="error: b", limit=HANG_FOUND),
]
BAD: dict[str, Any] = {
    "faults": dict(wanted=3),
    "kinds left out": dict(kinds=[*KINDS, "c"]),
    # From an older checkpoint than the newest; and from the newest, which was too old.
    "steps lost beyond the last interval": dict(row=dict(resumed=8)),
    "faults that no log names": dict(row=dict(named="")),
    "hangs found too late": dict(row=dict(limit=1.0)),
    "ends that were not expected": dict(row=dict(problem="exit code 9")),
    "partial directories left": dict(partial=[".iter_0000004.partial-x-1"]),
    "differences from the unbroken run": dict(differences=["weight"]),
}


def judged(wanted: int = 2, kinds: Any = KINDS, row: Any = None, partial: Any = (), differences: Any = ()) -> list[str]:
    """The names of the targets that are missed."""
    rows = [Row(**{**vars(GOOD[0]), **(row or {})}), GOOD[1]]
    return [
        target.name for target in targets(rows, wanted, kinds, list(partial), list(differences)) if not target.is_met
    ]


def test_all_targets_are_met() -> None:
    assert judged() == []


@pytest.mark.parametrize("name", BAD)
def test_a_target_is_missed(name: str) -> None:
    assert judged(**BAD[name]) == [name]


def test_a_run_that_saves_too_rarely_loses_too_much() -> None:
    assert Row("a", "a", step=17, resumed=12, expected=12, bound=4).beyond == 1
    assert Row("a", "a", step=17, resumed=12, expected=12, bound=8).beyond == 0


def test_a_hang_that_nobody_finds_is_late() -> None:
    assert Row("a", "a", step=1, limit=30.0).is_late and not Row("a", "a", step=1).is_late


def test_the_table_of_the_documents() -> None:
    about = dict(
        command="make soak", commit="abc", machine={"cpu": "X", "cores": 2, "torch": "2"}, minutes_taken=5.0, steps=90
    )
    stored = to_json(GOOD, targets(GOOD, 3, KINDS, [], []), **about)
    lines = block(stored).splitlines()
    assert lines[2] == f"| a | 1 | 2.0 s, 2.0 s | x | {2 * BATCH} | - |"
    assert lines[5].startswith("Missed: faults 2 (>= 3 wanted). Met: kinds left out 0, steps lost")


def test_a_flipped_byte_does_not_show_in_size_and_time(tmp_path: Any) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(100))
    before = path.stat()
    flip_byte(path, 50)
    assert path.read_bytes() == bytes(50) + b"\x04" + bytes(49)
    assert (path.stat().st_mtime_ns, path.stat().st_size) == (before.st_mtime_ns, before.st_size)
    flip_byte(path, 50)
    assert path.read_bytes() == bytes(100)


def test_a_tail_waits_for_the_end_of_a_line(tmp_path: Any) -> None:
    tail = Tail(tmp_path / "log")
    assert tail.read() == []
    (tmp_path / "log").write_text("one\ntw")
    assert [line.text for line in tail.read()] == ["one"]
    (tmp_path / "log").write_text("one\ntwo\n")
    assert [line.text for line in tail.read()] == ["two"]
    (tmp_path / "log").write_text("one\n")  # cut by a torn write
    assert tail.read() == []
    (tmp_path / "log").write_text("one\nthree\n")
    assert [line.text for line in tail.read()] == ["three"]
    (tmp_path / "log").write_text("one\nthr")  # cut within a line, which the next start removes before it writes
    assert tail.read() == []
    (tmp_path / "log").write_text("one\nanother one\n")
    assert [line.text for line in tail.read()] == ["another one"]


def test_only_a_slow_checkpoint_names_a_slow_disk() -> None:
    line = "checkpoint run/iter_0000004: written in 2.50 s, training waited 0.25 s"
    assert took(line, 2.0) and not took(line, 3.0) and not took("", 0.0)


def test_a_missing_line_is_told_in_plain_words(tmp_path: Path) -> None:
    """As docs/cluster.md prints it: no list and no regular expression."""
    (tmp_path / "output.log").write_text("another line\n")
    run = object.__new__(Run)
    run.log = Tail(tmp_path / "log.jsonl")
    run.starts = [SimpleNamespace(output=Tail(tmp_path / "output.log"), is_over=lambda: False)]  # type: ignore[list-item]
    patterns = [(r"checkpoint \d+", "x"), (r"error: .*iter_7/\S+ (could not|cannot) be written", "y")]
    line = r'no log line like "error: ... iter_7/ ... could not or cannot be written"'
    with pytest.raises(EndedError, match=re.escape(line) + " within 0 s"):
        run.find(patterns, 0.0, patience=0.0)
    with pytest.raises(EndedError, match=re.escape(line) + " before the run ended"):
        run.find(patterns, 0.0, is_over=lambda: True)
