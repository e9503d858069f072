"""The study on routers: loads from counts, its report on counts that are known, and its second start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_a2d.config.settings import build
from megatron_a2d.planner.routing import BALANCED, UNBALANCED, Routing, assumed
from megatron_a2d.planner.routing import EVEN as EVEN_RANKS
from megatron_a2d.study.ablations import routers
from megatron_a2d.study.fingerprints import EXTRA_START, hold_inputs
from megatron_a2d.study.jobs import Job
from megatron_a2d.study.load_course import Loads, rank_sizes
from megatron_a2d.study.runner import Runner
from megatron_a2d.utils.errors import UserError
from tests.tiny import write_tokens
from tests.unit.test_study import DOCS, base, write_start
from tests.unit.test_training import QWEN3_30B_A3B

EVEN = [[10] * 4] * 2
SKEWED = [[40, 0, 0, 0], [20, 20, 0, 0]]  # of 2 layers and 4 experts


def entry(masked: Any, unmasked: Any = EVEN, iteration: int = 0) -> dict[str, Any]:
    entropy = {"masked": [0.5, 1.0], "unmasked": [1.0, 1.0]}
    return {
        "iteration": iteration,
        "nelbo": 4.0,
        "top_k": 1,
        "choices": {"masked": masked, "unmasked": unmasked},
        "entropy": entropy,
    }


def test_loads_of_known_counts() -> None:
    loads = Loads.of(entry(SKEWED, [[0, 0, 40, 0], [10, 10, 10, 10]]))
    assert loads.imbalance("masked").tolist() == [4, 2] and loads.imbalance("unmasked").tolist() == [4, 1]
    assert loads.num_dead == 2 and loads.entropy == {"masked": 0.75, "unmasked": 1.0}
    # Of layer 1, 40 0 | 40 0; of layer 2, 30 30 | 10 10.
    assert loads.ranks(2).tolist() == [1, 1.5] and loads.ranks(4).tolist() == [2, 1.5]
    assert loads.ranks(2, placed_by=loads).tolist() == [1, 1]
    # Placed by other loads than one's own: experts 0 and 2 of layer 2, which were even, lie together.
    assert loads.ranks(2, placed_by=Loads.of(entry([[9, 1, 1, 9], [9, 1, 1, 9]]))).max() <= 1.5
    assert rank_sizes(8) == [2, 4, 8] and rank_sizes(128) == [2, 4, 8] and rank_sizes(6) == [2]


def records(nelbo: dict[str, float]) -> list[dict[str, Any]]:
    """Two seeds of every variant from both starts; masked tokens crowd where nothing balances them."""
    kept = {"ar": {"nelbo": 1.0}, "cloze": {"accuracy": 0.9}}
    found: list[dict[str, Any]] = [
        {"start": start, "variant": "", "seed": 1, "loads": [entry(SKEWED, iteration=9)], **kept}
        for start in routers.STARTS.values()
    ]
    moe = {f"load_imbalance_{kind}": 2.0 for kind in routers.KINDS}
    for seed in (1, 2):
        for variant in routers.VARIANTS:
            for start in routers.STARTS.values():
                counts = SKEWED if variant == routers.BASELINE else EVEN
                final = {"nelbo": 4.0 + nelbo.get(variant, 0.0) + seed / 64, "accuracy": 0.1}
                found.append(
                    {"start": start, "variant": variant, "seed": seed, **kept, "validation": [final],
                     "training": [{"iteration": 5, "moe": moe}, {"iteration": 10, "moe": moe}],
                     "loads": [entry(counts, iteration=5), entry(counts, iteration=10)]}
                )  # fmt: skip
    return found


def test_the_report_has_the_figures_of_its_runs(tmp_path: Path) -> None:
    text, rows = routers.report(records({"global, 1": 0.25, "z-loss": -0.5}), tmp_path)
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| with")]
    start = "without balancing"
    cells = {tuple(line[:2]): line[2:] for line in reversed(lines) if line[1] in routers.VARIANTS}  # the first table's
    assert cells[start, "nothing"][:2] == ["2", "4.023 ± 0.099"]
    shown = text.partition("minus nothing")[2].partition("\n\n")[0].splitlines()
    differences = {tuple(line.strip("| ").split(" | ")[:2]): line.strip("| ").split(" | ")[2:] for line in shown}
    assert differences[start, "global, 1"][0] == "0.2500" and differences[start, "z-loss"] == [
        "-0.5000",
        *["0.0000"] * 3,
    ]
    found = {(row["start"], row["variant"], row.get("seed")): row for row in rows}
    collapsed, even = found[start, "nothing", 2], found[start, "global, 1", 2]
    assert [at["iteration"] for at in collapsed["course"]] == [0, 5, 10] and collapsed["course"][-1]["masked"] == [4, 2]
    placed = [1.5, 1.0]  # of layer 1, experts 50 10 10 10; of layer 2, 30 30 10 10
    assert list(collapsed["busiest_rank"]["EP 2"].values()) == [[1.5, 1.5], placed, placed]
    # Of ranks with several experts, under the recipes' balancing: EP 2.
    assert routers.planner_imbalance(rows, routers.RECOMMENDED) == (1, 1)
    assert routers.planner_imbalance(rows, routers.BASELINE) == (1.5, 1.5)
    assert "global, 0.01 1.00 for time and 1.00 for memory; nothing 1.50 for time and 1.50 for memory" in text
    assert even["course"][-1]["dead"] == 0 and even["busiest_rank"]["EP 4"]["in order"] == [1, 1]
    assert (tmp_path / "routers.png").stat().st_size > 0 and json.dumps(rows)


@pytest.mark.parametrize(
    ("variant", "settings", "expected"),
    [
        (routers.RECOMMENDED, routers.VARIANTS[routers.RECOMMENDED], BALANCED),
        (routers.BASELINE, {}, UNBALANCED),
        (routers.BASELINE, {"moe_router_enable_expert_bias": True}, UNBALANCED),  # it ends at zero
    ],
)
def test_the_planner_assumes_what_the_study_measured(variant: str, settings: dict[str, Any], expected: Routing) -> None:
    rows = list(map(json.loads, (DOCS / "routers.jsonl").read_text().splitlines()))
    assert assumed(build(settings)) == expected and expected.at(8) == routers.planner_imbalance(rows, variant)
    assert assumed(build({"moe_router_force_load_balancing": True})).at(8) == EVEN_RANKS


def test_jobs_from_the_second_start(tmp_path: Path) -> None:
    jobs = routers.plan(base(train_iters=150), [1], QWEN3_30B_A3B)
    assert {job.start for job in jobs} == set(routers.STARTS)
    runner = Runner(tmp_path, base(), [], starts={routers.BALANCED: "another"})
    loads = {runner._settings(job)["load"] for job in jobs}
    assert loads == {"start", "another"}
    trained = next(job for job in jobs if job.trains)
    assert trained.settings["save_interval"] == 30 and trained.settings["log_interval"] == 5
    assert runner._settings(Job("x", {}, {}, start="before"))["load"] == str(tmp_path / "before")


def test_a_study_may_be_given_its_second_start_later_but_keeps_it(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens", 5, 200, seed=0)
    for name in ("start", "another", "third"):
        write_start(tmp_path / name, name)
    config = base(load=str(tmp_path / "start"), train_data_path=str(tmp_path / "tokens"))
    flag = f"{EXTRA_START}balanced"
    hold_inputs(tmp_path / "out", config)
    hold_inputs(tmp_path / "out", config, {flag: str(tmp_path / "another")})
    hold_inputs(tmp_path / "out", config)
    with pytest.raises(UserError, match=r"--load-balanced: \S+third differs from what"):
        hold_inputs(tmp_path / "out", config, {flag: str(tmp_path / "third")})


def test_counts_are_arrays_of_layers_and_experts() -> None:
    assert Loads.of(entry(SKEWED)).total.shape == (2, 4) and Loads.of(entry(SKEWED)).total.dtype == np.int64
