"""Fixtures of the tests that compute with Transformer Engine's layers, and the page that `make test-te` writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.cases import Case
from tests.parity.pool import Pool
from tests.transformer_engine.engine_pool import EnginePool
from tests.transformer_engine.engine_results import EngineResults
from tests.transformer_engine.pretend_gpu import DIRECTORY, releases

RESULTS = EngineResults()
HERE = "tests/transformer_engine/"


@pytest.fixture(scope="session")
def engine_results() -> EngineResults:
    return RESULTS


@pytest.fixture(scope="session")
def engine_pool() -> Iterator[EnginePool]:
    """Ranks with Transformer Engine's layers."""
    if not DIRECTORY:
        pytest.skip("A2D_TRANSFORMER_ENGINE names no directory with Transformer Engine; `make test` sets it")
    pool = EnginePool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def reference(
    cases: dict[str, Case], pool: Pool, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., dict[str, Any]]:
    """reference(case, **settings): two steps of the local layers on one process that knows no Transformer Engine."""
    root = tmp_path_factory.mktemp("engine_references")
    made: dict[str, dict[str, Any]] = {}

    def make(kind: str, **settings: Any) -> dict[str, Any]:
        name = f"{kind} {sorted(settings.items())}"
        if name not in made:
            case, path = cases[kind], str(root / f"{len(made)}.pt")
            (result,) = pool.run(
                "train_steps", 1, checkpoint=case.checkpoint, settings={**case.settings, **settings}, num_steps=2,
                save_reference=path,
            )  # fmt: skip
            made[name] = {**result, "path": path}
        return made[name]

    return make


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With --engine-results, tests that have passed with this code are not run again (--cache-clear forgets them)."""
    if config.getoption("--engine-results") and DIRECTORY:
        RESULTS.resume(config.cache, releases(), [item.nodeid for item in items])
        items[:] = [item for item in items if item.nodeid not in RESULTS.passed]


def pytest_report_collectionfinish(config: pytest.Config) -> str | None:
    if not config.getoption("--engine-results") or not DIRECTORY:
        return None
    return f"{releases()}: {len(RESULTS.passed)} of {len(RESULTS.order)} passed in an earlier run and are not run again"


def pytest_deselected(items: list[pytest.Item]) -> None:
    RESULTS.is_partial = True


def pytest_runtest_setup(item: pytest.Item) -> None:
    RESULTS.begin()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    RESULTS.is_partial |= report.skipped
    if report.nodeid.startswith(HERE) and report.when == "call" and report.passed:
        RESULTS.keep(report.nodeid)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    path = session.config.getoption("--engine-results")
    if path is None or RESULTS.is_partial or not RESULTS.order or RESULTS.passed.keys() < set(RESULTS.order):
        return
    RESULTS.write(path, releases())
    if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
        session.exitstatus = pytest.ExitCode.OK  # all passed earlier
