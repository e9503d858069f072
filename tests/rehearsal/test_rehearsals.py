"""A few rehearsals beside the plan, with Transformer Engine's layers; `make test-rehearsal` has the rest."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from queue import Queue
from typing import Any

import pytest

from tests.rehearsal import rehearsal_runner
from tests.rehearsal.rehearsal_cases import EVERY, FEW, LAYOUTS, PP, Case
from tests.rehearsal.rehearsal_results import PAGE, cases_of, memory, page, problems_of, traffic
from tests.rehearsal.rehearsal_runner import ROOT, run_cases


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, Any]]:
    return {result["case"]: result for result in run_cases(FEW, 1)}


@pytest.mark.parametrize("case", FEW, ids=lambda case: case.name)
def test_as_planned(case: Case, results: dict[str, dict[str, Any]]) -> None:
    """Memory within 5% of the planner's, traffic within 2%, all sends received."""
    result = results[case.name]
    assert not problems_of(result)
    stages = 2 if PP[0] in case.flags else 1
    assert len(result["ranks"]) == stages and (result["pairs"] > 0) == (stages > 1)


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


def test_the_page(results: dict[str, dict[str, Any]]) -> None:
    """Each case's counted bytes, and the plan's errors beside them; the largest of all in one sentence."""
    (first, *_) = results.values()
    memory_off = {part: [2.0**31, 2.0**31 * 1.03] for part in first["ranks"][0]["memory"]}
    rank = {**first["ranks"][0], "memory": memory_off}
    rank["traffic"] = {"tensor": [2.0**30, 2.0**30], "data": [2.0**32, 2.0**32 * 0.995]}
    result = {**first, "ranks": [rank, {**rank, "rank": 8}], "pairs": 12}
    shown = page([result])
    assert cases_of(shown) == [first["case"]]
    assert "| 0, 8 | 0 | 2 (+3.0%) | 2 (+3.0%) | 2 (+3.0%) | 2 (+3.0%) | 2 (+3.0%) |" in memory([result])
    assert "| 0 | 1 (+0.0%) | 4 (-0.5%) |" in traffic([result])
    assert (
        "1 cases, 2 ranks: weights, gradients and optimizer state within 3.0% of the plan, activations within 3.0%, the peak "
        "within 3.0%, traffic within 0.5%; 12 sends and receives, all paired."
    ) in shown
    assert "finalize_model_grads.py" in shown


def test_results_are_kept(results: dict[str, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the same code are not made again; those of other code, and of no rank, are."""
    made: list[str] = []

    def feed(waiting: Queue[Case], done: Queue[dict[str, Any]]) -> None:
        while not waiting.empty():
            case = waiting.get()
            made.append(case.name)
            done.put({**results[FEW[0].name], "case": case.name, "ranks": [] if case.gpus == 32 else [{"rank": 0}]})

    monkeypatch.setattr(rehearsal_runner, "_feed", feed)
    cases = [dataclasses.replace(FEW[0], gpus=gpus) for gpus in (16, 32)]

    def run() -> list[str]:
        made.clear()
        assert {result["case"] for result in run_cases(cases, 1, tmp_path)} == {case.name for case in cases}
        return list(made)

    assert run() == [case.name for case in cases]
    assert run() == [cases[1].name], "its result is no result"
    monkeypatch.setattr(rehearsal_runner, "ROOT", tmp_path)
    for name in results[FEW[0].name]["files"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("other code")
    assert run() == [case.name for case in cases]


def test_the_docs_say_what_the_page_says() -> None:
    """The committed page has every case, and its largest errors are those in the docs."""
    text = PAGE.read_text()
    assert cases_of(text) == [case.name for case in (*EVERY, *LAYOUTS)]
    (found,) = re.findall(r"^\d+ cases, .+$", text, re.MULTILINE)
    assert found in " ".join((ROOT / "docs" / "planning.md").read_text().split())
    assert f"rehearsed ({found.split(':')[0]}" in (ROOT / "README.md").read_text()
