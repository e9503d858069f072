"""Negative controls: defects that these tests exist to find are planted, and found by a wide margin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.cases import Case
from tests.parity.test_layouts import compare
from tests.transformer_engine.engine_cases import fusions
from tests.transformer_engine.engine_pool import EnginePool
from tests.transformer_engine.engine_results import EngineResults
from tests.transformer_engine.test_engine_layouts import TOLERANCE

EP = {"expert_model_parallel_size": 2}
# (defect, model, processes, settings)
PLANTED: list[tuple[str, str, int, dict[str, Any]]] = [
    ("causal_mask", "dense", 1, {}),
    ("lost_micro_batch", "dense", 1, fusions("dense")),
    ("lost_micro_batch", "moe", 1, fusions("moe")),
    ("wrong_expert_group", "moe", 2, {**EP, **fusions("moe")}),
    ("shifted_documents", "isolated", 1, fusions("isolated")),
]


@pytest.mark.parametrize(("defect", "kind", "ranks", "settings"), PLANTED)
def test_the_comparison_sees(
    defect: str,
    kind: str,
    ranks: int,
    settings: dict[str, Any],
    cases: dict[str, Case],
    reference: Callable[..., dict[str, Any]],
    engine_pool: EnginePool,
    engine_results: EngineResults,
) -> None:
    differences = compare(engine_pool, cases[kind], reference(kind), ranks, settings, defect=defect)
    seen = {name: differences[name] for name in ("gradients", "parameters")}
    engine_results.add("planted", defect.replace("_", " "), kind, **seen)
    assert min(seen.values()) > 100 * TOLERANCE, differences
