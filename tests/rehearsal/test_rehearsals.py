"""A few rehearsals beside the plan, with Transformer Engine's layers; `make test-rehearsal` has the rest."""

from __future__ import annotations

from typing import Any

import pytest

from tests.rehearsal.rehearsal_cases import FEW, Case
from tests.rehearsal.rehearsal_results import problems_of, run_cases, table, waits


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, Any]]:
    return {result["case"]: result for result in run_cases(FEW, 1)}


@pytest.mark.parametrize("case", FEW, ids=lambda case: case.name)
def test_as_planned(case: Case, results: dict[str, dict[str, Any]]) -> None:
    """Memory within 5% of the planner's, traffic within 2%, all sends received."""
    result = results[case.name]
    assert not problems_of(result)
    assert len(result["ranks"]) == 2 and result["pairs"] > 0


def test_a_plan_that_is_off_is_seen(results: dict[str, dict[str, Any]]) -> None:
    """Control: 6% of the activations, 3% of the traffic, 2% of the weights."""
    (first, *_) = results.values()
    for kind, name, factor in (
        ("memory", "activations, logits", 0.94),
        ("traffic", "tensor", 1.03),
        ("memory", "weights", 1.02),
    ):
        rank = first["ranks"][0]
        counted, _ = rank[kind][name]
        changed = {**first, "ranks": [{**rank, kind: {**rank[kind], name: [counted, counted * factor]}}]}
        assert [name in line for line in problems_of(changed)] == [True], problems_of(changed)
    assert problems_of({**first, "problems": ["rank 0 hangs"]}) == ["rank 0 hangs"]


def test_the_table(results: dict[str, dict[str, Any]]) -> None:
    page = table(list(results.values()))
    assert all(f"| {case.name} |" in page for case in FEW)
    assert "finalize_model_grads.py" in waits(list(results.values()))
