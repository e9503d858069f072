"""Experts placed on other ranks: the same losses, gradients and weights; the same checkpoint, bit for bit.

The placements are random permutations. Gradients and weights are compared by their place in the checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints_tools import export_hf
from megatron_a2d.checkpoint.placement_file import identity
from megatron_a2d.utils.atomic_write import read_json
from tests.cases import Case
from tests.parity.layouts import DISTRIBUTED, EP, ETP, PP, TP_SP, VPP
from tests.parity.pool import Pool
from tests.parity.test_layouts import compare
from tests.parity.test_reshard import content
from tests.placements import ORDERS, placed_copy

TOLERANCE = 1e-6
EP4 = {"expert_model_parallel_size": 4}
SEQUENTIAL = {"moe_grouped_gemm": False}


@pytest.fixture(scope="module")
def placed(cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory) -> Case:
    """The MoE model's checkpoint with a placement."""
    return placed_copy(cases["moe"], tmp_path_factory.mktemp("placed") / "checkpoint")


@pytest.fixture(scope="module")
def reference(cases: dict[str, Case], pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One process without a placement."""
    path = str(tmp_path_factory.mktemp("unplaced") / "moe.pt")
    case = cases["moe"]
    (result,) = pool.run(
        "train_steps", 1, checkpoint=case.checkpoint, settings=case.settings, num_steps=2, save_reference=path
    )
    return {**result, "path": path}


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        pytest.param(2, EP, id="EP2"),
        pytest.param(4, {**EP4, **DISTRIBUTED}, id="EP4, distributed optimizer"),
        pytest.param(2, {**EP, **SEQUENTIAL, **DISTRIBUTED}, id="EP2, experts one by one, distributed optimizer"),
        pytest.param(4, {**VPP, **EP}, id="VPP2, EP2"),
        pytest.param(2, {**TP_SP, **EP}, id="TP2+SP, EP2"),
        pytest.param(4, {**EP, **ETP}, id="EP2, ETP2"),
    ],
)
def test_a_placement_changes_nothing(
    ranks: int, settings: dict[str, Any], placed: Case, reference: dict[str, Any], pool: Pool
) -> None:
    differences = compare(pool, placed, reference, ranks, settings)
    assert all(value < TOLERANCE for value in differences.values()), differences


def test_it_is_applied(placed: Case, pool: Pool) -> None:
    """Under expert parallelism and unless it is turned off; each stage of a pipeline has its own layers."""

    def orders(ranks: int, **settings: Any) -> Any:
        results = pool.run(
            "train_steps", ranks, checkpoint=placed.checkpoint, settings={**placed.settings, **settings}, num_steps=0
        )
        return [result["orders"] for result in results]

    assert orders(2, **EP) == [ORDERS, ORDERS]
    assert orders(4, **PP, **EP) == [ORDERS[:2], ORDERS[:2], ORDERS[2:], ORDERS[2:]]
    assert orders(2) == orders(2, **EP, moe_expert_placement="none") == [[None] * 4] * 2


def test_monitoring_knows_where_the_experts_are(placed: Case, pool: Pool) -> None:
    """The busiest rank's load as logged is that of the tokens that its experts got."""
    ranks = pool.run("rank_loads", 2, checkpoint=placed.checkpoint, settings={**placed.settings, **EP})
    metrics = ranks[0][0]
    got = torch.tensor([tokens for _, tokens in ranks], dtype=torch.float64)
    assert metrics["by_layer"]["rank_imbalance"]["ep2"] == pytest.approx((got.max(0).values / got.mean(0)).tolist())
    elsewhere = {**placed.settings, **EP, "moe_expert_placement": "none"}
    others = pool.run("rank_loads", 2, checkpoint=placed.checkpoint, settings=elsewhere)[0][0]
    assert others["rank_imbalance"]["ep2"] != metrics["rank_imbalance"]["ep2"]
    for metric in ("load_imbalance_masked", "num_dead_experts", "load_tv_distance"):
        assert others[metric] == metrics[metric]


def test_checkpoints_keep_the_numbers(placed: Case, pool: Pool, tmp_path: Path) -> None:
    """Saved with and without, by local experts of both kinds, and loaded by the other: the same tensors, bit for bit."""

    def settings(name: str, **changes: Any) -> dict[str, Any]:
        return {
            **placed.settings, "load": placed.checkpoint, "save": str(tmp_path / name), "train_iters": 2,
            "save_interval": 2, **changes,
        }  # fmt: skip

    def resaved(name: str, source: Path, ranks: int, **changes: Any) -> Path:
        pool.run("resave", ranks, checkpoint=str(source), settings=settings(name, **changes))
        return tmp_path / name / "iter_0000002"

    pool.run("run", 4, settings=settings("run", **EP4, **DISTRIBUTED))
    first = tmp_path / "run" / "iter_0000002"
    expected = content(first)
    assert any(name.startswith("optimizer.state.exp_avg_sq.") and ".experts." in name for name in expected)
    pool.run("run", 1, settings=settings("alone"))
    alone = content(tmp_path / "alone" / "iter_0000002")
    assert max(float((tensor - alone[name]).abs().max()) for name, tensor in expected.items()) < TOLERANCE
    carried = read_json(first / "expert_placement.json", "it")
    assert carried["checkpoint"] == identity(first) and carried["order"] == ORDERS

    without = resaved("without", first, 1, moe_expert_placement="none")
    assert not (without / "expert_placement.json").exists()
    elsewhere = resaved("elsewhere", first, 4, **PP, **EP, **SEQUENTIAL)
    assert (elsewhere / "expert_placement.json").exists()
    back = resaved("back", elsewhere, 2, **EP, **DISTRIBUTED)
    for directory in (without, elsewhere, back):
        found = content(directory)
        assert found.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items()), directory


def test_exports_are_equal_bit_for_bit(placed: Case, pool: Pool, tmp_path: Path) -> None:
    """Of what was written under a placement, and of the same weights written by one process without."""
    settings = {**placed.settings, "load": placed.checkpoint, "save": str(tmp_path / "run"), "train_iters": 1}
    pool.run("run", 2, settings={**settings, **EP})
    resaved = {**settings, "save": str(tmp_path / "alone"), "moe_expert_placement": "none"}
    pool.run("resave", 1, checkpoint=str(tmp_path / "run"), settings=resaved)
    exports = [tmp_path / "exported" / name for name in ("run", "alone")]
    for export in exports:
        export_hf.main(["--checkpoint", str(tmp_path / export.name), "--out", str(export), "--no-verify"])
    run, alone = ((export / "model.safetensors").read_bytes() for export in exports)
    assert run == alone


def test_a_resumed_run_applies_it_again(placed: Case, pool: Pool, tmp_path: Path, cases: dict[str, Case]) -> None:
    """In one go, in two, and without: the same losses; the first two to the last bit."""

    def losses(name: str, stop_at: int | None = None, **changes: Any) -> list[float]:
        settings = {
            **placed.settings, **EP, "load": placed.checkpoint, "save": str(tmp_path / name), "train_iters": 4,
            "save_interval": 2, "log_interval": 1, **changes,
        }  # fmt: skip
        found: list[float] = pool.run("run", 2, settings=settings, stop_at=stop_at)[0]["losses"]
        return found

    whole = losses("whole")
    assert losses("halves", stop_at=2) + losses("halves") == whole
    without = losses("without", moe_expert_placement="none")
    assert without == pytest.approx(whole, rel=TOLERANCE)
