"""The page of `make test-te`: kept rows of passed tests, and the part of each pair of releases."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.transformer_engine import conftest, engine_results
from tests.transformer_engine.engine_results import EngineResults

PRODUCTS = {"output": 0.0, "input gradient": 5e-8}


class Cache(dict[str, Any]):
    """Pytest's: JSON in, JSON out."""

    def set(self, key: str, value: Any) -> None:
        self[key] = json.loads(json.dumps(value))


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch) -> Cache:
    monkeypatch.setattr(engine_results, "sources", lambda: "as they are")
    return Cache()


def measured(cache: Cache, releases: str, *tests: str) -> EngineResults:
    """A run of two tests, of which these pass."""
    results = EngineResults()
    results.resume(cache, releases, ["first", "second"])
    for number, test in enumerate(tests):
        results.begin()
        results.add("products", test, f"recipe {number}", **PRODUCTS)
        results.keep(test)
    return results


def test_what_has_passed_is_kept(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    before = measured(cache, "1.0", "first")
    before.begin()
    before.add("products", "second", "stopped", **PRODUCTS)
    after = measured(cache, "1.0")
    assert after.passed == {"first": [("products", ["first", "recipe 0"], PRODUCTS)]} == before.passed
    assert measured(cache, "2.0").passed == {}, "of other releases"
    monkeypatch.setattr(engine_results, "sources", lambda: "changed")
    assert measured(cache, "1.0").passed == {}


def test_releases_have_parts_of_their_own(cache: Cache, tmp_path: Path) -> None:
    page = tmp_path / "RESULTS.md"
    measured(cache, "1.0", "second", "first").write(page, "1.0")
    measured(cache, "2.0", "first", "second").write(page, "2.0")
    both = page.read_text()
    rows = [line for line in both.splitlines() if "recipe" in line and "5.0e-08" in line]
    assert [row.split(" | ")[0] for row in rows] == ["| first", "| second"] * 2, "in the order of the tests"
    cache.clear()
    measured(cache, "1.0", "first", "second").write(page, "1.0")
    again = page.read_text()
    assert again != both and again.index("## 1.0") < again.index("## 2.0") and again.count("\n## ") == 2
    assert again[again.index("## 2.0") :] == both[both.index("## 2.0") :]


@pytest.mark.parametrize(("known", "is_partial", "written"), [(2, False, True), (1, False, False), (2, True, False)])
def test_a_part_is_written_when_all_have_passed(
    known: int, is_partial: bool, written: bool, cache: Cache, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also by a run that has nothing left to do, whose exit code pytest makes 5."""
    results = measured(cache, "1.0", *["first", "second"][:known])
    results.is_partial = is_partial
    monkeypatch.setattr(conftest, "RESULTS", results)
    monkeypatch.setattr(conftest, "releases", lambda: "1.0")
    path, code = tmp_path / "RESULTS.md", pytest.ExitCode.NO_TESTS_COLLECTED
    session: Any = SimpleNamespace(config=SimpleNamespace(getoption={"--engine-results": path}.get), exitstatus=code)
    conftest.pytest_sessionfinish(session, code)
    assert path.exists() == written and session.exitstatus == (pytest.ExitCode.OK if written else code)
