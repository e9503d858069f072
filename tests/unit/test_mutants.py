"""`make test-mutants` on a project of one function: what is changed, and what becomes of it. Needs its packages."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

pytest.importorskip("mutmut")
from tests.mutants import verdicts
from tests.mutants.mutant_runner import Judge, Outcome
from tests.mutants.mutate import Mutant, sample
from tests.mutants.verdicts import Results

SOURCE = '''"""Prose stays as it is."""

from __future__ import annotations

import math

NAMES = ("a", "b c")


def halved(number: int | None = 3, *rest: int) -> int:
    """And here."""
    if number is None:
        raise ValueError("no number")
    for one, other in zip(rest, rest, strict=True):
        number += one - other
    while number > 100:
        number = number // 2
    return number + math.floor(0.25)
'''
TEST = """from package.module import halved

def test_halved():
    assert halved(101) == 50

def test_that_does_not_pass():
    assert halved(7) == 8
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for name, text in (("package/__init__.py", ""), ("package/module.py", SOURCE), ("tests/unit/test_module.py", TEST)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    return tmp_path


def changed(was: str, now: str) -> Mutant:
    assert SOURCE.count(was) == 1
    line = SOURCE[: SOURCE.index(was)].count("\n") + 1
    return Mutant("package/module.py", line, was, now, SOURCE.replace(was, now))


def test_what_is_changed(project: Path) -> None:
    target = project / "package" / "module.py"
    mutants = sample(project, [target], seed=1, size=1000)
    assert mutants == sample(project, [target], seed=1, size=1000) != sample(project, [target], seed=2, size=1000)
    assert sample(project, [target], seed=1, size=3) == mutants[:3]
    for mutant in mutants:
        assert mutant.source != SOURCE and mutant.was in SOURCE and mutant.now in mutant.source
        for kept in ("Prose stays", "And here", "no number", "int | None", "-> int", "import math", "__future__"):
            assert kept in mutant.source
        assert '"b c"' in mutant.source or "NAMES = None" in mutant.source
    assert any("number >= 100" in mutant.now for mutant in mutants)


def test_outcomes(project: Path, tmp_path: Path) -> None:
    target = project / "package" / "module.py"
    judge = Judge(project, project / "build", [target])
    outcomes = {
        ("number // 2", "number // 3"): Outcome.KILLED,
        ("number > 100", "number >= 100"): Outcome.SURVIVED,
        ("number = number // 2", "number = number * 2"): Outcome.TIMEOUT,
        ("math.floor(0.25)", "math.floor(0.35)"): Outcome.SURVIVED,
        ("import math", "import maths"): Outcome.KILLED,
    }
    results = Results(tmp_path / "results.jsonl")
    for (was, now), expected in outcomes.items():
        mutant = changed(was, now)
        outcome, detail = judge.judge(mutant)
        assert outcome is expected, detail
        assert (project / "build" / "tree" / "package" / "module.py").read_text() == SOURCE
        results.add(mutant, judge.digest(mutant), outcome, detail)
    again = Results(tmp_path / "results.jsonl")
    for (was, now), expected in outcomes.items():
        mutant = changed(was, now)
        assert again.known(mutant, judge.digest(mutant)) is expected
        assert again.known(mutant, "other tests") is (None if expected is Outcome.SURVIVED else expected)


def test_every_verdict_says_why_or_which_test() -> None:
    root = Path(__file__).resolve().parents[2]
    for entry in verdicts.entries():
        assert entry["was"] != entry["now"] and (root / entry["file"]).is_file()
        assert ("equivalent" in entry) != ("test" in entry)
        if "test" in entry:
            path, _, name = entry["test"].partition("::")
            assert f"def {name}(" in (root / path).read_text()
