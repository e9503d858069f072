"""Transformer Engine's experts under a placement (tests/parity/test_expert_placement.py): the same numbers, the same
checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_a2d.checkpoint.directory import resolve
from megatron_a2d.utils.atomic_write import read_json
from tests.cases import Case
from tests.parity.layouts import DISTRIBUTED, EP, OVERLAP, TP_SP
from tests.parity.pool import Pool
from tests.parity.test_layouts import compare
from tests.parity.test_reshard import content
from tests.placements import ORDERS, placed_copy, write_placement
from tests.transformer_engine.engine_cases import FUSIONS, fusions
from tests.transformer_engine.engine_pool import EnginePool
from tests.transformer_engine.engine_results import EngineResults
from tests.transformer_engine.pretend_gpu import BLACKWELL

TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def placed(cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory) -> Case:
    return placed_copy(cases["moe"], tmp_path_factory.mktemp("placed") / "checkpoint")


@pytest.mark.parametrize(
    ("name", "ranks", "settings"),
    [
        ("EP2, placed", 2, EP),
        ("EP2, placed, experts one by one, distributed optimizer", 2, {**EP, **DISTRIBUTED, "moe_grouped_gemm": False}),
        ("TP2+SP x DP2, EP4, placed, fused", 4, {**TP_SP, "expert_model_parallel_size": 4, **FUSIONS}),
    ],
)
def test_a_placement_changes_nothing(
    name: str, ranks: int, settings: dict[str, Any], placed: Case, reference: Callable[..., dict[str, Any]],
    engine_pool: EnginePool, engine_results: EngineResults,
) -> None:  # fmt: skip
    differences = compare(engine_pool, placed, reference("moe"), ranks, settings)
    is_sharded = settings.get("use_distributed_optimizer")
    shown = differences | ({"gradients": float("nan")} if is_sharded else {})
    engine_results.add("fp32", "moe", name, str(ranks), **shown)
    assert all(value < TOLERANCE for value in differences.values()), differences


@pytest.mark.parametrize("grouped", [True, False])
def test_its_checkpoint_keeps_the_numbers(
    grouped: bool, placed: Case, pool: Pool, engine_pool: EnginePool, tmp_path: Path
) -> None:
    """Model and optimizer as one process with local layers saves them."""

    def saved(name: str, pool: Any, ranks: int, **changes: Any) -> Any:
        settings = {
            **placed.settings, "load": placed.checkpoint, "save": str(tmp_path / name), "train_iters": 2,
            "save_interval": 2, **changes,
        }  # fmt: skip
        pool.run("run", ranks, settings=settings)
        return content(tmp_path / name / "iter_0000002")

    alone = saved("alone", pool, 1)
    found = saved("engine", engine_pool, 2, **EP, **DISTRIBUTED, moe_grouped_gemm=grouped)
    assert read_json(tmp_path / "engine" / "iter_0000002" / "expert_placement.json", "it")["order"] == ORDERS
    assert {name: tensor.shape for name, tensor in found.items()} == {
        name: tensor.shape for name, tensor in alone.items()
    }
    assert max(float((tensor - alone[name]).abs().max()) for name, tensor in found.items()) < TOLERANCE


def test_fp8_weights_are_placed(wide: dict[str, Any], engine_pool: EnginePool, tmp_path: Path) -> None:
    """Scales belong to an expert's weights: in FP8, too, a placement only reorders sums; another learning rate does not."""
    placed = tmp_path / "placed"
    shutil.copytree(wide["moe"]["checkpoint"], placed)
    write_placement(resolve(placed), ORDERS[:2])

    def losses(checkpoint: str, **changes: Any) -> list[float]:
        settings = {
            **wide["moe"]["settings"], **EP, **OVERLAP, **fusions("moe"), "bf16": True, "fp8_recipe": "mxfp8",
            "fp8_param_gather": True, "transformer_impl": "auto", "seq_length": 64, "global_batch_size": 4, "load": checkpoint,
            "train_iters": 3, "log_interval": 1, "save": str(tmp_path / f"run{len(list(tmp_path.iterdir()))}"), **changes,
        }  # fmt: skip
        values: list[float] = engine_pool.run("run", 2, settings=settings, capability=BLACKWELL)[0]["losses"]
        return values

    unplaced = losses(wide["moe"]["checkpoint"])
    assert losses(str(placed)) == pytest.approx(unplaced, rel=1e-4)
    assert losses(str(placed), lr=2e-2) != pytest.approx(unplaced, rel=1e-3)
