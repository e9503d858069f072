"""Fixtures of the tests that compute with Transformer Engine's layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.cases import Case
from tests.exactness import Exactness
from tests.parity.pool import Pool
from tests.transformer_engine.engine_pool import EnginePool
from tests.transformer_engine.pretend_gpu import DIRECTORY, releases


@pytest.fixture(scope="session")
def engine_pool(exactness: Exactness) -> Iterator[EnginePool]:
    """Ranks with Transformer Engine's layers."""
    if not DIRECTORY:
        pytest.skip("A2D_TRANSFORMER_ENGINE names no directory with Transformer Engine; `make test` sets it")
    exactness.releases = releases()
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
